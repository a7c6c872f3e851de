//! Whether a host can give a guest what the guest was given before.

use std::fmt;

use super::features::{self, Place};
use super::{Cpuid, CpuidEntry, bit};

/// An output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(
    missing_docs,
    reason = "each variant is the register it is named after"
)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    /// In the order of [`CpuidEntry`].
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    pub(crate) fn of(self, entry: &CpuidEntry) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    pub(crate) fn of_mut(self, entry: &mut CpuidEntry) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        })
    }
}

/// Something the guest has and the host cannot give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MissingFeature {
    /// CPUID leaf.
    pub leaf: u32,
    /// CPUID subleaf; 0 for a leaf without.
    pub subleaf: u32,
    /// The register it is in.
    pub register: Register,
    /// The feature bits that lack; for a number (vendor, width, offset) the bits of the guest's register that differ.
    pub bits: u32,
}

impl MissingFeature {
    /// It is the vendor that differs.
    pub fn is_vendor(&self) -> bool {
        self.leaf == 0
    }

    /// The names of the features, or `bit N`; of a number what it is.
    pub fn names(&self) -> Vec<String> {
        let Self {
            leaf,
            subleaf,
            register,
            bits,
        } = *self;
        match rule(leaf, subleaf, register) {
            Rule::Features(_) => (0..u32::BITS)
                .filter(|number| bits & bit(*number) != 0)
                .map(|number| {
                    let place = Place {
                        leaf,
                        subleaf,
                        register,
                        bit: number,
                    };
                    features::name_of(place).map_or_else(|| format!("bit {number}"), str::to_owned)
                })
                .collect(),
            Rule::Equal(what) | Rule::AtLeast(_, what) => vec![what.to_owned()],
            Rule::Ignored => vec!["CPU property".to_owned()],
        }
    }
}

impl fmt::Display for MissingFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            leaf,
            subleaf,
            register,
            bits,
        } = *self;
        if feature_bits(leaf, subleaf, register) != 0 {
            f.write_str("CPU feature ")?;
        }
        f.write_str(&self.names().join(", "))?;
        write!(
            f,
            " (leaf {leaf:#x}, subleaf {subleaf}, {register} bits {bits:#010x})"
        )
    }
}

/// How a register is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Each of these bits that the guest has, the host must have.
    Features(u32),
    /// The values must be the same.
    Equal(&'static str),
    /// In each of these bytes (a mask of whole bytes) the host's number may not be smaller.
    AtLeast(u32, &'static str),
    /// Says nothing about abilities.
    Ignored,
}

const ALL: u32 = u32::MAX;

/// The rule for a register. What is not a feature register describes the processor (caches, names, counts, ids) and may differ:
/// the guest keeps seeing what it saw.
fn rule(leaf: u32, subleaf: u32, register: Register) -> Rule {
    use Register::{Eax, Ebx, Ecx, Edx};
    match (leaf, subleaf, register) {
        (0, _, Ebx | Ecx | Edx) => Rule::Equal("CPU vendor"),
        // Not OSXSAVE (27), which follows CR4, and not the hypervisor bit (31).
        (1, _, Ecx) => Rule::Features(!(bit(27) | bit(31))),
        // Not HTT (28), which follows the topology.
        (1, _, Edx) => Rule::Features(!bit(28)),
        (6, _, Eax) => Rule::Features(bit(2)),
        // Not FDP_EXCPTN_ONLY (6) and FCS/FDS deprecation (13): they say that something is gone.
        (7, 0, Ebx) => Rule::Features(!(bit(6) | bit(13))),
        // Not OSPKE (4), which follows CR4; MAWAU (17-21) is a number that goes with MPX.
        (7, 0, Ecx) => Rule::Features(!(bit(4) | 0x3e_0000)),
        (7, 0, Edx) | (7, 1, Eax | Ebx | Ecx | Edx) | (7, 2, Edx) => Rule::Features(ALL),
        // XCR0, XSAVE variants and IA32_XSS.
        (0xd, 0, Eax | Edx) | (0xd, 1, Eax | Ecx | Edx) => Rule::Features(ALL),
        (0xd, 2.., Eax) => Rule::Equal("size of an XSAVE component"),
        (0xd, 2.., Ebx) => Rule::Equal("offset of an XSAVE component"),
        (0x14, 0, Ebx | Ecx) => Rule::Features(ALL),
        (0x19, _, Ebx) | (0x1e, 1, Eax) => Rule::Features(ALL),
        (0x1d, 1, Eax | Ebx | Ecx) | (0x1e, 0, Ebx) => Rule::Equal("AMX tile layout"),
        (0x24, 0, Ebx) => Rule::AtLeast(0xff, "AVX10 version"),
        (0x4000_0000, _, Ebx | Ecx | Edx) => Rule::Equal("hypervisor interface"),
        (0x4000_0001, _, Eax) | (0x4000_0003, _, Eax | Edx) => Rule::Features(ALL),
        // Not CmpLegacy (1), which follows the topology.
        (0x8000_0001, _, Ecx) => Rule::Features(!bit(1)),
        (0x8000_0001, _, Edx) => Rule::Features(ALL),
        (0x8000_0007, _, Edx) => Rule::Features(ALL),
        (0x8000_0008, _, Eax) => Rule::AtLeast(0xffff, "width of addresses"),
        (0x8000_0008, _, Ebx) => Rule::Features(ALL),
        (0x8000_000a, _, Edx) => Rule::Features(ALL),
        (0x8000_0021, _, Eax) => Rule::Features(ALL),
        _ => Rule::Ignored,
    }
}

/// The bits of a register that stand for abilities, each for one.
pub fn feature_bits(leaf: u32, subleaf: u32, register: Register) -> u32 {
    match rule(leaf, subleaf, register) {
        Rule::Features(mask) => mask,
        Rule::Equal(_) | Rule::AtLeast(..) | Rule::Ignored => 0,
    }
}

/// Leaves and subleaves that [`rule`] knows, beside those of 0xd from 2 on.
const COMPARED: [(u32, u32); 22] = [
    (0, 0),
    (1, 0),
    (6, 0),
    (7, 0),
    (7, 1),
    (7, 2),
    (0xd, 0),
    (0xd, 1),
    (0x14, 0),
    (0x19, 0),
    (0x1d, 1),
    (0x1e, 0),
    (0x1e, 1),
    (0x24, 0),
    (0x4000_0000, 0),
    (0x4000_0001, 0),
    (0x4000_0003, 0),
    (0x8000_0001, 0),
    (0x8000_0007, 0),
    (0x8000_0008, 0),
    (0x8000_000a, 0),
    (0x8000_0021, 0),
];

/// Everything in `guest` that `host` cannot give, in a fixed order; empty if the guest can run there.
///
/// `host` is what the host would give a guest of its own, that is, after [`policy`](super::policy).
pub fn missing_features(guest: &Cpuid, host: &Cpuid) -> Vec<MissingFeature> {
    let mut missing = Vec::new();
    let xsave = (2..=XSAVE_COMPONENTS).map(|subleaf| (0xd, subleaf));
    for (leaf, subleaf) in COMPARED.into_iter().chain(xsave) {
        let Some(wanted) = guest.get(leaf, subleaf) else {
            continue;
        };
        let none = CpuidEntry::default();
        let given = host.get(leaf, subleaf).unwrap_or(&none);
        // That the component lacks is said by its bit in XCR0 or IA32_XSS.
        if leaf == 0xd && subleaf >= 2 && given.eax == 0 {
            continue;
        }
        for register in Register::ALL {
            let (wanted, given) = (register.of(wanted), register.of(given));
            let bits = lacking(rule(leaf, subleaf, register), wanted, given);
            if bits != 0 {
                missing.push(MissingFeature {
                    leaf,
                    subleaf,
                    register,
                    bits,
                });
            }
        }
    }
    missing
}

/// The last XSAVE state component: bit 63 of XCR0 and IA32_XSS is not one (SDM vol. 1, section 13.1).
const XSAVE_COMPONENTS: u32 = 62;

fn lacking(rule: Rule, wanted: u32, given: u32) -> u32 {
    match rule {
        Rule::Features(mask) => wanted & !given & mask,
        // A guest without the thing does not care how the host has it.
        Rule::Equal(_) if wanted == 0 => 0,
        Rule::Equal(_) => wanted ^ given,
        Rule::AtLeast(mask, _) => {
            let pairs = wanted.to_le_bytes().into_iter().zip(given.to_le_bytes());
            let smaller = pairs.map(|(wanted, given)| if given < wanted { 0xff } else { 0 });
            let mut bytes = [0; 4];
            bytes
                .iter_mut()
                .zip(smaller)
                .for_each(|(to, byte)| *to = byte);
            (wanted ^ given) & u32::from_le_bytes(bytes) & mask
        }
        Rule::Ignored => 0,
    }
}

/// What a vCPU shows otherwise than it was told to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Features that it was told to show and does not, and numbers that are others.
    pub lacking: Vec<MissingFeature>,
    /// Features that it shows and was not told to: some hypervisors cannot hide what the processor has.
    pub excess: Vec<MissingFeature>,
}

/// Compares what a vCPU shows with what it was told to, in the order of `wanted`. Bits that follow what the guest does are not looked at.
pub fn differences(wanted: &Cpuid, shown: &Cpuid) -> Differences {
    let none = CpuidEntry::default();
    let mut differences = Differences::default();
    for entry in &wanted.entries {
        let (leaf, subleaf) = (entry.leaf, entry.subleaf.unwrap_or(0));
        let given = shown.get(leaf, subleaf).unwrap_or(&none);
        for register in Register::ALL {
            let fixed = !follows(leaf, subleaf, register);
            let (wanted, given) = (register.of(entry) & fixed, register.of(given) & fixed);
            let (lacking, excess) = match rule(leaf, subleaf, register) {
                Rule::Features(_) => (wanted & !given, given & !wanted),
                _ => (wanted ^ given, 0),
            };
            for (bits, list) in [
                (lacking, &mut differences.lacking),
                (excess, &mut differences.excess),
            ] {
                if bits != 0 {
                    list.push(MissingFeature {
                        leaf,
                        subleaf,
                        register,
                        bits,
                    });
                }
            }
        }
    }
    differences
}

/// Bits that the hypervisor changes by what the guest does: OSXSAVE and OSPKE follow CR4, the APIC bit follows the APIC's base, MONITOR follows
/// IA32_MISC_ENABLE, the size of the XSAVE area follows XCR0 and IA32_XSS.
fn follows(leaf: u32, subleaf: u32, register: Register) -> u32 {
    match (leaf, subleaf, register) {
        (1, _, Register::Ecx) => bit(3) | bit(27),
        (1, _, Register::Edx) => bit(9),
        (7, 0, Register::Ecx) => bit(4),
        (0xd, 0 | 1, Register::Ebx) => u32::MAX,
        (0x8000_0001, _, Register::Edx) => bit(9),
        _ => 0,
    }
}
