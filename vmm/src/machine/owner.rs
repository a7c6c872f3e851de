//! The decisions: what each request, demand and ended move does in each state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

use hypervisor::HypervisorKind;
use migration::{CpuContract, MoveControl};

use super::demand::Demand;
use super::hotplug::{CHANGEABLE, set_config};
use super::instance::{Instance, Plan};
use super::source::MovingOut;
use super::{Event, ExitReason, GuestEnd, error_chain};
use crate::config::VmConfig;
use crate::job::{JobId, JobKind, Jobs};
use crate::service::{
    ErrorKind, Reply, ReplyTo, Request, Response, ServiceError, SetPayload, VmInfo, VmState,
};

/// A machine: its config, and what runs it if it has been built.
pub(super) struct Vm {
    pub(super) config: VmConfig,
    /// What the guest was told of its processor when it was first built, here or elsewhere: a reboot changes nothing of it.
    pub(super) contract: Option<CpuContract>,
    /// Why it must not be booted again: nobody at this host has named what it boots from.
    pub(super) untold_boot: Option<String>,
    pub(super) state: VmState,
    pub(super) instance: Option<Arc<Instance>>,
}

/// A move, or the writing or reading of a snapshot, that goes on.
pub(super) struct Moving {
    pub(super) job: JobId,
    pub(super) kind: JobKind,
    pub(super) control: Arc<MoveControl>,
    /// Number of the machine that arrives, for [`JobKind::Receive`] and [`JobKind::Restore`].
    pub(super) arriving: u64,
    /// What the arriving guest asked for before this thread knew that it runs.
    pub(super) early: Vec<Demand>,
    /// What it let go of before.
    pub(super) ejected: Vec<String>,
}

/// Owns the machine.
pub(super) struct Owner {
    pub(super) guest_end: GuestEnd,
    /// Which hypervisor a machine gets that does not say it.
    pub(super) hypervisor: Option<HypervisorKind>,
    pub(super) events: Sender<Event>,
    pub(super) jobs: Jobs,
    pub(super) machines: u64,
    pub(super) vm: Option<Vm>,
    pub(super) moving: Option<Moving>,
    /// A move in doubt, with what it takes to bring the guest back.
    pub(super) in_doubt: Option<(JobId, Box<MovingOut>)>,
    /// Set when the process should end as soon as nothing is in the way.
    pub(super) ending: Option<(ExitReason, Option<ReplyTo>)>,
}

impl Owner {
    pub(super) fn new(
        guest_end: GuestEnd,
        hypervisor: Option<HypervisorKind>,
        events: Sender<Event>,
        jobs: Jobs,
    ) -> Self {
        Self {
            guest_end,
            hypervisor,
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
                Event::Ejected(machine, id) => self.ejected(machine, &id),
                Event::SendEnded(job, machine, result) => self.send_ended(job, machine, result),
                Event::ReceiveEnded(job, result) => self.receive_ended(job, result),
                Event::SnapshotEnded(job, result) => self.snapshot_ended(job, result),
                Event::RestoreEnded(job, result, resume) => self.restore_ended(job, result, resume),
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
            Request::CpuDump => self.cpu_dump(),
            Request::Pause => self.pause(),
            Request::Resume => self.resume(),
            Request::Reboot => self.reboot(),
            Request::Shutdown => self.shutdown(),
            Request::PowerButton => self.power_button(),
            Request::AddDisk(disk) => self.add_disk(*disk),
            Request::AddNet(net) => self.add_net(*net),
            Request::AddFs(fs) => self.add_fs(*fs),
            Request::AddVsock(vsock) => self.add_vsock(*vsock),
            Request::RemoveDevice(device) => self.remove_device(&device.id),
            Request::Payload(wanted) => self.payload(*wanted),
            Request::Resize(wanted) => self.resize(wanted),
            Request::ResizeDisk(wanted) => self.resize_disk(&wanted),
            Request::Delete => self.delete(),
            Request::Send(send) => self.send(&send),
            Request::Receive(receive) => self.receive(*receive),
            Request::Snapshot(snapshot) => self.snapshot(&snapshot),
            Request::Restore(restore) => self.restore(*restore),
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

    pub(super) fn vm(&mut self) -> Result<&mut Vm, ServiceError> {
        self.vm.as_mut().ok_or_else(|| {
            ServiceError::new(
                ErrorKind::NotFound,
                "there is no VM: create one with vm.create",
            )
        })
    }

    /// Refuses while a move goes on.
    pub(super) fn not_moving(&self) -> Result<(), ServiceError> {
        match &self.moving {
            None => Ok(()),
            Some(moving) => Err(ServiceError::wrong_state(format!(
                "job {} is {} the VM: wait for it or cancel it first",
                moving.job,
                match moving.kind {
                    JobKind::Send | JobKind::Receive => "moving",
                    JobKind::Snapshot => "writing a snapshot of",
                    JobKind::Restore => "restoring",
                }
            ))),
        }
    }

    /// Refuses while there is a VM, or one is on its way.
    pub(super) fn no_vm(&self) -> Result<(), ServiceError> {
        self.not_moving()?;
        match &self.vm {
            None => Ok(()),
            Some(vm) => Err(ServiceError::wrong_state(format!(
                "there already is a VM ({:?}): delete it first",
                vm.state
            ))),
        }
    }

    /// Refuses unless the VM is in one of `states` and no move goes on.
    pub(super) fn vm_in(&mut self, states: &[VmState], to: &str) -> Result<&mut Vm, ServiceError> {
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
        self.no_vm()?;
        config.normalise();
        config.hypervisor = config.hypervisor.or(self.hypervisor);
        config
            .validate()
            .map_err(|error| ServiceError::new(ErrorKind::BadRequest, error.to_string()))?;
        self.vm = Some(Vm {
            config,
            contract: None,
            untold_boot: None,
            state: VmState::Created,
            instance: None,
        });
        Ok(Response::Done)
    }

    fn boot(&mut self) -> Reply {
        self.vm_in(&[VmState::Created, VmState::Shutdown], "boot")?;
        self.start(0, false)
    }

    /// Refuses while a kernel that only another host has named would be read.
    fn bootable(&mut self) -> Result<(), ServiceError> {
        match &self.vm()?.untold_boot {
            None => Ok(()),
            Some(why) => Err(ServiceError::wrong_state(format!(
                "the VM cannot be booted again: {why}"
            ))),
        }
    }

    /// Takes the operator's word for what the VM boots from.
    fn payload(&mut self, wanted: SetPayload) -> Reply {
        let vm = self.vm_in(&CHANGEABLE, "change the payload of")?;
        let mut config = vm.config.clone();
        match (wanted.kernel, wanted.initramfs, wanted.trust_source) {
            (Some(kernel), initramfs, false) => {
                config.payload.kernel = Some(kernel);
                config.payload.initramfs = initramfs;
            }
            (None, None, true) => {}
            _ => {
                return Err(ServiceError::new(
                    ErrorKind::BadRequest,
                    "name the kernel, and the initramfs if there is one, or say trust_source and neither",
                ));
            }
        }
        config.payload.untold = false;
        set_config(vm, config);
        vm.untold_boot = None;
        Ok(Response::Done)
    }

    /// Builds the machine from its config and lets it run. Its watchdog has reset it so often before, and just now or not.
    fn start(&mut self, watchdog_resets: u64, by_watchdog: bool) -> Reply {
        self.bootable()?;
        self.machines += 1;
        let (number, events) = (self.machines, self.events.clone());
        let vm = self.vm()?;
        let plan = Plan::new(vm.config.clone(), vm.contract.clone());
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
                instance.was_reset(watchdog_resets, by_watchdog);
                instance.resume();
                vm.contract = Some(instance.contract().clone());
                // With what was chosen for it: slots, addresses.
                vm.config = instance.config();
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
            memory_actual_size: match &vm.instance {
                Some(instance) => {
                    let added = instance.virtio_mem();
                    config.memory.size + added.map_or(0, |added| added.plugged_bytes())
                }
                None => config.memory.wanted(),
            },
            state: vm.state,
            hypervisor: vm.instance.as_ref().map(|i| i.hypervisor_name().to_owned()),
            vcpus: vm.vcpu_info(),
            config,
            bootable: vm.untold_boot.is_none(),
            booted: vm.instance.as_ref().and_then(|i| i.booted()),
        })))
    }

    /// This host as the hypervisor sees it that runs machines here.
    fn cpu_dump(&self) -> Reply {
        let asked = self.vm.as_ref().and_then(|vm| vm.config.hypervisor);
        super::open_hypervisor(asked.or(self.hypervisor))
            .and_then(|hypervisor| crate::cpu::dump(&*hypervisor))
            .map(|dump| Response::CpuDump(Box::new(dump)))
            .map_err(|error| ServiceError::new(ErrorKind::Failed, error_chain(&error)))
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

    pub(super) fn resume(&mut self) -> Reply {
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
            instance
                .lock_disks()
                .map_err(|error| ServiceError::new(ErrorKind::Failed, error_chain(&error)))?;
            instance.resume();
        }
        vm.state = VmState::Running;
        Ok(Response::Done)
    }

    fn reboot(&mut self) -> Reply {
        self.vm_in(&[VmState::Running, VmState::Paused], "reboot")?;
        self.restart(false)
    }

    fn restart(&mut self, by_watchdog: bool) -> Reply {
        self.bootable()?;
        let instance = self.vm.as_ref().and_then(|vm| vm.instance.as_ref());
        let resets = instance.map_or(0, |instance| instance.watchdog_resets());
        self.stop_instance();
        self.start(resets + u64::from(by_watchdog), by_watchdog)
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

    pub(super) fn stop_instance(&mut self) {
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
            && matches!(moving.kind, JobKind::Receive | JobKind::Restore)
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

    pub(super) fn serve(&mut self, demand: Demand) {
        match demand {
            Demand::Reset | Demand::WatchdogReset => {
                if let Err(error) = self.restart(demand == Demand::WatchdogReset) {
                    tracing::error!(%error, "the guest asked for a reset but could not be started again");
                    self.stop_instance();
                    if let Some(vm) = &mut self.vm {
                        vm.state = VmState::Shutdown;
                    }
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

    pub(super) fn guest_ended(&mut self, reason: ExitReason) {
        if self.guest_end == GuestEnd::EndsProcess && self.ending.is_none() {
            self.ending = Some((reason, None));
        }
    }
}
