//! What can stand between a name and a model.

use std::fmt::Display;
use std::path::PathBuf;

use crate::Error;

/// Why a model could not be had from the Hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubProblem {
    /// The network may not be touched, and the cache does not have the model.
    #[error(
        "not in the cache{}, and offline mode forbids to download it",
        but_for(missing)
    )]
    Offline {
        /// What an incomplete copy lacks; empty where there is no copy.
        missing: Vec<String>,
    },
    /// This library was built without the feature `hub`.
    #[error("not in the cache, and this build cannot download (it lacks the feature `hub`)")]
    NotBuiltIn,
    /// There is no such model, or it is not shown to this user.
    #[error("there is no such model on the Hub, or it is private")]
    NotFound,
    /// The model has no such branch, tag or commit.
    #[error("the model has no such revision")]
    NoRevision,
    /// The licence has to be accepted before the files can be had.
    #[error("the model is gated: its licence has to be accepted first")]
    Gated {
        /// Where it is accepted.
        page: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// The Hub does not let this user in.
    #[error("the Hub refuses access (HTTP {status})")]
    Denied {
        /// 401 or 403.
        status: u16,
        /// Whether a token was sent.
        token: bool,
    },
    /// Too many requests.
    #[error("the Hub asks to send fewer requests (HTTP 429){}", in_seconds(*seconds))]
    TooMany {
        /// How long to wait, where it was said.
        seconds: Option<u64>,
    },
    /// Any other answer that is not a file.
    #[error("the Hub answered HTTP {status} to {url}")]
    Status {
        /// The status.
        status: u16,
        /// What was asked for.
        url: String,
    },
    /// No connection.
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// Whom.
        host: String,
        /// Why not.
        reason: String,
    },
    /// The connection ended before the file did.
    #[error("{file}: the connection broke after {done} of {total} bytes: {reason}")]
    Interrupted {
        /// The file.
        file: String,
        /// Bytes that are there now.
        done: u64,
        /// Bytes of the whole file.
        total: u64,
        /// How it broke.
        reason: String,
    },
    /// The file that came is not the file that was asked for.
    #[error("{file}: expected {expected}, found {found}; what came is deleted")]
    Damaged {
        /// The file.
        file: String,
        /// The digest or size that the Hub names.
        expected: String,
        /// That of what came.
        found: String,
    },
    /// The cache cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file that was being written.
        path: PathBuf,
        /// Bytes still to come.
        left: u64,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// An answer that makes no sense, or that is dangerous to follow.
    #[error("the Hub's answer cannot be used: {reason}")]
    Protocol {
        /// What is wrong with it.
        reason: String,
    },
    /// The repository does not hold a model in a form that this library reads.
    #[error("not a diffusers pipeline or transformers model that can be read: {reason}")]
    Unusable {
        /// What is missing.
        reason: String,
    },
}

impl HubProblem {
    /// This problem as an error about a model.
    pub(crate) fn of(self, id: &impl Display) -> Error {
        Error::Hub {
            id: id.to_string(),
            problem: self,
        }
    }

    /// An answer that cannot be used.
    #[cfg(feature = "hub")]
    pub(crate) fn protocol(reason: impl Into<String>) -> Self {
        Self::Protocol {
            reason: reason.into(),
        }
    }

    /// Whether the same request may succeed a little later.
    #[cfg(feature = "hub")]
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Interrupted { .. } | Self::TooMany { .. } => true,
            Self::Status { status, .. } => *status >= 500,
            _ => false,
        }
    }
}

fn but_for(missing: &[String]) -> String {
    match missing {
        [] => String::new(),
        _ => format!(" as a whole ({} is missing)", missing.join(", ")),
    }
}

fn in_seconds(seconds: Option<u64>) -> String {
    seconds.map_or_else(String::new, |seconds| format!(", for {seconds} s"))
}
