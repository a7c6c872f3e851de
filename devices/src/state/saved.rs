//! The saved types, one a device. They are apart from the run-time types so that those may change freely.
//!
//! Rules: never rename or retype a field; a new field has a default that means "as before it existed". A missing field reads
//! as its default; where no default can be right, `restore` refuses it.

use serde::{Deserialize, Serialize};

/// [`crate::Ioapic`], version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoapicState {
    /// ID register, bits 27..24 shifted down.
    pub id: u8,
    /// IOREGSEL.
    pub select: u8,
    /// Redirection table, one 64-bit entry a pin.
    pub entries: Vec<u64>,
    /// Bit n: the line into pin n is held active.
    pub levels: u32,
}

/// [`crate::Serial`], version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SerialState {
    /// DLL.
    pub divisor_low: u8,
    /// DLM.
    pub divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR without the FIFO bits.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Bytes in the receive FIFO, oldest first.
    #[serde(with = "serde_bytes")]
    pub receive_fifo: Vec<u8>,
    /// Input that was taken from the back end and has not fitted into the FIFO yet.
    #[serde(with = "serde_bytes")]
    pub pending_input: Vec<u8>,
    /// Output that the back end has not taken yet.
    #[serde(with = "serde_bytes")]
    pub unsent_output: Vec<u8>,
}

/// [`crate::Cmos`], version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CmosState {
    /// Index register, without the NMI bit.
    pub index: u8,
    /// All 128 bytes. Those of the clock count only while the guest holds it (status B, SET).
    #[serde(with = "serde_bytes")]
    pub nvram: Vec<u8>,
    /// Guest's clock minus the host's real time, in seconds.
    pub offset_s: i64,
}

/// [`crate::I8042`], version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct I8042State {
    /// The next data byte goes to the output port.
    pub output_port_write: bool,
}

/// [`crate::AcpiPower`], version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PowerState {
    /// Event flags that the guest has not read.
    pub events: u8,
}

/// [`crate::pci::PciHotplug`], version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PciHotplugState {
    /// Slots of which the guest has not read that a device has come.
    pub inserted: u32,
    /// Slots of which it has not read that the device is to go.
    pub leaving: u32,
}

/// [`crate::Watchdog`], version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchdogState {
    /// It runs.
    pub running: bool,
    /// Counts that a countdown begins with.
    pub countdown: u32,
    /// Time that is left of one, in nanoseconds.
    pub left_ns: u64,
    /// It has reset the machine, and the guest has not taken note.
    pub bitten: bool,
    /// How often it has reset the machine.
    pub resets: u64,
}

/// [`crate::CpuHotplug`], version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuHotplugState {
    /// Every vCPU that there may be, by id.
    pub vcpus: Vec<HotVcpuState>,
}

/// One vCPU of [`CpuHotplugState`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HotVcpuState {
    /// It is there.
    pub present: bool,
    /// The guest has not read that it has come.
    pub inserted: bool,
    /// The guest has not read that it is to go.
    pub leaving: bool,
    /// The guest has been told that it is there, and has not taken it.
    pub told: bool,
    /// The guest has been asked to let it go, and has not.
    pub asked: bool,
    /// The guest has answered that it will not, with this status.
    pub refused: Option<u8>,
}
