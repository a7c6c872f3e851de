//! The vCPU threads: started parked, run and parked together.
//!
//! ```text
//!            resume()                    pause(): mode := Parked, kick all, wait
//!   Parked ───────────► Running ───────────────────────────────────────────► Parked
//!      │                   │ reset, power off or fault: tell the machine, park alone
//!      └──────── stop() ───┴──► Ended (threads joined)
//! ```
//!
//! Whether a thread runs its vCPU, [`Gate`] decides; a machine has a thread for each vCPU that it may ever have, and that of one which is
//! absent waits there. A thread holds its vCPU's lock while it runs, and only then; whoever saves or restores takes the same lock after
//! [`VcpuSet::pause`] has returned. No kick is lost: a kick stays in force until a run has ended because of it,
//! so a thread that has passed the gate but not yet entered the guest comes back at once.

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use arch::x86_64::fresh::FreshState;
use arch::x86_64::state::VcpuState;
use hypervisor::{ExitBus, Vcpu, VcpuExit};

use super::demand::{Demand, Demands};
use super::gate::{Gate, Task};

struct Slot {
    vcpu: Arc<Mutex<Box<dyn Vcpu>>>,
    thread: Option<JoinHandle<()>>,
}

/// All vCPUs of one machine.
pub(crate) struct VcpuSet {
    gate: Arc<Gate>,
    slots: Mutex<Vec<Slot>>,
}

fn lock(vcpu: &Mutex<Box<dyn Vcpu>>) -> MutexGuard<'_, Box<dyn Vcpu>> {
    vcpu.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl VcpuSet {
    /// Starts one parked thread for each vCPU, by their ids from 0 on. `demands` hears what they want decided; `fresh` is what a vCPU becomes
    /// that comes or goes, where they can.
    pub(crate) fn start(
        vcpus: Vec<Box<dyn Vcpu>>,
        gate: &Arc<Gate>,
        fresh: Option<FreshState>,
        bus: &Arc<dyn ExitBus + Send + Sync>,
        demands: &Arc<Demands>,
    ) -> std::io::Result<Self> {
        let set = Self {
            gate: Arc::clone(gate),
            slots: Mutex::new(Vec::new()),
        };
        let kicks = vcpus.iter().map(|vcpu| vcpu.kick_handle()).collect();
        let fresh = Arc::new(fresh);
        for vcpu in vcpus {
            let id = vcpu.id();
            let vcpu = Arc::new(Mutex::new(vcpu));
            let own = Thread {
                id,
                vcpu: Arc::clone(&vcpu),
                gate: Arc::clone(gate),
                fresh: Arc::clone(&fresh),
                bus: Arc::clone(bus),
                demands: Arc::clone(demands),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(256 << 10)
                .spawn(move || own.serve())?;
            set.slots().push(Slot {
                vcpu,
                thread: Some(thread),
            });
        }
        gate.connect(kicks);
        Ok(set)
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Stops all vCPUs. On return none is inside the guest, and no access is half done.
    pub(crate) fn pause(&self) {
        self.gate.park();
    }

    /// Lets all vCPUs run that are there.
    pub(crate) fn resume(&self) {
        // A running vCPU's lock is held by its thread for as long as it runs.
        if !self.gate.is_parked() {
            return;
        }
        for slot in self.slots().iter() {
            if let Err(error) = lock(&slot.vcpu).notify_paused() {
                tracing::debug!(%error, "the guest's clock was not told of the pause");
            }
        }
        self.gate.run();
    }

    /// Ends all threads and drops the vCPUs.
    pub(crate) fn stop(&self) {
        self.pause();
        self.gate.end();
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

/// What the thread of one vCPU has.
struct Thread {
    id: u32,
    vcpu: Arc<Mutex<Box<dyn Vcpu>>>,
    gate: Arc<Gate>,
    fresh: Arc<Option<FreshState>>,
    bus: Arc<dyn ExitBus + Send + Sync>,
    demands: Arc<Demands>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.gate.panicked(self.id);
        }
    }
}

impl Thread {
    fn serve(self) {
        let (mut seen, mut stay) = (0, false);
        loop {
            let demand = match self.gate.next(self.id, seen, stay) {
                Task::End => return,
                Task::Reset => self.reset(),
                Task::Run(resume) => {
                    seen = resume;
                    self.run()
                }
            };
            stay = demand.is_some();
            if let Some(demand) = demand {
                self.demands.raise(demand);
            }
        }
    }

    /// Runs the guest until the thread is to park, because of what is returned or because the gate wants it.
    fn run(&self) -> Option<Demand> {
        loop {
            let exit = lock(&self.vcpu).run(self.bus.as_ref());
            return Some(match exit {
                Ok(VcpuExit::Interrupted | VcpuExit::Halt) => {
                    if self.gate.may_run(self.id) {
                        continue;
                    }
                    return None;
                }
                Ok(VcpuExit::Shutdown) => Demand::Shutdown,
                Ok(VcpuExit::Reset { triple_fault }) => {
                    if triple_fault {
                        tracing::info!("the guest resets by a triple fault");
                    }
                    Demand::Reset
                }
                Ok(VcpuExit::Fault(details)) => Demand::Fault(details.to_string()),
                Err(error) => Demand::Fault(super::error_chain(&error)),
            });
        }
    }

    /// Puts the vCPU into its state after reset. One that could not be must not run.
    fn reset(&self) -> Option<Demand> {
        let fresh = self.fresh.as_ref().as_ref()?.of(self.id);
        let mut vcpu = lock(&self.vcpu);
        // Reading the state makes the hypervisor act on an INIT or start-up that was sent to a vCPU which was not there.
        let done = vcpu.save_state().and_then(|_| vcpu.restore_state(&fresh));
        done.err().map(|error| {
            Demand::Fault(format!(
                "vCPU {} cannot be reset: {}",
                self.id,
                super::error_chain(&error)
            ))
        })
    }
}
