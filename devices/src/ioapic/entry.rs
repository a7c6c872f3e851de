//! One redirection table entry (290566, 3.2.4), and the message it makes.

use crate::interrupt::IoapicRoute;

const DELIVERY_SHIFT: u32 = 8;
const DELIVERY_MASK: u64 = 0b111;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASK: u64 = 1 << 16;
/// Destination bits 14..8 of the extended destination ID that hypervisors offer; reserved in the 82093AA.
const EXTENDED_DESTINATION_SHIFT: u32 = 49;
const EXTENDED_DESTINATION_MASK: u64 = 0x7f;
const DESTINATION_SHIFT: u32 = 56;

/// What a guest can set in the lower half: vector, delivery mode, destination mode, polarity, trigger mode, mask.
const WRITABLE_LOWER: u32 = 0x0001_afff;
/// What a guest can set in the upper half: both parts of the destination.
const WRITABLE_UPPER: u32 = 0xfffe_0000;

/// Base of the message address (SDM vol. 3, 11.11.1).
const MESSAGE_BASE: u64 = 0xfee0_0000;
const MESSAGE_DESTINATION_SHIFT: u32 = 12;
const MESSAGE_LOGICAL: u64 = 1 << 2;
/// Where the address has x2APIC destination bits 31..8.
const MESSAGE_EXTENDED_DESTINATION_SHIFT: u32 = 40;
/// Message data: level assert, and level trigger mode (SDM vol. 3, 11.11.2).
const MESSAGE_LEVEL_ASSERT: u32 = 1 << 14 | 1 << 15;

const FIXED: u64 = 0b000;
const LOWEST_PRIORITY: u64 = 0b001;
const SMI: u64 = 0b010;
const NMI: u64 = 0b100;
const INIT: u64 = 0b101;
const EXTINT: u64 = 0b111;

/// Vectors below are exceptions; a local APIC refuses them (SDM vol. 3, 11.5.2).
const FIRST_VECTOR: u8 = 16;

/// A redirection table entry, in the register's own format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u64);

impl Entry {
    /// After power on.
    pub(super) const MASKED: Entry = Entry(MASK);

    /// Checks an entry that did not come from the guest.
    pub(super) fn from_saved(raw: u64) -> Result<Entry, &'static str> {
        let writable = u64::from(WRITABLE_UPPER) << 32 | u64::from(WRITABLE_LOWER);
        let entry = Entry(raw);
        if raw & !(writable | REMOTE_IRR) != 0 {
            Err("has reserved bits set")
        } else if entry.remote_irr() && !entry.is_level() {
            Err("waits for the end of an interrupt although it is edge-triggered")
        } else {
            Ok(entry)
        }
    }

    /// After a write to the lower half. A pin that becomes edge-triggered forgets its remote IRR, which guests use as an
    /// end of interrupt.
    pub(super) fn with_lower(self, value: u32) -> Entry {
        let kept = self.0 & !u64::from(WRITABLE_LOWER);
        let entry = Entry(kept | u64::from(value & WRITABLE_LOWER));
        if entry.is_level() {
            entry
        } else {
            entry.with_remote_irr(false)
        }
    }

    /// After a write to the upper half.
    pub(super) fn with_upper(self, value: u32) -> Entry {
        Entry(self.0 & u64::from(u32::MAX) | u64::from(value & WRITABLE_UPPER) << 32)
    }

    pub(super) fn with_remote_irr(self, set: bool) -> Entry {
        Entry(if set {
            self.0 | REMOTE_IRR
        } else {
            self.0 & !REMOTE_IRR
        })
    }

    pub(super) fn vector(self) -> u8 {
        self.0 as u8
    }

    pub(super) fn masked(self) -> bool {
        self.0 & MASK != 0
    }

    pub(super) fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    fn delivery(self) -> u64 {
        self.0 >> DELIVERY_SHIFT & DELIVERY_MASK
    }

    /// Level-triggered; the delivery modes that name no vector are always edge-triggered (290566, 3.2.4, DELMOD).
    pub(super) fn is_level(self) -> bool {
        self.0 & LEVEL != 0 && matches!(self.delivery(), FIXED | LOWEST_PRIORITY)
    }

    /// The message, unless the delivery mode or the vector is one that nothing would accept.
    pub(super) fn message(self) -> Option<IoapicRoute> {
        let vector = match self.delivery() {
            FIXED | LOWEST_PRIORITY => {
                Some(self.vector()).filter(|vector| *vector >= FIRST_VECTOR)?
            }
            SMI | NMI | INIT | EXTINT => self.vector(),
            _ => return None,
        };
        let extended = self.0 >> EXTENDED_DESTINATION_SHIFT & EXTENDED_DESTINATION_MASK;
        let mut address = MESSAGE_BASE
            | extended << MESSAGE_EXTENDED_DESTINATION_SHIFT
            | (self.0 >> DESTINATION_SHIFT) << MESSAGE_DESTINATION_SHIFT;
        if self.0 & LOGICAL != 0 {
            address |= MESSAGE_LOGICAL;
        }
        let mut data = u32::from(vector) | (self.delivery() as u32) << DELIVERY_SHIFT;
        if self.is_level() {
            data |= MESSAGE_LEVEL_ASSERT;
        }
        Some(IoapicRoute { address, data })
    }

    /// The route to announce: a level-triggered pin's message.
    pub(super) fn route(self) -> Option<IoapicRoute> {
        self.message().filter(|_| self.is_level())
    }
}
