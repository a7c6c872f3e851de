//! What is asked of the host, memory slots and the clock.

use hypervisor::{HypervisorKind, MemorySlot, VcpuExit};

use crate::guest::{Access, Guest, Ram, STOP64, code, kvm};

#[test]
fn the_host_tells_what_it_can_do() {
    let Some(kvm) = kvm() else { return };
    assert_eq!(kvm.kind(), HypervisorKind::Kvm);
    let can = kvm.capabilities();
    println!("{can:?}");
    assert!(can.max_vcpus >= 1 && can.max_memory_slots >= 8);
    assert!(can.manual_dirty_protect || !can.dirty_initially_all_set);
    let cpuid = kvm.supported_cpuid().expect("CPUID");
    let leaf1 = cpuid.get(1, 0).expect("leaf 1");
    assert_ne!(
        leaf1.ecx & 1 << 31,
        0,
        "guests are told that they are guests"
    );
    assert!(
        cpuid
            .entries
            .windows(2)
            .all(|pair| (pair[0].leaf, pair[0].subleaf) <= (pair[1].leaf, pair[1].subleaf))
    );
    let tile = cpuid.get(7, 0).is_some_and(|leaf| leaf.edx & 1 << 24 != 0);
    let components = cpuid.get(0xd, 0).map_or(0, |leaf| leaf.eax);
    assert_eq!(
        tile,
        components & 0x6_0000 == 0x6_0000,
        "AMX comes with its state or not at all"
    );
    let msrs = kvm.msr_indices().expect("MSRs");
    assert!(msrs.windows(2).all(|pair| pair[0] < pair[1]));
    for index in [0x10, 0x174, 0x277, 0x2ff, 0xc000_0081] {
        assert!(msrs.binary_search(&index).is_ok(), "{index:#x}");
    }
}

#[test]
fn cpuid_is_kept_as_given() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&*kvm);
    let mut given = crate::guest::cpuid(&*kvm);
    let at = given
        .entries
        .iter()
        .position(|entry| entry.leaf == 0)
        .expect("leaf 0");
    given.entries[at].ebx = u32::from_le_bytes(*b"Test");
    guest.vcpu.set_cpuid(&given).expect("set");
    let kept = guest.vcpu.cpuid().expect("get");
    assert_eq!(
        kept.get(0, 0).expect("leaf 0").ebx,
        u32::from_le_bytes(*b"Test")
    );
    let missing: Vec<_> = given
        .entries
        .iter()
        .filter(|e| kept.get(e.leaf, e.subleaf.unwrap_or(0)).is_none())
        .collect();
    let surplus: Vec<_> = kept
        .entries
        .iter()
        .filter(|e| given.get(e.leaf, e.subleaf.unwrap_or(0)).is_none())
        .collect();
    println!("missing {missing:x?} surplus {surplus:x?}");
    assert_eq!(kept.entries.len(), given.entries.len());
    given.entries.resize(300, given.entries[0]);
    assert!(guest.vcpu.set_cpuid(&given).is_err(), "too many entries");
}

#[test]
fn bad_slots_and_vcpus_are_refused() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&*kvm);
    let good = guest.slot;
    for bad in [
        MemorySlot {
            slot: 1,
            len: 0,
            ..good
        },
        MemorySlot {
            slot: 1,
            gpa: good.len + 1,
            ..good
        },
        MemorySlot {
            slot: 1,
            gpa: good.len,
            len: 4097,
            ..good
        },
        MemorySlot {
            slot: 1,
            gpa: 4096,
            ..good
        },
        MemorySlot {
            slot: u32::from(u16::MAX),
            gpa: good.len,
            ..good
        },
    ] {
        // SAFETY: none of them is taken.
        assert!(unsafe { guest.vm.map_memory(bad) }.is_err(), "{bad:?}");
    }
    assert!(guest.vm.create_vcpu(0).is_err(), "each id once");
    assert!(guest.vm.create_vcpu(u32::MAX).is_err());
}

#[test]
fn memory_that_is_taken_away_or_read_only_becomes_mmio() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(
        &*kvm,
        &code(&[
            &[0xc6, 0x04, 0x25, 0, 0, 0x40, 0, 1], // mov byte [0x40_0000], 1
            &STOP64,
            &[0xeb, 0xf0], // again
        ]),
    );
    let extra = Ram::new(0x1000);
    let slot = extra.slot(1, 0x40_0000);
    // SAFETY: `extra` outlives its slot: it is unmapped below, and the guest does not run after that.
    unsafe { guest.vm.map_memory(slot) }.expect("map");
    guest.run();
    assert_eq!((guest.bus.take(), extra.read(0)), (vec![], [1u8]));
    guest.vm.unmap_memory(slot).expect("unmap");
    extra.write(0, &[0]);
    let write = Access::Write(0x40_0000, vec![1]);
    guest.run();
    assert_eq!(
        (guest.bus.take(), extra.read(0)),
        (vec![write.clone()], [0u8])
    );
    // SAFETY: as above.
    unsafe {
        guest.vm.map_memory(MemorySlot {
            read_only: true,
            ..slot
        })
    }
    .expect("map");
    guest.run();
    assert_eq!((guest.bus.take(), extra.read(0)), (vec![write], [0u8]));
    guest.vm.unmap_memory(slot).expect("unmap");
}

#[test]
fn the_clock_goes_on_from_where_it_was_read() {
    let Some(kvm) = kvm() else { return };
    let (a, b) = (Guest::new(&*kvm), Guest::new(&*kvm));
    let mut clock = a.vm.clock().expect("clock");
    clock.guest_ns += 1_000_000_000_000;
    b.vm.set_clock(&clock).expect("set");
    let there = b.vm.clock().expect("clock");
    assert!(there.guest_ns >= clock.guest_ns);
    if let Some(realtime) = &mut clock.host_realtime_ns {
        *realtime -= 500_000_000_000;
        b.vm.set_clock(&clock).expect("set");
        let later = b.vm.clock().expect("clock");
        assert!(
            later.guest_ns >= clock.guest_ns + 500_000_000_000,
            "the time in between counts"
        );
    }
    a.vcpu.notify_paused().expect("harmless without a clock");
}

#[test]
fn memory_behind_the_guests_that_cannot_be_accessed_is_a_fault() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::user_mode(&*kvm, &[0xc6, 0x04, 0x25, 0, 0, 0x40, 0, 1]); // mov byte [0x40_0000], 1
    let slot = MemorySlot {
        slot: 1,
        gpa: 0x40_0000,
        len: 0x1000,
        hva: 0x1000,
        read_only: false,
    };
    // SAFETY: nothing can ever be mapped there (below mmap_min_addr), so no access succeeds.
    unsafe { guest.vm.map_memory(slot) }.expect("map");
    let exit = guest.vcpu.run(&guest.bus).expect("run");
    let VcpuExit::Fault(details) = exit else {
        panic!("{exit:?}")
    };
    assert!(details.registers.is_some(), "{details}");
}
