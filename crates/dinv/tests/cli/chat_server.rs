//! A small server on loopback with OpenAI's chat interface: it keeps the requests, and answers as it is told.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde_json::{Value, json};

/// A received request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Method and path.
    pub(crate) line: String,
    /// The headers, by lower-case name.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Value,
}

impl Request {
    /// The parts of the message.
    pub(crate) fn content(&self) -> &[Value] {
        self.body["messages"][0]["content"].as_array().unwrap()
    }

    /// The number of pictures in the message.
    pub(crate) fn pictures(&self) -> usize {
        let parts = self.content().iter();
        parts.filter(|part| part["type"] == "image_url").count()
    }
}

/// An answer: its status, headers, and body.
#[derive(Debug, Clone)]
pub(crate) struct Reply(pub(crate) u16, pub(crate) String, pub(crate) String);

/// A chat's answer with these words.
pub(crate) fn says(words: &str) -> Reply {
    let choice =
        json!({ "message": { "role": "assistant", "content": words }, "finish_reason": "stop" });
    Reply(
        200,
        String::new(),
        json!({ "choices": [choice] }).to_string(),
    )
}

/// An error in OpenAI's form.
pub(crate) fn fails(status: u16, message: &str) -> Reply {
    let error = json!({ "error": { "message": message, "type": "an_error", "code": status } });
    Reply(status, "retry-after: 0\r\n".to_owned(), error.to_string())
}

#[derive(Debug, Default)]
struct State {
    models: Vec<String>,
    replies: VecDeque<Reply>,
    requests: Vec<Request>,
}

/// The server, which ends with the test process.
#[derive(Debug, Clone)]
pub(crate) struct ChatServer {
    at: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl ChatServer {
    /// A server with these models, which writes captions unless it is told to answer otherwise.
    pub(crate) fn start(models: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            at: listener.local_addr().unwrap(),
            state: Arc::default(),
        };
        server.state().models = models.iter().map(ToString::to_string).collect();
        let listening = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = listening.clone();
                thread::spawn(move || server.serve(stream));
            }
        });
        server
    }

    pub(crate) fn address(&self) -> String {
        format!("http://{}", self.at)
    }

    pub(crate) fn port(&self) -> u16 {
        self.at.port()
    }

    /// Makes the next request get this answer.
    pub(crate) fn next(&self, reply: Reply) {
        self.state().replies.push_back(reply);
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let request = read(&stream)?;
        let Reply(status, headers, body) = {
            let mut state = self.state();
            state.requests.push(request.clone());
            let reply = state.replies.pop_front();
            reply.unwrap_or_else(|| state.usual(&request))
        };
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        stream.write_all((head + &body).as_bytes()).ok()
    }
}

impl State {
    fn usual(&self, request: &Request) -> Reply {
        if request.line == "GET /v1/models" {
            let models = self
                .models
                .iter()
                .map(|model| json!({ "id": model, "object": "model" }));
            let list = json!({ "object": "list", "data": models.collect::<Vec<_>>() });
            return Reply(200, String::new(), list.to_string());
        }
        if request.line != "POST /v1/chat/completions" {
            return Reply(
                404,
                String::new(),
                json!({ "detail": "Not Found" }).to_string(),
            );
        }
        match request.pictures() {
            1 => says("a red house on grass"),
            _ => says(r#"{"before": "a red house by day", "after": "a red house by night"}"#),
        }
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let (first, rest) = lines.split_first()?;
    let headers: BTreeMap<String, String> = rest
        .iter()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        })
        .collect();
    let length = headers.get("content-length");
    let length = length.and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request {
        line: first.rsplit_once(' ')?.0.to_owned(),
        headers,
        body: serde_json::from_slice(&body).unwrap_or_default(),
    })
}
