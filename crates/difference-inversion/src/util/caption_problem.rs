//! Why a server writes no caption.

use std::time::Duration;

use crate::util::error::ErrorClass;

/// Why a server that is asked for captions gives none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptionProblem {
    /// This library was built without the feature `hub`.
    #[error("this build cannot ask a server (it lacks the feature `hub`)")]
    NotBuiltIn,
    /// The key cannot be sent.
    #[error("the key has characters that cannot be sent")]
    WrongKey,
    /// No connection, or a broken one.
    #[error("no connection: {reason}")]
    Unreachable {
        /// The reason.
        reason: String,
    },
    /// The server did not answer in time.
    #[error("no answer within {}", in_words(*limit))]
    TooSlow {
        /// The time limit.
        limit: Duration,
    },
    /// The server sends elsewhere, where nothing is sent.
    #[error("the server redirects to {to}, but pictures are sent only to the given address")]
    Redirected {
        /// Where to.
        to: String,
    },
    /// The server wants a key, or another one.
    #[error("the server refuses access (HTTP {status})")]
    Denied {
        /// 401 or 403.
        status: u16,
        /// Whether a key was sent.
        key: bool,
    },
    /// There is no such model, or no such interface.
    #[error("{} (HTTP 404){}", absent(model.as_deref()), said(message))]
    NotFound {
        /// The model that was asked for.
        model: Option<String>,
        /// What the server says.
        message: String,
    },
    /// The server cannot use the request, as a rule because its model sees no pictures.
    #[error("the model cannot use the pictures (HTTP {status}){}", said(message))]
    Refused {
        /// The status.
        status: u16,
        /// What the server says.
        message: String,
    },
    /// The server fails or is busy, also when it is asked again.
    #[error("the server failed{} (HTTP {status}){}", times(*attempts), said(message))]
    Failing {
        /// The status.
        status: u16,
        /// What the server says.
        message: String,
        /// How often it was asked.
        attempts: usize,
        /// How long to wait, if the server states it.
        wait: Option<Duration>,
    },
    /// Any other answer without a caption.
    #[error("the server answered HTTP {status}{}", said(message))]
    Status {
        /// The status.
        status: u16,
        /// What the server says.
        message: String,
    },
    /// The server has several models, and none was named.
    #[error("the server has several models: {}", models.join(", "))]
    Several {
        /// The models.
        models: Vec<String>,
        /// The address with the first of them.
        example: String,
    },
    /// The server has no model.
    #[error("the server lists no model")]
    NoModel,
    /// The answer is not what the interface prescribes.
    #[error("expected {expected}, but the answer begins with `{begins}`")]
    Unreadable {
        /// What was expected.
        expected: &'static str,
        /// How the answer begins.
        begins: String,
    },
    /// The answer is too large to be one.
    #[error("the answer has more than {bytes} bytes")]
    TooLarge {
        /// The bound.
        bytes: u64,
    },
    /// The model said nothing.
    #[error("the model's caption is empty")]
    Empty,
    /// The model wrote an essay.
    #[error("the model wrote {words} words, and a caption has at most {most}: `{begins}`")]
    TooLong {
        /// The number of words.
        words: usize,
        /// The largest number of words.
        most: usize,
        /// How they begin.
        begins: String,
    },
    /// The model did not end.
    #[error("the model did not end its caption within {tokens} tokens: `{begins}`")]
    Endless {
        /// The bound.
        tokens: usize,
        /// How it begins.
        begins: String,
    },
}

impl CaptionProblem {
    /// Whether the same request may succeed later.
    pub fn is_temporary(&self) -> bool {
        self.class() == ErrorClass::Temporary
    }

    /// What went wrong.
    pub(crate) fn class(&self) -> ErrorClass {
        match self {
            Self::Unreachable { .. } | Self::Failing { .. } => ErrorClass::Temporary,
            Self::NotBuiltIn
            | Self::WrongKey
            | Self::NotFound { .. }
            | Self::Refused { .. }
            | Self::Denied { .. }
            | Self::Several { .. }
            | Self::NoModel => ErrorClass::Input,
            _ => ErrorClass::Other,
        }
    }

    /// What the user can do about it, see [`Error::hint`](crate::Error::hint).
    pub(crate) fn hint(&self) -> Option<String> {
        let fixed = match self {
            Self::NotBuiltIn => "build with `--features hub`, or give captions",
            Self::WrongKey => "DINV_CAPTIONER_KEY takes letters, digits and signs without spaces",
            Self::Unreachable { .. } => {
                "start the server, or check the address: llama-server listens on port 8080, Ollama on 11434, vLLM on 8000"
            }
            Self::TooSlow { .. } => {
                "take a smaller model or a GPU, see what the server is doing, or give captions"
            }
            Self::Redirected { .. } => "give the address at which the server answers",
            Self::Denied { key: false, .. } => "set DINV_CAPTIONER_KEY to the server's key",
            Self::Denied { key: true, .. } => {
                "the server does not accept the key in DINV_CAPTIONER_KEY: check it"
            }
            Self::NotFound { model: Some(_), .. } => {
                "name a model that the server has, as ADDRESS#MODEL; the address ends in /v1 as a rule"
            }
            Self::NotFound { model: None, .. } | Self::Unreadable { .. } => {
                "check the address, which ends in /v1 as a rule, and that a vision model runs there"
            }
            Self::Refused { .. } => {
                "take a vision model; llama-server also needs its --mmproj file, and vLLM two pictures for each prompt"
            }
            Self::Failing { .. } => {
                "wait, look at the server's own messages, then run the same command again"
            }
            Self::Several { example, .. } => {
                return Some(format!("name one: --captioner '{example}'"));
            }
            Self::NoModel => "load a vision model in the server",
            Self::Empty | Self::TooLong { .. } | Self::Endless { .. } => {
                "take a model that follows instructions and does not think aloud, or give captions"
            }
            Self::Status { .. } | Self::TooLarge { .. } => return None,
        };
        Some(fixed.to_owned())
    }
}

fn in_words(limit: Duration) -> String {
    match limit.as_secs() {
        0 => format!("{} ms", limit.as_millis()),
        seconds if seconds % 60 == 0 => format!("{} minutes", seconds / 60),
        seconds => format!("{seconds} s"),
    }
}

fn times(attempts: usize) -> String {
    match attempts {
        1 => String::new(),
        _ => format!(" {attempts} times"),
    }
}

fn absent(model: Option<&str>) -> String {
    match model {
        Some(model) => format!("there is no model `{model}`, or the address has no chat interface"),
        None => "the address has no interface like OpenAI's".to_owned(),
    }
}

fn said(message: &str) -> String {
    match message {
        "" => String::new(),
        _ => format!(": {message}"),
    }
}
