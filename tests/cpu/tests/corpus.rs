//! CPU models on processors as they are.

use std::collections::BTreeSet;

use arch::x86_64::cpu_model::{
    Comparison, CpuContract, CpuDump, CpuModel, HostOffer, Lack, Relation, Unavailable, baseline,
    compare, feature_names,
};
use arch::x86_64::cpuid::{Interface, Vendor, missing_features, of_interface};
use cpu::{dump, names};

use Relation::{Identical, Incompatible, Subset, Superset};

/// Names of the features that one of two hosts lacks.
fn lacking(lacks: &[Lack]) -> BTreeSet<String> {
    lacks
        .iter()
        .flat_map(|lack| match lack {
            Lack::Cpuid(missing) => missing.names(),
            Lack::Msr { names, .. } => vec![names.clone()],
        })
        .collect()
}

fn compared(a: &str, b: &str) -> Comparison {
    compare(&dump(a).expect(a), &dump(b).expect(b))
}

type Pair = (
    &'static str,
    &'static str,
    Relation,
    &'static [&'static str],
    &'static [&'static str],
);

/// A, B, what A is to B, something that only A has, something that only B has.
const PAIRS: [Pair; 16] = [
    // The same part; a microcode update adds IBPB.
    (
        "amd-epyc-naples",
        "amd-epyc-naples-ibpb",
        Subset,
        &[],
        &["ibpb"],
    ),
    (
        "amd-epyc-naples-ibpb",
        "amd-epyc-rome",
        Subset,
        &[],
        &["clwb", "umip", "rdpid", "wbnoinvd", "amd_stibp"],
    ),
    // Milan has no MCOMMIT.
    (
        "amd-epyc-rome",
        "amd-epyc-milan",
        Incompatible,
        &["x2apic"],
        &["pcid", "invpcid", "pku", "vaes", "fsrm", "erms"],
    ),
    (
        "amd-epyc-milan",
        "amd-epyc-genoa",
        Incompatible,
        &["mcommit"],
        &[
            "avx512f",
            "avx512_bf16",
            "la57",
            "autoibrs",
            "width of addresses",
        ],
    ),
    (
        "amd-epyc-genoa",
        "amd-epyc-turin",
        Subset,
        &[],
        &["avx_vnni", "movdir64b", "avx512_vp2intersect", "tsc_adjust"],
    ),
    (
        "amd-epyc-genoa",
        "amd-ryzen-raphael",
        Superset,
        &["pcid", "la57"],
        &[],
    ),
    // Bulldozer's own extensions ended with Zen.
    (
        "amd-fx-bulldozer",
        "amd-epyc-naples",
        Incompatible,
        &["xop", "fma4"],
        &["avx2", "sha_ni"],
    ),
    (
        "intel-xeon-haswell-ep-notsx",
        "intel-xeon-broadwell-ep",
        Subset,
        &[],
        &["hle", "rtm", "adx", "smap", "rdseed"],
    ),
    (
        "intel-xeon-broadwell-de",
        "intel-xeon-broadwell-ep",
        Identical,
        &[],
        &[],
    ),
    (
        "intel-xeon-broadwell-ep",
        "intel-xeon-skylake-sp",
        Subset,
        &[],
        &[
            "avx512f",
            "mpx",
            "pku",
            "clwb",
            "spec_ctrl",
            "AVX-512 opmask state",
        ],
    ),
    (
        "intel-xeon-skylake-sp",
        "intel-xeon-cascade-lake-ap",
        Incompatible,
        &["tsx_force_abort"],
        &["avx512_vnni", "arch_capabilities"],
    ),
    // What an update of the microcode took away.
    (
        "intel-xeon-cascade-lake-ap",
        "intel-xeon-cascade-lake-sp-notsx",
        Superset,
        &["hle", "rtm"],
        &[],
    ),
    (
        "intel-xeon-cascade-lake-ap",
        "intel-xeon-cooper-lake",
        Subset,
        &[],
        &["avx512_bf16"],
    ),
    // MPX ended with Ice Lake.
    (
        "intel-xeon-cooper-lake",
        "intel-xeon-sapphire-rapids",
        Incompatible,
        &["mpx", "MPX bounds state"],
        &["amx_tile", "AMX tile data state", "avx512_fp16", "la57"],
    ),
    (
        "intel-xeon-sapphire-rapids",
        "intel-xeon-granite-rapids",
        Subset,
        &[],
        &["amx_fp16", "prefetchiti", "avx10"],
    ),
    (
        "amd-epyc-genoa",
        "intel-xeon-sapphire-rapids",
        Incompatible,
        &["CPU vendor", "sse4a"],
        &["CPU vendor", "amx_tile"],
    ),
];

#[test]
fn known_pairs_compare_as_their_makers_say() {
    for (a, b, relation, only_a, only_b) in PAIRS {
        let comparison = compared(a, b);
        assert_eq!(
            comparison.relation, relation,
            "{a} and {b}: {comparison:#?}"
        );
        for (lacks, names) in [(&comparison.only_a, only_a), (&comparison.only_b, only_b)] {
            let has = lacking(lacks);
            for name in names {
                assert!(has.contains(*name), "{a} and {b}: {name} is not in {has:?}");
            }
        }
        let back = compared(b, a);
        assert_eq!(back.only_a, comparison.only_b, "{b} and {a}");
        assert_eq!(
            back.relation,
            match relation {
                Subset => Superset,
                Superset => Subset,
                same => same,
            }
        );
        assert_eq!(
            comparison.advice.is_empty(),
            relation == Identical,
            "{a} and {b}"
        );
    }
}

/// A generation's model, the processor it is named after, and what that part cannot give: KVM always has x2APIC; early microcode
/// lacks controls against speculation.
const GENERATIONS: [(&str, &str, &[&str]); 11] = [
    (
        "Broadwell-Server",
        "intel-xeon-broadwell-ep",
        &["md_clear", "spec_ctrl", "ssbd"],
    ),
    ("Skylake-Server", "intel-xeon-skylake-sp", &[]),
    ("Cascadelake-Server", "intel-xeon-cascade-lake-ap", &[]),
    ("Icelake-Server", "intel-xeon-ice-lake-sp", &[]),
    ("SapphireRapids-Server", "intel-xeon-sapphire-rapids", &[]),
    ("SapphireRapids-Server", "intel-xeon-granite-rapids", &[]),
    ("EPYC", "amd-epyc-naples-ibpb", &["x2apic"]),
    ("EPYC-Rome", "amd-epyc-rome", &[]),
    ("EPYC-Milan", "amd-epyc-milan", &["x2apic"]),
    ("EPYC-Genoa", "amd-epyc-genoa", &[]),
    ("EPYC-Turin", "amd-epyc-turin", &[]),
];

#[test]
fn each_generation_fits_its_processor() {
    for (model, processor, without) in GENERATIONS {
        let model = CpuModel::builtin(model).expect(model);
        let host = dump(processor).expect(processor);
        let missing: Vec<&str> = match model.apply(&host.cpuid) {
            Ok(shown) => {
                assert!(
                    feature_names(&shown).is_superset(&model.on),
                    "{} on {processor}",
                    model.name
                );
                Vec::new()
            }
            Err(missing) => missing
                .iter()
                .map(|missing| match missing {
                    Unavailable::Feature { name, .. } => *name,
                    other => panic!("{} on {processor}: {other}", model.name),
                })
                .collect(),
        };
        assert_eq!(missing, without, "{} on {processor}", model.name);
    }
}

#[test]
fn a_generation_is_refused_by_the_one_before_with_what_is_new() {
    for (model, before, new) in [
        ("Skylake-Server", "intel-xeon-broadwell-ep", "avx512f"),
        ("Cascadelake-Server", "intel-xeon-skylake-sp", "avx512_vnni"),
        ("Icelake-Server", "intel-xeon-cooper-lake", "sha_ni"),
        (
            "SapphireRapids-Server",
            "intel-xeon-ice-lake-sp",
            "amx_tile",
        ),
        ("EPYC-Rome", "amd-epyc-naples", "clwb"),
        ("EPYC-Milan", "amd-epyc-rome", "pcid"),
        ("EPYC-Genoa", "amd-epyc-milan", "avx512f"),
        ("EPYC-Turin", "amd-epyc-genoa", "avx_vnni"),
    ] {
        let model = CpuModel::builtin(model).expect(model);
        let missing = model
            .apply(&dump(before).expect(before).cpuid)
            .expect_err(before);
        assert!(
            missing.iter().any(
                |missing| matches!(missing, Unavailable::Feature { name, .. } if *name == new)
            ),
            "{} on {before}: {missing:?}",
            model.name
        );
    }
}

/// Pairs and all of a vendor: the model loads, each of the hosts runs it, and its guests go from each to each.
#[test]
fn baselines_of_real_hosts_run_on_each_of_them() {
    let all = names().expect("the dumps");
    assert!(all.len() >= 12, "{all:?}");
    let hosts: Vec<_> = all.iter().map(|name| dump(name).expect(name)).collect();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for vendor in [Vendor::Intel, Vendor::Amd] {
        groups.push(
            (0..hosts.len())
                .filter(|&at| hosts[at].cpuid.vendor() == vendor)
                .filter(|&at| !all[at].starts_with("hygon"))
                .collect(),
        );
    }
    groups.push((0..hosts.len()).collect());
    for one in 0..hosts.len() {
        groups.extend((0..one).map(|other| vec![one, other]));
    }
    for group in groups {
        let members: Vec<_> = group.iter().map(|&at| hosts[at].clone()).collect();
        let title: Vec<&str> = group.iter().map(|&at| all[at].as_str()).collect();
        let spec = baseline("group", &members, true).expect("asked for several vendors");
        let model =
            CpuModel::from_spec(&spec).unwrap_or_else(|errors| panic!("{title:?}: {errors:?}"));
        for host in &members {
            let guest = model
                .apply(&host.cpuid)
                .unwrap_or_else(|missing| panic!("{title:?} on {}: {missing:?}", host.name));
            for other in &members {
                let offered = of_interface(&other.cpuid, Interface::Host);
                let missing: Vec<_> = missing_features(&guest, &offered)
                    .into_iter()
                    .filter(|missing| !missing.is_vendor())
                    .collect();
                assert_eq!(
                    missing,
                    [],
                    "{title:?}: from {} to {}",
                    host.name,
                    other.name
                );
            }
        }
        // What everybody expects of these.
        if title.iter().all(|name| name.starts_with("intel-xeon"))
            && !title.contains(&"intel-xeon-sandy-bridge-ep")
        {
            assert!(
                model.on.contains("avx2") && model.on.contains("popcnt"),
                "{title:?}"
            );
        }
    }
}

#[test]
fn a_dump_survives_being_written() {
    for name in names().expect("the dumps") {
        let read = dump(&name).expect(&name);
        let json = serde_json::to_string(&read).expect("JSON");
        assert_eq!(
            serde_json::from_str::<CpuDump>(&json).expect("its own"),
            read
        );
    }
}

/// Prints how long the work with models takes.
#[test]
#[ignore = "a measurement: cargo test --release -p cpu -- --ignored --nocapture speed"]
fn speed() {
    let host = dump("amd-epyc-genoa").expect("a dump");
    let spec = baseline(
        "both",
        &[host.clone(), dump("amd-epyc-milan").expect("a dump")],
        false,
    )
    .expect("one vendor");
    let json = serde_json::to_vec(&spec).expect("JSON");
    let guest = CpuModel::host().apply(&host.cpuid).expect("a guest");
    let contract = CpuContract {
        cpuid: guest.clone(),
        ..CpuContract::default()
    };
    let offer = HostOffer {
        cpuid: of_interface(&host.cpuid, Interface::Host),
        same_hypervisor: true,
        ..HostOffer::default()
    };
    let model = CpuModel::builtin("EPYC-Genoa").expect("a model");
    let time = |what: &str, work: &dyn Fn()| {
        let mut microseconds: Vec<u128> = (0..101)
            .map(|_| {
                let start = std::time::Instant::now();
                work();
                start.elapsed().as_micros()
            })
            .collect();
        microseconds.sort_unstable();
        println!("{what}: {} us (median of 101)", microseconds[50]);
    };
    time("load a built-in model", &|| {
        assert!(CpuModel::builtin("EPYC-Turin").is_ok());
    });
    time("load a model's file", &|| {
        let spec = serde_json::from_slice(&json).expect("a spec");
        assert!(CpuModel::from_spec(&spec).is_ok());
    });
    time("apply the model `host`", &|| {
        assert!(CpuModel::host().apply(&host.cpuid).is_ok());
    });
    time("apply a built-in model", &|| {
        assert!(model.apply(&host.cpuid).is_ok());
    });
    time("check a contract at a move", &|| {
        assert_eq!(contract.refusals(&offer), Vec::<String>::new());
    });
}
