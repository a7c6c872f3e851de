//! The DSDT: the devices without a bus that could be searched, and soft off.
//!
//! ```text
//!   \_S5_                      SLP_TYP for soft off
//!   \_SB_.COM1  PNP0501        serial port                \_SB_.RTC_  PNP0B00   CMOS clock
//!   \_SB_.MBRD  PNP0C02        the ECAM window, reserved, when there is PCI
//!   \_SB_.PWRB  PNP0C0C  ◄── Notify ── \_SB_.GED_ ACPI0013 ◄── ACPI_EVENT_IRQ, flags in ACPI_EVENT_PORT
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};

use super::{AcpiConfig, Ecam};
use crate::x86_64::layout::{
    ACPI_EVENT_IRQ, ACPI_EVENT_PORT, ACPI_S5_SLEEP_TYPE, CMOS_PORT, SERIAL_IRQ, SERIAL_PORT,
};

/// Event flag of the power button.
const POWER_BUTTON_FLAG: u8 = 1;
/// Notification "S0 power button pressed" (ACPI 6.5, section 4.8.3.1.1.2, table 4.20).
const BUTTON_PRESSED: u8 = 0x80;

/// All behind the table's header.
pub(super) fn body(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    soft_off(&mut aml);
    power_button(&mut aml);
    rtc(&mut aml);
    if config.serial {
        serial(&mut aml);
    }
    if let Some(ecam) = config.ecam {
        reserved_window(ecam, &mut aml);
    }
    aml
}

fn soft_off(aml: &mut Vec<u8>) {
    // The second value is for a PM1b register, which there is not.
    let values = Package::new(vec![&ACPI_S5_SLEEP_TYPE, &ZERO]);
    Name::new(Path::new("_S5_"), &values).to_aml_bytes(aml);
}

/// One device in `\_SB_`.
fn device(aml: &mut Vec<u8>, name: &str, id: &dyn Aml, resources: Vec<&dyn Aml>) {
    let hid = Name::new(Path::new("_HID"), id);
    let uid = Name::new(Path::new("_UID"), &ZERO);
    let crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources));
    let device = Device::new(Path::new(name), vec![&hid, &uid, &crs]);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(aml);
}

/// An interrupt that a device consumes: edge-triggered, active high, exclusive.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn io(port: u16, len: u8) -> IO {
    IO::new(port, port, 1, len)
}

fn serial(aml: &mut Vec<u8>) {
    let (ports, interrupt) = (io(SERIAL_PORT, 8), edge(SERIAL_IRQ));
    device(
        aml,
        "COM1",
        &EISAName::new("PNP0501"),
        vec![&ports, &interrupt],
    );
}

fn rtc(aml: &mut Vec<u8>) {
    device(
        aml,
        "RTC_",
        &EISAName::new("PNP0B00"),
        vec![&io(CMOS_PORT, 2)],
    );
}

/// Tells the guest that nothing else may be put into the ECAM window (PCI Firmware Specification 3.3, section 4.1.2).
fn reserved_window(ecam: Ecam, aml: &mut Vec<u8>) {
    let len = (u32::from(ecam.last_bus) + 1) << 20;
    let window = Memory32Fixed::new(true, ecam.base as u32, len);
    device(aml, "MBRD", &EISAName::new("PNP0C02"), vec![&window]);
}

/// The power button and the generic event device (ACPI 6.5, section 5.6.9) that reports it. Reading the flags
/// clears them, so they are read once, as a whole.
fn power_button(aml: &mut Vec<u8>) {
    let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"));
    let button = Device::new(Path::new("PWRB"), vec![&hid]);

    let event_hid = Name::new(Path::new("_HID"), &"ACPI0013");
    let event_uid = Name::new(Path::new("_UID"), &ZERO);
    let interrupt = edge(ACPI_EVENT_IRQ);
    let event_crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt]));
    let region = OpRegion::new(
        Path::new("EVTR"),
        OpRegionSpace::SystemIO,
        &ACPI_EVENT_PORT,
        &1u8,
    );
    let field = Field::new(
        Path::new("EVTR"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVTF", 8)],
    );
    let (flags, pressed) = (Local(0), Local(1));
    let event_flags = Path::new("EVTF");
    let read = Store::new(&flags, &event_flags);
    let mask = And::new(&pressed, &flags, &POWER_BUTTON_FLAG);
    let target = Path::new("\\_SB_.PWRB");
    let notify = Notify::new(&target, &BUTTON_PRESSED);
    let is_pressed = Equal::new(&pressed, &POWER_BUTTON_FLAG);
    let when_pressed = If::new(&is_pressed, vec![&notify]);
    let is_ours = Equal::new(&Arg(0), &(ACPI_EVENT_IRQ as u8));
    let when_ours = If::new(&is_ours, vec![&read, &mask, &when_pressed]);
    let method = Method::new(Path::new("_EVT"), 1, true, vec![&when_ours]);
    let events = Device::new(
        Path::new("GED_"),
        vec![&event_hid, &event_uid, &event_crs, &region, &field, &method],
    );
    Scope::new(Path::new("_SB_"), vec![&button, &events]).to_aml_bytes(aml);
}
