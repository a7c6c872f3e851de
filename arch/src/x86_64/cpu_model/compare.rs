//! Two hosts, side by side.

use serde::{Serialize, Serializer};

use super::dump::CpuDump;
use super::msrs::{FEATURE_MSRS, bit_names, unkept_promises};
use crate::x86_64::cpuid::{Cpuid, MissingFeature, missing_features, policy, trim_states};
use crate::x86_64::state::Msr;

/// What the first host is to the second, as far as guests of the model `host` can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Relation {
    /// Guests move both ways.
    Identical,
    /// The second has all that the first has, and more: guests move from the first to the second.
    Subset,
    /// The first has all that the second has, and more: guests move from the second to the first.
    Superset,
    /// Each has something that the other lacks.
    Incompatible,
}

/// Something that one host has and the other cannot give a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Lack {
    /// Of CPUID.
    Cpuid(#[serde(serialize_with = "write_missing")] MissingFeature),
    /// Bits of a feature register.
    Msr {
        /// The register.
        index: u32,
        /// The bits.
        bits: u64,
        /// Their names.
        names: String,
    },
}

impl std::fmt::Display for Lack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpuid(missing) => missing.fmt(f),
            Self::Msr { index, bits, names } => {
                let name = super::feature_msr_name(*index).unwrap_or("MSR");
                write!(f, "{name} {names} (MSR {index:#x} bits {bits:#x})")
            }
        }
    }
}

/// A missing feature as an object.
fn write_missing<S: Serializer>(
    missing: &MissingFeature,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Missing {
        leaf: String,
        subleaf: u32,
        register: String,
        bits: String,
        names: Vec<String>,
        text: String,
    }
    Missing {
        leaf: format!("{:#x}", missing.leaf),
        subleaf: missing.subleaf,
        register: missing.register.to_string(),
        bits: format!("{:#010x}", missing.bits),
        names: missing.names(),
        text: missing.to_string(),
    }
    .serialize(serializer)
}

/// The outcome of a comparison.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// What A is to B.
    pub relation: Relation,
    /// What A has and B lacks: why a guest of the model `host` does not move from A to B.
    pub only_a: Vec<Lack>,
    /// What B has and A lacks.
    pub only_b: Vec<Lack>,
    /// What differs without standing in the way.
    pub notes: Vec<String>,
    /// What it takes that guests move both ways.
    pub advice: Vec<String>,
}

/// Compares two hosts by what they show a guest of the model `host`.
pub fn compare(a: &CpuDump, b: &CpuDump) -> Comparison {
    let [cpuid_a, cpuid_b] = [a, b].map(|dump| shown(&dump.cpuid));
    let only_a = lacks(a, &cpuid_a, b, &cpuid_b);
    let only_b = lacks(b, &cpuid_b, a, &cpuid_a);
    let relation = match (only_a.is_empty(), only_b.is_empty()) {
        (true, true) => Relation::Identical,
        (true, false) => Relation::Subset,
        (false, true) => Relation::Superset,
        (false, false) => Relation::Incompatible,
    };
    Comparison {
        relation,
        advice: advice(relation, &cpuid_a, &cpuid_b),
        notes: notes(a, &cpuid_a, b, &cpuid_b),
        only_a,
        only_b,
    }
}

/// What a guest of the model `host` sees.
fn shown(supported: &Cpuid) -> Cpuid {
    let mut cpuid = policy(supported);
    trim_states(&mut cpuid, false);
    cpuid
}

/// What `here` has and `there` lacks.
fn lacks(here: &CpuDump, guest: &Cpuid, there: &CpuDump, offered: &Cpuid) -> Vec<Lack> {
    let mut lacks: Vec<Lack> = missing_features(guest, offered)
        .into_iter()
        .map(Lack::Cpuid)
        .collect();
    // A dump of a bare processor says nothing of MSRs.
    if here.msrs.is_empty() || there.msrs.is_empty() {
        return lacks;
    }
    for index in FEATURE_MSRS {
        let value = |dump: &CpuDump| {
            dump.msrs
                .iter()
                .find(|msr| msr.index == index)
                .map_or(0, |msr| msr.value)
        };
        let bits = unkept_promises(
            Msr {
                index,
                value: value(here),
            },
            value(there),
        );
        if bits != 0 {
            lacks.push(Lack::Msr {
                index,
                bits,
                names: bit_names(index, bits),
            });
        }
    }
    lacks
}

fn notes(a: &CpuDump, cpuid_a: &Cpuid, b: &CpuDump, cpuid_b: &Cpuid) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |what: &str, a: String, b: String| {
        if a != b {
            notes.push(format!("{what}: {a} and {b}"));
        }
    };
    let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
    let signature = |cpuid: &Cpuid| {
        cpuid
            .get(1, 0)
            .map_or_else(|| "unknown".to_owned(), |leaf| format!("{:#x}", leaf.eax))
    };
    note("processor", a.name.clone(), b.name.clone());
    note(
        "signature (family, model, stepping)",
        signature(cpuid_a),
        signature(cpuid_b),
    );
    note("microcode", known(&a.microcode), known(&b.microcode));
    note("kernel", known(&a.kernel), known(&b.kernel));
    note("hypervisor", known(&a.hypervisor), known(&b.hypervisor));
    if let (Some(khz_a), Some(khz_b)) = (a.tsc_khz, b.tsc_khz)
        && khz_a != khz_b
    {
        let scaled = |scaling| {
            if scaling {
                "can be scaled"
            } else {
                "cannot be scaled"
            }
        };
        notes.push(format!(
            "TSC: {khz_a} kHz ({}) and {khz_b} kHz ({}); a guest keeps the frequency it was created with, or its move is refused",
            scaled(a.tsc_scaling),
            scaled(b.tsc_scaling)
        ));
    }
    notes
}

fn advice(relation: Relation, a: &Cpuid, b: &Cpuid) -> Vec<String> {
    let mut advice = Vec::new();
    let vendors = a.vendor_id() != b.vendor_id();
    if vendors {
        advice.push(
            "the vendors differ: only a guest of a model made for both (`vmm cpu baseline --cross-vendor A B`) moves between them"
                .to_owned(),
        );
    }
    let interface = |cpuid: &Cpuid| {
        cpuid
            .get(0x4000_0000, 0)
            .map(|leaf| (leaf.ebx, leaf.ecx, leaf.edx))
    };
    if interface(a) != interface(b) {
        advice.push(
            "the hypervisors' interfaces differ: create the guest with the model `portable`, or with a model whose `interface` is \
             `hyperv` or `none`"
                .to_owned(),
        );
    }
    match relation {
        Relation::Identical => {}
        _ if vendors => {}
        Relation::Subset => advice.push(
            "guests created on A move both ways; create those of B with `vmm cpu baseline A B`"
                .to_owned(),
        ),
        Relation::Superset => advice.push(
            "guests created on B move both ways; create those of A with `vmm cpu baseline A B`"
                .to_owned(),
        ),
        Relation::Incompatible => advice.push(
            "create guests with the model that `vmm cpu baseline A B` writes: they move both ways"
                .to_owned(),
        ),
    }
    advice
}
