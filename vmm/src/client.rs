//! A client for the API of another `vmm` process, for the command line.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::PREFIX;
use crate::job::JobId;
use crate::service::{ErrorKind, ServiceError};

/// Longest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// Why a request got no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no socket.
    #[error("{0}: no such socket; start a vmm with `--api-socket {0}` or correct the path")]
    Missing(PathBuf),
    /// Nobody listens on it.
    #[error(
        "{0}: nobody listens on this socket; the vmm that made it has ended, remove it and start another"
    )]
    Refused(PathBuf),
    /// It belongs to another user.
    #[error("{0}: not permitted to connect; become the user that started the vmm, or root")]
    NotPermitted(PathBuf),
    /// The connection cannot be made or breaks.
    #[error("{path}: {what}: {source}")]
    Connection {
        /// The socket.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// How.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer within the time limit.
    #[error("{path}: no answer within {} s; the vmm may be stopped or stuck", .limit.as_secs())]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The answer is not what this API would say.
    #[error("{path}: {problem}; is it the API socket of a vmm?")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The vmm refused.
    #[error("{error}")]
    Refusal {
        /// HTTP status.
        status: u16,
        /// What it said.
        error: ServiceError,
    },
}

/// A job as the API describes it. Figures it does not have yet are zero or absent.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// Where the move goes, or where it is waited for.
    pub url: String,
    /// How far it is.
    pub status: Status,
    /// Why it did not succeed.
    pub error: Option<ServiceError>,
    /// Name of the phase it is in.
    pub phase: String,
    /// Pre-copy rounds so far.
    pub rounds: Vec<Value>,
    /// Bytes of RAM the move is about.
    pub bytes_total: u64,
    /// Bytes sent so far.
    pub bytes_sent: u64,
    /// Bytes still to be sent, as far as is known.
    pub bytes_remaining: u64,
    /// Bytes per second.
    pub rate_bytes_per_s: f64,
    /// What the downtime would be now, in milliseconds.
    pub estimated_downtime_ms: Option<f64>,
    /// What it was, in milliseconds.
    pub downtime_ms: Option<f64>,
    /// Time since it began, in milliseconds.
    pub elapsed_ms: f64,
    /// Everything the API said about it.
    #[serde(skip)]
    pub raw: Value,
}

/// How far a job is, as the API names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Still going.
    #[default]
    Running,
    /// Done.
    Succeeded,
    /// Ended without effect.
    Failed,
    /// Ended without effect because somebody asked for it.
    Cancelled,
    /// It is unknown where the guest runs.
    InDoubt,
}

/// Talks to the `vmm` behind one API socket. Every call is a connection of its own and blocks.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    limit: Option<Duration>,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// A client for the socket at `path`, which need not exist yet. Fails when the process has no file
    /// descriptor left.
    pub fn new(path: impl Into<PathBuf>) -> io::Result<Self> {
        Ok(Self {
            path: path.into(),
            limit: None,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .enable_time()
                .build()?,
        })
    }

    /// Gives up on an answer after `limit`; without this, never.
    pub fn with_limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `GET /api/v1/{endpoint}`.
    pub fn get(&self, endpoint: &str) -> Result<Value, ClientError> {
        self.request(Method::GET, endpoint, None)
    }

    /// `PUT /api/v1/{endpoint}` without a body. `Value::Null` if the answer has none.
    pub fn put(&self, endpoint: &str) -> Result<Value, ClientError> {
        self.request(Method::PUT, endpoint, None)
    }

    /// `PUT /api/v1/{endpoint}` with a body. `Value::Null` if the answer has none.
    pub fn put_json(&self, endpoint: &str, body: Vec<u8>) -> Result<Value, ClientError> {
        self.request(Method::PUT, endpoint, Some(body))
    }

    /// Starts a move (`vm.send-migration` or `vm.receive-migration`) and returns its job at once.
    pub fn start_job(&self, endpoint: &str, body: Vec<u8>) -> Result<JobId, ClientError> {
        let answer = self.put_json(&format!("{endpoint}?wait=false"), body)?;
        answer["job"]
            .as_u64()
            .ok_or_else(|| self.strange(format!("`{answer}` names no job")))
    }

    /// A job as it is now.
    pub fn job(&self, id: JobId) -> Result<Job, ClientError> {
        self.job_at(&format!("jobs/{id}"))
    }

    /// A job once it has ended, however long that takes.
    pub fn job_end(&self, id: JobId) -> Result<Job, ClientError> {
        self.job_at(&format!("jobs/{id}?wait=true"))
    }

    /// Asks a job to end without effect.
    pub fn cancel_job(&self, id: JobId) -> Result<(), ClientError> {
        self.put(&format!("jobs/{id}/cancel")).map(drop)
    }

    fn job_at(&self, endpoint: &str) -> Result<Job, ClientError> {
        let raw = self.get(endpoint)?;
        let job =
            Job::deserialize(&raw).map_err(|e| self.strange(format!("this is no job: {e}")))?;
        Ok(Job { raw, ..job })
    }

    fn request(
        &self,
        method: Method,
        endpoint: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Value, ClientError> {
        let (status, body) = self.runtime.block_on(async {
            let exchange = self.exchange(method, endpoint, body);
            match self.limit {
                None => exchange.await,
                Some(limit) => tokio::time::timeout(limit, exchange)
                    .await
                    .unwrap_or_else(|_| {
                        Err(ClientError::TimedOut {
                            path: self.path.clone(),
                            limit,
                        })
                    }),
            }
        })?;
        if status.is_success() {
            if body.is_empty() {
                return Ok(Value::Null);
            }
            return serde_json::from_slice(&body)
                .map_err(|e| self.strange(format!("the answer is not JSON: {e}")));
        }
        let error = serde_json::from_slice::<ServiceError>(&body)
            .map_err(|_| self.strange(format!("it answered {status} without a reason")))?;
        Err(ClientError::Refusal {
            status: status.as_u16(),
            error,
        })
    }

    async fn exchange(
        &self,
        method: Method,
        endpoint: &str,
        body: Option<Vec<u8>>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = tokio::net::UnixStream::connect(&self.path)
            .await
            .map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => ClientError::Missing(self.path.clone()),
                io::ErrorKind::ConnectionRefused => ClientError::Refused(self.path.clone()),
                io::ErrorKind::PermissionDenied => ClientError::NotPermitted(self.path.clone()),
                _ => self.broken("cannot connect")(e.into()),
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.broken("cannot speak HTTP")(e.into()))?;
        let request = Request::builder()
            .method(method)
            .uri(format!("{PREFIX}/{endpoint}"))
            .header(header::HOST, "localhost")
            .header(header::CONNECTION, "close")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|e| self.broken("cannot write the request")(e.into()))?;
        let answer = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER)
                .collect()
                .await?
                .to_bytes();
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>((status, body))
        };
        // The connection has to be driven while the answer is waited for.
        tokio::pin!(answer);
        let answer = tokio::select! {
            answer = &mut answer => answer,
            ended = connection => match ended {
                Ok(()) => answer.await,
                Err(e) => Err(e.into()),
            },
        };
        answer.map_err(self.broken("the connection broke before the answer was there"))
    }

    fn broken(
        &self,
        what: &'static str,
    ) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> ClientError {
        let path = self.path.clone();
        move |source| ClientError::Connection { path, what, source }
    }

    fn strange(&self, problem: String) -> ClientError {
        ClientError::Answer {
            path: self.path.clone(),
            problem,
        }
    }
}

impl ClientError {
    /// The refusal as the API's error body would say it.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Refusal { error, .. } => json!(error),
            other => json!(ServiceError::new(ErrorKind::Failed, other.to_string())),
        }
    }
}
