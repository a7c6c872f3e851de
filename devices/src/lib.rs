//! What a guest sees: buses, the interrupt controller, serial, real-time clock, power, hotplug of vCPUs, and virtio devices on a PCI bus.
//!
//! ```text
//!   vCPU exit ──► Bus (ports) ──┬─► Serial ───► back end (stdio, file, pty, socket, nothing)
//!                               ├─► Cmos          ▲ input thread
//!                               ├─► I8042 ──────┐ │
//!                               ├─► AcpiPower ──┴─┼──► PowerSink (the machine decides)
//!                               ├─► CpuHotplug ───┼──► VcpuSwitch (the machine's vCPUs)
//!                               └─► Watchdog ─────┼──► WatchdogSink (the same)
//!             ► Bus (MMIO)  ─┬──── Ioapic ◄───────┘ InterruptLine
//!                            └──── PciBus ─► VirtioPci ─► VirtioDevice ─► a Worker each queue ─► file, TAP, socket
//!                                    │
//!                                    └──► MsiSink (messages and EOI routes, to the hypervisor)
//! ```
//!
//! Promises:
//!
//! - Nothing here knows a hypervisor: a device is handed [`InterruptLine`]s, an [`MsiSink`] and a [`PowerSink`].
//! - Every device takes accesses from several vCPU threads at once, of any offset, size and value, and never panics.
//! - No access waits for a peer on the other side of a back end.
//! - Every device that keeps something implements [`Persist`], or is saved through its transport
//!   ([`virtio::VirtioDevice::save`]): its state is versioned, its saved type is apart from the run-time type, and a state that
//!   cannot be right is refused with a reason, leaving the device as it was.
//! - Order for a consistent state: stop the vCPUs, pause devices that have threads ([`Serial::pause`]), save the devices, *then*
//!   save the vCPUs (an interrupt on its way has reached a local APIC by then). Restore the vCPUs' local APICs after the
//!   devices, or before; both are right.

pub mod balloon;
pub mod block;
pub mod bus;
pub mod cmos;
pub mod console;
pub mod cpu_hotplug;
pub mod endpoint;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod i8042;
pub mod interrupt;
pub mod ioapic;
pub mod mem;
pub mod net;
pub mod pci;
pub mod power;
pub mod pvpanic;
pub mod rate_limiter;
pub mod rng;
pub mod serial;
pub mod state;
pub mod vhost_user;
pub mod virtio;
pub mod vsock;
pub mod watchdog;

#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod testing;

pub use balloon::{Balloon, BalloonCounters, BalloonOptions};
pub use bus::{Bus, BusDevice, BusError, BusSpace};
pub use cmos::{Cmos, GuestMemorySize};
pub use console::Console;
pub use cpu_hotplug::{CpuHotplug, CpuHotplugStatus, VcpuSwitch};
pub use endpoint::{EndpointConfig, EndpointError};
pub use i8042::I8042;
pub use interrupt::{InterruptLine, IoapicRoute, MsiSink};
pub use ioapic::Ioapic;
pub use mem::VirtioMem;
pub use power::{AcpiPower, AcpiPowerConfig, PowerRequest, PowerSink};
pub use pvpanic::{PanicSink, PvPanic};
pub use rng::{Rng, RngError};
pub use serial::{Serial, SerialBackend, SerialError};
pub use state::{Persist, SavedState, StateError};
pub use vsock::{Vsock, VsockError};
pub use watchdog::{Watchdog, WatchdogConfig, WatchdogSink};
