//! I/O APIC, an Intel 82093AA (datasheet 290566) with the EOI register of later chips (version 0x20).
//!
//! ```text
//!              edge: a rising line is sent once; while the pin is masked it is lost
//!   line ─► pin ┤
//!              level: sent while line ∧ ¬masked ∧ ¬remote IRR, which sets remote IRR
//!                     end_of_interrupt(vector) clears it; if the line is still active it is sent again
//!
//!   redirection entry ──► message (SDM vol. 3, 11.11) ──► MsiSink::send
//!                    └──► route of a level pin, when it really changes ──► MsiSink::route_changed
//! ```
//!
//! Promises: a route is announced before its message is first sent, so that no end of interrupt is missed; nothing is
//! announced twice (a change may cost the hypervisor milliseconds); restoring announces what the restored entries need.

mod entry;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::entry::Entry;
use crate::bus::BusDevice;
use crate::interrupt::{InterruptLine, IoapicRoute, MsiSink, Unconnected};
use crate::state::saved::IoapicState;
use crate::state::{self, Persist, SavedState, StateError};

/// Number of interrupt inputs.
pub const IOAPIC_PINS: u32 = 24;

const PINS: usize = IOAPIC_PINS as usize;

/// Memory-mapped register: IOREGSEL (290566, 3.1.1).
const IOREGSEL: u64 = 0x00;
/// Memory-mapped register: IOWIN (290566, 3.1.2).
const IOWIN: u64 = 0x10;
/// Memory-mapped register: EOI (Intel ICH data sheets, "EOIR"; write-only).
const EOI: u64 = 0x40;

/// Indirect register: IOAPICID (290566, 3.2.1).
const REG_ID: u8 = 0x00;
/// Indirect register: IOAPICVER (290566, 3.2.2).
const REG_VERSION: u8 = 0x01;
/// Indirect register: IOAPICARB (290566, 3.2.3).
const REG_ARBITRATION: u8 = 0x02;
/// Indirect register: first of two a pin (290566, 3.2.4).
const REG_TABLE: u8 = 0x10;

/// The first version with an EOI register.
const VERSION: u32 = 0x20;
/// The ID is in bits 27..24.
const ID_SHIFT: u32 = 24;
/// The ID has four bits.
const ID_MASK: u8 = 0xf;

struct Pins {
    id: u8,
    select: u8,
    entries: [Entry; PINS],
    /// Bit n: line n is held active.
    levels: u32,
    /// What the sink knows.
    announced: [Option<IoapicRoute>; PINS],
}

impl Pins {
    fn after_power_on() -> Self {
        Pins {
            id: 0,
            select: 0,
            entries: [Entry::MASKED; PINS],
            levels: 0,
            announced: [None; PINS],
        }
    }
}

/// The I/O APIC. Its register window is a page.
pub struct Ioapic {
    sink: Arc<dyn MsiSink>,
    pins: Mutex<Pins>,
}

impl Ioapic {
    /// An I/O APIC after power on, with every pin masked.
    pub fn new(sink: Arc<dyn MsiSink>) -> Self {
        Ioapic {
            sink,
            pins: Mutex::new(Pins::after_power_on()),
        }
    }

    /// The line into `pin`. From [`IOAPIC_PINS`] on there are none, and the line leads nowhere.
    pub fn line(self: &Arc<Self>, pin: u32) -> Arc<dyn InterruptLine> {
        match usize::try_from(pin) {
            Ok(index) if index < PINS => Arc::new(Line {
                ioapic: self.clone(),
                pin: index,
            }),
            _ => {
                tracing::warn!(
                    pin,
                    "an interrupt line was asked for that the IOAPIC does not have"
                );
                Arc::new(Unconnected)
            }
        }
    }

    /// A local APIC has ended the service of `vector`, which a level-triggered pin had sent.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut pins = self.lock();
        for pin in 0..PINS {
            let entry = pins.entries[pin];
            if entry.is_level() && entry.vector() == vector && entry.remote_irr() {
                pins.entries[pin] = entry.with_remote_irr(false);
                self.service_level(&mut pins, pin);
            }
        }
    }

    /// Back to the state after power on. Lines that are held active stay so; their devices lower them.
    pub fn reset(&self) {
        let mut pins = self.lock();
        let (levels, announced) = (pins.levels, pins.announced);
        *pins = Pins {
            levels,
            announced,
            ..Pins::after_power_on()
        };
        for pin in 0..PINS {
            self.announce(&mut pins, pin, None);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, entry: Entry) -> bool {
        let Some(route) = entry.message() else {
            return false;
        };
        self.sink.send(route.address, route.data);
        true
    }

    fn announce(&self, pins: &mut Pins, pin: usize, route: Option<IoapicRoute>) {
        if pins.announced[pin] != route {
            pins.announced[pin] = route;
            self.sink.route_changed(pin as u32, route);
        }
    }

    /// Sends a level-triggered pin's interrupt if it is due.
    fn service_level(&self, pins: &mut Pins, pin: usize) {
        let entry = pins.entries[pin];
        let due = entry.is_level()
            && !entry.masked()
            && !entry.remote_irr()
            && pins.levels & (1 << pin) != 0;
        if due && self.send(entry) {
            pins.entries[pin] = entry.with_remote_irr(true);
        }
    }

    fn pulse(&self, pin: usize) {
        let mut pins = self.lock();
        let entry = pins.entries[pin];
        if entry.masked() {
            return;
        }
        if !entry.is_level() {
            self.send(entry);
        } else if !entry.remote_irr() && self.send(entry) {
            pins.entries[pin] = entry.with_remote_irr(true);
        }
    }

    fn set_level(&self, pin: usize, high: bool) {
        let mut pins = self.lock();
        let rose = high && pins.levels & (1 << pin) == 0;
        if high {
            pins.levels |= 1 << pin;
        } else {
            pins.levels &= !(1 << pin);
        }
        let entry = pins.entries[pin];
        if entry.is_level() {
            self.service_level(&mut pins, pin);
        } else if rose && !entry.masked() {
            self.send(entry);
        }
    }

    fn read_indirect(&self, pins: &Pins) -> u32 {
        match pins.select {
            REG_ID | REG_ARBITRATION => u32::from(pins.id) << ID_SHIFT,
            REG_VERSION => VERSION | (IOAPIC_PINS - 1) << 16,
            select => match table_index(select) {
                Some((pin, false)) => pins.entries[pin].0 as u32,
                Some((pin, true)) => (pins.entries[pin].0 >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write_indirect(&self, pins: &mut Pins, value: u32) {
        if pins.select == REG_ID {
            pins.id = (value >> ID_SHIFT) as u8 & ID_MASK;
        }
        let Some((pin, upper)) = table_index(pins.select) else {
            return;
        };
        let entry = if upper {
            pins.entries[pin].with_upper(value)
        } else {
            pins.entries[pin].with_lower(value)
        };
        pins.entries[pin] = entry;
        if !entry.masked() {
            self.announce(pins, pin, entry.route());
        }
        self.service_level(pins, pin);
    }
}

/// Which pin's entry an indirect register is part of, and whether it is the upper half.
fn table_index(select: u8) -> Option<(usize, bool)> {
    let index = select.checked_sub(REG_TABLE)?;
    let pin = usize::from(index / 2);
    (pin < PINS).then_some((pin, index % 2 == 1))
}

impl BusDevice for Ioapic {
    /// Registers are 32 bits wide; a narrower read sees a part, a wider one is filled with zeros.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let register = offset & !0xf;
        let pins = self.lock();
        let value = match register {
            IOREGSEL => u32::from(pins.select),
            IOWIN => self.read_indirect(&pins),
            _ => 0,
        };
        drop(pins);
        let bytes = u64::from(value).to_le_bytes();
        for (byte, at) in data.iter_mut().zip(offset - register..) {
            *byte = usize::try_from(at)
                .ok()
                .and_then(|at| bytes.get(at))
                .copied()
                .unwrap_or(0);
        }
    }

    /// IOWIN takes 32-bit writes; of the registers that hold 8 bits, the lowest byte counts.
    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (IOREGSEL, [select, ..]) => self.lock().select = *select,
            (IOWIN, [a, b, c, d, ..]) => {
                let mut pins = self.lock();
                self.write_indirect(&mut pins, u32::from_le_bytes([*a, *b, *c, *d]));
            }
            (EOI, [vector, ..]) => self.end_of_interrupt(*vector),
            _ => {}
        }
    }
}

impl Persist for Ioapic {
    fn kind(&self) -> &'static str {
        "ioapic"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self) -> SavedState {
        let pins = self.lock();
        let saved = IoapicState {
            id: pins.id,
            select: pins.select,
            entries: pins.entries.iter().map(|entry| entry.0).collect(),
            levels: pins.levels,
        };
        state::encode(self, &saved)
    }

    /// Announces the routes that the restored entries need, then sends what is due.
    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let kind = self.kind();
        let refuse = |field, reason| StateError::OutOfRange {
            kind,
            field,
            reason,
        };
        let saved: IoapicState = state::decode(self, state)?;
        if saved.id & !ID_MASK != 0 {
            return Err(refuse(
                "id",
                format!("{:#x} has more than 4 bits", saved.id),
            ));
        }
        if saved.levels >> IOAPIC_PINS != 0 {
            return Err(refuse(
                "levels",
                format!("{:#x} names pins beyond {IOAPIC_PINS}", saved.levels),
            ));
        }
        let raw: [u64; PINS] = saved.entries.try_into().map_err(|entries: Vec<u64>| {
            refuse(
                "entries",
                format!("{} pins instead of {PINS}", entries.len()),
            )
        })?;
        let mut entries = [Entry::MASKED; PINS];
        for (pin, (entry, raw)) in entries.iter_mut().zip(raw).enumerate() {
            *entry = Entry::from_saved(raw)
                .map_err(|reason| refuse("entries", format!("pin {pin}: {raw:#x} {reason}")))?;
        }

        let mut pins = self.lock();
        let announced = pins.announced;
        *pins = Pins {
            id: saved.id,
            select: saved.select,
            entries,
            levels: saved.levels,
            announced,
        };
        for (pin, entry) in entries.into_iter().enumerate() {
            let needed = !entry.masked() || entry.remote_irr();
            self.announce(&mut pins, pin, entry.route().filter(|_| needed));
        }
        for pin in 0..PINS {
            self.service_level(&mut pins, pin);
        }
        Ok(())
    }
}

struct Line {
    ioapic: Arc<Ioapic>,
    pin: usize,
}

impl InterruptLine for Line {
    fn trigger(&self) {
        self.ioapic.pulse(self.pin);
    }

    fn set_level(&self, high: bool) {
        self.ioapic.set_level(self.pin, high);
    }
}

#[cfg(test)]
mod tests;
