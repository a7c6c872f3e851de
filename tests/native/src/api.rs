//! A client for the API that shares no code with the product, so that it checks what is really on the wire.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Head of the answer, as it came.
    pub head: String,
    /// JSON body, `Null` when there is none.
    pub body: Value,
}

impl Answer {
    /// The `kind` of an error body.
    pub fn kind(&self) -> &str {
        self.body["kind"].as_str().unwrap_or_default()
    }

    /// The `message` of an error body.
    pub fn message(&self) -> &str {
        self.body["message"].as_str().unwrap_or_default()
    }
}

/// The API of one `vmm` process.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    /// The API at this socket.
    pub fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// One request on a connection of its own, with whatever body.
    pub fn raw(&self, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
        let mut stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("cannot connect to {}", self.socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        write!(
            stream,
            "{method} /api/v1/{path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8(answer).context("the answer is not UTF-8")?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .context("the answer has no head")?;
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .with_context(|| format!("no status in {head:?}"))?;
        let body = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(body)?
        };
        Ok(Answer {
            status,
            head: head.to_owned(),
            body,
        })
    }

    /// A request with a JSON body (`Null` for none).
    pub fn request(&self, method: &str, path: &str, body: &Value) -> Result<Answer> {
        let body = if body.is_null() {
            Vec::new()
        } else {
            serde_json::to_vec(body)?
        };
        self.raw(method, path, &body)
    }

    /// A PUT that must succeed.
    pub fn put(&self, path: &str, body: &Value) -> Result<Value> {
        let answer = self.request("PUT", path, body)?;
        ensure!(
            answer.status < 300,
            "PUT {path}: {} {}",
            answer.status,
            answer.body
        );
        Ok(answer.body)
    }

    /// A GET that must succeed.
    pub fn get(&self, path: &str) -> Result<Value> {
        let answer = self.request("GET", path, &Value::Null)?;
        ensure!(
            answer.status == 200,
            "GET {path}: {} {}",
            answer.status,
            answer.body
        );
        Ok(answer.body)
    }

    /// `state` of `vm.info`, or an empty string without a VM.
    pub fn state(&self) -> Result<String> {
        let answer = self.request("GET", "vm.info", &Value::Null)?;
        match answer.status {
            200 => Ok(answer.body["state"].as_str().unwrap_or_default().to_owned()),
            404 => Ok(String::new()),
            other => bail!("vm.info: {other} {}", answer.body),
        }
    }

    /// Waits until the VM is in this state.
    pub fn wait_state(&self, wanted: &str, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let state = self.state()?;
            if state == wanted {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the VM is {state}, not {wanted}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts a job and returns its number.
    pub fn start(&self, path: &str, body: &Value) -> Result<u64> {
        let answer = self.put(&format!("{path}?wait=false"), body)?;
        answer["job"]
            .as_u64()
            .with_context(|| format!("no job in {answer}"))
    }

    /// The job.
    pub fn job(&self, id: u64) -> Result<Value> {
        self.get(&format!("jobs/{id}"))
    }

    /// Waits until the job is no longer running.
    pub fn wait_job(&self, id: u64, limit: Duration) -> Result<Value> {
        self.wait_job_until(id, limit, |job| job["status"] != "running")
    }

    /// Waits until the job satisfies `done`.
    pub fn wait_job_until(
        &self,
        id: u64,
        limit: Duration,
        done: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let job = self.job(id)?;
            if done(&job) {
                return Ok(job);
            }
            ensure!(Instant::now() < deadline, "job {id} after {limit:?}: {job}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
