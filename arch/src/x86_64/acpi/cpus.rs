//! The DSDT's processors, of a machine whose vCPUs can come and go.
//!
//! ```text
//!   \_SB_.CPUS  ACPI0010       registers at CPU_HOTPLUG_PORT, CSCN: notifies each vCPU that has come or is to go
//!      C000 … ACPI0007         _UID (as in the MADT), _MAT (its local APIC)
//!                              _STA  present?      _OST  what the guest made of a notification
//!                              _EJ0  it has let it go; the boot processor has none
//! ```
//!
//! The registers are rows of [`WORDS`] words with a bit for each vCPU: present, inserted (reading clears), leaving (reading clears), eject;
//! then one word for `_OST`. No method needs more than one access to say what it has to say, so that none need exclude another.

use acpi_tables::aml::{
    And, Arg, BufferData, Device, EISAName, Equal, If, Local, Method, Name, Or, Path, Return,
    Scope, ShiftLeft, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::hotplug::{DEVICE_CHECK, EJECT_REQUEST, Tell, registers};
use crate::x86_64::layout::CPU_HOTPLUG_PORT;

/// Words of a row: 256 vCPUs.
const WORDS: u8 = 8;
/// The method that tells of changes.
pub(super) const SCAN: &str = "\\_SB_.CPUS.CSCN";
/// `_STA` of a device that is there: present, enabled, shown, working (ACPI 6.5, section 6.3.7).
const PRESENT: u8 = 0xf;

/// The registers, each row's after the other's.
fn names() -> Vec<[u8; 4]> {
    let mut names: Vec<[u8; 4]> = ["CHR", "CIN", "CLV", "CEJ"]
        .iter()
        .flat_map(|row| (0..WORDS).map(move |word| name(row, word)))
        .collect();
    names.push(*b"COST");
    names
}

fn name(row: &str, word: u8) -> [u8; 4] {
    let mut name = [b'0' + word; 4];
    name[..3].copy_from_slice(&row.as_bytes()[..3]);
    name
}

fn path(row: &str, id: u8) -> Path {
    Path::new(&String::from_utf8_lossy(&name(row, id / 32)))
}

fn device(id: u8) -> String {
    format!("C{id:03}")
}

/// The container with a processor for each of `max_vcpus`, of which there are at most 255.
pub(super) fn container(max_vcpus: u32, aml: &mut Vec<u8>) {
    let hid = Name::new(Path::new("_HID"), &"ACPI0010");
    let cid = Name::new(Path::new("_CID"), &EISAName::new("PNP0A05"));
    let uid = Name::new(Path::new("_UID"), &ZERO);
    let processors = Processors(u8::try_from(max_vcpus).unwrap_or(u8::MAX));
    let container = Device::new(Path::new("CPUS"), vec![&hid, &cid, &uid, &processors]);
    Scope::new(Path::new("_SB_"), vec![&container]).to_aml_bytes(aml);
}

/// What is in the container.
struct Processors(u8);

impl Aml for Processors {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        registers("CHPR", CPU_HOTPLUG_PORT, &names(), sink);
        for id in 0..self.0 {
            processor(id, sink);
        }
        scan(self.0, sink);
    }
}

fn processor(id: u8, sink: &mut dyn AmlSink) {
    let hid = Name::new(Path::new("_HID"), &"ACPI0007");
    let uid = Name::new(Path::new("_UID"), &id);
    // Processor local APIC structure (section 5.2.12.2): enabled, for only one that is present is asked for it.
    let apic = BufferData::new(vec![0, 8, id, id, 1, 0, 0, 0]);
    let apic = Name::new(Path::new("_MAT"), &apic);
    let bit = 1u32 << (id % 32);

    let (here, masked) = (path("CHR", id), Local(0));
    let look = And::new(&masked, &here, &bit);
    let (there, gone) = (Return::new(&PRESENT), Return::new(&ZERO));
    let set = Equal::new(&masked, &bit);
    let if_there = If::new(&set, vec![&there]);
    let status = Method::new(Path::new("_STA"), 0, false, vec![&look, &if_there, &gone]);

    // Section 6.3.5: the notification, its outcome, and more that nobody needs.
    let (event, outcome, word, register) = (Local(0), Local(1), Local(2), Path::new("COST"));
    let event_bits = And::new(&event, &Arg(0), &0xffffu32);
    let outcome_bits = And::new(&outcome, &Arg(1), &0xffu32);
    let shifted = ShiftLeft::new(&outcome, &outcome, &16u8);
    let both = Or::new(&word, &event, &outcome);
    let own = u32::from(id) << 24;
    let all = Or::new(&word, &word, &own);
    let say = Store::new(&register, &word);
    let answer = Method::new(
        Path::new("_OST"),
        3,
        false,
        vec![&event_bits, &outcome_bits, &shifted, &both, &all, &say],
    );

    let ejected = path("CEJ", id);
    let eject = Store::new(&ejected, &bit);
    // Section 6.3.3: the argument is 1 for eject.
    let eject = Method::new(Path::new("_EJ0"), 1, false, vec![&eject]);
    let mut parts: Vec<&dyn Aml> = vec![&hid, &uid, &apic, &status, &answer];
    if id != 0 {
        parts.push(&eject);
    }
    Device::new(Path::new(&device(id)), parts).to_aml_bytes(sink);
}

/// Reads each word once, which clears it, and notifies whom it is about.
fn scan(processors: u8, sink: &mut dyn AmlSink) {
    let mut body: Vec<Box<dyn Aml>> = Vec::new();
    for first in (0..processors).step_by(32) {
        body.push(Box::new(Read(path("CIN", first), 0)));
        body.push(Box::new(Read(path("CLV", first), 1)));
        for id in first..processors.min(first.saturating_add(32)) {
            for (local, what) in [(0, DEVICE_CHECK), (1, EJECT_REQUEST)] {
                if what == EJECT_REQUEST && id == 0 {
                    continue;
                }
                body.push(Box::new(Tell {
                    who: device(id),
                    bit: 1 << (id % 32),
                    local,
                    what,
                }));
            }
        }
    }
    let body = body.iter().map(|part| &**part).collect();
    Method::new(Path::new("CSCN"), 0, true, body).to_aml_bytes(sink);
}

/// Reads a register into a local variable.
struct Read(Path, u8);

impl Aml for Read {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Store::new(&Local(self.1), &self.0).to_aml_bytes(sink);
    }
}
