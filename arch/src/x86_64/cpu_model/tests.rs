use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::x86_64::cpuid::features::{self, Feature, xstate};
use crate::x86_64::cpuid::{Cpuid, CpuidEntry, Interface, missing_features, of_interface};
use crate::x86_64::state::Msr;

/// A processor with every named feature that guests can have, and room for all its states.
fn everything() -> Cpuid {
    let mut leaves: BTreeSet<(u32, Option<u32>)> = features::all()
        .filter(|feature| feature.at.leaf < 0x4000_0000 || feature.at.leaf >= 0x8000_0000)
        .map(|feature| {
            let split = matches!(feature.at.leaf, 7 | 0xd | 0x14 | 0x1d | 0x1e | 0x24);
            (feature.at.leaf, split.then_some(feature.at.subleaf))
        })
        .collect();
    leaves.extend([
        (0, None),
        (1, None),
        (0x8000_0000, None),
        (0x8000_0008, None),
    ]);
    leaves.extend((0x8000_0002..=0x8000_0004).map(|leaf| (leaf, None)));
    leaves.extend([(0xd, Some(0)), (0xd, Some(1))]);
    let mut cpuid = Cpuid {
        entries: leaves
            .into_iter()
            .map(|(leaf, subleaf)| CpuidEntry {
                leaf,
                subleaf,
                ..CpuidEntry::default()
            })
            .collect(),
    };
    // Components one after another, each of 64 bytes.
    let mut states = 3;
    for component in xstate::all().filter(|component| component.number < 32) {
        if component.selector == xstate::Selector::Xss {
            continue;
        }
        states |= 1 << component.number;
        if component.number >= 2 {
            cpuid.entries.push(CpuidEntry {
                leaf: 0xd,
                subleaf: Some(component.number),
                eax: 64,
                ebx: 576 + 64 * (component.number - 2),
                ..CpuidEntry::default()
            });
        }
    }
    cpuid
        .entries
        .sort_unstable_by_key(|entry| (entry.leaf, entry.subleaf));
    for feature in features::all() {
        features::set(&mut cpuid, feature, true);
    }
    let leaf = cpuid.get_mut(0xd, 0).expect("leaf 0xd");
    (leaf.eax, leaf.ecx) = (states, 576 + 64 * 30);
    cpuid.get_mut(0, 0).expect("leaf 0").eax = 0x24;
    cpuid.set_vendor_id("GenuineIntel");
    cpuid.get_mut(1, 0).expect("leaf 1").eax = 0x806f8;
    cpuid.get_mut(0x8000_0008, 0).expect("widths").eax = 0x39_34;
    cpuid
}

/// The same without some features and what needs them.
fn without(names: &[&str]) -> Cpuid {
    let mut cpuid = everything();
    for name in names {
        let feature = features::by_name(name).expect(name);
        features::set(&mut cpuid, feature, false);
        for dependent in features::dependents(feature) {
            features::set(&mut cpuid, dependent, false);
        }
    }
    cpuid
}

fn spec(base: &str, features: &[(&str, bool)]) -> ModelSpec {
    ModelSpec {
        name: "mine".into(),
        version: 1,
        base: base.into(),
        features: features
            .iter()
            .map(|(name, on)| ((*name).to_owned(), *on))
            .collect(),
        ..ModelSpec::default()
    }
}

fn dump(cpuid: Cpuid) -> CpuDump {
    CpuDump {
        format: DumpFormat::Dump,
        version: DumpVersion,
        name: "made up".into(),
        source: None,
        kernel: None,
        microcode: None,
        hypervisor: None,
        cpuid,
        msrs: Vec::new(),
        tsc_khz: None,
        tsc_scaling: false,
    }
}

/// What a model decides.
fn names(cpuid: &Cpuid) -> BTreeSet<&'static str> {
    let mut names = feature_names(cpuid);
    names.retain(|name| !apply::SURROUNDINGS.contains(name));
    names
}

#[test]
fn every_builtin_loads_says_nothing_contradictory_and_names_real_features() {
    let mut seen = BTreeSet::new();
    for model in builtin::MODELS {
        for name in model.features {
            assert!(features::by_name(name).is_some(), "{}: {name}", model.name);
        }
        assert!(
            seen.insert((model.name, model.version)),
            "{} twice",
            model.name
        );
    }
    for model in CpuModel::builtins() {
        for name in &model.on {
            let feature = features::by_name(name).expect(name);
            for need in features::needs_closure(feature) {
                assert!(
                    model.on.contains(need.name),
                    "{}: {name} needs {}",
                    model.name,
                    need.name
                );
            }
        }
        let versioned = CpuModel::builtin(&format!("{}-v{}", model.name, model.version));
        assert_eq!(versioned, Ok(model.clone()), "{}", model.name);
        assert_eq!(CpuModel::builtin(&model.name.to_uppercase()), Ok(model));
    }
    assert!(matches!(
        CpuModel::builtin("EPYC-v99"),
        Err(ModelError::UnknownModel { .. })
    ));
}

#[test]
fn a_closed_model_shows_the_same_on_unlike_hosts() {
    let model = CpuModel::builtin("x86-64-v3").expect("a model");
    let rich = model.apply(&everything()).expect("a rich host");
    let poor = model
        .apply(&without(&["avx512f", "amx_tile", "sha_ni", "rdrand"]))
        .expect("a poor host");
    assert_eq!(names(&rich), names(&poor));
    assert!(names(&rich).contains("avx2") && !names(&rich).contains("avx512f"));
    assert!(missing_features(&rich, &poor).is_empty() && missing_features(&poor, &rich).is_empty());
    let states = rich.get(0xd, 0).expect("leaf 0xd");
    assert_eq!((states.eax, states.ecx), (7, 576 + 64));
}

#[test]
fn what_a_host_cannot_give_is_named_with_its_bit() {
    let model = CpuModel::builtin("x86-64-v4").expect("a model");
    let reasons = model
        .apply(&without(&["avx512f", "movbe"]))
        .expect_err("a poor host");
    let texts: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    for name in [
        "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "movbe",
    ] {
        assert!(
            texts
                .iter()
                .any(|text| text.starts_with(&format!("{name} (leaf "))),
            "{name}: {texts:?}"
        );
    }
    assert_eq!(texts.len(), 6, "{texts:?}");
    let asked = CpuModel::from_spec(&spec("x86-64-v2", &[("vmx", true)])).expect("a model");
    let texts = asked
        .apply(&everything())
        .expect_err("vmx")
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>();
    assert!(
        texts
            .iter()
            .any(|t| t.contains("vmx") && t.contains("cannot be moved")),
        "{texts:?}"
    );
}

#[test]
fn features_that_go_take_along_what_needs_them_and_their_state() {
    let model = CpuModel::host()
        .with_features(&BTreeMap::from([("avx".to_owned(), false)]))
        .expect("a model");
    let shown = model.apply(&everything()).expect("a host");
    for gone in [
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512_vnni",
        "vaes",
    ] {
        assert!(!names(&shown).contains(gone), "{gone}");
    }
    assert!(names(&shown).contains("xsave") && names(&shown).contains("sse4_2"));
    assert_eq!(shown.get(0xd, 0).expect("leaf 0xd").eax & 0xe4, 0);
    assert!(shown.get(0xd, 2).is_none());
    let none = CpuModel::host()
        .with_features(&BTreeMap::from([("xsave".to_owned(), false)]))
        .expect("a model")
        .apply(&everything())
        .expect("a host");
    assert!(none.get(0xd, 0).is_none() && !names(&none).contains("pku"));
}

#[test]
fn contradictions_are_refused_by_name() {
    let refused = |spec: &ModelSpec| {
        let errors = CpuModel::from_spec(spec).expect_err("a contradiction");
        errors
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n")
    };
    let text = refused(&spec("x86-64-v2", &[("avx", true)]));
    assert!(
        text.contains("avx (leaf 0x1") && text.contains("needs xsave"),
        "{text}"
    );
    let text = refused(&spec("host", &[("avx2", true), ("avx", false)]));
    assert!(
        text.contains("avx2") && text.contains("switched off"),
        "{text}"
    );
    let text = refused(&spec("x86-64-v3", &[("avx51f", true)]));
    assert!(
        text.contains("`avx51f`") && text.contains("did you mean `avx512f`"),
        "{text}"
    );
    let text = refused(&spec("x86-64-v3", &[("pni", true), ("sse3", false)]));
    assert!(text.contains("on and off"), "{text}");
    let text = refused(&spec("portable", &[("pku", true)]));
    assert!(text.contains("pku") && text.contains("hyperv"), "{text}");
    assert!(refused(&spec("x86-64-v9", &[])).contains("x86-64-v4"));
    let bad = ModelSpec {
        name: "two words".into(),
        vendor: Some("Intel".into()),
        brand: Some("x".repeat(49)),
        signature: Some(Signature {
            family: 6,
            model: 300,
            stepping: 0,
        }),
        physical_bits: Some(64),
        linear_bits: Some(50),
        msrs: vec![MsrPattern {
            index: Hex(0x10),
            bits: BitPattern::new(0, 1),
        }],
        cpuid: vec![CpuidPattern {
            leaf: Hex(0xb),
            eax: BitPattern::new(0, 1),
            ..CpuidPattern::default()
        }],
        ..spec("host", &[])
    };
    let text = refused(&bad);
    for field in [
        "name:",
        "vendor:",
        "brand:",
        "signature:",
        "physical_bits:",
        "linear_bits:",
        "MSR 0x10",
        "leaf 0xb",
    ] {
        assert!(text.contains(field), "{field}: {text}");
    }
}

#[test]
fn patterns_are_bits_with_and_without_a_name() {
    let pattern = CpuidPattern {
        leaf: Hex(7),
        // avx2 (5) off by number, erms (9) on.
        ebx: BitPattern::new(1 << 5, 1 << 9),
        ..CpuidPattern::default()
    };
    let with = |pattern: CpuidPattern, base: &str| {
        CpuModel::from_spec(&ModelSpec {
            cpuid: vec![pattern],
            ..spec(base, &[])
        })
    };
    let model = with(pattern, "host").expect("a model");
    let shown = model.apply(&everything()).expect("a host");
    assert!(!names(&shown).contains("avx2") && !names(&shown).contains("avx512f"));
    assert!(names(&shown).contains("erms"));
    let missing = model.apply(&without(&["erms"])).expect_err("no erms");
    assert!(
        missing[0]
            .to_string()
            .contains("erms (leaf 0x7, subleaf 0, ebx bit 9)"),
        "{missing:?}"
    );
    // Cache descriptions are no abilities: any value goes, where the leaf exists.
    let cache = CpuidPattern {
        leaf: Hex(2),
        eax: BitPattern::new(0xff, 0x100),
        ..CpuidPattern::default()
    };
    let model = with(cache, "host").expect("a model");
    let missing = model.apply(&everything()).expect_err("no leaf 2");
    assert!(
        missing[0]
            .to_string()
            .contains("leaf 0x2, subleaf 0 does not exist"),
        "{missing:?}"
    );
    let mut host = everything();
    host.entries.insert(
        1,
        CpuidEntry {
            leaf: 2,
            eax: 0x3f,
            ..CpuidEntry::default()
        },
    );
    host.entries.sort_unstable_by_key(|e| (e.leaf, e.subleaf));
    assert_eq!(
        model
            .apply(&host)
            .expect("leaf 2")
            .get(2, 0)
            .expect("leaf 2")
            .eax,
        0x100
    );
}

#[test]
fn who_it_claims_to_be() {
    let model = CpuModel::from_spec(&ModelSpec {
        signature: Some(Signature {
            family: 25,
            model: 17,
            stepping: 1,
        }),
        vendor: Some("AuthenticAMD".into()),
        cross_vendor: Some(true),
        brand: Some("A brand".into()),
        physical_bits: Some(40),
        ..spec("x86-64-v3", &[])
    })
    .expect("a model");
    let shown = model.apply(&everything()).expect("a host");
    assert_eq!(shown.get(1, 0).expect("leaf 1").eax, 0x00a1_0f11);
    assert_eq!(Signature::of(&shown), model.signature);
    assert_eq!(shown.vendor_id(), "AuthenticAMD");
    assert_eq!(
        &shown.get(0x8000_0002, 0).expect("brand").eax.to_le_bytes(),
        b"A br"
    );
    assert_eq!(shown.get(0x8000_0008, 0).expect("widths").eax, 0x39_28);
    let strict = CpuModel {
        cross_vendor: false,
        ..model
    };
    let missing = strict.apply(&everything()).expect_err("another vendor");
    assert!(
        missing[0].to_string().contains("GenuineIntel"),
        "{missing:?}"
    );
}

#[test]
fn feature_registers_are_masked_and_promises_kept() {
    let register = |value| {
        vec![Msr {
            index: ARCH_CAPABILITIES,
            value,
        }]
    };
    let model = CpuModel::builtin("Cascadelake-Server").expect("a model");
    let guest = model
        .apply_msrs(&everything(), &register(0x2b | 1 << 8))
        .expect("a newer host");
    assert_eq!(guest, register(0x2b));
    let missing = model
        .apply_msrs(&everything(), &register(0x0b))
        .expect_err("no MDS_NO");
    assert!(
        missing[0].to_string().contains("IA32_ARCH_CAPABILITIES"),
        "{missing:?}"
    );
    assert!(model.apply_msrs(&everything(), &[]).is_err());
    assert_eq!(
        CpuModel::host().apply_msrs(&everything(), &register(5)),
        Ok(register(5))
    );
    assert_eq!(
        unkept_promises(register(0b101)[0], 0),
        1,
        "RSBA warns, it does not promise"
    );
}

#[test]
fn hosts_compare_by_what_guests_see() {
    let (rich, poor) = (dump(everything()), dump(without(&["avx512f", "sha_ni"])));
    let same = compare(&rich, &rich);
    assert_eq!(same.relation, Relation::Identical);
    assert!(same.only_a.is_empty() && same.only_b.is_empty() && same.advice.is_empty());
    let down = compare(&rich, &poor);
    assert_eq!(down.relation, Relation::Superset);
    assert!(down.only_b.is_empty());
    let text: Vec<String> = down.only_a.iter().map(ToString::to_string).collect();
    assert!(
        text.iter().any(|t| t.contains("avx512f")) && text.iter().any(|t| t.contains("sha_ni")),
        "{text:?}"
    );
    assert_eq!(compare(&poor, &rich).relation, Relation::Subset);
    let other = compare(&dump(without(&["movbe"])), &poor);
    assert_eq!(other.relation, Relation::Incompatible);
    assert!(other.advice[0].contains("baseline"));
}

#[test]
fn a_baseline_of_two_vendors_is_asked_for() {
    let mut amd = everything();
    amd.set_vendor_id("AuthenticAMD");
    let hosts = [dump(everything()), dump(amd)];
    assert!(matches!(
        baseline("b", &hosts, false),
        Err(BaselineError::Vendors(_))
    ));
    let spec = baseline("b", &hosts, true).expect("asked for");
    let model = CpuModel::from_spec(&spec).expect("loads");
    for host in &hosts {
        assert_eq!(
            model.apply(&host.cpuid).expect("runs").vendor_id(),
            "GenuineIntel"
        );
    }
    assert_eq!(baseline("b", &[], true), Err(BaselineError::NoHosts));
}

#[test]
fn a_baseline_leaves_out_what_is_laid_out_differently() {
    let mut elsewhere = everything();
    elsewhere.get_mut(0xd, 9).expect("PKRU").ebx += 64;
    let spec = baseline("b", &[dump(everything()), dump(elsewhere)], false).expect("a baseline");
    assert!(!spec.features.contains_key("pku"));
    assert_eq!(spec.features.get("avx512f"), Some(&true));
}

/// Features that a guest can have on `everything`.
fn possible() -> Vec<&'static Feature> {
    features::of(&of_interface(&everything(), Interface::Host))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_baseline_is_a_subset_of_each_host_closed_and_maximal(
        lacks in proptest::collection::vec(proptest::collection::vec(any::<prop::sample::Index>(), 0..12), 1..5)
    ) {
        let possible = possible();
        let hosts: Vec<CpuDump> = lacks
            .iter()
            .map(|lacking| {
                let mut cpuid = everything();
                // Hosts are not always consistent themselves: what needs a feature that lacks may still be there.
                for index in lacking {
                    features::set(&mut cpuid, possible[index.index(possible.len())], false);
                }
                dump(cpuid)
            })
            .collect();
        let spec = baseline("random", &hosts, false).expect("one vendor");
        let model = CpuModel::from_spec(&spec).expect("closed, so it loads");
        let shown: Vec<Cpuid> = hosts.iter().map(|host| of_interface(&host.cpuid, Interface::Host)).collect();
        let mut given = Vec::new();
        for host in &hosts {
            match model.apply(&host.cpuid) {
                Ok(cpuid) => given.push(cpuid),
                Err(missing) => prop_assert!(false, "not a subset: {missing:?}"),
            }
        }
        for guest in &given {
            for host in &shown {
                prop_assert_eq!(missing_features(guest, host), vec![]);
            }
            for other in &given {
                prop_assert_eq!(names(guest), names(other));
            }
        }
        for feature in &possible {
            if model.on.contains(feature.name) || apply::SURROUNDINGS.contains(&feature.name) {
                continue;
            }
            let all_have = shown.iter().all(|cpuid| features::has(cpuid, feature));
            let supported = features::needs_closure(feature)
                .iter()
                .all(|need| shown.iter().all(|cpuid| features::has(cpuid, need)));
            prop_assert!(!(all_have && supported), "{} could be added", feature.name);
        }
    }

    #[test]
    fn no_file_makes_a_model_panic(
        names in proptest::collection::btree_map("[a-z0-9_]{0,12}", any::<bool>(), 0..6),
        leaf in any::<u32>(), subleaf in any::<u32>(), zeros in any::<u32>(), ones in any::<u32>(),
        family in any::<u32>(), bits in any::<u32>(),
    ) {
        let pattern = BitPattern::new(zeros.into(), ones.into());
        let spec = ModelSpec {
            features: names,
            cpuid: vec![CpuidPattern { leaf: Hex(leaf), subleaf, eax: pattern, ebx: pattern, ecx: pattern, edx: pattern }],
            signature: Some(Signature { family, model: bits, stepping: bits }),
            physical_bits: Some(bits),
            ..spec("x86-64-v2", &[])
        };
        if let Ok(model) = CpuModel::from_spec(&spec) {
            let _ = model.apply(&everything());
        }
    }
}
