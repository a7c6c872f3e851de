//! Power off and reset, through what the ACPI FADT names (ACPI 6.5, section 5.2.9).

use core::sync::atomic::{AtomicU64, Ordering};

use super::{acpi, serial, service};

/// SLP_EN with SLP_TYP 5: S5 of this project, of QEMU's microvm and of Cloud Hypervisor (4.8.3.7).
const SLEEP_S5: u8 = 0x20 | (5 << 2);
/// Where this project's machines have the sleep control and the reset register.
const DEFAULT_SLEEP_PORT: u16 = 0x600;
const DEFAULT_RESET_PORT: u16 = 0x602;
const DEFAULT_RESET_VALUE: u64 = 1;

// Offsets in the FADT.
const RESET_REG: u64 = 116;
const RESET_VALUE: u64 = 128;
const SLEEP_CONTROL_REG: u64 = 244;
const GAS_SIZE: u64 = 12;

/// Set in a stored address that is a port.
const IO: u64 = 1 << 63;

static SLEEP: AtomicU64 = AtomicU64::new(0);
static RESET: AtomicU64 = AtomicU64::new(0);
static RESET_WITH: AtomicU64 = AtomicU64::new(DEFAULT_RESET_VALUE);

/// A generic address structure: space (0 memory, 1 I/O), width, offset, access size, address.
fn register(table: u64, offset: u64) -> u64 {
    // SAFETY: the caller has checked that the table reaches as far.
    let (space, address): (u8, u64) =
        unsafe { (acpi::read(table + offset), acpi::read(table + offset + 4)) };
    match (space, address) {
        (_, 0) => 0,
        (0, address) if acpi::mapped(address) => address,
        (1, port) if port <= 0xffff => IO | port,
        _ => 0,
    }
}

/// Looks up the registers, once at the start.
pub(super) fn discover(rsdp: u64) {
    let Some(fadt) = acpi::find_table(rsdp, b"FACP") else {
        return;
    };
    // SAFETY: `find_table` returns mapped tables.
    let length = u64::from(unsafe { acpi::read::<u32>(fadt + 4) });
    if length > RESET_VALUE {
        RESET.store(register(fadt, RESET_REG), Ordering::Relaxed);
        // SAFETY: as above, and within its length.
        let value: u8 = unsafe { acpi::read(fadt + RESET_VALUE) };
        RESET_WITH.store(u64::from(value), Ordering::Relaxed);
    }
    if length >= SLEEP_CONTROL_REG + GAS_SIZE {
        SLEEP.store(register(fadt, SLEEP_CONTROL_REG), Ordering::Relaxed);
    }
}

fn write(register: u64, value: u8) {
    if register & IO != 0 {
        serial::outb(register as u16, value);
    } else {
        // SAFETY: a device register that ACPI names, mapped below 4 GiB.
        unsafe { (register as *mut u8).write_volatile(value) };
    }
}

/// Powers off by ACPI S5; where nothing answers, this CPU stops.
pub fn power_off() -> ! {
    match SLEEP.load(Ordering::Relaxed) {
        0 => serial::outb(DEFAULT_SLEEP_PORT, SLEEP_S5),
        register => write(register, SLEEP_S5),
    }
    service::halt()
}

/// Resets by the ACPI reset register, then the keyboard controller, then a triple fault.
pub fn reset() -> ! {
    match RESET.load(Ordering::Relaxed) {
        0 => serial::outb(DEFAULT_RESET_PORT, DEFAULT_RESET_VALUE as u8),
        register => write(register, RESET_WITH.load(Ordering::Relaxed) as u8),
    }
    serial::outb(0x64, 0xfe);
    service::triple_fault()
}
