//! Model-specific registers, as the guest reads and writes them in ring 0.

use arch::x86_64::state::{Msr, VcpuState};
use hypervisor::Hypervisor;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::{CODE, DATA, Guest, Idioms as _, cpuid};
use crate::host;
use crate::outcome::{Outcome, ensure, same};

/// IA32_TSC_AUX.
const TSC_AUX: u32 = 0xc000_0103;
/// IA32_EFER.
const EFER: u32 = 0xc000_0080;
/// IA32_LSTAR.
const LSTAR: u32 = 0xc000_0082;
/// An index that no processor has.
const UNKNOWN: u32 = 0x1234_5678;

/// Registers with a value that each can hold and no reset leaves. FS and GS bases are segments here, not MSRs.
/// AMD's processors keep only 32 bits of SYSENTER's addresses.
const VALUES: &[(u32, u64)] = &[
    (0x174, 0x10),
    (0x175, 0x8000_1000),
    (0x176, 0x8000_2000),
    (0x277, 0x0007_0406_0007_0106),
    (0xc000_0081, 0x0023_0010_0000_0000),
    (LSTAR, 0xffff_ffff_8100_0000),
    (0xc000_0083, 0xffff_ffff_8200_0000),
    (0xc000_0084, 0x4_7700),
    (0xc000_0102, 0xffff_8880_1234_0000),
    (TSC_AUX, 0x1234),
];

/// Those that this host's guests have.
fn values(hypervisor: &dyn Hypervisor) -> Outcome<Vec<(u32, u64)>> {
    let table = cpuid(hypervisor, 0)?;
    // RDTSCP, or RDPID.
    let has_aux = table
        .get(0x8000_0001, 0)
        .is_some_and(|leaf| leaf.edx & 1 << 27 != 0)
        || table.get(7, 0).is_some_and(|leaf| leaf.ecx & 1 << 22 != 0);
    Ok(VALUES
        .iter()
        .copied()
        .filter(|(index, _)| *index != TSC_AUX || has_aux)
        .collect())
}

fn write(a: &mut CodeAssembler, index: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

fn read(a: &mut CodeAssembler, index: u32, to: u64) -> Result<(), IcedError> {
    a.mov(ecx, index)?;
    a.rdmsr()?;
    a.mov(dword_ptr(to), eax)?;
    a.mov(dword_ptr(to + 4), edx)
}

fn saved(state: &VcpuState, index: u32) -> Option<u64> {
    state
        .msrs
        .iter()
        .find(|msr| msr.index == index)
        .map(|msr| msr.value)
}

pub(super) fn what_is_written_is_read_and_saved(hypervisor: &dyn Hypervisor) -> Outcome {
    let values = values(hypervisor)?;
    let mut guest = Guest::long(hypervisor, &|a| {
        for (index, value) in &values {
            write(a, *index, *value)?;
        }
        a.stop()?;
        for (n, (index, _)) in (0..).zip(&values) {
            read(a, *index, DATA + n * 8)?;
        }
        a.stop_for_good()
    })?;
    guest.run()?;
    let state = guest.vcpu.save_state()?;
    let known = hypervisor.msr_indices()?;
    guest.run()?;
    for (n, (index, value)) in (0..).zip(&values) {
        same!(
            guest.ram.read_u64(DATA + n * 8),
            *value,
            "MSR {index:#x} as read"
        );
        if known.binary_search(index).is_ok() {
            same!(
                saved(&state, *index),
                Some(*value),
                "MSR {index:#x} as saved"
            );
        }
    }
    Ok(())
}

pub(super) fn what_is_restored_is_read(hypervisor: &dyn Hypervisor) -> Outcome {
    let values = values(hypervisor)?;
    let mut guest = Guest::long(hypervisor, &|a| {
        for (n, (index, _)) in (0..).zip(&values) {
            read(a, *index, DATA + n * 8)?;
        }
        a.stop_for_good()
    })?;
    guest.change(|state| {
        for (index, value) in &values {
            set(state, *index, *value);
        }
    })?;
    guest.run()?;
    for (n, (index, value)) in (0..).zip(&values) {
        same!(guest.ram.read_u64(DATA + n * 8), *value, "MSR {index:#x}");
    }
    Ok(())
}

/// Sets a register in a state.
pub(super) fn set(state: &mut VcpuState, index: u32, value: u64) {
    match state.msrs.iter_mut().find(|msr| msr.index == index) {
        Some(msr) => msr.value = value,
        None => {
            state.msrs.push(Msr { index, value });
            state.msrs.sort_unstable();
        }
    }
}

/// EFER, with the bits that a guest in long mode may change.
pub(super) fn efer(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        read(a, EFER, DATA)?;
        write(a, EFER, 0x500)?;
        read(a, EFER, DATA + 8)?;
        a.stop_for_good()
    })?;
    guest.run()?;
    same!(
        guest.ram.quads(DATA),
        [0x501, 0x500],
        "EFER before and after SCE is cleared"
    );
    same!(
        guest.vcpu.save_state()?.special.efer,
        0x500,
        "EFER as saved"
    );
    Ok(())
}

pub(super) fn unknown_ones_are_refused(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.mov(ecx, UNKNOWN)?;
        a.rdmsr()?;
        a.wrmsr()?;
        write(a, LSTAR, 1 << 62)?;
        a.stop_for_good()
    })?;
    let read = guest.run_to_fault()?;
    same!(
        (read.vector, read.error, read.rip),
        (13, 0, CODE + 5),
        "the fault of RDMSR"
    );
    guest.resume_at(CODE + 7);
    let written = guest.run_to_fault()?;
    same!(
        (written.vector, written.error, written.rip),
        (13, 0, CODE + 7),
        "the fault of WRMSR"
    );
    if host::is_emulated() {
        // QEMU's emulator takes any address.
        return Ok(());
    }
    guest.resume_at(CODE + 9);
    let odd = guest.run_to_fault()?;
    same!(
        (odd.vector, odd.error),
        (13, 0),
        "the fault of an address that is not canonical"
    );
    Ok(())
}

pub(super) fn privileged(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(ecx, EFER)?;
        a.rdmsr()
    })?;
    let fault = guest.run_to_fault()?;
    same!(
        (fault.vector, fault.error, fault.rip),
        (13, 0, CODE + 5),
        "the fault in ring 3"
    );
    Ok(())
}

pub(super) fn the_list_is_sorted_and_complete(hypervisor: &dyn Hypervisor) -> Outcome {
    let msrs = hypervisor.msr_indices()?;
    ensure!(
        msrs.windows(2).all(|pair| pair[0] < pair[1]),
        "the list is not sorted"
    );
    for index in [
        0x10,
        0x174,
        0x175,
        0x176,
        0x277,
        0x2ff,
        0xc000_0081,
        LSTAR,
        0xc000_0084,
        0xc000_0102,
    ] {
        ensure!(
            msrs.binary_search(&index).is_ok(),
            "MSR {index:#x} is not saved"
        );
    }
    Ok(())
}
