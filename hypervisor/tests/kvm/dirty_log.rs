//! The dirty log sees exactly what was written.

use std::collections::BTreeSet;

use crate::guest::{CODE, Guest, RAM, STOP64, kvm};

const PAGES: u64 = RAM / 4096;
const WORDS: usize = (PAGES / 64) as usize;

/// Code that writes to one page after the other, stops after each group, and begins anew after the last.
fn writer(groups: &[&[u64]]) -> Vec<u8> {
    let mut code = Vec::new();
    for group in groups {
        for page in *group {
            code.extend([0xfe, 0x04, 0x25]); // inc byte [page * 4096 + 8]
            code.extend(((page * 4096 + 8) as u32).to_le_bytes());
        }
        code.extend(STOP64);
    }
    code.push(0xe9); // jmp to the first instruction
    let back = -(code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    assert!(code.len() < 0x1000);
    code
}

fn set(words: &[u64]) -> BTreeSet<u64> {
    (0..PAGES)
        .filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 != 0)
        .collect()
}

fn fetch(guest: &Guest) -> Vec<u64> {
    let mut words = vec![0; WORDS];
    guest
        .vm
        .fetch_dirty_log(guest.slot, &mut words)
        .expect("fetch");
    words
}

#[test]
fn exactly_the_written_pages_and_none_lost_between_fetch_and_clear() {
    let Some(kvm) = kvm() else { return };
    let manual = kvm.capabilities().manual_dirty_protect;
    let (first, second) = ([20, 63, 64, 65, 127, 300, 511], [64, 70, 400]);
    let mut guest = Guest::long_mode(&*kvm, &writer(&[&first, &second]));
    guest.vm.start_dirty_log(guest.slot).expect("start");
    let initial = fetch(&guest);
    if kvm.capabilities().dirty_initially_all_set {
        assert_eq!(
            set(&initial).len() as u64,
            PAGES,
            "tracking starts with every page dirty"
        );
    }
    guest
        .vm
        .clear_dirty_log(guest.slot, 0, PAGES, &initial)
        .expect("clear");
    guest.run();
    let round = fetch(&guest);
    assert_eq!(set(&round), BTreeSet::from(first));
    if !manual {
        return;
    }
    assert_eq!(fetch(&guest), round, "a fetch takes nothing away");
    // Written between the fetch and the clear: what the clear does not name stays.
    guest.run();
    guest
        .vm
        .clear_dirty_log(guest.slot, 0, PAGES, &round)
        .expect("clear");
    assert_eq!(set(&fetch(&guest)), BTreeSet::from([70, 400]));
    // Cleared pages are armed again.
    guest.run();
    assert_eq!(
        set(&fetch(&guest)),
        first.into_iter().chain([70, 400]).collect()
    );
    // A part of the slot, by an offset.
    let words = fetch(&guest);
    guest
        .vm
        .clear_dirty_log(guest.slot, 64, 64, &words[1..2])
        .expect("clear a part");
    let left = BTreeSet::from([20, 63, 300, 511, 400]);
    assert_eq!(set(&fetch(&guest)), left);
    // What the caller has already noted is kept.
    let mut words = vec![0; WORDS];
    words[0] = 1;
    guest
        .vm
        .fetch_dirty_log(guest.slot, &mut words)
        .expect("fetch");
    assert_eq!(set(&words), left.into_iter().chain([0]).collect());
    guest.vm.stop_dirty_log(guest.slot).expect("stop");
    guest
        .vm
        .stop_dirty_log(guest.slot)
        .expect("stopping twice is harmless");
}

#[test]
fn writes_in_ring_3_are_seen_too() {
    let Some(kvm) = kvm() else { return };
    // inc byte [0x50000]; inc byte [0x60000]; jmp back
    let code = [
        0xfe, 0x04, 0x25, 0, 0, 5, 0, 0xfe, 0x04, 0x25, 0, 0, 6, 0, 0xeb, 0xf0,
    ];
    let mut guest = Guest::user_mode(&*kvm, &code);
    guest.vm.start_dirty_log(guest.slot).expect("start");
    for _ in 0..3 {
        let words = fetch(&guest);
        guest
            .vm
            .clear_dirty_log(guest.slot, 0, PAGES, &words)
            .expect("clear");
        let kick = guest.vcpu.kick_handle();
        std::thread::scope(|scope| {
            let (vcpu, bus) = (&mut guest.vcpu, &guest.bus);
            let before = guest.ram.read::<1>(0x60000);
            let runner = scope.spawn(move || vcpu.run(bus).expect("run"));
            while guest.ram.read::<1>(0x60000) == before && !runner.is_finished() {
                std::thread::yield_now();
            }
            kick.kick();
            runner.join().expect("runner");
        });
        let seen = set(&fetch(&guest));
        assert!(seen.is_superset(&BTreeSet::from([0x50, 0x60])), "{seen:?}");
        // With shadow paging KVM marks a page when it maps it writable, here the code's.
        assert!(
            seen.is_subset(&BTreeSet::from([CODE / 4096, 0x50, 0x60])),
            "{seen:?}"
        );
    }
}

#[test]
fn wrong_ranges_are_refused_before_kvm_sees_them() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::long_mode(&*kvm, &[0xf4]);
    guest.ram.write(CODE, &[0xf4]);
    let (vm, slot) = (&guest.vm, guest.slot);
    assert!(
        vm.fetch_dirty_log(slot, &mut [0; WORDS]).is_err(),
        "tracking is not on"
    );
    vm.start_dirty_log(slot).expect("start");
    assert!(
        vm.fetch_dirty_log(slot, &mut [0; WORDS - 1]).is_err(),
        "too few words"
    );
    let words = [0; WORDS];
    for (first, pages, words) in [
        (1, 64, &words[..]),
        (0, 63, &words[..]),
        (0, PAGES + 64, &words[..]),
        (64, u64::MAX - 63, &words[..]),
        (0, PAGES, &words[1..]),
    ] {
        assert!(
            vm.clear_dirty_log(slot, first, pages, words).is_err(),
            "{first} {pages}"
        );
    }
    let other = hypervisor::MemorySlot {
        len: slot.len / 2,
        ..slot
    };
    assert!(
        vm.fetch_dirty_log(other, &mut [0; WORDS]).is_err(),
        "the slot has another length"
    );
    assert!(
        vm.start_dirty_log(hypervisor::MemorySlot { slot: 7, ..slot })
            .is_err(),
        "not mapped"
    );
    vm.stop_dirty_log(hypervisor::MemorySlot { slot: 7, ..slot })
        .expect("stopping is harmless");
}

#[test]
fn a_slot_mapped_again_stays_tracked_and_a_removed_one_does_not() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::long_mode(&*kvm, &[0xf4]);
    let (vm, slot) = (&guest.vm, guest.slot);
    vm.start_dirty_log(slot).expect("start");
    // SAFETY: as in `Guest::new`.
    unsafe { vm.map_memory(slot) }.expect("map again");
    vm.fetch_dirty_log(slot, &mut [0; WORDS])
        .expect("still tracked");
    vm.unmap_memory(slot).expect("unmap");
    assert!(vm.unmap_memory(slot).is_err());
    assert!(vm.fetch_dirty_log(slot, &mut [0; WORDS]).is_err());
    // SAFETY: as in `Guest::new`.
    unsafe { vm.map_memory(slot) }.expect("map");
    assert!(
        vm.fetch_dirty_log(slot, &mut [0; WORDS]).is_err(),
        "tracking has ended with the slot"
    );
}
