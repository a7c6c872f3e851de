//! PCI: one segment with one bus, reached through its ECAM window (PCI Express Base Specification, section 7.2.2).
//!
//! ```text
//!   vCPU ── MMIO in the ECAM window ──► PciBus ── slot ──► PciDevice::{read,write}_config
//!                                          │ the write has moved, enabled or disabled a BAR
//!                                          └──► Bus (MMIO): taken out where it was, put in where it is; PciDevice::bars_moved
//!   vCPU ── MMIO in a BAR ──► Bus ──► BarWindow ──► PciDevice::{read,write}_bar
//!   PciDevice ── Msix::trigger(vector) ──► MsiSink, or pending while masked
//! ```
//!
//! Promises:
//!
//! - A guest may write anything to configuration space. A BAR that it puts over another device's addresses answers nothing until it is moved
//!   away; the other device goes on.
//! - Addresses are given out before the guest starts, the same for the same list of devices; a kernel that keeps them finds them as a kernel
//!   on the destination of a move does.
//! - Interrupts are messages only: there is no INTx.

mod bus;
mod config;
pub mod hotplug;
mod msix;

use std::sync::Arc;

pub use bus::{PciBus, PciError, SLOTS};
pub use config::{Bar, ConfigSpace, Identity};
pub use hotplug::{EjectSink, PciHotplug};
pub use msix::{Msix, MsixState};

/// A BAR as it is decoded now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// Its number, 0 to 5.
    pub bar: u8,
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes, a power of two.
    pub len: u64,
}

/// A function on a [`PciBus`]. Several vCPU threads may call it at once.
pub trait PciDevice: Send + Sync {
    /// Fills `data` from configuration space, 4 bytes at most and within an aligned word.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Takes such a write.
    fn write_config(&self, offset: u16, data: &[u8]);
    /// The BARs that answer now: none while memory decoding is off.
    fn bars(&self) -> Vec<BarRange>;
    /// What the bus has put where; called whenever that changes.
    fn bars_moved(&self, mapped: &[BarRange]);
    /// Gives a BAR its first address.
    fn set_bar(&self, bar: u8, gpa: u64);
    /// Sizes of the BARs there are: number and length in bytes.
    fn bar_sizes(&self) -> Vec<(u8, u64)>;
    /// Reads within a BAR.
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes within a BAR.
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]);
}

/// A BAR on the MMIO bus.
struct BarWindow {
    device: Arc<dyn PciDevice>,
    bar: u8,
}

impl crate::BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.device.read_bar(self.bar, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.device.write_bar(self.bar, offset, data);
    }
}
