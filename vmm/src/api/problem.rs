//! Refusals as HTTP answers.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::service::{ErrorKind, ServiceError};

/// A refusal and its HTTP status.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    status: StatusCode,
    error: ServiceError,
}

impl Problem {
    /// A refusal whose status says more than its kind.
    pub(super) fn with_status(
        status: StatusCode,
        kind: ErrorKind,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            error: ServiceError::new(kind, message),
        }
    }

    /// 400.
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        ServiceError::new(ErrorKind::BadRequest, message).into()
    }

    /// 404.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        ServiceError::new(ErrorKind::NotFound, message).into()
    }

    /// 500: this program contradicts itself.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        ServiceError::new(ErrorKind::Internal, message).into()
    }
}

impl From<ServiceError> for Problem {
    fn from(error: ServiceError) -> Self {
        let status = match error.kind {
            ErrorKind::BadRequest => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            ErrorKind::WrongState | ErrorKind::Failed => StatusCode::CONFLICT,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, error }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::error!(message = %self.error, "an API request met a fault of this program");
        }
        json(self.status, &self.error)
    }
}

/// A JSON answer.
pub(super) fn json(status: StatusCode, body: &impl serde::Serialize) -> Response {
    let (status, text) = match serde_json::to_string(body) {
        Ok(text) => (status, text),
        // Only a map with keys that are no strings could get here.
        Err(e) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            serde_json::json!({
                "kind": ErrorKind::Internal,
                "message": format!("cannot write the answer as JSON: {e}"),
            })
            .to_string(),
        ),
    };
    (status, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}
