//! How a device's interrupt leaves it: as a line into the IOAPIC, or as a message to the hypervisor.

/// One interrupt input, as a device sees it. Calls may come from any thread.
///
/// A line belongs to one device: two devices that drive one pin by [`InterruptLine::set_level`] overwrite each other.
pub trait InterruptLine: Send + Sync {
    /// A pulse: the line goes active and back. What an edge-triggered source does.
    fn trigger(&self);
    /// Holds the line active (`true`) or inactive. What a level-triggered source does.
    fn set_level(&self, high: bool);
}

/// A line that leads nowhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unconnected;

impl InterruptLine for Unconnected {
    fn trigger(&self) {}
    fn set_level(&self, _high: bool) {}
}

/// The message that an IOAPIC pin sends.
///
/// The format is that of Intel SDM vol. 3, 11.11 "Message Signalled Interrupts"; destination bits 31..8 of an x2APIC
/// destination, where there are any, are in address bits 63..40.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IoapicRoute {
    /// 64-bit message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Where the IOAPIC's messages go: the hypervisor, by way of the machine.
///
/// Both calls come while the IOAPIC is locked, so that messages keep their order: an implementation must not call back
/// into the IOAPIC.
pub trait MsiSink: Send + Sync {
    /// Sends a message-signalled interrupt now.
    fn send(&self, address: u64, data: u32);
    /// The message of a level-triggered pin has changed. The hypervisor must know it in order to report the guest's end of
    /// interrupt ([`crate::Ioapic::end_of_interrupt`]); an edge-triggered pin needs no route and has none.
    ///
    /// Called for real changes only, when the pin is unmasked: masking alone keeps the old route, because the guest may
    /// mask a pin *before* it acknowledges the interrupt. It is called before the message is first sent.
    fn route_changed(&self, pin: u32, route: Option<IoapicRoute>);
}
