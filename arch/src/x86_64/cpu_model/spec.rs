//! The file form of a CPU model: a base, and what differs from it.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::pattern::BitPattern;
use crate::x86_64::cpuid::{Cpuid, Interface};

/// A CPU model as it stands in a JSON file.
///
/// ```json
/// {
///   "name": "web-tier", "version": 2,
///   "base": "x86-64-v3",
///   "features": { "aes": true, "f16c": false },
///   "cpuid": [ { "leaf": "0x80000008", "ebx": "xxxxxxxx_xxxxxxxx_xxxxxxxx_xxxxxxx0" } ],
///   "msrs": [ { "index": "0x10a", "bits": "x…x0" } ]
/// }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Its name, for messages.
    pub name: String,
    /// Which version of it; a guest keeps what it was created with.
    #[serde(default = "first_version")]
    pub version: u32,
    /// What it is for.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The model that it starts from: a name that `vmm cpu models` lists, or `none` for a processor without any feature.
    pub base: String,
    /// CPU vendor, 12 characters, e.g. `GenuineIntel`. Where it is not the host's, the model cannot be used, unless `cross_vendor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// Guests may be shown the vendor on a host of another vendor, and move there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cross_vendor: Option<bool>,
    /// Family, model and stepping. By default the base's, then the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Signature>,
    /// The brand string, at most 48 ASCII characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub brand: Option<String>,
    /// Physical addresses have at most this many bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_bits: Option<u32>,
    /// Linear addresses have at most this many bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linear_bits: Option<u32>,
    /// Which hypervisor's interface the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<Interface>,
    /// Features that the guest has (`true`) or has not, whatever the base says.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub features: BTreeMap<String, bool>,
    /// Registers of CPUID, bit by bit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpuid: Vec<CpuidPattern>,
    /// Feature registers, bit by bit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub msrs: Vec<MsrPattern>,
}

fn first_version() -> u32 {
    1
}

/// Which processor it claims to be (CPUID.1:EAX; SDM vol. 2A, CPUID, figure 3-6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// Family, the extended one added: at most 270.
    pub family: u32,
    /// Model, the extended one in front: at most 255.
    pub model: u32,
    /// Stepping: at most 15.
    pub stepping: u32,
}

impl Signature {
    /// What a processor says of itself.
    pub fn of(cpuid: &Cpuid) -> Option<Self> {
        let eax = cpuid.get(1, 0)?.eax;
        let field = |shift: u32, bits: u32| eax >> shift & ((1 << bits) - 1);
        let base = field(8, 4);
        let long = base == 6 || base == 0xf;
        Some(Self {
            family: base + if base == 0xf { field(20, 8) } else { 0 },
            model: field(4, 4) | if long { field(16, 4) << 4 } else { 0 },
            stepping: field(0, 4),
        })
    }
}

/// Bits of the four output registers of a leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidPattern {
    /// EAX on input.
    pub leaf: Hex,
    /// ECX on input.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub subleaf: u32,
    /// Bits of EAX.
    #[serde(default, skip_serializing_if = "BitPattern::is_open")]
    pub eax: BitPattern<32>,
    /// Bits of EBX.
    #[serde(default, skip_serializing_if = "BitPattern::is_open")]
    pub ebx: BitPattern<32>,
    /// Bits of ECX.
    #[serde(default, skip_serializing_if = "BitPattern::is_open")]
    pub ecx: BitPattern<32>,
    /// Bits of EDX.
    #[serde(default, skip_serializing_if = "BitPattern::is_open")]
    pub edx: BitPattern<32>,
}

/// Bits of a model-specific register that tells a guest what its processor can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrPattern {
    /// The register.
    pub index: Hex,
    /// Its bits.
    pub bits: BitPattern<64>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(subleaf: &u32) -> bool {
    *subleaf == 0
}

/// A number of 32 bits that is written `"0x…"`; a plain number is taken too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hex(pub u32);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        hex::serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        hex::deserialize(deserializer).map(Self)
    }
}

/// Numbers as `"0x…"`.
pub(crate) mod hex {
    use std::fmt::{self, LowerHex};
    use std::marker::PhantomData;

    use serde::de::{Error, Unexpected, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer, T: LowerHex>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:#x}"))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: TryFrom<u64>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        deserializer.deserialize_any(Number(PhantomData))
    }

    struct Number<T>(PhantomData<T>);

    impl<T: TryFrom<u64>> Visitor<'_> for Number<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(
                f,
                "a number of at most {} bits, or its digits as \"0x…\"",
                8 * size_of::<T>()
            )
        }

        fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
            T::try_from(number).map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &self))
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
            let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
            let number = digits
                .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
                .and_then(|digits| u64::from_str_radix(digits, 16).ok())
                .and_then(|number| T::try_from(number).ok());
            number.ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
        }
    }
}
