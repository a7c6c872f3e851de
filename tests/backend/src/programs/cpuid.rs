//! What CPUID shows.

use arch::x86_64::cpuid::Cpuid;
use hypervisor::Hypervisor;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::processors::beside;
use crate::guest::{CODE, DATA, Guest, Idioms as _, MORE_DATA, cpuid};
use crate::host;
use crate::outcome::{Outcome, ensure, fail, same, skip};

/// Reads leaves into [`DATA`] in ring 0, 16 bytes each.
fn reader(leaves: &[(u32, u32)]) -> impl Fn(&mut CodeAssembler) -> Result<(), IcedError> {
    let leaves = leaves.to_vec();
    move |a| {
        for (n, (leaf, subleaf)) in (0..).zip(&leaves) {
            a.mov(eax, *leaf)?;
            a.mov(ecx, *subleaf)?;
            a.cpuid()?;
            for (at, register) in (0..).zip([eax, ebx, ecx, edx]) {
                a.mov(dword_ptr(DATA + n * 16 + at * 4), register)?;
            }
        }
        a.stop_for_good()
    }
}

fn read(guest: &Guest, n: u64) -> [u32; 4] {
    std::array::from_fn(|i| guest.ram.read_u32(DATA + n * 16 + i as u64 * 4))
}

/// What the guest reads in ring 0 is what the back end says it shows.
pub(super) fn what_is_shown_is_what_is_read(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut given = cpuid(hypervisor, 0)?;
    if let Some(leaf) = given.get_mut(0, 0) {
        leaf.ebx = u32::from_le_bytes(*b"Test");
    }
    let leaves = [
        (0, 0),
        (1, 0),
        (7, 0),
        (0x8000_0000, 0),
        (0x8000_0001, 0),
        (0x8000_0008, 0),
    ];
    let (guest, shown) = run_with(hypervisor, &given, &leaves)?;
    for (n, (leaf, subleaf)) in (0..).zip(leaves) {
        let Some(entry) = shown.get(leaf, subleaf) else {
            continue;
        };
        let mut expected = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        let mut found = read(&guest, n);
        if host::interprets_ring_0() && [1, 7, 0x8000_0001].contains(&leaf) {
            // Such a host puts its own features there, and a back end above it need not know: see the next program.
            found[1..].copy_from_slice(&expected[1..]);
        }
        // OSXSAVE and OSPKE follow CR4, whatever the table says.
        let follows = if leaf == 1 { 1 << 27 } else { 0 } | if leaf == 7 { 1 << 4 } else { 0 };
        (expected[2], found[2]) = (expected[2] & !follows, found[2] & !follows);
        same!(found, expected, "leaf {leaf:#x}");
    }
    same!(read(&guest, 0)[1].to_le_bytes(), *b"Test", "EBX of leaf 0");
    Ok(())
}

/// A feature taken away is not shown.
pub(super) fn masked_features_stay_masked(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut given = cpuid(hypervisor, 0)?;
    // AESNI and RDRAND, and ERMS in leaf 7: they hang on no control register.
    let (aes_rdrand, erms) = (1 << 25 | 1 << 30, 1 << 9);
    if let Some(leaf) = given.get_mut(1, 0) {
        leaf.ecx &= !aes_rdrand;
    }
    if let Some(leaf) = given.get_mut(7, 0) {
        leaf.ebx &= !erms;
    }
    let (guest, shown) = run_with(hypervisor, &given, &[(1, 0), (7, 0)])?;
    if host::interprets_ring_0() && read(&guest, 0)[2] & aes_rdrand != 0 {
        return skip("this host's KVM shows guests the host's features, whatever is set");
    }
    same!(
        shown.get(1, 0).map_or(0, |leaf| leaf.ecx) & aes_rdrand,
        0,
        "AESNI and RDRAND in the table"
    );
    same!(read(&guest, 0)[2] & aes_rdrand, 0, "AESNI and RDRAND");
    same!(read(&guest, 1)[1] & erms, 0, "ERMS");
    Ok(())
}

/// A guest with this table that has read these leaves, and what the back end says it was shown.
fn run_with(
    hypervisor: &dyn Hypervisor,
    given: &Cpuid,
    leaves: &[(u32, u32)],
) -> Outcome<(Guest, Cpuid)> {
    let mut guest = Guest::with_cpuid(hypervisor, given)?;
    guest.place(64, CODE, &reader(leaves))?;
    guest.enter_long_mode(0)?;
    guest.run()?;
    let shown = guest.vcpu.cpuid()?;
    Ok((guest, shown))
}

/// The table as the back end has it, without a guest.
pub(super) fn the_table_is_kept(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut given = cpuid(hypervisor, 0)?;
    if let Some(leaf) = given.get_mut(0, 0) {
        leaf.ebx = u32::from_le_bytes(*b"Test");
    }
    let mut guest = Guest::with_cpuid(hypervisor, &given)?;
    let kept = guest.vcpu.cpuid()?;
    same!(
        kept.get(0, 0).map(|leaf| leaf.ebx),
        given.get(0, 0).map(|leaf| leaf.ebx),
        "EBX of leaf 0"
    );
    let lacks = |one: &Cpuid, other: &Cpuid| -> Vec<(u32, Option<u32>)> {
        one.entries
            .iter()
            .filter(|e| other.get(e.leaf, e.subleaf.unwrap_or(0)).is_none())
            .map(|e| (e.leaf, e.subleaf))
            .collect()
    };
    same!(lacks(&given, &kept), [], "leaves that are gone");
    same!(lacks(&kept, &given), [], "leaves that nobody asked for");
    let Some(any) = given.entries.first().copied() else {
        return fail("the table is empty");
    };
    given.entries.resize(300, any);
    ensure!(
        guest.vcpu.set_cpuid(&given).is_err(),
        "a table of 300 entries was taken"
    );
    Ok(())
}

pub(super) fn leaves_beyond_the_table(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut given = cpuid(hypervisor, 0)?;
    let gone = 0x4000_0000u32;
    given
        .entries
        .retain(|entry| entry.leaf & 0xffff_0000 != gone);
    // A hypervisor's leaf that is hidden, and one that nobody has.
    let (guest, _) = run_with(hypervisor, &given, &[(gone, 0), (gone + 0x10, 0)])?;
    for n in [0, 1] {
        let [_, ebx_, ecx_, edx_] = read(&guest, n);
        let signature = [ebx_, ecx_, edx_].map(u32::to_le_bytes).concat();
        ensure!(
            signature != b"KVMKVMKVM\0\0\0" && signature != b"Microsoft Hv",
            "hidden leaf {n} shows {signature:x?}"
        );
    }
    Ok(())
}

pub(super) fn each_vcpu_reads_its_own_apic_id(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &reader(&[(1, 0)]))?;
    let (mut second, bus) = guest.add_vcpu(hypervisor, 1)?;
    guest.place(16, 0x1_3000, &|a| {
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.mov(dword_ptr(MORE_DATA), ebx)?;
        a.mov(dword_ptr(MORE_DATA + 4), 1)?;
        a.stop_for_good()
    })?;
    let mut state = second.save_state()?;
    for segment in [&mut state.special.cs, &mut state.special.ds] {
        (segment.selector, segment.base) = (0, 0);
    }
    // A CS of 0x1300 would do as well; an offset above 0xffff would not.
    (state.special.cs.selector, state.special.cs.base) = (0x1300, 0x1_3000);
    (state.general.rip, state.general.rflags) = (0, 2);
    state.activity = arch::x86_64::state::Activity::Running;
    second.restore_state(&state)?;
    guest.run()?;
    let ram = &guest.ram;
    beside(&mut *second, &bus, || {
        let patience = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while ram.read_u32(MORE_DATA + 4) == 0 {
            ensure!(
                std::time::Instant::now() < patience,
                "the second vCPU did not run"
            );
            std::thread::yield_now();
        }
        Ok(())
    })?;
    same!(read(&guest, 0)[1] >> 24, 0, "the APIC id of vCPU 0");
    same!(
        guest.ram.read_u32(MORE_DATA) >> 24,
        1,
        "the APIC id of vCPU 1"
    );
    Ok(())
}
