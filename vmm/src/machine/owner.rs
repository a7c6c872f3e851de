//! The decisions: what each request, demand and ended move does in each state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

use migration::{Listener, MoveControl, MoveUrl, RunState, SendOptions, SourceOutcome};

use super::demand::Demand;
use super::destination::MovingIn;
use super::instance::{Instance, Plan};
use super::source::MovingOut;
use super::{Event, ExitReason, GuestEnd, ReceiveFailure, error_chain};
use crate::config::VmConfig;
use crate::job::{JobId, JobKind, JobStatus, Jobs};
use crate::service::{
    ErrorKind, ReceiveMigration, Reply, ReplyTo, Request, Response, SendMigration, ServiceError,
    Settlement, TimeoutStrategy, VmInfo, VmState,
};

/// A machine: its config, and what runs it if it has been built.
struct Vm {
    config: VmConfig,
    state: VmState,
    instance: Option<Arc<Instance>>,
}

/// A move that goes on.
struct Moving {
    job: JobId,
    kind: JobKind,
    control: Arc<MoveControl>,
    /// Number of the machine that arrives, for [`JobKind::Receive`].
    arriving: u64,
    /// What the arriving guest asked for before this thread knew that it runs.
    early: Vec<Demand>,
}

/// Owns the machine.
pub(super) struct Owner {
    guest_end: GuestEnd,
    events: Sender<Event>,
    jobs: Jobs,
    machines: u64,
    vm: Option<Vm>,
    moving: Option<Moving>,
    /// A move in doubt, with what it takes to bring the guest back.
    in_doubt: Option<(JobId, Box<MovingOut>)>,
    /// Set when the process should end as soon as nothing is in the way.
    ending: Option<(ExitReason, Option<ReplyTo>)>,
}

impl Owner {
    pub(super) fn new(guest_end: GuestEnd, events: Sender<Event>, jobs: Jobs) -> Self {
        Self {
            guest_end,
            events,
            jobs,
            machines: 0,
            vm: None,
            moving: None,
            in_doubt: None,
            ending: None,
        }
    }

    /// Serves events until the process should end. The guest is stopped then.
    pub(super) fn run(mut self, inbox: &mpsc::Receiver<Event>) -> ExitReason {
        while let Ok(event) = inbox.recv() {
            match event {
                Event::Request(Request::VmmShutdown, reply_to) => self.vmm_shutdown(reply_to),
                Event::Request(request, reply_to) => {
                    let reply = self.request(request);
                    reply_to(reply);
                }
                Event::Demand(machine, demand) => self.demand(machine, demand),
                Event::SendEnded(job, machine, result) => self.send_ended(job, machine, result),
                Event::ReceiveEnded(job, result) => self.receive_ended(job, result),
            }
            if self.moving.is_none()
                && let Some((reason, reply_to)) = self.ending.take()
            {
                self.stop_instance();
                if let Some(reply_to) = reply_to {
                    reply_to(Ok(Response::Done));
                }
                return reason;
            }
        }
        self.stop_instance();
        ExitReason::Requested
    }

    fn request(&mut self, request: Request) -> Reply {
        match request {
            Request::Create(config) => self.create(*config),
            Request::Boot => self.boot(),
            Request::Info => self.info(),
            Request::Counters => self.counters(),
            Request::Pause => self.pause(),
            Request::Resume => self.resume(),
            Request::Reboot => self.reboot(),
            Request::Shutdown => self.shutdown(),
            Request::PowerButton => self.power_button(),
            Request::Delete => self.delete(),
            Request::Send(send) => self.send(&send),
            Request::Receive(receive) => self.receive(receive),
            Request::Jobs => Ok(Response::Jobs(self.jobs.list())),
            Request::Job(id) => self
                .jobs
                .get(id)
                .map(|job| Response::Job(Box::new(job)))
                .ok_or_else(|| {
                    ServiceError::new(ErrorKind::NotFound, format!("there is no job {id}"))
                }),
            Request::CancelJob(id) => self.cancel_job(id),
            Request::SettleJob(id, settlement) => self.settle(id, settlement),
            Request::VmmShutdown => Err(ServiceError::new(
                ErrorKind::Internal,
                "vmm.shutdown reached the wrong place",
            )),
        }
    }

    fn vm(&mut self) -> Result<&mut Vm, ServiceError> {
        self.vm.as_mut().ok_or_else(|| {
            ServiceError::new(
                ErrorKind::NotFound,
                "there is no VM: create one with vm.create",
            )
        })
    }

    /// Refuses while a move goes on.
    fn not_moving(&self) -> Result<(), ServiceError> {
        match &self.moving {
            None => Ok(()),
            Some(moving) => Err(ServiceError::wrong_state(format!(
                "job {} is moving the VM: wait for it or cancel it first",
                moving.job
            ))),
        }
    }

    /// Refuses unless the VM is in one of `states` and no move goes on.
    fn vm_in(&mut self, states: &[VmState], to: &str) -> Result<&mut Vm, ServiceError> {
        self.not_moving()?;
        let vm = self.vm()?;
        if states.contains(&vm.state) {
            return Ok(vm);
        }
        let advice = match vm.state {
            VmState::InDoubt => "settle the job that moved it first",
            VmState::MovedAway => "it has moved away: delete it to use this process anew",
            VmState::Created | VmState::Shutdown => "boot it first",
            VmState::Paused => "resume it first",
            VmState::Running => "pause it or shut it down first",
        };
        Err(ServiceError::wrong_state(format!(
            "cannot {to} a VM that is {:?}: {advice}",
            vm.state
        )))
    }

    fn create(&mut self, mut config: VmConfig) -> Reply {
        self.not_moving()?;
        if let Some(vm) = &self.vm {
            return Err(ServiceError::wrong_state(format!(
                "there already is a VM ({:?}): delete it first",
                vm.state
            )));
        }
        config.normalise();
        config
            .validate()
            .map_err(|error| ServiceError::new(ErrorKind::BadRequest, error.to_string()))?;
        self.vm = Some(Vm {
            config,
            state: VmState::Created,
            instance: None,
        });
        Ok(Response::Done)
    }

    fn boot(&mut self) -> Reply {
        self.vm_in(&[VmState::Created, VmState::Shutdown], "boot")?;
        self.start()
    }

    /// Builds the machine from its config and lets it run.
    fn start(&mut self) -> Reply {
        self.machines += 1;
        let (number, events) = (self.machines, self.events.clone());
        let vm = self.vm()?;
        let plan = Plan::booting(vm.config.clone());
        let instance = Instance::build(plan, number, &events)
            .and_then(|instance| instance.load().map(|()| instance))
            .map_err(|error| {
                ServiceError::new(
                    if error.is_request() {
                        ErrorKind::BadRequest
                    } else {
                        ErrorKind::Failed
                    },
                    error_chain(&error),
                )
            });
        match instance {
            Ok(instance) => {
                instance.resume();
                vm.instance = Some(Arc::new(instance));
                vm.state = VmState::Running;
                Ok(Response::Done)
            }
            Err(error) => {
                if vm.state != VmState::Created {
                    vm.state = VmState::Shutdown;
                }
                Err(error)
            }
        }
    }

    fn info(&mut self) -> Reply {
        let vm = self.vm()?;
        let mut config = vm.config.clone();
        if let Some(instance) = &vm.instance {
            instance.fill_in(&mut config);
        }
        Ok(Response::Info(Box::new(VmInfo {
            memory_actual_size: config.memory.size,
            state: vm.state,
            hypervisor: vm.instance.as_ref().map(|i| i.hypervisor_name().to_owned()),
            config,
        })))
    }

    fn counters(&mut self) -> Reply {
        let vm = self.vm()?;
        Ok(Response::Counters(
            vm.instance
                .as_ref()
                .map_or_else(BTreeMap::new, |instance| instance.counters()),
        ))
    }

    fn pause(&mut self) -> Reply {
        let vm = self.vm_in(&[VmState::Running], "pause")?;
        if let Some(instance) = &vm.instance {
            instance.pause();
        }
        vm.state = VmState::Paused;
        Ok(Response::Done)
    }

    fn resume(&mut self) -> Reply {
        let vm = self.vm_in(&[VmState::Paused], "resume")?;
        if let Some(Demand::Fault(reason)) = vm
            .instance
            .as_ref()
            .and_then(|instance| instance.demands().pending())
        {
            return Err(ServiceError::wrong_state(format!(
                "the guest cannot go on ({reason}): reboot it or shut it down"
            )));
        }
        if let Some(instance) = &vm.instance {
            instance.resume();
        }
        vm.state = VmState::Running;
        Ok(Response::Done)
    }

    fn reboot(&mut self) -> Reply {
        self.vm_in(&[VmState::Running, VmState::Paused], "reboot")?;
        self.restart()
    }

    fn restart(&mut self) -> Reply {
        self.stop_instance();
        self.start()
    }

    fn shutdown(&mut self) -> Reply {
        self.vm_in(&[VmState::Running, VmState::Paused], "shut down")?;
        self.stop_instance();
        self.vm()?.state = VmState::Shutdown;
        Ok(Response::Done)
    }

    fn power_button(&mut self) -> Reply {
        let vm = self.vm_in(&[VmState::Running], "press the power button of")?;
        if let Some(instance) = &vm.instance {
            instance.press_power_button();
        }
        Ok(Response::Done)
    }

    fn delete(&mut self) -> Reply {
        self.not_moving()?;
        if self.vm()?.state == VmState::InDoubt {
            return Err(ServiceError::wrong_state(
                "the VM is in doubt: settle the job that moved it first",
            ));
        }
        self.stop_instance();
        self.vm = None;
        Ok(Response::Done)
    }

    fn stop_instance(&mut self) {
        if let Some(instance) = self.vm.as_mut().and_then(|vm| vm.instance.take()) {
            instance.stop();
        }
    }

    fn vmm_shutdown(&mut self, reply_to: ReplyTo) {
        if self.in_doubt.is_some() {
            reply_to(Err(ServiceError::wrong_state(
                "the VM is in doubt, and ending this process could lose it: settle the job that moved it first",
            )));
            return;
        }
        if let Some(moving) = &self.moving {
            moving.control.cancel();
        }
        if let Some((_, Some(earlier))) =
            self.ending.replace((ExitReason::Requested, Some(reply_to)))
        {
            earlier(Ok(Response::Done));
        }
    }

    // --- what the guest asks for ---

    fn demand(&mut self, machine: u64, demand: Demand) {
        if let Some(moving) = &mut self.moving
            && moving.kind == JobKind::Receive
            && moving.arriving == machine
        {
            moving.early.push(demand);
            return;
        }
        let current = self
            .vm
            .as_ref()
            .and_then(|vm| vm.instance.as_ref())
            .map(|i| i.number());
        if current != Some(machine) {
            return; // of a machine that has been stopped
        }
        tracing::info!("{demand}");
        if let Some(moving) = &self.moving {
            // Served when the move has ended, which it does here: pausing refuses while a demand is pending.
            moving.control.cancel();
            return;
        }
        self.serve(demand);
    }

    fn serve(&mut self, demand: Demand) {
        match demand {
            Demand::Reset => {
                if let Err(error) = self.restart() {
                    tracing::error!(%error, "the guest asked for a reset but could not be started again");
                    self.guest_ended(ExitReason::Fault(error.message));
                }
            }
            Demand::Shutdown => {
                self.stop_instance();
                if let Some(vm) = &mut self.vm {
                    vm.state = VmState::Shutdown;
                }
                self.guest_ended(ExitReason::PowerOff);
            }
            Demand::Fault(reason) => {
                tracing::error!("the guest cannot go on: {reason}");
                if let Some(vm) = &mut self.vm {
                    if let Some(instance) = &vm.instance {
                        instance.pause();
                    }
                    vm.state = VmState::Paused;
                }
                self.guest_ended(ExitReason::Fault(reason));
            }
        }
    }

    fn guest_ended(&mut self, reason: ExitReason) {
        if self.guest_end == GuestEnd::EndsProcess && self.ending.is_none() {
            self.ending = Some((reason, None));
        }
    }

    // --- moves ---

    fn send(&mut self, request: &SendMigration) -> Reply {
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
        let options = SendOptions {
            downtime_ms: request.downtime_ms,
            timeout_s: request.timeout_s,
            timeout_strategy: match request.timeout_strategy {
                TimeoutStrategy::Cancel => migration::TimeoutStrategy::Cancel,
                TimeoutStrategy::Ignore => migration::TimeoutStrategy::Ignore,
            },
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

    fn started(
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
        });
        Ok(Response::JobStarted(job))
    }

    fn send_ended(
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

    fn settle(&mut self, id: JobId, settlement: Settlement) -> Reply {
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

    fn receive(&mut self, request: ReceiveMigration) -> Reply {
        self.not_moving()?;
        if let Some(vm) = &self.vm {
            return Err(ServiceError::wrong_state(format!(
                "there already is a VM ({:?}): delete it first",
                vm.state
            )));
        }
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
        let (events, worker_control) = (self.events.clone(), Arc::clone(&control));
        let spawned = std::thread::Builder::new()
            .name("move-in".into())
            .spawn(move || {
                let mut machine = MovingIn::new(number, request.serial, events.clone());
                let options = migration::ReceiveOptions::default();
                let result = migration::receive(&listener, &mut machine, &options, &worker_control)
                    .map_err(ReceiveFailure::Move)
                    .and_then(|report| {
                        machine
                            .into_arrived()
                            .map(|a| (report, a))
                            .ok_or(ReceiveFailure::Nothing)
                    });
                // Without a machine thread the process is ending.
                let _ = events.send(Event::ReceiveEnded(job, result));
            });
        self.started(job, JobKind::Receive, control, number, spawned)
    }

    fn receive_ended(
        &mut self,
        job: JobId,
        result: Result<(migration::ReceiveReport, super::destination::Arrived), ReceiveFailure>,
    ) {
        let early = self
            .moving
            .take()
            .map(|moving| moving.early)
            .unwrap_or_default();
        match result {
            Ok((_, arrived)) => {
                self.vm = Some(Vm {
                    config: arrived.instance.config().clone(),
                    state: match arrived.run_state {
                        RunState::Running => VmState::Running,
                        RunState::Paused => VmState::Paused,
                    },
                    instance: Some(arrived.instance),
                });
                self.jobs.finish(job, JobStatus::Succeeded, None);
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

    fn cancel_job(&mut self, id: JobId) -> Reply {
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
