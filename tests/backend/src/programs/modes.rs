//! The processor's modes, and the ways between them that a guest takes by itself.

use hypervisor::Hypervisor;
use iced_x86::code_asm::*;

use crate::guest::{
    CODE, CODE32, CODE64, DATA, DATA_SELECTOR, Guest, Idioms as _, MORE_DATA, USER_CODE32,
    USER_DATA, loaded,
};
use crate::outcome::{Outcome, same};

/// Code for the next mode lies here.
const NEXT: u64 = 0x1_3000;
/// And for the one after it.
const AFTER: u64 = 0x1_4000;

pub(super) fn real_mode_segments_and_calls(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::real(hypervisor, &|a| {
        // DS = 0x300: offset 0 is MORE_DATA.
        a.mov(ax, (MORE_DATA >> 4) as u32)?;
        a.mov(ds, ax)?;
        a.mov(ax, word_ptr(0))?;
        a.mov(word_ptr(2), ax)?;
        // An INT goes through the vector table, and its IRET comes back with all flags.
        a.stc()?;
        a.int(0x50)?;
        a.setc(byte_ptr(4))?;
        a.mov(word_ptr(6), cs)?;
        a.stop_for_good()
    })?;
    guest.ram.write(MORE_DATA, &[0x34, 0x12]);
    guest.ram.write(0x50 * 4, &[0x00, 0x00, 0x00, 0x13]);
    guest.place(16, NEXT, &|a| {
        a.clc()?;
        a.mov(word_ptr(8), cs)?;
        a.iret()
    })?;
    guest.run()?;
    same!(
        guest.ram.read(MORE_DATA),
        [0x34, 0x12, 0x34, 0x12, 1, 0, 0, 0, 0x00, 0x13],
        "memory at MORE_DATA"
    );
    Ok(())
}

pub(super) fn protected_mode_loads_segments(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::protected(hypervisor, &|a| {
        a.mov(eax, u32::from(crate::guest::DATA_BASED))?;
        a.mov(gs, eax)?;
        // The base is 0x10_0000, so that this is in the first page again.
        a.mov(dword_ptr(DATA as i32 - 0x10_0000).gs(), 0x1234)?;
        a.mov(ax, gs)?;
        a.mov(dword_ptr(DATA as i32 + 4), eax)?;
        a.stop_for_good()
    })?;
    guest.run()?;
    same!(guest.ram.read_u32(DATA), 0x1234, "memory through GS");
    same!(
        guest.ram.read_u32(DATA + 4),
        u32::from(crate::guest::DATA_BASED),
        "GS"
    );
    let special = guest.vcpu.save_state()?.special;
    same!(
        (special.gs.base, special.gs.limit),
        (0x10_0000, u32::MAX),
        "GS as saved"
    );
    Ok(())
}

/// Real → protected → long mode, as a boot loader does it.
pub(super) fn from_real_to_long_mode(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::real(hypervisor, &|a| {
        // GDTR: limit, base.
        a.lgdt(fword_ptr(MORE_DATA))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        // jmp far CODE32:NEXT, with a 32-bit offset.
        a.db(&[0x66, 0xea])?;
        a.db(&(NEXT as u32).to_le_bytes())?;
        a.db(&CODE32.to_le_bytes())
    })?;
    guest.ram.write(MORE_DATA, &[0x6f, 0, 0x00, 0x40, 0, 0]);
    guest.place(32, NEXT, &|a| {
        a.mov(eax, u32::from(DATA_SELECTOR))?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.mov(ss, eax)?;
        a.mov(esp, 0x8000)?;
        a.mov(dword_ptr(DATA as u32), 0x3232)?;
        a.mov(eax, cr4)?;
        a.or(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(eax, 0x9000)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 0x100)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32)?;
        a.mov(cr0, eax)?;
        // Compatibility mode now, until the jump.
        a.db(&[0xea])?;
        a.db(&(AFTER as u32).to_le_bytes())?;
        a.db(&CODE64.to_le_bytes())
    })?;
    guest.place(64, AFTER, &|a| {
        a.mov(rax, 0x1234_5678_9abc_def0u64)?;
        a.mov(r15, rax)?;
        a.mov(qword_ptr(DATA + 8), r15)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.mov(qword_ptr(DATA + 16), rax)?;
        a.stop_for_good()
    })?;
    guest.run()?;
    same!(guest.ram.read_u32(DATA), 0x3232, "the mark of 32-bit mode");
    same!(
        guest.ram.read_u64(DATA + 8),
        0x1234_5678_9abc_def0,
        "a 64-bit register"
    );
    same!(
        guest.ram.read_u64(DATA + 16) & 0x500,
        0x500,
        "EFER.LME and LMA"
    );
    let special = guest.vcpu.save_state()?.special;
    same!(special.efer & 0x500, 0x500, "EFER as saved");
    same!(special.cs.selector, CODE64, "CS as saved");
    same!(special.cs.access & 0x2000, 0x2000, "CS.L as saved");
    Ok(())
}

/// Ring 0 in 64-bit mode, ring 3 in 32-bit code, and back through a gate.
pub(super) fn compatibility_mode(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.push(i32::from(USER_DATA))?;
        a.push(0x7800)?;
        a.push(2)?;
        a.push(i32::from(USER_CODE32))?;
        a.push(NEXT as i32)?;
        a.iretq()
    })?;
    guest.place(32, NEXT, &|a| {
        // INC EAX: in 64-bit mode these bytes would be a REX prefix.
        a.mov(eax, 0x7fff_ffff)?;
        a.db(&[0x40])?;
        a.mov(dword_ptr(DATA as u32), eax)?;
        // A 32-bit push moves ESP by 4.
        a.push(eax)?;
        a.mov(dword_ptr(DATA as u32 + 4), esp)?;
        a.ud2()
    })?;
    let fault = guest.run_to_fault()?;
    same!(
        (fault.vector, fault.cs),
        (6, u64::from(USER_CODE32)),
        "vector and CS"
    );
    same!(fault.rsp, 0x77fc, "RSP of ring 3");
    same!(guest.ram.read(DATA), 0x8000_0000u32.to_le_bytes(), "EAX");
    same!(guest.ram.read_u32(DATA + 4), 0x77fc, "ESP");
    Ok(())
}

/// A state of 32-bit protected mode with paging off, set from outside, with code elsewhere than where the segment begins.
pub(super) fn code_segments_with_a_base(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::protected(hypervisor, &|a| a.stop_for_good())?;
    guest.place(32, crate::guest::BASED + 0x200, &|a| {
        let mut next = a.create_label();
        a.call(next)?;
        a.set_label(&mut next)?;
        a.pop(eax)?;
        a.mov(dword_ptr(DATA as u32), eax)?;
        a.stop_for_good()
    })?;
    // Relative jumps do not care where the code was assembled for.
    guest.change(|state| {
        state.special.cs = loaded(crate::guest::CODE_BASED);
        state.general.rip = 0x200;
    })?;
    guest.run()?;
    same!(guest.ram.read_u32(DATA), 0x205, "EIP within the segment");
    Ok(())
}

/// Code that the guest writes is what it then executes, also where it has been executed before.
pub(super) fn self_modifying_code(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            let mut again = a.create_label();
            a.mov(edi, NEXT as u32)?;
            a.xor(ebx, ebx)?;
            a.mov(ecx, 5)?;
            a.set_label(&mut again)?;
            // The immediate of the MOV at NEXT.
            a.mov(dword_ptr(rdi + 1), ecx)?;
            a.call(rdi)?;
            a.lea(rbx, rax + rbx * 8)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.mov(qword_ptr(DATA), rbx)?;
            a.stop_for_good()
        })?;
        guest.place(64, NEXT, &|a| {
            a.mov(eax, 0)?;
            a.ret()
        })?;
        guest.run()?;
        same!(
            guest.ram.read_u64(DATA),
            0o54321,
            "what the code returned in ring {ring}"
        );
    }
    Ok(())
}

/// Code that the host writes between two runs.
pub(super) fn code_changed_from_outside(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(eax, 0x11)?;
            a.mov(dword_ptr(DATA), eax)?;
            a.stop()?;
            a.jmp(again)
        })?;
        guest.run()?;
        same!(guest.ram.read_u32(DATA), 0x11, "the first run");
        guest.ram.write(CODE + 1, &[0x22]);
        guest.run()?;
        same!(
            guest.ram.read_u32(DATA),
            0x22,
            "the second run in ring {ring}"
        );
    }
    Ok(())
}
