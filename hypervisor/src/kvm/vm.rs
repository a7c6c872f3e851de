//! One machine: memory slots, interrupts, I/O events and the paravirtual clock.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use arch::x86_64::layout;
use arch::x86_64::state::MachineClock;
use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API, KVM_CAP_X86_APIC_BUS_CYCLES_NS, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    kvm_clock_data, kvm_enable_cap, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::host::Host;
use super::state::msrs::ReadableMsrs;
use super::{call, routes, vcpu};
use crate::emulated::Counters;
use crate::guest_memory::{self, Mapped, Memory, PAGE};
use crate::ioevents::IoEvents;
use crate::{
    Error, GsiRoute, IoEventAddress, IoEventMatch, MemorySlot, Msi, Result, Vcpu, Vm, VmOptions,
};

const NS_PER_S: u64 = 1_000_000_000;
/// KVM's local APIC timer, unless KVM_CAP_X86_APIC_BUS_CYCLES_NS says otherwise (Documentation/virt/kvm/api.rst).
pub(super) const APIC_TIMER_HZ: u64 = NS_PER_S;

/// What a machine and its vCPUs share; the vCPUs keep it alive.
pub(crate) struct VmShared {
    /// The host it runs on.
    pub host: Arc<Host>,
    /// KVM's machine.
    pub fd: VmFd,
    /// Which MSRs this machine's vCPUs can read.
    pub readable_msrs: ReadableMsrs,
    /// The TSC of one of the vCPUs has been restored.
    pub tsc_written: AtomicBool,
    /// Its memory. A slot has marks for emulated writes exactly while KVM logs its dirty pages.
    pub memory: Memory,
    /// Instructions that were emulated here.
    pub emulation: Counters,
    /// I/O events, for writes that are emulated here.
    pub io_events: IoEvents,
}

/// A machine under KVM.
pub(crate) struct KvmVm {
    pub(super) shared: Arc<VmShared>,
    /// Reused by [`Vm::fetch_dirty_log`].
    pub(super) scratch: Mutex<Vec<u64>>,
}

impl KvmVm {
    /// Creates a machine with local APICs in the kernel and `options.ioapic_pins` GSIs kept for an IOAPIC outside.
    pub(crate) fn new(host: Arc<Host>, options: &VmOptions) -> Result<Self> {
        let fd = loop {
            match host.fd.create_vm() {
                // A signal (a profiler's, say) can interrupt the set-up of a machine's MMU notifier.
                Err(error) if error.errno() == libc::EINTR => {}
                answer => break answer.map_err(call("KVM_CREATE_VM"))?,
            }
        };
        let enable = |capability: u32, argument: u64, operation| {
            let mut request = kvm_enable_cap {
                cap: capability,
                ..Default::default()
            };
            request.args[0] = argument;
            fd.enable_cap(&request).map_err(call(operation))
        };
        enable(
            KVM_CAP_SPLIT_IRQCHIP,
            options.ioapic_pins.into(),
            "KVM_CAP_SPLIT_IRQCHIP",
        )?;
        if host.x2apic_api != 0 {
            enable(KVM_CAP_X2APIC_API, host.x2apic_api, "KVM_CAP_X2APIC_API")?;
        }
        if let Some(hz) = options.apic_timer_hz.filter(|&hz| hz != APIC_TIMER_HZ) {
            if !host.apic_bus_cycles || hz == 0 || !NS_PER_S.is_multiple_of(hz) {
                return Err(Error::Invalid(format!(
                    "this KVM's local APIC timers cannot run at {hz} Hz (KVM_CAP_X86_APIC_BUS_CYCLES_NS, Linux 6.11)"
                )));
            }
            enable(
                KVM_CAP_X86_APIC_BUS_CYCLES_NS,
                NS_PER_S / hz,
                "KVM_CAP_X86_APIC_BUS_CYCLES_NS",
            )?;
        }
        if host.exception_payload {
            enable(KVM_CAP_EXCEPTION_PAYLOAD, 1, "KVM_CAP_EXCEPTION_PAYLOAD")?;
        }
        if host.triple_fault_event {
            enable(
                KVM_CAP_X86_TRIPLE_FAULT_EVENT,
                1,
                "KVM_CAP_X86_TRIPLE_FAULT_EVENT",
            )?;
        }
        if host.dirty_protect != 0 {
            enable(
                KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                host.dirty_protect,
                "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
            )?;
        }
        // Intel hosts without "unrestricted guest" run real mode as a virtual-8086 task, which needs these pages; on
        // all others KVM ignores them. Both must be set before the first vCPU.
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(call("KVM_SET_TSS_ADDR"))?;
        crate::signal::install_handler()?;
        Ok(Self {
            shared: Arc::new(VmShared {
                host,
                fd,
                readable_msrs: ReadableMsrs::default(),
                tsc_written: AtomicBool::new(false),
                memory: Memory::default(),
                emulation: Counters::default(),
                io_events: IoEvents::default(),
            }),
            scratch: Mutex::default(),
        })
    }

    /// The slot as it was mapped, if it was with exactly this number and length.
    ///
    /// The dirty log's sizes follow from it, so a caller's mistake must not reach KVM.
    pub(super) fn mapped(&self, slot: MemorySlot) -> Result<MemorySlot> {
        let slots = self.shared.memory.read();
        match slots.iter().find(|known| known.slot.slot == slot.slot) {
            Some(known) if known.slot == slot => Ok(slot),
            Some(_) => Err(Error::Invalid(format!(
                "memory slot {} is mapped otherwise",
                slot.slot
            ))),
            None => Err(Error::Invalid(format!(
                "memory slot {} is not mapped",
                slot.slot
            ))),
        }
    }

    /// Tells KVM about a slot; `len` 0 removes it.
    ///
    /// # Safety
    ///
    /// As [`Vm::map_memory`].
    unsafe fn set_region(&self, slot: MemorySlot, len: u64, dirty_log: bool) -> Result<()> {
        let flags = if dirty_log {
            KVM_MEM_LOG_DIRTY_PAGES
        } else {
            0
        } | if slot.read_only { KVM_MEM_READONLY } else { 0 };
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags,
            guest_phys_addr: slot.gpa,
            memory_size: len,
            userspace_addr: slot.hva,
        };
        // SAFETY: the caller vouches for the mapping.
        unsafe { self.shared.fd.set_user_memory_region(region) }
            .map_err(call("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Switches tracking of a mapped slot. Answers whether it was switched.
    pub(super) fn set_dirty_log(&self, slot: MemorySlot, on: bool) -> Result<bool> {
        let mut slots = self.shared.memory.write();
        let Some(known) = slots.iter_mut().find(|known| known.slot == slot) else {
            return if on { self.missing(slot) } else { Ok(false) };
        };
        if known.emulated.is_some() == on {
            return Ok(false);
        }
        // SAFETY: the same mapping that `map_memory`'s caller has vouched for; only a flag changes.
        unsafe { self.set_region(slot, slot.len, on)? };
        known.emulated = on.then(|| guest_memory::marks(slot));
        Ok(true)
    }

    fn missing(&self, slot: MemorySlot) -> Result<bool> {
        Err(Error::Invalid(format!(
            "memory slot {} is not mapped as it is said to be",
            slot.slot
        )))
    }
}

/// The pages of a slot.
pub(super) fn pages(slot: MemorySlot) -> u64 {
    slot.len / PAGE
}

impl Vm for KvmVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(vcpu::KvmVcpu::new(Arc::clone(&self.shared), id)?))
    }

    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()> {
        guest_memory::check(slot)?;
        let mut slots = self.shared.memory.write();
        let known = slots.iter_mut().find(|known| known.slot.slot == slot.slot);
        // A slot that is mapped again stays tracked, and what was written to it stays marked.
        let dirty_log = known.as_ref().is_some_and(|known| known.emulated.is_some());
        // SAFETY: forwarded.
        unsafe { self.set_region(slot, slot.len, dirty_log)? };
        let mapped = Mapped {
            slot,
            emulated: dirty_log.then(|| guest_memory::marks(slot)),
        };
        match known {
            Some(known) if known.slot.len == slot.len => known.slot = slot,
            Some(known) => *known = mapped,
            None => slots.push(mapped),
        }
        Ok(())
    }

    fn unmap_memory(&self, slot: MemorySlot) -> Result<()> {
        let mut slots = self.shared.memory.write();
        let at = slots
            .iter()
            .position(|known| known.slot.slot == slot.slot)
            .ok_or_else(|| Error::Invalid(format!("memory slot {} is not mapped", slot.slot)))?;
        // SAFETY: a length of 0 removes the slot: KVM drops every use of the mapping.
        unsafe { self.set_region(slots[at].slot, 0, false)? };
        slots.remove(at);
        Ok(())
    }

    fn set_gsi_routes(&self, routes: &[GsiRoute]) -> Result<()> {
        let table = routes::to_kvm(routes)?;
        self.shared
            .fd
            .set_gsi_routing(&table)
            .map_err(call("KVM_SET_GSI_ROUTING"))
    }

    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.shared
            .fd
            .register_irqfd(event, gsi)
            .map_err(call("KVM_IRQFD"))
    }

    fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.shared
            .fd
            .unregister_irqfd(event, gsi)
            .map_err(call("KVM_IRQFD"))
    }

    fn register_ioevent(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
    ) -> Result<()> {
        self.ioevent(event, at, when, Registration::Add)
    }

    fn unregister_ioevent(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
    ) -> Result<()> {
        self.ioevent(event, at, when, Registration::Remove)
    }

    fn signal_msi(&self, msi: Msi) -> Result<()> {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // A positive answer means delivered, 0 that the guest has masked it: both are what hardware would do.
        self.shared
            .fd
            .signal_msi(message)
            .map_err(call("KVM_SIGNAL_MSI"))
            .map(drop)
    }

    fn start_dirty_log(&self, slot: MemorySlot) -> Result<()> {
        self.set_dirty_log(slot, true).map(drop)
    }

    fn stop_dirty_log(&self, slot: MemorySlot) -> Result<()> {
        self.set_dirty_log(slot, false).map(drop)
    }

    fn fetch_dirty_log(&self, slot: MemorySlot, words: &mut [u64]) -> Result<()> {
        self.fetch_dirty(slot, words)
    }

    fn clear_dirty_log(
        &self,
        slot: MemorySlot,
        first_page: u64,
        pages: u64,
        words: &[u64],
    ) -> Result<()> {
        self.clear_dirty(slot, first_page, pages, words)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.emulation.list()
    }

    fn clock(&self) -> Result<MachineClock> {
        let clock = self.shared.fd.get_clock().map_err(call("KVM_GET_CLOCK"))?;
        Ok(clock_from_kvm(&clock))
    }

    fn set_clock(&self, clock: &MachineClock) -> Result<()> {
        let data = clock_to_kvm(clock, self.shared.host.clock_realtime, crate::realtime_ns());
        self.shared
            .fd
            .set_clock(&data)
            .map_err(call("KVM_SET_CLOCK"))
    }
}

/// Whether an I/O event comes or goes.
#[derive(Clone, Copy)]
enum Registration {
    Add,
    Remove,
}

impl KvmVm {
    fn ioevent(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
        what: Registration,
    ) -> Result<()> {
        let known = &self.shared.io_events;
        match what {
            Registration::Add => known.add(event, at, when)?,
            Registration::Remove => known.remove(event, at, when)?,
        }
        let done = self.kernel_ioevent(event, at, when, what);
        if done.is_err() && matches!(what, Registration::Add) {
            known.remove(event, at, when)?;
        }
        done
    }

    fn kernel_ioevent(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
        what: Registration,
    ) -> Result<()> {
        let at = match at {
            IoEventAddress::Pio(port) => kvm_ioctls::IoEventAddress::Pio(port.into()),
            IoEventAddress::Mmio(gpa) => kvm_ioctls::IoEventAddress::Mmio(gpa),
        };
        match when {
            IoEventMatch::Any => self.ioevent_of(event, &at, NoDatamatch, what),
            IoEventMatch::Value { size: 1, value } => {
                self.ioevent_of(event, &at, value as u8, what)
            }
            IoEventMatch::Value { size: 2, value } => {
                self.ioevent_of(event, &at, value as u16, what)
            }
            IoEventMatch::Value { size: 4, value } => {
                self.ioevent_of(event, &at, value as u32, what)
            }
            IoEventMatch::Value { size: 8, value } => self.ioevent_of(event, &at, value, what),
            IoEventMatch::Value { size, .. } => Err(Error::Invalid(format!(
                "an I/O event cannot match writes of {size} bytes, only of 1, 2, 4 or 8"
            ))),
        }
    }

    /// `kvm-ioctls` takes the size of the match from the type of its value.
    fn ioevent_of<T: Into<u64>>(
        &self,
        event: &EventFd,
        at: &kvm_ioctls::IoEventAddress,
        value: T,
        what: Registration,
    ) -> Result<()> {
        let fd = &self.shared.fd;
        match what {
            Registration::Add => fd.register_ioevent(event, at, value),
            Registration::Remove => fd.unregister_ioevent(event, at, value),
        }
        .map_err(call("KVM_IOEVENTFD"))
    }
}

/// The neutral clock of KVM's.
fn clock_from_kvm(clock: &kvm_clock_data) -> MachineClock {
    let if_valid = |flag: u32, value| (clock.flags & flag != 0).then_some(value);
    MachineClock {
        guest_ns: clock.clock,
        host_realtime_ns: if_valid(KVM_CLOCK_REALTIME, clock.realtime),
        host_tsc: if_valid(KVM_CLOCK_HOST_TSC, clock.host_tsc),
    }
}

/// KVM's clock of the neutral one. KVM adds the time since `host_realtime_ns` where it can (and never goes back);
/// on an older kernel the same is done here, with the real time `now_ns`.
fn clock_to_kvm(clock: &MachineClock, kernel_adds: bool, now_ns: u64) -> kvm_clock_data {
    match clock.host_realtime_ns {
        Some(then) if kernel_adds => kvm_clock_data {
            clock: clock.guest_ns,
            flags: KVM_CLOCK_REALTIME,
            realtime: then,
            ..Default::default()
        },
        then => kvm_clock_data {
            clock: clock
                .guest_ns
                .saturating_add(now_ns.saturating_sub(then.unwrap_or(now_ns))),
            ..Default::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_advances_by_the_real_time_passed() {
        let saved = MachineClock {
            guest_ns: 1_000,
            host_realtime_ns: Some(50),
            host_tsc: None,
        };
        assert_eq!(clock_to_kvm(&saved, false, 80).clock, 1_030);
        assert_eq!(
            clock_to_kvm(&saved, false, 20).clock,
            1_000,
            "a clock set back does not take the guest back"
        );
        let by_kernel = clock_to_kvm(&saved, true, 80);
        assert_eq!(
            (by_kernel.clock, by_kernel.realtime, by_kernel.flags),
            (1_000, 50, KVM_CLOCK_REALTIME)
        );
        let unknown = MachineClock {
            host_realtime_ns: None,
            ..saved
        };
        assert_eq!(clock_to_kvm(&unknown, true, 80).clock, 1_000);
        assert_eq!(clock_to_kvm(&unknown, true, 80).flags, 0);
    }

    #[test]
    fn clock_fields_count_only_where_valid() {
        let mut kvm = kvm_clock_data {
            clock: 7,
            realtime: 8,
            host_tsc: 9,
            ..Default::default()
        };
        assert_eq!(
            clock_from_kvm(&kvm),
            MachineClock {
                guest_ns: 7,
                host_realtime_ns: None,
                host_tsc: None
            }
        );
        kvm.flags = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
        assert_eq!(
            clock_from_kvm(&kvm),
            MachineClock {
                guest_ns: 7,
                host_realtime_ns: Some(8),
                host_tsc: Some(9)
            }
        );
    }
}
