//! Memory that comes, goes, and may not be written.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hypervisor::{ExitBus, Hypervisor, MemorySlot, VcpuExit, VcpuKick};
use iced_x86::code_asm::*;

use crate::guest::{Access, DATA, Guest, Idioms as _, MMIO, Ram};
use crate::outcome::{Outcome, ensure, same};
use crate::watchdog;

/// Reads a doubleword at [`MMIO`] to [`DATA`], writes 1 there, stops; again and again.
fn reader_and_writer(hypervisor: &dyn Hypervisor, ring: u16) -> Outcome<Guest> {
    Guest::in_ring(hypervisor, ring, &|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(eax, dword_ptr(MMIO))?;
        a.mov(dword_ptr(DATA), eax)?;
        a.mov(byte_ptr(MMIO), 1)?;
        a.stop()?;
        a.jmp(again)
    })
}

pub(super) fn taken_away_becomes_a_device(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = reader_and_writer(hypervisor, ring)?;
        let extra = Ram::new(0x1000);
        extra.write(0, &[0x11, 0x22, 0x33, 0x44]);
        let slot = extra.slot(1, MMIO);
        for round in 0..3 {
            // SAFETY: `extra` outlives the slot, which is taken away below; the guest does not run when that fails.
            unsafe { guest.vm.map_memory(slot)? };
            let ran = guest.run();
            guest.vm.unmap_memory(slot)?;
            ran?;
            same!(guest.bus.take(), [], "accesses to memory in round {round}");
            same!(
                extra.read(0),
                [1, 0x22, 0x33, 0x44],
                "the memory after the write"
            );
            extra.write(0, &[0x11]);
            same!(
                guest.ram.read_u32(DATA),
                0x4433_2211,
                "what was read from memory"
            );
            guest.run()?;
            same!(
                guest.bus.take(),
                [Access::Read(MMIO, 4), Access::Write(MMIO, vec![1])],
                "accesses without memory in round {round}"
            );
            same!(extra.read(0), [0x11], "the memory that is gone");
        }
    }
    Ok(())
}

pub(super) fn read_only(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = reader_and_writer(hypervisor, ring)?;
        let extra = Ram::new(0x1000);
        extra.write(0, &[0x11, 0x22, 0x33, 0x44]);
        let slot = MemorySlot {
            read_only: true,
            ..extra.slot(1, MMIO)
        };
        // SAFETY: `extra` outlives the slot, which is taken away below.
        unsafe { guest.vm.map_memory(slot)? };
        let ran = guest.run().and_then(|()| guest.run());
        guest.vm.unmap_memory(slot)?;
        ran?;
        let write = Access::Write(MMIO, vec![1]);
        same!(
            guest.bus.take(),
            [write.clone(), write],
            "accesses in ring {ring}: reads are not seen"
        );
        same!(guest.ram.read_u32(DATA), 0x4433_2211, "what was read");
        same!(extra.read(0), [0x11, 0x22, 0x33, 0x44], "the memory");
    }
    Ok(())
}

/// A bus that counts writes, and kicks at each.
struct Counter {
    writes: AtomicU64,
    kick: std::sync::Arc<dyn VcpuKick>,
}

impl ExitBus for Counter {
    fn pio_read(&self, _port: u16, _data: &mut [u8]) {}
    fn pio_write(&self, _port: u16, _data: &[u8]) {
        self.kick.kick();
    }
    fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {
        self.writes.fetch_add(1, Ordering::SeqCst);
        self.kick.kick();
    }
    fn end_of_interrupt(&self, _vector: u8) {}
}

pub(super) fn added_under_a_running_vcpu(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.inc(qword_ptr(DATA))?;
            a.cmp(dword_ptr(MMIO), 0x1234_5678)?;
            a.jne(wait)?;
            a.stop_for_good()
        })?;
        let extra = Ram::new(0x1000);
        extra.write(0, &0x1234_5678u32.to_le_bytes());
        let slot = extra.slot(1, MMIO);
        let vm = std::sync::Arc::clone(&guest.vm);
        let done = AtomicBool::new(false);
        let ran = std::thread::scope(|scope| {
            let (ram, done, kick) = (&guest.ram, &done, guest.vcpu.kick_handle());
            let adder = scope.spawn(move || {
                while ram.read_u64(DATA) < 100 && !done.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                // SAFETY: `extra` outlives the slot, which is taken away below.
                let mapped = unsafe { vm.map_memory(slot) };
                if mapped.is_err() {
                    kick.kick();
                }
                mapped
            });
            let bus = Counter {
                writes: AtomicU64::new(0),
                kick: guest.vcpu.kick_handle(),
            };
            let exit = watchdog::run(&mut *guest.vcpu, &bus);
            done.store(true, Ordering::SeqCst);
            let mapped = adder.join();
            ensure!(
                matches!(mapped, Ok(Ok(()))),
                "memory could not be added: {mapped:?}"
            );
            ensure!(
                matches!(exit?, VcpuExit::Interrupted),
                "the run ended otherwise"
            );
            Ok(())
        });
        guest.vm.unmap_memory(slot)?;
        ran?;
    }
    Ok(())
}

pub(super) fn removed_under_a_running_vcpu(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(dword_ptr(DATA))?;
            a.mov(eax, dword_ptr(DATA))?;
            a.mov(dword_ptr(MMIO), eax)?;
            a.jmp(again)
        })?;
        let extra = Ram::new(0x1000);
        let slot = extra.slot(1, MMIO);
        // SAFETY: `extra` outlives the slot, which the other thread takes away.
        unsafe { guest.vm.map_memory(slot)? };
        let bus = Counter {
            writes: AtomicU64::new(0),
            kick: guest.vcpu.kick_handle(),
        };
        let vm = std::sync::Arc::clone(&guest.vm);
        let removed = std::thread::scope(|scope| {
            let (extra, kick) = (&extra, guest.vcpu.kick_handle());
            let remover = scope.spawn(move || {
                let patience = std::time::Instant::now() + Duration::from_secs(5);
                while extra.read_u32(0) < 100 && std::time::Instant::now() < patience {
                    std::thread::yield_now();
                }
                let removed = vm.unmap_memory(slot);
                if removed.is_err() {
                    kick.kick();
                }
                (removed, extra.read_u32(0))
            });
            let exit = watchdog::run(&mut *guest.vcpu, &bus);
            let removed = remover.join();
            ensure!(
                matches!(exit?, VcpuExit::Interrupted),
                "the run ended otherwise"
            );
            removed.map_err(|_| crate::outcome::Stop::Fail("the remover panicked".into()))
        })?;
        let (answer, last) = removed;
        answer?;
        same!(
            bus.writes.load(Ordering::SeqCst),
            1,
            "writes to the device in ring {ring}"
        );
        same!(extra.read_u32(0), last, "the memory once it was taken away");
    }
    Ok(())
}

/// The same memory at another address, twice.
pub(super) fn moved_elsewhere(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for n in 0..3 {
            a.mov(eax, dword_ptr(MMIO + n * 0x1000))?;
            a.mov(dword_ptr(DATA + n * 4), eax)?;
        }
        a.stop()?;
        a.jmp(again)
    })?;
    let extra = Ram::new(0x1000);
    extra.write(0, &[0x11; 4]);
    let ram = |guest: &Guest| [0, 4, 8].map(|offset| guest.ram.read_u32(DATA + offset));
    let (none, there) = (u32::MAX, 0x1111_1111);
    for (place, expected) in [
        (0, [there, none, none]),
        (2, [none, none, there]),
        (1, [none, there, none]),
        (0, [there, none, none]),
    ] {
        let slot = extra.slot(1, MMIO + place * 0x1000);
        // SAFETY: `extra` outlives the slot, which is taken away below.
        unsafe { guest.vm.map_memory(slot)? };
        let ran = guest.run();
        guest.vm.unmap_memory(slot)?;
        ran?;
        same!(
            ram(&guest),
            expected,
            "what was read with the memory at place {place}"
        );
    }
    Ok(())
}

pub(super) fn bad_ones_are_refused(hypervisor: &dyn Hypervisor) -> Outcome {
    let guest = Guest::new(hypervisor)?;
    let good = MemorySlot {
        slot: 1,
        ..guest.slot
    };
    for (what, bad) in [
        ("empty", MemorySlot { len: 0, ..good }),
        (
            "not aligned",
            MemorySlot {
                gpa: good.len + 1,
                ..good
            },
        ),
        (
            "of odd length",
            MemorySlot {
                gpa: good.len,
                len: 4097,
                ..good
            },
        ),
        ("over another one", MemorySlot { gpa: 4096, ..good }),
        (
            "beyond the last number",
            MemorySlot {
                slot: u32::from(u16::MAX),
                gpa: good.len,
                ..good
            },
        ),
    ] {
        // SAFETY: the memory is the guest's own, which outlives the machine.
        let answer = unsafe { guest.vm.map_memory(bad) };
        ensure!(answer.is_err(), "a slot {what} was taken: {bad:x?}");
    }
    ensure!(guest.vm.create_vcpu(0).is_err(), "vCPU 0 was created twice");
    ensure!(
        guest.vm.create_vcpu(u32::MAX).is_err(),
        "vCPU {} was created",
        u32::MAX
    );
    Ok(())
}
