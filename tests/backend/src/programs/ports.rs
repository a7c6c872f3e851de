//! IN and OUT.

use hypervisor::{ExitBus, Hypervisor, VcpuExit};
use iced_x86::code_asm::*;

use crate::guest::{Access, Bus, CODE, DATA, Guest, Idioms as _};
use crate::outcome::{Outcome, ensure, same};
use crate::watchdog;

/// What OUT of AL, AX and EAX = 0x11223344, then IN of the same, look like from outside.
fn six_accesses(port: u16) -> [Access; 6] {
    [
        Access::Out(port, vec![0x44]),
        Access::Out(port, vec![0x44, 0x33]),
        Access::Out(port, vec![0x44, 0x33, 0x22, 0x11]),
        Access::In(port, 1),
        Access::In(port, 2),
        Access::In(port, 4),
    ]
}

pub(super) fn all_widths(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::real(hypervisor, &|a| {
        a.mov(dx, 0x510)?;
        a.mov(eax, 0x1122_3344)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.xor(eax, eax)?;
        a.in_(al, dx)?;
        a.mov(dword_ptr(DATA), eax)?;
        a.xor(eax, eax)?;
        a.in_(ax, dx)?;
        a.mov(dword_ptr(DATA + 4), eax)?;
        a.in_(eax, dx)?;
        a.mov(dword_ptr(DATA + 8), eax)?;
        a.inc(dx)?;
        a.in_(eax, dx)?;
        a.mov(dword_ptr(DATA + 12), eax)?;
        a.stop_for_good()
    })?;
    guest.bus.set_port(0x510, 0xa1a2_a3a4);
    guest.run()?;
    let mut expected = six_accesses(0x510).to_vec();
    expected.push(Access::In(0x511, 4));
    same!(guest.bus.take(), expected, "accesses");
    let words = [0, 4, 8, 12].map(|offset| guest.ram.read_u32(DATA + offset));
    same!(words, [0xa4, 0xa3a4, 0xa1a2_a3a4, u32::MAX], "values read");
    Ok(())
}

pub(super) fn immediate_forms(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::protected(hypervisor, &|a| {
        a.mov(eax, 0x1122_3344)?;
        a.out(0x51, al)?;
        a.out(0x51, ax)?;
        a.out(0x51, eax)?;
        a.in_(al, 0x51)?;
        a.in_(ax, 0x51)?;
        a.in_(eax, 0x51)?;
        a.mov(dword_ptr(DATA), eax)?;
        a.stop_for_good()
    })?;
    guest.bus.set_port(0x51, 0xa1a2_a3a4);
    guest.run()?;
    same!(guest.bus.take(), six_accesses(0x51), "accesses");
    same!(guest.ram.read_u32(DATA), 0xa1a2_a3a4, "value read");
    Ok(())
}

/// IN of a byte or word leaves the rest of RAX alone, IN of a doubleword clears its upper half.
pub(super) fn read_only_what_they_must(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.mov(edx, 0x510)?;
        for (n, width) in (0..).zip([1, 2, 4]) {
            a.mov(rax, 0x1111_2222_3333_4444u64)?;
            match width {
                1 => a.in_(al, dx)?,
                2 => a.in_(ax, dx)?,
                _ => a.in_(eax, dx)?,
            }
            a.mov(qword_ptr(DATA + n * 8), rax)?;
        }
        a.stop_for_good()
    })?;
    guest.bus.set_port(0x510, 0xa1a2_a3a4);
    guest.run()?;
    same!(
        guest.ram.quads(DATA),
        [0x1111_2222_3333_44a4, 0x1111_2222_3333_a3a4, 0xa1a2_a3a4u64],
        "RAX after IN"
    );
    Ok(())
}

pub(super) fn in_ring_3(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(edx, 0x510)?;
        a.mov(eax, 0x1122_3344)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.in_(al, dx)?;
        a.in_(ax, dx)?;
        a.in_(eax, dx)?;
        a.mov(dword_ptr(DATA), eax)?;
        a.stop_for_good()
    })?;
    guest.bus.set_port(0x510, 0xa1a2_a3a4);
    guest.run()?;
    same!(guest.bus.take(), six_accesses(0x510), "accesses");
    same!(guest.ram.read_u32(DATA), 0xa1a2_a3a4, "value read");
    Ok(())
}

/// The state saved after a run that was kicked inside an access holds the value and the next RIP.
pub(super) fn a_kick_finds_the_access_complete(hypervisor: &dyn Hypervisor) -> Outcome {
    struct KickingBus<'a>(&'a Bus);
    impl ExitBus for KickingBus<'_> {
        fn pio_read(&self, _port: u16, data: &mut [u8]) {
            data.copy_from_slice(&[1, 2, 3, 4]);
            self.0.kick.kick();
        }
        fn pio_write(&self, _port: u16, _data: &[u8]) {}
        fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
        fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
        fn end_of_interrupt(&self, _vector: u8) {}
    }
    let mut guest = Guest::real(hypervisor, &|a| {
        a.mov(dx, 0x510)?;
        a.in_(eax, dx)?;
        a.spin()
    })?;
    let exit = watchdog::run(&mut *guest.vcpu, &KickingBus(&guest.bus))?;
    ensure!(matches!(exit, VcpuExit::Interrupted), "{exit:?}");
    let general = guest.vcpu.save_state()?.general;
    same!(
        (general.rax, general.rip),
        (0x0403_0201, CODE + 5),
        "RAX and RIP"
    );
    Ok(())
}
