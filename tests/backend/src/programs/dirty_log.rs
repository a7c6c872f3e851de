//! The dirty log sees exactly what was written.

use std::collections::BTreeSet;

use hypervisor::{Hypervisor, MemorySlot, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::{CODE, Guest, Idioms as _, MMIO, RAM, Ram};
use crate::outcome::{Outcome, ensure, fail, same};

const PAGES: u64 = RAM / 4096;
const WORDS: usize = (PAGES / 64) as usize;

/// Code that writes to one page after the other, stops after each group, and begins anew after the last.
fn writer(groups: &[&[u64]]) -> impl Fn(&mut CodeAssembler) -> Result<(), IcedError> {
    let groups: Vec<Vec<u64>> = groups.iter().map(|group| group.to_vec()).collect();
    move |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for group in &groups {
            for page in group {
                a.inc(byte_ptr(page * 4096 + 8))?;
            }
            a.stop()?;
        }
        a.jmp(again)
    }
}

fn pages_of(words: &[u64]) -> BTreeSet<u64> {
    (0..words.len() as u64 * 64)
        .filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 != 0)
        .collect()
}

fn fetch(vm: &dyn Vm, slot: MemorySlot) -> Outcome<Vec<u64>> {
    let mut words = vec![0; (slot.len / 4096).div_ceil(64) as usize];
    vm.fetch_dirty_log(slot, &mut words)?;
    Ok(words)
}

/// Fetches and clears: what was written since the last call, on every back end.
fn drain(vm: &dyn Vm, slot: MemorySlot) -> Outcome<BTreeSet<u64>> {
    let words = fetch(vm, slot)?;
    vm.clear_dirty_log(slot, 0, slot.len / 4096, &words)?;
    Ok(pages_of(&words))
}

/// Without the pages that the processor itself touches. KVM marks a page when it maps it writable, here the code's; and AMD's
/// processors walk a guest's page tables as if they wrote them (APM vol. 2, section 15.25.5).
fn written(mut pages: BTreeSet<u64>) -> BTreeSet<u64> {
    pages.retain(|page| *page != CODE / 4096 && !(0x9..=0xd).contains(page));
    pages
}

pub(super) fn exactly_what_was_written(hypervisor: &dyn Hypervisor) -> Outcome {
    let (first, second) = ([20, 63, 64, 65, 127, 128, 300, 511], [64, 70, 400]);
    let mut guest = Guest::long(hypervisor, &writer(&[&first, &second, &[]]))?;
    let (vm, slot) = (std::sync::Arc::clone(&guest.vm), guest.slot);
    vm.start_dirty_log(slot)?;
    let initial = drain(&*vm, slot)?;
    if hypervisor.capabilities().dirty_initially_all_set {
        same!(initial.len() as u64, PAGES, "pages dirty at the start");
    }
    same!(drain(&*vm, slot)?, BTreeSet::new(), "before the first run");
    for round in 0..3 {
        guest.run()?;
        same!(
            written(drain(&*vm, slot)?),
            BTreeSet::from(first),
            "the first group in round {round}"
        );
        guest.run()?;
        same!(
            written(drain(&*vm, slot)?),
            BTreeSet::from(second),
            "the second group in round {round}"
        );
        guest.run()?;
        same!(
            written(drain(&*vm, slot)?),
            BTreeSet::new(),
            "a run that writes nothing in round {round}"
        );
    }
    Ok(())
}

pub(super) fn marks_stay_until_they_are_cleared(hypervisor: &dyn Hypervisor) -> Outcome {
    let (first, second) = ([20, 63, 64, 65, 127, 300, 511], [64, 70, 400]);
    let mut guest = Guest::long(hypervisor, &writer(&[&first, &second]))?;
    let (vm, slot) = (std::sync::Arc::clone(&guest.vm), guest.slot);
    vm.start_dirty_log(slot)?;
    drain(&*vm, slot)?;
    guest.run()?;
    let mut round = vec![0; WORDS];
    // What the caller has already noted is kept.
    round[7] = 1;
    vm.fetch_dirty_log(slot, &mut round)?;
    let noted = first.into_iter().chain([7 * 64]).collect::<BTreeSet<u64>>();
    same!(
        written(pages_of(&round)),
        noted,
        "the first group, and what was noted"
    );
    round[7] &= !1;
    if !hypervisor.capabilities().manual_dirty_protect {
        // A fetch is a clear too.
        same!(
            pages_of(&fetch(&*vm, slot)?),
            BTreeSet::new(),
            "a second fetch"
        );
        return Ok(());
    }
    same!(fetch(&*vm, slot)?, round, "a fetch takes nothing away");
    // Written between the fetch and the clear: what the clear does not name stays.
    guest.run()?;
    vm.clear_dirty_log(slot, 0, PAGES, &round)?;
    same!(
        written(pages_of(&fetch(&*vm, slot)?)),
        BTreeSet::from([70, 400]),
        "after the clear"
    );
    // Cleared pages are armed again.
    guest.run()?;
    let all: BTreeSet<u64> = first.into_iter().chain([70, 400]).collect();
    same!(
        written(pages_of(&fetch(&*vm, slot)?)),
        all,
        "the first group again"
    );
    // A part of the slot, by an offset.
    let words = fetch(&*vm, slot)?;
    vm.clear_dirty_log(slot, 64, 64, &words[1..2])?;
    let left = BTreeSet::from([20, 63, 300, 511, 400]);
    same!(
        written(pages_of(&fetch(&*vm, slot)?)),
        left,
        "after a part was cleared"
    );
    Ok(())
}

/// A slot of 131 pages, whose last word is not full, elsewhere than at 0.
pub(super) fn slots_that_fill_no_word(hypervisor: &dyn Hypervisor) -> Outcome {
    const COUNT: u64 = 131;
    let written = [0u64, 63, 64, 127, 128, 130];
    let mut guest = Guest::long(hypervisor, &|a| {
        for page in written {
            a.inc(byte_ptr(MMIO + page * 4096))?;
        }
        a.stop_for_good()
    })?;
    let extra = Ram::new(COUNT * 4096);
    let slot = extra.slot(1, MMIO);
    let vm = std::sync::Arc::clone(&guest.vm);
    // SAFETY: `extra` stays mapped until the slot is taken away below.
    unsafe { vm.map_memory(slot)? };
    let mut work = || -> Outcome {
        vm.start_dirty_log(slot)?;
        let initial = drain(&*vm, slot)?;
        ensure!(
            initial.iter().all(|page| *page < COUNT),
            "pages beyond the slot: {initial:?}"
        );
        guest.run()?;
        same!(drain(&*vm, slot)?, BTreeSet::from(written), "pages written");
        vm.clear_dirty_log(slot, 128, 3, &[0])?;
        Ok(vm.stop_dirty_log(slot)?)
    };
    let worked = work();
    vm.unmap_memory(slot)?;
    worked
}

/// One instruction that writes many pages, and one write that lies in two.
pub(super) fn long_stores(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            a.mov(edi, 0x6_0800)?;
            a.xor(eax, eax)?;
            a.mov(ecx, 0x5000 / 8)?;
            a.cld()?;
            a.rep().stosq()?;
            a.mov(qword_ptr(0x9_0ffc), rax)?;
            a.stop_for_good()
        })?;
        let (vm, slot) = (std::sync::Arc::clone(&guest.vm), guest.slot);
        vm.start_dirty_log(slot)?;
        drain(&*vm, slot)?;
        guest.run()?;
        let seen = written(drain(&*vm, slot)?);
        let expected: BTreeSet<u64> = (0x60..=0x65).chain([0x90, 0x91]).collect();
        same!(seen, expected, "pages in ring {ring}");
    }
    Ok(())
}

/// What comes from devices is written on the guest's behalf, by the hypervisor or by the back end, and must be seen as well.
pub(super) fn data_of_devices(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            let mut again = a.create_label();
            a.cld()?;
            a.set_label(&mut again)?;
            // The second element lies in two pages.
            a.mov(edx, 0x520)?;
            a.mov(edi, 0x6_0ffa)?;
            a.mov(ecx, 3)?;
            a.rep().insd()?;
            a.mov(esi, MMIO as u32)?;
            a.mov(edi, 0x7_0f00)?;
            a.mov(ecx, 0x240)?;
            a.rep().movsq()?;
            a.mov(edi, 0x8_0ff8)?;
            a.movsq()?;
            a.stop()?;
            // RSP is as before: the value goes below the stack's top, in a page of its own.
            a.mov(esi, MMIO as u32)?;
            a.mov(ebx, esp)?;
            a.mov(esp, 0x9_1000)?;
            a.push(qword_ptr(rsi))?;
            a.mov(esp, ebx)?;
            a.stop()?;
            a.jmp(again)
        })?;
        let (vm, slot) = (std::sync::Arc::clone(&guest.vm), guest.slot);
        vm.start_dirty_log(slot)?;
        drain(&*vm, slot)?;
        for round in 0..2 {
            guest.run()?;
            let seen = written(drain(&*vm, slot)?);
            let expected = BTreeSet::from([0x60, 0x61, 0x70, 0x71, 0x72, 0x80]);
            same!(
                seen,
                expected,
                "pages of strings in round {round} in ring {ring}"
            );
            guest.run()?;
            let seen = written(drain(&*vm, slot)?);
            same!(
                seen,
                BTreeSet::from([0x90]),
                "pages of a push in round {round} in ring {ring}"
            );
        }
    }
    Ok(())
}

/// Marks of a guest that writes while they are fetched.
pub(super) fn writes_in_ring_3(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(byte_ptr(0x5_0000))?;
        a.inc(byte_ptr(0x6_0000))?;
        a.jmp(again)
    })?;
    let (vm, slot) = (std::sync::Arc::clone(&guest.vm), guest.slot);
    vm.start_dirty_log(slot)?;
    for _ in 0..3 {
        drain(&*vm, slot)?;
        let kick = guest.vcpu.kick_handle();
        std::thread::scope(|scope| {
            let (vcpu, bus) = (&mut guest.vcpu, &guest.bus);
            let before = guest.ram.read::<1>(0x6_0000);
            let runner = scope.spawn(move || crate::watchdog::run(&mut **vcpu, bus));
            while guest.ram.read::<1>(0x6_0000) == before && !runner.is_finished() {
                std::thread::yield_now();
            }
            kick.kick();
            runner
                .join()
                .unwrap_or_else(|_| fail("the vCPU's thread panicked"))
        })?;
        let seen = written(drain(&*vm, slot)?);
        same!(seen, BTreeSet::from([0x50, 0x60]), "pages");
    }
    Ok(())
}

pub(super) fn started_again(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &writer(&[&[30], &[40], &[50]]))?;
    let (vm, slot) = (std::sync::Arc::clone(&guest.vm), guest.slot);
    vm.start_dirty_log(slot)?;
    drain(&*vm, slot)?;
    guest.run()?;
    same!(
        written(drain(&*vm, slot)?),
        BTreeSet::from([30]),
        "while tracked"
    );
    vm.stop_dirty_log(slot)?;
    // Stopping twice is harmless.
    vm.stop_dirty_log(slot)?;
    guest.run()?;
    ensure!(
        fetch(&*vm, slot).is_err(),
        "a log that was stopped was fetched"
    );
    vm.start_dirty_log(slot)?;
    drain(&*vm, slot)?;
    guest.run()?;
    same!(
        written(drain(&*vm, slot)?),
        BTreeSet::from([50]),
        "when tracked again"
    );
    Ok(())
}

pub(super) fn wrong_ranges_are_refused(hypervisor: &dyn Hypervisor) -> Outcome {
    let guest = Guest::long(hypervisor, &|a| a.hlt())?;
    let (vm, slot) = (&guest.vm, guest.slot);
    ensure!(
        vm.fetch_dirty_log(slot, &mut [0; WORDS]).is_err(),
        "fetched though tracking is not on"
    );
    vm.start_dirty_log(slot)?;
    ensure!(
        vm.fetch_dirty_log(slot, &mut [0; WORDS - 1]).is_err(),
        "fetched into too few words"
    );
    // Where each fetch clears, this call does nothing at all.
    if hypervisor.capabilities().manual_dirty_protect {
        let words = [0; WORDS];
        for (first, pages, words) in [
            (1, 64, &words[..]),
            (0, 63, &words[..]),
            (0, PAGES + 64, &words[..]),
            (64, u64::MAX - 63, &words[..]),
            (0, PAGES, &words[1..]),
        ] {
            ensure!(
                vm.clear_dirty_log(slot, first, pages, words).is_err(),
                "cleared {pages} pages from {first} on"
            );
        }
    }
    let other = MemorySlot {
        len: slot.len / 2,
        ..slot
    };
    ensure!(
        vm.fetch_dirty_log(other, &mut [0; WORDS]).is_err(),
        "fetched with another length"
    );
    let absent = MemorySlot { slot: 7, ..slot };
    ensure!(
        vm.start_dirty_log(absent).is_err(),
        "started for a slot that is not mapped"
    );
    // Stopping is harmless.
    Ok(vm.stop_dirty_log(absent)?)
}

/// Tracking ends with the slot.
pub(super) fn slots_that_come_and_go(hypervisor: &dyn Hypervisor) -> Outcome {
    let guest = Guest::long(hypervisor, &|a| a.hlt())?;
    let (vm, slot) = (&guest.vm, guest.slot);
    vm.start_dirty_log(slot)?;
    vm.unmap_memory(slot)?;
    ensure!(vm.unmap_memory(slot).is_err(), "taken away twice");
    ensure!(
        vm.fetch_dirty_log(slot, &mut [0; WORDS]).is_err(),
        "fetched though it is gone"
    );
    // SAFETY: as in `Guest::new`.
    unsafe { vm.map_memory(slot)? };
    ensure!(
        vm.fetch_dirty_log(slot, &mut [0; WORDS]).is_err(),
        "tracking outlived the slot"
    );
    Ok(())
}
