//! Captions by a server: what it is asked, how it is named, and what happens when it gives none.

use std::fs;
use std::net::TcpListener;
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::chat_server::{ChatServer, Reply, fails, says};
use super::{Done, dinv, refused, run, succeed, workplace};

const PICTURES: &str = "--a a.png --a-prime a_prime.png";

/// The program's arguments with the server's address in place of `SERVER`.
fn command(work: &TempDir, server: &ChatServer, arguments: &str) -> Command {
    let arguments = arguments.replace("SERVER", &server.address());
    let mut command = dinv(work.path());
    command.args(arguments.split_whitespace());
    command
}

fn done(mut command: Command) -> Done {
    command.output().unwrap().into()
}

/// Captions a picture, and expects this exit code and all of these texts.
fn gives(work: &TempDir, server: &ChatServer, reply: Reply, code: i32, expected: &[&str]) {
    server.next(reply);
    let caption = "caption a.png --config tiny.toml --captioner SERVER#m";
    let done = done(command(work, server, caption));
    assert_eq!(done.code, Some(code), "{}", done.stderr);
    for text in expected {
        assert!(done.stderr.contains(text), "no `{text}` in {}", done.stderr);
    }
}

#[test]
fn a_picture_is_sent_as_the_interface_documents_it() {
    let (work, server) = (workplace(), ChatServer::start(&["tiny-vl"]));
    server.next(says("\"The image shows a red  house\non grass.\"\n"));
    let caption = "caption a.png --config tiny.toml --captioner SERVER/v1#tiny-vl";
    let made = done(command(&work, &server, caption));
    assert_eq!(
        (made.code, made.stdout.as_str()),
        (Some(0), "a red house on grass\n")
    );
    assert!(
        !made.stderr.contains("pictures are sent"),
        "{}",
        made.stderr
    );
    let requests = server.requests();
    let [request] = requests.as_slice() else {
        panic!("{requests:?}")
    };
    assert_eq!(request.line, "POST /v1/chat/completions");
    assert_eq!(request.headers["content-type"], "application/json");
    assert!(!request.headers.contains_key("authorization"));
    let mut body = request.body.clone();
    let messages = body["messages"].take();
    let expected = json!({
        "model": "tiny-vl", "messages": null, "temperature": 0, "seed": 0, "max_tokens": 400, "stream": false,
    });
    assert_eq!(body, expected);
    assert_eq!(messages.as_array().unwrap().len(), 1);
    assert_eq!(messages[0]["role"], "user");
    let content = request.content();
    assert_eq!((content.len(), &content[0]["type"]), (2, &json!("text")));
    assert_eq!(content[1]["type"], "image_url");
    let url = content[1]["image_url"]["url"].as_str().unwrap();
    let png = STANDARD
        .decode(url.strip_prefix("data:image/png;base64,").unwrap())
        .unwrap();
    let sent = image::load_from_memory(&png).unwrap();
    // The part that is drawn, at the size of the model.
    succeed(work.path(), "generate --config tiny.toml --prompt red");
    let drawn = image::open(work.path().join("generated.png")).unwrap();
    assert_eq!(
        (sent.width(), sent.height()),
        (drawn.width(), drawn.height())
    );
}

#[test]
fn the_only_model_is_taken_and_one_of_several_is_named() {
    let (work, server) = (workplace(), ChatServer::start(&["only"]));
    let caption = "caption a.png --config tiny.toml --captioner SERVER";
    let made = done(command(&work, &server, caption));
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let requests = server.requests();
    assert_eq!(requests[0].line, "GET /v1/models");
    assert_eq!(requests[1].body["model"], "only");
    assert_eq!(requests.len(), 2);

    let several = ChatServer::start(&["one:7b", "two"]);
    let made = done(command(&work, &several, caption));
    assert_eq!(made.code, Some(65));
    let address = several.address();
    for text in [
        "the server has several models: one:7b, two".to_owned(),
        format!("hint: name one: --captioner '{address}/v1#one:7b'"),
    ] {
        assert!(made.stderr.contains(&text), "{}", made.stderr);
    }
    let none = done(command(&work, &ChatServer::start(&[]), caption));
    assert!(
        none.stderr.contains("the server lists no model"),
        "{}",
        none.stderr
    );
    let elsewhere = "caption a.png --config tiny.toml --captioner SERVER/other";
    let made = done(command(&work, &server, elsewhere));
    assert!(
        made.stderr
            .contains("/other: the address has no interface like OpenAI's (HTTP 404): Not Found"),
        "{}",
        made.stderr
    );
}

#[test]
fn a_pair_is_described_in_one_request_and_recorded() {
    let (work, server) = (workplace(), ChatServer::start(&["vl"]));
    server.next(says("a barn"));
    server.next(says(
        "```json\n{\"before\": \"A barn by day.\", \"after\": \"A barn by night.\"}\n```",
    ));
    let analogy = format!(
        "analogy --config tiny.toml {PICTURES} --b b.png -o out --captioner SERVER#dir/sub/vl"
    );
    let made = done(command(&work, &server, &analogy));
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let requests = server.requests();
    let pictures: Vec<usize> = requests.iter().map(|request| request.pictures()).collect();
    assert_eq!(pictures, [1, 2]);
    let format = &requests[1].body["response_format"];
    assert_eq!(format["type"], "json_schema");
    assert_eq!(
        format["json_schema"]["schema"]["required"],
        json!(["before", "after"])
    );
    let read = |name: &str| fs::read_to_string(work.path().join(name)).unwrap();
    let record: Value = serde_json::from_str(&read("out/run.json")).unwrap();
    assert_eq!(
        record["captioner"],
        format!("{}/v1#dir/sub/vl", server.address())
    );
    assert_eq!(record["b"]["caption"], "a barn");
    assert_eq!(record["pairs"][0]["a"]["caption"], "A barn by day");
    assert_eq!(record["pairs"][0]["a_prime"]["caption"], "A barn by night");
    let png =
        difference_inversion::image::read_png_text(work.path().join("out/b_prime.png").as_path());
    let (_, recipe) = png
        .unwrap()
        .into_iter()
        .find(|(key, _)| key == "dinv")
        .unwrap();
    let recipe: Value = serde_json::from_str(&recipe).unwrap();
    // Of a model that is named by its path, two names travel.
    assert_eq!(
        recipe["captioner"],
        format!("{}/v1#sub/vl", server.address())
    );

    // With a caption of A, only A′ is described.
    let learn = format!(
        "learn --config tiny.toml {PICTURES} --caption-a day -o d.safetensors --captioner SERVER#vl"
    );
    assert_eq!(done(command(&work, &server, &learn)).code, Some(0));
    let pictures: Vec<usize> = server
        .requests()
        .iter()
        .map(|request| request.pictures())
        .collect();
    assert_eq!(pictures, [1]);
    server.next(says("The first shows day, the second night"));
    let learn =
        format!("learn --config tiny.toml {PICTURES} -o e.safetensors --captioner SERVER#vl");
    let failed = done(command(&work, &server, &learn));
    assert_eq!(failed.code, Some(1));
    let expected = "expected a JSON object with `before` and `after`, but the answer begins with `The first shows";
    assert!(failed.stderr.contains(expected), "{}", failed.stderr);
    assert!(!work.path().join("e.safetensors").exists());
}

#[test]
fn a_server_that_gives_no_caption_is_explained() {
    let (work, server) = (workplace(), ChatServer::start(&["m"]));
    let page = "<!DOCTYPE html><html>a proxy's page</html>";
    let cut = json!({ "choices": [{ "message": { "content": "and so on" }, "finish_reason": "length" }] });
    let ok = |body: &str| Reply(200, String::new(), body.to_owned());
    let cases: [(Reply, &[&str]); 12] = [
        (
            fails(404, "model not found"),
            &[
                "there is no model `m`, or the address has no chat interface (HTTP 404): model not found",
                "hint: name a model that the server has",
            ],
        ),
        (
            fails(400, "m is not a multimodal model"),
            &[
                "the model cannot use the pictures (HTTP 400): m is not a multimodal model",
                "hint: take a vision model",
            ],
        ),
        (
            fails(
                500,
                "image input is not supported - hint: you may need to provide the mmproj",
            ),
            &[
                "the model cannot use the pictures (HTTP 500): image input is not supported",
                "--mmproj",
            ],
        ),
        (
            fails(401, "who are you"),
            &[
                "the server refuses access (HTTP 401)",
                "hint: set DINV_CAPTIONER_KEY to the server's key",
            ],
        ),
        (
            fails(418, "short and stout"),
            &["the server answered HTTP 418: short and stout"],
        ),
        (
            says(" \n"),
            &[
                "the model's caption is empty",
                "hint: take a model that follows",
            ],
        ),
        (
            ok(page),
            &[
                "the answer begins with `<!DOCTYPE html><html>a proxy",
                "ends in /v1 as a rule",
            ],
        ),
        (
            ok("{\"choices\": []}"),
            &["expected an answer of the chat interface"],
        ),
        (
            says(&"word ".repeat(300)),
            &["the model wrote 300 words, and a caption has at most 60"],
        ),
        (
            ok(&cut.to_string()),
            &["did not end its caption within 400 tokens: `and so on`"],
        ),
        (
            ok(&"x".repeat(2 << 20)),
            &["the answer has more than 1048576 bytes"],
        ),
        (
            Reply(
                500,
                String::new(),
                "{\"error\": \"no image input here\"}".to_owned(),
            ),
            &["the model cannot use the pictures (HTTP 500): no image input here"],
        ),
    ];
    for (reply, expected) in cases {
        // What the server refuses for good is the address's fault; the rest is the model's.
        let code = if expected[0].contains("(HTTP ") {
            65
        } else {
            1
        };
        gives(&work, &server, reply, code, expected);
        assert_eq!(server.requests().len(), 1);
    }
}

#[test]
fn a_server_that_is_busy_is_asked_again() {
    let (work, server) = (workplace(), ChatServer::start(&["m"]));
    gives(&work, &server, fails(429, "slow down"), 0, &[]);
    assert_eq!(server.requests().len(), 2);
    for _ in 0..3 {
        server.next(fails(503, "Loading model"));
    }
    let expected = [
        "the server failed 4 times (HTTP 503): Loading model",
        "hint: wait",
    ];
    gives(&work, &server, fails(503, "Loading model"), 75, &expected);
    assert_eq!(server.requests().len(), 4);
    let late = Reply(503, "retry-after: 3600\r\n".to_owned(), String::new());
    gives(&work, &server, late, 75, &["the server failed (HTTP 503)"]);
}

#[test]
fn a_server_that_is_not_there_is_a_temporary_failure() {
    let work = workplace();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    for model in ["", "#m"] {
        let caption =
            format!("caption a.png --config tiny.toml --captioner http://127.0.0.1:{port}{model}");
        let at = format!("captioner http://127.0.0.1:{port}/v1: no connection: ");
        refused(
            work.path(),
            &caption,
            75,
            &[&at, "hint: start the server, or check the address"],
        );
    }
}

#[test]
fn pictures_go_to_the_given_address_alone() {
    let (work, server) = (workplace(), ChatServer::start(&["m"]));
    let other = ChatServer::start(&["m"]);
    let to = format!("location: {}/v1/chat/completions\r\n", other.address());
    let expected = format!("the server redirects to {}", other.address());
    gives(
        &work,
        &server,
        Reply(307, to, String::new()),
        1,
        &[&expected],
    );
    let mut caption = command(
        &work,
        &server,
        "caption a.png --config tiny.toml --captioner SERVER#m",
    );
    caption
        .env("HTTP_PROXY", other.address())
        .env("http_proxy", other.address());
    caption.env("ALL_PROXY", other.address());
    assert_eq!(done(caption).code, Some(0));
    assert!(other.requests().is_empty());
}

#[cfg(target_os = "linux")]
#[test]
fn another_machine_is_named_before_pictures_are_sent_to_it() {
    let (work, server) = (workplace(), ChatServer::start(&["m"]));
    // Not known to be this machine, and reached all the same.
    let port = server.port();
    let made = run(
        work.path(),
        &format!("caption a.png --config tiny.toml --captioner http://0.0.0.0:{port}#m"),
    );
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let note =
        format!("note: pictures are sent to 0.0.0.0:{port}, unencrypted, for their captions");
    assert!(made.stderr.contains(&note), "{}", made.stderr);
}

#[test]
fn a_key_is_sent_and_never_written() {
    let (work, server) = (workplace(), ChatServer::start(&["m"]));
    let with_key = |arguments: &str, key: &str| {
        let mut command = command(&work, &server, arguments);
        done({
            command.env("DINV_CAPTIONER_KEY", key);
            command
        })
    };
    let learn = format!("learn --config tiny.toml {PICTURES} -o d.safetensors --captioner SERVER");
    let made = with_key(&learn, "sk-very-secret");
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let requests = server.requests();
    assert_eq!(requests.len(), 2);
    for request in requests {
        assert_eq!(request.headers["authorization"], "Bearer sk-very-secret");
    }
    assert!(!made.stderr.contains("very-secret"));
    for file in fs::read_dir(work.path()).unwrap().flatten() {
        let bytes = fs::read(file.path()).unwrap_or_default();
        let found = bytes.windows(11).any(|part| part == b"very-secret");
        assert!(!found, "{}", file.path().display());
    }
    let caption = "caption a.png --config tiny.toml --captioner SERVER#m";
    server.next(fails(401, "Incorrect key sk-very-secret"));
    let denied = with_key(caption, "sk-very-secret");
    assert!(
        denied
            .stderr
            .contains("does not accept the key in DINV_CAPTIONER_KEY"),
        "{}",
        denied.stderr
    );
    server.next(fails(400, "Incorrect key sk-very-secret"));
    let echoed = with_key(caption, "sk-very-secret");
    assert!(
        echoed.stderr.contains("(HTTP 400): Incorrect key …"),
        "{}",
        echoed.stderr
    );
    let wrong = with_key(caption, "two words");
    assert!(
        wrong
            .stderr
            .contains("the key has characters that cannot be sent"),
        "{}",
        wrong.stderr
    );
    assert!(!(denied.stderr + &echoed.stderr + &wrong.stderr).contains("very-secret"));
}

#[test]
fn an_address_that_is_none_is_refused() {
    let work = workplace();
    for (address, expected) in [
        (
            "http://me:secret@localhost:1",
            [
                "expected an address without user and password",
                "DINV_CAPTIONER_KEY",
            ],
        ),
        ("ftp://localhost", ["expected http or https", "found `ftp`"]),
        (
            "localhost:8080",
            [
                "`localhost:8080` is neither a folder nor an address",
                "hint: write http://localhost:8080",
            ],
        ),
        (
            "https://huggingface.co/a/b/tree/main",
            ["names no model", "hint: give OWNER/NAME"],
        ),
        (
            "http://localhost:1/v1?x=1",
            ["expected an address without a query", "found one with `?`"],
        ),
    ] {
        let done = run(
            work.path(),
            &format!("caption a.png --config tiny.toml --captioner {address}"),
        );
        // What is no address at all is wrong usage.
        let is_usage = |text: &str| {
            ["neither", "names no model"]
                .iter()
                .any(|one| text.contains(one))
        };
        let code = if is_usage(expected[0]) { 64 } else { 65 };
        assert_eq!(done.code, Some(code), "{}", done.stderr);
        for text in expected {
            assert!(done.stderr.contains(text), "no `{text}` in {}", done.stderr);
        }
        assert!(!done.stderr.contains("secret"), "{}", done.stderr);
    }
    // The address of a model's page is a name of the Hub, as before.
    let page = "caption a.png --config tiny.toml --captioner https://huggingface.co/owner/name";
    refused(work.path(), page, 65, &["owner/name: not in the cache"]);
}

#[test]
fn a_settings_file_and_doctor_know_a_server() {
    let (work, server) = (workplace(), ChatServer::start(&["m"]));
    let settings = fs::read_to_string(work.path().join("tiny.toml")).unwrap();
    let settings = format!("{settings}captioner = '{}#m'\n", server.address());
    fs::write(work.path().join("served.toml"), settings).unwrap();
    let made = succeed(work.path(), "caption a.png --config served.toml");
    assert_eq!(made.stdout, "a red house on grass\n");
    let doctor = format!("doctor --model model --captioner {}", server.address());
    let found = succeed(work.path(), &doctor).stdout;
    let line = found
        .lines()
        .find(|line| line.contains("captioner"))
        .unwrap();
    assert!(
        line.contains("answers") && line.ends_with("/v1#m"),
        "{found}"
    );
    assert!(found.contains("everything is in place"), "{found}");
    for _ in 0..2 {
        server.next(fails(401, ""));
    }
    let found = succeed(work.path(), &doctor).stdout;
    assert!(
        found.contains("the server refuses access (HTTP 401); set DINV_CAPTIONER_KEY"),
        "{found}"
    );
}

#[test]
fn a_batch_tells_captions_of_one_model_from_those_of_another() {
    let (work, server) = (workplace(), ChatServer::start(&["m"]));
    let job = json!({ "a": "a.png", "a_prime": "a_prime.png", "b": "b.png" });
    fs::write(work.path().join("jobs.jsonl"), job.to_string()).unwrap();
    let batch = |captioner: &str, more: &str| {
        let arguments = format!(
            "batch jobs.jsonl --config tiny.toml -o made --json {more} --captioner {captioner}"
        );
        let done = done(command(&work, &server, &arguments));
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        serde_json::from_str::<Value>(&done.stdout).unwrap()
    };
    assert_eq!(batch("SERVER", "")["results"].as_array().unwrap().len(), 1);
    let pictures = server.requests().len();
    assert_eq!(pictures, 3, "the list of models, the pair, and B");
    // The model that was asked for is the one that is named.
    let again = batch("SERVER#m", "");
    assert_eq!(
        (again["results"].as_array().unwrap().len(), &again["done"]),
        (0, &json!(1))
    );
    assert!(server.requests().is_empty());
    assert_eq!(
        batch("SERVER#other", "")["results"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}
