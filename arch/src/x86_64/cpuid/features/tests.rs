//! The promises of the table, and the look-ups on it.

use std::collections::HashMap;

use super::*;
use crate::x86_64::cpuid::{CpuidEntry, Interface, Register, of_interface, policy};

fn named(name: &str) -> &'static Feature {
    all()
        .find(|feature| feature.name == name)
        .unwrap_or_else(|| panic!("no feature {name}"))
}

fn names(features: &[&'static Feature]) -> Vec<&'static str> {
    let mut names: Vec<&str> = features.iter().map(|feature| feature.name).collect();
    names.sort_unstable();
    names
}

fn cpuid(leaves: &[(u32, Option<u32>, [u32; 4])]) -> Cpuid {
    let entry = |(leaf, subleaf, [eax, ebx, ecx, edx]): &(u32, Option<u32>, [u32; 4])| CpuidEntry {
        leaf: *leaf,
        subleaf: *subleaf,
        eax: *eax,
        ebx: *ebx,
        ecx: *ecx,
        edx: *edx,
    };
    Cpuid {
        entries: leaves.iter().map(entry).collect(),
    }
}

const INTEL: (u32, Option<u32>, [u32; 4]) =
    (0, None, [0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
const AMD: (u32, Option<u32>, [u32; 4]) = (0, None, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
const KVM: [u32; 4] = [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d];

#[test]
fn a_spelling_is_one_feature() {
    let mut seen: HashMap<Vec<u8>, &str> = HashMap::new();
    for feature in all() {
        for spelling in feature.spellings() {
            let taken = seen.insert(key(spelling).collect(), feature.name);
            assert_eq!(taken, None, "{spelling} of {feature}");
            assert_eq!(by_name(spelling), Some(feature));
            assert_eq!(by_name(&spelling.to_uppercase()), Some(feature));
        }
        let proper = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(feature.name.chars().all(proper), "{feature}");
        assert!(
            feature
                .spellings()
                .all(|name| (2..LONGEST_NAME).contains(&name.len())),
            "{feature}"
        );
    }
}

#[test]
fn a_bit_is_one_feature() {
    let mut seen = HashMap::new();
    for feature in all() {
        let Place {
            leaf,
            subleaf,
            register,
            bit,
        } = feature.at;
        assert!(bit < 32, "{feature}");
        assert_eq!(seen.insert(feature.at, feature.name), None, "{feature}");
        assert_eq!(at(leaf, subleaf, register, bit), Some(feature));
        assert_eq!(name_of(feature.at), Some(feature.name));
        if (leaf, register) == (0x8000_0001, Register::Edx) {
            assert_eq!(AMD_DUPLICATES & 1 << bit, 0, "{feature} is a copy");
        }
    }
    for bit in (0..32).filter(|bit| AMD_DUPLICATES & 1 << bit != 0) {
        let original = at(1, 0, Register::Edx, bit).map(|feature| feature.name);
        assert!(original.is_some(), "bit {bit}");
        let copy = Place {
            leaf: 0x8000_0001,
            subleaf: 0,
            register: Register::Edx,
            bit,
        };
        assert_eq!(name_of(copy), original);
        assert_eq!(at(0x8000_0001, 0, Register::Edx, bit), None);
    }
}

#[test]
fn needs_exist_and_have_no_cycle() {
    for feature in all() {
        for need in feature.needs {
            assert!(
                all().any(|other| other.name == *need),
                "{feature} needs {need}"
            );
        }
        assert_eq!(direct_needs(feature).count(), feature.needs.len());
        let closure = needs_closure(feature);
        assert!(!closure.contains(&feature), "{feature} needs itself");
        for need in closure {
            assert!(dependents(need).contains(&feature), "{feature} of {need}");
        }
    }
}

#[test]
fn closures_are_those_of_the_manuals() {
    assert_eq!(
        names(&needs_closure(named("avx512_vnni"))),
        [
            "avx", "avx2", "avx512f", "avx512vl", "f16c", "fma", "fpu", "fxsr", "pni", "sse",
            "sse2", "sse4_1", "sse4_2", "ssse3", "xsave",
        ]
    );
    assert_eq!(
        names(&needs_closure(named("xfd"))),
        ["fpu", "fxsr", "xgetbv1", "xsave", "xsaves"]
    );
    assert_eq!(
        names(&dependents(named("amx_tile"))),
        [
            "amx_avx512",
            "amx_bf16",
            "amx_bf16_alias",
            "amx_complex",
            "amx_complex_alias",
            "amx_fp16",
            "amx_fp16_alias",
            "amx_fp8",
            "amx_int8",
            "amx_int8_alias",
            "amx_movrs",
            "amx_tf32",
        ]
    );
    assert_eq!(needs_closure(named("bmi2")), Vec::<&Feature>::new());
    let without_xsaves = dependents(named("xsaves"));
    for gone in ["shstk", "cet_sss", "ibt", "enqcmd", "amx_bf16"] {
        assert!(without_xsaves.contains(&named(gone)), "{gone}");
    }
    for stays in ["avx", "xsavec", "pku"] {
        assert!(!without_xsaves.contains(&named(stays)), "{stays}");
    }
}

#[test]
fn other_spellings_are_understood() {
    for (spelling, name) in [
        ("SSE4.1", "sse4_1"),
        ("sse4-2", "sse4_2"),
        ("sse42", "sse4_2"),
        ("sse3", "pni"),
        ("pclmul", "pclmulqdq"),
        ("long_mode", "lm"),
        ("XD", "nx"),
        ("SHA", "sha_ni"),
        ("avx512-4vnniw", "avx512_4vnniw"),
        ("avx512vnni", "avx512_vnni"),
        ("AVX512_VBMI", "avx512vbmi"),
        ("cet-ss", "shstk"),
        ("tsx-ldtrk", "tsxldtrk"),
        ("core-capability", "core_capabilities"),
        ("invtsc", "constant_tsc"),
        ("amd-no-ssb", "amd_ssb_no"),
        ("lfence-always-serializing", "lfence_rdtsc"),
        ("auto-ibrs", "autoibrs"),
        ("apxf", "apx"),
        ("pause-filter", "pausefilter"),
        ("kvmclock-stable-bit", "kvmclock_stable"),
    ] {
        assert_eq!(
            by_name(spelling).map(|feature| feature.name),
            Some(name),
            "{spelling}"
        );
    }
    for unknown in ["", "_", "avx51f", "AVX state", "ünï"] {
        assert_eq!(by_name(unknown), None, "{unknown}");
    }
}

#[test]
fn the_nearest_name_is_offered() {
    for (typed, meant) in [
        ("avx51f", Some("avx512f")),
        ("avx512_vnn", Some("avx512_vnni")),
        ("AVX512-VPOPCNT", Some("avx512_vpopcntdq")),
        ("tsc_dedline", Some("tsc_deadline")),
        ("kvm-clock", Some("kvmclock")),
        ("xsavess", Some("xsaves")),
        ("lm", Some("lm")),
        ("nonsense", None),
        ("zz", None),
        ("", None),
    ] {
        assert_eq!(nearest(typed), meant, "{typed}");
    }
    assert_eq!(nearest(&"avx512f".repeat(10_000)), None);
    assert_eq!(distance(b"kitten", b"sitting"), 3);
    assert_eq!(distance(b"abc", b""), 3);
    assert_eq!(distance(b"", b"abc"), 3);
}

#[test]
fn a_feature_is_shown_and_hidden() {
    let avx2 = named("avx2");
    assert_eq!(avx2.at.to_string(), "leaf 0x7, subleaf 0, ebx bit 5");
    assert_eq!(avx2.to_string(), "avx2");
    let mut guest = cpuid(&[INTEL, (1, None, [0; 4]), (7, Some(0), [0; 4])]);
    assert!(!has(&guest, avx2));
    assert!(set(&mut guest, avx2, true) && has(&guest, avx2));
    assert_eq!(of(&guest), [avx2]);
    assert!(set(&mut guest, avx2, false) && !has(&guest, avx2));
    // A leaf that is not there.
    let before = guest.clone();
    assert!(!set(&mut guest, named("avx_vnni"), true));
    assert!(set(&mut guest, named("avx_vnni"), false));
    assert_eq!(guest, before);
}

#[test]
fn amd_has_two_copies_and_intel_one() {
    let mce = named("mce");
    for (vendor, copy) in [(AMD, 0x80), (INTEL, 0)] {
        let mut guest = cpuid(&[vendor, (1, None, [0; 4]), (0x8000_0001, None, [0; 4])]);
        assert!(set(&mut guest, mce, true));
        assert_eq!(guest.get(1, 0).map(|e| e.edx), Some(0x80));
        assert_eq!(guest.get(0x8000_0001, 0).map(|e| e.edx), Some(copy));
        assert!(set(&mut guest, mce, false));
        assert_eq!(guest.get(0x8000_0001, 0).map(|e| e.edx), Some(0));
        assert_eq!(of(&guest), Vec::<&Feature>::new());
        assert!(set(&mut guest, named("sep"), true));
        assert_eq!(
            guest.get(0x8000_0001, 0).map(|e| e.edx),
            Some(0),
            "bit 11 there is SYSCALL"
        );
    }
    let mut short = cpuid(&[AMD, (1, None, [0; 4])]);
    assert!(set(&mut short, mce, true));
}

#[test]
fn hypervisors_are_not_mistaken_for_one_another() {
    let clock = named("kvmclock");
    let kvm = cpuid(&[(0x4000_0000, None, KVM), (0x4000_0001, None, [1, 0, 0, 0])]);
    assert_eq!(of(&kvm), [clock]);
    let mut both = of_interface(&kvm, Interface::Hyperv);
    assert!(!has(&both, clock), "\"Hv#1\" is no list of KVM's features");
    assert!(has(&both, named("hv_reference_tsc")));
    assert!(!set(&mut both, clock, true));
    both.entries.push(CpuidEntry {
        leaf: 0x4000_0100,
        ..cpuid(&[(0, None, KVM)]).entries[0]
    });
    both.entries.push(CpuidEntry {
        leaf: 0x4000_0101,
        ..CpuidEntry::default()
    });
    assert!(set(&mut both, clock, true) && has(&both, clock));
    assert_eq!(both.get(0x4000_0101, 0).map(|e| e.eax), Some(1));
    let other = cpuid(&[(0x4000_0003, None, [u32::MAX; 4])]);
    assert_eq!(of(&other), Vec::<&Feature>::new());
}

#[test]
fn contradictions_name_both_sides() {
    let mut guest = cpuid(&[INTEL, (1, None, [0; 4]), (7, Some(0), [0; 4])]);
    for feature in needs_closure(named("avx2")) {
        assert!(set(&mut guest, feature, true), "{feature}");
    }
    assert!(set(&mut guest, named("avx2"), true));
    assert_eq!(contradictions(&guest), []);
    assert!(set(&mut guest, named("xsave"), false));
    assert!(set(&mut guest, named("fma"), true));
    assert_eq!(contradictions(&guest), [(named("avx"), named("xsave"))]);
    assert!(set(&mut guest, named("avx512f"), true));
    assert_eq!(
        contradictions(&guest)[1..],
        [(named("avx512f"), named("f16c"))]
    );
}

#[test]
fn what_the_policy_hides_bit_by_bit_has_a_name() {
    let all_on = cpuid(&[
        INTEL,
        (1, None, [u32::MAX; 4]),
        (6, None, [4, 0, 0, 0]),
        (7, Some(0), [u32::MAX; 4]),
        (7, Some(1), [u32::MAX; 4]),
        (0x8000_0001, None, [u32::MAX; 4]),
    ]);
    for (before, after) in all_on.entries.iter().zip(policy(&all_on).entries) {
        for register in Register::ALL {
            let hidden = register.of(before) & !register.of(&after);
            for number in (0..32).filter(|number| hidden & 1 << number != 0) {
                let subleaf = before.subleaf.unwrap_or(0);
                assert!(
                    at(before.leaf, subleaf, register, number).is_some(),
                    "leaf {:#x}, subleaf {subleaf}, {register} bit {number}",
                    before.leaf
                );
            }
        }
    }
}

#[test]
fn state_components_are_those_of_the_manual() {
    for (number, component) in [
        (2, "AVX state"),
        (9, "PKRU state"),
        (18, "AMX tile data state"),
    ] {
        assert_eq!(xstate::component(number).map(|c| c.name), Some(component));
    }
    let brought = |name| -> Vec<u32> {
        xstate::of_feature(named(name))
            .map(|component| component.number)
            .collect()
    };
    assert_eq!(brought("avx512f"), [5, 6, 7]);
    assert_eq!(brought("mpx"), [3, 4]);
    assert_eq!(brought("ibt"), [11, 12]);
    assert_eq!(brought("amx_tile"), [17, 18]);
    assert_eq!(brought("avx512_vnni"), Vec::<u32>::new());
    for component in xstate::all() {
        assert!(component.number < 63);
        for name in component.features {
            // A feature with state of its own needs the instructions that save it, or has MSRs for it.
            let closure = needs_closure(named(name));
            let saved = closure.contains(&named("xsave"));
            let supervisor = component.selector == xstate::Selector::Xss;
            assert!(saved || supervisor || component.number < 2, "{name}");
        }
        for need in component.needs {
            assert!(xstate::component(*need).is_some_and(|c| c.selector == component.selector));
        }
    }
    let name = |subleaf, register, bit| {
        name_of(Place {
            leaf: 0xd,
            subleaf,
            register,
            bit,
        })
    };
    assert_eq!(name(0, Register::Eax, 2), Some("AVX state"));
    assert_eq!(name(0, Register::Eax, 11), None, "of IA32_XSS");
    assert_eq!(name(1, Register::Ecx, 11), Some("CET user state"));
    assert_eq!(name(0, Register::Edx, 30), Some("LWP state"));
    assert_eq!(name(1, Register::Eax, 3), Some("xsaves"));
    assert_eq!(name(2, Register::Eax, 0), None, "a size");
}

#[test]
fn a_cpuid_needs_the_state_of_its_features() {
    let mut guest = cpuid(&[INTEL, (1, None, [0; 4]), (7, Some(0), [0; 4])]);
    assert_eq!(xstate::of(&guest), 0);
    for name in ["fpu", "sse", "avx", "pku", "shstk"] {
        assert!(set(&mut guest, named(name), true));
    }
    assert_eq!(xstate::of(&guest), 0b1_1010_0000_0111);
}
