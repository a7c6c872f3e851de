//! The richest model that all of some hosts can run.
//!
//! ```text
//!   hosts ──policy, one interface──► what each shows ──named features of all──► minus what is laid out differently
//!                                                                    └──► minus what needs something that is gone ──► model
//! ```
//!
//! It is a subset of each host, closed under what features need, and nothing could be added to it: a feature that all hosts have
//! is missing only if it needs one that not all have, or if its state lies elsewhere in their XSAVE areas.

use std::collections::{BTreeMap, BTreeSet};

use super::apply::SURROUNDINGS;
use super::dump::CpuDump;
use super::msrs::{ARCH_CAPABILITIES, promises};
use super::pattern::BitPattern;
use super::spec::{Hex, ModelSpec, MsrPattern, Signature};
use crate::x86_64::cpuid::features::{self, Feature, xstate};
use crate::x86_64::cpuid::{Cpuid, Interface, is_interface, of_interface};

/// Why there is no baseline.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BaselineError {
    /// There is nothing to compare.
    #[error("a baseline is made of at least one host")]
    NoHosts,
    /// Guests do not move between vendors without being asked.
    #[error(
        "the hosts have processors of several vendors ({0}): guests move between them only with a model made for it, which is asked \
         for by name (`--cross-vendor`, `cross_vendor`)"
    )]
    Vendors(String),
}

/// Makes the model. The vendor that it shows is the first host's.
pub fn baseline(
    name: &str,
    hosts: &[CpuDump],
    cross_vendor: bool,
) -> Result<ModelSpec, BaselineError> {
    let first = hosts.first().ok_or(BaselineError::NoHosts)?;
    let vendors: BTreeSet<String> = hosts.iter().map(|host| host.cpuid.vendor_id()).collect();
    if vendors.len() > 1 && !cross_vendor {
        let list: Vec<String> = vendors.into_iter().collect();
        return Err(BaselineError::Vendors(list.join(", ")));
    }
    let interface = common_interface(hosts);
    let shown: Vec<Cpuid> = hosts
        .iter()
        .map(|host| of_interface(&host.cpuid, interface))
        .collect();
    let on = common_features(&shown);
    let mut features: BTreeMap<String, bool> =
        on.iter().map(|name| ((*name).to_owned(), true)).collect();
    // What the interface shows is not a closed set: what only some hosts have is switched off.
    for feature in features::all().filter(|feature| is_interface(feature.at.leaf)) {
        if !on.contains(feature.name) && shown.iter().any(|cpuid| features::has(cpuid, feature)) {
            features.insert(feature.name.to_owned(), false);
        }
    }
    let narrowest = |byte: usize| {
        shown
            .iter()
            .filter_map(|cpuid| cpuid.get(0x8000_0008, 0))
            .map(|leaf| u32::from(leaf.eax.to_le_bytes()[byte]))
            .filter(|bits| *bits != 0)
            .min()
    };
    // The host that has least beside the baseline is the most like it.
    let likest = hosts
        .iter()
        .zip(&shown)
        .min_by_key(|(_, cpuid)| features::of(cpuid).len());
    Ok(ModelSpec {
        name: name.to_owned(),
        version: 1,
        description: format!(
            "what all of these have: {}",
            hosts
                .iter()
                .map(|host| host.name.as_str())
                .collect::<Vec<_>>()
                .join("; ")
        ),
        base: "none".to_owned(),
        vendor: Some(first.cpuid.vendor_id()),
        cross_vendor: (vendors.len() > 1).then_some(true),
        signature: likest.and_then(|(_, cpuid)| Signature::of(cpuid)),
        brand: None,
        physical_bits: narrowest(0).map(|bits| bits.clamp(32, 52)),
        linear_bits: narrowest(1).filter(|bits| [48, 57].contains(bits)),
        interface: Some(interface),
        msrs: arch_capabilities(hosts, &on).into_iter().collect(),
        features,
        cpuid: Vec::new(),
    })
}

/// The hosts' own interface if it is one and the same, else the clock that both hypervisors keep.
fn common_interface(hosts: &[CpuDump]) -> Interface {
    let signatures: BTreeSet<_> = hosts
        .iter()
        .map(|host| {
            let leaf = host.cpuid.get(0x4000_0000, 0);
            leaf.map(|leaf| (leaf.ebx, leaf.ecx, leaf.edx))
        })
        .collect();
    if signatures.len() == 1 {
        Interface::Host
    } else {
        Interface::Hyperv
    }
}

/// Names of the features that all hosts show and that a guest of any of them can keep.
fn common_features(shown: &[Cpuid]) -> BTreeSet<&'static str> {
    let mut on: BTreeSet<&'static str> = features::all()
        .filter(|feature| !SURROUNDINGS.contains(&feature.name))
        .filter(|feature| shown.iter().all(|cpuid| features::has(cpuid, feature)))
        .filter(|feature| laid_out_alike(feature, shown))
        .map(|feature| feature.name)
        .collect();
    loop {
        let left: BTreeSet<&'static str> = on
            .iter()
            .copied()
            .filter(|name| {
                features::by_name(name)
                    .is_some_and(|feature| feature.needs.iter().all(|need| on.contains(need)))
            })
            .collect();
        if left.len() == on.len() {
            return on;
        }
        on = left;
    }
}

/// Whether what a feature brings lies and looks the same on all hosts.
fn laid_out_alike(feature: &Feature, shown: &[Cpuid]) -> bool {
    let same = |leaf, subleaf| {
        let mut answers = shown.iter().map(|cpuid| {
            let entry = cpuid.get(leaf, subleaf);
            entry.map(|e| match leaf {
                // The version; what stands beside it are features.
                0x24 => (0, e.ebx & 0xff, 0),
                _ => (e.eax, e.ebx, e.ecx & 1),
            })
        });
        let first = answers.next();
        answers.all(|answer| Some(answer) == first)
    };
    let leaves: &[(u32, u32)] = match feature.name {
        "amx_tile" => &[(0x1d, 1), (0x1e, 0)],
        "avx10" => &[(0x24, 0)],
        _ => &[],
    };
    // x87 and SSE are where they always were; their subleaves say other things.
    let mut components = xstate::of_feature(feature).filter(|component| component.number >= 2);
    components.all(|component| same(0xd, component.number))
        && leaves.iter().all(|&(leaf, subleaf)| same(leaf, subleaf))
}

/// What all hosts promise in IA32_ARCH_CAPABILITIES, and what any of them warns of.
fn arch_capabilities(hosts: &[CpuDump], on: &BTreeSet<&'static str>) -> Option<MsrPattern> {
    if !on.contains("arch_capabilities") {
        return None;
    }
    let values: Option<Vec<u64>> = hosts
        .iter()
        .map(|host| {
            let msr = host.msrs.iter().find(|msr| msr.index == ARCH_CAPABILITIES);
            msr.map(|msr| msr.value)
        })
        .collect();
    let values = values?;
    let promised = values.iter().fold(u64::MAX, |all, value| all & value);
    let warned = values.iter().fold(0, |any, value| any | value);
    let promising = promises(ARCH_CAPABILITIES);
    let bits = promised & promising | warned & !promising;
    Some(MsrPattern {
        index: Hex(ARCH_CAPABILITIES),
        bits: BitPattern::new(!bits, bits),
    })
}
