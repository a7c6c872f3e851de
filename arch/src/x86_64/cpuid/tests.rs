//! Normalisation, policy and comparison, on CPUIDs like those of real hosts.

use super::*;
use crate::x86_64::topology::Topology;

fn entry(leaf: u32, subleaf: Option<u32>, registers: [u32; 4]) -> CpuidEntry {
    let [eax, ebx, ecx, edx] = registers;
    CpuidEntry {
        leaf,
        subleaf,
        eax,
        ebx,
        ecx,
        edx,
    }
}

/// Like a Xeon under KVM: everything on that has a bit.
fn intel() -> Cpuid {
    let mut entries = vec![
        entry(0, None, [0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        entry(1, None, [0xa0671, 0x0102_0800, u32::MAX, u32::MAX]),
        entry(4, Some(0), [0x0400_0121, 0x02c0_003f, 0x3f, 0]),
        entry(4, Some(1), [0x0400_0122, 0x03c0_003f, 0x3f, 0]),
        entry(4, Some(2), [0x0400_0143, 0x03c0_003f, 0x7ff, 0]),
        entry(4, Some(3), [0x0400_4163, 0x03c0_003f, 0x7_ffff, 0]),
        entry(4, Some(4), [0; 4]),
        entry(5, None, [0x40, 0x40, 3, 0x2020]),
        entry(6, None, [u32::MAX; 4]),
        entry(7, Some(0), [2, u32::MAX, u32::MAX, u32::MAX]),
        entry(7, Some(1), [u32::MAX; 4]),
        entry(0xa, None, [0x0833_0805, 0, 0xf, 0x8604]),
        entry(0xb, Some(0), [1, 2, 0x100, 6]),
        entry(0xb, Some(1), [6, 0x40, 0x201, 6]),
        entry(0xb, Some(2), [0, 0, 2, 6]),
        entry(0xd, Some(0), [0x2e7, 0xa80, 0xa80, 0]),
        entry(0xd, Some(1), [0xf, 0xa80, 0x100, 0]),
        entry(0xd, Some(2), [0x100, 0x240, 0, 0]),
        entry(0xd, Some(9), [8, 0xa80, 0, 0]),
        entry(0x14, Some(0), [1, 0xf, 7, 0]),
        entry(0x1f, Some(0), [0, 0, 0, 6]),
        entry(
            0x4000_0000,
            None,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        entry(0x4000_0001, None, [0x0100_7efb, 0, 0, 1]),
        entry(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        entry(0x8000_0001, None, [0, 0, 0x121, 0x2c10_0800]),
        entry(0x8000_0007, None, [0, 0, 0, 0x100]),
        entry(0x8000_0008, None, [0x3930, 0, 0, 0]),
    ];
    entries.sort_unstable();
    Cpuid { entries }
}

/// Like an EPYC under KVM.
fn amd() -> Cpuid {
    let entries = vec![
        entry(0, None, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(
            1,
            None,
            [0x00a2_0f12, 0x0602_0800, 0x7ed8_320b, 0x178b_fbff],
        ),
        entry(0xb, Some(0), [0, 0, 0, 0]),
        entry(0xd, Some(0), [0x7, 0x340, 0x340, 0]),
        entry(0xd, Some(9), [8, 0x980, 0, 0]),
        entry(
            0x4000_0000,
            None,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        entry(0x4000_0001, None, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0001, None, [0, 0, 0x75c2_37ff, 0x2fd3_fbff]),
        entry(0x8000_0008, None, [0x3030, 0x111e_f657, 0x7007, 0]),
        entry(0x8000_000a, None, [1, 8, 0, 0x1b]),
        entry(0x8000_001d, Some(0), [0x121, 0x1c0_003f, 0x3f, 0]),
        entry(0x8000_001d, Some(3), [0x1c163, 0x3c0_003f, 0x7fff, 1]),
        entry(0x8000_001d, Some(4), [0; 4]),
        entry(0x8000_001e, None, [6, 0x103, 0x700, 0]),
    ];
    Cpuid { entries }
}

fn get(cpuid: &Cpuid, leaf: u32, subleaf: u32) -> CpuidEntry {
    *cpuid
        .get(leaf, subleaf)
        .unwrap_or_else(|| panic!("leaf {leaf:#x}.{subleaf}"))
}

#[test]
fn each_vcpu_reads_its_own_id() {
    for (vcpus, log2) in [(1, 0), (2, 1), (3, 2), (8, 3), (300, 9)] {
        let topology = Topology::flat(vcpus);
        for id in [0, vcpus / 2, vcpus - 1] {
            let cpuid = for_vcpu(&intel(), &topology, id);
            let one = get(&cpuid, 1, 0);
            assert_eq!(one.ebx >> 24, id & 0xff);
            assert_eq!(one.ebx >> 16 & 0xff, (1u32 << log2).min(255));
            assert_eq!(one.ebx & 0xffff, 0x0800, "CLFLUSH size and brand stay");
            assert_eq!(one.edx >> 28 & 1, u32::from(vcpus > 1), "HTT");
            for leaf in [0xb, 0x1f] {
                let thread = get(&cpuid, leaf, 0);
                assert_eq!(
                    (thread.eax, thread.ebx, thread.ecx, thread.edx),
                    (0, 1, 0x100, id)
                );
                let core = get(&cpuid, leaf, 1);
                assert_eq!(
                    (core.eax, core.ebx, core.ecx, core.edx),
                    (log2, vcpus, 0x201, id)
                );
                let end = get(&cpuid, leaf, 2);
                assert_eq!((end.eax, end.ebx, end.ecx, end.edx), (0, 0, 2, id));
            }
        }
    }
}

#[test]
fn caches_are_shared_as_the_topology_says() {
    // Topology, then EAX[31:26] and EAX[25:14] of L1 and L3.
    let cases = [
        (Topology::flat(1), 0, 0, 0),
        (Topology::flat(6), 7, 0, 7),
        (Topology::new(2, 4, 2).expect("valid"), 3, 1, 7),
        (Topology::flat(256), 63, 0, 255),
    ];
    for (topology, cores, level_1, level_3) in cases {
        let cpuid = for_vcpu(&intel(), &topology, 0);
        for (subleaf, sharing) in [(0, level_1), (1, level_1), (2, level_1), (3, level_3)] {
            let cache = get(&cpuid, 4, subleaf);
            assert_eq!(
                (cache.eax >> 26, cache.eax >> 14 & 0xfff),
                (cores, sharing),
                "{topology:?}"
            );
            assert_eq!(cache.eax & 0x3fff, get(&intel(), 4, subleaf).eax & 0x3fff);
        }
        assert_eq!(
            get(&cpuid, 4, 4),
            get(&intel(), 4, 4),
            "no cache stays no cache"
        );
    }
}

#[test]
fn amd_leaves_follow_the_topology() {
    let topology = Topology::new(2, 4, 2).expect("valid");
    let cpuid = for_vcpu(&amd(), &topology, 13);
    assert_eq!(get(&cpuid, 0x8000_0008, 0).ecx, 0x3007);
    let ids = get(&cpuid, 0x8000_001e, 0);
    assert_eq!((ids.eax, ids.ebx, ids.ecx), (13, 0x102, 1));
    assert_eq!(get(&cpuid, 0x8000_001d, 0).eax, 0x4121);
    assert_eq!(get(&cpuid, 0x8000_001d, 3).eax, 0x1c163);
    assert_ne!(get(&cpuid, 0x8000_0001, 0).ecx & 2, 0, "CmpLegacy");
    let single = for_vcpu(&amd(), &Topology::flat(1), 0);
    assert_eq!(get(&single, 0x8000_0001, 0).ecx & 2, 0);
    assert_eq!(get(&single, 0x8000_0008, 0).ecx, 0);
    assert!(single.get(0x1f, 0).is_none(), "above the maximum leaf");
    // Intel's ECX of 0x8000_0008 is reserved.
    assert_eq!(
        get(&for_vcpu(&intel(), &topology, 0), 0x8000_0008, 0).ecx,
        0
    );
}

#[test]
fn normalising_twice_changes_nothing_and_an_empty_cpuid_is_harmless() {
    let topology = Topology::new(2, 2, 2).expect("valid");
    for base in [intel(), amd()] {
        let once = for_vcpu(&base, &topology, 5);
        assert_eq!(for_vcpu(&once, &topology, 5), once);
        assert!(once.entries.is_sorted_by_key(|e| (e.leaf, e.subleaf)));
    }
    let empty = Cpuid::default();
    assert_eq!(for_vcpu(&empty, &topology, 0), empty);
    assert_eq!(policy(&empty), empty);
}

#[test]
fn the_policy_hides_what_cannot_move() {
    let guest = policy(&intel());
    let one = get(&guest, 1, 0);
    for hidden in [2, 3, 5, 6, 15, 27] {
        assert_eq!(one.ecx & 1 << hidden, 0, "leaf 1 ecx bit {hidden}");
    }
    for shown in [0, 12, 21, 24, 26, 28, 31] {
        assert_ne!(one.ecx & 1 << shown, 0, "leaf 1 ecx bit {shown}");
    }
    let seven = get(&guest, 7, 0);
    assert_eq!(seven.ebx, !(1 << 2 | 1 << 12 | 1 << 15 | 1 << 25));
    assert_eq!(get(&guest, 7, 1).eax, !(1 << 8));
    assert_eq!(get(&guest, 6, 0), entry(6, None, [4, 0, 0, 0]));
    for leaf in [5, 0xa, 0x14] {
        let zero = get(&guest, leaf, 0);
        assert_eq!(
            [zero.eax, zero.ebx, zero.ecx, zero.edx],
            [0; 4],
            "leaf {leaf:#x}"
        );
    }
    let kvm = get(&guest, 0x4000_0001, 0);
    assert_eq!((kvm.eax, kvm.edx), (0x0100_3aeb, 0));
    assert_eq!(get(&guest, 0x8000_0007, 0).edx, 0x100);
    assert_eq!(get(&policy(&amd()), 0x8000_0001, 0).ecx & 4, 0, "SVM");
    assert_eq!(get(&policy(&amd()), 0x8000_000a, 0).edx, 0);
    assert_eq!(policy(&guest), guest, "applied twice");
}

#[test]
fn kvm_gets_the_timer_it_always_has() {
    let mut host = intel();
    host.get_mut(1, 0).expect("listed").ecx = 0;
    assert_eq!(get(&policy(&host), 1, 0).ecx, 1 << 31 | 1 << 24 | 1 << 21);
    host.replace(0x4000_0000, []);
    assert_eq!(
        get(&policy(&host), 1, 0).ecx,
        1 << 31,
        "nothing is promised for another hypervisor"
    );
}

#[test]
fn a_guest_fits_its_own_host_whatever_its_topology() {
    for host in [policy(&intel()), policy(&amd())] {
        assert_eq!(missing_features(&host, &host), []);
        for vcpus in [1, 5] {
            let guest = for_vcpu(&host, &Topology::flat(vcpus), vcpus - 1);
            assert_eq!(missing_features(&guest, &host), []);
        }
    }
}

#[test]
fn every_lack_is_named() {
    type Change = fn(&mut CpuidEntry);
    let cases: &[(u32, u32, Change, Register, &str)] = &[
        (
            1,
            0,
            |e| e.ecx &= !(1 << 28 | 1 << 12),
            Register::Ecx,
            "CPU feature fma, avx (leaf 0x1, subleaf 0, ecx bits 0x10001000)",
        ),
        (
            1,
            0,
            |e| e.edx &= !(1 << 10),
            Register::Edx,
            "CPU feature bit 10 (leaf 0x1, subleaf 0, edx bits 0x00000400)",
        ),
        (
            7,
            0,
            |e| e.ebx &= !(1 << 16),
            Register::Ebx,
            "CPU feature avx512f (leaf 0x7, subleaf 0, ebx bits 0x00010000)",
        ),
        (
            7,
            1,
            |e| e.eax &= !(1 << 4),
            Register::Eax,
            "CPU feature avx_vnni (leaf 0x7, subleaf 1, eax bits 0x00000010)",
        ),
        (
            0xd,
            0,
            |e| e.eax &= !0xe0,
            Register::Eax,
            "CPU feature AVX-512 opmask state, AVX-512 ZMM_Hi256 state, AVX-512 Hi16_ZMM state (leaf 0xd, subleaf 0, eax bits 0x000000e0)",
        ),
        (
            0xd,
            1,
            |e| e.eax &= !8,
            Register::Eax,
            "CPU feature xsaves (leaf 0xd, subleaf 1, eax bits 0x00000008)",
        ),
        (
            0xd,
            9,
            |e| e.ebx = 0x980,
            Register::Ebx,
            "offset of an XSAVE component (leaf 0xd, subleaf 9, ebx bits 0x00000300)",
        ),
        (
            0x4000_0001,
            0,
            |e| e.eax &= !(1 << 3),
            Register::Eax,
            "CPU feature kvmclock2 (leaf 0x40000001, subleaf 0, eax bits 0x00000008)",
        ),
        (
            0x8000_0001,
            0,
            |e| e.edx &= !(1 << 26),
            Register::Edx,
            "CPU feature pdpe1gb (leaf 0x80000001, subleaf 0, edx bits 0x04000000)",
        ),
        (
            0x8000_0007,
            0,
            |e| e.edx = 0,
            Register::Edx,
            "CPU feature constant_tsc (leaf 0x80000007, subleaf 0, edx bits 0x00000100)",
        ),
        (
            0x8000_0008,
            0,
            |e| e.eax = 0x392e,
            Register::Eax,
            "width of addresses (leaf 0x80000008, subleaf 0, eax bits 0x0000001e)",
        ),
    ];
    let guest = policy(&intel());
    for (leaf, subleaf, change, register, message) in cases {
        let mut host = guest.clone();
        change(host.get_mut(*leaf, *subleaf).expect("listed"));
        let missing = missing_features(&guest, &host);
        assert_eq!(missing.len(), 1, "{missing:?}");
        assert_eq!(
            (missing[0].leaf, missing[0].subleaf, missing[0].register),
            (*leaf, *subleaf, *register)
        );
        assert_eq!(missing[0].to_string(), *message);
        assert_eq!(
            missing_features(&host, &guest).len(),
            usize::from(*leaf == 0xd && *subleaf == 9)
        );
    }
}

#[test]
fn a_missing_leaf_lacks_everything_in_it() {
    let guest = policy(&intel());
    let mut host = guest.clone();
    host.replace(0x4000_0000, []);
    host.replace(0x4000_0001, []);
    let missing = missing_features(&guest, &host);
    assert_eq!(missing.len(), 4);
    assert!(
        missing[0]
            .to_string()
            .starts_with("hypervisor interface (leaf 0x40000000")
    );
    assert_eq!(missing[3].bits, 0x0100_3aeb);
}

#[test]
fn another_vendor_is_refused() {
    let missing = missing_features(&policy(&amd()), &policy(&intel()));
    assert!(
        missing[0].to_string().starts_with("CPU vendor (leaf 0x0"),
        "{}",
        missing[0]
    );
}

#[test]
fn state_that_describes_the_running_vcpu_is_no_feature() {
    let guest = {
        let mut guest = policy(&intel());
        guest.get_mut(1, 0).expect("listed").ecx |= 1 << 27;
        guest.get_mut(7, 0).expect("listed").ecx |= 1 << 4;
        guest
    };
    assert_eq!(missing_features(&guest, &policy(&intel())), []);
}
