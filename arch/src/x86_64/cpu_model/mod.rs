//! CPU models: what a guest is shown of a host, so that it can move to hosts that are not alike.
//!
//! ```text
//!   name ──builtin──┐                                       host's supported CPUID, feature MSRs
//!   file ──spec─────┴──► CpuModel ──with_features──► apply ◄──┘
//!                                                     │  └─► everything that the host cannot give, by name
//!                                                     ▼
//!                              what the guest is shown: part of its contract, and made again exactly wherever it goes
//!
//!   dumps of hosts ──compare──► relation, what each lacks, what it takes
//!                 ──baseline──► a spec: the richest model that all can run
//! ```
//!
//! What it promises:
//!
//! - A model that loads says nothing contradictory: each feature has what it needs ([`ModelError`] names what has not).
//! - [`CpuModel::apply`] gives what the model has or says what is missing; it never gives less in silence.
//! - A state component without a feature is in neither XCR0 nor the XSAVE area's size.
//! - [`baseline`] is a subset of each host, closed, and maximal.

mod apply;
mod baseline;
mod builtin;
mod compare;
mod contract;
mod dump;
mod error;
mod model;
mod msrs;
mod pattern;
mod spec;

pub use self::apply::feature_names;
pub use self::baseline::{BaselineError, baseline};
pub use self::compare::{Comparison, Lack, Relation, compare};
pub use self::contract::{CpuContract, HostOffer, frequencies_agree};
pub use self::dump::{CpuDump, DumpFormat, DumpVersion};
pub use self::error::{ModelError, Unavailable};
pub use self::model::CpuModel;
pub use self::msrs::{
    ARCH_CAPABILITIES, FEATURE_MSRS, bit_names, feature_msr_name, unkept_promises,
};
pub use self::pattern::{BitPattern, PatternError};
pub use self::spec::{CpuidPattern, Hex, ModelSpec, MsrPattern, Signature};

#[cfg(test)]
mod tests;
