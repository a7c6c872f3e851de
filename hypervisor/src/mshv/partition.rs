//! One machine: memory, interrupts, I/O events, dirty log and time of a partition.

use std::sync::{Arc, Mutex};

use arch::x86_64::state::MachineClock;
use mshv_bindings::{
    MSHV_SET_MEM_BIT_EXECUTABLE, MSHV_SET_MEM_BIT_UNMAP, MSHV_SET_MEM_BIT_WRITABLE,
    mshv_user_mem_region,
};
use mshv_ioctls::{NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::dirty::Tracking;
use super::host::Host;
use super::{call, interrupts, time, vcpu};
use crate::emulated::Counters;
use crate::guest_memory::{self, Mapped, Memory, PAGE};
use crate::ioevents::IoEvents;
use crate::{Error, GsiRoute, IoEventAddress, IoEventMatch, MemorySlot, Msi, Result, Vcpu, Vm};

/// What a machine and its vCPUs share; the vCPUs keep it alive.
pub(crate) struct VmShared {
    /// The host it runs on.
    pub host: Arc<Host>,
    /// The partition.
    pub fd: VmFd,
    /// Its memory.
    pub memory: Memory,
    /// I/O events, those of ports here alone.
    pub io_events: IoEvents,
    /// VPs inside `run`.
    pub running: time::Running,
    /// Instructions that were emulated here.
    pub emulation: Counters,
    /// The guest has Hyper-V's interface.
    pub hyperv: bool,
    /// The TSC that vCPU 0 was restored with.
    pub first_tsc: Mutex<Option<u64>>,
}

/// A machine under the Microsoft hypervisor.
pub(crate) struct MshvVm {
    shared: Arc<VmShared>,
    tracking: Tracking,
}

impl MshvVm {
    /// Creates and initialises a partition, with Hyper-V's interface or without.
    pub(crate) fn new(host: Arc<Host>, hyperv: bool) -> Result<Self> {
        crate::signal::install_handler()?;
        let fd = host.create_partition(hyperv)?;
        let running = time::Running::frozen(&fd)?;
        Ok(Self {
            shared: Arc::new(VmShared {
                host,
                fd,
                memory: Memory::default(),
                io_events: IoEvents::default(),
                running,
                emulation: Counters::default(),
                hyperv,
                first_tsc: Mutex::default(),
            }),
            tracking: Tracking::default(),
        })
    }

    /// An I/O event of memory comes or goes. `mshv-ioctls` takes the size of the match from the type of its value.
    fn memory_event(
        &self,
        event: &EventFd,
        gpa: u64,
        when: IoEventMatch,
        what: Registration,
    ) -> Result<()> {
        let at = mshv_ioctls::IoEventAddress::Mmio(gpa);
        let fd = &self.shared.fd;
        macro_rules! of {
            ($value:expr) => {
                match what {
                    Registration::Add => fd.register_ioevent(event, &at, $value),
                    Registration::Remove => fd.unregister_ioevent(event, &at, $value),
                }
            };
        }
        match when {
            IoEventMatch::Any => of!(NoDatamatch),
            IoEventMatch::Value { size: 1, value } => of!(value as u8),
            IoEventMatch::Value { size: 2, value } => of!(value as u16),
            IoEventMatch::Value { size: 4, value } => of!(value as u32),
            IoEventMatch::Value { size: 8, value } => of!(value),
            IoEventMatch::Value { size, .. } => return Err(odd_size(size)),
        }
        .map_err(call("MSHV_IOEVENTFD"))
    }
}

/// Whether an I/O event comes or goes.
#[derive(Clone, Copy)]
enum Registration {
    Add,
    Remove,
}

fn odd_size(size: u8) -> Error {
    Error::Invalid(format!(
        "an I/O event cannot match writes of {size} bytes, only of 1, 2, 4 or 8"
    ))
}

/// The driver's description of a slot.
fn region(slot: MemorySlot) -> mshv_user_mem_region {
    let writable = u8::from(!slot.read_only) << MSHV_SET_MEM_BIT_WRITABLE;
    mshv_user_mem_region {
        size: slot.len,
        guest_pfn: slot.gpa / PAGE,
        userspace_addr: slot.hva,
        flags: writable | 1 << MSHV_SET_MEM_BIT_EXECUTABLE,
        ..Default::default()
    }
}

impl Vm for MshvVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(vcpu::MshvVcpu::new(Arc::clone(&self.shared), id)?))
    }

    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()> {
        guest_memory::check(slot)?;
        let mut slots = self.shared.memory.write();
        if slots.iter().any(|mapped| mapped.slot.slot == slot.slot) {
            return Err(Error::Invalid(format!(
                "memory slot {} is mapped already",
                slot.slot
            )));
        }
        self.shared
            .fd
            .map_user_memory(region(slot))
            .map_err(call("MSHV_SET_GUEST_MEMORY"))?;
        slots.push(Mapped {
            slot,
            emulated: None,
        });
        Ok(())
    }

    fn unmap_memory(&self, slot: MemorySlot) -> Result<()> {
        let mapped =
            self.shared.memory.slot(slot.slot).ok_or_else(|| {
                Error::Invalid(format!("memory slot {} is not mapped", slot.slot))
            })?;
        let unmapped = mshv_user_mem_region {
            flags: 1 << MSHV_SET_MEM_BIT_UNMAP,
            ..region(mapped)
        };
        let Self { shared, tracking } = self;
        tracking.unmap(&shared.fd, &shared.memory, mapped, || {
            shared
                .fd
                .unmap_user_memory(unmapped)
                .map_err(call("MSHV_SET_GUEST_MEMORY"))
        })
    }

    fn set_gsi_routes(&self, routes: &[GsiRoute]) -> Result<()> {
        interrupts::set_routes(&self.shared.fd, routes)
    }

    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.shared
            .fd
            .register_irqfd(event, gsi)
            .map_err(call("MSHV_IRQFD"))
    }

    fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.shared
            .fd
            .unregister_irqfd(event, gsi)
            .map_err(call("MSHV_IRQFD"))
    }

    fn register_ioevent(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
    ) -> Result<()> {
        if let IoEventMatch::Value { size, .. } = when
            && !matches!(size, 1 | 2 | 4 | 8)
        {
            return Err(odd_size(size));
        }
        self.shared.io_events.add(event, at, when)?;
        if let IoEventAddress::Mmio(gpa) = at
            && let Err(error) = self.memory_event(event, gpa, when, Registration::Add)
        {
            self.shared.io_events.remove(event, at, when)?;
            return Err(error);
        }
        Ok(())
    }

    fn unregister_ioevent(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
    ) -> Result<()> {
        self.shared.io_events.remove(event, at, when)?;
        match at {
            IoEventAddress::Pio(_) => Ok(()),
            IoEventAddress::Mmio(gpa) => self.memory_event(event, gpa, when, Registration::Remove),
        }
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        let Some(request) = interrupts::request(msi) else {
            // What hardware does with a message that no local APIC takes.
            tracing::debug!(?msi, "a message that is no interrupt is dropped");
            return Ok(());
        };
        self.shared
            .fd
            .request_virtual_interrupt(&request)
            .map_err(call("HVCALL_ASSERT_VIRTUAL_INTERRUPT"))
    }

    fn start_dirty_log(&self, slot: MemorySlot) -> Result<()> {
        self.tracking
            .start(&self.shared.fd, &self.shared.memory, slot)
    }

    fn stop_dirty_log(&self, slot: MemorySlot) -> Result<()> {
        self.tracking
            .stop(&self.shared.fd, &self.shared.memory, slot)
    }

    fn fetch_dirty_log(&self, slot: MemorySlot, words: &mut [u64]) -> Result<()> {
        self.tracking
            .fetch(&self.shared.fd, &self.shared.memory, slot, words)
    }

    fn clear_dirty_log(
        &self,
        _slot: MemorySlot,
        _first_page: u64,
        _pages: u64,
        _words: &[u64],
    ) -> Result<()> {
        // A fetch has re-armed already.
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.emulation.list()
    }

    fn clock(&self) -> Result<MachineClock> {
        time::clock(&self.shared.fd)
    }

    fn set_clock(&self, clock: &MachineClock) -> Result<()> {
        time::set_clock(&self.shared.fd, clock)
    }
}
