//! Models from the Hub: which files are downloaded, which are not, and what happens on failure.

use std::fs;
#[cfg(target_os = "linux")]
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::hub_server::{Fault, HubServer, Request, hex};
use super::{Done, PAIR, dinv, golden, workplace};

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const TINY: &str = "tests/tiny";

/// A workplace, and a Hub with the tiny model as `tests/tiny`.
struct Setup {
    work: TempDir,
    hub: HubServer,
}

impl Setup {
    fn new() -> Self {
        let hub = HubServer::start();
        hub.add(TINY, &golden("pipeline"));
        Self {
            work: workplace(),
            hub,
        }
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = dinv(self.work.path());
        command
            .args(arguments.split_whitespace())
            .env("HF_ENDPOINT", self.hub.endpoint())
            .env_remove("HF_HUB_OFFLINE");
        command
    }

    fn run(&self, arguments: &str) -> Done {
        self.command(arguments).output().unwrap().into()
    }

    fn succeed(&self, arguments: &str) -> Done {
        let done = self.run(arguments);
        assert_eq!(done.code, Some(0), "{arguments}\n{}", done.stderr);
        done
    }

    /// Runs and expects a failure whose message has all of `expected`, that leaves no snapshot, and that ends
    /// once the Hub has recovered.
    fn fails_for_a_while(&self, code: i32, expected: &[&str]) -> Done {
        let done = self.run("models pull tests/tiny");
        assert_eq!(done.code, Some(code), "{}", done.stderr);
        assert_eq!(done.stdout, "");
        for text in expected {
            let stderr = &done.stderr;
            assert!(stderr.contains(text), "no `{text}` in\n{stderr}");
        }
        assert!(!self.repository().join("snapshots").exists());
        assert!(!self.repository().join("refs").exists());
        self.hub.recover();
        self.succeed("models pull -q tests/tiny");
        self.check_cache();
        done
    }

    fn repository(&self) -> PathBuf {
        self.work.path().join("hf/hub/models--tests--tiny")
    }

    fn snapshot(&self) -> PathBuf {
        let commit = fs::read_to_string(self.repository().join("refs/main")).unwrap();
        self.repository().join("snapshots").join(commit)
    }

    /// Checks that the cache has the whole model, byte for byte, and nothing unfinished.
    fn check_cache(&self) {
        for path in [
            "model_index.json",
            "unet/config.json",
            UNET,
            "clip/model.safetensors",
        ] {
            let ours = fs::read(self.snapshot().join(path)).unwrap();
            assert!(
                ours == fs::read(golden("pipeline").join(path)).unwrap(),
                "{path}"
            );
        }
        for blob in fs::read_dir(self.repository().join("blobs")).unwrap() {
            let blob = blob.unwrap().path();
            let digest = hex(&fs::read(&blob).unwrap());
            let name = blob.file_name().unwrap().to_str().unwrap();
            assert!(digest.starts_with(name), "{name}");
        }
    }

    /// The part of a file that is kept between attempts.
    fn partial(&self, path: &str) -> PathBuf {
        let digest = hex(&fs::read(golden("pipeline").join(path)).unwrap());
        self.repository().join(format!("blobs/{digest}.incomplete"))
    }
}

fn of_files(requests: &[Request]) -> Vec<&str> {
    let files = requests.iter().filter(|request| !request.at_storage);
    let paths = files.filter_map(|request| request.path.split_once("/resolve/"));
    paths
        .map(|(_, rest)| rest.split_once('/').unwrap().1)
        .collect()
}

/// A program that was installed without its sources takes the demo model from where it is published, with the pictures
/// of its example.
#[test]
fn the_demo_model_comes_from_where_it_is_published() {
    let setup = Setup::new();
    for name in ["a", "a_prime", "b"] {
        let picture = fs::read(setup.work.path().join(format!("{name}.png"))).unwrap();
        setup.hub.put(TINY, &format!("images/{name}.png"), &picture);
    }
    let run = |arguments: &str| -> Done {
        let mut command = setup.command(arguments);
        let done = command
            .env("DINV_DEMO_MODEL", format!("hf://{TINY}"))
            .output()
            .unwrap();
        done.into()
    };
    let help = run("learn -h");
    assert_eq!(help.code, Some(0), "{}", help.stderr);
    let refused = run("first-run -o page");
    let message = &refused.stderr;
    assert!(message.contains("dinv models pull demo"), "{message}");
    assert!(setup.hub.requests().is_empty());

    let few = "--steps 6 --clip-first 3 --num-tokens 3 --select-every 3 --select-samples 2 --num-inference-steps 4";
    let done = run(&format!("analogy --yes -o out {few}"));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(
        done.stderr.contains("downloading tests/tiny"),
        "{}",
        done.stderr
    );
    setup.check_cache();
    let taken: Vec<u8> = fs::read(setup.snapshot().join("images/b.png")).unwrap();
    assert_eq!(taken, fs::read(setup.work.path().join("b.png")).unwrap());
    assert!(setup.work.path().join("out/b_prime.png").is_file());

    setup.hub.requests();
    let again = run(&format!("analogy -q -o again --model demo {few}"));
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    let pulled = run("models pull demo");
    assert_eq!(pulled.stdout.trim(), setup.snapshot().to_str().unwrap());
    assert_eq!(of_files(&setup.hub.requests()), [""; 0]);
}

#[test]
fn a_model_is_downloaded_once_and_only_what_is_read_of_it() {
    let setup = Setup::new();
    for path in [
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/model.onnx",
        "safety_checker/model.safetensors",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
    ] {
        setup.hub.put(TINY, path, path.as_bytes());
    }
    let generate = "generate --config tiny.toml --prompt red --overwrite --model tests/tiny";
    let first = setup.succeed(generate);
    let note = "downloading tests/tiny to ";
    assert!(first.stderr.starts_with(note), "{}", first.stderr);
    assert!(first.stderr.contains("download: "), "{}", first.stderr);
    let picture = fs::read(setup.work.path().join("generated.png")).unwrap();
    setup.check_cache();
    let requests = setup.hub.requests();
    assert!(
        requests[0]
            .path
            .starts_with("/api/models/tests/tiny/revision/main")
    );
    let files = of_files(&requests);
    // 21 files; CLIP has the same tokenizer as the model.
    assert_eq!(files.len(), 19, "{files:?}");
    for other in [".bin", ".onnx", ".ckpt", "fp16", "safety_checker", "pruned"] {
        assert!(!files.iter().any(|path| path.contains(other)), "{files:?}");
    }

    let second = setup.succeed(generate);
    assert!(setup.hub.requests().is_empty());
    assert!(!second.stderr.contains("download"), "{}", second.stderr);
    let mut offline = setup.command(generate);
    let offline: Done = offline.env("HF_HUB_OFFLINE", "1").output().unwrap().into();
    assert_eq!(offline.code, Some(0), "{}", offline.stderr);
    assert!(setup.hub.requests().is_empty());
    assert_eq!(
        fs::read(setup.work.path().join("generated.png")).unwrap(),
        picture
    );
}

#[test]
fn a_picture_names_the_model_and_its_commit() {
    let setup = Setup::new();
    setup.succeed("generate -q --config tiny.toml --prompt red --model tests/tiny");
    let picture = setup.work.path().join("generated.png");
    let text = difference_inversion::image::read_png_text(&picture).unwrap();
    let recipe: Value = serde_json::from_str(&text[1].1).unwrap();
    let commit = &hex(TINY.as_bytes())[..40];
    assert_eq!(recipe["model"], format!("tests/tiny@{commit}"));
}

#[test]
fn offline_means_no_request_at_all() {
    let setup = Setup::new();
    let mut command = setup.command("models pull tests/tiny");
    let done: Done = command.env("HF_HUB_OFFLINE", "1").output().unwrap().into();
    assert_eq!(done.code, Some(65));
    let expected = "error: tests/tiny: not in the cache, and offline mode forbids downloading it\n\
                    hint: unset HF_HUB_OFFLINE";
    assert!(done.stderr.contains(expected), "{}", done.stderr);
    assert!(setup.hub.requests().is_empty());
    assert!(!setup.work.path().join("hf").exists());

    // An incomplete copy does not count as a model, and the missing file is named.
    setup.succeed("models pull -q tests/tiny");
    fs::remove_file(setup.snapshot().join(UNET)).unwrap();
    setup.hub.requests();
    let mut command = setup.command("generate --prompt red --model tests/tiny");
    let done: Done = command.env("HF_HUB_OFFLINE", "1").output().unwrap().into();
    assert_eq!(done.code, Some(65));
    assert!(
        done.stderr.contains("unet/*.safetensors is missing"),
        "{}",
        done.stderr
    );
    assert!(setup.hub.requests().is_empty());
    setup.succeed("models pull -q tests/tiny");
    assert!(
        of_files(&setup.hub.requests()).is_empty(),
        "the contents were there"
    );
    setup.check_cache();
}

#[test]
fn a_broken_connection_is_taken_up_where_it_broke() {
    let setup = Setup::new();
    setup.hub.fail("/storage/", 1, Fault::Break(10_000));
    let done = setup.succeed("models pull tests/tiny");
    let expected = "the connection broke after 10000 of ";
    assert!(done.stderr.contains(expected), "{}", done.stderr);
    assert!(done.stderr.contains("trying again"), "{}", done.stderr);
    setup.check_cache();
    let ranges = setup.hub.requests();
    let ranges: Vec<_> = (ranges.iter().filter(|request| request.at_storage))
        .filter_map(|request| request.headers.get("range"))
        .collect();
    assert_eq!(ranges, ["bytes=10000-"]);
}

#[test]
fn a_download_that_failed_goes_on_in_the_next_run() {
    let setup = Setup::new();
    let digest = hex(&fs::read(golden("pipeline").join(UNET)).unwrap());
    let part = format!("/storage/{digest}");
    setup.hub.fail(&part, 1, Fault::Break(50_000));
    let everything_else = Fault::Status(500, Vec::new());
    setup.hub.fail(&part, usize::MAX, everything_else);
    let done = setup.run("models pull tests/tiny");
    assert_eq!(done.code, Some(75));
    assert!(done.stderr.contains("HTTP 500"), "{}", done.stderr);
    assert_eq!(fs::metadata(setup.partial(UNET)).unwrap().len(), 50_000);
    assert!(!setup.repository().join("snapshots").exists());
    setup.hub.recover();
    setup.hub.requests();
    setup.succeed("models pull tests/tiny");
    setup.check_cache();
    let requests = setup.hub.requests();
    let resumed = requests.iter().find(|request| request.path == part);
    assert_eq!(resumed.unwrap().headers["range"], "bytes=50000-");
    let files = of_files(&requests);
    assert!(
        !files.contains(&"clip/model.safetensors"),
        "it was there: {files:?}"
    );
}

#[test]
fn a_server_that_cannot_resume_sends_everything_again() {
    let setup = Setup::new();
    setup.hub.fail("/storage/", 1, Fault::Break(10_000));
    setup.hub.fail("/storage/", 1, Fault::NoRange);
    setup.succeed("models pull -q tests/tiny");
    setup.check_cache();
}

#[test]
fn a_file_that_is_not_what_was_asked_for_is_deleted() {
    let setup = Setup::new();
    setup.hub.fail("/storage/", usize::MAX, Fault::Corrupt);
    let done = setup.fails_for_a_while(
        75,
        &[
            "expected SHA-256 ",
            "the download was deleted",
            "hint: run the same command again",
        ],
    );
    assert_eq!(done.stderr.matches("SHA-256").count(), 2, "{}", done.stderr);
}

/// Data of an earlier run was damaged on the disk; the file is downloaded again.
#[test]
fn a_damaged_beginning_is_not_built_upon() {
    let setup = Setup::new();
    let partial = setup.partial(UNET);
    fs::create_dir_all(partial.parent().unwrap()).unwrap();
    fs::write(&partial, [7; 3_000]).unwrap();
    setup.succeed("models pull -q tests/tiny");
    setup.check_cache();
    let too_long = setup.partial(UNET);
    fs::remove_dir_all(setup.repository()).unwrap();
    fs::create_dir_all(too_long.parent().unwrap()).unwrap();
    fs::write(&too_long, vec![7; 1 << 20]).unwrap();
    setup.succeed("models pull -q tests/tiny");
    setup.check_cache();
}

#[test]
fn a_gated_model_says_where_its_licence_is_accepted() {
    let setup = Setup::new();
    let gated = vec![("x-error-code", "GatedRepo".to_owned())];
    setup
        .hub
        .fail(UNET, usize::MAX, Fault::Status(401, gated.clone()));
    let page = format!(
        "hint: accept the licence at {}/tests/tiny",
        setup.hub.endpoint()
    );
    let expected = ["tests/tiny: the model is gated", &page, "then set HF_TOKEN"];
    setup.fails_for_a_while(65, &expected);

    let setup = Setup::new();
    setup
        .hub
        .fail("/resolve/", usize::MAX, Fault::Status(403, gated));
    let mut command = setup.command("models pull tests/tiny");
    let done: Done = command.env("HF_TOKEN", "hf_x").output().unwrap().into();
    assert_eq!(done.code, Some(65));
    let expected = "with the account that HF_TOKEN belongs to";
    assert!(done.stderr.contains(expected), "{}", done.stderr);
    assert!(!done.stderr.contains("hf_x"), "{}", done.stderr);
}

#[test]
fn access_that_is_refused_says_what_is_lacking() {
    let setup = Setup::new();
    setup
        .hub
        .fail("/api/", usize::MAX, Fault::Status(401, Vec::new()));
    let expected = [
        "refuses access (HTTP 401)",
        "hint: set HF_TOKEN to a token from",
    ];
    setup.fails_for_a_while(65, &expected);
    let setup = Setup::new();
    setup
        .hub
        .fail("/api/", usize::MAX, Fault::Status(403, Vec::new()));
    let mut command = setup.command("models pull tests/tiny");
    let done: Done = command.env("HF_TOKEN", "hf_x").output().unwrap().into();
    assert!(
        done.stderr.contains("HF_TOKEN is not accepted"),
        "{}",
        done.stderr
    );
    assert!(!done.stderr.contains("hf_x"), "{}", done.stderr);
}

#[test]
fn what_the_hub_does_not_have_is_named() {
    let setup = Setup::new();
    for (name, expected) in [
        (
            "tests/absent",
            "error: tests/absent: there is no such model on the Hub",
        ),
        (
            "tests/tiny@v9",
            "error: tests/tiny@v9: the model has no such revision",
        ),
    ] {
        for command in ["models pull", "generate --prompt x --model"] {
            let done = setup.run(&format!("{command} {name}"));
            assert_eq!(done.code, Some(65), "{}", done.stderr);
            assert!(done.stderr.contains(expected), "{}", done.stderr);
            assert!(done.stderr.contains("hint: "), "{}", done.stderr);
        }
    }
    assert!(!setup.work.path().join("hf").exists());
    let done = setup.run("models pull tiny");
    assert_eq!(done.code, Some(64), "{}", done.stderr);

    setup.hub.add("tests/other", &golden("images"));
    let done = setup.run("models pull tests/other");
    let expected = "it has no model_index.json or config.json";
    assert!(done.stderr.contains(expected), "{}", done.stderr);
}

#[test]
fn a_pipeline_of_another_kind_is_refused_before_its_weights_come() {
    let setup = Setup::new();
    let index = br#"{"_class_name": "PixArtAlphaPipeline"}"#;
    setup.hub.put(TINY, "model_index.json", index);
    let done = setup.run("models pull tests/tiny");
    assert_eq!(done.code, Some(65), "{}", done.stderr);
    let expected = "it is a PixArtAlphaPipeline, not a StableDiffusionPipeline or ";
    assert!(done.stderr.contains(expected), "{}", done.stderr);
    assert_eq!(of_files(&setup.hub.requests()), ["model_index.json"]);
}

#[test]
fn what_cannot_be_opened_is_refused_before_its_weights_come() {
    for (path, from, to, expected) in [
        (
            "unet/config.json",
            r#""class_embed_type": null"#,
            r#""class_embed_type": "timestep""#,
            "unet/config.json: field `class_embed_type`: \"timestep\" is not supported",
        ),
        (
            "scheduler/scheduler_config.json",
            r#""prediction_type": "v_prediction""#,
            r#""prediction_type": "flow_prediction""#,
            "scheduler/scheduler_config.json: field `prediction_type`: flow_prediction is another kind",
        ),
        (
            "vae/config.json",
            "\"DownEncoderBlock2D\"",
            "\"AttnDownEncoderBlock2D\"",
            "vae/config.json: field `down_block_types`",
        ),
    ] {
        let setup = Setup::new();
        let text = fs::read_to_string(golden("pipeline").join(path)).unwrap();
        assert!(text.contains(from), "{text}");
        setup.hub.put(TINY, path, text.replace(from, to).as_bytes());
        let done = setup.run("models pull tests/tiny");
        assert_eq!(done.code, Some(65), "{}", done.stderr);
        assert!(done.stderr.contains(expected), "{}", done.stderr);
        let requests = setup.hub.requests();
        let weights = of_files(&requests);
        assert!(
            !weights.iter().any(|path| path.ends_with(".safetensors")),
            "{weights:?}"
        );
    }
}

#[test]
fn words_added_to_a_tokenizer_come_with_it() {
    let setup = Setup::new();
    setup.hub.put(TINY, "tokenizer/added_tokens.json", b"{}");
    setup.succeed("models pull -q tests/tiny");
    assert!(
        setup
            .snapshot()
            .join("tokenizer/added_tokens.json")
            .is_file()
    );
}

#[test]
fn models_that_were_taken_from_the_hub_are_named_where_they_are() {
    let setup = Setup::new();
    let done = setup.run("models pull runwayml/stable-diffusion-v1-5");
    let expected = "a copy is stable-diffusion-v1-5/stable-diffusion-v1-5";
    assert!(done.stderr.contains(expected), "{}", done.stderr);
}

#[test]
fn files_of_a_cache_without_links_are_not_brought_again() {
    let setup = Setup::new();
    setup.succeed("models pull -q tests/tiny");
    let weights = setup.snapshot().join(UNET);
    let blob = fs::canonicalize(&weights).unwrap();
    fs::remove_file(&weights).unwrap();
    fs::rename(blob, &weights).unwrap();
    fs::remove_file(setup.snapshot().join("unet/config.json")).unwrap();
    setup.hub.requests();
    setup.succeed("models pull -q tests/tiny");
    let requests = setup.hub.requests();
    assert!(!of_files(&requests).contains(&UNET), "{requests:?}");
    assert!(weights.symlink_metadata().unwrap().is_file());
    assert!(setup.snapshot().join("unet/config.json").is_file());
}

#[test]
fn a_revision_can_have_slashes() {
    let setup = Setup::new();
    setup.succeed("models pull -q tests/tiny@refs/pr/1");
    assert!(setup.repository().join("refs/refs/pr/1").is_file());
    setup.hub.requests();
    let commit = hex(TINY.as_bytes())[..40].to_owned();
    for revision in ["refs/pr/1", &commit] {
        let done = setup.run(&format!(
            "generate -q --config tiny.toml --overwrite --prompt x --model tests/tiny@{revision}"
        ));
        assert_eq!(done.code, Some(0), "{}", done.stderr);
    }
    assert!(setup.hub.requests().is_empty());
}

#[test]
fn too_many_requests_are_waited_for_as_long_as_it_is_bearable() {
    let setup = Setup::new();
    let wait = |seconds: u32| vec![("retry-after", seconds.to_string())];
    setup.hub.fail("/api/", 1, Fault::Status(429, wait(1)));
    setup
        .hub
        .fail("/storage/", 1, Fault::Status(503, Vec::new()));
    let done = setup.succeed("models pull tests/tiny");
    let expected = "fewer requests (HTTP 429), for 1 s; trying again";
    assert!(done.stderr.contains(expected), "{}", done.stderr);

    let setup = Setup::new();
    setup
        .hub
        .fail("/storage/", usize::MAX, Fault::Status(429, wait(3600)));
    setup.fails_for_a_while(75, &["HTTP 429), for 3600 s", "hint: wait, then run"]);
}

#[test]
fn a_hub_that_is_gone_is_an_error_and_leaves_the_cache_usable() {
    let setup = Setup::new();
    setup.succeed("models pull -q tests/tiny");
    let mut command = setup.command("models pull tests/tiny");
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = gone.local_addr().unwrap();
    drop(gone);
    command.env("HF_ENDPOINT", format!("http://{address}"));
    let done: Done = command.output().unwrap().into();
    assert_eq!(done.code, Some(75));
    let expected = format!("error: tests/tiny: cannot reach {address}: ");
    assert!(done.stderr.contains(&expected), "{}", done.stderr);
    assert!(
        done.stderr.contains("hint: check the network"),
        "{}",
        done.stderr
    );
    setup.check_cache();
}

/// A limit on the size of files simulates a full disk: every write past it fails.
#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_and_leaves_no_half_model() {
    let setup = Setup::new();
    let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" models pull tests/tiny";
    let mut command = Command::new("bash");
    let ours = setup.command("");
    command.args(["-c", script, env!("CARGO_BIN_EXE_dinv")]);
    command.current_dir(setup.work.path());
    for (name, value) in ours.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let done: Done = command.output().unwrap().into();
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    for expected in [
        "error: tests/tiny: cannot write ",
        "File too large",
        "HF_HUB_CACHE",
    ] {
        assert!(done.stderr.contains(expected), "{}", done.stderr);
    }
    assert!(!setup.repository().join("snapshots").exists());
    setup.succeed("models pull -q tests/tiny");
    setup.check_cache();
}

#[test]
fn what_does_not_fit_on_the_disk_is_refused_before_it_is_begun() {
    let setup = Setup::new();
    setup.hub.claim(TINY, UNET, 1 << 60);
    for command in [
        "models pull tests/tiny",
        "generate --config tiny.toml --prompt red --model tests/tiny",
    ] {
        let done = setup.run(command);
        assert_eq!(done.code, Some(1), "{}", done.stderr);
        for expected in [
            "error: downloading tests/tiny takes 1152921504.",
            " GB free\n",
            "hint: make room, or name another folder with HF_HUB_CACHE",
        ] {
            assert!(done.stderr.contains(expected), "{}", done.stderr);
        }
        let requests = setup.hub.requests();
        let files = of_files(&requests);
        let is_config = |path: &&str| path.ends_with("/config.json") || *path == "model_index.json";
        assert!(files.iter().all(is_config), "{files:?}");
    }
}

/// Runs on a terminal, which `script` provides.
#[cfg(target_os = "linux")]
#[test]
fn on_a_terminal_a_download_is_asked_for_with_all_that_goes_with_it() {
    let setup = Setup::new();
    let bare = setup.work.path().join("bare");
    super::copy_folder(&golden("pipeline"), &bare);
    for part in ["clip", "captioner"] {
        let _ = fs::remove_dir_all(bare.join(part));
    }
    setup.hub.add("tests/bare", &bare);
    setup.hub.add("tests/clip", &golden("pipeline/clip"));
    let learn = format!(
        "learn --config tiny.toml {PAIR} --model tests/bare \
         --clip tests/clip -o d.safetensors"
    );
    let typed = |command: &str, answer: &str| -> Done {
        let ours = setup.command(command);
        let line: Vec<_> = ours.get_args().map(|it| it.to_string_lossy()).collect();
        let program = ours.get_program().to_string_lossy();
        let line = format!("{program} {}", line.join(" "));
        let mut script = Command::new("script");
        script.args(["-qefc", &line, "/dev/null"]);
        script.current_dir(setup.work.path()).envs(
            ours.get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        script.env_remove("HF_HUB_OFFLINE");
        let streams = [Stdio::piped(), Stdio::piped(), Stdio::piped()];
        let [stdin, stdout, stderr] = streams;
        let mut child = script.stdin(stdin).stdout(stdout).stderr(stderr).spawn();
        let child = child.as_mut().expect("`script` of util-linux is installed");
        let mut input = child.stdin.take().unwrap();
        input.write_all(answer.as_bytes()).unwrap();
        let mut seen = String::new();
        let mut output = child.stdout.take().unwrap();
        output.read_to_string(&mut seen).unwrap();
        drop(input);
        Done {
            code: child.wait().unwrap().code(),
            stdout: seen,
            stderr: String::new(),
        }
    };
    let refused = typed(&learn, "n\n");
    assert_eq!(refused.code, Some(1), "{}", refused.stdout);
    for expected in [
        "to download to ",
        " free:",
        "  tests/bare",
        "  tests/clip",
        "? [Y/n] ",
        "error: nothing was downloaded",
    ] {
        assert!(refused.stdout.contains(expected), "{}", refused.stdout);
    }
    let requests = setup.hub.requests();
    assert!(requests.iter().all(|request| !request.at_storage));
    let done = typed(&learn, "\n");
    assert_eq!(done.code, Some(0), "{}", done.stdout);
    assert_eq!(done.stdout.matches("[Y/n]").count(), 1, "{}", done.stdout);
    fs::remove_dir_all(setup.work.path().join("hf")).unwrap();
    let done = typed(&format!("{learn} --overwrite --yes"), "");
    assert_eq!(done.code, Some(0), "{}", done.stdout);
    assert!(!done.stdout.contains("[Y/n]"), "{}", done.stdout);
    // What goes with a model on this disk is asked for at once, too.
    fs::remove_dir_all(setup.work.path().join("hf")).unwrap();
    let captioner = "tests/captioner";
    setup.hub.add(captioner, &golden("pipeline/captioner"));
    let learn = format!(
        "learn --config tiny.toml --a a.png --a-prime a_prime.png --model bare --clip tests/clip \
         --captioner {captioner} -o e.safetensors"
    );
    let done = typed(&learn, "\n");
    assert_eq!(done.code, Some(0), "{}", done.stdout);
    assert_eq!(done.stdout.matches("[Y/n]").count(), 1, "{}", done.stdout);
}

/// Which parts are needed depends on the family: none of these has a U-Net.
#[test]
fn every_family_of_transformers_is_downloaded_whole() {
    let setup = Setup::new();
    for family in ["sd3", "flux", "klein", "z_image"] {
        let name = format!("tests/{family}");
        setup.hub.add(&name, &golden(family));
        setup.succeed(&format!("models pull {name}"));
        setup.succeed(&format!("models check {name}"));
    }
}

/// A transformer in a file of its own, whose model is downloaded without.
#[test]
fn a_transformer_that_is_replaced_is_not_downloaded() {
    let setup = Setup::new();
    let model = golden("z_image");
    setup.hub.add("tests/z", &model);
    let weights = "transformer/diffusion_pytorch_model.safetensors";
    fs::copy(
        model.join(weights),
        setup.work.path().join("own.safetensors"),
    )
    .unwrap();
    let generate =
        "generate -q --config tiny.toml --resolution 16 --model tests/z --prompt red --overwrite";
    setup.succeed(&format!(
        "{generate} --transformer own.safetensors -o one.png"
    ));
    let asked = setup.hub.requests();
    let asked = of_files(&asked);
    assert!(asked.contains(&"transformer/config.json"), "{asked:?}");
    assert!(!asked.contains(&weights), "{asked:?}");
    setup.succeed(&format!("{generate} -o other.png"));
    assert!(of_files(&setup.hub.requests()).contains(&weights));
    let picture = |name: &str| image::open(setup.work.path().join(name)).unwrap();
    assert_eq!(picture("one.png"), picture("other.png"));
    // Nor is a text encoder that is replaced.
    let encoder = "text_encoder/model.safetensors";
    fs::copy(
        model.join(encoder),
        setup.work.path().join("qwen.safetensors"),
    )
    .unwrap();
    fs::remove_dir_all(setup.work.path().join("hf")).unwrap();
    let both = "--transformer own.safetensors --text-encoder qwen.safetensors";
    setup.succeed(&format!("{generate} {both} -o third.png"));
    let asked = setup.hub.requests();
    let asked = of_files(&asked);
    assert!(asked.contains(&"text_encoder/config.json"), "{asked:?}");
    assert!(
        !asked.contains(&encoder) && !asked.contains(&weights),
        "{asked:?}"
    );
    assert_eq!(picture("third.png"), picture("one.png"));
    // What cannot replace it is refused before the download.
    fs::remove_dir_all(setup.work.path().join("hf")).unwrap();
    fs::write(setup.work.path().join("cut.gguf"), b"GGUF\x03\0\0\0").unwrap();
    setup.hub.requests();
    for flags in [
        "--transformer cut.gguf",
        "--transformer absent.gguf",
        "--text-encoder own.safetensors",
    ] {
        let done = setup.run(&format!("{generate} {flags} -o fourth.png"));
        assert_eq!(done.code, Some(65), "{}", done.stderr);
        assert!(setup.hub.requests().is_empty(), "{flags}");
    }
    let whole = setup.run("generate --model own.safetensors --prompt red");
    assert_eq!(whole.code, Some(65));
}

#[test]
fn doctor_estimates_the_memory_of_a_model_before_its_download() {
    let setup = Setup::new();
    let peak = |flags: &str| {
        let done = setup.run(&format!("doctor --model sd15 --json {flags}"));
        assert_eq!(done.code, Some(1));
        let expected = "error: the model is not on this disk; the memory is an estimate";
        assert!(done.stderr.contains(expected), "{}", done.stderr);
        let findings: Value = serde_json::from_str(&done.stdout).unwrap();
        let problem = findings["problems"][0].as_str().unwrap();
        assert!(problem.contains("`dinv models pull sd15`"), "{problem}");
        findings["learning"][0]["peak"].as_u64().unwrap()
    };
    assert!(peak("--resolution 256") < peak(""));
    assert!(setup.hub.requests().is_empty());
}

#[test]
fn a_file_name_that_leaves_the_cache_is_refused() {
    for name in ["../../evil", "unet/../../../evil.safetensors", "/tmp/evil"] {
        let setup = Setup::new();
        setup.hub.put(TINY, name, b"evil");
        let done = setup.run("models pull tests/tiny");
        assert_eq!(done.code, Some(1), "{}", done.stderr);
        let expected = format!("the Hub's answer cannot be used: a file is called `{name}`");
        assert!(done.stderr.contains(&expected), "{}", done.stderr);
        assert!(of_files(&setup.hub.requests()).is_empty());
        assert!(!setup.work.path().join("hf").exists());
    }
}

#[test]
fn the_token_goes_to_the_hub_and_to_no_other_host() {
    let setup = Setup::new();
    let mut command = setup.command("models pull tests/tiny");
    let done: Done = command
        .env("HF_TOKEN", "hf_secret")
        .output()
        .unwrap()
        .into();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let requests = setup.hub.requests();
    let (at_storage, at_hub): (Vec<_>, Vec<_>) =
        requests.iter().partition(|request| request.at_storage);
    assert!(!at_storage.is_empty());
    for request in at_hub {
        assert_eq!(request.headers["authorization"], "Bearer hf_secret");
    }
    for request in at_storage {
        assert!(
            !request.headers.contains_key("authorization"),
            "{request:?}"
        );
    }
}

/// The first download is slow; the second waits for its files instead of downloading them again.
#[test]
fn two_downloads_at_once_share_the_work() {
    let setup = Setup::new();
    setup.hub.fail("/storage/", 1, Fault::Slow(4_000));
    let start = || {
        let mut command = setup.command("models pull tests/tiny");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let both = [start(), start()];
    for child in both {
        let done: Done = child.wait_with_output().unwrap().into();
        assert_eq!(done.code, Some(0), "{}", done.stderr);
    }
    setup.check_cache();
    let mut stored: Vec<String> = (setup.hub.requests().into_iter())
        .filter(|request| request.at_storage)
        .map(|request| request.path)
        .collect();
    let count = stored.len();
    stored.sort();
    stored.dedup();
    assert_eq!(stored.len(), count, "something was fetched twice");
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_a_download_that_can_go_on_later() {
    let setup = Setup::new();
    let digest = hex(&fs::read(golden("pipeline").join(UNET)).unwrap());
    setup.hub.fail(&digest, 1, Fault::Slow(2_000));
    let mut command = setup.command("models pull tests/tiny");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let started = std::time::Instant::now();
    let partial = setup.partial(UNET);
    while fs::metadata(&partial).map_or(0, |data| data.len()) < 4_000 {
        assert!(started.elapsed().as_secs() < 60, "no data arrived");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    super::signal("-INT", &child.id().to_string());
    let done: Done = child.wait_with_output().unwrap().into();
    assert_eq!(done.code, Some(130), "{}", done.stderr);
    assert!(
        done.stderr
            .contains("bytes of download\nhint: run the same"),
        "{}",
        done.stderr
    );
    assert!(!setup.repository().join("snapshots").exists());
    setup.succeed("models pull -q tests/tiny");
    setup.check_cache();
}

/// The text encoder's configuration claims to be Stable Diffusion's, so the model is downloaded with the
/// parts that belong to that, and then does not load.
#[test]
fn the_joint_space_and_the_captioner_come_when_they_are_needed() {
    let setup = Setup::new();
    let large = r#"{"hidden_size": 768, "num_hidden_layers": 12, "hidden_act": "quick_gelu"}"#;
    let bare = setup.work.path().join("bare");
    super::copy_folder(&golden("pipeline"), &bare);
    for folder in ["clip", "captioner"] {
        fs::remove_dir_all(bare.join(folder)).unwrap();
    }
    fs::write(bare.join("text_encoder/config.json"), large).unwrap();
    setup.hub.add("tests/bare", &bare);
    let clip = "openai/clip-vit-large-patch14";
    setup.hub.add(clip, &golden("pipeline/clip"));
    let captioner = "Salesforce/blip-image-captioning-large";
    setup.hub.add(captioner, &golden("pipeline/captioner"));

    let asked = |arguments: &str| -> Vec<String> {
        let done = setup.run(arguments);
        assert_eq!(done.code, Some(65), "{}", done.stderr);
        let requests = setup.hub.requests();
        let names = requests.iter().filter_map(|request| {
            let (name, _) = request.path.split_once("/resolve/")?;
            Some(name.trim_start_matches('/').to_owned())
        });
        let mut seen = std::collections::BTreeSet::new();
        names.filter(|name| seen.insert(name.clone())).collect()
    };
    let pictures = "--a a.png --a-prime a_prime.png";
    let learned = asked(&format!("learn {PAIR} --model tests/bare"));
    assert_eq!(learned, ["tests/bare", clip], "captions were given");
    let again = asked(&format!("learn {pictures} --model tests/bare"));
    assert_eq!(again, [captioner], "everything else was there");
    let cache = setup.work.path().join("hf/hub");
    fs::remove_dir_all(cache).unwrap();
    let local = asked(&format!("learn {pictures} --model bare"));
    assert_eq!(
        local,
        [clip],
        "of a folder the captioner is not chosen by itself"
    );
    let given = asked(&format!("learn {pictures} --model bare --clip model/clip"));
    assert!(given.is_empty(), "{given:?}");
    let other = asked(&format!(
        "learn {PAIR} --model bare --clip {clip} --captioner {captioner}"
    ));
    assert!(other.is_empty(), "{other:?}");

    setup.hub.add("tests/own", &golden("pipeline"));
    let path = "text_encoder/config.json";
    setup.hub.put("tests/own", path, large.as_bytes());
    let own = asked(&format!("learn {pictures} --model tests/own"));
    assert_eq!(own, ["tests/own"], "it brings its own");

    setup.hub.add("tests/instruct", &golden("instruct_pix2pix"));
    setup.hub.put("tests/instruct", path, large.as_bytes());
    let instruct = asked(&format!("learn {pictures} --model tests/instruct"));
    assert_eq!(instruct, ["tests/instruct"], "nothing is learned on it");

    // `--all` brings at once what would come when it is needed.
    let cache = setup.work.path().join("hf/hub");
    for (model, expected) in [
        ("tests/bare", vec!["tests/bare", clip, captioner]),
        ("tests/own", vec!["tests/own"]),
        ("tests/instruct", vec!["tests/instruct"]),
    ] {
        fs::remove_dir_all(&cache).unwrap();
        setup.hub.requests();
        setup.succeed(&format!("models pull {model} --all -q"));
        let mut found = fs::read_dir(&cache)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("models--"))
            .collect::<Vec<_>>();
        let mut expected: Vec<String> = expected
            .iter()
            .map(|name| format!("models--{}", name.replace('/', "--")))
            .collect();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
    }
}

#[test]
fn names_work_in_a_settings_file_too() {
    let setup = Setup::new();
    let settings = fs::read_to_string(setup.work.path().join("tiny.toml")).unwrap();
    let settings = settings.replace("'model'", "'tests/tiny'");
    fs::write(setup.work.path().join("hub.toml"), settings).unwrap();
    setup.succeed("generate -q --config hub.toml --prompt red");
    setup.check_cache();
}

#[test]
fn the_list_tells_what_is_there_and_what_is_missing() {
    let setup = Setup::new();
    setup.hub.put(
        TINY,
        "README.md",
        b"---\nlicense: openrail++\n---\n# Tiny\n",
    );
    let demo = golden("pipeline");
    let list = || -> Value {
        let mut command = setup.command("models list --json");
        let done: Done = command
            .env("DINV_DEMO_MODEL", &demo)
            .output()
            .unwrap()
            .into();
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        serde_json::from_str(&done.stdout).unwrap()
    };
    let before = list();
    let names: Vec<&str> = (before["models"].as_array().unwrap().iter())
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    let short = [
        "sd15",
        "sd21",
        "sdxl",
        "sd3",
        "sd35",
        "sd35-large",
        "flux-dev",
        "flux-schnell",
        "chroma",
        "klein-base",
        "klein",
        "klein-base-9b",
        "klein-9b",
        "z-image",
        "z-image-turbo",
    ];
    assert_eq!(names, [&["demo"], &short[..]].concat());
    assert_eq!(before["models"][0]["state"], "complete");
    assert_eq!(before["models"][0]["licence"], "MIT OR Apache-2.0");
    assert_eq!(before["models"][3]["state"], "not-downloaded");
    assert_eq!(before["models"][3]["licence"], "openrail++");
    assert!(setup.hub.requests().is_empty());

    let pulled = setup.succeed("models pull tests/tiny --json");
    let pulled: Value = serde_json::from_str(&pulled.stdout).unwrap();
    let pulled = &pulled["models"][0];
    assert_eq!(pulled["licence"], "openrail++");
    assert_eq!(
        Path::new(pulled["folder"].as_str().unwrap()),
        setup.snapshot()
    );
    let tiny = || list()["models"][names.len()].clone(); // behind those that are known by name
    let row = tiny();
    assert_eq!(row["name"], "tests/tiny");
    assert_eq!(row["state"], "complete");
    assert_eq!(row["bytes"], pulled["bytes"]);

    fs::remove_file(setup.snapshot().join("vae/config.json")).unwrap();
    assert_eq!(tiny()["missing"][0], "vae/config.json");
    let text = setup.succeed("models list").stdout;
    let line = text
        .lines()
        .find(|line| line.starts_with("tests/tiny"))
        .unwrap();
    assert!(line.contains(" incomplete "), "{line}");
    assert!(line.contains("openrail++"), "{line}");
    assert!(text.contains("\n  missing: vae/config.json\n"), "{text}");
    assert!(text.starts_with("MODEL "), "{text}");
    let sdxl = "\nsdxl           stabilityai/stable-diffusion-xl-base-1.0\n";
    assert!(text.contains(sdxl), "{text}");
    assert!(
        text.contains("\nsdxl           ~13.9 GB  not downloaded  openrail++\n"),
        "{text}"
    );
    assert!(text.contains("\ncache "), "{text}");
    let widest = text.lines().map(|line| line.chars().count()).max();
    let cache = setup.work.path().as_os_str().len();
    assert!(widest.unwrap() <= 80.max(cache + 24), "{text}");
}

#[test]
fn a_check_loads_everything_and_finds_faults() {
    let setup = Setup::new();
    let absent = setup.run("models check tests/tiny");
    assert_eq!(absent.code, Some(65));
    let expected = "error: tests/tiny: not downloaded\n\
                    hint: download it with `dinv models pull tests/tiny`";
    assert!(absent.stderr.contains(expected), "{}", absent.stderr);
    assert!(setup.hub.requests().is_empty());

    setup.succeed("models pull -q tests/tiny");
    let done = setup.succeed("models check tests/tiny --json");
    let report: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(report["ok"], true);
    let checks = report["checks"].as_array().unwrap();
    let parts: Vec<&str> = checks
        .iter()
        .map(|it| it["part"].as_str().unwrap())
        .collect();
    let expected = [
        "pipeline",
        "text_encoder",
        "vae",
        "unet",
        "clip",
        "captioner",
    ];
    assert_eq!(parts, expected);
    for check in checks {
        assert!(check["outcome"]["Ok"].is_string(), "{check}");
        assert_eq!(
            check["parameters"].as_u64().is_some(),
            check["part"] != "pipeline"
        );
    }

    for (path, harm, part) in [
        (
            "model/unet/diffusion_pytorch_model.safetensors",
            "cut",
            "pipeline",
        ),
        ("model/clip/model.safetensors", "cut", "clip"),
        (
            "model/vae/diffusion_pytorch_model.safetensors",
            "nan",
            "vae",
        ),
    ] {
        let setup = Setup::new();
        let path = setup.work.path().join(path);
        let mut bytes = fs::read(&path).unwrap();
        match harm {
            "cut" => bytes.truncate(bytes.len() - 4),
            _ => {
                // Every half-precision number becomes NaN.
                let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                let start = 8 + usize::try_from(header).unwrap();
                bytes[start..].fill(0xff);
            }
        }
        fs::write(&path, bytes).unwrap();
        let done = setup.run("models check model");
        assert_eq!(done.code, Some(1), "{}", done.stdout);
        let line = done
            .stdout
            .lines()
            .find(|line| line.contains("FAILED"))
            .unwrap();
        assert!(line.starts_with(part), "{}", done.stdout);
        assert!(
            done.stderr.starts_with("error: model: 1 of "),
            "{}",
            done.stderr
        );
    }
}

/// The captioner is downloaded only for methods that read captions, whatever their order.
#[test]
fn a_method_that_needs_the_captioner_joins_those_that_do_not() {
    let setup = Setup::new();
    let bare = setup.work.path().join("bare");
    super::copy_folder(&golden("pipeline"), &bare);
    fs::remove_dir_all(bare.join("captioner")).unwrap();
    setup.hub.add("tests/bare", &bare);
    let captioner = "Salesforce/blip-image-captioning-large";
    setup.hub.add(captioner, &golden("pipeline/captioner"));
    let line = r#"{"a": "a.png", "a_prime": "a_prime.png", "b": "b.png",
        "captions": {"b": "noon", "b_prime": "evening"}}"#;
    let list = setup.work.path().join("list.jsonl");
    fs::write(list, line.replace('\n', " ")).unwrap();
    let eval = "eval run -q --config tiny.toml --suite list.jsonl --model tests/bare -o out";
    let networks = |methods: &str| -> Vec<String> {
        setup.succeed(&format!("{eval} --methods {methods}"));
        let record = fs::read(setup.work.path().join("out/run.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        let networks = record["models"]["text-to-image"].as_object().unwrap();
        networks.keys().cloned().collect()
    };
    let files = [
        "clip",
        "configuration",
        "configuration of clip",
        "text_encoder",
        "unet",
        "vae",
    ];
    let bare = files.map(str::to_owned).to_vec();
    assert_eq!(networks("sdedit"), bare);
    let of_captioner = ["captioner", "configuration of captioner"].map(str::to_owned);
    let mut all = [bare, of_captioner.to_vec()].concat();
    all.sort();
    assert_eq!(networks("sdedit,difference-inversion"), all);
    assert_eq!(networks("sdedit"), all);
}
