//! Instructions of ring 0 that KVM's own emulator lacks. Where KVM has hardware virtualisation the processor executes them; where it
//! interprets ring 0 our emulator does. The guest sees the same either way.

use backend::guest::{CODE, DATA, Guest, Idioms as _};
use iced_x86::code_asm::*;

use crate::kvm;

/// How many instructions were emulated here rather than in KVM or by the processor.
fn emulated(guest: &Guest) -> u64 {
    let counters = guest.vm.counters();
    let of = |wanted| {
        counters
            .iter()
            .find(|(name, _)| *name == wanted)
            .map_or(0, |(_, count)| *count)
    };
    assert_eq!(of("emulation_failures"), 0);
    of("emulated_instructions")
}

#[test]
fn counting_bits_and_exchanging_sixteen_bytes() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long(&*kvm, &|a| {
        a.mov(eax, 0xf0f0_1234u32)?;
        a.popcnt(ecx, eax)?;
        a.mov(dword_ptr(DATA), ecx)?;
        // Memory holds RDX:RAX = 0, and becomes RCX:RBX.
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.mov(ebx, 0x1111_1111)?;
        a.mov(ecx, 0x2222_2222)?;
        a.lock().cmpxchg16b(xmmword_ptr(DATA + 0x10))?;
        a.setz(byte_ptr(DATA + 8))?;
        a.stop_for_good()
    })
    .expect("a guest");
    guest.run().expect("a run");
    assert_eq!(guest.ram.read_u32(DATA), 0xf0f0_1234u32.count_ones());
    assert_eq!(guest.ram.read::<1>(DATA + 8), [1]);
    assert_eq!(
        guest.ram.quads::<2>(DATA + 0x10),
        [0x1111_1111, 0x2222_2222]
    );
    println!("{} instructions were emulated here", emulated(&guest));
}

#[test]
fn vector_moves_keep_their_registers() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long(&*kvm, &|a| {
        // CR4.OSFXSR.
        a.mov(rax, cr4)?;
        a.or(eax, 1 << 9)?;
        a.mov(cr4, rax)?;
        a.mov(eax, 0x5a5a_5a5a)?;
        a.movd(xmm3, eax)?;
        a.movdqu(xmmword_ptr(DATA), xmm3)?;
        a.pxor(xmm3, xmm3)?;
        a.movups(xmmword_ptr(DATA + 0x11), xmm3)?;
        a.stop_for_good()
    })
    .expect("a guest");
    guest.ram.write(DATA + 0x11, &[0xff; 16]);
    guest.run().expect("a run");
    assert_eq!(guest.ram.quads::<2>(DATA), [0x5a5a_5a5a, 0]);
    assert_eq!(guest.ram.read::<16>(DATA + 0x11), [0; 16]);
    let count = emulated(&guest);
    println!("{count} instructions were emulated here");
}

#[test]
fn a_breakpoint_returns_behind_its_instruction() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long(&*kvm, &|a| {
        a.nop()?;
        a.int3()?;
        a.mov(dword_ptr(DATA), 7)?;
        a.stop_for_good()
    })
    .expect("a guest");
    let fault = guest.run_to_fault().expect("an exception");
    assert_eq!((fault.vector, fault.rip), (3, CODE + 2));
    guest.run().expect("the handler returns");
    assert_eq!(guest.ram.read_u32(DATA), 7);
    emulated(&guest);
}

#[test]
fn undefined_instructions_stay_undefined() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long(&*kvm, &|a| {
        a.nop()?;
        a.ud2()
    })
    .expect("a guest");
    let fault = guest.run_to_fault().expect("an exception");
    assert_eq!((fault.vector, fault.rip), (6, CODE + 1));
}

/// What is written here KVM does not see; the dirty log has it nonetheless.
#[test]
fn emulated_writes_are_dirty() {
    let Some(kvm) = kvm() else { return };
    const PAGE: u64 = 0x2_5000;
    let mut guest = Guest::long(&*kvm, &|a| {
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.mov(ebx, 1)?;
        a.xor(ecx, ecx)?;
        a.lock().cmpxchg16b(xmmword_ptr(PAGE))?;
        a.stop_for_good()
    })
    .expect("a guest");
    guest.vm.start_dirty_log(guest.slot).expect("start");
    let fetch = |guest: &Guest| {
        let mut words = [0u64; 8];
        guest
            .vm
            .fetch_dirty_log(guest.slot, &mut words)
            .expect("fetch");
        guest
            .vm
            .clear_dirty_log(guest.slot, 0, guest.slot.len / 4096, &words)
            .expect("clear");
        words[0] >> (PAGE / 4096) & 1
    };
    fetch(&guest);
    assert_eq!(fetch(&guest), 0);
    guest.run().expect("a run");
    assert_eq!(fetch(&guest), 1);
    assert_eq!(fetch(&guest), 0, "and is clean again once it was cleared");
    emulated(&guest);
}
