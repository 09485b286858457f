//! The Hub's protocol: listing a repository, and opening one of its files.

use std::io::{self, Read};
use std::time::Duration;

use serde::Deserialize;
use ureq::Agent;
use ureq::http::{HeaderMap, Response, Uri, header};

use crate::hub::{Hub, HubProblem, ModelId};

/// The timeout for a connection.
const CONNECT: Duration = Duration::from_secs(15);
/// The timeout for the other side's silence.
const SILENCE: Duration = Duration::from_secs(30);
/// The maximum number of redirects.
const MAX_REDIRECTS: usize = 8;
/// The maximum size of a listing.
const MAX_LISTING: u64 = 64 << 20;

type Result<T> = std::result::Result<T, HubProblem>;

/// One repository on the Hub.
pub(super) struct Client<'a> {
    hub: &'a Hub,
    id: &'a ModelId,
    agent: Agent,
}

/// A revision of a repository.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<RemoteFile>,
}

/// A file in a repository.
#[derive(Debug, Clone)]
pub(super) struct RemoteFile {
    pub(super) path: String,
    pub(super) size: Option<u64>,
    /// Its name in the cache.
    pub(super) blob: Option<String>,
}

/// A file whose download begins.
pub(super) struct Answer {
    /// The digest: SHA-256 for large files.
    pub(super) etag: Option<String>,
    /// The first byte of the response.
    pub(super) start: u64,
    /// Bytes of the whole file.
    pub(super) size: Option<u64>,
    pub(super) body: Box<dyn Read>,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub, id: &'a ModelId) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .accept_encoding("identity")
            .user_agent(concat!(
                env!("CARGO_PKG_NAME"),
                "/",
                env!("CARGO_PKG_VERSION")
            ))
            .build();
        Self {
            hub,
            id,
            agent: config.into(),
        }
    }

    /// The files of the revision, and its current commit.
    pub(super) fn listing(&self) -> Result<Listing> {
        let url = format!(
            "{}/api/models/{}/revision/{}?blobs=true",
            self.hub.endpoint,
            self.id.repository(),
            encode(self.id.revision(), false),
        );
        let mut text = Vec::new();
        let answer = self.get(&url, 0)?;
        let read = answer.body.take(MAX_LISTING).read_to_end(&mut text);
        read.map_err(|error| self.unreachable(&url, &error.to_string()))?;
        parse_listing(&text)
    }

    /// Opens a file of a commit, from byte `start` on if the Hub supports it.
    pub(super) fn open(&self, commit: &str, path: &str, start: u64) -> Result<Answer> {
        let url = format!(
            "{}/{}/resolve/{commit}/{}",
            self.hub.endpoint,
            self.id.repository(),
            encode(path, true),
        );
        self.get(&url, start)
    }

    /// Follows redirects by hand: the digest is in the first answer, the contents come from another
    /// host, and the token is for the Hub only.
    fn get(&self, url: &str, start: u64) -> Result<Answer> {
        let mut url = url.to_owned();
        let mut etag = None;
        for _ in 0..=MAX_REDIRECTS {
            let target = parse(&url)?;
            let mut request = self.agent.get(&url);
            if start > 0 {
                request = request.header(header::RANGE, format!("bytes={start}-"));
            }
            let own = origin(&target) == origin(&parse(&self.hub.endpoint)?);
            if let Some(token) = self.hub.token.as_deref().filter(|_| own) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let answer = request.call().map_err(|error| self.failure(&url, error))?;
            let headers = answer.headers();
            if own && etag.is_none() {
                etag = text(headers, "x-linked-etag")
                    .or_else(|| text(headers, "etag"))
                    .map(|etag| plain_etag(&etag));
            }
            match answer.status().as_u16() {
                200 | 206 => return opened(answer, etag, start),
                301 | 302 | 303 | 307 | 308 => url = self.next(&target, headers)?,
                status => return Err(self.refusal(status, &url, headers)),
            }
        }
        Err(HubProblem::protocol(format!("{url}: too many redirects")))
    }

    /// The target of a redirect.
    fn next(&self, from: &Uri, headers: &HeaderMap) -> Result<String> {
        let location = text(headers, "location").unwrap_or_default();
        let scheme = from.scheme_str().unwrap_or("https");
        let host = from.authority().map_or("", |authority| authority.as_str());
        let url = if location.starts_with("//") {
            format!("{scheme}:{location}")
        } else if location.starts_with('/') {
            format!("{scheme}://{host}{location}")
        } else {
            location
        };
        if scheme == "https" && parse(&url)?.scheme_str() != Some("https") {
            let reason = format!("{from} leads to {url}, which is not encrypted");
            return Err(HubProblem::protocol(reason));
        }
        Ok(url)
    }

    /// The meaning of an unsuccessful response; the Hub gives details in `X-Error-Code`.
    fn refusal(&self, status: u16, url: &str, headers: &HeaderMap) -> HubProblem {
        let token = self.hub.token.is_some();
        let code = text(headers, "x-error-code").unwrap_or_default();
        match (status, code.as_str()) {
            (_, "GatedRepo") => HubProblem::Gated {
                page: format!("{}/{}", self.hub.endpoint, self.id.repository()),
                token,
            },
            (_, "RepoNotFound") => HubProblem::NotFound,
            (_, "RevisionNotFound") => HubProblem::NoRevision,
            (404, code) if code != "EntryNotFound" => HubProblem::NotFound,
            (401 | 403, _) => HubProblem::Denied { status, token },
            (429, _) => HubProblem::TooMany {
                seconds: text(headers, "retry-after").and_then(|text| text.trim().parse().ok()),
            },
            _ => HubProblem::Status {
                status,
                url: url.to_owned(),
            },
        }
    }

    fn failure(&self, url: &str, error: ureq::Error) -> HubProblem {
        let reason = match error {
            ureq::Error::Io(error) => error.to_string(),
            ureq::Error::HostNotFound => "there is no such host".to_owned(),
            ureq::Error::Timeout(_) => "no answer in time".to_owned(),
            ureq::Error::Protocol(error) => {
                return HubProblem::protocol(format!("{url}: {error}"));
            }
            other => other.to_string(),
        };
        self.unreachable(url, &reason)
    }

    fn unreachable(&self, url: &str, reason: &str) -> HubProblem {
        let uri = parse(url).ok();
        let host = uri.as_ref().and_then(Uri::authority);
        HubProblem::Unreachable {
            host: host.map_or_else(|| url.to_owned(), ToString::to_string),
            reason: reason.to_owned(),
        }
    }
}

/// The response with the file, or with the rest of it.
fn opened(answer: Response<ureq::Body>, etag: Option<String>, start: u64) -> Result<Answer> {
    let headers = answer.headers();
    let length: Option<u64> = text(headers, "content-length").and_then(|text| text.parse().ok());
    let start = match answer.status().as_u16() {
        206 => {
            let range = text(headers, "content-range").unwrap_or_default();
            if !range.starts_with(&format!("bytes {start}-")) {
                let reason = format!("asked for bytes {start}-, the answer is of `{range}`");
                return Err(HubProblem::protocol(reason));
            }
            start
        }
        _ => 0,
    };
    Ok(Answer {
        etag,
        start,
        size: length.map(|length| start + length),
        body: Box::new(answer.into_body().into_reader()),
    })
}

/// Parses a listing. Nothing in it may name a place outside the cache.
fn parse_listing(json: &[u8]) -> Result<Listing> {
    #[derive(Deserialize)]
    struct Repository {
        sha: String,
        siblings: Vec<Sibling>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Sibling {
        rfilename: String,
        size: Option<u64>,
        blob_id: Option<String>,
        lfs: Option<Lfs>,
    }
    #[derive(Deserialize)]
    struct Lfs {
        sha256: Option<String>,
        size: Option<u64>,
    }
    let Repository { sha, siblings } = serde_json::from_slice(json)
        .map_err(|error| HubProblem::protocol(format!("not a listing of files: {error}")))?;
    if !is_digest(&sha) {
        return Err(HubProblem::protocol(format!("`{sha}` is no commit")));
    }
    let files = siblings.into_iter().map(|file| {
        if !is_inside(&file.rfilename) {
            let reason = format!("a file is called `{}`", file.rfilename);
            return Err(HubProblem::protocol(reason));
        }
        let (sha256, size) = file.lfs.map_or((None, None), |lfs| (lfs.sha256, lfs.size));
        let blob = sha256.or(file.blob_id);
        if let Some(blob) = blob.as_deref().filter(|blob| !is_digest(blob)) {
            return Err(HubProblem::protocol(format!("`{blob}` is no digest")));
        }
        Ok(RemoteFile {
            path: file.rfilename,
            size: size.or(file.size),
            blob,
        })
    });
    Ok(Listing {
        commit: sha,
        files: files.collect::<Result<_>>()?,
    })
}

/// Whether a relative path stays inside the folder it is relative to, on every system.
fn is_inside(path: &str) -> bool {
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    path.split('/').all(plain) && !path.contains(['\\', ':']) && !path.contains(char::is_control)
}

/// Whether a text can be a digest, and so the name of a file in the cache.
pub(super) fn is_digest(text: &str) -> bool {
    (40..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// An ETag without its quotes.
fn plain_etag(etag: &str) -> String {
    let strong = etag.strip_prefix("W/").unwrap_or(etag);
    strong.trim_matches('"').to_owned()
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}

fn parse(url: &str) -> Result<Uri> {
    let uri: Option<Uri> = url.parse().ok();
    let complete = |uri: &Uri| uri.host().is_some() && uri.scheme_str().is_some();
    uri.filter(complete)
        .ok_or_else(|| HubProblem::protocol(format!("`{url}` is no address")))
}

/// Scheme, host and port: the scope of a token.
fn origin(uri: &Uri) -> (Option<&str>, Option<String>, Option<u16>) {
    let default = uri.scheme_str().map(|scheme| match scheme {
        "http" => 80,
        _ => 443,
    });
    (
        uri.scheme_str(),
        uri.host().map(str::to_ascii_lowercase),
        uri.port_u16().or(default),
    )
}

/// Percent-encodes what a path of a URL cannot hold; slashes too unless they separate folders.
fn encode(text: &str, keep_slashes: bool) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
        if plain || (byte == b'/' && keep_slashes) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// The message of a broken connection.
pub(super) fn reason(error: &io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(ureq::Error::Timeout(_)) => "no data in time".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_out_of_the_cache_are_refused() {
        for path in [
            "../x",
            "a/../../x",
            "/x",
            "a//x",
            "./x",
            "a\\..\\x",
            "c:x",
            "",
            "a/",
            "x\n",
        ] {
            assert!(!is_inside(path), "{path}");
            let commit = "a".repeat(40);
            let json = format!(
                r#"{{"sha": "{commit}", "siblings": [{{"rfilename": {}}}]}}"#,
                serde_json::to_string(path).unwrap()
            );
            assert!(parse_listing(json.as_bytes()).is_err(), "{path}");
        }
        assert!(is_inside(
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
        ));
        for sha in ["../../x", "main", "", "zz"] {
            let json = format!(r#"{{"sha": "{sha}", "siblings": []}}"#);
            assert!(parse_listing(json.as_bytes()).is_err(), "{sha}");
        }
    }

    #[test]
    fn a_listing_names_blobs_by_sha_256_or_by_git() {
        let (commit, git, sha) = ("1".repeat(40), "2".repeat(40), "3".repeat(64));
        let json = format!(
            r#"{{"sha": "{commit}", "gated": false, "siblings": [
                {{"rfilename": "a", "size": 3, "blobId": "{git}"}},
                {{"rfilename": "b", "blobId": "{git}", "lfs": {{"sha256": "{sha}", "size": 9}}}},
                {{"rfilename": "c"}}]}}"#
        );
        let listing = parse_listing(json.as_bytes()).unwrap();
        let files: Vec<_> = (listing.files.iter())
            .map(|file| (file.size, file.blob.as_deref()))
            .collect();
        let expected = [
            (Some(3), Some(git.as_str())),
            (Some(9), Some(sha.as_str())),
            (None, None),
        ];
        assert_eq!(files, expected);
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |url: &str| origin(&parse(url).unwrap()).2;
        assert_eq!(origin("https://a/x"), Some(443));
        assert_eq!(origin("http://a:81/x"), Some(81));
        let same = |one: &str, other: &str| {
            super::origin(&parse(one).unwrap()) == super::origin(&parse(other).unwrap())
        };
        assert!(same("https://Hub.co/a", "https://hub.co:443/b"));
        assert!(!same("https://hub.co", "http://hub.co"));
        assert!(!same("https://hub.co", "https://hub.co.evil"));
        assert!(!same("https://hub.co", "https://cdn.hub.co"));
    }

    #[test]
    fn urls_and_etags_are_put_right() {
        assert_eq!(encode("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(encode("a b/c#ü", true), "a%20b/c%23%C3%BC");
        for etag in ["\"abc\"", "W/\"abc\"", "abc"] {
            assert_eq!(plain_etag(etag), "abc");
        }
    }
}
