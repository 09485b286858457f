//! Requests to stop: by Ctrl-C, from elsewhere, or because the time is over.

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
#[cfg(feature = "serve")]
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::exit::Exit;
use super::terminal;

/// The signal that asked for a stop, or 0, or [`TIME`].
static STOP: AtomicI32 = AtomicI32::new(0);
/// In place of a signal: the time of `--minutes` is over.
const TIME: i32 = -1;

/// How long a scheduler's signal waits for the current step. Kubernetes and Slurm kill after 30 seconds.
const GRACE: Duration = Duration::from_secs(18);

/// Whether a stop was asked for.
pub(crate) fn stopping() -> bool {
    STOP.load(Ordering::Relaxed) != 0
}

/// The exit code of a program that was asked to stop.
pub(crate) fn exit() -> Exit {
    match STOP.load(Ordering::Relaxed) {
        0 => Exit::Stopped(SIGINT),
        TIME => Exit::Again,
        signal => Exit::Stopped(signal),
    }
}

/// Handles a signal: the first one asks for a stop at the next step, the second ends the program at once. Signals that
/// people do not type end it after [`GRACE`], too: what was finished and the last checkpoint are on the disk.
fn take(signal: i32) {
    if ![0, TIME].contains(&STOP.swap(signal, Ordering::Relaxed)) {
        leave();
    }
    let again = match signal {
        SIGINT => "Ctrl-C again stops",
        _ => "a second signal stops",
    };
    terminal::message(format_args!("stopping after this step; {again} at once"));
    if signal != SIGINT {
        let wait = || {
            std::thread::sleep(GRACE);
            terminal::message("stopping within a step, which takes too long");
            leave();
        };
        // Without this thread, the program ends after its step.
        let _ = std::thread::Builder::new()
            .name("grace".to_owned())
            .spawn(wait);
    }
}

/// Asks for a stop at the next step when this time has passed, unless a signal has; the exit code is then that of
/// [`Exit::Again`].
pub(crate) fn stop_after(time: Duration) -> anyhow::Result<()> {
    let wait = move || {
        std::thread::sleep(time);
        if (STOP.compare_exchange(0, TIME, Ordering::Relaxed, Ordering::Relaxed)).is_ok() {
            terminal::message("the time is over: stopping after this step");
        }
    };
    std::thread::Builder::new()
        .name("time".to_owned())
        .spawn(wait)?;
    Ok(())
}

#[expect(
    clippy::exit,
    reason = "a second Ctrl-C must not wait for the work to end"
)]
fn leave() {
    std::process::exit(exit().code().into());
}

/// The number of Ctrl-C's signal, on every system.
const SIGINT: i32 = 2;

/// Whether the end of standard input asks for a stop.
static WITH_STDIN: AtomicBool = AtomicBool::new(false);

/// Makes the end of standard input count as Ctrl-C, once interrupts are caught (`--stop-with-stdin`).
pub(crate) fn stop_with_stdin() {
    WITH_STDIN.store(true, Ordering::Relaxed);
}

/// The lines of standard input, whose end counts as Ctrl-C, for a process that runs what they say.
#[cfg(feature = "serve")]
pub(crate) fn lines_until_stop() -> anyhow::Result<Receiver<String>> {
    let (sender, lines) = channel();
    let read = move || {
        let read = std::io::stdin().lines().map_while(Result::ok);
        // Fails once nobody listens any more.
        let _ = { read }.try_for_each(|line| sender.send(line));
        take(SIGINT);
    };
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(read)?;
    Ok(lines)
}

/// Waits for the end of standard input and ignores its contents.
fn watch_stdin() -> anyhow::Result<()> {
    let wait = || {
        let mut stdin = std::io::stdin().lock();
        let mut ignored = [0; 256];
        while stdin.read(&mut ignored).is_ok_and(|read| read > 0) {}
        take(SIGINT);
    };
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(wait)?;
    Ok(())
}

/// Makes the first Ctrl-C (or SIGTERM, or SIGHUP when the terminal is closed) ask for a stop at the next step, and
/// the second one end the program at once. A signal that was ignored when the program started stays ignored, as
/// `nohup` and shells (for background processes) intend.
pub(crate) fn catch_interrupts() -> anyhow::Result<()> {
    static CAUGHT: AtomicBool = AtomicBool::new(false);
    if CAUGHT.swap(true, Ordering::Relaxed) {
        return Ok(()); // by an earlier command of this process
    }
    if WITH_STDIN.load(Ordering::Relaxed) {
        watch_stdin()?;
    }
    #[cfg(unix)]
    catch_others()?;
    #[cfg(unix)]
    if is_ignored(SIGINT) {
        return Ok(());
    }
    Ok(ctrlc::set_handler(|| take(SIGINT))?)
}

/// Unix signals besides Ctrl-C's.
#[cfg(unix)]
fn catch_others() -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGTERM};
    let caught = [SIGTERM, SIGHUP].into_iter();
    let caught: Vec<i32> = caught.filter(|signal| !is_ignored(*signal)).collect();
    let mut signals = signal_hook::iterator::Signals::new(caught)?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || signals.forever().for_each(take))?;
    Ok(())
}

/// Whether this program was started with a signal ignored.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    ignored_by_kernel(signal).unwrap_or_else(|| ignored_by_shell(signal))
}

/// Reads it from the bits of `SigIgn` in Linux's proc(5).
#[cfg(unix)]
fn ignored_by_kernel(signal: i32) -> Option<bool> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))?;
    let ignored = u64::from_str_radix(line.trim(), 16).ok()?;
    Some(ignored >> (signal - 1) & 1 == 1)
}

/// Asks a shell, which works on any system: a shell cannot trap a signal that was ignored when it started (POSIX,
/// `trap`), and a program started from here inherits the ignored signals.
#[cfg(unix)]
fn ignored_by_shell(signal: i32) -> bool {
    let script = format!("trap 'exit 7' {signal}; kill -{signal} $$; exit 0");
    let status = std::process::Command::new("sh")
        .args(["-c", &script])
        .status();
    status.is_ok_and(|status| status.code() == Some(0))
}

#[cfg(all(test, unix))]
mod tests {
    use signal_hook::consts::{SIGHUP, SIGTERM, SIGWINCH};

    use super::*;

    #[test]
    fn what_is_ignored_is_told_in_both_ways_alike() {
        for signal in [SIGHUP, SIGTERM, SIGINT, SIGWINCH] {
            if let Some(ignored) = ignored_by_kernel(signal) {
                assert_eq!(ignored_by_shell(signal), ignored, "{signal}");
            }
        }
    }
}
