//! What a guest sees: buses, the interrupt controller, serial, real-time clock and power.
//!
//! ```text
//!   vCPU exit ──► Bus (ports) ──┬─► Serial ───► back end (stdio, file, pty, socket, nothing)
//!                               ├─► Cmos          ▲ input thread
//!                               ├─► I8042 ──────┐ │
//!                               └─► AcpiPower ──┴─┼──► PowerSink (the machine decides)
//!             ► Bus (MMIO)  ────── Ioapic ◄───────┘ InterruptLine
//!                                    │
//!                                    └──► MsiSink (messages and EOI routes, to the hypervisor)
//! ```
//!
//! Promises:
//!
//! - Nothing here knows a hypervisor: a device is handed [`InterruptLine`]s, an [`MsiSink`] and a [`PowerSink`].
//! - Every device takes accesses from several vCPU threads at once, of any offset, size and value, and never panics.
//! - No access waits for a peer on the other side of a back end.
//! - Every device implements [`Persist`]: its state is versioned, its saved type is apart from the run-time type, and a
//!   state that cannot be right is refused with a reason, leaving the device as it was.
//! - Order for a consistent state: stop the vCPUs, pause devices that have threads ([`Serial::pause`]), save the devices, *then*
//!   save the vCPUs (an interrupt on its way has reached a local APIC by then). Restore the vCPUs' local APICs after the
//!   devices, or before; both are right.

pub mod bus;
pub mod cmos;
pub mod i8042;
pub mod interrupt;
pub mod ioapic;
pub mod power;
pub mod serial;
pub mod state;

#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod testing;

pub use bus::{Bus, BusDevice, BusError, BusSpace};
pub use cmos::{Cmos, GuestMemorySize};
pub use i8042::I8042;
pub use interrupt::{InterruptLine, IoapicRoute, MsiSink};
pub use ioapic::Ioapic;
pub use power::{AcpiPower, AcpiPowerConfig, PowerRequest, PowerSink};
pub use serial::{Serial, SerialBackend, SerialError};
pub use state::{Persist, SavedState, StateError};
