//! Requests to a server, and what its answers mean.

use std::thread::sleep;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use ureq::Agent;
use ureq::http::{HeaderMap, header};

use super::{ServedCaptioner, beginning};
use crate::Error;
use crate::util::caption_problem::CaptionProblem;

/// The timeout for a connection.
const CONNECT: Duration = Duration::from_secs(15);
/// How long the list of models may take.
const LISTING: Duration = Duration::from_secs(60);
/// The longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// The bound of an answer in bytes.
const MOST_BYTES: u64 = 1 << 20;

impl ServedCaptioner {
    /// The answer to a request: a body is posted, without one the address is read. A server that fails is asked again.
    pub(super) fn ask(&self, path: &str, body: Option<&Value>) -> Result<Vec<u8>, Error> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let problem = match self.ask_once(path, body) {
                Ok(answer) => return Ok(answer),
                Err(problem) => problem,
            };
            let CaptionProblem::Failing {
                status,
                message,
                wait,
                ..
            } = problem
            else {
                return Err(self.error(problem));
            };
            let next = self.waits.get(attempts - 1);
            let next = next.map(|usual| wait.unwrap_or(*usual));
            let Some(pause) = next.filter(|pause| *pause <= LONGEST_WAIT) else {
                return Err(self.error(CaptionProblem::Failing {
                    status,
                    message,
                    attempts,
                    wait,
                }));
            };
            sleep(pause);
        }
    }

    fn ask_once(&self, path: &str, body: Option<&Value>) -> Result<Vec<u8>, CaptionProblem> {
        let limit = match body {
            Some(_) => self.patience,
            None => self.patience.min(LISTING),
        };
        // Pictures go to the given address alone: neither to a proxy nor where it redirects to.
        let agent: Agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_connect(Some(CONNECT.min(limit)))
            .timeout_global(Some(limit))
            .accept_encoding("identity")
            .user_agent(concat!(
                env!("CARGO_PKG_NAME"),
                "/",
                env!("CARGO_PKG_VERSION")
            ))
            .build()
            .into();
        let url = format!("{}/{path}", self.address.base());
        let bearer = self.key.as_ref().map(|key| format!("Bearer {key}"));
        let answer = match body {
            Some(body) => {
                let mut request = agent.post(&url).content_type("application/json");
                if let Some(bearer) = bearer {
                    request = request.header(header::AUTHORIZATION, bearer);
                }
                request.send(body.to_string().as_bytes())
            }
            None => {
                let mut request = agent.get(&url);
                if let Some(bearer) = bearer {
                    request = request.header(header::AUTHORIZATION, bearer);
                }
                request.call()
            }
        };
        let mut answer = answer.map_err(|error| failure(error, limit))?;
        let text = answer.body_mut().with_config().limit(MOST_BYTES);
        let text = text.read_to_vec().map_err(|error| failure(error, limit))?;
        match answer.status().as_u16() {
            200 => Ok(text),
            status => Err(self.refusal(status, answer.headers(), &text, body)),
        }
    }

    /// The meaning of an unsuccessful answer.
    fn refusal(
        &self,
        status: u16,
        headers: &HeaderMap,
        text: &[u8],
        body: Option<&Value>,
    ) -> CaptionProblem {
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let mut message = message_of(text);
        if let Some(key) = &self.key {
            message = message.replace(key.as_str(), "…");
        }
        // llama-server and Ollama answer 500 where a model sees no pictures.
        let is_about_pictures = message.to_lowercase().contains("image input");
        match status {
            300..=399 => CaptionProblem::Redirected {
                to: beginning(header(header::LOCATION).unwrap_or("nowhere")),
            },
            401 | 403 => CaptionProblem::Denied {
                status,
                key: self.key.is_some(),
            },
            404 => CaptionProblem::NotFound {
                model: body.and(self.address.model().map(str::to_owned)),
                message,
            },
            400 | 415 | 422 if body.is_some() => CaptionProblem::Refused { status, message },
            500..=599 if is_about_pictures => CaptionProblem::Refused { status, message },
            429 | 500..=599 => CaptionProblem::Failing {
                status,
                message,
                attempts: 1,
                wait: header(header::RETRY_AFTER)
                    .and_then(|text| text.trim().parse().ok())
                    .map(Duration::from_secs),
            },
            _ => CaptionProblem::Status { status, message },
        }
    }
}

fn failure(error: ureq::Error, limit: Duration) -> CaptionProblem {
    let reason = match error {
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
            "nothing answers at this address".to_owned()
        }
        ureq::Error::Timeout(_) => return CaptionProblem::TooSlow { limit },
        ureq::Error::BodyExceedsLimit(bytes) => return CaptionProblem::TooLarge { bytes },
        ureq::Error::HostNotFound => "there is no such host".to_owned(),
        ureq::Error::Io(error) => match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(ureq::Error::Timeout(_)) => return CaptionProblem::TooSlow { limit },
            _ => error.to_string(),
        },
        other => other.to_string(),
    };
    CaptionProblem::Unreachable { reason }
}

/// What a server says about an error, in one line: OpenAI's form, two others in use, or plain text.
fn message_of(text: &[u8]) -> String {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Said {
        Nested { error: Inner },
        Plain { error: String },
        Message { message: String },
        Detail { detail: String },
    }
    #[derive(Deserialize)]
    struct Inner {
        message: String,
    }
    let text = String::from_utf8_lossy(text);
    let said = match serde_json::from_str(&text) {
        Ok(
            Said::Nested {
                error: Inner { message },
            }
            | Said::Plain { error: message }
            | Said::Message { message }
            | Said::Detail { detail: message },
        ) => message,
        Err(_) if text.trim_start().starts_with(['<', '{', '[']) => String::new(),
        Err(_) => text.into_owned(),
    };
    const SHOWN: usize = 300;
    let line = said.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(SHOWN).collect()
}
