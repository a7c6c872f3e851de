//! The CPUID bits that have a name: where each is, what it cannot be without, and what cannot be without it.
//!
//! ```text
//!   by_name("AVX512-VNNI") ──► Feature ──► at             leaf 0x7, subleaf 0, ecx bit 11
//!   at(7, 0, Ecx, 11) ───────►    │   ───► needs_closure  avx512vl, avx512f, avx2, … (to be shown with it)
//!   of(cpuid) ───────────────►    │   ───► dependents     avx10, …                   (to go when it goes)
//!                                 └──────► xstate         components of XCR0 and IA32_XSS that it brings
//! ```
//!
//! One table, in rows by leaf and register: `basic`, `structured` (leaf 7), `extended` and `hypervisor`. Not in it are numbers
//! (versions, counts, widths), what describes caches, topology, counters and the sizes of XSAVE components, and bits that no
//! processor up to Granite Rapids and Turin has and nothing in Linux or QEMU knows.
//!
//! What it promises, and the tests check: a name, under any of its spellings, is one feature; a bit is one feature; every need
//! exists; needs have no cycle. A change to the data keeps that.
//!
//! Sources, of which this is an extract of facts:
//!
//! - bits: Intel SDM, CPUID (vol. 2A, table 3-8 and those it refers to; newer editions: vol. 1, chapter 21), and for what is
//!   not in it yet the Architecture Instruction Set Extensions (ISE) reference, 319433; AMD APM vol. 3, appendix E;
//! - names: Linux `arch/x86/include/asm/cpufeatures.h` (what /proc/cpuinfo prints) and, for bits without one, the manuals'
//!   mnemonics or QEMU's `target/i386/cpu.c`;
//! - needs: the manuals, Linux `arch/x86/kernel/cpu/cpuid-deps.c` (all that it has for these bits, so that a Linux guest has
//!   nothing to warn of) and what compilers take for granted: code for AVX uses SSE4.2 unasked, code for AVX-512F uses AVX2,
//!   FMA and F16C.

use std::fmt;

use super::{Cpuid, Register, Vendor, bit, has_hyperv};

/// Rows of the table: `bit "name" also "alias", … needs "feature", …;`.
macro_rules! bits {
    ($leaf:literal, $subleaf:literal, $register:ident: $(
        $bit:literal $name:literal $(also $($alias:literal),+)? $(needs $($need:literal),+)?;
    )+) => {
        &[$(
            $crate::x86_64::cpuid::features::Feature {
                name: $name,
                aliases: &[$($($alias),+)?],
                at: $crate::x86_64::cpuid::features::Place {
                    leaf: $leaf,
                    subleaf: $subleaf,
                    register: $crate::x86_64::cpuid::Register::$register,
                    bit: $bit,
                },
                needs: &[$($($need),+)?],
            },
        )+]
    };
}

mod basic;
mod extended;
mod hypervisor;
mod structured;
pub mod xstate;

/// A CPUID feature bit that has a name.
#[derive(Debug, PartialEq, Eq)]
pub struct Feature {
    /// As in /proc/cpuinfo where Linux prints one, else the manual's mnemonic in lower case.
    pub name: &'static str,
    /// Other accepted spellings: the manual's, QEMU's. Case, `_`, `-` and `.` do not count (see [`by_name`]).
    pub aliases: &'static [&'static str],
    /// Where it is.
    pub at: Place,
    /// Names of the features without which this one must not be shown; the direct ones, see [`needs_closure`].
    pub needs: &'static [&'static str],
}

/// Where a bit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// CPUID leaf. The one of KVM's features is 0x4000_0001, wherever a CPUID has it.
    pub leaf: u32,
    /// CPUID subleaf; 0 for a leaf without.
    pub subleaf: u32,
    /// The register it is in.
    pub register: Register,
    /// Its number there.
    pub bit: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            leaf,
            subleaf,
            register,
            bit,
        } = self;
        write!(f, "leaf {leaf:#x}, subleaf {subleaf}, {register} bit {bit}")
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Feature {
    /// Every spelling of its name, the proper one first.
    pub fn spellings(&self) -> impl Iterator<Item = &'static str> + use<> {
        std::iter::once(self.name).chain(self.aliases.iter().copied())
    }
}

/// Bits of leaf 0x8000_0001 EDX that on AMD repeat those of leaf 1 EDX (APM vol. 3, Fn8000_0001_EDX): no features of their own,
/// but copies that [`set`] keeps in step. Elsewhere they are 0.
pub const AMD_DUPLICATES: u32 = 0x0183_f3ff;

/// Leaf of KVM's features, if nothing else is at 0x4000_0000.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Leaf of Hyper-V's features.
const HYPERV_FEATURES: u32 = 0x4000_0003;

/// All features, in a fixed order.
pub fn all() -> impl Iterator<Item = &'static Feature> {
    [
        basic::ROWS,
        structured::ROWS,
        extended::ROWS,
        hypervisor::ROWS,
    ]
    .into_iter()
    .flatten()
    .copied()
    .flatten()
}

/// The feature of this name or alias. `SSE4.1`, `sse4-1` and `sse41` are `sse4_1`.
pub fn by_name(name: &str) -> Option<&'static Feature> {
    all().find(|feature| feature.spellings().any(|known| key(known).eq(key(name))))
}

/// The feature at a place, if it has a name.
pub fn at(leaf: u32, subleaf: u32, register: Register, bit: u32) -> Option<&'static Feature> {
    let place = Place {
        leaf,
        subleaf,
        register,
        bit,
    };
    all().find(|feature| feature.at == place)
}

/// The bits of a register that have a name.
pub fn named_bits(leaf: u32, subleaf: u32, register: Register) -> u32 {
    all()
        .filter(|feature| {
            let at = feature.at;
            (at.leaf, at.subleaf, at.register) == (leaf, subleaf, register)
        })
        .fold(0, |bits, feature| bits | bit(feature.at.bit))
}

/// The name of a bit: a feature's, also of AMD's copy ([`AMD_DUPLICATES`]), or that of the XSAVE component it stands for.
pub fn name_of(place: Place) -> Option<&'static str> {
    let original = match (place.leaf, place.register) {
        (0x8000_0001, Register::Edx) if AMD_DUPLICATES & bit(place.bit) != 0 => {
            Place { leaf: 1, ..place }
        }
        _ => place,
    };
    all()
        .find(|feature| feature.at == original)
        .map(|feature| feature.name)
        .or_else(|| xstate::at(place).map(|component| component.name))
}

/// Everything that must be shown where `feature` is; without itself.
pub fn needs_closure(feature: &Feature) -> Vec<&'static Feature> {
    closure(feature, &|feature| direct_needs(feature).collect())
}

/// Everything that must go where `feature` goes; without itself.
pub fn dependents(feature: &Feature) -> Vec<&'static Feature> {
    closure(feature, &|feature| {
        all()
            .filter(|other| other.needs.contains(&feature.name))
            .collect()
    })
}

/// The spelling of a feature's name that somebody may have meant, if one is close: one character wrong in a short name, up to
/// three in a long one.
pub fn nearest(name: &str) -> Option<&'static str> {
    let wanted: Vec<u8> = key(name).take(LONGEST_NAME).collect();
    let limit = match wanted.len() {
        0..=2 => 0,
        3..=5 => 1,
        6..=9 => 2,
        _ => 3,
    };
    all()
        .flat_map(Feature::spellings)
        .map(|known| (distance(&wanted, &key(known).collect::<Vec<u8>>()), known))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= limit)
        .map(|(_, known)| known)
}

/// All features that this CPUID shows.
pub fn of(cpuid: &Cpuid) -> Vec<&'static Feature> {
    all().filter(|feature| has(cpuid, feature)).collect()
}

/// Features that this CPUID shows without one that they need directly, with that one.
///
/// A hypervisor's own offer may have some that do no harm: KVM on an AMD host can show `ssbd` without `spec_ctrl`.
pub fn contradictions(cpuid: &Cpuid) -> Vec<(&'static Feature, &'static Feature)> {
    of(cpuid)
        .into_iter()
        .flat_map(|feature| direct_needs(feature).map(move |need| (feature, need)))
        .filter(|(_, need)| !has(cpuid, need))
        .collect()
}

/// Whether this CPUID shows a feature. Of AMD's two copies the one in leaf 1 counts.
pub fn has(cpuid: &Cpuid, feature: &Feature) -> bool {
    let at = feature.at;
    leaf_of(cpuid, at)
        .and_then(|leaf| cpuid.get(leaf, at.subleaf))
        .is_some_and(|entry| at.register.of(entry) & bit(at.bit) != 0)
}

/// Shows or hides a feature, with AMD's copy of it ([`AMD_DUPLICATES`]) but without what it needs or what needs it.
///
/// A leaf that the CPUID does not have is not added: a feature in it stays hidden. Returns whether the feature is now as asked.
pub fn set(cpuid: &mut Cpuid, feature: &Feature, shown: bool) -> bool {
    let at = feature.at;
    let copy = (cpuid.vendor() == Vendor::Amd && repeated_on_amd(at)).then_some(0x8000_0001);
    for leaf in leaf_of(cpuid, at).into_iter().chain(copy) {
        if let Some(entry) = cpuid.get_mut(leaf, at.subleaf) {
            let register = at.register.of_mut(entry);
            *register &= !bit(at.bit);
            *register |= u32::from(shown) << at.bit;
        }
    }
    has(cpuid, feature) == shown
}

/// The leaf that stands for a place's in this CPUID. What two hypervisors use differently is only there under the right one.
fn leaf_of(cpuid: &Cpuid, at: Place) -> Option<u32> {
    match at.leaf {
        KVM_FEATURES => cpuid.kvm_base().map(|base| base + 1),
        HYPERV_FEATURES if !has_hyperv(cpuid) => None,
        leaf => Some(leaf),
    }
}

fn repeated_on_amd(at: Place) -> bool {
    (at.leaf, at.register) == (1, Register::Edx) && AMD_DUPLICATES & bit(at.bit) != 0
}

fn direct_needs(feature: &Feature) -> impl Iterator<Item = &'static Feature> + use<> {
    let needs = feature.needs;
    needs
        .iter()
        .filter_map(|need| all().find(|other| other.name == *need))
}

/// What `step` leads to from a feature, and from there, and so on; the nearest first.
fn closure(
    from: &Feature,
    step: &dyn Fn(&Feature) -> Vec<&'static Feature>,
) -> Vec<&'static Feature> {
    let mut found = step(from);
    let mut next = 0;
    while let Some(feature) = found.get(next) {
        for more in step(feature) {
            if !found.contains(&more) {
                found.push(more);
            }
        }
        next += 1;
    }
    found
}

/// What counts in a spelling. Linux, QEMU and the manuals differ in case and in separators only, most of the time.
fn key(name: &str) -> impl Iterator<Item = u8> {
    name.bytes()
        .filter(|byte| !matches!(byte, b'_' | b'-' | b'.'))
        .map(|byte| byte.to_ascii_lowercase())
}

/// Longer than any name, and short enough to compare with all of them.
const LONGEST_NAME: usize = 64;

/// Insertions, deletions and replacements that make one word of the other.
fn distance(one: &[u8], other: &[u8]) -> usize {
    // The distances of what was read of `one` to each beginning of `other`, but the empty one.
    let mut row: Vec<usize> = (1..=other.len()).collect();
    for (read, byte) in one.iter().enumerate() {
        let (mut diagonal, mut left) = (read, read + 1);
        for (cell, against) in row.iter_mut().zip(other) {
            let replaced = diagonal + usize::from(byte != against);
            diagonal = *cell;
            left = replaced.min(diagonal + 1).min(left + 1);
            *cell = left;
        }
    }
    row.last().copied().unwrap_or(one.len())
}

#[cfg(test)]
mod tests;
