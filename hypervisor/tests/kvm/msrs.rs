//! Every register that a guest can set and later read is among those that move.

use arch::x86_64::state::Msr;
use backend::guest::Guest;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm as Device, VcpuFd};

use crate::kvm;

/// Where registers are: the architectural ones and Intel's, those of hypervisors, AMD's (SDM vol. 4, chapter 2; APM vol. 2, appendix A;
/// Linux, Documentation/virt/kvm/x86/msr.rst; TLFS).
const RANGES: [std::ops::Range<u32>; 6] = [
    0..0x2000,
    0x4000_0000..0x4000_0200,
    0x4b56_4d00..0x4b56_4d10,
    0xc000_0000..0xc000_1000,
    0xc001_0000..0xc001_1200,
    0xc001_0200..0xc001_0400,
];

/// Registers that keep what is written and need not move, each with its reason.
const STAY: [(std::ops::RangeInclusive<u32>, &str); 4] = [
    (0x800..=0x8ff, "x2APIC: the local APIC's page has them"),
    (0x1b..=0x1b, "the APIC's base is a special register"),
    (0xc000_0080..=0xc000_0080, "EFER is a special register"),
    (
        0xc000_0100..=0xc000_0101,
        "bases of FS and GS are special registers",
    ),
];

fn read(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut table = Msrs::from_entries(&[kvm_msr_entry {
        index,
        ..Default::default()
    }])
    .ok()?;
    match vcpu.get_msrs(&mut table) {
        Ok(1) => table.as_slice().first().map(|entry| entry.data),
        _ => None,
    }
}

fn write(vcpu: &VcpuFd, msr: Msr) -> bool {
    let entry = kvm_msr_entry {
        index: msr.index,
        data: msr.value,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).is_ok_and(|table| vcpu.set_msrs(&table).is_ok_and(|n| n == 1))
}

/// Another value that the register takes and keeps.
fn settable(vcpu: &VcpuFd, index: u32) -> Option<Msr> {
    let before = read(vcpu, index)?;
    let candidates = (0..64).map(|bit| before ^ 1 << bit).chain([0, !before]);
    for value in candidates.filter(|value| *value != before) {
        if write(vcpu, Msr { index, value }) {
            let kept = read(vcpu, index) == Some(value);
            write(
                vcpu,
                Msr {
                    index,
                    value: before,
                },
            );
            if kept {
                return Some(Msr { index, value });
            }
        }
    }
    None
}

/// A vCPU of KVM's own, which shows all that KVM can show.
fn bare_vcpu() -> VcpuFd {
    let device = Device::new().expect("/dev/kvm");
    let vm = device.create_vm().expect("a VM");
    let vcpu = vm.create_vcpu(0).expect("a vCPU");
    let cpuid = device
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .expect("CPUID");
    vcpu.set_cpuid2(&cpuid).expect("CPUID is set");
    vcpu
}

#[test]
fn nothing_that_can_be_set_stays_behind() {
    let Some(kvm) = kvm() else { return };
    let moves = kvm.msr_indices().expect("the list");
    let vcpu = bare_vcpu();
    let mut walked = 0;
    let mut behind = Vec::new();
    for index in RANGES.into_iter().flatten() {
        if read(&vcpu, index).is_none() {
            continue;
        }
        walked += 1;
        if moves.binary_search(&index).is_ok()
            || STAY.iter().any(|(range, _)| range.contains(&index))
        {
            continue;
        }
        behind.extend(settable(&vcpu, index));
    }
    println!("{walked} registers can be read, {} are listed", moves.len());
    assert!(walked > 20, "KVM has hardly any register: {walked}");
    assert!(
        behind.is_empty(),
        "these can be set and do not move: {behind:x?}"
    );
}

/// Registers whose value goes on by itself, or by which KVM writes to guest memory: the TSC, its adjustment and deadline, KVM's clocks and
/// other shared structures, Hyper-V's pages.
fn does_more(index: u32) -> bool {
    matches!(
        index,
        0x10 | 0x11 | 0x12 | 0x3b | 0x6e0 | 0x4000_0000..=0x4000_01ff | 0x4b56_4d00..=0x4b56_4d07
    ) || STAY.iter().any(|(range, _)| range.contains(&index))
}

/// Each register that takes another value has it after a save and a restore elsewhere.
#[test]
fn everything_that_is_listed_and_can_be_set_moves() {
    let Some(kvm) = kvm() else { return };
    let vcpu = bare_vcpu();
    let set: Vec<Msr> = kvm
        .msr_indices()
        .expect("the list")
        .into_iter()
        .filter(|index| !does_more(*index))
        .filter_map(|index| settable(&vcpu, index))
        .collect();
    assert!(set.len() > 10, "KVM takes hardly any register: {set:x?}");
    let mut first = Guest::new(&*kvm).expect("a guest");
    let mut second = Guest::new(&*kvm).expect("a guest");
    let mut moved = 0;
    for wanted in set {
        let fresh = first.vcpu.save_state().expect("save");
        let Some(at) = fresh.msrs.iter().position(|msr| msr.index == wanted.index) else {
            continue;
        };
        let mut changed = fresh.clone();
        changed.msrs[at].value = wanted.value;
        // The guest's own CPUID may not let it have what the bare vCPU can.
        if first.vcpu.restore_state(&changed).is_err() {
            first.vcpu.restore_state(&fresh).expect("back");
            continue;
        }
        let saved = first.vcpu.save_state().expect("save");
        second.vcpu.restore_state(&saved).expect("restore");
        let again = second.vcpu.save_state().expect("save");
        let value = again.msrs.iter().find(|msr| msr.index == wanted.index);
        assert_eq!(value, Some(&wanted), "MSR {:#x}", wanted.index);
        moved += 1;
        first.vcpu.restore_state(&fresh).expect("back");
    }
    println!("{moved} registers were set and moved");
    assert!(moved > 10, "hardly any register moved: {moved}");
}
