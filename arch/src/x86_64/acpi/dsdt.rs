//! The DSDT: the devices without a bus that could be searched, and soft off.
//!
//! ```text
//!   \_S5_                      SLP_TYP for soft off
//!   \_SB_.COM1  PNP0501        serial port                \_SB_.RTC_  PNP0B00   CMOS clock
//!   \_SB_.PEVT  QEMU0001       pvpanic, when it is there
//!   \_SB_.PCI0  PNP0A08        PCI host bridge with its bus numbers and addresses  \ when there
//!   \_SB_.MBRD  PNP0C02        the ECAM window, reserved                          / is PCI
//!   \_SB_.CPUS  ACPI0010       the processors, when they can come and go (cpus.rs)
//!   \_SB_.PWRB  PNP0C0C  ◄── Notify ── \_SB_.GED_ ACPI0013 ◄── ACPI_EVENT_IRQ, flags in ACPI_EVENT_PORT
//! ```

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method,
    MethodCall, Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope,
    Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::hotplug::{DEVICE_CHECK, EJECT_REQUEST, Tell, registers};
use super::{AcpiConfig, Ecam, cpus};
use crate::x86_64::layout::{
    ACPI_EVENT_IRQ, ACPI_EVENT_PORT, ACPI_S5_SLEEP_TYPE, CMOS_PORT, PCI_HOTPLUG_PORT,
    PCI_MMIO_BASE, PCI_MMIO_SIZE, PCI_SLOTS, PVPANIC_PORT, SERIAL_IRQ, SERIAL_PORT,
};

/// Event flag of the power button.
const POWER_BUTTON_FLAG: u8 = 1;
/// Event flag of PCI slots.
const PCI_FLAG: u8 = 2;
/// Event flag of vCPUs.
const CPU_FLAG: u8 = 4;
/// Notification "S0 power button pressed" (ACPI 6.5, section 4.8.3.1.1.2, table 4.20).
const BUTTON_PRESSED: u8 = 0x80;

/// All behind the table's header.
pub(super) fn body(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    soft_off(&mut aml);
    events(config, &mut aml);
    rtc(&mut aml);
    if config.serial {
        serial(&mut aml);
    }
    if config.pvpanic {
        device(&mut aml, "PEVT", &"QEMU0001", vec![&io(PVPANIC_PORT, 1)]);
    }
    if let Some(ecam) = config.ecam {
        reserved_window(ecam, &mut aml);
        host_bridge(ecam, &mut aml);
    }
    if config.cpu_hotplug {
        cpus::container(config.max_vcpus, &mut aml);
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

/// The PCI Express host bridge (PCI Firmware Specification 3.3, section 4.3). There is no `_PRT`: nothing has INTx.
fn host_bridge(ecam: Ecam, aml: &mut Vec<u8>) {
    let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0A08"));
    let cid = Name::new(Path::new("_CID"), &EISAName::new("PNP0A03"));
    let uid = Name::new(Path::new("_UID"), &ZERO);
    let segment = Name::new(Path::new("_SEG"), &ZERO);
    let first_bus = Name::new(Path::new("_BBN"), &ZERO);
    let buses = AddressSpace::new_bus_number(0u16, u16::from(ecam.last_bus));
    let last = (PCI_MMIO_BASE + PCI_MMIO_SIZE - 1) as u32;
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_MMIO_BASE as u32,
        last,
        None,
    );
    let resources = ResourceTemplate::new(vec![&buses, &window]);
    let crs = Name::new(Path::new("_CRS"), &resources);
    let slots = Slots;
    let bridge = Device::new(
        Path::new("PCI0"),
        vec![&hid, &cid, &uid, &segment, &first_bus, &crs, &slots],
    );
    Scope::new(Path::new("_SB_"), vec![&bridge]).to_aml_bytes(aml);
}

/// What is in the host bridge's scope for hotplug: the registers, the slots, and the method that tells of their changes.
struct Slots;

impl Aml for Slots {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        registers(
            "PHPR",
            PCI_HOTPLUG_PORT,
            &[*b"PINS", *b"PLEV", *b"PEJC"],
            sink,
        );
        for slot in 1..PCI_SLOTS {
            let address = Name::new(Path::new("_ADR"), &(u32::from(slot) << 16));
            let number = Name::new(Path::new("_SUN"), &slot);
            let (register, bit) = (Path::new("PEJC"), 1u32 << slot);
            let eject = Store::new(&register, &bit);
            // ACPI 6.5, section 6.3.3: the argument is 1 for eject.
            let eject = Method::new(Path::new("_EJ0"), 1, true, vec![&eject]);
            Device::new(Path::new(&slot_name(slot)), vec![&address, &number, &eject])
                .to_aml_bytes(sink);
        }
        let (inserted, leaving) = (Path::new("PINS"), Path::new("PLEV"));
        let (come, go) = (Local(0), Local(1));
        let read = [Store::new(&come, &inserted), Store::new(&go, &leaving)];
        let tells: Vec<Tell> = (1..PCI_SLOTS)
            .flat_map(|slot| {
                [(0, DEVICE_CHECK), (1, EJECT_REQUEST)].map(|(local, what)| Tell {
                    who: slot_name(slot),
                    bit: 1 << slot,
                    local,
                    what,
                })
            })
            .collect();
        let mut body: Vec<&dyn Aml> = vec![&read[0], &read[1]];
        body.extend(tells.iter().map(|tell| tell as &dyn Aml));
        Method::new(Path::new("PSCN"), 0, true, body).to_aml_bytes(sink);
    }
}

fn slot_name(slot: u8) -> String {
    format!("S{slot:02}_")
}

/// The power button and the generic event device (ACPI 6.5, section 5.6.9) that reports it. Reading the flags
/// clears them, so they are read once, as a whole.
fn events(config: &AcpiConfig, aml: &mut Vec<u8>) {
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
    let scan = MethodCall::new(Path::new("\\_SB_.PCI0.PSCN"), Vec::new());
    let mask_slots = And::new(&pressed, &flags, &PCI_FLAG);
    let are_slots = Equal::new(&pressed, &PCI_FLAG);
    let when_slots = If::new(&are_slots, vec![&scan]);
    let scan_cpus = MethodCall::new(Path::new(cpus::SCAN), Vec::new());
    let mask_cpus = And::new(&pressed, &flags, &CPU_FLAG);
    let are_cpus = Equal::new(&pressed, &CPU_FLAG);
    let when_cpus = If::new(&are_cpus, vec![&scan_cpus]);
    let is_ours = Equal::new(&Arg(0), &(ACPI_EVENT_IRQ as u8));
    let mut what: Vec<&dyn Aml> = vec![&read, &mask, &when_pressed];
    if config.ecam.is_some() {
        what.extend([&mask_slots as &dyn Aml, &when_slots]);
    }
    if config.cpu_hotplug {
        what.extend([&mask_cpus as &dyn Aml, &when_cpus]);
    }
    let when_ours = If::new(&is_ours, what);
    let method = Method::new(Path::new("_EVT"), 1, true, vec![&when_ours]);
    let events = Device::new(
        Path::new("GED_"),
        vec![&event_hid, &event_uid, &event_crs, &region, &field, &method],
    );
    Scope::new(Path::new("_SB_"), vec![&button, &events]).to_aml_bytes(aml);
}
