//! Guests that KVM gives up on, and whose instruction our own emulator does not know either.

use backend::guest::{CODE, Guest, MMIO};
use hypervisor::{MemorySlot, VcpuExit};

use crate::kvm;

#[test]
fn a_failed_emulation_says_which_instruction_and_where() {
    let Some(kvm) = kvm() else { return };
    // aesenc xmm0, [rdi]: neither emulator has it, and memory that is not there needs one.
    let aesenc = [0x66, 0x0f, 0x38, 0xdc, 0x07];
    let mut guest = Guest::long(&*kvm, &|_| Ok(())).expect("a guest");
    guest.ram.write(CODE, &aesenc);
    guest
        .change(|state| state.general.rdi = MMIO)
        .expect("a state");
    let exit = guest.vcpu.run(&guest.bus).expect("run");
    let VcpuExit::Fault(details) = exit else {
        panic!("{exit:?}")
    };
    assert!(details.reason.contains("emulate"), "{}", details.reason);
    assert!(
        details.instruction.starts_with(&aesenc),
        "{:x?}",
        details.instruction
    );
    let registers = details.registers.expect("registers");
    assert_eq!((registers.rip, registers.rdi), (CODE, MMIO));
    assert_eq!(details.special.expect("special registers").cr3, 0x9000);
    let text = details.to_string();
    assert!(
        text.contains("66 0f 38 dc 07") && text.contains("rip=0x1000"),
        "{text}"
    );
}

/// KVM takes a slot whose memory is not there, and finds out when the guest does.
#[test]
fn memory_behind_the_guests_that_cannot_be_accessed_is_a_fault() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::user(&*kvm, &|a| {
        use iced_x86::code_asm::byte_ptr;
        a.mov(byte_ptr(MMIO), 1)
    })
    .expect("a guest");
    let slot = MemorySlot {
        slot: 1,
        gpa: MMIO,
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
