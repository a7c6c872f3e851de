//! Long operations: each is a job with an id, a phase, progress figures and a cancel.
//!
//! ```text
//!   running ──► succeeded
//!      ├──────► failed | cancelled
//!      └──────► in_doubt ──settle──► succeeded | failed
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use migration::MoveControl;
use serde::Serialize;

use crate::service::ServiceError;

/// Number of a job, from 1, never reused in a process.
pub type JobId = u64;

/// Finished jobs that are remembered.
const KEPT: usize = 64;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// Moves the machine away.
    Send,
    /// Waits for a machine and takes it.
    Receive,
    /// Writes the machine to files.
    Snapshot,
    /// Makes a machine of such files.
    Restore,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    /// Still going.
    Running,
    /// Done.
    Succeeded,
    /// Ended without effect: see `error`.
    Failed,
    /// Ended without effect because somebody asked for it.
    Cancelled,
    /// A move whose outcome is unknown: the guest is paused here and may run there.
    InDoubt,
}

/// What `GET /api/v1/jobs/{id}` answers.
#[derive(Clone, Debug, Serialize)]
pub struct JobInfo {
    /// Its number.
    pub id: JobId,
    /// What it does.
    pub kind: JobKind,
    /// How far it is.
    pub status: JobStatus,
    /// Where to, where it listens (the port is resolved), or where the files are.
    pub url: String,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ServiceError>,
    /// Phase, rounds, bytes, rates, downtimes.
    #[serde(flatten)]
    pub progress: migration::Progress,
}

/// Called when a job has ended.
type Watcher = Box<dyn FnOnce(JobInfo) + Send>;

struct Job {
    kind: JobKind,
    status: JobStatus,
    url: String,
    started_ms: u64,
    error: Option<ServiceError>,
    control: Arc<MoveControl>,
    watchers: Vec<Watcher>,
}

impl Job {
    fn info(&self, id: JobId) -> JobInfo {
        JobInfo {
            id,
            kind: self.kind,
            status: self.status,
            url: self.url.clone(),
            started_ms: self.started_ms,
            error: self.error.clone(),
            progress: self.control.progress(),
        }
    }
}

#[derive(Default)]
struct Table {
    next: JobId,
    jobs: BTreeMap<JobId, Job>,
}

/// All jobs of a process. Cheap to clone; every method returns at once.
#[derive(Clone, Default)]
pub struct Jobs(Arc<Mutex<Table>>);

impl Jobs {
    fn table(&self) -> MutexGuard<'_, Table> {
        // The table is left consistent by every method, so a poisoned lock is still good.
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Adds a running job.
    pub(crate) fn start(&self, kind: JobKind, url: String, control: Arc<MoveControl>) -> JobId {
        let mut table = self.table();
        table.next += 1;
        let id = table.next;
        let started_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_millis() as u64);
        table.jobs.insert(
            id,
            Job {
                kind,
                status: JobStatus::Running,
                url,
                started_ms,
                error: None,
                control,
                watchers: Vec::new(),
            },
        );
        while table.jobs.len() > KEPT {
            let Some(old) = table
                .jobs
                .iter()
                .find(|(_, job)| !matches!(job.status, JobStatus::Running | JobStatus::InDoubt))
                .map(|(&id, _)| id)
            else {
                break;
            };
            table.jobs.remove(&old);
        }
        id
    }

    /// Ends a job (or moves it on from in doubt) and tells those who wait for it.
    pub(crate) fn finish(&self, id: JobId, status: JobStatus, error: Option<ServiceError>) {
        let mut table = self.table();
        let Some(job) = table.jobs.get_mut(&id) else {
            return;
        };
        job.status = status;
        job.error = error;
        let watchers = std::mem::take(&mut job.watchers);
        let info = job.info(id);
        drop(table);
        for watcher in watchers {
            watcher(info.clone());
        }
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<JobInfo> {
        self.table()
            .jobs
            .iter()
            .map(|(&id, job)| job.info(id))
            .collect()
    }

    /// One job.
    pub fn get(&self, id: JobId) -> Option<JobInfo> {
        self.table().jobs.get(&id).map(|job| job.info(id))
    }

    /// The control of a job that is still running.
    pub(crate) fn running(&self, id: JobId) -> Option<Arc<MoveControl>> {
        self.table()
            .jobs
            .get(&id)
            .filter(|job| job.status == JobStatus::Running)
            .map(|job| Arc::clone(&job.control))
    }

    /// Calls `watcher` once the job is no longer running; at once if it is not. It must not block.
    pub fn on_end(&self, id: JobId, watcher: impl FnOnce(JobInfo) + Send + 'static) {
        let mut table = self.table();
        let Some(job) = table.jobs.get_mut(&id) else {
            return;
        };
        if job.status == JobStatus::Running {
            job.watchers.push(Box::new(watcher));
        } else {
            let info = job.info(id);
            drop(table);
            watcher(info);
        }
    }
}
