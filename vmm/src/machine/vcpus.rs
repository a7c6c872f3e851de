//! The vCPU threads: started parked, run and parked together.
//!
//! ```text
//!            resume()                    pause(): mode := Parked, kick all, wait
//!   Parked ───────────► Running ───────────────────────────────────────────► Parked
//!      │                   │ reset, power off or fault: tell the machine, park alone
//!      └──────── stop() ───┴──► Ended (threads joined)
//! ```
//!
//! A thread holds its vCPU's lock while it runs, and only then; whoever saves or restores takes the same lock after
//! [`VcpuSet::pause`] has returned. No kick is lost: a kick stays in force until a run has ended because of it,
//! so a thread that has passed the gate but not yet entered the guest comes back at once.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use arch::x86_64::state::VcpuState;
use hypervisor::{ExitBus, Vcpu, VcpuExit, VcpuKick};

use super::demand::{Demand, Demands};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Parked,
    Running,
    Ended,
}

struct Gate {
    mode: Mode,
    /// Threads that are not inside [`Vcpu::run`].
    parked: usize,
    /// Counts up at every resume, so that a thread which parked alone knows a new one.
    resumes: u64,
}

struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
}

impl Shared {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits, parked, until there is a resume that this thread has not seen. `None` ends the thread.
    fn wait_for_resume(&self, seen: u64, stay: bool) -> Option<u64> {
        let mut gate = self.gate();
        gate.parked += 1;
        self.changed.notify_all();
        loop {
            match gate.mode {
                Mode::Ended => return None,
                Mode::Running if !stay || gate.resumes != seen => {
                    gate.parked -= 1;
                    return Some(gate.resumes);
                }
                Mode::Running | Mode::Parked => {
                    gate = self
                        .changed
                        .wait(gate)
                        .unwrap_or_else(|poisoned| poisoned.into_inner());
                }
            }
        }
    }

    fn running(&self) -> bool {
        self.gate().mode == Mode::Running
    }
}

struct Slot {
    vcpu: Arc<Mutex<Box<dyn Vcpu>>>,
    kick: Arc<dyn VcpuKick>,
    thread: Option<JoinHandle<()>>,
}

/// All vCPUs of one machine.
pub(crate) struct VcpuSet {
    shared: Arc<Shared>,
    slots: Mutex<Vec<Slot>>,
}

fn lock(vcpu: &Mutex<Box<dyn Vcpu>>) -> MutexGuard<'_, Box<dyn Vcpu>> {
    vcpu.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl VcpuSet {
    /// Starts one parked thread for each vCPU. `demands` hears what they want decided.
    pub(crate) fn start(
        vcpus: Vec<Box<dyn Vcpu>>,
        bus: &Arc<dyn ExitBus + Send + Sync>,
        demands: &Arc<Demands>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            gate: Mutex::new(Gate {
                mode: Mode::Parked,
                parked: 0,
                resumes: 0,
            }),
            changed: Condvar::new(),
        });
        let set = Self {
            shared,
            slots: Mutex::new(Vec::new()),
        };
        for vcpu in vcpus {
            let (id, kick) = (vcpu.id(), vcpu.kick_handle());
            let vcpu = Arc::new(Mutex::new(vcpu));
            let (shared, bus) = (Arc::clone(&set.shared), Arc::clone(bus));
            let demands = Arc::clone(demands);
            let own = Arc::clone(&vcpu);
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(256 << 10)
                .spawn(move || run_loop(&own, &shared, bus.as_ref(), &demands))?;
            set.slots().push(Slot {
                vcpu,
                kick,
                thread: Some(thread),
            });
        }
        Ok(set)
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Stops all vCPUs. On return none is inside the guest, and no access is half done.
    pub(crate) fn pause(&self) {
        let mut gate = self.shared.gate();
        if gate.mode == Mode::Running {
            gate.mode = Mode::Parked;
        }
        drop(gate);
        let count = {
            let slots = self.slots();
            slots.iter().for_each(|slot| slot.kick.kick());
            slots.len()
        };
        let mut gate = self.shared.gate();
        while gate.parked < count && gate.mode == Mode::Parked {
            gate = self
                .shared
                .changed
                .wait(gate)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Lets all vCPUs run.
    pub(crate) fn resume(&self) {
        // A running vCPU's lock is held by its thread for as long as it runs.
        if self.shared.gate().mode != Mode::Parked {
            return;
        }
        for slot in self.slots().iter() {
            if let Err(error) = lock(&slot.vcpu).notify_paused() {
                tracing::debug!(%error, "the guest's clock was not told of the pause");
            }
        }
        let mut gate = self.shared.gate();
        if gate.mode == Mode::Parked {
            gate.mode = Mode::Running;
            gate.resumes += 1;
            self.shared.changed.notify_all();
        }
    }

    /// Ends all threads and drops the vCPUs.
    pub(crate) fn stop(&self) {
        self.pause();
        self.shared.gate().mode = Mode::Ended;
        self.shared.changed.notify_all();
        for mut slot in self.slots().drain(..) {
            if let Some(thread) = slot.thread.take()
                && thread.join().is_err()
            {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }

    /// Saves every vCPU. They must be paused.
    pub(crate) fn save(&self) -> hypervisor::Result<Vec<VcpuState>> {
        self.slots()
            .iter()
            .map(|slot| lock(&slot.vcpu).save_state())
            .collect()
    }

    /// Restores every vCPU from the state with its id. They must be paused.
    pub(crate) fn restore(&self, states: &[VcpuState]) -> hypervisor::Result<()> {
        let slots = self.slots();
        if states.len() != slots.len() {
            return Err(hypervisor::Error::Invalid(format!(
                "the state has {} vCPUs, the machine {}",
                states.len(),
                slots.len()
            )));
        }
        for slot in slots.iter() {
            let mut vcpu = lock(&slot.vcpu);
            let state = states
                .iter()
                .find(|state| state.id == vcpu.id())
                .ok_or_else(|| {
                    hypervisor::Error::Invalid(format!("the state lacks vCPU {}", vcpu.id()))
                })?;
            vcpu.restore_state(state)?;
        }
        Ok(())
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Counts a thread that panics as parked: nobody must wait for it.
struct PanicGuard<'a>(&'a Shared);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.gate().parked += 1;
            self.0.changed.notify_all();
        }
    }
}

fn run_loop(
    vcpu: &Mutex<Box<dyn Vcpu>>,
    shared: &Shared,
    bus: &(dyn ExitBus + Send + Sync),
    demands: &Demands,
) {
    let _guard = PanicGuard(shared);
    let mut seen = 0;
    let mut stay = false;
    while let Some(resume) = shared.wait_for_resume(seen, stay) {
        seen = resume;
        stay = false;
        let demand = loop {
            let exit = lock(vcpu).run(bus);
            match exit {
                Ok(VcpuExit::Interrupted | VcpuExit::Halt) if shared.running() => {}
                Ok(VcpuExit::Interrupted | VcpuExit::Halt) => break None,
                Ok(VcpuExit::Shutdown) => break Some(Demand::Shutdown),
                Ok(VcpuExit::Reset { triple_fault }) => {
                    if triple_fault {
                        tracing::info!("the guest resets by a triple fault");
                    }
                    break Some(Demand::Reset);
                }
                Ok(VcpuExit::Fault(details)) => break Some(Demand::Fault(details.to_string())),
                Err(error) => break Some(Demand::Fault(super::error_chain(&error))),
            }
        };
        if let Some(demand) = demand {
            stay = true;
            demands.raise(demand);
        }
    }
}
