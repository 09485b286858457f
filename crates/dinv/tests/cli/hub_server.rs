//! A small server on loopback that speaks the Hub's protocol: the listing of a repository, its files
//! with their digests, and large files from another host. It counts requests and fails on demand.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A received request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) path: String,
    /// Whether it went to the host of large files.
    pub(crate) at_storage: bool,
    /// The headers, by lower-case name.
    pub(crate) headers: BTreeMap<String, String>,
}

/// A fault to inject.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// A different status, with headers.
    Status(u16, Vec<(&'static str, String)>),
    /// The connection ends after this many bytes of content.
    Break(usize),
    /// One byte of the content is changed.
    Corrupt,
    /// A pause after each chunk of this many bytes.
    Slow(usize),
    /// The answer ignores `Range`.
    NoRange,
}

/// A repository at its only commit.
#[derive(Debug, Clone)]
struct Repository {
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
    /// Sizes that the listing states in place of the real ones.
    sizes: BTreeMap<String, u64>,
}

#[derive(Debug, Default)]
struct State {
    repositories: BTreeMap<String, Repository>,
    requests: Vec<Request>,
    /// A part of the path of the requests that fail, the fault, and how often.
    faults: Vec<(String, Fault, usize)>,
}

/// The server, which ends with the test process.
#[derive(Debug, Clone)]
pub(crate) struct HubServer {
    hub: SocketAddr,
    storage: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    pub(crate) fn start() -> Self {
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let storage = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            hub: hub.local_addr().unwrap(),
            storage: storage.local_addr().unwrap(),
            state: Arc::default(),
        };
        for (listener, at_storage) in [(hub, false), (storage, true)] {
            let server = server.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let server = server.clone();
                    thread::spawn(move || server.serve(stream, at_storage));
                }
            });
        }
        server
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.hub)
    }

    /// Adds a repository with the files of a folder.
    pub(crate) fn add(&self, name: &str, folder: &Path) {
        let mut files = BTreeMap::new();
        read_folder(folder, "", &mut files);
        let commit = hex(name.as_bytes())[..40].to_owned();
        let repository = Repository {
            commit,
            files,
            sizes: BTreeMap::new(),
        };
        let mut state = self.state();
        state.repositories.insert(name.to_owned(), repository);
    }

    /// Adds a file to a repository, or replaces one.
    pub(crate) fn put(&self, name: &str, path: &str, contents: &[u8]) {
        let mut state = self.state();
        let repository = state.repositories.get_mut(name).unwrap();
        repository
            .files
            .insert(path.to_owned(), contents.to_owned());
    }

    /// Makes the listing state another size for a file.
    pub(crate) fn claim(&self, name: &str, path: &str, size: u64) {
        let mut state = self.state();
        let repository = state.repositories.get_mut(name).unwrap();
        repository.sizes.insert(path.to_owned(), size);
    }

    /// Makes the next `times` requests whose path contains `part` fail.
    pub(crate) fn fail(&self, part: &str, times: usize, fault: Fault) {
        self.state().faults.push((part.to_owned(), fault, times));
    }

    /// Removes all faults.
    pub(crate) fn recover(&self) {
        self.state().faults.clear();
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, stream: TcpStream, at_storage: bool) -> Option<()> {
        let request = read_request(&stream, at_storage)?;
        let fault = {
            let mut state = self.state();
            state.requests.push(request.clone());
            state.fault(&request.path)
        };
        let mut answer = Answer::new(stream, &request, fault.clone());
        if let Some(Fault::Status(status, headers)) = fault {
            return answer.send(status, &headers, b"");
        }
        let path = request.path.split('?').next()?;
        if at_storage {
            let contents = self.state().contents(path.strip_prefix("/storage/")?)?;
            return answer.send(200, &[], &contents);
        }
        if let Some(path) = path.strip_prefix("/api/models/") {
            let (name, revision) = path.split_once("/revision/")?;
            let found = self.state().repositories.get(name).cloned();
            return match found {
                None => answer.send(404, &[code("RepoNotFound")], b""),
                Some(_) if !["main", "refs%2Fpr%2F1"].contains(&revision) => {
                    answer.send(404, &[code("RevisionNotFound")], b"")
                }
                Some(found) => answer.send(200, &[], found.listing().to_string().as_bytes()),
            };
        }
        let (name, rest) = path.strip_prefix('/')?.split_once("/resolve/")?;
        let (commit, path) = rest.split_once('/')?;
        let found = self.state().repositories.get(name).cloned()?;
        let contents = found.files.get(path).filter(|_| commit == found.commit);
        let Some(contents) = contents else {
            return answer.send(404, &[code("EntryNotFound")], b"");
        };
        if is_large(path) {
            let digest = hex(contents);
            let headers = [
                ("x-linked-etag", format!("\"{digest}\"")),
                (
                    "location",
                    format!("http://{}/storage/{digest}", self.storage),
                ),
            ];
            return answer.send(302, &headers, b"");
        }
        let etag = format!("\"{}\"", &hex(contents)[..40]);
        answer.send(200, &[("etag", etag)], contents)
    }
}

impl State {
    fn fault(&mut self, path: &str) -> Option<Fault> {
        let matching = |(part, _, times): &&mut (String, Fault, usize)| {
            *times > 0 && path.contains(part.as_str())
        };
        let (_, fault, times) = self.faults.iter_mut().find(matching)?;
        *times -= 1;
        Some(fault.clone())
    }

    fn contents(&self, digest: &str) -> Option<Vec<u8>> {
        let all = self.repositories.values().flat_map(|it| it.files.values());
        all.into_iter()
            .find(|contents| hex(contents) == digest)
            .cloned()
    }
}

impl Repository {
    fn listing(&self) -> Value {
        let siblings = self.files.iter().map(|(path, contents)| {
            let digest = hex(contents);
            let size = self.sizes.get(path).copied();
            let size = size.unwrap_or(contents.len() as u64);
            let mut file = json!({
                "rfilename": path, "size": size, "blobId": digest[..40],
            });
            if is_large(path) {
                file["lfs"] = json!({ "sha256": digest, "size": size });
            }
            file
        });
        json!({ "sha": self.commit, "siblings": siblings.collect::<Vec<_>>() })
    }
}

fn code(text: &str) -> (&'static str, String) {
    ("x-error-code", text.to_owned())
}

fn is_large(path: &str) -> bool {
    path.ends_with(".safetensors")
}

/// SHA-256 in hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read_folder(folder: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_string_lossy());
        if path.is_dir() {
            read_folder(&path, &format!("{name}/"), files);
        } else {
            files.insert(name, std::fs::read(path).unwrap());
        }
    }
}

fn read_request(stream: &TcpStream, at_storage: bool) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let headers = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        })
        .collect();
    Some(Request {
        path: first.split(' ').nth(1)?.to_owned(),
        at_storage,
        headers,
    })
}

/// An answer being sent, with its fault.
struct Answer {
    stream: TcpStream,
    start: usize,
    fault: Option<Fault>,
}

impl Answer {
    fn new(stream: TcpStream, request: &Request, fault: Option<Fault>) -> Self {
        let range = request.headers.get("range");
        let start = range.and_then(|range| {
            let start = range.strip_prefix("bytes=")?.strip_suffix('-')?;
            start.parse().ok()
        });
        let heeds = !matches!(fault, Some(Fault::NoRange));
        Self {
            stream,
            start: start.filter(|_| heeds).unwrap_or(0),
            fault,
        }
    }

    fn send(
        &mut self,
        status: u16,
        headers: &[(&'static str, String)],
        contents: &[u8],
    ) -> Option<()> {
        let mut contents = contents.to_owned();
        let total = contents.len();
        let mut head = String::new();
        let mut status = status;
        if status == 200 && self.start > 0 {
            status = 206;
            contents.drain(..self.start);
            let last = total - 1;
            head = format!("content-range: bytes {}-{last}/{total}\r\n", self.start);
        }
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let length = contents.len();
        let start = format!("HTTP/1.1 {status} x\r\nconnection: close\r\n");
        let head = format!("{start}content-length: {length}\r\n{head}\r\n");
        self.stream.write_all(head.as_bytes()).ok()?;
        let mut piece = contents.len().max(1);
        match self.fault {
            Some(Fault::Break(after)) => contents.truncate(after),
            Some(Fault::Corrupt) if !contents.is_empty() => contents[length / 2] ^= 1,
            Some(Fault::Slow(bytes)) => piece = bytes,
            _ => {}
        }
        for part in contents.chunks(piece) {
            self.stream.write_all(part).ok()?;
            if let Some(Fault::Slow(_)) = self.fault {
                thread::sleep(Duration::from_millis(50));
            }
        }
        self.stream.flush().ok()
    }
}
