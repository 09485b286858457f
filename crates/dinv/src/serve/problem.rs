//! The answer to a request that cannot be fulfilled.

use std::io::{self, ErrorKind};

use axum::extract::rejection::QueryRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use crate::cli::terminal;

/// An answer with a status of 4xx or 5xx.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    body: Body,
}

#[derive(Debug, Serialize)]
struct Body {
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
}

/// The result of a handler.
pub(crate) type Answer<T> = Result<T, Problem>;

impl Problem {
    /// A problem of this status.
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let body = Body {
            message: message.into(),
            hint: None,
            field: None,
        };
        Self { status, body }
    }

    /// The request is well-formed, but this field is invalid.
    pub(crate) fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        let mut problem = Self::new(StatusCode::UNPROCESSABLE_ENTITY, message);
        problem.body.field = Some(field.into());
        problem
    }

    /// The query of an address is wrong.
    pub(crate) fn query(error: &QueryRejection) -> Self {
        Self::field("", error.body_text())
    }

    /// There is no such thing.
    pub(crate) fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no such {what}"))
    }

    /// The current state does not allow it.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    /// Adds what the user can do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.body.hint = Some(hint.into());
        self
    }

    /// An error of the library or the program that concerns a field of the request.
    pub(crate) fn about(field: impl Into<String>, error: &anyhow::Error) -> Self {
        let mut problem = Self::field(field, terminal::chain(error));
        problem.body.hint = terminal::hint(error);
        problem
    }
}

impl<E: Into<anyhow::Error>> From<E> for Problem {
    /// An error of the server itself.
    fn from(error: E) -> Self {
        let error = error.into();
        let message = terminal::chain(&error);
        if is_full(&error) {
            return Self::new(StatusCode::INSUFFICIENT_STORAGE, message)
                .hint("make room on the server's disk, or start it with another `--dir`");
        }
        let mut problem = Self::new(StatusCode::INTERNAL_SERVER_ERROR, message);
        problem.body.hint = terminal::hint(&error);
        problem
    }
}

/// Whether the disk, or what this user may write, is full.
fn is_full(error: &anyhow::Error) -> bool {
    let mut causes = error.chain();
    let kind = causes.find_map(|cause| Some(cause.downcast_ref::<io::Error>()?.kind()));
    matches!(
        kind,
        Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
    )
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        super::http::json(self.status, &json!({ "error": self.body }))
    }
}
