//! `dinv eval`: runs that are complete, interrupted, resumed and refused.

use std::fs;
use std::path::Path;

use difference_inversion::util::arrays::Arrays;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{dinv, entries, golden, run, succeed, workplace};

mod skipped;
#[cfg(target_os = "linux")]
mod workers;

/// A workplace with a suite of three analogies of two kinds in `list.jsonl`.
pub(super) fn workplace_with_suite() -> TempDir {
    let work = workplace();
    let line = |name: &str, kind: &str, [a, a_prime, b]: [&str; 3]| {
        let picture = |name: &str| format!("{name}.png");
        json!({
            "name": name, "kind": kind, "a": picture(a), "a_prime": picture(a_prime),
            "b": picture(b), "b_prime": picture(a_prime),
            "captions": {"a": "day", "a_prime": "night", "b": "noon", "b_prime": "evening, \"late\""},
        })
    };
    let lines = [
        line("one", "sky", ["a", "a_prime", "b"]),
        line("two", "sky", ["b", "a", "a_prime"]),
        line("three", "ground", ["a_prime", "b", "a"]),
    ];
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    fs::write(work.path().join("list.jsonl"), text.join("\n")).unwrap();
    work
}

/// Runs on the tiny model.
pub(super) fn eval(arguments: &str) -> String {
    format!("eval run --config tiny.toml --suite list.jsonl {arguments}")
}

/// The tables of the run in `out`.
fn tables(work: &Path) -> String {
    fs::read_to_string(work.join("out/report.md")).unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_run_leaves_pictures_scores_and_tables() {
    let work = workplace_with_suite();
    let done = succeed(
        work.path(),
        &eval("--methods difference-inversion,sdedit,no-clip -o out"),
    );
    let out = work.path().join("out");
    assert_eq!(
        entries(&out),
        [
            "difference-inversion",
            "learned",
            "no-clip",
            "pictures",
            "report.html",
            "report.json",
            "report.md",
            "results.csv",
            "run.json",
            "sdedit",
        ]
    );
    assert_eq!(
        entries(&out.join("sdedit/one")),
        ["b_prime.png", "result.json"]
    );
    let brief: Vec<&str> = done.stdout.lines().collect();
    assert_eq!(brief.len(), 2 + 3, "{}", done.stdout);
    assert_eq!(brief[0], "3 analogies");
    assert!(brief[1].contains("CLIP direction"), "{}", done.stdout);
    assert!(brief.iter().all(|line| line.chars().count() <= 80));
    assert!(
        done.stderr.ends_with("done: open out/report.html\n"),
        "{}",
        done.stderr
    );
    let tables = tables(work.path());
    assert!(
        tables.starts_with("# Picture analogies: list, 3 analogies\n"),
        "{tables}"
    );
    assert!(tables.contains("| sdedit | captions | 3 | 0 |"), "{tables}");
    assert!(done.stderr.contains("of 9,"), "{}", done.stderr);

    let result = read_json(&out.join("sdedit/one/result.json"));
    assert_eq!(
        (&result["kind"], &result["status"]),
        (&json!("sky"), &json!("done"))
    );
    let scores = result["scores"].as_object().unwrap();
    for metric in [
        "clip_direction",
        "text_direction",
        "clip_i_b",
        "ssim_truth",
        "mse_truth",
    ] {
        assert!(scores[metric].as_f64().unwrap().is_finite(), "{metric}");
    }
    assert!(!scores.contains_key("edit"), "no judge was given");
    let record = read_json(&out.join("run.json"));
    assert_eq!(record["suite"]["name"], "list");
    assert_eq!(record["methods"][0]["settings"]["learn"]["steps"], 6);
    let csv = fs::read_to_string(out.join("results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 9);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(
        !page.contains("http"),
        "the page must work without a network"
    );
    assert_eq!(
        read_json(&out.join("report.json"))["groups"][0]["methods"][1]["solved"],
        3
    );

    fs::remove_file(out.join("report.md")).unwrap();
    let again = succeed(work.path(), "eval report out");
    assert_eq!(again.stdout, tables);
    assert!(out.join("report.md").is_file());
}

#[test]
fn the_same_seed_gives_the_same_pictures_however_the_work_is_shared() {
    let work = workplace_with_suite();
    let methods = "--methods sdedit,text-swap";
    succeed(work.path(), &eval(&format!("{methods} -q -o whole")));
    succeed(
        work.path(),
        &eval(&format!("{methods} -q -o parts --jobs 2 --shard 1/2")),
    );
    assert_eq!(entries(&work.path().join("parts/sdedit")).len(), 2);
    succeed(
        work.path(),
        &eval(&format!("{methods} -q -o parts --shard 2/2")),
    );
    for method in ["sdedit", "text-swap"] {
        for name in ["one", "two", "three"] {
            let made = |out: &str| {
                let path = work.path().join(out).join(method).join(name);
                fs::read(path.join("b_prime.png")).unwrap()
            };
            assert!(made("whole") == made("parts"), "{method} {name}");
        }
    }
}

#[cfg(unix)]
#[test]
fn methods_that_learn_the_same_learn_it_once() {
    let work = workplace_with_suite();
    let variants = "[weak]\nmethod = \"difference-inversion\"\nstrength = 0.5\n\
                    [image]\nmethod = \"difference-inversion\"\ndelta = \"image\"\n";
    fs::write(work.path().join("v.toml"), variants).unwrap();
    let methods = "--variants v.toml --methods difference-inversion,weak,image";
    succeed(work.path(), &eval(&format!("{methods} --limit 1 -o out")));
    succeed(
        work.path(),
        &eval("--variants v.toml --methods weak --limit 1 -o alone"),
    );
    let out = work.path().join("out");
    let learned = entries(&out.join("learned"));
    assert_eq!(learned.len(), 2, "{learned:?}");
    let picture = |run: &str, method: &str| {
        let folder = work.path().join(run).join(method);
        fs::read(folder.join("one/b_prime.png")).unwrap()
    };
    assert_eq!(picture("out", "weak"), picture("alone", "weak"));
    assert_ne!(
        picture("out", "weak"),
        picture("out", "difference-inversion")
    );
    // The cost of learning counts for every method that uses the result.
    let seconds = |method: &str| {
        let result = read_json(&out.join(method).join("one/result.json"));
        result["seconds"].as_f64().unwrap()
    };
    let paid: Vec<f64> = learned
        .iter()
        .map(|what| {
            let file = out.join("learned").join(what).join("one.safetensors");
            let arrays = Arrays::read(&file).unwrap();
            arrays.metadata["seconds"].parse().unwrap()
        })
        .collect();
    let least = paid.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(seconds("weak") > least, "{} of {paid:?}", seconds("weak"));
    // A truncated file is learned again.
    let file = out
        .join("learned")
        .join(&learned[0])
        .join("one.safetensors");
    let whole = fs::read(&file).unwrap();
    for method in ["difference-inversion", "weak", "image"] {
        fs::remove_dir_all(out.join(method)).unwrap();
    }
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    succeed(work.path(), &eval(&format!("{methods} --limit 1 -o out")));
    assert_eq!(picture("out", "weak"), picture("alone", "weak"));
    // A later run of one of them does not change the order of the tables.
    succeed(
        work.path(),
        &eval("--variants v.toml --methods image --limit 1 -o out"),
    );
    let record = read_json(&out.join("run.json"));
    let names = record["methods"].as_array().unwrap().iter();
    let names: Vec<&Value> = names.map(|method| &method["name"]).collect();
    assert_eq!(names, ["difference-inversion", "weak", "image"]);
}

#[test]
fn a_run_that_was_killed_goes_on_where_it_stopped() {
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    let work = workplace_with_suite();
    let arguments = eval("--methods difference-inversion -o out");
    let mut child = dinv(work.path())
        .args(arguments.split_whitespace())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let folder = work.path().join("out/difference-inversion");
    let started = Instant::now();
    while !folder.join("one/result.json").exists() && !folder.join("three/result.json").exists() {
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "no result came"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    let finished: Vec<_> = entries(&folder)
        .into_iter()
        .map(|name| folder.join(name).join("result.json"))
        .filter(|path| path.exists())
        .map(|path| (fs::metadata(&path).unwrap().modified().unwrap(), path))
        .collect();
    assert!(!finished.is_empty());

    let late = run(work.path(), &format!("{arguments} --minutes 0"));
    assert_eq!(late.code, Some(75), "{}", late.stderr);
    assert!(
        late.stderr.contains("the same command continues"),
        "{}",
        late.stderr
    );
    succeed(work.path(), &format!("{arguments} --minutes 60"));
    assert_eq!(entries(&folder), ["one", "three", "two"]);
    for (modified, path) in finished {
        let now = fs::metadata(&path).unwrap().modified().unwrap();
        assert_eq!(now, modified, "{} was made again", path.display());
    }
    let third = succeed(work.path(), &arguments);
    assert!(!third.stderr.contains(" of "), "{}", third.stderr);
}

#[test]
fn results_of_another_run_are_not_mixed_in() {
    let work = workplace_with_suite();
    let once = |more: &str| run(work.path(), &eval(&format!("--limit 1 -q {more}")));
    assert_eq!(once("--methods sdedit -o out").code, Some(0));
    fs::write(
        work.path().join("v.toml"),
        "[sdedit]\nsdedit_strength = 0.5\n",
    )
    .unwrap();
    fs::create_dir(work.path().join("full")).unwrap();
    fs::write(work.path().join("full/mine.txt"), "").unwrap();
    let refused = |more: &str, expected: &str| {
        let done = once(more);
        assert_eq!(done.code, Some(65), "{more}: {}", done.stderr);
        assert!(done.stderr.contains(expected), "{more}: {}", done.stderr);
        assert!(
            done.stderr.contains("hint: write elsewhere with `-o`"),
            "{}",
            done.stderr
        );
    };
    refused(
        "--methods sdedit -o out --seed 1",
        "another run: the seed was 0, and is 1",
    );
    refused(
        "--variants v.toml -o out",
        "the method `sdedit` has other settings",
    );
    refused(
        "--methods sdedit -o full",
        "is not empty and holds no run.json",
    );
    let list = fs::read_to_string(work.path().join("list.jsonl")).unwrap();
    fs::write(work.path().join("list.jsonl"), list.replace("noon", "dawn")).unwrap();
    refused(
        "--methods sdedit -o out",
        "the analogies of the suite have changed",
    );
    fs::write(work.path().join("list.jsonl"), list).unwrap();
    let picture = fs::read(work.path().join("b.png")).unwrap();
    fs::copy(work.path().join("a.png"), work.path().join("b.png")).unwrap();
    refused(
        "--methods sdedit -o out",
        "another run: the pictures of `one` have changed",
    );
    fs::write(work.path().join("b.png"), picture).unwrap();
    let schedule = work.path().join("model/scheduler/scheduler_config.json");
    let text = fs::read_to_string(&schedule).unwrap();
    fs::write(&schedule, text.replace("0.012", "0.0121")).unwrap();
    refused(
        "--methods sdedit -o out",
        "text-to-image is another model: its configuration differs",
    );
    fs::write(&schedule, text).unwrap();
    assert_eq!(once("--methods text-swap -o out").code, Some(0));

    let path = work.path().join("out/run.json");
    let record = fs::read_to_string(&path).unwrap();
    fs::write(&path, record.replace("\"format\": 1", "\"format\": 2")).unwrap();
    refused(
        "--methods sdedit -o out",
        "of another version of the program: format 2, expected 1",
    );
    fs::write(&path, "{").unwrap();
    refused("--methods sdedit -o out", "run.json: not valid JSON");
}

#[test]
fn runs_and_methods_are_compared() {
    let work = workplace_with_suite();
    succeed(work.path(), &eval("-q --methods sdedit,text-swap -o first"));
    fs::write(
        work.path().join("v.toml"),
        "[sdedit]\nsdedit_strength = 0.5\n",
    )
    .unwrap();
    succeed(work.path(), &eval("-q --variants v.toml -o second"));
    let done = succeed(work.path(), "eval compare first second");
    assert!(
        done.stdout.contains("- sdedit sdedit_strength: 0.8 → 0.5"),
        "{}",
        done.stdout
    );
    assert!(
        done.stdout.contains("## sdedit: all analogies"),
        "{}",
        done.stdout
    );
    assert!(!done.stdout.contains("text-swap"), "{}", done.stdout);
    let done = succeed(work.path(), "eval compare first --with sdedit --json");
    let compared: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(
        compared["comparisons"][0]["names"],
        json!(["sdedit", "text-swap"])
    );
    for (arguments, code, expected) in [
        (
            "first",
            64,
            "expected two runs, or one run and `--with METHOD`",
        ),
        (
            "first --with magic",
            65,
            "no method `magic`; it has sdedit, text-swap",
        ),
        ("first gone", 65, "gone/run.json: "),
    ] {
        let done = run(work.path(), &format!("eval compare {arguments}"));
        assert_eq!(done.code, Some(code), "{arguments}: {}", done.stderr);
        assert!(
            done.stderr.contains(expected),
            "{arguments}: {}",
            done.stderr
        );
    }
}

#[test]
fn real_networks_of_metrics_are_used_where_they_are_given() {
    let work = workplace_with_suite();
    let networks = format!(
        "--dino {} --lpips {}",
        golden("dinov2/mlp").display(),
        golden("lpips/model.safetensors").display()
    );
    succeed(work.path(), &eval("-q --methods sdedit --limit 1 -o out"));
    let result = work.path().join("out/sdedit/one/result.json");
    let seconds = read_json(&result)["seconds"].clone();
    assert_eq!(read_json(&result)["scores"].get("lpips_b"), None);
    // Existing results are measured again, not made again.
    succeed(
        work.path(),
        &eval(&format!("-q --methods sdedit --limit 1 {networks} -o out")),
    );
    let again = read_json(&result);
    assert_eq!(again["seconds"], seconds);
    for metric in [
        "lpips_b",
        "lpips_truth",
        "dino_direction",
        "dino_direction_rescaled",
    ] {
        assert!(
            again["scores"][metric].as_f64().unwrap().is_finite(),
            "{metric}"
        );
    }
    // A run without them removes nothing, and one with another adds to it.
    let before = fs::read(&result).unwrap();
    let done = succeed(work.path(), &eval("--methods sdedit --limit 1 -o out"));
    assert!(!done.stderr.contains(" of "), "{}", done.stderr);
    assert!(fs::read(&result).unwrap() == before);
    let judge = golden("../../demo/benchmark/judge.safetensors");
    let judge = format!(
        "-q --methods sdedit --limit 1 --judge {} -o out",
        judge.display()
    );
    succeed(work.path(), &eval(&judge));
    let tables = tables(work.path());
    assert!(!tables.contains("other networks"), "{tables}");
    let judged = read_json(&result);
    assert!(judged["scores"]["judge_direction"].is_number());
    let lpips = |result: &Value| result["scores"]["lpips_b"].as_f64().unwrap();
    assert!((lpips(&judged) - lpips(&again)).abs() < 1e-12);
    let networks = |measured_with: &Value| -> Vec<String> {
        let networks = measured_with.as_object().unwrap();
        networks.keys().cloned().collect()
    };
    let all = ["clip", "dino", "judge", "lpips"];
    assert_eq!(networks(&judged["measured_with"]), all);
    let record = read_json(&work.path().join("out/run.json"));
    assert_eq!(networks(&record["measures"]), all);
}

#[test]
fn the_judge_does_not_measure_attributes_that_it_does_not_know() {
    let work = workplace_with_suite();
    let list = fs::read_to_string(work.path().join("list.jsonl")).unwrap();
    let attributes = r#"{"attributes":{"b":{"sky":"day"},"b_prime":{"sky":"aurora"}},"#;
    fs::write(
        work.path().join("list.jsonl"),
        list.replacen('{', attributes, 1),
    )
    .unwrap();
    let sdedit = |more: &str| {
        run(
            work.path(),
            &eval(&format!("--methods sdedit {more} -o out")),
        )
    };
    let unknown = "the attribute `sky` with the value `aurora`";
    let done = sdedit("");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let note =
        format!("note: the demo suites' judge is left out, since it does not know {unknown}");
    assert!(done.stderr.contains(&note), "{}", done.stderr);
    let result = read_json(&work.path().join("out/sdedit/one/result.json"));
    assert!(result["scores"]["clip_direction"].is_number());
    for metric in ["edit", "kept", "judge_direction"] {
        assert_eq!(result["scores"].get(metric), None, "{metric}");
    }
    let judge = golden("../../demo/benchmark/judge.safetensors");
    let done = sdedit(&format!("--judge {}", judge.display()));
    assert_eq!(done.code, Some(65), "{}", done.stderr);
    let error = format!("judge.safetensors: does not know {unknown}, which the suite states");
    assert!(done.stderr.contains(&error), "{}", done.stderr);
}

#[test]
fn a_network_that_cannot_be_opened_costs_no_result() {
    let work = workplace_with_suite();
    succeed(work.path(), &eval("-q --methods sdedit -o out"));
    let result = work.path().join("out/sdedit/one/result.json");
    let before = fs::read(&result).unwrap();
    let wrong = "--lpips model/vae/diffusion_pytorch_model.safetensors";
    let done = run(
        work.path(),
        &eval(&format!("--methods sdedit {wrong} -o out")),
    );
    assert_eq!(done.code, Some(65), "{}", done.stderr);
    let error = "error: model/vae/diffusion_pytorch_model.safetensors: ";
    assert!(done.stderr.contains(error), "{}", done.stderr);
    assert!(!done.stderr.contains("sdedit"), "{}", done.stderr);
    assert!(fs::read(&result).unwrap() == before);
}

#[test]
fn a_picture_that_cannot_be_measured_is_kept_and_measured_later() {
    let work = workplace_with_suite();
    super::copy_folder(&work.path().join("model/clip"), &work.path().join("other"));
    let preprocessor = work.path().join("other/preprocessor_config.json");
    let text = fs::read_to_string(&preprocessor).unwrap();
    let mut odd: Value = serde_json::from_str(&text).unwrap();
    odd["crop_size"] = json!({ "height": 24, "width": 24 });
    fs::write(&preprocessor, odd.to_string()).unwrap();
    let once = "-q --limit 1 --methods sdedit --metric-clip other -o out";
    let done = run(work.path(), &eval(once));
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    let place = work.path().join("out/sdedit/one");
    let drawn = fs::read(place.join("b_prime.png")).unwrap();
    fs::write(&preprocessor, text).unwrap();
    succeed(work.path(), &eval(once));
    assert!(fs::read(place.join("b_prime.png")).unwrap() == drawn);
    let scores = &read_json(&place.join("result.json"))["scores"];
    assert!(scores["clip_i_b"].is_number(), "{scores}");
}

#[test]
fn wrong_usage_names_what_is_wrong() {
    let work = workplace_with_suite();
    for (arguments, expected) in [
        ("--methods magic", "there is no method `magic`"),
        (
            "--methods sdedit,sdedit",
            "the method `sdedit` is named twice",
        ),
        ("--shard 3/2", "expected i/n with i from 1 to n"),
        ("--jobs 0", "--jobs: expected at least 1"),
        ("--limit 3 --quick", "cannot be used with"),
        ("--minutes-per-method 3 --quick", "cannot be used with"),
        ("--minutes-per-method 0", "0 is not in 1..=525600"),
        ("--variants list.jsonl", "list.jsonl: "),
    ] {
        let done = run(work.path(), &eval(&format!("{arguments} -o out")));
        let code = match arguments.starts_with("--variants") {
            true => 65,
            false => 64,
        };
        assert_eq!(done.code, Some(code), "{arguments}: {}", done.stderr);
        assert!(
            done.stderr.contains(expected),
            "{arguments}: {}",
            done.stderr
        );
        assert!(!work.path().join("out").exists());
    }
    for (variants, expected) in [
        ("", "there is no variant in it"),
        ("[x]\nmethod = 'magic'", "[x]: there is no method `magic`"),
        ("[x]\nmethod = 1", "[x]: `method`: expected a name, found 1"),
        (
            "['a/b']\nmethod = 'sdedit'",
            "`a/b` cannot be the name of a method",
        ),
    ] {
        fs::write(work.path().join("v.toml"), variants).unwrap();
        let done = run(work.path(), &eval("--variants v.toml -o out"));
        assert_eq!(done.code, Some(65), "{variants}: {}", done.stderr);
        assert!(
            done.stderr.contains(expected),
            "{variants}: {}",
            done.stderr
        );
    }
    let done = run(work.path(), "eval run --suite gone -o out");
    assert_eq!(done.code, Some(65));
    assert!(
        done.stderr.contains("gone: No such file"),
        "{}",
        done.stderr
    );
    let done = run(work.path(), "eval report model");
    assert_eq!(done.code, Some(65));
    assert!(
        done.stderr.contains("model/run.json: No such file"),
        "{}",
        done.stderr
    );
}

#[test]
fn suites_are_written_out() {
    let work = workplace_with_suite();
    succeed(work.path(), "eval export --suite list.jsonl copy");
    assert_eq!(
        entries(&work.path().join("copy")),
        ["manifest.jsonl", "pictures", "suite.json"]
    );
    succeed(work.path(), "eval export --suite copy again");
    let manifest = |name: &str| fs::read(work.path().join(name).join("manifest.jsonl")).unwrap();
    assert_eq!(manifest("copy"), manifest("again"));
    let done = run(work.path(), "eval export --suite list.jsonl copy");
    assert_eq!(done.code, Some(65));
    assert!(
        done.stderr.contains("copy: something is there already"),
        "{}",
        done.stderr
    );
}

#[test]
fn the_demo_benchmark_runs_and_its_judge_sees_the_truth() {
    let work = tempfile::tempdir().unwrap();
    let variants = "[quick]\nmethod = 'difference-inversion'\nsteps = 2\nselect_every = 0\n\
                    num_inference_steps = 4\n[words]\nmethod = 'text-swap'\n";
    fs::write(work.path().join("v.toml"), variants).unwrap();
    let run = "eval run --suite demo/validation --limit 2 --variants v.toml --json -o out";
    succeed(work.path(), run);
    let report = read_json(&work.path().join("out/report.json"));
    let methods = &report["groups"][0]["methods"];
    assert_eq!(
        (&methods[0]["method"], &methods[0]["solved"]),
        (&json!("quick"), &json!(2))
    );
    assert_eq!(methods[1]["scores"]["edit"]["mean"], 1.0, "{methods}");
    assert!(methods[1]["scores"]["kept"]["mean"].as_f64().unwrap() > 0.9);
    assert!(
        methods[1]["scores"]["judge_direction"]["mean"]
            .as_f64()
            .unwrap()
            > 0.1
    );
}

/// Flow-matching transformers: one whose only text encoder is a Qwen3, without CLIP, and one with two CLIPs and T5.
#[test]
fn the_other_demo_models_learn_what_the_judge_sees() {
    for model in ["z-image", "sd3"] {
        learns_what_the_judge_sees(model);
    }
}

fn learns_what_the_judge_sees(model: &str) {
    let work = tempfile::tempdir().unwrap();
    let variants = "[words]\nmethod = 'difference-inversion'\nlambda_mse = 0.0\nclip_first = 0\nsteps = 40\n\
                    learning_rate_schedule = 'linear'\n";
    fs::write(work.path().join("v.toml"), variants).unwrap();
    let [folder, captioner] = [model, "model/captioner"].map(|name| {
        let path = golden("../../demo").join(name);
        path.display().to_string()
    });
    let done = dinv(work.path())
        .args(
            "eval run --suite demo/validation --limit 2 --variants v.toml --json -o out".split(' '),
        )
        .args(["--model", &folder, "--captioner", &captioner])
        .output()
        .unwrap();
    assert!(done.status.success(), "{model}: {done:?}");
    let report = read_json(&work.path().join("out/report.json"));
    let methods = &report["groups"][0]["methods"];
    let mean = |metric: &str| methods[0]["scores"][metric]["mean"].as_f64().unwrap();
    assert_eq!(methods[0]["solved"], json!(2), "{model}");
    assert_eq!(mean("edit"), 1.0, "{model}: {methods}");
    assert!(mean("kept") > 0.8, "{model}: {methods}");
    // With the demo model's CLIP.
    assert!(mean("clip_direction") > 0.5, "{model}: {methods}");
}

#[test]
fn photographs_are_measured_by_what_needs_no_judge() {
    let work = workplace();
    let run = "eval run --config tiny.toml --suite photos --methods difference-inversion,text-swap --limit 3 -o out";
    let done = succeed(work.path(), run);
    assert!(done.stdout.starts_with("3 analogies"), "{}", done.stdout);
    let record = read_json(&work.path().join("out/run.json"));
    assert_eq!(record["suite"]["name"], "photos");
    let folder = work.path().join("out/text-swap");
    for name in entries(&folder) {
        let result = read_json(&folder.join(&name).join("result.json"));
        let scores = result["scores"].as_object().unwrap();
        for metric in ["clip_direction", "clip_i_truth", "ssim_truth", "mse_truth"] {
            assert!(
                scores[metric].as_f64().unwrap().is_finite(),
                "{name}: {metric}"
            );
        }
        assert!(!scores.contains_key("judge_direction"), "{name}");
    }
    assert_eq!(entries(&folder).len(), 3);
}
