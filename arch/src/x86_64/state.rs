//! The neutral state of a vCPU and of the machine-wide clock.
//!
//! No type here belongs to a hypervisor. A back end fills and reads these structures from *one*
//! list of state elements ([`StateElement`]), so that reset, save, restore and compare cannot
//! disagree about what a vCPU consists of.
//!
//! The serialised form is self-describing (field names travel) and new fields carry a serde
//! default, so an older build's state loads in a newer build.

use serde::{Deserialize, Serialize};

/// One element of a vCPU's state: the unit in which it is saved, restored, and, where a host
/// lacks it, skipped or refused by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateElement {
    /// The frequency the guest's TSC runs at. Restored first: clocks depend on it.
    TscFrequency,
    /// Segment, descriptor-table and control registers, EFER, APIC base.
    Special,
    /// General registers, RIP, RFLAGS.
    General,
    /// Extended control registers (XCR0).
    Xcrs,
    /// FPU, SSE, AVX and later components, as an XSAVE area.
    Xsave,
    /// DR0–DR3, DR6, DR7.
    Debug,
    /// Local APIC register page.
    Lapic,
    /// Model-specific registers.
    Msrs,
    /// Exceptions, interrupts and NMIs that are pending or being injected.
    Events,
    /// Running, halted, waiting for SIPI.
    Activity,
    /// The state of a nested hypervisor (VMX or SVM).
    Nested,
}

impl StateElement {
    /// Every element, in the order in which a restore must apply them.
    ///
    /// The order follows what KVM demands (Documentation/virt/kvm/api.rst): special registers
    /// before MSRs (EFER and APIC base gate others), XCRs before the XSAVE area they size, the LAPIC
    /// before the MSRs so that TSC_DEADLINE finds its timer mode, nested state before events, events and activity
    /// last.
    pub const ALL: [Self; 11] = [
        Self::TscFrequency,
        Self::Special,
        Self::General,
        Self::Xcrs,
        Self::Xsave,
        Self::Debug,
        Self::Lapic,
        Self::Msrs,
        Self::Nested,
        Self::Events,
        Self::Activity,
    ];

    /// The element's name in messages and saved state.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TscFrequency => "tsc_frequency",
            Self::Special => "special_registers",
            Self::General => "general_registers",
            Self::Xcrs => "xcrs",
            Self::Xsave => "xsave",
            Self::Debug => "debug_registers",
            Self::Lapic => "lapic",
            Self::Msrs => "msrs",
            Self::Events => "pending_events",
            Self::Activity => "activity",
            Self::Nested => "nested_state",
        }
    }
}

/// The complete state of one vCPU that is not running.
///
/// An element that the saving host lacks *and* the guest cannot have used is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VcpuState {
    /// Local APIC id, which is also the index of the vCPU.
    pub id: u32,
    /// [`StateElement::General`].
    pub general: GeneralRegisters,
    /// [`StateElement::Special`].
    pub special: SpecialRegisters,
    /// [`StateElement::Debug`].
    pub debug: Option<DebugRegisters>,
    /// [`StateElement::Xcrs`].
    #[serde(deserialize_with = "super::bounded::optional_list::<_, _, 16>")]
    pub xcrs: Option<Vec<Xcr>>,
    /// [`StateElement::Xsave`]: an area in the standard (not compacted) format of the SDM, vol. 1,
    /// section 13.4, of whatever size the saving host needed.
    pub xsave: Option<Bytes>,
    /// [`StateElement::Lapic`].
    pub lapic: Option<Lapic>,
    /// [`StateElement::Msrs`], sorted by index.
    #[serde(deserialize_with = "super::bounded::list::<_, _, 8192>")]
    pub msrs: Vec<Msr>,
    /// [`StateElement::Events`].
    pub events: PendingEvents,
    /// [`StateElement::Activity`].
    pub activity: Activity,
    /// [`StateElement::TscFrequency`], in kHz.
    pub tsc_khz: Option<u32>,
    /// [`StateElement::Nested`]: present only when the guest could use nested virtualisation.
    pub nested: Option<NestedState>,
}

/// A byte string that is encoded as one, not as a list of numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// General purpose registers, RIP and RFLAGS (SDM vol. 1, section 3.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "each field is the register it is named after")]
pub struct GeneralRegisters {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part (SDM vol. 3, section 3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, already scaled by granularity.
    pub limit: u32,
    /// Access rights in the format of the VMCS (SDM vol. 3, table 25-2): type in bits 3:0, S 4, DPL 6:5,
    /// P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
    pub access: u32,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit: size in bytes minus one.
    pub limit: u16,
}

/// Segment, table and control registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "each field is the register it is named after")]
pub struct SpecialRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// The four page-directory pointers a PAE guest (not long mode) has loaded, if the back end
    /// knows them.
    pub pdptrs: Option<[u64; 4]>,
}

/// DR0–DR3, DR6 and DR7 (SDM vol. 3, section 18.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DebugRegisters {
    /// Linear addresses of the four breakpoints.
    pub db: [u64; 4],
    /// Status.
    pub dr6: u64,
    /// Control.
    pub dr7: u64,
}

/// One extended control register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xcr {
    /// 0 is XCR0.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Msr {
    /// Its index, as in ECX of RDMSR.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// The local APIC's register page: 1 KiB, registers every 16 bytes (SDM vol. 3, table 11-1). In
/// x2APIC mode the id register holds the 32-bit id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lapic {
    /// The page's first 1,024 bytes.
    pub registers: Bytes,
}

/// What is pending on, or being delivered to, a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PendingEvents {
    /// An exception that is pending or was being delivered.
    pub exception: Option<PendingException>,
    /// An external or software interrupt that was being delivered.
    pub interrupt: Option<PendingInterrupt>,
    /// Interrupt shadow: blocked by STI (bit 1) or MOV SS (bit 0).
    pub interrupt_shadow: u8,
    /// An NMI was being delivered.
    pub nmi_injected: bool,
    /// An NMI is waiting.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// The vector of the start-up IPI received in wait-for-SIPI, if any.
    pub sipi_vector: Option<u8>,
    /// The vCPU is in system management mode.
    pub smm: bool,
    /// An SMI is waiting.
    pub smi_pending: bool,
    /// A triple fault is waiting to be reported.
    pub triple_fault_pending: bool,
}

/// An exception on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PendingException {
    /// Vector, 0–31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// Payload not yet written to CR2 or DR6.
    pub payload: Option<u64>,
    /// It had been injected (as opposed to queued) when the state was saved.
    pub injected: bool,
}

/// An interrupt on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PendingInterrupt {
    /// Vector.
    pub vector: u8,
    /// It came from an INT instruction.
    pub soft: bool,
}

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// Executes instructions.
    #[default]
    Running,
    /// Stopped in HLT until an interrupt comes.
    Halted,
    /// Reset, waiting for INIT (an application processor before its first INIT).
    Uninitialized,
    /// Had INIT, waits for the start-up IPI.
    WaitForSipi,
    /// Had a start-up IPI that it has not begun to act on.
    SipiReceived,
}

/// Nested virtualisation state, opaque and tied to its format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NestedState {
    /// Which format `data` is in.
    pub format: NestedFormat,
    /// The state itself.
    pub data: Bytes,
}

/// Who can read a [`NestedState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NestedFormat {
    /// KVM's `struct kvm_nested_state` with VMX contents.
    KvmVmx,
    /// KVM's `struct kvm_nested_state` with SVM contents.
    KvmSvm,
}

/// Machine-wide state that the hypervisor, not a device, keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MachineClock {
    /// The paravirtual clock at the moment of the save, in nanoseconds since the guest's boot.
    pub guest_ns: u64,
    /// The host's CLOCK_REALTIME at the same moment, in nanoseconds since 1970, if the back end could read
    /// both at once. A restore advances the guest's clock by the time that has passed since.
    pub host_realtime_ns: Option<u64>,
    /// The host's TSC at the same moment, if the back end could read all at once.
    pub host_tsc: Option<u64>,
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
