//! Ctrl-C, the checkpoint it leaves, and resuming from it.
#![cfg(unix)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::{Done, PAIR, run, signal, start, succeed, wait_for, workplace};

/// Long enough to be interrupted in the middle.
const LONG: &str = "--steps 150 --checkpoint-every 1 --select-every 0";

#[test]
fn an_interrupted_run_goes_on_to_the_same_result() {
    let work = workplace();
    let learn = format!("learn --config tiny.toml {PAIR} {LONG}");
    succeed(
        work.path(),
        &format!("{learn} -q -o straight.safetensors --trace straight_trace.safetensors"),
    );

    let trace = "--trace trace.safetensors";
    let child = start(work.path(), &format!("{learn} -o d.safetensors {trace}"));
    let checkpoint = work.path().join("d.checkpoint.safetensors");
    wait_for(&checkpoint);
    signal("-INT", &child.id().to_string());
    let done: Done = child.wait_with_output().unwrap().into();
    assert_eq!(done.code, Some(130), "{}", done.stderr);
    assert!(
        done.stderr.contains("of 150 steps of learning"),
        "{}",
        done.stderr
    );
    assert!(done.stderr.contains("with `--resume`"), "{}", done.stderr);
    assert!(checkpoint.exists() && !work.path().join("d.safetensors").exists());

    let again = run(work.path(), &format!("{learn} -o d.safetensors"));
    assert_eq!(again.code, Some(64));
    assert!(
        again
            .stderr
            .contains("an interrupted run left a checkpoint"),
        "{}",
        again.stderr
    );

    succeed(
        work.path(),
        &format!("{learn} -q -o d.safetensors --resume {trace}"),
    );
    assert!(!checkpoint.exists());
    let read = |name: &str| fs::read(work.path().join(name)).unwrap();
    assert!(
        read("d.safetensors") == read("straight.safetensors"),
        "the results differ"
    );
    // The trace resumes too.
    assert!(
        read("trace.safetensors") == read("straight_trace.safetensors"),
        "the traces differ"
    );
}

#[test]
fn the_exit_code_tells_the_signal() {
    let work = workplace();
    for (name, code) in [("TERM", 143), ("HUP", 129)] {
        let child = start(
            work.path(),
            &format!(
                "learn --config tiny.toml {PAIR} --steps 100000 --checkpoint-every 1 --select-every 0 -o {name}"
            ),
        );
        wait_for(&work.path().join(format!("{name}.checkpoint")));
        signal(&format!("-{name}"), &child.id().to_string());
        let done: Done = child.wait_with_output().unwrap().into();
        assert_eq!(done.code, Some(code), "{}", done.stderr);
        assert!(done.stderr.contains("with `--resume`"), "{}", done.stderr);
    }
}

/// Starts the program as `nohup` does.
#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    let work = workplace();
    let learn = format!("learn --config tiny.toml {PAIR} {LONG} -o d.safetensors");
    for signals in ["HUP", "INT TERM"] {
        let script = format!("trap '' {signals}; exec \"$0\" {learn} --overwrite");
        let child = Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_dinv")])
            .current_dir(work.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for(&work.path().join("d.checkpoint.safetensors"));
        for name in signals.split(' ') {
            signal(&format!("-{name}"), &child.id().to_string());
        }
        let done: Done = child.wait_with_output().unwrap().into();
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        assert!(!done.stderr.contains("stopping"), "{}", done.stderr);
    }
}

#[test]
fn captions_stop_after_the_picture() {
    let work = workplace();
    let images = "b.png ".repeat(2000);
    let mut child = start(work.path(), &format!("caption --config tiny.toml {images}"));
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    signal("-INT", &child.id().to_string());
    let printed = 1 + lines.count();
    let done: Done = child.wait_with_output().unwrap().into();
    assert_eq!(done.code, Some(130), "{}", done.stderr);
    assert!(printed < 2000, "{printed}");
    let stopped = format!("stopped after {printed} of 2000 ");
    assert!(done.stderr.contains(&stopped), "{}", done.stderr);
}

#[test]
fn a_second_interrupt_ends_the_program_at_once() {
    let work = workplace();
    // A step of many samples takes longer than both interrupts: after the first only, the program waits for its end.
    let mut child = start(
        work.path(),
        &format!(
            "learn --config tiny.toml {PAIR} --steps 20 --checkpoint-every 1 --samples-per-step 300 \
             --no-memory-check"
        ),
    );
    wait_for(&work.path().join("difference.checkpoint.safetensors"));
    signal("-INT", &child.id().to_string());
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut next = || lines.next().transpose().unwrap();
    while next().expect("nothing was said of the first interrupt")
        != "stopping after this step; Ctrl-C again stops at once"
    {}
    signal("-INT", &child.id().to_string());
    assert_eq!(next(), None, "the step was waited for");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// Sends a command as a scheduler does: in a slot that is too short for it, and again until it is done.
fn in_slots(folder: &std::path::Path, command: &str) {
    let short = run(folder, &format!("{command} --minutes 0.02"));
    assert_eq!(short.code, Some(75), "{}", short.stderr);
    for expected in ["the time is over", "stopped after"] {
        assert!(short.stderr.contains(expected), "{}", short.stderr);
    }
    assert!(!short.stderr.contains("error: "), "{}", short.stderr);
    succeed(folder, &format!("{command} --minutes 60"));
}

#[test]
fn work_in_time_slots_comes_to_the_same_result() {
    let work = workplace();
    let steps = "--steps 800 --select-every 0 --checkpoint-every 1";
    let learn = format!("learn -q --config tiny.toml {PAIR} {steps}");
    succeed(work.path(), &format!("{learn} -o straight.safetensors"));
    in_slots(work.path(), &format!("{learn} -o d.safetensors"));
    let read = |name: &str| fs::read(work.path().join(name)).unwrap();
    assert!(read("d.safetensors") == read("straight.safetensors"));

    let analogy =
        format!("analogy -q --config tiny.toml {PAIR} --b b.png --caption-b noon {steps} -o out");
    in_slots(work.path(), &analogy);
    assert!(read("out/difference.safetensors") == read("straight.safetensors"));

    let many = work.path().join("many");
    fs::create_dir(&many).unwrap();
    for number in 0..12 {
        let copy = many.join(format!("{number}.png"));
        fs::copy(work.path().join("b.png"), copy).unwrap();
    }
    let apply = "apply d.safetensors -q --config tiny.toml --b many --num-inference-steps 200";
    in_slots(work.path(), &format!("{apply} -o made"));
    assert_eq!(fs::read_dir(work.path().join("made")).unwrap().count(), 12);
}

#[test]
fn a_time_is_given_in_minutes_and_keeps_what_is_there() {
    let work = workplace();
    for (flags, expected) in [
        ("--minutes soon", "expected minutes, such as 55 or 0.5"),
        ("--minutes -1", "unexpected argument"),
        ("--minutes 1e9", "at most a year"),
        (
            "--minutes 5 --overwrite",
            "cannot be used with '--overwrite'",
        ),
    ] {
        let learn = format!("learn --config tiny.toml {PAIR} -o d.safetensors {flags}");
        super::refused(work.path(), &learn, 64, &[expected]);
    }
    // The checkpoint of another run is not taken for this one's.
    let learn = format!("learn -q --config tiny.toml {PAIR} -o d.safetensors --minutes 0.03");
    let first = run(
        work.path(),
        &format!("{learn} --steps 100000 --select-every 0"),
    );
    assert_eq!(first.code, Some(75), "{}", first.stderr);
    let expected = "the checkpoint does not belong to this run";
    super::refused(
        work.path(),
        &format!("{learn} --alpha 0.3"),
        65,
        &[expected],
    );
}

/// A picture that never comes stands for a step that takes too long.
#[test]
fn a_scheduler_s_signal_ends_the_program_in_time() {
    let work = workplace();
    let made = Command::new("mkfifo")
        .arg(work.path().join("never"))
        .status();
    assert!(made.unwrap().success());
    let child = start(work.path(), "caption --model model never");
    std::thread::sleep(std::time::Duration::from_secs(2));
    let sent = std::time::Instant::now();
    signal("-TERM", &child.id().to_string());
    let done: Done = child.wait_with_output().unwrap().into();
    let time = sent.elapsed().as_secs_f64();
    assert_eq!(done.code, Some(143), "{}", done.stderr);
    assert!((17.0..20.0).contains(&time), "{time} s");
    assert!(
        done.stderr.contains("which takes too long"),
        "{}",
        done.stderr
    );
}
