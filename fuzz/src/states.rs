//! Saved states that nobody has saved: the first byte of an input is the device, the rest what is to be restored.

use std::sync::Arc;

use devices::{Persist, SavedState};

use crate::machine::Machine;
use crate::registers::{Apic, Registers, SerialPort, Small};
use crate::{ram, subjects};

/// The kinds in the order of the first byte, and the fixtures that seeds are made of.
pub const KINDS: [&str; 11] = [
    "ioapic",
    "serial",
    "cmos",
    "i8042",
    "acpi-power",
    "virtio-blk",
    "virtio-net",
    "virtio-console",
    "virtio-rng",
    "virtio-balloon",
    "virtio-vsock",
];

/// Restores, lets the guest go on, and sees whether all works after a reset.
pub fn run(data: &[u8]) -> u64 {
    let Some((kind, data)) = data.split_first() else {
        return 0;
    };
    let kind = usize::from(*kind) % KINDS.len();
    let state = SavedState {
        kind: KINDS[kind].to_owned(),
        version: 1,
        data: data.to_vec(),
    };
    let ram = ram::fresh();
    let subject = match kind {
        0 => return restore(Apic::default(), 0, &state),
        1 => return restore(SerialPort::default(), 0, &state),
        2..=4 => return restore(Small::default(), kind as u8 - 2, &state),
        5 => subjects::block(false),
        6 => subjects::net(),
        7 => subjects::console(),
        8 => subjects::rng(),
        9 => subjects::balloon(&ram),
        _ => subjects::vsock(),
    };
    Machine::on(Arc::clone(&ram), vec![subject]).run_restored(&state);
    0
}

fn restore(mut registers: impl Registers, number: u8, state: &SavedState) -> u64 {
    if let (device, Some(persist)) = registers.device(number) {
        take(persist, state);
        for at in 0..0x20 {
            device.read(at, &mut [0; 4]);
            device.write(at, &[0xff; 4]);
        }
    }
    registers.reset();
    registers.check();
    0
}

/// Restores a state. If it is taken, what is saved then is taken too; if it is not, nothing has changed.
pub fn take(persist: &dyn Persist, state: &SavedState) {
    let before = persist.save();
    if persist.restore(state).is_ok() {
        let saved = persist.save();
        persist.restore(&saved).expect("its own state");
        assert_eq!(persist.save(), saved);
    } else {
        assert_eq!(
            persist.save(),
            before,
            "a state that is refused changes nothing"
        );
    }
}
