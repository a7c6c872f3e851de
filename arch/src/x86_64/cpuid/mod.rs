//! What CPUID shows a guest, as plain data, and what is done to it on the way from host to vCPU.
//!
//! ```text
//!   Hypervisor::supported_cpuid ──► model ──► the machine's CPUID ──► for_vcpu(topology, id) ──► vCPU
//!                                                      │                 (ids, cache sharing, counts)
//!                                                      ▼ travels in the manifest
//!   destination: missing_features(guest, its own host) is empty, or the move is refused by name
//! ```
//!
//! What it promises:
//!
//! - [`policy`] never shows a guest what cannot be moved, or what this project has no device for.
//! - [`for_vcpu`] depends on its arguments alone: a vCPU that is made again elsewhere reads the same.
//! - [`features`] has one name for a bit and one bit for a name, whoever asks.
//! - [`missing_features`] looks at a fixed list of leaves, however long a peer's list is. A leaf that no build knows yet
//!   is not compared.

mod compare;
pub mod features;
mod interface;
mod policy;
mod states;
mod vcpu;

use serde::{Deserialize, Serialize};

pub use self::compare::{
    Differences, MissingFeature, Register, differences, feature_bits, missing_features,
};
pub(crate) use self::interface::is_interface;
pub use self::interface::{Interface, can_be_portable, has_hyperv, of_interface};
pub use self::policy::policy;
pub use self::states::trim_states;
pub use self::vcpu::for_vcpu;

/// One answer of the CPUID instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, when the leaf looks at it; `None` when it does not.
    pub subleaf: Option<u32>,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// Everything CPUID shows one vCPU, sorted by leaf and subleaf.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cpuid {
    /// The answers.
    #[serde(deserialize_with = "super::bounded::list::<_, _, 4096>")]
    pub entries: Vec<CpuidEntry>,
}

/// Who made the processor, as far as layouts differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel, and whoever follows its layouts.
    Intel,
    /// AuthenticAMD and HygonGenuine.
    Amd,
}

impl Cpuid {
    /// The answer for a leaf and subleaf, if it is listed.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidEntry> {
        self.entries
            .iter_mut()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
    }

    /// The highest basic leaf (leaf 0, EAX).
    pub fn max_basic(&self) -> u32 {
        self.get(0, 0).map_or(0, |e| e.eax)
    }

    /// Whose layouts the leaves follow.
    pub fn vendor(&self) -> Vendor {
        match self.get(0, 0).map(|e| (e.ebx, e.edx, e.ecx)) {
            Some(AUTHENTIC_AMD | HYGON_GENUINE) => Vendor::Amd,
            _ => Vendor::Intel,
        }
    }

    /// The vendor's 12 characters (leaf 0, EBX, EDX, ECX).
    pub fn vendor_id(&self) -> String {
        let leaf = self.get(0, 0).copied().unwrap_or_default();
        let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Sets it, with AMD's copy in leaf 0x8000_0000. What is missing of 12 characters is zero.
    pub fn set_vendor_id(&mut self, id: &str) {
        let mut bytes = [0; 12];
        for (to, byte) in bytes.iter_mut().zip(id.bytes()) {
            *to = byte;
        }
        let word = |at: usize| {
            let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
            u32::from_le_bytes(word.unwrap_or_default())
        };
        for leaf in [0, 0x8000_0000] {
            if let Some(entry) = self.get_mut(leaf, 0) {
                (entry.ebx, entry.edx, entry.ecx) = (word(0), word(4), word(8));
            }
        }
    }

    /// The leaf that answers as KVM, if one does: 0x4000_0000, or 0x4000_0100 beside another interface.
    pub fn kvm_base(&self) -> Option<u32> {
        [0x4000_0000, 0x4000_0100].into_iter().find(|leaf| {
            self.get(*leaf, 0)
                .is_some_and(|e| (e.ebx, e.ecx, e.edx) == KVM_SIGNATURE)
        })
    }

    /// Replaces all subleaves of a leaf.
    fn replace(&mut self, leaf: u32, with: impl IntoIterator<Item = CpuidEntry>) {
        self.entries.retain(|e| e.leaf != leaf);
        self.entries.extend(with);
        self.entries.sort_unstable_by_key(|e| (e.leaf, e.subleaf));
    }
}

/// EBX, EDX, ECX of leaf 0: "AuthenticAMD".
const AUTHENTIC_AMD: (u32, u32, u32) = (0x6874_7541, 0x6974_6e65, 0x444d_4163);
/// "HygonGenuine".
const HYGON_GENUINE: (u32, u32, u32) = (0x6f67_7948, 0x6e65_476e, 0x656e_6975);
/// EBX, ECX, EDX of KVM's leaf: "KVMKVMKVM".
const KVM_SIGNATURE: (u32, u32, u32) = (0x4b4d_564b, 0x564b_4d56, 0x0000_004d);

/// A bit by its number.
const fn bit(number: u32) -> u32 {
    1 << number
}

#[cfg(test)]
mod tests;
