//! Devices of ports and of one page: serial port, IOAPIC, and the small ones.
//!
//! ```text
//!   input ─┬─ guest: reads and writes at any offset ──► BusDevice
//!          ├─ machine: save and restore, reset          │
//!          └─ host: bytes, time, lines, buttons ────────┘
//!   the end ─► reset ─► a well-behaved guest gets what it asks for
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::fuzzing::Hand;
use devices::pci::PciHotplug;
use devices::pci::hotplug::EjectSink;
use devices::pvpanic::PanicSink;
use devices::{
    AcpiPower, AcpiPowerConfig, BusDevice, Cmos, GuestMemorySize, I8042, InterruptLine, Ioapic,
    IoapicRoute, MsiSink, Persist, PowerRequest, PowerSink, PvPanic, Serial,
};

use crate::input::Reader;

/// Most operations of an input.
const MOST_OPS: usize = 1000;

/// Reads, writes, saves and so on of one device after the other; `number` chooses among those there are.
pub trait Registers {
    /// A device, and its state if it has one.
    fn device(&self, number: u8) -> (&dyn BusDevice, Option<&dyn Persist>);
    /// Something happens to the device from outside.
    fn event(&mut self, kind: u8, data: &[u8]);
    /// The machine is reset.
    fn reset(&mut self);
    /// What a well-behaved guest does after a reset, and what must come of it.
    fn check(&mut self);
}

/// Does what the input says. There are no requests that could be finished.
pub fn run(mut registers: impl Registers, data: &[u8]) -> u64 {
    let mut input = Reader(data);
    for _ in 0..MOST_OPS {
        if input.is_empty() {
            break;
        }
        let (op, number) = (input.u8(), input.u8());
        match op % 8 {
            0..=3 => {
                // Any offset, but mostly those of the device.
                let at = match op & 0x80 {
                    0 => u64::from(input.u8()),
                    _ => input.u64(),
                };
                let (device, _) = registers.device(number);
                if op & 1 == 0 {
                    device.read(at, &mut [0; 16][..usize::from(input.u8() % 17)]);
                } else {
                    device.write(at, &input.bytes());
                }
            }
            4 | 5 => {
                let data = input.bytes();
                registers.event(number, &data);
            }
            6 => {
                let (at, bits) = (input.u16(), input.u8());
                let (_, persist) = registers.device(number);
                if let Some(persist) = persist {
                    restore(persist, at, bits);
                }
            }
            _ => registers.reset(),
        }
    }
    registers.reset();
    registers.check();
    0
}

/// What a guest can bring about can be restored, and is the same then; what is damaged may be refused.
fn restore(persist: &dyn Persist, at: u16, bits: u8) {
    let mut saved = persist.save();
    let at = usize::from(at) % saved.data.len();
    saved.data[at] ^= bits;
    let before = persist.save();
    match persist.restore(&saved) {
        Ok(()) if bits == 0 => assert_eq!(persist.save(), saved),
        Ok(()) => {}
        Err(error) => {
            assert_ne!(bits, 0, "{error}");
            assert_eq!(
                persist.save(),
                before,
                "a state that is refused changes nothing"
            );
        }
    }
}

/// Remembers what devices say.
#[derive(Default)]
struct Log {
    requests: Mutex<Vec<PowerRequest>>,
    ejected: Mutex<Vec<u8>>,
    messages: Mutex<Vec<u32>>,
    pulses: AtomicU64,
    panics: AtomicU64,
}

impl PowerSink for Log {
    fn request(&self, request: PowerRequest) {
        self.requests.lock().expect("no panic").push(request);
    }
}

impl EjectSink for Log {
    fn ejected(&self, slot: u8) {
        self.ejected.lock().expect("no panic").push(slot);
    }
}

impl PanicSink for Log {
    fn guest_panicked(&self, _crash_loaded: bool) {
        self.panics.fetch_add(1, Ordering::Relaxed);
    }
}

impl InterruptLine for Log {
    fn trigger(&self) {
        self.pulses.fetch_add(1, Ordering::Relaxed);
    }
    fn set_level(&self, _high: bool) {}
}

impl MsiSink for Log {
    fn send(&self, _address: u64, data: u32) {
        self.messages.lock().expect("no panic").push(data);
    }
    fn route_changed(&self, _pin: u32, _route: Option<IoapicRoute>) {}
}

fn read(device: &dyn BusDevice, at: u64) -> u8 {
    let mut byte = [0];
    device.read(at, &mut byte);
    byte[0]
}

/// A serial port.
pub struct SerialPort {
    serial: Serial,
    hand: Hand,
    log: Arc<Log>,
}

impl Default for SerialPort {
    /// After power on.
    fn default() -> Self {
        let log = Arc::new(Log::default());
        let (serial, hand) = Serial::in_hand(log.clone()).expect("an event");
        Self { serial, hand, log }
    }
}

impl Registers for SerialPort {
    fn device(&self, _number: u8) -> (&dyn BusDevice, Option<&dyn Persist>) {
        (&self.serial, Some(&self.serial))
    }

    fn event(&mut self, kind: u8, data: &[u8]) {
        match kind % 3 {
            0 => {
                self.hand.give(data);
            }
            1 => drop(self.hand.take(data.len())),
            _ => {
                self.serial.pause();
                self.serial.resume();
            }
        }
    }

    fn reset(&mut self) {
        self.serial.reset();
    }

    fn check(&mut self) {
        self.hand.take(usize::MAX);
        let pulses = self.log.pulses.load(Ordering::Relaxed);
        // Both interrupts on.
        self.serial.write(1, &[3]);
        for byte in b"to the host" {
            assert_ne!(read(&self.serial, 5) & 0x20, 0, "room for a byte to send");
            self.serial.write(0, &[*byte]);
        }
        assert_eq!(self.hand.take(usize::MAX), b"to the host");
        let mut given = 0;
        let mut received = Vec::new();
        let input = b"to the guest";
        for _ in 0..1000 {
            given += self.hand.give(&input[given..]);
            if read(&self.serial, 5) & 1 != 0 {
                received.push(read(&self.serial, 0));
            } else if given == input.len() {
                break;
            }
        }
        assert!(received.ends_with(input), "{received:?}");
        assert!(self.log.pulses.load(Ordering::Relaxed) > pulses);
    }
}

/// An I/O APIC with lines into all of its pins.
pub struct Apic {
    ioapic: Arc<Ioapic>,
    log: Arc<Log>,
}

impl Default for Apic {
    /// After power on.
    fn default() -> Self {
        let log = Arc::new(Log::default());
        let ioapic = Arc::new(Ioapic::new(log.clone()));
        Self { ioapic, log }
    }
}

impl Registers for Apic {
    fn device(&self, _number: u8) -> (&dyn BusDevice, Option<&dyn Persist>) {
        (&*self.ioapic, Some(&*self.ioapic))
    }

    fn event(&mut self, kind: u8, data: &[u8]) {
        for byte in data {
            let line = self.ioapic.line(u32::from(*byte));
            match kind & 3 {
                0 => line.trigger(),
                1 => line.set_level(true),
                2 => line.set_level(false),
                _ => self.ioapic.end_of_interrupt(*byte),
            }
        }
    }

    fn reset(&mut self) {
        self.ioapic.reset();
    }

    fn check(&mut self) {
        let write = |register: u32, value: u32| {
            self.ioapic.write(0, &register.to_le_bytes());
            self.ioapic.write(0x10, &value.to_le_bytes());
        };
        // Pin 4: vector 0x41, edges. Pin 9: vector 0x42, levels. Both unmasked.
        write(0x18, 0x41);
        self.ioapic.line(9).set_level(false);
        write(0x22, 0x8042);
        let taken = || std::mem::take(&mut *self.log.messages.lock().expect("no panic"));
        taken();
        self.ioapic.line(4).set_level(false);
        self.ioapic.line(4).trigger();
        assert_eq!(taken().len(), 1);
        self.ioapic.line(9).set_level(true);
        assert_eq!(taken().len(), 1);
        self.ioapic.end_of_interrupt(0x42);
        assert_eq!(taken().len(), 1, "the line is still held");
        self.ioapic.line(9).set_level(false);
        self.ioapic.end_of_interrupt(0x42);
        assert!(taken().is_empty());
    }
}

const POWER: AcpiPowerConfig = AcpiPowerConfig {
    sleep_control: 0,
    sleep_status: 1,
    reset: 2,
    event: 4,
    reset_value: 1,
    s5_sleep_type: 5,
};

/// The clock, the keyboard controller, power and hotplug registers, pvpanic.
pub struct Small {
    cmos: Cmos,
    i8042: I8042,
    power: Arc<AcpiPower>,
    slots: PciHotplug,
    panic: PvPanic,
    /// The host's real time in seconds.
    time: Arc<AtomicU64>,
    log: Arc<Log>,
}

impl Default for Small {
    /// After power on.
    fn default() -> Self {
        let log = Arc::new(Log::default());
        let time = Arc::new(AtomicU64::new(1_800_000_000));
        let clock = time.clone();
        let real_time = move || Duration::from_secs(clock.load(Ordering::Relaxed));
        let power = Arc::new(AcpiPower::new(POWER, log.clone(), log.clone()));
        Self {
            cmos: Cmos::with_real_time(GuestMemorySize::default(), Box::new(real_time)),
            i8042: I8042::new(log.clone()),
            slots: PciHotplug::new(power.clone(), log.clone()),
            power,
            panic: PvPanic::new(log.clone()),
            time,
            log,
        }
    }
}

impl Registers for Small {
    fn device(&self, number: u8) -> (&dyn BusDevice, Option<&dyn Persist>) {
        match number % 5 {
            0 => (&self.cmos, Some(&self.cmos)),
            1 => (&self.i8042, Some(&self.i8042)),
            2 => (&*self.power, Some(&*self.power)),
            3 => (&self.slots, Some(&self.slots)),
            _ => (&self.panic, None),
        }
    }

    fn event(&mut self, kind: u8, data: &[u8]) {
        let number = Reader(data).u64();
        match kind % 4 {
            // A host's clock shows what can be said in 64 bits of nanoseconds.
            0 => self.time.store(number % (1 << 34), Ordering::Relaxed),
            1 => self.power.press_power_button(),
            2 => self.slots.tell_inserted(number as u8),
            _ => self.slots.ask_to_eject(number as u8),
        }
    }

    fn reset(&mut self) {
        self.cmos.reset();
        self.i8042.reset();
        self.power.reset();
    }

    fn check(&mut self) {
        let requests = || std::mem::take(&mut *self.log.requests.lock().expect("no panic"));
        requests();
        self.power.write(0, &[5 << 2 | 1 << 5]);
        assert_eq!(requests(), [PowerRequest::Shutdown]);
        self.power.write(2, &[1]);
        self.i8042.write(4, &[0xfe]);
        assert_eq!(requests(), [PowerRequest::Reset; 2]);
        self.power.press_power_button();
        assert_eq!(read(&*self.power, 4) & 1, 1);
        self.slots.tell_inserted(3);
        let mut slots = [0; 4];
        self.slots.read(0, &mut slots);
        assert_eq!(slots[0] & 8, 8);
        self.log.ejected.lock().expect("no panic").clear();
        self.slots.write(8, &8_u32.to_le_bytes());
        assert_eq!(*self.log.ejected.lock().expect("no panic"), [3]);
        // The time as a guest sets it, in BCD and 24 hours, and a register that nothing else writes.
        for (register, value) in [
            (0xb, 0x82),
            (0, 0x59),
            (2, 0x30),
            (4, 0x23),
            (7, 0x28),
            (8, 0x02),
            (9, 0x24),
            (0x32, 0x20),
            (0xb, 0x02),
            (0x60, 0x77),
        ] {
            self.cmos.write(0, &[register]);
            self.cmos.write(1, &[value]);
        }
        for (register, value) in [
            (0, 0x59),
            (2, 0x30),
            (4, 0x23),
            (7, 0x28),
            (8, 0x02),
            (9, 0x24),
            (0x60, 0x77),
            (0xd, 0x80),
        ] {
            self.cmos.write(0, &[register]);
            assert_eq!(read(&self.cmos, 1), value, "register {register:#x}");
        }
        let panics = self.log.panics.load(Ordering::Relaxed);
        self.panic.write(0, &[1]);
        assert_eq!(self.log.panics.load(Ordering::Relaxed), panics + 1);
    }
}
