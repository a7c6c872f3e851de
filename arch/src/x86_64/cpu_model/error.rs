//! What is wrong with a model, and what a host cannot give.

use std::fmt;

use super::feature_msr_name;
use crate::x86_64::cpuid::features::Place;
use crate::x86_64::cpuid::{Interface, Register};

/// A mistake in a model, whatever the host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// No model has this name.
    #[error(
        "there is no CPU model `{name}`; there are {known}, and files (a path with a `/` or ending in .json)"
    )]
    UnknownModel {
        /// The name.
        name: String,
        /// The names there are.
        known: String,
    },
    /// No feature has this name.
    #[error("there is no CPU feature `{name}`{}", did_you_mean(*nearest))]
    UnknownFeature {
        /// The name.
        name: String,
        /// The one that looks most like it.
        nearest: Option<&'static str>,
    },
    /// A feature is switched on and off.
    #[error("the feature {feature} ({at}) is switched on and off")]
    OnAndOff {
        /// The feature.
        feature: &'static str,
        /// Its bit.
        at: Place,
    },
    /// A feature is switched on without one that it needs.
    #[error(
        "the feature {feature} ({at}) needs {need} ({need_at}), which the model does not have: switch that on too"
    )]
    Needs {
        /// The feature.
        feature: &'static str,
        /// Its bit.
        at: Place,
        /// What it needs.
        need: &'static str,
        /// The bit of that.
        need_at: Place,
    },
    /// A feature is switched on, one that it needs is switched off.
    #[error(
        "the feature {feature} ({at}) is switched on and needs {off} ({off_at}), which is switched off"
    )]
    Contradiction {
        /// The feature.
        feature: &'static str,
        /// Its bit.
        at: Place,
        /// What is off.
        off: &'static str,
        /// The bit of that.
        off_at: Place,
    },
    /// A feature that only one hypervisor has, in a model for several.
    #[error(
        "the feature {feature} cannot be kept by both hypervisors, and the model's interface is `{interface}`"
    )]
    HiddenByInterface {
        /// The feature.
        feature: &'static str,
        /// The interface.
        interface: Interface,
    },
    /// A pattern for a register that something else decides.
    #[error("leaf {leaf:#x}, subleaf {subleaf}, {register} takes no bit pattern: {instead}")]
    DecidedElsewhere {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The register.
        register: Register,
        /// What to do.
        instead: &'static str,
    },
    /// A pattern for an MSR that does not tell a guest what its processor can do.
    #[error("MSR {index:#x} is no feature register: {}", FEATURE_MSRS)]
    NotAFeatureMsr {
        /// The register.
        index: u32,
    },
    /// A field with a value that cannot be.
    #[error("{field}: {problem}")]
    Field {
        /// Its name.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
}

const FEATURE_MSRS: &str =
    "a model can decide IA32_ARCH_CAPABILITIES (0x10a) and IA32_CORE_CAPABILITIES (0xcf)";

fn did_you_mean(nearest: Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |name| format!("; did you mean `{name}`?"))
}

/// Something that a model has and a host cannot give.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Unavailable {
    /// A feature.
    #[error("{name} ({at}): {}", if *.hidden { "no guest is shown it, because it cannot be moved" } else { "this host does not offer it" })]
    Feature {
        /// Its name.
        name: &'static str,
        /// Its bit.
        at: Place,
        /// The host has it, but [`policy`](crate::x86_64::cpuid::policy) hides it.
        hidden: bool,
    },
    /// Bits without a name.
    #[error(
        "leaf {leaf:#x}, subleaf {subleaf}, {register} bits {bits:#010x}: this host does not offer them"
    )]
    Bits {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The register.
        register: Register,
        /// The bits.
        bits: u32,
    },
    /// A leaf that this host does not have.
    #[error("leaf {leaf:#x}, subleaf {subleaf} does not exist on this host")]
    Leaf {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// Another vendor.
    #[error("the model is for processors of {wanted}, this host has one of {here}")]
    Vendor {
        /// The model's.
        wanted: String,
        /// The host's.
        here: String,
    },
    /// Bits of a feature MSR.
    #[error("{} (MSR {index:#x}) bits {bits:#x}: this host does not offer them", MsrName(*index))]
    Msr {
        /// The register.
        index: u32,
        /// The bits.
        bits: u64,
    },
}

struct MsrName(u32);

impl fmt::Display for MsrName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(feature_msr_name(self.0).unwrap_or("a register"))
    }
}
