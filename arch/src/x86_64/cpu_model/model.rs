//! A model whose every part is decided: what a base and a file come to.

use std::collections::{BTreeMap, BTreeSet};

use super::builtin::{Builtin, MODELS, Start};
use super::error::ModelError;
use super::pattern::BitPattern;
use super::spec::{CpuidPattern, ModelSpec, Signature};
use super::{ARCH_CAPABILITIES, feature_msr_name};
use crate::x86_64::cpuid::features::{self, Feature};
use crate::x86_64::cpuid::{Interface, Register, is_interface};

/// Where bits of a register are: leaf, subleaf, register.
pub(super) type RegisterPlace = (u32, u32, Register);

/// A CPU model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// Its name.
    pub name: String,
    /// Which version.
    pub version: u32,
    /// What it is for.
    pub description: String,
    /// The models that it was made from, the nearest first.
    pub bases: Vec<String>,
    /// The guest has everything of its host that is not switched off. Otherwise: nothing that is not switched on.
    pub open: bool,
    /// Which hypervisor's interface the guest sees.
    pub interface: Interface,
    /// The vendor that the guest sees; `None`: the host's.
    pub vendor: Option<String>,
    /// On hosts of other vendors too.
    pub cross_vendor: bool,
    /// What leaf 1 says; `None`: what the host's says.
    pub signature: Option<Signature>,
    /// The brand string; `None`: the host's.
    pub brand: Option<String>,
    /// Most bits of a physical address.
    pub physical_bits: Option<u32>,
    /// Most bits of a linear address.
    pub linear_bits: Option<u32>,
    /// Names of features that the guest has, on whatever host.
    pub on: BTreeSet<&'static str>,
    /// Names of features that the guest has not. Of a closed model: those of the hypervisor's interface, which is open.
    pub off: BTreeSet<&'static str>,
    /// Bits without a name.
    pub(super) registers: BTreeMap<RegisterPlace, BitPattern<32>>,
    /// Bits of feature MSRs.
    pub msrs: BTreeMap<u32, BitPattern<64>>,
}

/// What is asked of single features, each by its one name.
type Wishes = BTreeMap<&'static str, bool>;

impl CpuModel {
    /// A model that every build knows: `NAME`, or `NAME-vN` for version N. Case does not matter.
    pub fn builtin(name: &str) -> Result<Self, ModelError> {
        let named = |name: &str| {
            MODELS
                .iter()
                .filter(move |model| model.name.eq_ignore_ascii_case(name))
                .max_by_key(|model| model.version)
        };
        let versioned = || {
            let (family, version) = name.rsplit_once("-v").or_else(|| name.rsplit_once("-V"))?;
            let version: u32 = version.parse().ok()?;
            MODELS
                .iter()
                .find(|model| model.name.eq_ignore_ascii_case(family) && model.version == version)
        };
        named(name)
            .or_else(versioned)
            .map(Self::of_builtin)
            .ok_or_else(|| ModelError::UnknownModel {
                name: name.to_owned(),
                known: MODELS
                    .iter()
                    .map(|model| model.name)
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// Every model that every build knows, in a fixed order.
    pub fn builtins() -> impl Iterator<Item = Self> {
        MODELS.iter().map(Self::of_builtin)
    }

    /// What the host and its hypervisor offer.
    pub fn host() -> Self {
        Self {
            name: "host".to_owned(),
            version: 1,
            description: String::new(),
            bases: Vec::new(),
            open: true,
            interface: Interface::Host,
            vendor: None,
            cross_vendor: false,
            signature: None,
            brand: None,
            physical_bits: None,
            linear_bits: None,
            on: BTreeSet::new(),
            off: BTreeSet::new(),
            registers: BTreeMap::new(),
            msrs: BTreeMap::new(),
        }
    }

    fn of_builtin(builtin: &Builtin) -> Self {
        let base = builtin
            .base
            .and_then(|base| MODELS.iter().find(|model| model.name == base))
            .map(Self::of_builtin);
        let mut bases = Vec::new();
        let base = match base {
            Some(base) => {
                bases.push(base.name.clone());
                bases.extend(base.bases.iter().cloned());
                base
            }
            None => Self {
                open: builtin.start == Start::Host,
                ..Self::host()
            },
        };
        let (family_on, interface) = (builtin.features, builtin.interface);
        let mut on = base.on.clone();
        on.extend(
            family_on
                .iter()
                .filter_map(|name| features::by_name(name))
                .map(|feature| feature.name),
        );
        let mut msrs = base.msrs.clone();
        if let Some(bits) = builtin.arch_capabilities {
            msrs.insert(ARCH_CAPABILITIES, BitPattern::new(!bits, bits));
        }
        Self {
            name: builtin.name.to_owned(),
            version: builtin.version,
            description: builtin.description.to_owned(),
            bases,
            interface,
            vendor: builtin.vendor.map(str::to_owned).or(base.vendor.clone()),
            signature: builtin
                .signature
                .map(|(family, model, stepping)| Signature {
                    family,
                    model,
                    stepping,
                })
                .or(base.signature),
            brand: builtin.brand.map(str::to_owned).or(base.brand.clone()),
            physical_bits: builtin.physical_bits.or(base.physical_bits),
            on,
            msrs,
            ..base
        }
    }

    /// What a file comes to, or everything that is wrong with it.
    pub fn from_spec(spec: &ModelSpec) -> Result<Self, Vec<ModelError>> {
        let base = Self::builtin(&spec.base).map_err(|error| vec![error])?;
        let mut errors = Vec::new();
        check_fields(spec, &mut errors);
        let mut model = Self {
            name: spec.name.clone(),
            version: spec.version,
            description: spec.description.clone(),
            bases: std::iter::once(base.name.clone())
                .chain(base.bases.iter().cloned())
                .collect(),
            interface: spec.interface.unwrap_or(base.interface),
            vendor: spec.vendor.clone().or(base.vendor.clone()),
            cross_vendor: spec.cross_vendor.unwrap_or(base.cross_vendor),
            signature: spec.signature.or(base.signature),
            brand: spec.brand.clone().or(base.brand.clone()),
            physical_bits: spec.physical_bits.or(base.physical_bits),
            linear_bits: spec.linear_bits.or(base.linear_bits),
            ..base
        };
        let mut wishes = wishes_for(&spec.features, &mut errors);
        for pattern in &spec.cpuid {
            model.add_pattern(pattern, &mut wishes, &mut errors);
        }
        for pattern in &spec.msrs {
            let index = pattern.index.0;
            if feature_msr_name(index).is_none() {
                errors.push(ModelError::NotAFeatureMsr { index });
                continue;
            }
            let before = model.msrs.entry(index).or_default();
            *before = before.overlaid(pattern.bits);
        }
        model.fulfil(&wishes, &mut errors);
        if errors.is_empty() {
            Ok(model)
        } else {
            Err(errors)
        }
    }

    /// The model with single features switched on or off, as `cpus.features` asks for it.
    pub fn with_features(
        mut self,
        changes: &BTreeMap<String, bool>,
    ) -> Result<Self, Vec<ModelError>> {
        let mut errors = Vec::new();
        let wishes = wishes_for(changes, &mut errors);
        self.fulfil(&wishes, &mut errors);
        if errors.is_empty() {
            Ok(self)
        } else {
            Err(errors)
        }
    }

    /// The bits without a name that it decides: where, and which.
    pub fn patterns(&self) -> impl Iterator<Item = (String, String)> {
        self.registers
            .iter()
            .map(|((leaf, subleaf, register), bits)| {
                (
                    format!("leaf {leaf:#x}, subleaf {subleaf}, {register}"),
                    bits.to_string(),
                )
            })
    }

    /// Bits with a name become wishes, the others stay bits.
    fn add_pattern(
        &mut self,
        pattern: &CpuidPattern,
        wishes: &mut Wishes,
        errors: &mut Vec<ModelError>,
    ) {
        let (leaf, subleaf) = (pattern.leaf.0, pattern.subleaf);
        let registers = [pattern.eax, pattern.ebx, pattern.ecx, pattern.edx];
        for (register, bits) in Register::ALL.into_iter().zip(registers) {
            if bits.is_open() {
                continue;
            }
            if let Some(instead) = decided_elsewhere(leaf, register) {
                errors.push(ModelError::DecidedElsewhere {
                    leaf,
                    subleaf,
                    register,
                    instead,
                });
                continue;
            }
            let (mut ones, mut zeros) = (bits.ones(), bits.zeros());
            for number in 0..u32::BITS {
                let one = 1u64 << number;
                if (ones | zeros) & one == 0 {
                    continue;
                }
                if let Some(feature) = features::at(leaf, subleaf, register, number) {
                    wish(wishes, feature, ones & one != 0, errors);
                    ones &= !one;
                    zeros &= !one;
                }
            }
            let rest = BitPattern::new(zeros, ones);
            if !rest.is_open() {
                let before = self.registers.entry((leaf, subleaf, register)).or_default();
                *before = before.overlaid(rest);
            }
        }
    }

    /// Switches features, with what depends on those that go.
    fn fulfil(&mut self, wishes: &Wishes, errors: &mut Vec<ModelError>) {
        let wished = |name: &str| wishes.get(name).copied();
        // What only one hypervisor has goes without a word if a base brought it, not if it was asked for.
        for name in self.interface.hides() {
            if wished(name) == Some(true) {
                errors.push(ModelError::HiddenByInterface {
                    feature: name,
                    interface: self.interface,
                });
            }
            self.switch_off(name, wishes, errors);
        }
        for (&name, _) in wishes.iter().filter(|(_, wanted)| !**wanted) {
            self.switch_off(name, wishes, errors);
        }
        for (&name, _) in wishes.iter().filter(|(_, wanted)| **wanted) {
            self.on.insert(name);
            self.off.remove(name);
        }
        for (&name, _) in wishes.iter().filter(|(_, wanted)| **wanted) {
            let Some(feature) = features::by_name(name) else {
                continue;
            };
            for need in features::needs_closure(feature) {
                if self.on.contains(need.name) {
                    continue;
                }
                // An open model has what its host has: then this too is asked of the host.
                if self.open && !self.off.contains(need.name) {
                    self.on.insert(need.name);
                } else if wished(need.name) != Some(false) {
                    // If it was switched off by name, that has been said.
                    errors.push(ModelError::Needs {
                        feature: feature.name,
                        at: feature.at,
                        need: need.name,
                        need_at: need.at,
                    });
                }
            }
        }
    }

    fn switch_off(&mut self, name: &'static str, wishes: &Wishes, errors: &mut Vec<ModelError>) {
        let Some(feature) = features::by_name(name) else {
            return;
        };
        for dependent in features::dependents(feature) {
            if wishes.get(dependent.name) == Some(&true) && wishes.get(name) == Some(&false) {
                errors.push(ModelError::Contradiction {
                    feature: dependent.name,
                    at: dependent.at,
                    off: name,
                    off_at: feature.at,
                });
            }
            self.on.remove(dependent.name);
            if self.open || is_interface(dependent.at.leaf) {
                self.off.insert(dependent.name);
            }
        }
        self.on.remove(name);
        if self.open || is_interface(feature.at.leaf) {
            self.off.insert(name);
        }
    }
}

fn wish(
    wishes: &mut Wishes,
    feature: &'static Feature,
    wanted: bool,
    errors: &mut Vec<ModelError>,
) {
    if wishes.insert(feature.name, wanted) == Some(!wanted) {
        errors.push(ModelError::OnAndOff {
            feature: feature.name,
            at: feature.at,
        });
    }
}

/// What names ask for.
fn wishes_for(changes: &BTreeMap<String, bool>, errors: &mut Vec<ModelError>) -> Wishes {
    let mut wishes = Wishes::new();
    for (name, &wanted) in changes {
        match features::by_name(name) {
            Some(feature) => wish(&mut wishes, feature, wanted, errors),
            None => errors.push(ModelError::UnknownFeature {
                name: name.chars().take(64).collect(),
                nearest: features::nearest(name),
            }),
        }
    }
    wishes
}

/// What decides a register that no pattern can decide; nothing if a pattern can.
fn decided_elsewhere(leaf: u32, register: Register) -> Option<&'static str> {
    use Register::{Eax, Ebx, Ecx, Edx};
    Some(match (leaf, register) {
        (0, Ebx | Ecx | Edx) | (0x8000_0000, Ebx | Ecx | Edx) => "say it with `vendor`",
        (1, Eax) | (0x8000_0001, Eax) => "say it with `signature`",
        (0x8000_0002..=0x8000_0004, _) => "say it with `brand`",
        (0x8000_0008, Eax) => "say it with `physical_bits` and `linear_bits`",
        (1, Ebx) | (0xb | 0x1f | 0x8000_001e, _) | (0x8000_0008, Ecx) => {
            "it is another one for each vCPU and follows from `cpus.topology`"
        }
        (0xd, Eax | Ebx | Ecx | Edx) => {
            "which state components there are follows from the features; switch those"
        }
        (0x4000_0000..=0x4fff_ffff, _) => "say it with `interface`",
        _ => return None,
    })
}

fn check_fields(spec: &ModelSpec, errors: &mut Vec<ModelError>) {
    let mut refuse = |field, problem: String| errors.push(ModelError::Field { field, problem });
    if spec.name.is_empty()
        || spec.name.len() > 64
        || !spec.name.bytes().all(|b| b.is_ascii_graphic())
    {
        refuse(
            "name",
            "a name has 1 to 64 printable ASCII characters and no spaces".into(),
        );
    }
    if let Some(vendor) = &spec.vendor
        && (vendor.len() != 12 || !vendor.is_ascii())
    {
        refuse(
            "vendor",
            format!(
                "`{vendor}` has not 12 ASCII characters, as GenuineIntel and AuthenticAMD have"
            ),
        );
    }
    if let Some(brand) = &spec.brand
        && (brand.len() > 48 || !brand.bytes().all(|b| b == b' ' || b.is_ascii_graphic()))
    {
        refuse(
            "brand",
            "a brand string has at most 48 printable ASCII characters".into(),
        );
    }
    if let Some(signature) = spec.signature
        && (signature.family > 0xf + 0xff
            || signature.model > 0xff
            || signature.stepping > 0xf
            || (signature.model > 0xf && signature.family != 6 && signature.family < 0xf))
    {
        refuse(
            "signature",
            "the family is at most 270, the model at most 255 (15 for families before 15 other than 6), the stepping at most 15"
                .into(),
        );
    }
    if let Some(bits) = spec.physical_bits
        && !(32..=52).contains(&bits)
    {
        refuse("physical_bits", format!("{bits} is not between 32 and 52"));
    }
    if let Some(bits) = spec.linear_bits
        && ![48, 57].contains(&bits)
    {
        refuse("linear_bits", format!("{bits} is neither 48 nor 57"));
    }
}
