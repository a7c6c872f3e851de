//! String instructions on device memory.

use std::sync::{Mutex, PoisonError};

use hypervisor::{ExitBus, Hypervisor, VcpuExit, VcpuKick};
use iced_x86::code_asm::*;

use crate::guest::{Access, DATA, Guest, Idioms as _, MMIO, MORE_DATA, Ram};
use crate::outcome::{Outcome, ensure, same};
use crate::watchdog;

/// The end of what the page tables map.
const END: u64 = 0x4000_0000;

pub(super) fn stores(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.cld()?;
            a.mov(edi, MMIO as u32)?;
            a.mov(rax, 0x0102_0304_0506_0708u64)?;
            a.mov(ecx, 3)?;
            a.rep().stosb()?;
            a.inc(edi)?;
            a.mov(ecx, 2)?;
            a.rep().stosd()?;
            a.stosw()?;
            a.mov(qword_ptr(DATA), rdi)?;
            a.mov(qword_ptr(DATA + 8), rcx)?;
            a.std()?;
            a.mov(edi, MMIO as u32 + 0x108)?;
            a.mov(ecx, 2)?;
            a.rep().stosq()?;
            a.mov(qword_ptr(DATA + 16), rdi)?;
            a.stop_for_good()
        })?;
        guest.run()?;
        let value = [8, 7, 6, 5, 4, 3, 2, 1];
        let write = |offset, len| Access::Write(MMIO + offset, value[..len].to_vec());
        same!(
            guest.bus.take(),
            [
                write(0, 1),
                write(1, 1),
                write(2, 1),
                write(4, 4),
                write(8, 4),
                write(12, 2),
                write(0x108, 8),
                write(0x100, 8),
            ],
            "accesses in ring {ring}"
        );
        same!(
            guest.ram.quads(DATA),
            [MMIO + 14, 0, MMIO + 0xf8],
            "RDI, RCX, RDI downwards"
        );
    }
    Ok(())
}

pub(super) fn moves_between_memory_and_device(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.cld()?;
            a.mov(esi, MORE_DATA as u32)?;
            a.mov(edi, MMIO as u32)?;
            a.mov(ecx, 3)?;
            a.rep().movsd()?;
            a.mov(esi, MMIO as u32 + 0x100)?;
            a.mov(edi, DATA as u32)?;
            a.mov(ecx, 2)?;
            a.rep().movsq()?;
            a.movsb()?;
            a.mov(qword_ptr(DATA + 0x40), rsi)?;
            a.mov(qword_ptr(DATA + 0x48), rdi)?;
            a.mov(qword_ptr(DATA + 0x50), rcx)?;
            a.stop_for_good()
        })?;
        let bytes: [u8; 17] = std::array::from_fn(|i| i as u8 + 1);
        guest.ram.write(MORE_DATA, &bytes);
        guest.bus.set_memory(MMIO + 0x100, &bytes);
        guest.run()?;
        same!(
            guest.bus.take(),
            [
                Access::Write(MMIO, bytes[..4].to_vec()),
                Access::Write(MMIO + 4, bytes[4..8].to_vec()),
                Access::Write(MMIO + 8, bytes[8..12].to_vec()),
                Access::Read(MMIO + 0x100, 8),
                Access::Read(MMIO + 0x108, 8),
                Access::Read(MMIO + 0x110, 1),
            ],
            "accesses in ring {ring}"
        );
        same!(guest.ram.read(DATA), bytes, "bytes read in ring {ring}");
        same!(
            guest.ram.quads(DATA + 0x40),
            [MMIO + 0x111, DATA + 17, 0],
            "RSI, RDI, RCX in ring {ring}"
        );
    }
    Ok(())
}

pub(super) fn moves_between_devices(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.cld()?;
            a.mov(esi, MMIO as u32)?;
            a.mov(edi, MMIO as u32 + 0x1000)?;
            a.mov(ecx, 2)?;
            a.rep().movsw()?;
            a.mov(qword_ptr(DATA), rsi)?;
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO, &[1, 2, 3, 4]);
        guest.run()?;
        same!(
            guest.bus.take(),
            [
                Access::Read(MMIO, 2),
                Access::Write(MMIO + 0x1000, vec![1, 2]),
                Access::Read(MMIO + 2, 2),
                Access::Write(MMIO + 0x1002, vec![3, 4]),
            ],
            "accesses in ring {ring}"
        );
        same!(guest.ram.read_u64(DATA), MMIO + 4, "RSI");
    }
    Ok(())
}

pub(super) fn loads(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.cld()?;
            a.mov(esi, MMIO as u32)?;
            a.mov(rax, u64::MAX)?;
            a.lodsw()?;
            a.mov(qword_ptr(DATA), rax)?;
            a.lodsd()?;
            a.mov(qword_ptr(DATA + 8), rax)?;
            a.mov(ecx, 3)?;
            a.rep().lodsb()?;
            a.mov(qword_ptr(DATA + 16), rax)?;
            a.mov(qword_ptr(DATA + 24), rsi)?;
            a.stop_for_good()
        })?;
        guest.bus.set_memory(MMIO, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        guest.run()?;
        let reads = [(0, 2), (2, 4), (6, 1), (7, 1), (8, 1)];
        same!(
            guest.bus.take(),
            reads.map(|(offset, size)| Access::Read(MMIO + offset, size)),
            "accesses in ring {ring}"
        );
        same!(
            guest.ram.quads(DATA),
            [0xffff_ffff_ffff_0201, 0x0605_0403, 0x0605_0409, MMIO + 9],
            "RAX and RSI in ring {ring}"
        );
    }
    Ok(())
}

pub(super) fn comparisons_and_scans(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.cld()?;
            a.mov(esi, MORE_DATA as u32)?;
            a.mov(edi, MMIO as u32)?;
            a.mov(ecx, 8)?;
            a.repe().cmpsb()?;
            a.setb(byte_ptr(DATA + 0x80))?;
            a.mov(qword_ptr(DATA), rcx)?;
            a.mov(qword_ptr(DATA + 8), rsi)?;
            a.mov(qword_ptr(DATA + 16), rdi)?;
            a.mov(edi, MMIO as u32 + 0x10)?;
            a.mov(eax, 0x0807)?;
            a.mov(ecx, 5)?;
            a.repne().scasw()?;
            a.sete(byte_ptr(DATA + 0x81))?;
            a.mov(qword_ptr(DATA + 24), rcx)?;
            a.mov(qword_ptr(DATA + 32), rdi)?;
            a.stop_for_good()
        })?;
        guest.ram.write(MORE_DATA, &[1, 2, 3, 4]);
        guest.bus.set_memory(MMIO, &[1, 2, 9, 4]);
        guest.bus.set_memory(MMIO + 0x10, &[1, 2, 7, 8, 3, 4]);
        guest.run()?;
        let reads = [(0, 1), (1, 1), (2, 1), (0x10, 2), (0x12, 2)];
        same!(
            guest.bus.take(),
            reads.map(|(offset, size)| Access::Read(MMIO + offset, size)),
            "accesses in ring {ring}"
        );
        same!(
            guest.ram.quads(DATA),
            [5, MORE_DATA + 3, MMIO + 3, 3, MMIO + 0x14],
            "RCX, RSI, RDI; RCX, RDI in ring {ring}"
        );
        same!(guest.ram.read(DATA + 0x80), [1, 1], "CF and ZF");
    }
    Ok(())
}

/// A REP that runs off what is mapped: the elements before are done, the registers say where it stands, and it can go on.
pub(super) fn a_page_fault_in_the_middle_of_a_store(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.cld()?;
            a.mov(edi, END as u32 - 8)?;
            a.mov(eax, 0x0102_0304)?;
            a.mov(ecx, 4)?;
            a.rep().stosd()?;
            a.mov(dword_ptr(DATA), 1)?;
            a.stop_for_good()
        })?;
        let fault = guest.run_to_fault()?;
        let user = if ring == 3 { 4 } else { 0 };
        same!(
            (fault.vector, fault.error, fault.cr2),
            (14, 2 | user, END),
            "the fault in ring {ring}"
        );
        let value = vec![4, 3, 2, 1];
        let write = |at| Access::Write(at, value.clone());
        same!(
            guest.bus.take(),
            [write(END - 8), write(END - 4)],
            "the elements before"
        );
        let general = guest.vcpu.save_state()?.general;
        same!((general.rcx, general.rdi), (2, END), "RCX and RDI");
        // With the page there, the instruction goes on where it stood.
        guest.map_2m(END, 0x3000_0000);
        guest.run()?;
        same!(
            guest.bus.take(),
            [write(0x3000_0000), write(0x3000_0004)],
            "the elements after"
        );
        same!(guest.ram.read(DATA), [1], "the instruction behind");
    }
    Ok(())
}

/// The same with the fault on the side that is not the device.
pub(super) fn a_page_fault_in_the_middle_of_a_move(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.cld()?;
            a.mov(esi, END as u32 - 4)?;
            a.mov(edi, MMIO as u32)?;
            a.mov(ecx, 4)?;
            a.rep().movsw()?;
            a.spin()
        })?;
        let last = Ram::new(0x1000);
        let slot = last.slot(1, END - 0x1000);
        // SAFETY: it stays mapped until its slot is taken away below.
        unsafe { guest.vm.map_memory(slot)? };
        last.write(0xffc, &[1, 2, 3, 4]);
        let fault = guest.run_to_fault();
        guest.vm.unmap_memory(slot)?;
        let (fault, user) = (fault?, if ring == 3 { 4 } else { 0 });
        same!(
            (fault.vector, fault.error, fault.cr2),
            (14, user, END),
            "the fault in ring {ring}"
        );
        same!(
            guest.bus.take(),
            [
                Access::Write(MMIO, vec![1, 2]),
                Access::Write(MMIO + 2, vec![3, 4])
            ],
            "the elements before"
        );
        let general = guest.vcpu.save_state()?.general;
        same!(
            (general.rcx, general.rsi, general.rdi),
            (2, END, MMIO + 4),
            "RCX, RSI, RDI"
        );
    }
    Ok(())
}

/// A bus that kicks at every 2000th write.
struct Impatient<'a> {
    written: &'a Mutex<Vec<u32>>,
    kick: &'a dyn VcpuKick,
}

impl ExitBus for Impatient<'_> {
    fn pio_read(&self, _port: u16, _data: &mut [u8]) {}
    fn pio_write(&self, _port: u16, _data: &[u8]) {
        self.kick.kick();
    }
    fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
    fn mmio_write(&self, gpa: u64, _data: &[u8]) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.push((gpa - MMIO) as u32);
        if written.len().is_multiple_of(2000) {
            self.kick.kick();
        }
    }
    fn end_of_interrupt(&self, _vector: u8) {}
}

/// A kick ends a long REP between two elements, and another machine goes on with the next one: none is lost, none comes twice.
pub(super) fn a_move_in_the_middle_of_a_store(hypervisor: &dyn Hypervisor) -> Outcome {
    const ELEMENTS: u32 = 20_000;
    for ring in [0, 3] {
        let build = || {
            Guest::in_ring(hypervisor, ring, &|a| {
                a.cld()?;
                a.mov(edi, MMIO as u32)?;
                a.mov(ecx, ELEMENTS)?;
                a.rep().stosd()?;
                a.mov(dword_ptr(DATA), 1)?;
                a.stop_for_good()
            })
        };
        let written = Mutex::default();
        let mut guest = build()?;
        let mut moves = 0;
        while guest.ram.read_u32(DATA) == 0 {
            let kick = guest.vcpu.kick_handle();
            let bus = Impatient {
                written: &written,
                kick: &*kick,
            };
            let exit = watchdog::run(&mut *guest.vcpu, &bus)?;
            ensure!(matches!(exit, VcpuExit::Interrupted), "{exit:?}");
            ensure!(moves < ELEMENTS, "it does not come to an end");
            if guest.ram.read_u32(DATA) == 0 {
                let mut next = build()?;
                next.vcpu.restore_state(&guest.vcpu.save_state()?)?;
                guest = next;
                moves += 1;
            }
        }
        let expected: Vec<u32> = (0..ELEMENTS).map(|n| n * 4).collect();
        same!(
            *written.lock().unwrap_or_else(PoisonError::into_inner),
            expected,
            "offsets written over {moves} moves in ring {ring}"
        );
        // A back end may do some thousands of elements at a time. A kick that is not answered before the end would hold up
        // whoever waits for the vCPU.
        ensure!(moves >= 3, "{moves} of 10 kicks ended it in ring {ring}");
    }
    Ok(())
}
