//! What the machine's thread does about moves: start them, take in how they ended, settle what is in doubt.

use std::sync::Arc;

use migration::{Listener, MoveControl, MoveUrl, RunState, SendOptions, SourceOutcome};

use super::destination::MovingIn;
use super::owner::{Moving, Owner, Vm};
use super::source::MovingOut;
use super::{Event, ExitReason, ReceiveFailure, error_chain};
use crate::job::{JobId, JobKind, JobStatus};
use crate::service::{
    ErrorKind, ReceiveMigration, Reply, Response, SendMigration, ServiceError, Settlement,
    TimeoutStrategy, VmState,
};

impl Owner {
    pub(super) fn send(&mut self, request: &SendMigration) -> Reply {
        let url: MoveUrl = parse_url(&request.destination_url)?;
        let vm = self.vm_in(&[VmState::Running, VmState::Paused], "move")?;
        let run_state = match vm.state {
            VmState::Running => RunState::Running,
            _ => RunState::Paused,
        };
        let Some(instance) = vm.instance.clone() else {
            return Err(ServiceError::new(
                ErrorKind::Internal,
                "the VM runs but was never built",
            ));
        };
        instance
            .check_movable()
            .map_err(|error| ServiceError::wrong_state(format!("the VM cannot move: {error}")))?;
        let options = SendOptions {
            downtime_ms: request.downtime_ms,
            timeout_s: request.timeout_s,
            timeout_strategy: match request.timeout_strategy {
                TimeoutStrategy::Cancel => migration::TimeoutStrategy::Cancel,
                TimeoutStrategy::Ignore => migration::TimeoutStrategy::Ignore,
            },
            data_channels: request.connections,
            ..SendOptions::default()
        };
        let control = Arc::new(MoveControl::new());
        let job = self
            .jobs
            .start(JobKind::Send, url.to_string(), Arc::clone(&control));
        let (events, worker_control) = (self.events.clone(), Arc::clone(&control));
        let spawned = std::thread::Builder::new()
            .name("move-out".into())
            .spawn(move || {
                let mut machine = Box::new(MovingOut::new(instance, run_state));
                let result = migration::send(&url, machine.as_mut(), &options, &worker_control);
                // Without a machine thread the process is ending.
                let _ = events.send(Event::SendEnded(job, machine, result));
            });
        self.started(job, JobKind::Send, control, 0, spawned)
    }

    pub(super) fn started(
        &mut self,
        job: JobId,
        kind: JobKind,
        control: Arc<MoveControl>,
        arriving: u64,
        spawned: std::io::Result<std::thread::JoinHandle<()>>,
    ) -> Reply {
        if let Err(error) = spawned {
            let error = ServiceError::new(
                ErrorKind::Internal,
                format!("cannot start a thread: {error}"),
            );
            self.jobs
                .finish(job, JobStatus::Failed, Some(error.clone()));
            return Err(error);
        }
        self.moving = Some(Moving {
            job,
            kind,
            control,
            arriving,
            early: Vec::new(),
            ejected: Vec::new(),
        });
        Ok(Response::JobStarted(job))
    }

    pub(super) fn send_ended(
        &mut self,
        job: JobId,
        mut machine: Box<MovingOut>,
        result: Result<migration::SendReport, migration::SendError>,
    ) {
        use migration::SourceMachine;
        self.moving = None;
        let error = match result {
            Ok(_) => {
                drop(machine);
                self.moved_away(job);
                return;
            }
            Err(error) => error,
        };
        let message = error_chain(&error);
        match error.outcome() {
            SourceOutcome::RunningHere => {
                machine.stop_dirty_tracking();
                drop(machine);
                tracing::warn!("the move has failed, the guest stays here: {message}");
                let status = if error.is_cancelled() {
                    JobStatus::Cancelled
                } else {
                    JobStatus::Failed
                };
                self.jobs.finish(
                    job,
                    status,
                    Some(ServiceError::new(ErrorKind::Failed, message)),
                );
                let pending = self
                    .vm
                    .as_ref()
                    .and_then(|vm| vm.instance.as_ref())
                    .and_then(|instance| instance.demands().pending());
                if let Some(demand) = pending {
                    self.serve(demand);
                }
            }
            SourceOutcome::PausedHere => {
                machine.stop_dirty_tracking();
                drop(machine);
                tracing::error!(
                    "the move has failed and the guest could not be resumed, it is paused here: {message}"
                );
                if let Some(vm) = &mut self.vm {
                    vm.state = VmState::Paused;
                }
                self.jobs.finish(
                    job,
                    JobStatus::Failed,
                    Some(ServiceError::new(ErrorKind::Failed, message)),
                );
            }
            SourceOutcome::InDoubt => {
                tracing::error!(
                    "the move's outcome is unknown, the guest stays paused here: {message}"
                );
                if let Some(vm) = &mut self.vm {
                    vm.state = VmState::InDoubt;
                }
                // A process that was about to end must not take the guest with it.
                if let Some((_, Some(reply_to))) = self.ending.take() {
                    reply_to(Err(ServiceError::wrong_state(
                        "the VM is in doubt: settle the job that moved it first",
                    )));
                }
                self.in_doubt = Some((job, machine));
                let advice = format!(
                    "{message}; find out whether the guest runs at the destination, then settle job {job} with \
                     runs_there or resume_here"
                );
                self.jobs.finish(
                    job,
                    JobStatus::InDoubt,
                    Some(ServiceError::new(ErrorKind::Failed, advice)),
                );
            }
        }
    }

    fn moved_away(&mut self, job: JobId) {
        self.stop_instance();
        if let Some(vm) = &mut self.vm {
            vm.state = VmState::MovedAway;
        }
        self.jobs.finish(job, JobStatus::Succeeded, None);
        self.guest_ended(ExitReason::MovedAway);
    }

    pub(super) fn settle(&mut self, id: JobId, settlement: Settlement) -> Reply {
        use migration::SourceMachine;
        let Some((job, mut machine)) = self.in_doubt.take_if(|(job, _)| *job == id) else {
            return Err(match self.jobs.get(id) {
                None => ServiceError::new(ErrorKind::NotFound, format!("there is no job {id}")),
                Some(_) => ServiceError::wrong_state(format!("job {id} is not in doubt")),
            });
        };
        match settlement {
            Settlement::RunsThere => {
                drop(machine);
                self.moved_away(job);
            }
            Settlement::ResumeHere => {
                machine.stop_dirty_tracking();
                let runs = machine.runs_after_resume();
                if let Err(error) = machine.resume() {
                    let message = format!("the guest cannot be resumed: {error}");
                    self.in_doubt = Some((job, machine));
                    return Err(ServiceError::new(ErrorKind::Failed, message));
                }
                if let Some(vm) = &mut self.vm {
                    vm.state = if runs {
                        VmState::Running
                    } else {
                        VmState::Paused
                    };
                }
                self.jobs.finish(
                    job,
                    JobStatus::Failed,
                    Some(ServiceError::new(
                        ErrorKind::Failed,
                        "settled by the operator: the guest resumed here",
                    )),
                );
            }
        }
        Ok(Response::Done)
    }

    pub(super) fn receive(&mut self, request: ReceiveMigration) -> Reply {
        self.no_vm()?;
        let url = parse_url(&request.receiver_url)?;
        let listener = Listener::bind(&url)
            .map_err(|error| ServiceError::new(ErrorKind::Failed, error_chain(&error)))?;
        let control = Arc::new(MoveControl::new());
        let local = listener.local_url().to_string();
        let job = self
            .jobs
            .start(JobKind::Receive, local, Arc::clone(&control));
        self.machines += 1;
        let number = self.machines;
        let hypervisor = request.hypervisor.or(self.hypervisor);
        let (events, worker_control) = (self.events.clone(), Arc::clone(&control));
        let spawned = std::thread::Builder::new()
            .name("move-in".into())
            .spawn(move || {
                let mut machine = MovingIn::new(
                    number,
                    hypervisor,
                    request.allow_tsc_change,
                    request.into(),
                    events.clone(),
                );
                let options = migration::ReceiveOptions::default();
                let result = migration::receive(&listener, &mut machine, &options, &worker_control)
                    .map_err(ReceiveFailure::Move)
                    .and_then(|report| {
                        machine
                            .into_arrived()
                            .map(|a| (report, a))
                            .ok_or(ReceiveFailure::Nothing)
                    });
                // Before anybody hears of the end, and listens there again.
                drop(listener);
                // Without a machine thread the process is ending.
                let _ = events.send(Event::ReceiveEnded(job, result));
            });
        self.started(job, JobKind::Receive, control, number, spawned)
    }

    pub(super) fn receive_ended(
        &mut self,
        job: JobId,
        result: Result<(migration::ReceiveReport, super::destination::Arrived), ReceiveFailure>,
    ) {
        let (arriving, early, ejected) = self
            .moving
            .take()
            .map(|moving| (moving.arriving, moving.early, moving.ejected))
            .unwrap_or_default();
        match result {
            Ok((_, arrived)) => {
                self.vm = Some(Vm::arrived(arrived));
                self.jobs.finish(job, JobStatus::Succeeded, None);
                // Its only copy runs here now. Who wanted to end this process did not know that.
                if let Some((_, Some(reply_to))) = self.ending.take() {
                    reply_to(Err(ServiceError::wrong_state(
                        "a machine has arrived meanwhile and runs here: ask again to power it off",
                    )));
                }
                for id in ejected {
                    self.ejected(arriving, &id);
                }
                for demand in early {
                    self.serve(demand);
                }
            }
            Err(ReceiveFailure::Move(error)) => {
                let message = error_chain(&error);
                tracing::warn!("no machine has arrived: {message}");
                let status = if error.is_cancelled() {
                    JobStatus::Cancelled
                } else {
                    JobStatus::Failed
                };
                self.jobs.finish(
                    job,
                    status,
                    Some(ServiceError::new(ErrorKind::Failed, message)),
                );
            }
            Err(ReceiveFailure::Nothing) => self.jobs.finish(
                job,
                JobStatus::Failed,
                Some(ServiceError::new(
                    ErrorKind::Internal,
                    "the move ended without a machine",
                )),
            ),
        }
    }

    pub(super) fn cancel_job(&mut self, id: JobId) -> Reply {
        match (self.jobs.running(id), self.jobs.get(id)) {
            (Some(control), _) if control.cancel() => Ok(Response::Done),
            (Some(_), _) => Err(ServiceError::wrong_state(format!(
                "job {id} has passed its commit point and cannot be cancelled any more"
            ))),
            (None, Some(_)) => Err(ServiceError::wrong_state(format!(
                "job {id} is not running any more"
            ))),
            (None, None) => Err(ServiceError::new(
                ErrorKind::NotFound,
                format!("there is no job {id}"),
            )),
        }
    }
}

fn parse_url(text: &str) -> Result<MoveUrl, ServiceError> {
    text.parse()
        .map_err(|error| ServiceError::new(ErrorKind::BadRequest, format!("{error}")))
}
