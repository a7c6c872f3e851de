//! Guest writes that become events without an access on the bus.

use std::sync::Arc;

use hypervisor::{Hypervisor, IoEventAddress, IoEventMatch};
use iced_x86::code_asm::*;

use super::interrupts::event;
use crate::guest::{Access, Guest, Idioms as _, MMIO};
use crate::outcome::{Outcome, ensure, same};

pub(super) fn memory_writes(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, MMIO as u32)?;
            a.mov(eax, 6)?;
            a.mov(word_ptr(rdi), ax)?;
            a.mov(dword_ptr(rdi), eax)?;
            a.mov(word_ptr(rdi + 0x10), ax)?;
            a.mov(byte_ptr(rdi + 0x20), al)?;
            a.stop()?;
            a.mov(word_ptr(rdi), ax)?;
            a.stop_for_good()
        })?;
        let (any, word) = (event()?, event()?);
        let two = IoEventMatch::Value { size: 2, value: 6 };
        let vm = Arc::clone(&guest.vm);
        vm.register_ioevent(&any, IoEventAddress::Mmio(MMIO), IoEventMatch::Any)?;
        vm.register_ioevent(&word, IoEventAddress::Mmio(MMIO + 0x10), two)?;
        guest.run()?;
        same!(
            guest.bus.take(),
            [Access::Write(MMIO + 0x20, vec![6])],
            "what matches no event in ring {ring}"
        );
        same!((any.read()?, word.read()?), (2, 1), "events");
        vm.unregister_ioevent(&any, IoEventAddress::Mmio(MMIO), IoEventMatch::Any)?;
        guest.run()?;
        same!(
            guest.bus.take(),
            [Access::Write(MMIO, vec![6, 0])],
            "a write after the end"
        );
        ensure!(any.read().is_err(), "an event after the end");
    }
    Ok(())
}

/// Only the value that was asked for is an event.
pub(super) fn memory_writes_of_a_value(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(edi, MMIO as u32)?;
        for value in [5, 6, 5] {
            a.mov(dword_ptr(rdi), value)?;
        }
        a.stop_for_good()
    })?;
    let five = event()?;
    let exact = IoEventMatch::Value { size: 4, value: 5 };
    guest
        .vm
        .register_ioevent(&five, IoEventAddress::Mmio(MMIO), exact)?;
    guest.run()?;
    same!(
        guest.bus.take(),
        [Access::Write(MMIO, vec![6, 0, 0, 0])],
        "other values"
    );
    same!(five.read()?, 2, "events");
    Ok(())
}

pub(super) fn port_writes(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.mov(edx, 0x530)?;
        a.mov(eax, 5)?;
        a.out(dx, eax)?;
        a.mov(eax, 6)?;
        a.out(dx, eax)?;
        a.stop_for_good()
    })?;
    let port = event()?;
    let exact = IoEventMatch::Value { size: 4, value: 5 };
    guest
        .vm
        .register_ioevent(&port, IoEventAddress::Pio(0x530), exact)?;
    guest.run()?;
    same!(
        guest.bus.take(),
        [Access::Out(0x530, vec![6, 0, 0, 0])],
        "what matches no event"
    );
    same!(port.read()?, 1, "events");
    Ok(())
}

pub(super) fn wrong_registrations_are_refused(hypervisor: &dyn Hypervisor) -> Outcome {
    let guest = Guest::new(hypervisor)?;
    let event = event()?;
    let at = IoEventAddress::Mmio(MMIO);
    let odd = IoEventMatch::Value { size: 3, value: 0 };
    ensure!(
        guest.vm.register_ioevent(&event, at, odd).is_err(),
        "a match of 3 bytes was taken"
    );
    ensure!(
        guest
            .vm
            .unregister_ioevent(&event, at, IoEventMatch::Any)
            .is_err(),
        "what was never registered was taken away"
    );
    Ok(())
}
