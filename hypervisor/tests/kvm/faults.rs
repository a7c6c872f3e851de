//! Guests that cannot go on.

use hypervisor::VcpuExit;

use crate::guest::{CODE, Guest, kvm};

#[test]
fn a_triple_fault_asks_for_a_reset() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&*kvm, &[0x0f, 0x0b]); // ud2, with no IDT to handle it
    guest.change(|state| state.special.idt.limit = 0);
    let exit = guest.vcpu.run(&guest.bus).expect("run");
    assert!(
        matches!(exit, VcpuExit::Reset { triple_fault: true }),
        "{exit:?}"
    );
}

#[test]
fn a_failed_emulation_says_which_instruction_and_where() {
    let Some(kvm) = kvm() else { return };
    // mov edi, 0x3000_0000; popcnt eax, [rdi]: KVM's emulator has no POPCNT, and memory that is not there needs it.
    let popcnt = [0xf3, 0x0f, 0xb8, 0x07];
    let mut guest = Guest::long_mode(&*kvm, &[&[0xbf, 0, 0, 0, 0x30], &popcnt[..]].concat());
    let exit = guest.vcpu.run(&guest.bus).expect("run");
    let VcpuExit::Fault(details) = exit else {
        panic!("{exit:?}")
    };
    assert!(details.reason.contains("emulate"), "{}", details.reason);
    assert!(
        details.instruction.starts_with(&popcnt),
        "{:x?}",
        details.instruction
    );
    let registers = details.registers.expect("registers");
    assert_eq!((registers.rip, registers.rdi), (CODE + 5, 0x3000_0000));
    assert_eq!(details.special.expect("special registers").cr3, 0x9000);
    let text = details.to_string();
    assert!(
        text.contains("f3 0f b8 07") && text.contains("rip=0x1005"),
        "{text}"
    );
}
