//! What the machine's thread does about snapshots: start to write or read one, take in how that ended.
//!
//! Both are jobs with a worker of their own, as moves are; until they end nothing else may change the machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use migration::{MoveControl, RunState};

use super::destination::{Arrived, MovingIn};
use super::instance::Instance;
use super::owner::{Owner, Vm};
use super::{Event, RestoreFailure, SnapshotFailure, error_chain};
use crate::job::{JobId, JobKind, JobStatus};
use crate::service::{
    ErrorKind, Reply, RestoreRequest, ServiceError, SnapshotRequest, VmState, directory_of,
};

impl Owner {
    pub(super) fn snapshot(&mut self, request: &SnapshotRequest) -> Reply {
        let directory = directory("destination_url", &request.destination_url)?;
        let vm = self.vm_in(&[VmState::Paused], "take a snapshot of")?;
        let Some(instance) = vm.instance.clone() else {
            return Err(ServiceError::new(
                ErrorKind::Internal,
                "the VM is paused but was never built",
            ));
        };
        if let Some(demand) = instance.demands().pending() {
            return Err(ServiceError::wrong_state(format!(
                "{demand}: a snapshot would not know of it; resume the VM, reboot it or shut it down first"
            )));
        }
        instance.check_complete().map_err(|error| {
            ServiceError::wrong_state(format!("no snapshot of the VM can be taken: {error}"))
        })?;
        let control = Arc::new(MoveControl::new());
        let url = request.destination_url.clone();
        let job = self
            .jobs
            .start(JobKind::Snapshot, url, Arc::clone(&control));
        let (events, worker_control) = (self.events.clone(), Arc::clone(&control));
        let spawned = std::thread::Builder::new()
            .name("snapshot".into())
            .spawn(move || {
                let result = write(&instance, &directory, &worker_control);
                // Whoever hears of the end may stop the machine at once.
                drop(instance);
                // Without a machine thread the process is ending.
                let _ = events.send(Event::SnapshotEnded(job, result));
            });
        self.started(job, JobKind::Snapshot, control, 0, spawned)
    }

    pub(super) fn snapshot_ended(&mut self, job: JobId, result: Result<(), SnapshotFailure>) {
        self.moving = None;
        match result {
            Ok(()) => self.jobs.finish(job, JobStatus::Succeeded, None),
            Err(failure) => {
                let (cancelled, message) = match failure {
                    SnapshotFailure::State(error) => (
                        false,
                        format!("the machine's state cannot be saved: {error}"),
                    ),
                    SnapshotFailure::Files(error) => (error.is_cancelled(), error_chain(&error)),
                };
                self.failed(job, "no snapshot was written", cancelled, message);
            }
        }
        let pending = self
            .vm
            .as_ref()
            .and_then(|vm| vm.instance.as_ref())
            .and_then(|instance| instance.demands().pending());
        if let Some(demand) = pending {
            self.serve(demand);
        }
    }

    pub(super) fn restore(&mut self, request: RestoreRequest) -> Reply {
        let directory = directory("source_url", &request.source_url)?;
        self.no_vm()?;
        let (loading, resume) = (request.loading(), request.resume);
        let control = Arc::new(MoveControl::new());
        let url = request.source_url.clone();
        let job = self.jobs.start(JobKind::Restore, url, Arc::clone(&control));
        self.machines += 1;
        let number = self.machines;
        let mut machine = MovingIn::new(
            number,
            request.hypervisor.or(self.hypervisor),
            request.allow_tsc_change,
            request.into(),
            self.events.clone(),
        );
        let (events, worker_control) = (self.events.clone(), Arc::clone(&control));
        let spawned = std::thread::Builder::new()
            .name("restore".into())
            .spawn(move || {
                let result = migration::snapshot::restore(
                    &directory,
                    &mut machine,
                    loading,
                    &worker_control,
                )
                .map_err(RestoreFailure::Restore)
                .and_then(|report| {
                    tracing::info!(?report, "restored");
                    machine.into_arrived().ok_or(RestoreFailure::Nothing)
                });
                // Without a machine thread the process is ending.
                let _ = events.send(Event::RestoreEnded(job, result, resume));
            });
        self.started(job, JobKind::Restore, control, number, spawned)
    }

    pub(super) fn restore_ended(
        &mut self,
        job: JobId,
        result: Result<Arrived, RestoreFailure>,
        resume: bool,
    ) {
        let early = self
            .moving
            .take()
            .map(|moving| moving.early)
            .unwrap_or_default();
        let error = match result {
            Ok(arrived) => {
                self.vm = Some(Vm::arrived(arrived));
                for demand in early {
                    self.serve(demand);
                }
                // If this process is to end meanwhile, it ends: the snapshot is still there.
                match resume && self.ending.is_none() {
                    true => self.resume().err(),
                    false => None,
                }
            }
            Err(RestoreFailure::Restore(error)) => {
                let message = error_chain(&error);
                self.failed(
                    job,
                    "no machine was restored",
                    error.is_cancelled(),
                    message,
                );
                return;
            }
            Err(RestoreFailure::Nothing) => Some(ServiceError::new(
                ErrorKind::Internal,
                "the restore ended without a machine",
            )),
        };
        let status = match error {
            None => JobStatus::Succeeded,
            Some(_) => JobStatus::Failed,
        };
        self.jobs.finish(job, status, error);
    }

    fn failed(&mut self, job: JobId, what: &str, cancelled: bool, message: String) {
        tracing::warn!("{what}: {message}");
        let status = match cancelled {
            true => JobStatus::Cancelled,
            false => JobStatus::Failed,
        };
        let error = ServiceError::new(ErrorKind::Failed, message);
        self.jobs.finish(job, status, Some(error));
    }
}

impl Vm {
    /// A machine that came from elsewhere.
    pub(super) fn arrived(arrived: Arrived) -> Self {
        if let Some(why) = &arrived.untold_boot {
            tracing::warn!("the guest that has arrived cannot be booted again: {why}");
        }
        Self {
            untold_boot: arrived.untold_boot,
            config: arrived.instance.config(),
            contract: Some(arrived.instance.contract().clone()),
            state: match arrived.run_state {
                RunState::Running => VmState::Running,
                RunState::Paused => VmState::Paused,
            },
            instance: Some(arrived.instance),
        }
    }
}

/// Saves the machine, which is paused.
fn write(
    instance: &Instance,
    directory: &Path,
    control: &MoveControl,
) -> Result<(), SnapshotFailure> {
    let manifest = instance.manifest().map_err(SnapshotFailure::State)?;
    let state = instance
        .save(RunState::Paused)
        .map_err(|error| SnapshotFailure::State(error.into()))?;
    let report = migration::snapshot::save(directory, manifest, state, instance.ram(), control)
        .map_err(SnapshotFailure::Files)?;
    tracing::info!(?report, "a snapshot was written");
    Ok(())
}

fn directory(field: &str, url: &str) -> Result<PathBuf, ServiceError> {
    directory_of(url)
        .map_err(|problem| ServiceError::new(ErrorKind::BadRequest, format!("{field}: {problem}")))
}
