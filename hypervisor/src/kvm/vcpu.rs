//! One vCPU and its run loop.
//!
//! ```text
//!            ┌──────────────────────────────────────────────┐
//!   run ──► KVM_RUN ─┬─ I/O, MMIO, EOI ──► ExitBus ─────────┘ (the next KVM_RUN completes the access)
//!                    ├─ EAGAIN (INIT taken) ────────────────┤
//!                    ├─ cannot emulate ──► rescue.rs ───────┘
//!                    ├─ EINTR ──► Interrupted
//!                    └─ the rest ──► Halt, Shutdown, Reset, Fault
//! ```
//!
//! KVM completes a port or MMIO access at the start of the next KVM_RUN, and looks at `immediate_exit` only after that. The loop goes
//! back into KVM after every access, so `Interrupted` is returned only when the access has reached the
//! guest's registers: nothing is half done, and a state saved then is complete.

use std::ptr::{addr_of, addr_of_mut};
use std::sync::Arc;

use arch::x86_64::cpuid::Cpuid;
use arch::x86_64::state::VcpuState;
use kvm_bindings::{
    KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN,
    KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SET_TPR,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_MAX_CPUID_ENTRIES, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::VcpuFd;

use super::kick::KickHandle;
use super::rescue::{Rescue, Rescued};
use super::vm::VmShared;
use super::{call, cpuid, ioctl, state};
use crate::{ExitBus, Result, Vcpu, VcpuExit, VcpuKick};

/// A vCPU under KVM.
pub(crate) struct KvmVcpu {
    /// Owns the mapping that `page` points to. Neither its `run` nor its `get_kvm_run` is used after
    /// [`KvmVcpu::new`], since they make references to a page that the kernel and kickers write to.
    pub(super) fd: VcpuFd,
    pub(super) page: RunPage,
    pub(super) vm: Arc<VmShared>,
    pub(super) id: u32,
    /// CPUID offers VMX or SVM, so that nested state may exist.
    pub(super) nests: bool,
    /// What is remembered of instructions that were emulated here.
    pub(super) rescued: Rescued,
    kick: Arc<KickHandle>,
    /// The thread that has the kick signal unblocked.
    unblocked: Option<libc::pthread_t>,
}

impl KvmVcpu {
    /// Creates vCPU `id` of a machine.
    pub(crate) fn new(vm: Arc<VmShared>, id: u32) -> Result<Self> {
        let mut fd = vm
            .fd
            .create_vcpu(id.into())
            .map_err(call("KVM_CREATE_VCPU"))?;
        let page = RunPage {
            run: std::ptr::from_mut(fd.get_kvm_run()),
            len: vm.fd.run_size(),
        };
        // SAFETY: `fd` keeps the page mapped, and `Drop` disconnects before `fd` is dropped.
        let kick = Arc::new(unsafe { KickHandle::new(addr_of_mut!((*page.run).immediate_exit)) });
        Ok(Self {
            fd,
            page,
            vm,
            id,
            nests: false,
            rescued: Rescued::default(),
            kick,
            unblocked: None,
        })
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.disconnect();
    }
}

/// The page (or pages) that KVM and we share about one vCPU.
pub(super) struct RunPage {
    run: *mut kvm_run,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; `KvmVcpu` is used by one thread at a time, and the one
// field that others touch (`immediate_exit`) is accessed atomically by all.
unsafe impl Send for RunPage {}

/// Reads a field of the run page.
macro_rules! field {
    ($page:expr, $($path:tt)+) => {
        // SAFETY: the mapping is at least one `kvm_run` long and lives as long as the `VcpuFd` beside it. The kernel writes
        // it only during KVM_RUN, which this thread is not in. Every bit pattern is valid for these integer fields.
        unsafe { addr_of!((*$page.run).$($path)+).read_volatile() }
    };
}

impl RunPage {
    pub(super) fn exit_reason(&self) -> u32 {
        field!(self, exit_reason)
    }

    pub(super) fn fail_entry(&self) -> kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_2 {
        field!(self, __bindgen_anon_1.fail_entry)
    }

    pub(super) fn internal(&self) -> kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_13 {
        field!(self, __bindgen_anon_1.internal)
    }

    pub(super) fn memory_fault(&self) -> (u64, u64) {
        let fault = field!(self, __bindgen_anon_1.memory_fault);
        (fault.gpa, fault.size)
    }

    /// Type and first datum of a system event.
    pub(super) fn system_event(&self) -> (u32, u64) {
        let event = field!(self, __bindgen_anon_1.system_event);
        // SAFETY: both members of the union are plain integers.
        (event.type_, unsafe { event.__bindgen_anon_1.flags })
    }

    /// Copies `into.len()` bytes from `offset` on; all zero if the kernel names a place outside the mapping.
    fn read(&self, offset: usize, into: &mut [u8]) {
        if offset
            .checked_add(into.len())
            .is_some_and(|end| end <= self.len)
        {
            // SAFETY: inside the mapping, as just checked; nothing else accesses these bytes outside KVM_RUN.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    self.run.cast::<u8>().add(offset),
                    into.as_mut_ptr(),
                    into.len(),
                );
            };
        }
    }

    /// Copies `from` to `offset`, unless that is outside the mapping.
    fn write(&mut self, offset: usize, from: &[u8]) {
        if offset
            .checked_add(from.len())
            .is_some_and(|end| end <= self.len)
        {
            // SAFETY: as in `read`.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    from.as_ptr(),
                    self.run.cast::<u8>().add(offset),
                    from.len(),
                );
            };
        }
    }

    /// Serves KVM_EXIT_IO: `count` accesses of `size` bytes to one port, as string instructions make them.
    fn serve_io(&mut self, bus: &dyn ExitBus) {
        let io = field!(self, __bindgen_anon_1.io);
        let size = usize::from(io.size).min(4);
        let mut buffer = [0u8; 4];
        let data = &mut buffer[..size];
        for index in 0..io.count as usize {
            let offset = io.data_offset as usize + index * size;
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                data.fill(0xff);
                bus.pio_read(io.port, data);
                self.write(offset, data);
            } else {
                self.read(offset, data);
                bus.pio_write(io.port, data);
            }
        }
    }

    /// Serves KVM_EXIT_MMIO.
    fn serve_mmio(&mut self, bus: &dyn ExitBus) {
        let mut mmio = field!(self, __bindgen_anon_1.mmio);
        let len = (mmio.len as usize).min(mmio.data.len());
        if mmio.is_write != 0 {
            bus.mmio_write(mmio.phys_addr, &mmio.data[..len]);
        } else {
            mmio.data.fill(0xff);
            bus.mmio_read(mmio.phys_addr, &mut mmio.data[..len]);
            // SAFETY: as in `field!`, for writing.
            unsafe {
                addr_of_mut!((*self.run).__bindgen_anon_1.mmio.data).write_volatile(mmio.data);
            };
        }
    }
}

impl Vcpu for KvmVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<()> {
        let table = cpuid::to_kvm(cpuid)?;
        self.fd.set_cpuid2(&table).map_err(call("KVM_SET_CPUID2"))?;
        self.nests = cpuid::offers_virtualisation(cpuid);
        // Which MSRs can be read depends on what CPUID offers.
        self.vm.readable_msrs.forget();
        Ok(())
    }

    fn cpuid(&self) -> Result<Cpuid> {
        let table = self
            .fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_CPUID2"))?;
        Ok(cpuid::from_kvm(table.as_slice()))
    }

    fn tsc_khz(&self) -> Option<u32> {
        // KVM has no answer on a host with an unstable TSC; the guest was told no frequency then.
        self.fd.get_tsc_khz().ok().filter(|&khz| khz != 0)
    }

    fn run(&mut self, bus: &dyn ExitBus) -> Result<VcpuExit> {
        // SAFETY: always succeeds and touches nothing.
        let this_thread = unsafe { libc::pthread_self() };
        if self.unblocked != Some(this_thread) {
            crate::signal::unblock_on_this_thread()?;
            self.unblocked = Some(this_thread);
        }
        let kick = Arc::clone(&self.kick);
        let running = kick.running();
        loop {
            match ioctl::run(&self.fd) {
                Ok(()) => self.software_delivered(),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {
                        self.take_back_software()?;
                        running.acknowledge();
                        return Ok(VcpuExit::Interrupted);
                    }
                    // A vCPU that waited for its INIT or start-up IPI has got it.
                    Some(libc::EAGAIN) => continue,
                    Some(libc::EFAULT | libc::EHWPOISON) => {
                        return Ok(VcpuExit::Fault(self.memory_fault(&error)));
                    }
                    _ => return Err(call("KVM_RUN")(error)),
                },
            }
            match self.page.exit_reason() {
                KVM_EXIT_IO => self.page.serve_io(bus),
                KVM_EXIT_MMIO => self.page.serve_mmio(bus),
                KVM_EXIT_IOAPIC_EOI => {
                    bus.end_of_interrupt(field!(self.page, __bindgen_anon_1.eoi.vector));
                }
                // Only asked for by a user-space local APIC, which there is not.
                KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_SET_TPR => {}
                KVM_EXIT_INTR => {
                    running.acknowledge();
                    return Ok(VcpuExit::Interrupted);
                }
                KVM_EXIT_HLT => return Ok(VcpuExit::Halt),
                KVM_EXIT_SHUTDOWN => return Ok(VcpuExit::Reset { triple_fault: true }),
                KVM_EXIT_SYSTEM_EVENT => match self.page.system_event().0 {
                    KVM_SYSTEM_EVENT_SHUTDOWN => return Ok(VcpuExit::Shutdown),
                    KVM_SYSTEM_EVENT_RESET => {
                        return Ok(VcpuExit::Reset {
                            triple_fault: false,
                        });
                    }
                    _ => return Ok(VcpuExit::Fault(self.fault())),
                },
                KVM_EXIT_INTERNAL_ERROR => {
                    let Some(bytes) = self.page.failed_emulation() else {
                        return Ok(VcpuExit::Fault(self.fault()));
                    };
                    match self.rescue(&bytes, bus)? {
                        Rescue::GoesOn => continue,
                        Rescue::Failed(why) => {
                            let mut fault = self.fault();
                            fault.reason = format!("{}; here: {why}", fault.reason);
                            return Ok(VcpuExit::Fault(fault));
                        }
                    }
                }
                _ => return Ok(VcpuExit::Fault(self.fault())),
            }
        }
    }

    fn kick_handle(&self) -> Arc<dyn VcpuKick> {
        Arc::clone(&self.kick) as Arc<dyn VcpuKick>
    }

    fn save_state(&self) -> Result<VcpuState> {
        state::save(self)
    }

    fn restore_state(&mut self, state: &VcpuState) -> Result<()> {
        state::restore(self, state)
    }

    fn notify_paused(&self) -> Result<()> {
        match self.fd.kvmclock_ctrl() {
            // This guest has not switched the clock on, or this KVM has no such call.
            Err(error) if matches!(error.errno(), libc::EINVAL | libc::ENOTTY) => Ok(()),
            answer => answer.map_err(call("KVM_KVMCLOCK_CTRL")),
        }
    }
}
