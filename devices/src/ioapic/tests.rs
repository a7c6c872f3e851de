//! The IOAPIC against its data sheet, by its registers and lines only.

use std::sync::Arc;

use super::*;
use crate::testing::MsiLog;

const MASKED: u32 = 1 << 16;
const LEVEL: u32 = 1 << 15;
const REMOTE_IRR: u32 = 1 << 14;

fn ioapic() -> (Arc<Ioapic>, Arc<MsiLog>) {
    let log = Arc::new(MsiLog::default());
    (Arc::new(Ioapic::new(log.clone())), log)
}

fn read(ioapic: &Ioapic, register: u8) -> u32 {
    ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes());
    let mut data = [0; 4];
    ioapic.read(IOWIN, &mut data);
    u32::from_le_bytes(data)
}

fn write(ioapic: &Ioapic, register: u8, value: u32) {
    ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes());
    ioapic.write(IOWIN, &value.to_le_bytes());
}

fn lower(pin: u8) -> u8 {
    0x10 + 2 * pin
}

fn line(ioapic: &Arc<Ioapic>, pin: u32) -> Arc<dyn InterruptLine> {
    ioapic.line(pin)
}

const ADDRESS: u64 = 0xfee0_0000;

#[test]
fn registers_after_power_on_and_their_writable_bits() {
    let (ioapic, _) = ioapic();
    assert_eq!(read(&ioapic, 1), 0x0017_0020);
    assert_eq!(read(&ioapic, 0), 0);
    write(&ioapic, 0, 0xffff_ffff);
    assert_eq!(read(&ioapic, 0), 0x0f00_0000);
    assert_eq!(read(&ioapic, 2), 0x0f00_0000);
    write(&ioapic, 1, 0);
    assert_eq!(read(&ioapic, 1), 0x0017_0020);
    for pin in 0..24 {
        assert_eq!(read(&ioapic, lower(pin)), MASKED, "{pin}");
        assert_eq!(read(&ioapic, lower(pin) + 1), 0, "{pin}");
        write(&ioapic, lower(pin), 0xffff_ffff);
        write(&ioapic, lower(pin) + 1, 0xffff_ffff);
        // Delivery status (12) and remote IRR (14) are read-only.
        assert_eq!(read(&ioapic, lower(pin)), 0x0001_afff, "{pin}");
        assert_eq!(read(&ioapic, lower(pin) + 1), 0xfffe_0000, "{pin}");
    }
    assert_eq!(read(&ioapic, 0x40), 0);
    assert_eq!(read(&ioapic, 0xff), 0);
}

#[test]
fn narrow_and_wide_accesses() {
    let (ioapic, _) = ioapic();
    ioapic.write(IOREGSEL, &[1]);
    let (mut byte, mut wide) = ([0], [0xff; 8]);
    ioapic.read(IOWIN + 2, &mut byte);
    ioapic.read(IOWIN, &mut wide);
    assert_eq!((byte, wide), ([0x17], [0x20, 0, 0x17, 0, 0, 0, 0, 0]));
    // A write that is too narrow for the window changes nothing.
    ioapic.write(IOREGSEL, &[0x10]);
    ioapic.write(IOWIN, &[0x55, 0x55]);
    assert_eq!(read(&ioapic, 0x10), MASKED);
}

#[test]
fn messages_carry_destination_mode_and_vector() {
    let (ioapic, log) = ioapic();
    // (upper half, lower half, address, data)
    for (upper, value, address, data) in [
        (0x0000_0000, 0x30, ADDRESS, 0x30),
        (0x0500_0000, 0x31, ADDRESS | 5 << 12, 0x31),
        (0xff00_0000, 0x0831, ADDRESS | 0xff << 12 | 4, 0x31),
        (0x0300_0000, 0x0931, ADDRESS | 3 << 12 | 4, 0x131),
        (0x0300_0000, 0x0400, ADDRESS | 3 << 12, 0x400),
        (0x0000_0000, 0x0731, ADDRESS, 0x731),
        // Destination 0x1203: the low byte where it always was, the rest in the address's upper half.
        (0x0324_0000, 0x31, ADDRESS | 3 << 12 | 0x12 << 40, 0x31),
        // NMI is edge-triggered whatever the trigger mode says.
        (0x0000_0000, LEVEL | 0x0400, ADDRESS, 0x400),
        (0x0000_0000, LEVEL | 0x2031, ADDRESS, 0xc031),
    ] {
        write(&ioapic, lower(7), MASKED);
        write(&ioapic, lower(7) + 1, upper);
        write(&ioapic, lower(7), value);
        line(&ioapic, 7).trigger();
        assert_eq!(log.messages(), [(address, data)], "{upper:#x} {value:#x}");
    }
}

#[test]
fn nothing_is_sent_that_nothing_would_accept() {
    let (ioapic, log) = ioapic();
    for value in [0x00, 0x0f, LEVEL, LEVEL | 0x10f, 0x0331, 0x0631] {
        write(&ioapic, lower(0), value);
        line(&ioapic, 0).trigger();
        line(&ioapic, 0).set_level(true);
        line(&ioapic, 0).set_level(false);
        assert_eq!(log.messages(), [], "{value:#x}");
        assert_eq!(read(&ioapic, lower(0)) & REMOTE_IRR, 0, "{value:#x}");
    }
    assert_eq!(log.routes(), []);
}

#[test]
fn lines_beyond_the_last_pin_lead_nowhere() {
    let (ioapic, log) = ioapic();
    for pin in 0..24 {
        write(&ioapic, lower(pin), 0x30);
    }
    for pin in [24, 32, u32::MAX] {
        line(&ioapic, pin).trigger();
        line(&ioapic, pin).set_level(true);
    }
    assert_eq!(log.messages(), []);
    line(&ioapic, 23).trigger();
    assert_eq!(log.messages(), [(ADDRESS, 0x30)]);
}

#[test]
fn edge_pins_send_on_rising_lines_and_forget_while_masked() {
    let (ioapic, log) = ioapic();
    let pin = line(&ioapic, 4);
    pin.trigger();
    pin.set_level(true);
    write(&ioapic, lower(4), 0x34);
    assert_eq!(log.messages(), []);
    pin.set_level(true);
    assert_eq!(log.messages(), []);
    pin.set_level(false);
    pin.set_level(true);
    pin.trigger();
    assert_eq!(log.messages(), [(ADDRESS, 0x34); 2]);
    ioapic.end_of_interrupt(0x34);
    assert_eq!(log.messages(), []);
    assert_eq!(log.routes(), []);
}

#[test]
fn level_pins_wait_for_the_end_of_interrupt() {
    let (ioapic, log) = ioapic();
    let pin = line(&ioapic, 9);
    let message = (ADDRESS, 0xc039);
    write(&ioapic, lower(9), LEVEL | 0x39);
    pin.set_level(true);
    pin.set_level(true);
    assert_eq!(log.messages(), [message]);
    assert_eq!(read(&ioapic, lower(9)), LEVEL | REMOTE_IRR | 0x39);
    // Another vector's end is not this pin's.
    ioapic.end_of_interrupt(0x3a);
    assert_eq!(log.messages(), []);
    // Still active: again.
    ioapic.end_of_interrupt(0x39);
    assert_eq!(log.messages(), [message]);
    pin.set_level(false);
    ioapic.end_of_interrupt(0x39);
    assert_eq!(log.messages(), []);
    assert_eq!(read(&ioapic, lower(9)), LEVEL | 0x39);
    // A pulse is sent once, and not while the last is being served.
    pin.trigger();
    pin.trigger();
    assert_eq!(log.messages(), [message]);
    // The EOI register does what the local APIC's message does.
    ioapic.write(EOI, &0x39u32.to_le_bytes());
    assert_eq!(read(&ioapic, lower(9)), LEVEL | 0x39);
}

#[test]
fn a_masked_level_pin_keeps_its_level_and_its_end_of_interrupt() {
    let (ioapic, log) = ioapic();
    let pin = line(&ioapic, 9);
    let route = Some(IoapicRoute {
        address: ADDRESS,
        data: 0xc039,
    });
    write(&ioapic, lower(9), MASKED | LEVEL | 0x39);
    pin.set_level(true);
    assert_eq!((log.messages(), log.routes()), (vec![], vec![]));
    write(&ioapic, lower(9), LEVEL | 0x39);
    assert_eq!(
        (log.messages(), log.routes()),
        (vec![(ADDRESS, 0xc039)], vec![(9, route)])
    );
    // Masked before it is acknowledged: the end counts, and nothing is sent until unmasked.
    write(&ioapic, lower(9), MASKED | LEVEL | 0x39);
    assert_eq!(read(&ioapic, lower(9)) & REMOTE_IRR, REMOTE_IRR);
    ioapic.end_of_interrupt(0x39);
    assert_eq!(read(&ioapic, lower(9)) & REMOTE_IRR, 0);
    assert_eq!(log.messages(), []);
    write(&ioapic, lower(9), LEVEL | 0x39);
    assert_eq!(
        (log.messages(), log.routes()),
        (vec![(ADDRESS, 0xc039)], vec![])
    );
}

#[test]
fn turning_a_pin_to_edge_and_back_is_an_end_of_interrupt() {
    let (ioapic, log) = ioapic();
    write(&ioapic, lower(5), LEVEL | 0x45);
    line(&ioapic, 5).trigger();
    write(&ioapic, lower(5), MASKED | 0x45);
    write(&ioapic, lower(5), LEVEL | 0x45);
    line(&ioapic, 5).trigger();
    assert_eq!(log.messages(), [(ADDRESS, 0xc045); 2]);
}

#[test]
fn routes_are_told_when_they_really_change() {
    let (ioapic, log) = ioapic();
    let level = |address, vector: u32| {
        Some(IoapicRoute {
            address,
            data: 0xc000 | vector,
        })
    };
    write(&ioapic, lower(3), LEVEL | 0x33);
    write(&ioapic, lower(3), LEVEL | 0x33);
    write(&ioapic, lower(3), MASKED | LEVEL | 0x33);
    write(&ioapic, lower(3) + 1, 0x0200_0000);
    assert_eq!(log.routes(), [(3, level(ADDRESS, 0x33))]);
    write(&ioapic, lower(3), LEVEL | 0x33);
    assert_eq!(log.routes(), [(3, level(ADDRESS | 2 << 12, 0x33))]);
    write(&ioapic, lower(3), 0x33);
    assert_eq!(log.routes(), [(3, None)]);
    write(&ioapic, lower(3), LEVEL | 0x33);
    ioapic.reset();
    assert_eq!(
        log.routes(),
        [(3, level(ADDRESS | 2 << 12, 0x33)), (3, None)]
    );
    assert_eq!(read(&ioapic, lower(3)), MASKED);
}

#[test]
fn two_pins_with_one_vector_end_together() {
    let (ioapic, log) = ioapic();
    for pin in [10, 11] {
        write(&ioapic, lower(pin), LEVEL | 0x50);
        line(&ioapic, u32::from(pin)).set_level(true);
    }
    line(&ioapic, 10).set_level(false);
    assert_eq!(log.messages().len(), 2);
    ioapic.end_of_interrupt(0x50);
    assert_eq!(log.messages().len(), 1);
    assert_eq!(read(&ioapic, lower(10)) & REMOTE_IRR, 0);
    assert_eq!(read(&ioapic, lower(11)) & REMOTE_IRR, REMOTE_IRR);
}

#[test]
fn a_level_interrupt_in_service_moves() {
    let (from, _) = ioapic();
    write(&from, 0, 0x0500_0000);
    write(&from, lower(9), LEVEL | 0x39);
    line(&from, 9).set_level(true);
    write(&from, lower(9), MASKED | LEVEL | 0x39);
    write(&from, lower(10), LEVEL | 0x3a);
    write(&from, lower(11), MASKED | LEVEL | 0x3b);
    write(&from, lower(4), 0x34);
    from.write(IOREGSEL, &[lower(4)]);

    let (to, log) = ioapic();
    write(&to, lower(20), LEVEL | 0x99);
    log.routes();
    to.restore(&from.save()).expect("own state");
    assert_eq!(to.save(), from.save());
    // Nothing is sent twice; what needs an end of interrupt is announced, what was there before is withdrawn.
    assert_eq!(log.messages(), []);
    let level = |data| {
        Some(IoapicRoute {
            address: ADDRESS,
            data,
        })
    };
    assert_eq!(
        log.routes(),
        [(9, level(0xc039)), (10, level(0xc03a)), (20, None)]
    );
    // The line is still active, and the guest ends the service on the new host.
    to.end_of_interrupt(0x39);
    assert_eq!(log.messages(), []);
    write(&to, lower(9), LEVEL | 0x39);
    assert_eq!(log.messages(), [(ADDRESS, 0xc039)]);
}
