//! From a model and a host to what a guest is shown.

use std::collections::BTreeSet;

use super::error::Unavailable;
use super::model::CpuModel;
use super::spec::Signature;
use crate::x86_64::cpuid::features::{self, Feature};
use crate::x86_64::cpuid::{
    Cpuid, CpuidEntry, Register, feature_bits, is_interface, of_interface, trim_states,
};

/// Features that describe the machine or its moment, not what a model can give or take.
pub(super) const SURROUNDINGS: [&str; 7] = [
    "hypervisor",
    "osxsave",
    "ospke",
    "ht",
    "cmp_legacy",
    "fdp_excptn_only",
    "zero_fcs_fds",
];

impl CpuModel {
    /// What a guest of this model is shown on a host that supports `supported`, or everything that the host cannot give.
    ///
    /// The masks come before what tells one vCPU from another ([`for_vcpu`](crate::x86_64::cpuid::for_vcpu)).
    pub fn apply(&self, supported: &Cpuid) -> Result<Cpuid, Vec<Unavailable>> {
        let mut cpuid = of_interface(supported, self.interface);
        let shown = cpuid.clone();
        let mut missing = self.missing(&shown, supported);
        self.switch_off_features(&mut cpuid);
        self.apply_patterns(&shown, &mut cpuid, &mut missing);
        trim_states(&mut cpuid, !self.open);
        if let Some(vendor) = &self.vendor {
            if *vendor != cpuid.vendor_id() && !self.cross_vendor {
                missing.push(Unavailable::Vendor {
                    wanted: vendor.clone(),
                    here: cpuid.vendor_id(),
                });
            }
            cpuid.set_vendor_id(vendor);
        }
        if let Some(signature) = self.signature {
            set_signature(&mut cpuid, signature);
        }
        if let Some(brand) = &self.brand {
            set_brand(&mut cpuid, brand);
        }
        self.narrow_addresses(&mut cpuid);
        if missing.is_empty() {
            Ok(cpuid)
        } else {
            missing.sort_unstable();
            missing.dedup();
            Err(missing)
        }
    }

    /// Features that are on and not there.
    fn missing(&self, shown: &Cpuid, supported: &Cpuid) -> Vec<Unavailable> {
        self.on
            .iter()
            .filter_map(|name| features::by_name(name))
            .filter(|feature| !features::has(shown, feature))
            .map(|feature| Unavailable::Feature {
                name: feature.name,
                at: feature.at,
                hidden: features::has(supported, feature),
            })
            .collect()
    }

    fn switch_off_features(&self, cpuid: &mut Cpuid) {
        if self.open {
            for feature in self.off.iter().filter_map(|name| features::by_name(name)) {
                features::set(cpuid, feature, false);
            }
            return;
        }
        for feature in features::all().filter(|feature| self.goes(feature)) {
            features::set(cpuid, feature, false);
        }
        // A bit that no build has a name for is none that a model can have promised.
        for entry in &mut cpuid.entries {
            let (leaf, subleaf) = (entry.leaf, entry.subleaf.unwrap_or(0));
            if is_interface(leaf) || leaf == 0xd {
                continue;
            }
            for register in Register::ALL {
                let nameless = !features::named_bits(leaf, subleaf, register);
                *register.of_mut(entry) &= !(nameless & feature_bits(leaf, subleaf, register));
            }
        }
    }

    /// Whether a closed model takes this feature away.
    fn goes(&self, feature: &Feature) -> bool {
        !self.on.contains(feature.name)
            && !SURROUNDINGS.contains(&feature.name)
            && (!is_interface(feature.at.leaf) || self.off.contains(feature.name))
    }

    /// Bits without a name. Those that stand for abilities must be there in what the host shows.
    fn apply_patterns(&self, shown: &Cpuid, cpuid: &mut Cpuid, missing: &mut Vec<Unavailable>) {
        for (&(leaf, subleaf, register), pattern) in &self.registers {
            let (Some(host), Some(entry)) =
                (shown.get(leaf, subleaf), cpuid.get_mut(leaf, subleaf))
            else {
                missing.push(Unavailable::Leaf { leaf, subleaf });
                continue;
            };
            let [ones, zeros] = [pattern.ones(), pattern.zeros()]
                .map(|bits| u32::try_from(bits).unwrap_or(u32::MAX));
            let lacking = ones & feature_bits(leaf, subleaf, register) & !register.of(host);
            if lacking != 0 {
                missing.push(Unavailable::Bits {
                    leaf,
                    subleaf,
                    register,
                    bits: lacking,
                });
            }
            let value = register.of_mut(entry);
            *value = (*value & !zeros) | ones;
        }
    }

    fn narrow_addresses(&self, cpuid: &mut Cpuid) {
        let Some(leaf) = cpuid.get_mut(0x8000_0008, 0) else {
            return;
        };
        let [mut physical, mut linear, guest, rest] = leaf.eax.to_le_bytes();
        if let Some(most) = self.physical_bits {
            physical = physical.min(u8::try_from(most).unwrap_or(u8::MAX));
        }
        if let Some(most) = self.linear_bits {
            linear = linear.min(u8::try_from(most).unwrap_or(u8::MAX));
        }
        leaf.eax = u32::from_le_bytes([physical, linear, guest.min(physical), rest]);
    }
}

/// Leaf 1 EAX, and AMD's copy (SDM vol. 2A, CPUID, figure 3-6).
fn set_signature(cpuid: &mut Cpuid, signature: Signature) {
    let base = signature.family.min(0xf);
    let eax = signature.stepping & 0xf
        | (signature.model & 0xf) << 4
        | base << 8
        | (signature.model >> 4 & 0xf) << 16
        | ((signature.family - base) & 0xff) << 20;
    let amd = cpuid.vendor() == crate::x86_64::cpuid::Vendor::Amd;
    if let Some(leaf) = cpuid.get_mut(1, 0) {
        leaf.eax = eax;
    }
    if amd && let Some(leaf) = cpuid.get_mut(0x8000_0001, 0) {
        leaf.eax = eax;
    }
}

/// Leaves 0x8000_0002 to 4: 48 bytes, filled up with zeros.
fn set_brand(cpuid: &mut Cpuid, brand: &str) {
    let mut bytes = [0u8; 48];
    for (to, byte) in bytes.iter_mut().zip(brand.bytes()) {
        *to = byte;
    }
    let (words, _) = bytes.as_chunks::<4>();
    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    for (leaf, registers) in (0x8000_0002..).zip(words.chunks_exact(4)) {
        if let (Some(entry), [eax, ebx, ecx, edx]) = (cpuid.get_mut(leaf, 0), registers) {
            *entry = CpuidEntry {
                eax: *eax,
                ebx: *ebx,
                ecx: *ecx,
                edx: *edx,
                ..*entry
            };
        }
    }
}

/// The names of the features that a guest is shown, in the table's order.
pub fn feature_names(cpuid: &Cpuid) -> BTreeSet<&'static str> {
    features::of(cpuid)
        .into_iter()
        .map(|feature| feature.name)
        .collect()
}
