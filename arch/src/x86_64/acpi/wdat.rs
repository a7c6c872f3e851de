//! The WDAT: how an operating system drives the watchdog without a driver for it (Microsoft, "Hardware Watchdog Timers Design
//! Specification", version 1.0, and ACPI 6.5, section 5.2.6, which reserves the signature).
//!
//! Each entry says which register an action reads or writes, and with which value; `devices::watchdog` has the registers.

use crate::x86_64::layout::{
    WATCHDOG_MAX_COUNT, WATCHDOG_MIN_COUNT, WATCHDOG_PERIOD_MS, WATCHDOG_PORT,
};

// Registers of 32 bits, from the first port on.
const CONTROL: u16 = 0;
const COUNTDOWN: u16 = 4;
const CURRENT: u16 = 8;
const STATUS: u16 = 12;

// Instructions.
const READ_VALUE: u8 = 0;
const READ_COUNTDOWN: u8 = 1;
const WRITE_VALUE: u8 = 2;
const WRITE_COUNTDOWN: u8 = 3;

/// Counts have so many bits.
const COUNT_MASK: u32 = 0xffff;

/// Action, instruction, register, value, mask.
const ENTRIES: [(u8, u8, u16, u32, u32); 10] = [
    // The countdown begins anew.
    (1, WRITE_VALUE, CURRENT, 1, 1),
    // What is left of it; what it begins with; sets that.
    (4, READ_COUNTDOWN, CURRENT, 0, COUNT_MASK),
    (5, READ_COUNTDOWN, COUNTDOWN, 0, COUNT_MASK),
    (6, WRITE_COUNTDOWN, COUNTDOWN, 0, COUNT_MASK),
    // Whether it runs; starts it; whether it stands; stops it.
    (8, READ_VALUE, CONTROL, 1, 1),
    (9, WRITE_VALUE, CONTROL, 1, 1),
    (10, READ_VALUE, CONTROL, 0, 1),
    (11, WRITE_VALUE, CONTROL, 0, 1),
    // Whether the machine was reset by it; forgets that.
    (32, READ_VALUE, STATUS, 1, 1),
    (33, WRITE_VALUE, STATUS, 1, 1),
];

/// It is there.
const ENABLED: u8 = 1;
/// It stands still while the machine sleeps.
const STOPPED_IN_SLEEP: u8 = 0x80;
/// Of the part between the table's header and the entries.
const HEADER_LEN: u32 = 32;

/// All behind the table's header.
pub(super) fn body() -> Vec<u8> {
    let mut bytes = HEADER_LEN.to_le_bytes().to_vec();
    // Not a PCI device: segment, bus, device, function; three reserved bytes.
    bytes.extend([0xff, 0, 0xff, 0xff, 0xff, 0, 0, 0]);
    for number in [WATCHDOG_PERIOD_MS, WATCHDOG_MAX_COUNT, WATCHDOG_MIN_COUNT] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend([ENABLED | STOPPED_IN_SLEEP, 0, 0, 0]);
    bytes.extend((ENTRIES.len() as u32).to_le_bytes());
    for (action, instruction, register, value, mask) in ENTRIES {
        bytes.extend([action, instruction, 0, 0]);
        // Generic address (ACPI 6.5, table 5.1): system I/O, 32 bits wide from bit 0 on, accessed as doublewords.
        bytes.extend([1, 32, 0, 3]);
        bytes.extend(u64::from(WATCHDOG_PORT + register).to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend(mask.to_le_bytes());
    }
    bytes
}
