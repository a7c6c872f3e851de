//! What is moved: the traits that a machine implements, and the values that travel.

use std::fmt;
use std::sync::Arc;

use arch::x86_64::bounded;
pub use arch::x86_64::cpu_model::CpuContract;
use arch::x86_64::state::{Bytes, MachineClock, VcpuState};
use memory::{GuestRam, PageBitmap, RamRange};
use serde::{Deserialize, Serialize};

/// Whatever a machine fails with.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// What a destination must know before it can say yes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the source's VMM, for messages.
    pub vmm_version: String,
    /// The hypervisor that runs the guest, for messages and for the destination's policy.
    pub hypervisor: String,
    /// The machine's configuration as JSON.
    pub config: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM ranges, lowest first.
    #[serde(deserialize_with = "bounded::list::<_, _, 1024>")]
    pub memory: Vec<RamRange>,
    /// What the guest was told about its processor.
    pub cpu: CpuContract,
    /// What the guest's drivers have accepted of their devices so far: a destination whose devices lack some of it says so.
    #[serde(default, deserialize_with = "bounded::list::<_, _, 4096>")]
    pub accepted: Vec<AcceptedFeatures>,
    /// When this was sent, by the source's CLOCK_REALTIME in nanoseconds since 1970.
    #[serde(default)]
    pub sent_ns: Option<u64>,
}

/// What a driver has accepted of its device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptedFeatures {
    /// Which device of the machine, as in [`DeviceState`].
    pub id: String,
    /// Feature bits, of the transport as well.
    pub features: u64,
}

/// Everything but memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// Whether the guest ran before the move; the destination brings it to the same.
    pub run_state: RunState,
    /// The vCPUs, by id.
    #[serde(deserialize_with = "bounded::list::<_, _, 4096>")]
    pub vcpus: Vec<VcpuState>,
    /// The paravirtual clock.
    pub clock: MachineClock,
    /// The devices.
    #[serde(deserialize_with = "bounded::list::<_, _, 4096>")]
    pub devices: Vec<DeviceState>,
}

/// Whether a guest executes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// It does.
    #[default]
    Running,
    /// Somebody has paused it.
    Paused,
}

/// The saved state of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Which device of the machine, for example `serial0`.
    pub id: String,
    /// Which type of device; with `version` it says how `data` is to be read.
    pub kind: String,
    /// Version of the saved form.
    pub version: u16,
    /// The saved form.
    pub data: Bytes,
}

/// One reason why a destination cannot take a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What it is about.
    pub kind: RefusalKind,
    /// What exactly is in the way, and what to do.
    pub detail: String,
}

/// What a [`Refusal`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The configuration is not understood or not possible here.
    Config,
    /// The memory cannot be had.
    Memory,
    /// The processor lacks what the guest was promised.
    Cpu,
    /// A device is not known or not possible here.
    Device,
    /// The hypervisor does not suit.
    Hypervisor,
    /// A disk cannot be opened.
    Disk,
    /// The destination already has a machine, or is at its limits.
    Busy,
    /// Something that this build does not know the name of.
    #[serde(other)]
    Other,
}

impl Refusal {
    /// A reason.
    pub fn new(kind: RefusalKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            detail: detail.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            RefusalKind::Config => "config",
            RefusalKind::Memory => "memory",
            RefusalKind::Cpu => "cpu",
            RefusalKind::Device => "device",
            RefusalKind::Hypervisor => "hypervisor",
            RefusalKind::Disk => "disk",
            RefusalKind::Busy => "busy",
            RefusalKind::Other => "other",
        };
        write!(f, "{kind}: {}", self.detail)
    }
}

/// A machine that is moved away.
///
/// All calls come from one thread at a time, not always the same.
pub trait SourceMachine: Send {
    /// Describes the machine.
    fn manifest(&mut self) -> Result<Manifest, MachineError>;
    /// Its memory. The regions are the manifest's RAM ranges, in the same order.
    fn ram(&self) -> Arc<GuestRam>;
    /// Begins to track writes to all regions. Every page written after it returns shows in
    /// [`SourceMachine::fetch_dirty`]; pages that were not written may show as well.
    fn start_dirty_tracking(&mut self) -> Result<(), MachineError>;
    /// Ends tracking. Harmless when it is off.
    fn stop_dirty_tracking(&mut self);
    /// ORs into `into` the pages of a region that the guest or a device has written. A page reported once may be
    /// forgotten, or stay reported until it is re-armed.
    fn fetch_dirty(&mut self, region: usize, into: &mut PageBitmap) -> Result<(), MachineError>;
    /// Makes the next write to the pages whose bit is set in `words` show again, and forgets earlier ones. Bit 0 of the
    /// first word is page `first_page`, a multiple of 64. Called before the pages are read. Bits past the region's
    /// end are not set.
    fn rearm(&mut self, region: usize, first_page: u64, words: &[u64]) -> Result<(), MachineError>;
    /// Stops the guest. On return no vCPU and no device writes memory, and all they wrote shows in
    /// [`SourceMachine::fetch_dirty`]. A machine that is paused already stays so.
    fn pause(&mut self) -> Result<(), MachineError>;
    /// Saves everything but memory. Only while paused.
    fn save_state(&mut self) -> Result<MachineState, MachineError>;
    /// Brings the guest back to what it was before [`SourceMachine::pause`]: running, or paused by somebody else.
    /// Harmless if it was not paused.
    fn resume(&mut self) -> Result<(), MachineError>;
}

/// A place that a machine is moved to.
///
/// All calls come from the thread that called [`crate::receive`].
pub trait DestinationMachine: Send {
    /// Builds the whole machine, not running, or says all that is in the way. The memory's regions are the
    /// manifest's RAM ranges, in the same order; whatever this call writes to it is thrown away.
    fn reserve(&mut self, manifest: &Manifest) -> Result<Arc<GuestRam>, Vec<Refusal>>;
    /// Takes over everything but memory. The guest does not run yet.
    fn restore(&mut self, state: MachineState) -> Result<(), MachineError>;
    /// Starts the guest, or leaves it paused if the restored state says so. On an error no vCPU has executed
    /// anything, nor will: the source then takes the guest back.
    fn resume(&mut self) -> Result<(), MachineError>;
    /// Frees everything. Harmless when nothing was reserved.
    fn discard(&mut self);
}
