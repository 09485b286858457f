//! `dinv serve`: a real server process, queried over HTTP.
#![cfg(unix)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

#[cfg(feature = "hub")]
use super::chat_server::ChatServer;
use super::{Done, dinv, golden, run, signal, workplace};

/// A server on a free port. In the workplace, its data are in `data`, and its stderr in `log`.
struct Server {
    child: Child,
    port: u16,
}

/// The answer.
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", self.text()))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }
}

impl Server {
    fn start(work: &TempDir, more: &[&str]) -> Self {
        Self::cautious(work, &[&["--allow-any-model"], more].concat())
    }

    /// A server that offers only the models that it knows.
    fn cautious(work: &TempDir, more: &[&str]) -> Self {
        let log = File::options()
            .create(true)
            .append(true)
            .open(work.path().join("log"))
            .unwrap();
        let demo = work.path().join("demo/model");
        let mut command = dinv(work.path());
        if demo.is_dir() {
            command.env("DINV_DEMO_MODEL", demo);
        }
        // Whoever may name any model may not be sent the operator's key.
        command.env("DINV_CAPTIONER_KEY", "sk-of-the-operator");
        Self::of(command, log, more)
    }

    /// A server that cannot write a file of more than 64 kB, as on a full disk.
    fn on_a_small_disk(work: &TempDir) -> Self {
        let log = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(work.path().join("log"))
            .unwrap();
        let program = dinv(work.path());
        let mut shell = Command::new("sh");
        shell.current_dir(work.path()).arg("-c");
        // Units of 512 bytes, or of 1024 in bash.
        shell
            .arg("ulimit -f 64; trap '' XFSZ; exec \"$@\"")
            .arg("sh");
        shell.arg(program.get_program()).args(program.get_args());
        let variables = program.get_envs();
        shell.envs(variables.filter_map(|(name, value)| Some((name, value?))));
        Self::of(shell, log, &["--allow-any-model"])
    }

    fn of(mut command: Command, log: File, more: &[&str]) -> Self {
        let told = log.try_clone().unwrap();
        let mut child = command
            .args(["serve", "--dir", "data", "--port", "0"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let port = line
            .trim()
            .trim_end_matches('/')
            .rsplit(':')
            .next()
            .unwrap();
        let port = port.parse().unwrap_or_else(|_| {
            let _ = child.wait();
            let mut error = String::new();
            let _ = (&told).rewind();
            let _ = (&told).read_to_string(&mut error);
            panic!("{line:?}: {error}")
        });
        Self { child, port }
    }

    /// Sends a request with these headers; HTTP/1.0, so that the answer ends with the connection.
    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut stream = self.send(method, path, headers, body);
        let mut all = Vec::new();
        // A server that refuses a large request closes the connection before it has read all of it.
        let _ = stream.read_to_end(&mut all);
        let end = all
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .expect("no answer");
        let head = String::from_utf8(all[..end].to_vec()).unwrap();
        Answer {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            head: head.to_lowercase(),
            body: all[end + 4..].to_vec(),
        }
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut head = format!(
            "{method} {path} HTTP/1.0\r\ncontent-length: {}\r\n",
            body.len()
        );
        if !headers.iter().any(|(name, _)| *name == "host") {
            head += &format!("host: 127.0.0.1:{}\r\n", self.port);
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
        let _ = stream.write_all(body);
        stream
    }

    fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], b"")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, &[], body.to_string().as_bytes())
    }

    /// Posts a job and returns its address.
    fn job(&self, body: &Value) -> String {
        let answer = self.post("/v1/jobs", body).expect(202);
        let address = format!("/v1/jobs/{}", answer.json()["id"].as_str().unwrap());
        assert!(
            answer.head.contains(&format!("location: {address}")),
            "{}",
            answer.head
        );
        address
    }

    /// Waits until a job is as expected.
    fn wait(&self, address: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let job = self.get(address).expect(200).json();
            if is_so(&job) {
                return job;
            }
            let is_over = !["queued", "running"].contains(&job["state"].as_str().unwrap());
            assert!(
                !is_over && started.elapsed() < Duration::from_secs(300),
                "{job:#}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn done(&self, address: &str) -> Value {
        self.wait(address, |job| job["state"] == "done")
    }

    fn stop(mut self) -> Option<i32> {
        signal("-INT", &self.child.id().to_string());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A picture of the workplace as a data URL.
fn data(work: &TempDir, name: &str) -> String {
    let bytes = fs::read(work.path().join(name)).unwrap();
    format!("data:image/png;base64,{}", STANDARD.encode(bytes))
}

/// Settings that make jobs on the tiny model quick.
fn settings(work: &TempDir, more: &Value) -> Value {
    let model = work.path().join("model");
    let mut settings = json!({ "model": model });
    settings
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    settings
}

fn pairs(work: &TempDir) -> Value {
    json!([{
        "a": data(work, "a.png"), "a_prime": data(work, "a_prime.png"),
        "caption_a": "day", "caption_a_prime": "night",
    }])
}

/// A job that learns for the given number of steps.
fn learning(work: &TempDir, steps: usize) -> Value {
    let more = json!({ "steps": steps, "num_tokens": 3, "select_every": 0, "checkpoint_every": 1 });
    json!({ "kind": "learn", "pairs": pairs(work), "settings": settings(work, &more) })
}

/// Checks that the strengths of a difference give different pictures, which state how they were made.
fn check_strengths(server: &Server, work: &TempDir, target: &Value) {
    let quick = settings(work, &json!({ "num_inference_steps": 2 }));
    let applied = server.job(&json!({
        "kind": "apply", "difference": "night", "targets": [target, target], "strengths": [0.5, 1],
        "settings": quick,
    }));
    let applied = server.done(&applied);
    let results = applied["results"].as_array().unwrap();
    let shown: Vec<_> = results
        .iter()
        .map(|one| (one["target"].as_u64(), one["strength"].as_f64()))
        .collect();
    let expected = [(0, 0.5), (1, 0.5), (0, 1.0), (1, 1.0)].map(|(b, s)| (Some(b), Some(s)));
    assert_eq!(shown, expected);
    let pictures: Vec<Vec<u8>> = results
        .iter()
        .map(|one| server.get(one["url"].as_str().unwrap()).expect(200).body)
        .collect();
    assert!(
        pictures[0] != pictures[2],
        "the strengths give the same picture"
    );
    let zip = server
        .get(&format!("/v1/jobs/{}/zip", applied["id"].as_str().unwrap()))
        .expect(200)
        .body;
    assert!(zip.starts_with(b"PK\x03\x04") && zip.len() > pictures.iter().map(Vec::len).sum());
    let read = json!({ "picture": results[0]["url"] });
    let read = server.post("/v1/read-png", &read).expect(200).json();
    assert_eq!(
        (&read["command"], &read["settings"]["strength"]),
        (&json!("apply"), &json!(0.5))
    );
}

#[test]
fn jobs_give_differences_pictures_and_captions() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let page = server.get("/").expect(200);
    assert!(
        page.head.contains("content-type: text/html"),
        "{}",
        page.head
    );
    assert!(
        page.head.contains("frame-ancestors 'none'"),
        "{}",
        page.head
    );

    let mut request = learning(&work, 6);
    request["name"] = json!("night");
    let first = server.job(&request);
    let second = server.job(&request);
    let learned = server.done(&first);
    assert_eq!(learned["results"][0]["name"], "night");
    assert_eq!(learned["losses"].as_array().unwrap().len(), 6);
    assert_eq!(server.done(&second)["results"][0]["name"], "night 2");
    let picture = learned["request"]["pairs"][0]["a"].as_str().unwrap();
    assert_eq!(
        server.get(picture).expect(200).body,
        fs::read(work.path().join("a.png")).unwrap()
    );

    // The same command in a terminal learns the same.
    let command = learned["commands"][0].as_array().unwrap();
    let words = command[1..].iter().map(|word| word.as_str().unwrap());
    let words = words.filter(|word| !word.starts_with("--output="));
    let typed = dinv(work.path())
        .args(words)
        .args(["-o", "typed.safetensors"])
        .output()
        .unwrap();
    let typed: Done = typed.into();
    assert_eq!(typed.code, Some(0), "{}", typed.stderr);
    let of_server = server.get("/v1/differences/night").expect(200).body;
    assert!(of_server == fs::read(work.path().join("typed.safetensors")).unwrap());

    let all = server.get("/v1/differences").json();
    let names: Vec<_> = all["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["name"])
        .collect();
    assert_eq!(names.len(), 2);
    let thumbnail = server
        .get("/v1/differences/night%202/thumbnail")
        .expect(200)
        .body;
    let thumbnail = image::load_from_memory(&thumbnail).unwrap();
    assert_eq!((thumbnail.width(), thumbnail.height()), (256, 128));

    let b = data(&work, "b.png");
    let target = json!({ "picture": b, "caption": "dusk" });
    check_strengths(&server, &work, &target);

    let captions = server.job(&json!({
        "kind": "caption", "targets": [{ "picture": b }], "settings": settings(&work, &json!({})),
    }));
    let caption = &server.done(&captions)["results"][0]["caption"];
    let typed = run(work.path(), "caption --config tiny.toml b.png -q");
    assert_eq!(caption.as_str(), Some(typed.stdout.trim_end()));

    let more = json!({
        "steps": 2, "num_tokens": 3, "select_every": 0, "num_inference_steps": 2, "reverse": true,
    });
    let solved = server.job(&json!({
        "kind": "analogy", "pairs": pairs(&work), "targets": [target], "settings": settings(&work, &more),
    }));
    let solved = server.done(&solved);
    let kinds: Vec<_> = solved["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["kind"])
        .collect();
    assert_eq!(kinds, ["picture", "difference"]);
    let capabilities = server.get("/v1/capabilities").expect(200).json();
    let described = server.get("/v1/openapi.json").expect(200).json();
    assert_eq!(described["openapi"], "3.1.0");
    assert!(described["paths"]["/v1/jobs"]["post"].is_object());
    let example = capabilities["example"]["a"].as_str().unwrap();
    assert!(server.get(example).expect(200).body.starts_with(b"\x89PNG"));
    assert_eq!(server.stop(), Some(130));
}

/// An analogy with many B is learned once, and its commands do the same in a terminal.
#[test]
fn an_analogy_takes_many_pictures() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let more = json!({
        "steps": 2, "num_tokens": 3, "select_every": 0, "num_inference_steps": 2, "strength": "0.5",
        "no_memory_check": "true", "reverse": "false",
    });
    let target = |name: &str| json!({ "picture": data(&work, name), "caption": "dusk" });
    let job = server.job(&json!({
        "kind": "analogy", "pairs": pairs(&work), "targets": [target("b.png"), target("a.png")], "name": "both",
        "settings": settings(&work, &more),
    }));
    let job = server.done(&job);
    let results = job["results"].as_array().unwrap();
    let shown: Vec<_> = results
        .iter()
        .map(|one| (one["kind"].as_str().unwrap(), one["target"].as_u64()))
        .collect();
    let expected = [
        ("difference", None),
        ("picture", Some(0)),
        ("picture", Some(1)),
    ];
    assert_eq!(shown, expected);
    assert_eq!(results[1]["strength"], 0.5);
    let commands = job["commands"].as_array().unwrap();
    assert_eq!(commands.len(), 2, "{commands:#?}");
    for command in commands {
        let words = command.as_array().unwrap()[1..].iter();
        let words = words.map(|word| word.as_str().unwrap());
        let typed = dinv(work.path()).args(words).output().unwrap();
        let typed: Done = typed.into();
        assert_eq!(typed.code, Some(0), "{}", typed.stderr);
    }
    let place = work
        .path()
        .join("data/jobs")
        .join(job["id"].as_str().unwrap())
        .join("work");
    let kept = server.get("/v1/differences/both").expect(200).body;
    assert!(kept == fs::read(place.join("difference.safetensors")).unwrap());
    for (result, file) in results[1..].iter().zip(["b1.png", "b2.png"]) {
        let made = server.get(result["url"].as_str().unwrap()).expect(200).body;
        let typed = fs::read(place.join("strength-1").join(file)).unwrap();
        let pixels = |png: &[u8]| image::load_from_memory(png).unwrap().into_rgb8();
        assert!(pixels(&made) == pixels(&typed), "{file}");
    }
}

#[test]
fn models_say_what_they_need() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let all = server.get("/v1/models").expect(200).json();
    let models = all["models"].as_array().unwrap();
    let find = |name: &str| models.iter().find(|model| model["name"] == name).unwrap();
    assert!(all["disk"]["free"].as_u64().unwrap() > 0);
    let device = server.get("/v1/capabilities").json()["device"].clone();
    assert_eq!(all["memory"].is_object(), device == "cpu", "{device}");
    let bytes = |model: &Value, dtype: &str, memory: &str| {
        let ways = model["learning"].as_array().unwrap();
        let way = ways
            .iter()
            .find(|way| way["dtype"] == dtype && way["memory"] == memory);
        way.unwrap()["bytes"].as_u64().unwrap()
    };
    let demo = find("demo");
    assert_eq!(demo["on_disk"], true);
    assert!((50_000_000..2_000_000_000).contains(&bytes(demo, "f32", "normal")));
    let sdxl = find("sdxl");
    assert_eq!(sdxl["on_disk"], false);
    assert!(bytes(sdxl, "f32", "normal") > 10_000_000_000);
    assert!(bytes(sdxl, "f16", "low") < bytes(sdxl, "f32", "low"));
    // A download is a job; where the model cannot be had, it says why.
    let asked = json!({ "kind": "download", "settings": { "model": "tests/nothing" } });
    let job = server.job(&asked);
    let failed = server.wait(&job, |job| job["state"] == "failed");
    assert_eq!(
        failed["commands"][0],
        json!(["dinv", "models", "pull", "tests/nothing"])
    );
    let message = failed["error"]["message"].as_str().unwrap();
    assert!(message.contains("tests/nothing"), "{message}");
    for (settings, expected) in [
        (json!({}), "the model is missing"),
        (json!({ "model": "--help" }), "expected a name"),
        (
            json!({ "model": "sd15", "steps": 3 }),
            "`download` has no setting `steps`",
        ),
    ] {
        let refused = server.post(
            "/v1/jobs",
            &json!({ "kind": "download", "settings": settings }),
        );
        let error = refused.expect(422).json()["error"].clone();
        assert!(
            error["message"].as_str().unwrap().contains(expected),
            "{error}"
        );
    }
}

/// A download is a job that can be cancelled and repeated, and then the model is there.
#[cfg(feature = "hub")]
#[test]
fn a_model_is_downloaded_as_a_job() {
    let work = workplace();
    let hub = super::hub_server::HubServer::start();
    hub.add("tests/tiny", &super::golden("pipeline"));
    let log = File::create(work.path().join("log")).unwrap();
    let mut program = dinv(work.path());
    program
        .env("HF_ENDPOINT", hub.endpoint())
        .env_remove("HF_HUB_OFFLINE");
    let server = Server::of(program, log, &["--allow-any-model"]);
    let is_listed = || {
        let all = server.get("/v1/models").expect(200).json();
        let mut models = all["models"].as_array().unwrap().iter();
        models.any(|model| model["name"] == "tests/tiny" && model["on_disk"] == true)
    };
    assert!(!is_listed());
    let asked = json!({ "kind": "download", "settings": { "model": "tests/tiny", "all": true } });
    let job = server.done(&server.job(&asked));
    let typed = json!([["dinv", "models", "pull", "tests/tiny", "--all"]]);
    assert_eq!(job["commands"], typed);
    assert!(is_listed());
    let caption = json!({
        "kind": "caption", "targets": [{ "picture": data(&work, "b.png") }], "settings": { "model": "tests/tiny" },
    });
    server.done(&server.job(&caption));
}

/// A download whose Hub does not answer does not hold up the jobs that compute, and can be cancelled.
#[cfg(feature = "hub")]
#[test]
fn jobs_do_not_wait_for_downloads() {
    let work = workplace();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let log = File::create(work.path().join("log")).unwrap();
    let mut program = dinv(work.path());
    program
        .env(
            "HF_ENDPOINT",
            format!("http://{}", silent.local_addr().unwrap()),
        )
        .env_remove("HF_HUB_OFFLINE");
    let server = Server::of(program, log, &["--allow-any-model"]);
    let asked = json!({ "kind": "download", "settings": { "model": "tests/tiny" } });
    let [first, second] = [(); 2].map(|()| server.job(&asked));
    server.wait(&first, |job| job["state"] == "running");
    server.done(&server.job(&learning(&work, 1)));
    assert_eq!(server.get(&first).json()["state"], "running");
    assert_eq!(server.get(&second).json()["position"], 1);
    let cancel = |address: &str| {
        server
            .post(&format!("{address}/cancel"), &json!({}))
            .expect(200)
    };
    cancel(&second);
    cancel(&first);
    cancel(&first);
    server.wait(&first, |job| job["state"] == "cancelled");
    server.done(&server.job(&learning(&work, 1)));
}

/// The server exports what `dinv export` does.
#[test]
fn differences_are_exported_for_other_programs() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let mut request = learning(&work, 2);
    request["name"] = json!("night sky");
    server.done(&server.job(&request));
    let place = "/v1/differences/night%20sky/exports";
    let all = server
        .get(&format!("{place}?reverse=true"))
        .expect(200)
        .json();
    let all = all["exports"].as_array().unwrap();
    let programs: Vec<_> = all.iter().map(|one| &one["format"]).collect();
    assert_eq!(
        programs,
        ["diffusers"],
        "the tiny model is no Stable Diffusion"
    );
    assert_eq!(all[0]["usage"]["prompt"], "CAPTION <dinv-night-sky-back>");
    let url = all[0]["files"][0]["url"].as_str().unwrap();
    let file = server.get(url).expect(200).body;
    let difference = server.get("/v1/differences/night%20sky").expect(200).body;
    fs::write(work.path().join("night sky.safetensors"), difference).unwrap();
    let typed = dinv(work.path())
        .args([
            "export",
            "night sky.safetensors",
            "--format",
            "diffusers",
            "--reverse",
            "-o",
            "typed",
        ])
        .output()
        .unwrap();
    let typed: Done = typed.into();
    assert_eq!(typed.code, Some(0), "{}", typed.stderr);
    let name = "dinv-night-sky-back.safetensors";
    assert_eq!(all[0]["files"][0]["name"], name);
    assert!(file == fs::read(work.path().join("typed").join(name)).unwrap());
    for (path, status) in [
        (format!("{place}?word=a/b"), 422),
        (format!("{place}?reverse=perhaps"), 422),
        (format!("{place}?other=1"), 422),
        (format!("{place}/a1111/x.safetensors"), 422),
        (format!("{place}/nothing/x.safetensors"), 404),
        (format!("{place}/diffusers/x.safetensors"), 404),
        ("/v1/differences/day/exports".to_owned(), 404),
    ] {
        let refused = server.get(&path).expect(status).json();
        assert!(refused["error"]["message"].is_string(), "{path}");
    }
}

/// What cannot be written is refused and leaves nothing, and the server goes on.
#[test]
fn a_full_disk_refuses_and_forgets() {
    let work = workplace();
    let server = Server::on_a_small_disk(&work);
    let caption = |picture: String| {
        json!({
            "kind": "caption", "targets": [{ "picture": picture }], "settings": settings(&work, &json!({})),
        })
    };
    let mut noise = image::RgbImage::new(256, 256);
    let mut state = 1_u32;
    for byte in noise.iter_mut() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = state.to_be_bytes()[0];
    }
    noise.save(work.path().join("large.png")).unwrap();
    let large = caption(data(&work, "large.png"));
    let refused = server.post("/v1/jobs", &large).expect(507).json();
    let hint = refused["error"]["hint"].as_str().unwrap();
    assert!(hint.contains("make room"), "{hint}");
    let left: Vec<_> = fs::read_dir(work.path().join("data/jobs"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(server.get("/v1/jobs").json()["count"], 0);
    server.done(&server.job(&caption(data(&work, "b.png"))));
}

#[test]
fn the_library_of_differences_is_kept_in_order() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let mut request = learning(&work, 1);
    request["name"] = json!("night");
    server.done(&server.job(&request));
    let file = server.get("/v1/differences/night").expect(200).body;
    let put =
        |name: &str, body: &[u8]| server.ask("PUT", &format!("/v1/differences/{name}"), &[], body);
    put("copy", &file).expect(201);
    put("copy", &file).expect(409);
    put("broken", &file[..100]).expect(422);
    put("..%2Fout", &file).expect(422);
    let patch = |body: &str| server.ask("PATCH", "/v1/differences/night", &[], body.as_bytes());
    patch(r#"{"name": "../out"}"#).expect(422);
    patch(r#"{"name": "copy"}"#).expect(409);
    assert_eq!(
        patch(r#"{"name": "evening sky"}"#).expect(200).json()["name"],
        "evening sky"
    );
    server.get("/v1/differences/night").expect(404);
    assert!(server.get("/v1/differences/evening%20sky").expect(200).body == file);
    server
        .get("/v1/differences/evening%20sky/thumbnail")
        .expect(200);
    server
        .ask("DELETE", "/v1/differences/evening%20sky", &[], b"")
        .expect(204);
    server.get("/v1/differences/evening%20sky").expect(404);
    let left = super::entries(&work.path().join("data/differences"));
    assert_eq!(left, ["copy.json", "copy.safetensors"]);
}

#[test]
fn a_killed_server_continues_its_jobs_at_the_next_start() {
    let work = workplace();
    let mut server = Server::start(&work, &[]);
    let running = server.job(&learning(&work, 150));
    let waiting = server.job(&learning(&work, 1));
    let at = |job: &Value| {
        job["progress"]["step"]
            .as_u64()
            .filter(|_| job["progress"]["stage"] == "learn")
    };
    server.wait(&running, |job| at(job) > Some(5));
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    // Losses that it had not saved come from the checkpoint.
    let id = running.rsplit('/').next().unwrap();
    let losses = work.path().join(format!("data/jobs/{id}/losses.jsonl"));
    let written = fs::read_to_string(&losses).unwrap();
    let kept: Vec<_> = written.lines().take(3).collect();
    fs::write(&losses, kept.join("\n")).unwrap();
    let server = Server::start(&work, &[]);
    let job = server.done(&running);
    let steps: Vec<u64> = job["losses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|loss| loss[0].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=150).collect::<Vec<_>>());
    server.done(&waiting);
    // The result is the same as without an interruption.
    let straight = server.done(&server.job(&learning(&work, 150)));
    assert_eq!(straight["losses"], job["losses"]);
    let file = |job: &Value| {
        server
            .get(job["results"][0]["url"].as_str().unwrap())
            .expect(200)
            .body
    };
    assert!(file(&straight) == file(&job));
}

#[test]
fn a_stopped_server_stops_its_command_and_continues_it() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let address = server.job(&learning(&work, 100_000));
    server.wait(&address, |job| job["losses"].is_array());
    assert_eq!(server.stop(), Some(130));
    let log = fs::read_to_string(work.path().join("log")).unwrap();
    assert!(
        log.contains("stopped; 1 unfinished job continues at the next start"),
        "{log}"
    );
    let server = Server::start(&work, &[]);
    let refused = run(work.path(), "serve --dir data --port 0");
    assert!(
        refused.stderr.contains("another server uses this folder"),
        "{}",
        refused.stderr
    );
    server.wait(&address, |job| {
        job["progress"]["stage"] == "learn" && job["progress"]["step"].as_u64() > Some(1)
    });
    server
        .post(&format!("{address}/cancel"), &json!({}))
        .expect(200);
    let job = server.wait(&address, |job| job["state"] == "cancelled");
    assert!(job["finished"].is_string());
}

/// The processes that a server has started and that live.
#[cfg(target_os = "linux")]
fn processes_of(server: &Server) -> Vec<String> {
    let parent = format!("PPid:\t{}", server.child.id());
    let is_child = |status: &str| {
        let mut lines = status.lines();
        lines.any(|line| line == parent) && !status.contains("State:\tZ")
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let children = processes.filter(|entry| {
        let status = fs::read_to_string(entry.path().join("status"));
        status.is_ok_and(|status| is_child(&status))
    });
    children
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// A process runs one job after another, until one fails or is cancelled, or there is nothing to do.
#[cfg(target_os = "linux")]
#[test]
fn one_process_runs_many_jobs_and_keeps_the_models_open() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let quick = learning(&work, 1);
    server.done(&server.job(&quick));
    let first = processes_of(&server);
    assert_eq!(first.len(), 1);
    server.done(&server.job(&quick));
    assert_eq!(processes_of(&server), first);
    let memory = |server: &Server| server.get("/v1/models").json()["memory"]["available"].clone();
    assert!(memory(&server).as_u64().unwrap() > 0);

    // A process that somebody ends while it waits takes no job with it.
    for name in ["-KILL", "-TERM", "-HUP", "-INT"] {
        let waiting = processes_of(&server);
        signal(name, &waiting[0]);
        server.done(&server.job(&quick));
        assert_ne!(processes_of(&server), waiting, "{name}");
    }
    let second = processes_of(&server);

    let long = server.job(&learning(&work, 100_000));
    server.wait(&long, |job| job["losses"].is_array());
    assert_eq!(processes_of(&server), second);
    server
        .post(&format!("{long}/cancel"), &json!({}))
        .expect(200);
    server.wait(&long, |job| job["state"] == "cancelled");
    assert_eq!(processes_of(&server), Vec::<String>::new());
    let broken = server.job(&json!({
        "kind": "generate", "prompt": "a house", "settings": { "model": work.path().join("nowhere") },
    }));
    server.wait(&broken, |job| job["state"] == "failed");
    assert_eq!(processes_of(&server), Vec::<String>::new());
    server.done(&server.job(&quick));
    let third = processes_of(&server);
    assert_eq!(server.stop(), Some(130));
    assert!(!Path::new("/proc").join(&third[0]).exists());

    let server = Server::start(&work, &["--keep-models", "0"]);
    server.done(&server.job(&quick));
    assert_eq!(processes_of(&server), Vec::<String>::new());
}

#[test]
fn a_job_whose_checkpoint_is_refused_starts_anew_when_it_is_tried_again() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let job = server.job(&learning(&work, 100_000));
    let stop = |job: &str| {
        server.wait(job, |job| job["losses"].is_array());
        let told = server.post(&format!("{job}/cancel"), &json!({})).json();
        assert_eq!(told["stopping"], true);
        server.wait(job, |job| job["state"] == "cancelled");
    };
    let try_again = |job: &str| {
        let told = server.post(&format!("{job}/retry"), &json!({})).expect(202);
        format!("/v1/jobs/{}", told.json()["id"].as_str().unwrap())
    };
    stop(&job);
    let place = work
        .path()
        .join("data")
        .join(&job["/v1/".len()..])
        .join("work");
    let mut files = fs::read_dir(&place)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let is_checkpoint = |path: &PathBuf| path.to_string_lossy().contains("checkpoint");
    fs::write(files.find(is_checkpoint).unwrap(), "damaged").unwrap();
    let refused = try_again(&job);
    let failed = server.wait(&refused, |job| job["state"] == "failed");
    let message = failed["error"]["message"].as_str().unwrap();
    assert!(message.contains("checkpoint"), "{message}");
    stop(&try_again(&refused));
}

#[test]
fn what_a_cancelled_job_has_drawn_is_kept() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let mut request = learning(&work, 2);
    request["name"] = json!("night");
    server.done(&server.job(&request));
    let target = json!({ "picture": data(&work, "b.png"), "caption": "dusk" });
    let job = server.job(&json!({
        "kind": "apply", "difference": "night", "targets": vec![target; 40],
        "settings": settings(&work, &json!({ "num_inference_steps": 30 })),
    }));
    let place = work.path().join("data").join(&job["/v1/".len()..]);
    let first = place.join("work/strength-1/b1.png");
    server.wait(&job, |_| first.is_file());
    server
        .post(&format!("{job}/cancel"), &json!({}))
        .expect(200);
    let told = server.wait(&job, |job| job["state"] == "cancelled");
    let results = told["results"].as_array().unwrap();
    assert!((1..40).contains(&results.len()), "{}", results.len());
    server.get(results[0]["url"].as_str().unwrap()).expect(200);
}

#[test]
fn the_queue_is_bounded_and_jobs_are_cancelled_retried_and_removed() {
    let work = workplace();
    let server = Server::start(&work, &["--queue", "2"]);
    let long = learning(&work, 100_000);
    let running = server.job(&long);
    server.wait(&running, |job| job["state"] == "running");
    let key = [("idempotency-key", "once")];
    let post = || {
        server
            .ask("POST", "/v1/jobs", &key, long.to_string().as_bytes())
            .expect(202)
            .json()
    };
    let next = post();
    assert_eq!(next["position"], 1);
    assert_eq!(post()["id"], next["id"]);
    let last = server.job(&long);
    assert_eq!(server.get(&last).json()["position"], 2);
    server.post("/v1/jobs", &long).expect(429);

    server.ask("DELETE", &running, &[], b"").expect(409);
    server
        .post(&format!("{running}/retry"), &json!({}))
        .expect(409);
    let first = |address: &str| server.post(&format!("{address}/first"), &json!({}));
    assert_eq!(first(&last).expect(200).json()["position"], 1);
    let place = format!("/v1/jobs/{}", next["id"].as_str().unwrap());
    assert_eq!(server.get(&place).json()["position"], 2);
    first(&running).expect(409);
    let cancel = |address: &str| server.post(&format!("{address}/cancel"), &json!({}));
    assert_eq!(cancel(&last).expect(200).json()["state"], "cancelled");
    cancel(&last).expect(409);
    cancel(&format!("/v1/jobs/{}", next["id"].as_str().unwrap())).expect(200);
    server.wait(&running, |job| job["losses"].is_array());
    cancel(&running).expect(200);
    let stopped = server.wait(&running, |job| job["state"] == "cancelled");
    let reached = stopped["losses"].as_array().unwrap().last().unwrap()[0]
        .as_u64()
        .unwrap();

    // A retry resumes from the checkpoint.
    let again = server
        .post(&format!("{running}/retry"), &json!({}))
        .expect(202)
        .json();
    let again = format!("/v1/jobs/{}", again["id"].as_str().unwrap());
    let job = server.wait(&again, |job| job["losses"].is_array());
    assert!(
        job["losses"][0][0].as_u64().unwrap() > reached.min(1),
        "{job:#}"
    );
    cancel(&again).expect(200);
    server.wait(&again, |job| job["state"] == "cancelled");
    server.ask("DELETE", &running, &[], b"").expect(204);
    server.get(&running).expect(404);
    let jobs = server.get("/v1/jobs").json();
    let ids: Vec<&str> = jobs["jobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|job| job["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), 3);
    assert!(ids.is_sorted_by(|newer, older| newer > older));
    let newest = server.get("/v1/jobs?limit=1").expect(200).json();
    assert_eq!(
        (newest["jobs"].as_array().unwrap().len(), &newest["count"]),
        (1, &json!(3))
    );
    assert_eq!(newest["jobs"][0]["id"], ids[0]);
    server.get("/v1/jobs?limit=few").expect(422);
    assert_eq!(
        server.get("/v1/jobs?kinds=caption,apply").json()["count"],
        0
    );
    assert_eq!(server.get("/v1/jobs?kinds=learn").json()["count"], 3);
    server.get("/v1/jobs?kinds=learns").expect(422);
}

#[test]
fn events_follow_a_job_and_resume() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let address = server.job(&learning(&work, 40));
    let path = format!("{address}/events");
    let all = server.get(&path).expect(200);
    assert!(
        all.head.contains("content-type: text/event-stream"),
        "{}",
        all.head
    );
    let events = |text: &str| -> Vec<(String, u64, Value)> {
        let blocks = text.split("\n\n").filter(|block| block.contains("data:"));
        let read = blocks.map(|block| {
            let field = |name: &str| {
                let mut lines = block.lines();
                lines
                    .find_map(|line| line.strip_prefix(name))
                    .unwrap()
                    .trim()
                    .to_owned()
            };
            let data = serde_json::from_str(&field("data:")).unwrap();
            (field("event:"), field("id:").parse().unwrap(), data)
        });
        read.collect()
    };
    let steps = |events: &[(String, u64, Value)]| -> Vec<u64> {
        let losses = events.iter().filter(|(kind, ..)| kind == "loss");
        losses
            .map(|(_, _, data)| data[0].as_u64().unwrap())
            .collect()
    };
    let all = events(&all.text());
    assert_eq!(steps(&all), (1..=40).collect::<Vec<_>>());
    assert!(all.is_sorted_by_key(|(_, id, _)| *id));
    let (kind, _, last) = all.last().unwrap();
    assert_eq!((kind.as_str(), &last["state"]), ("job", &json!("done")));
    assert!(last["losses"].is_null());
    let (_, id, _) = all
        .iter()
        .find(|(kind, _, data)| kind == "loss" && data[0] == 25)
        .unwrap();
    let rest = server
        .ask("GET", &path, &[("last-event-id", &id.to_string())], b"")
        .expect(200);
    assert_eq!(steps(&events(&rest.text())), (26..=40).collect::<Vec<_>>());
}

/// The previews of a picture that a server draws, and the picture.
fn drawn_by(server: &Server, settings: &Value) -> (Vec<image::DynamicImage>, image::DynamicImage) {
    let job = json!({ "kind": "generate", "prompt": "a barn", "settings": settings });
    let address = server.job(&job);
    let events = server.get(&format!("{address}/events")).expect(200).text();
    let blocks = events.split("\n\n");
    let shown =
        blocks.filter(|block| block.contains("event: preview") || block.contains("event:preview"));
    let shown = shown.map(|block| {
        let (_, picture) = block.split_once("data:image/png;base64,").unwrap();
        let picture = picture.lines().next().unwrap();
        image::load_from_memory(&STANDARD.decode(picture).unwrap()).unwrap()
    });
    let shown: Vec<_> = shown.collect();
    assert!(!shown.is_empty(), "{events}");
    let job = server.done(&address);
    let made = server.get(job["results"][0]["url"].as_str().unwrap());
    (
        shown,
        image::load_from_memory(&made.expect(200).body).unwrap(),
    )
}

/// Previews have a pixel for every latent, or the picture's size with an autoencoder of their own; the picture is that of
/// the same command without them.
#[test]
fn events_show_the_picture_as_it_is_drawn() {
    let work = workplace();
    let quick = settings(&work, &json!({ "num_inference_steps": 200, "seed": 3 }));
    let server = Server::start(&work, &[]);
    let (shown, made) = drawn_by(&server, &quick);
    for preview in &shown {
        assert_eq!(preview.width() * 2, made.width());
    }
    drop(server);
    let vae = golden("parts/vae_tiny").display().to_string();
    let server = Server::start(&work, &["--preview-vae", &vae]);
    let (shown, same) = drawn_by(&server, &quick);
    assert_eq!(made, same);
    for preview in &shown {
        assert_eq!(preview.width(), made.width());
    }
    let typed = |name: &str, more: &[&str]| {
        let words = "generate --model model --num-inference-steps 200 --seed 3 -o";
        let mut command = dinv(work.path());
        command
            .args(words.split(' '))
            .args([name, "--prompt", "a barn"]);
        let done = Done::from(command.args(more).output().unwrap());
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        assert_eq!(image::open(work.path().join(name)).unwrap(), made);
        done.stderr.matches("\"preview\"").count()
    };
    assert_eq!(typed("plain.png", &["--previews"]), 0);
    assert_eq!(
        typed("watched.png", &["--progress", "json", "--previews"]),
        200
    );
}

#[test]
fn jobs_are_managed_from_a_terminal() {
    let work = workplace();
    let server = Server::start(&work, &["--token", "secret-of-ours"]);
    let typed = |words: &str| {
        let address = format!("http://127.0.0.1:{}", server.port);
        let mut command = dinv(work.path());
        command
            .args(["jobs", "--server", &address])
            .args(words.split(' '));
        Done::from(
            command
                .env("DINV_TOKEN", "secret-of-ours")
                .output()
                .unwrap(),
        )
    };
    let succeeds = |words: &str| {
        let done = typed(words);
        assert_eq!(done.code, Some(0), "{words}: {}", done.stderr);
        done.stdout
    };
    let key = [("authorization", "Bearer secret-of-ours")];
    let job = |steps| {
        let body = learning(&work, steps).to_string();
        let answer = server.ask("POST", "/v1/jobs", &key, body.as_bytes());
        answer.expect(202).json()["id"].as_str().unwrap().to_owned()
    };
    let [first, second, third] = [100_000, 1, 2].map(job);
    let listed = succeeds("list");
    let lines: Vec<&str> = listed.lines().collect();
    assert!(
        lines[0].starts_with(&third) && lines[0].contains("queued"),
        "{listed}"
    );
    assert!(lines[2].starts_with(&first), "{listed}");
    assert!(succeeds(&format!("first {third}")).contains("number 1 in the queue"));
    assert!(succeeds(&format!("cancel {second}")).contains("cancelled"));
    succeeds(&format!("cancel {first}"));
    let done = typed(&format!("watch {first}"));
    assert_eq!(done.code, Some(1));
    assert!(
        done.stderr.contains(&format!("job {first}: cancelled")),
        "{}",
        done.stderr
    );
    let watched = typed(&format!("watch {third}"));
    assert_eq!(watched.code, Some(0), "{}", watched.stderr);
    assert!(watched.stderr.contains("done"), "{}", watched.stderr);
    assert!(
        watched.stdout.contains("/v1/differences/"),
        "{}",
        watched.stdout
    );
    let shown: Value = serde_json::from_str(&succeeds(&format!("show {third}"))).unwrap();
    assert_eq!(shown["state"], "done");
    let all: Value = serde_json::from_str(&succeeds("list --json")).unwrap();
    assert_eq!(all.as_array().unwrap().len(), 3);
    assert!(succeeds(&format!("retry {second}")).contains("learn"));
    succeeds(&format!("remove {second}"));
    let gone = typed(&format!("show {second}"));
    assert!(
        gone.stderr.contains("there is no such job"),
        "{}",
        gone.stderr
    );
    assert_eq!(typed("show ../x").code, Some(64));
    let nobody = run(work.path(), "jobs list --server http://127.0.0.1:1");
    assert_eq!(nobody.code, Some(75));
    assert!(
        nobody
            .stderr
            .contains("hint: check that `dinv serve` runs there"),
        "{}",
        nobody.stderr
    );
    let stranger = run(
        work.path(),
        &format!("jobs list --server http://127.0.0.1:{}", server.port),
    );
    assert_eq!(stranger.code, Some(1), "{}", stranger.stderr);
}

#[test]
fn clients_that_follow_jobs_leave_places_for_others() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let address = server.job(&learning(&work, 100_000));
    let path = format!("{address}/events");
    let begin = |stream: &mut TcpStream| {
        let mut line = [0; 12];
        stream.read_exact(&mut line).unwrap();
        String::from_utf8(line[9..].to_vec()).unwrap()
    };
    let mut followers = Vec::new();
    for _ in 0..128 {
        let mut stream = server.send("GET", &path, &[], b"");
        assert_eq!(begin(&mut stream), "200");
        followers.push(stream);
    }
    assert_eq!(begin(&mut server.send("GET", &path, &[], b"")), "503");
    server.get("/v1/jobs").expect(200);
    drop(followers);
    let started = Instant::now();
    while begin(&mut server.send("GET", &path, &[], b"")) != "200" {
        assert!(started.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(feature = "hub")]
#[test]
fn a_request_names_another_server_only_if_it_may() {
    let (work, chat) = (workplace(), ChatServer::start(&["m"]));
    let request = |settings: Value| json!({ "kind": "caption", "targets": [{ "picture": data(&work, "a.png") }], "settings": settings });
    let captioner = json!({ "captioner": format!("{}#m", chat.address()) });
    let server = Server::cautious(&work, &[]);
    let refused = server.post("/v1/jobs", &request(captioner.clone()));
    let error = &refused.expect(422).json()["error"];
    assert_eq!(error["field"], "settings.captioner");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.starts_with("the server does not offer the captioner `http://127.0.0.1:"),
        "{message}"
    );
    assert!(
        error["hint"]
            .as_str()
            .unwrap()
            .contains("--allow-any-model"),
        "{error}"
    );
    assert!(chat.requests().is_empty());
    drop(server);

    let server = Server::start(&work, &[]);
    let job = server.done(&server.job(&request(settings(&work, &captioner))));
    assert_eq!(job["results"][0]["caption"], "a red house on grass");
    let requests = chat.requests();
    assert_eq!(requests.len(), 1);
    assert!(!requests[0].headers.contains_key("authorization"));
}

#[test]
fn a_request_that_cannot_be_done_names_its_field() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let good = learning(&work, 1);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };
    let cases: [(&str, Value); 15] = [
        ("kind", with(&|request| request["kind"] = json!("paint"))),
        ("colour", with(&|request| request["colour"] = json!(1))),
        ("pairs", with(&|request| request["pairs"] = json!([]))),
        (
            "pairs[0].a",
            with(&|request| request["pairs"][0]["a"] = json!("data:image/png;base64,AAAA")),
        ),
        (
            "pairs[0].a",
            with(&|request| request["pairs"][0]["a"] = json!("data:image/png;base64,?")),
        ),
        (
            "pairs[0].a",
            with(&|request| request["pairs"][0]["a"] = json!("/etc/passwd")),
        ),
        (
            "pairs[0].a_prime",
            with(&|request| request["pairs"][0]["a_prime"] = json!("/v1/jobs/../files/log")),
        ),
        (
            "targets",
            with(&|request| request["targets"] = json!([{ "picture": data(&work, "b.png") }])),
        ),
        ("name", with(&|request| request["name"] = json!("../x"))),
        ("prompt", with(&|request| request["prompt"] = json!("x"))),
        (
            "settings.stepz",
            with(&|request| request["settings"]["stepz"] = json!(1)),
        ),
        (
            "settings.steps",
            with(&|request| request["settings"]["steps"] = json!("many")),
        ),
        (
            "settings.num_tokens",
            with(&|request| request["settings"]["num_tokens"] = json!(0)),
        ),
        (
            "settings.output",
            with(&|request| request["settings"]["output"] = json!("/tmp/x")),
        ),
        (
            "settings.config",
            with(&|request| request["settings"]["config"] = json!("/etc/passwd")),
        ),
    ];
    for (field, request) in cases {
        let error = server.post("/v1/jobs", &request).expect(422).json();
        assert_eq!(error["error"]["field"], field, "{error}");
        assert!(
            error["error"]["message"].as_str().unwrap().len() > 5,
            "{error}"
        );
    }
    let missing = json!({ "kind": "apply", "difference": "none", "targets": [{ "picture": data(&work, "b.png") }] });
    let error = server.post("/v1/jobs", &missing).expect(422).json();
    assert_eq!(error["error"]["field"], "difference");
    let text = server
        .post("/v1/read-png", &json!({ "picture": data(&work, "a.png") }))
        .expect(422)
        .json();
    assert_eq!(text["error"]["field"], "picture");
    let left = super::entries(&work.path().join("data/jobs"));
    assert_eq!(left, [""; 0], "a refused request leaves something");
}

/// A form of OpenAI's clients, with these texts and one picture.
fn form(texts: &[(&str, &str)], picture: &[u8]) -> Vec<u8> {
    let mut form = Vec::new();
    for (name, text) in texts {
        form.extend(
            format!("--edge\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{text}\r\n")
                .bytes(),
        );
    }
    let head = "--edge\r\ncontent-disposition: form-data; name=\"image\"; filename=\"b.png\"\r\ncontent-type: image/png\r\n\r\n";
    form.extend(head.bytes());
    form.extend(picture);
    form.extend(b"\r\n--edge--\r\n");
    form
}

#[test]
fn clients_of_other_programs_apply_a_difference() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let mut request = learning(&work, 2);
    request["name"] = json!("night");
    server.done(&server.job(&request));
    let picture = fs::read(work.path().join("b.png")).unwrap();
    let applied = |settings: &Value| {
        let job = server.job(&json!({
            "kind": "apply", "difference": "night", "settings": settings,
            "targets": [{ "picture": data(&work, "b.png"), "caption": "dusk" }],
        }));
        let url = server.done(&job)["results"][0]["url"].clone();
        image::load_from_memory(&server.get(url.as_str().unwrap()).expect(200).body).unwrap()
    };
    let decoded = |text: &Value| {
        image::load_from_memory(&STANDARD.decode(text.as_str().unwrap()).unwrap()).unwrap()
    };

    let img2img = |more: &Value| {
        let mut asked = json!({
            "init_images": [STANDARD.encode(&picture)], "prompt": "dusk <dinv:night:0.5>", "steps": 2, "seed": 3,
            "batch_size": 1, "denoising_strength": 0.75, "alwayson_scripts": {}, "script_name": null,
        });
        let more = more.as_object().unwrap().clone();
        asked.as_object_mut().unwrap().extend(more);
        server.post("/sdapi/v1/img2img", &asked)
    };
    let made = img2img(&json!({})).expect(200).json();
    let more = json!({ "strength": 0.5, "num_inference_steps": 2, "seed": 3 });
    assert!(decoded(&made["images"][0]) == applied(&settings(&work, &more)));
    let info: Value = serde_json::from_str(made["info"].as_str().unwrap()).unwrap();
    assert_eq!(info["seed"], 3);
    let not_read = json!([
        "alwayson_scripts",
        "batch_size",
        "denoising_strength",
        "script_name"
    ]);
    assert_eq!(info["not_read"], not_read);
    for (field, more) in [
        ("prompt", json!({ "prompt": "dusk" })),
        ("prompt", json!({ "prompt": "<dinv:night> <lora:x:1>" })),
        ("difference", json!({ "prompt": "<dinv:none>" })),
        ("mask", json!({ "mask": "AAAA" })),
        ("n_iter", json!({ "n_iter": 2 })),
        ("init_images", json!({ "init_images": [] })),
        ("seed", json!({ "seed": "5" })),
        ("prompt", json!({ "prompt": 5 })),
        (
            "prompt",
            json!({ "prompt": format!("<dinv:night> {}", "x".repeat(10_001)) }),
        ),
        ("prompt", json!({ "prompt": "<dinv:night:nan>" })),
        ("targets", json!({ "prompt": "a\0b <dinv:night>" })),
        ("targets[0].picture", json!({ "init_images": ["AAAA"] })),
        ("settings.num_inference_steps", json!({ "steps": 0 })),
    ] {
        let error = img2img(&more).expect(422).json();
        assert_eq!(error["error"]["field"], field, "{error}");
    }

    let edit = |texts: &[(&str, &str)], kind: &str| {
        let headers = [("content-type", kind)];
        server.ask("POST", "/v1/images/edits", &headers, &form(texts, &picture))
    };
    let multipart = "multipart/form-data; boundary=edge";
    let wanted = [("model", "night:0.5"), ("prompt", "dusk"), ("n", "1")];
    let made = edit(&wanted, multipart).expect(200).json();
    let expected = applied(&settings(&work, &json!({ "strength": 0.5 })));
    assert!(decoded(&made["data"][0]["b64_json"]) == expected);
    let by_address = [wanted[0], wanted[1], ("response_format", "url")];
    let made = edit(&by_address, multipart).expect(200).json();
    let url = made["data"][0]["url"].as_str().unwrap();
    let path = url
        .strip_prefix(&format!("http://127.0.0.1:{}", server.port))
        .unwrap();
    let found = server.get(path).expect(200).body;
    assert!(image::load_from_memory(&found).unwrap() == expected);
    let refused = edit(&wanted, "application/json").expect(400);
    assert!(
        refused.head.contains("x-should-retry: false"),
        "{}",
        refused.head
    );
    for (field, texts) in [
        ("model", [("model", ""), ("prompt", "dusk")]),
        ("model", [("model", "night:much"), ("prompt", "dusk")]),
        ("difference", [("model", "none"), ("prompt", "dusk")]),
        ("size", [("model", "night"), ("size", "1024x1024")]),
        ("n", [("model", "night"), ("n", "2")]),
        ("mask", [("model", "night"), ("mask", "x")]),
    ] {
        let error = edit(&texts, multipart).expect(422).json();
        assert_eq!(error["error"]["field"], field, "{error}");
    }
}

/// The job of a client that no longer waits is cancelled.
#[test]
fn a_client_that_leaves_takes_its_job_along() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let mut request = learning(&work, 1);
    request["name"] = json!("night");
    server.done(&server.job(&request));
    let asked = json!({
        "init_images": [STANDARD.encode(fs::read(work.path().join("b.png")).unwrap())],
        "prompt": "dusk <dinv:night>", "steps": 1000,
    });
    let body = asked.to_string();
    let client = server.send("POST", "/sdapi/v1/img2img", &[], body.as_bytes());
    let newest = || server.get("/v1/jobs").json()["jobs"][0].clone();
    let started = Instant::now();
    while newest()["kind"] != "apply" {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(client);
    while newest()["state"] != "cancelled" {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "{:#}",
            newest()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let known = newest()["id"].clone();
    let _client = server.send("POST", "/sdapi/v1/img2img", &[], body.as_bytes());
    while newest()["id"] == known || newest()["state"] != "running" {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(20));
    }
    let id = newest()["id"].as_str().unwrap().to_owned();
    drop(server); // killed
    let server = Server::start(&work, &[]);
    let job = server.get(&format!("/v1/jobs/{id}")).expect(200).json();
    assert_eq!(job["state"], "cancelled");
}

/// A failed job states the reason, in the program's own words.
#[test]
fn a_job_that_fails_says_why() {
    let work = workplace();
    let server = Server::start(&work, &[]);
    let mut request = learning(&work, 1);
    request["settings"]["model"] = json!(work.path().join("nothing"));
    let address = server.job(&request);
    let job = server.wait(&address, |job| job["state"] == "failed");
    let message = job["error"]["message"].as_str().unwrap();
    assert!(message.contains("no such file, folder or model"), "{job:#}");
    assert!(job["error"]["hint"].is_string(), "{job:#}");
}

#[test]
fn strangers_and_too_much_are_refused() {
    let work = workplace();
    let server = Server::start(&work, &["--max-upload", "1"]);
    let own = format!("127.0.0.1:{}", server.port);
    let ask = |method, headers: &[(&str, &str)]| server.ask(method, "/v1/jobs", headers, b"{}");
    ask("GET", &[("host", "rebound.example")]).expect(403);
    ask("GET", &[("host", &own)]).expect(200);
    ask("POST", &[("origin", "http://evil.example")]).expect(403);
    ask("POST", &[("origin", "null")]).expect(403);
    ask("POST", &[("origin", &format!("http://{own}"))]).expect(422);
    let answer = ask("GET", &[("origin", "http://evil.example")]).expect(200);
    assert!(!answer.head.contains("access-control"), "{}", answer.head);
    assert!(
        answer.head.contains("cache-control: no-store"),
        "{}",
        answer.head
    );
    assert!(
        answer.head.contains("x-content-type-options: nosniff"),
        "{}",
        answer.head
    );
    ask("PUT", &[]).expect(405);
    let large = vec![b' '; 1_000_001];
    server.ask("POST", "/v1/jobs", &[], &large).expect(413);

    let address = server.job(&learning(&work, 1));
    server.done(&address);
    for name in [
        "..%2Fjob.json",
        "%2e%2e%2fjob.json",
        "../job.json",
        "..%5cjob.json",
        ".hidden",
        "%2Fetc%2Fpasswd",
        "job.json",
    ] {
        let answer = server.get(&format!("{address}/files/{name}"));
        assert_eq!(answer.status, 404, "{name}");
    }
    server.get("/v1/jobs/..%2F..%2Fdata/files/log").expect(404);
    server.get("/v1/differences/..%2F..%2Fmodel").expect(404);
}

#[test]
fn other_machines_need_the_token() {
    let work = workplace();
    let refused = run(work.path(), "serve --listen 0.0.0.0 --dir data --port 0");
    assert_eq!(refused.code, Some(64));
    assert!(
        refused.stderr.contains("`--token` is missing"),
        "{}",
        refused.stderr
    );
    assert!(!Path::new(&work.path().join("data")).exists());
    let server = Server::start(&work, &["--listen", "0.0.0.0", "--token", "secret-of-ours"]);
    let get = |path: &str, headers: &[(&str, &str)]| server.ask("GET", path, headers, b"");
    get("/", &[]).expect(401);
    get("/v1/jobs", &[("authorization", "Bearer secret-of-other")]).expect(401);
    get("/v1/jobs", &[("authorization", "Bearer secret-of-ours")]).expect(200);
    get("/?token=secret", &[]).expect(401);
    let entered = get("/?token=secret-of-ours", &[]).expect(303);
    let cookie = entered
        .head
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: "))
        .unwrap();
    assert!(cookie.contains("httponly; samesite=lax"), "{cookie}");
    get("/v1/jobs", &[("cookie", cookie.split(';').next().unwrap())]).expect(200);
    drop(server);
    let log = fs::read_to_string(work.path().join("log")).unwrap();
    assert!(
        log.contains("plain HTTP")
            && log.contains("open http://HOST:")
            && log.contains("GET /v1/jobs 401"),
        "{log}"
    );
    assert!(!log.contains("secret-of-ours"), "{log}");
    // The link takes the token as it is, and percent-encoded.
    let server = Server::start(&work, &["--token", "abc+def/gh=="]);
    for given in ["abc+def/gh==", "abc%2Bdef%2Fgh%3D%3D"] {
        server
            .ask("GET", &format!("/?token={given}"), &[], b"")
            .expect(303);
    }
}

/// Runs the guide's example requests as they are pasted.
#[test]
fn the_commands_of_the_guide_can_be_pasted() {
    let Ok(curl) = std::process::Command::new("curl").arg("--version").output() else {
        return; // the lines are for people who have it
    };
    assert!(curl.status.success());
    let work = workplace();
    let demo = work.path().join("demo");
    super::copy_folder(&super::golden("pipeline"), &demo.join("model"));
    let settings = r#"{"steps": 2, "num_tokens": 2, "select_every": 0, "num_inference_steps": 2}"#;
    fs::write(demo.join("model/dinv.json"), settings).unwrap();
    fs::create_dir_all(demo.join("images")).unwrap();
    for name in ["a.png", "a_prime.png", "b.png"] {
        fs::copy(work.path().join(name), demo.join("images").join(name)).unwrap();
    }
    let server = Server::start(&work, &[]);
    let guide = fs::read_to_string(super::repository().join("docs/guide/server.md")).unwrap();
    let guide = guide.replace("\\\n", " ");
    let code = guide.lines().filter_map(|line| line.strip_prefix("    "));
    let (mut prelude, mut pasted) = (String::new(), 0);
    for line in code.filter(|line| !line.contains("dinv serve")) {
        if line.starts_with("url()") {
            prelude = format!("{line}\n");
            continue;
        }
        let jobs = server.get("/v1/jobs").json();
        let newest = jobs["jobs"][0]["id"].as_str().unwrap_or("none");
        let line = line
            .replace("7865", &server.port.to_string())
            .replace("/ID/", &format!("/{newest}/"));
        let done = std::process::Command::new("sh")
            .args(["-c", &format!("{prelude}{line}")])
            .current_dir(work.path())
            .output()
            .unwrap();
        let done: Done = done.into();
        assert_eq!(done.code, Some(0), "{line}\n{}", done.stderr);
        pasted += 1;
    }
    assert_eq!(pasted, 11);
    for name in ["img2img-answer.json", "edits-answer.json"] {
        let answer: Value =
            serde_json::from_slice(&fs::read(work.path().join(name)).unwrap()).unwrap();
        assert!(answer["images"][0].is_string() || answer["data"][0]["b64_json"].is_string());
    }
    let zip = fs::read(work.path().join("sunset.zip")).unwrap();
    assert_eq!(
        zip.windows(4).filter(|four| four == b"PK\x03\x04").count(),
        3
    );
}
