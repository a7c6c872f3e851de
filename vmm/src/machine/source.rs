//! The machine as the source of a move: what the migration engine asks, answered by an [`Instance`].

use std::sync::Arc;

use memory::{GuestRam, PageBitmap};
use migration::{MachineError, MachineState, Manifest, RunState, SourceMachine};

use super::demand::Pending;
use super::devices::DeviceError;
use super::instance::Instance;

/// A machine on its way out.
pub(crate) struct MovingOut {
    instance: Arc<Instance>,
    /// What the guest does once it has arrived, and here if the move fails.
    run_state: RunState,
    tracking: bool,
    paused: bool,
}

impl MovingOut {
    pub(super) fn new(instance: Arc<Instance>, run_state: RunState) -> Self {
        Self {
            instance,
            run_state,
            tracking: false,
            paused: false,
        }
    }
}

impl SourceMachine for MovingOut {
    fn manifest(&mut self) -> Result<Manifest, MachineError> {
        self.instance.manifest()
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(self.instance.ram())
    }

    fn start_dirty_tracking(&mut self) -> Result<(), MachineError> {
        self.tracking = true;
        // Memory does not come or go while it is copied.
        if let Some(added) = self.instance.virtio_mem() {
            added.hold(true);
        }
        self.instance.write_back_disks();
        // What the loader and devices have written up to now is sent in the first round, like everything else.
        for (index, region) in self.instance.ram().regions().iter().enumerate() {
            let mut before = PageBitmap::new(region.pages());
            self.instance.ram().take_device_dirty(index, &mut before);
        }
        for slot in self.instance.memory_slots() {
            self.instance.vm().start_dirty_log(slot)?;
        }
        for (id, device) in self.instance.vhost() {
            let failed = |error| DeviceError::Function {
                id,
                source: Box::new(error),
            };
            device.start_logging().map_err(failed)?;
        }
        Ok(())
    }

    fn stop_dirty_tracking(&mut self) {
        if !std::mem::take(&mut self.tracking) {
            return;
        }
        for (_, device) in self.instance.vhost() {
            device.stop_logging();
        }
        if let Some(added) = self.instance.virtio_mem() {
            added.hold(false);
        }
        for slot in self.instance.memory_slots() {
            if let Err(error) = self.instance.vm().stop_dirty_log(slot) {
                tracing::warn!(%error, "the dirty log stays on; the guest only runs slower");
            }
        }
    }

    fn fetch_dirty(&mut self, region: usize, into: &mut PageBitmap) -> Result<(), MachineError> {
        let slot = self.instance.memory_slot(region)?;
        self.instance.vm().fetch_dirty_log(slot, into.words_mut())?;
        for (_, device) in self.instance.vhost() {
            device.collect_dirty();
        }
        self.instance.ram().take_device_dirty(region, into);
        Ok(())
    }

    fn rearm(&mut self, region: usize, first_page: u64, words: &[u64]) -> Result<(), MachineError> {
        let slot = self.instance.memory_slot(region)?;
        let pages = (words.len() as u64 * 64).min(slot.len / memory::PAGE_SIZE - first_page);
        self.instance
            .vm()
            .clear_dirty_log(slot, first_page, pages, words)?;
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.paused = true;
        self.instance.pause();
        // A back end that has gone has requests of the guest.
        self.instance.check_complete()?;
        // A reset or power-off that the guest has asked for is still to be done here: a guest that waits
        // for it must not arrive elsewhere, where nobody knows of it.
        match self.instance.demands().pending() {
            None => {
                self.instance.unlock_disks();
                Ok(())
            }
            Some(demand) => Err(Box::new(Pending(demand))),
        }
    }

    fn save_state(&mut self) -> Result<MachineState, MachineError> {
        Ok(self.instance.save(self.run_state)?)
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        if self.paused {
            // Without them it stays paused, and this can be tried again.
            self.instance.lock_disks_again()?;
            self.paused = false;
            if self.run_state == RunState::Running {
                self.instance.resume();
            }
        }
        Ok(())
    }
}

impl MovingOut {
    /// Whether [`SourceMachine::resume`] lets the guest run, or leaves it paused as it was.
    pub(super) fn runs_after_resume(&self) -> bool {
        self.run_state == RunState::Running
    }
}
