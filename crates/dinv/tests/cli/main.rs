//! The program `dinv` from the outside: exit codes, stdout, stderr, and the files it leaves.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a failed unwrap is a failed test"
)]

mod bad_input;
mod batch;
#[cfg(all(feature = "hub", feature = "serve"))]
mod captioner;
#[cfg(feature = "hub")]
mod chat_server;
mod chroma;
mod clusters;
mod documents;
mod eval;
mod export;
mod first_run;
mod flux;
mod help;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "hub")]
mod hub_server;
mod interrupt;
mod klein;
mod manual;
mod model_files;
mod outputs;
mod runs;
mod sd3;
#[cfg(feature = "serve")]
mod serve;
#[cfg(unix)]
mod terminal;
mod z_image;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The program, in `folder`, without the environment of the test runner, and without the
/// network.
fn dinv(folder: &Path) -> Command {
    let mut command = program();
    command
        .current_dir(folder)
        .env_remove("DINV_DEMO_MODEL")
        .env("HF_HOME", folder.join("hf"))
        .env("HF_HUB_OFFLINE", "1")
        .env("COLUMNS", "100");
    for name in [
        "DINV_CAPTIONER_KEY",
        "HF_ENDPOINT",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HUGGINGFACE_HUB_CACHE",
        "HUGGING_FACE_HUB_TOKEN",
        "TRANSFORMERS_OFFLINE",
        "ALL_PROXY",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "all_proxy",
        "https_proxy",
        "http_proxy",
        // Without it, as on a server, Mesa's drivers print errors unless the program prevents it.
        "XDG_RUNTIME_DIR",
    ] {
        command.env_remove(name);
    }
    command
}

/// The program with no signal ignored, although the test runner may run in the background: ignored signals are
/// inherited, and the program keeps them ignored.
fn program() -> Command {
    const PROGRAM: &str = env!("CARGO_BIN_EXE_dinv");
    const LISTEN: &str = "--default-signal=HUP,INT,TERM";
    // An option of GNU's `env`.
    static THERE: LazyLock<bool> = LazyLock::new(|| {
        let tried = Command::new("env").args([LISTEN, "true"]).output();
        tried.is_ok_and(|tried| tried.status.success())
    });
    if !*THERE {
        return Command::new(PROGRAM);
    }
    let mut command = Command::new("env");
    command.args([LISTEN, PROGRAM]);
    command
}

/// The result of a run of the program.
struct Done {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Runs the program in `folder`; the arguments are separated by spaces.
fn run(folder: &Path, arguments: &str) -> Done {
    dinv(folder)
        .args(arguments.split_whitespace())
        .output()
        .unwrap()
        .into()
}

/// Runs the program in `folder` and expects it to succeed.
fn succeed(folder: &Path, arguments: &str) -> Done {
    let done = run(folder, arguments);
    assert_eq!(done.code, Some(0), "{arguments}\n{}", done.stderr);
    done
}

/// Runs the program in `folder` and expects an error whose message has all of `expected`.
fn refused(folder: &Path, arguments: &str, code: i32, expected: &[&str]) {
    let done = run(folder, arguments);
    assert_eq!(done.code, Some(code), "{arguments}\n{}", done.stderr);
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    for text in expected {
        assert!(done.stderr.contains(text), "no `{text}` in {}", done.stderr);
    }
}

/// Starts the program in `folder` and does not wait for it.
fn start(folder: &Path, arguments: &str) -> Child {
    dinv(folder)
        .args(arguments.split_whitespace())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits until a running program has made a file.
fn wait_for(path: &Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "{} never appeared",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal, such as `-INT`, to a process.
#[cfg(unix)]
fn signal(signal: &str, process: &str) {
    let sent = Command::new("kill").args([signal, process]).status();
    assert!(sent.unwrap().success());
}

/// Names of the files in a folder, sorted.
fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn golden(name: &str) -> PathBuf {
    repository().join("tests/golden").join(name)
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// A folder with the pictures a.png, a_prime.png and b.png, a copy of the tiny model in `model`, and
/// a `tiny.toml` that makes everything on it quick.
fn workplace() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&golden("pipeline"), &folder.path().join("model"));
    for (name, seed) in [("a", 1_u8), ("a_prime", 2), ("b", 3)] {
        let picture = image::RgbImage::from_fn(40, 32, |x, y| {
            let value = (x * 5 + y * 3) % 256;
            let value = u8::try_from(value).unwrap();
            image::Rgb([
                value.wrapping_mul(seed),
                value,
                value.wrapping_add(60 * seed),
            ])
        });
        picture
            .save(folder.path().join(format!("{name}.png")))
            .unwrap();
    }
    let settings = "model = 'model'\nsteps = 6\nclip_first = 3\nnum_tokens = 3\nselect_every = 3\n\
                    select_samples = 2\nnum_inference_steps = 4\n";
    std::fs::write(folder.path().join("tiny.toml"), settings).unwrap();
    folder
}

/// The pair of pictures in a [`workplace`], with captions.
const PAIR: &str = "--a a.png --a-prime a_prime.png --caption-a day --caption-a-prime night";
