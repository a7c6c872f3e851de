//! The object-safe traits and the types that cross them.

use std::sync::Arc;

use arch::x86_64::cpuid::Cpuid;
use arch::x86_64::state::{MachineClock, Msr, VcpuState};
use vmm_sys_util::eventfd::EventFd;

use crate::{Error, Result};

/// Which back end runs a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HypervisorKind {
    /// Linux KVM, `/dev/kvm`.
    Kvm,
    /// The Microsoft hypervisor, `/dev/mshv`.
    Mshv,
}

impl HypervisorKind {
    /// Every back end.
    pub const ALL: [Self; 2] = [Self::Kvm, Self::Mshv];

    /// Its name in configs, messages and manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Mshv => "mshv",
        }
    }
}

impl std::fmt::Display for HypervisorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for HypervisorKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| Error::Invalid(format!("`{name}` is not a hypervisor; use kvm or mshv")))
    }
}

/// Abilities a host may lack. The default is "no" to all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Most vCPUs one machine may have.
    pub max_vcpus: u32,
    /// Most memory slots one machine may have.
    pub max_memory_slots: u32,
    /// [`Vm::clear_dirty_log`] re-arms page by page; without it a fetch re-arms all at once.
    pub manual_dirty_protect: bool,
    /// With the above: tracking starts with every page dirty and unarmed, which makes starting cheap.
    pub dirty_initially_all_set: bool,
    /// The guest's TSC frequency can be set to another than the host's.
    pub tsc_scaling: bool,
    /// Nested state can really be read and written (tried, not only reported).
    pub nested_state: bool,
}

/// A host's hypervisor.
pub trait Hypervisor: Send + Sync {
    /// Which one this is.
    fn kind(&self) -> HypervisorKind;
    /// What this host can do.
    fn capabilities(&self) -> Capabilities;
    /// Everything CPUID can show a guest on this host, before any policy and before per-vCPU fields.
    fn supported_cpuid(&self) -> Result<Cpuid>;
    /// The leaves of Hyper-V's interface that this host can show a guest and back with what they promise. By default
    /// none.
    fn enlightenments(&self) -> Result<Cpuid> {
        Ok(Cpuid::default())
    }
    /// How fast the local APIC's timer of a guest runs, if it is known: a guest that has measured it keeps counting with it.
    fn apic_timer(&self) -> Result<Option<ApicTimer>> {
        Ok(None)
    }
    /// The MSRs that tell a guest what its processor can do, as far as this host can give them, with all that it can give. By default none.
    fn feature_msrs(&self) -> Result<Vec<Msr>> {
        Ok(Vec::new())
    }
    /// Frequency of a guest's TSC in kHz if nothing else is asked for, where it is known.
    fn tsc_khz(&self) -> Result<Option<u32>> {
        Ok(None)
    }
    /// The MSRs that this host saves and restores, sorted.
    fn msr_indices(&self) -> Result<Vec<u32>>;
    /// Creates an empty machine: no memory, no vCPUs, local APICs in the hypervisor, the IOAPIC in user
    /// space with `options.ioapic_pins` pins.
    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>>;
}

/// The local APIC's timer of a host's guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicTimer {
    /// Ticks a second with divisor 1, if nothing else is asked for.
    pub hz: u64,
    /// It can be made to run at another rate: [`VmOptions::apic_timer_hz`].
    pub adjustable: bool,
}

/// What must be known when a machine is created.
#[derive(Clone, Copy, Debug)]
pub struct VmOptions {
    /// GSIs `0..ioapic_pins` belong to the user-space IOAPIC, whose end-of-interrupt messages are reported
    /// through [`ExitBus::end_of_interrupt`].
    pub ioapic_pins: u32,
    /// Guests see Hyper-V's interface: a back end that must know it beforehand backs it. Without, its registers are not there.
    pub hyperv: bool,
    /// Ticks a second of the local APICs' timers; `None` leaves them at [`ApicTimer::hz`].
    pub apic_timer_hz: Option<u64>,
}

/// A range of guest-physical memory backed by this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// The slot's number, chosen by the caller, below [`Capabilities::max_memory_slots`].
    pub slot: u32,
    /// First guest-physical address, page aligned.
    pub gpa: u64,
    /// Length in bytes, page aligned, not zero.
    pub len: u64,
    /// Host virtual address of the first byte.
    pub hva: u64,
    /// Guest writes are refused (they become MMIO writes).
    pub read_only: bool,
}

/// A message-signalled interrupt: a write of `data` to `address`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    /// 64-bit message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Where a GSI leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GsiRoute {
    /// Global system interrupt number.
    pub gsi: u32,
    /// The message it sends.
    pub msi: Msi,
}

/// A guest access that is turned into an event without leaving the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoEventAddress {
    /// A port.
    Pio(u16),
    /// A guest-physical address.
    Mmio(u64),
}

/// Which writes trigger an I/O event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoEventMatch {
    /// Any write, of any size.
    Any,
    /// A write of this size in bytes (1, 2, 4, 8) with this value.
    Value {
        /// Size in bytes.
        size: u8,
        /// Value.
        value: u64,
    },
}

/// A machine: memory, interrupts, dirty log, clock. All methods may be called from any thread.
pub trait Vm: Send + Sync {
    /// Creates vCPU `id`, in its state after reset. Each id once.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;

    /// Makes memory visible to the guest.
    ///
    /// # Safety
    ///
    /// `slot.hva .. +len` must be a mapping of this process that stays mapped until the slot is removed or the
    /// `Vm` and all its vCPUs are dropped, and that nothing else in this process treats as Rust references.
    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()>;
    /// Takes memory away from the guest.
    fn unmap_memory(&self, slot: MemorySlot) -> Result<()>;

    /// Replaces the whole routing table.
    fn set_gsi_routes(&self, routes: &[GsiRoute]) -> Result<()>;
    /// Makes a write to `event` raise `gsi`.
    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()>;
    /// Undoes [`Vm::register_irqfd`].
    fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()>;
    /// Makes a guest write write to `event`.
    fn register_ioevent(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
    ) -> Result<()>;
    /// Undoes [`Vm::register_ioevent`].
    fn unregister_ioevent(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
    ) -> Result<()>;
    /// Sends a message-signalled interrupt now.
    fn signal_msi(&self, msi: Msi) -> Result<()>;

    /// Begins to track writes to a slot that is mapped. After it returns, every page the guest has written since
    /// then shows in [`Vm::fetch_dirty_log`]; pages it has not written may show too (all do, with
    /// [`Capabilities::dirty_initially_all_set`]).
    fn start_dirty_log(&self, slot: MemorySlot) -> Result<()>;
    /// Ends tracking. Harmless when it is not on.
    fn stop_dirty_log(&self, slot: MemorySlot) -> Result<()>;
    /// ORs into `words` (bit `n % 64` of word `n / 64` is page `n` of the slot) the pages written. With
    /// [`Capabilities::manual_dirty_protect`] they stay marked until [`Vm::clear_dirty_log`]; without it this
    /// call also clears and re-arms them.
    fn fetch_dirty_log(&self, slot: MemorySlot, words: &mut [u64]) -> Result<()>;
    /// Clears and re-arms those pages whose bit is set in `words`, which stands for the pages from `first_page` on
    /// (a multiple of 64). `pages` is a multiple of 64 or reaches the slot's end. Does nothing without
    /// [`Capabilities::manual_dirty_protect`]. To lose no write, call it *before* reading the pages.
    fn clear_dirty_log(
        &self,
        slot: MemorySlot,
        first_page: u64,
        pages: u64,
        words: &[u64],
    ) -> Result<()>;

    /// Counters of the back end, by name. By default none.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Reads the paravirtual clock. All vCPUs should be stopped.
    fn clock(&self) -> Result<MachineClock>;
    /// Sets the paravirtual clock, advanced by the real time that has passed since it was read where
    /// [`MachineClock::host_realtime_ns`] is known.
    fn set_clock(&self, clock: &MachineClock) -> Result<()>;
}

/// What a vCPU reaches while it runs. Called on the vCPU's thread.
pub trait ExitBus: Sync {
    /// IN. Fills `data` (1, 2 or 4 bytes); an unclaimed port reads all ones.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// OUT.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// A read (1 to 8 bytes) of guest-physical memory that is not RAM; unclaimed reads all ones.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A write (1 to 8 bytes) to guest-physical memory that is not RAM.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// The guest has acknowledged a level-triggered interrupt that the IOAPIC sent.
    fn end_of_interrupt(&self, vector: u8);
}

/// Why a vCPU stopped running: only what the machine must decide on.
#[derive(Debug)]
pub enum VcpuExit {
    /// A [`VcpuKick`], or a signal: nothing is half done.
    Interrupted,
    /// HLT, on a back end whose local APIC does not wait by itself.
    Halt,
    /// The guest asks for power off through the hypervisor.
    Shutdown,
    /// The guest asks for a reset, or has suffered a triple fault.
    Reset {
        /// It was a triple fault, which a sane guest does only on purpose.
        triple_fault: bool,
    },
    /// The guest cannot go on.
    Fault(Box<FaultDetails>),
}

/// All that is known about a guest which cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultDetails {
    /// What the hypervisor says.
    pub reason: String,
    /// The bytes at RIP, where known.
    pub instruction: Vec<u8>,
    /// The registers, where they could be read.
    pub registers: Option<arch::x86_64::state::GeneralRegisters>,
    /// CS, control registers and so on, where they could be read.
    pub special: Option<arch::x86_64::state::SpecialRegisters>,
}

impl std::fmt::Display for FaultDetails {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)?;
        if !self.instruction.is_empty() {
            f.write_str("; instruction")?;
            for byte in &self.instruction {
                write!(f, " {byte:02x}")?;
            }
        }
        if let Some(r) = &self.registers {
            write!(
                f,
                "; rip={:#x} rflags={:#x} rsp={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} rdi={:#x}",
                r.rip, r.rflags, r.rsp, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi
            )?;
        }
        if let Some(s) = &self.special {
            write!(
                f,
                "; cs={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
                s.cs.selector, s.cr0, s.cr2, s.cr3, s.cr4, s.efer
            )?;
        }
        Ok(())
    }
}

/// One virtual processor. Owned by one thread; only its [`VcpuKick`] is shared.
pub trait Vcpu: Send {
    /// Its id.
    fn id(&self) -> u32;
    /// Sets what CPUID shows. Before the first run, and before any state is restored.
    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<()>;
    /// What CPUID shows, as the back end really has it.
    fn cpuid(&self) -> Result<Cpuid>;
    /// Frequency of its TSC in kHz, where it is known.
    fn tsc_khz(&self) -> Option<u32>;
    /// Runs the guest until something happens that the machine must decide on.
    fn run(&mut self, bus: &dyn ExitBus) -> Result<VcpuExit>;
    /// A handle that makes [`Vcpu::run`] return from another thread.
    fn kick_handle(&self) -> Arc<dyn VcpuKick>;
    /// Reads the whole state. The vCPU is not running.
    fn save_state(&self) -> Result<VcpuState>;
    /// Writes the whole state. Fails, naming the element, when this host cannot take an element that the guest
    /// could have used; the vCPU must not be run then.
    fn restore_state(&mut self, state: &VcpuState) -> Result<()>;
    /// Tells the guest's paravirtual clock that the vCPU was stopped for a while, so that its watchdogs do not
    /// bark. Harmless where there is no such clock.
    fn notify_paused(&self) -> Result<()>;
}

/// Makes a vCPU leave the guest.
pub trait VcpuKick: Send + Sync {
    /// The vCPU's current or next [`Vcpu::run`] returns [`VcpuExit::Interrupted`] soon. Stays in force until one has.
    fn kick(&self);
}
