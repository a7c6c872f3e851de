//! A host as JSON: what `vmm cpu dump` writes and `compare` and `baseline` read.

use serde::{Deserialize, Serialize};

use super::spec::hex;
use crate::x86_64::bounded;
use crate::x86_64::cpuid::{Cpuid, CpuidEntry};
use crate::x86_64::state::Msr;

/// Everything that decides which guests a host can run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuDump {
    /// What file this is.
    pub format: DumpFormat,
    /// The form's version.
    pub version: DumpVersion,
    /// The processor's brand string, or what a person called it.
    pub name: String,
    /// Where the dump comes from, if it is not this program's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The operating system's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Revision of the processor's microcode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub microcode: Option<String>,
    /// Which hypervisor says this: `kvm` or `mshv`; of a bare processor, none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
    /// What CPUID can show a guest, before any policy.
    #[serde(deserialize_with = "entries", serialize_with = "write_entries")]
    pub cpuid: Cpuid,
    /// Feature registers.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "msrs",
        serialize_with = "write_msrs"
    )]
    pub msrs: Vec<Msr>,
    /// Frequency of the TSC in kHz, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tsc_khz: Option<u32>,
    /// Guests can be given another frequency.
    #[serde(default)]
    pub tsc_scaling: bool,
}

/// The word that tells a dump from other files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DumpFormat {
    /// The only one.
    #[default]
    #[serde(rename = "vmm-cpu-dump")]
    Dump,
}

/// Versions of the form that are understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct DumpVersion;

impl TryFrom<u32> for DumpVersion {
    type Error = String;

    fn try_from(version: u32) -> Result<Self, String> {
        match version {
            1 => Ok(Self),
            other => Err(format!("version {other} of this form is not known here")),
        }
    }
}

impl From<DumpVersion> for u32 {
    fn from(_: DumpVersion) -> Self {
        1
    }
}

/// An entry with its numbers in hexadecimal.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    #[serde(with = "hex")]
    leaf: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subleaf: Option<u32>,
    #[serde(with = "hex")]
    eax: u32,
    #[serde(with = "hex")]
    ebx: u32,
    #[serde(with = "hex")]
    ecx: u32,
    #[serde(with = "hex")]
    edx: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Register {
    #[serde(with = "hex")]
    index: u32,
    #[serde(with = "hex")]
    value: u64,
}

fn entries<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Cpuid, D::Error> {
    let list = bounded::list::<D, Entry, 4096>(deserializer)?;
    let mut entries: Vec<CpuidEntry> = list
        .into_iter()
        .map(|entry| CpuidEntry {
            leaf: entry.leaf,
            subleaf: entry.subleaf,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })
        .collect();
    entries.sort_unstable_by_key(|entry| (entry.leaf, entry.subleaf));
    if let Some([first, _]) = entries
        .windows(2)
        .map(|pair| [&pair[0], &pair[1]])
        .find(|[one, other]| (one.leaf, one.subleaf) == (other.leaf, other.subleaf))
    {
        return Err(serde::de::Error::custom(format!(
            "leaf {:#x}, subleaf {} is there twice",
            first.leaf,
            first.subleaf.unwrap_or(0)
        )));
    }
    Ok(Cpuid { entries })
}

fn write_entries<S: serde::Serializer>(cpuid: &Cpuid, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(cpuid.entries.iter().map(|entry| Entry {
        leaf: entry.leaf,
        subleaf: entry.subleaf,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }))
}

fn msrs<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Msr>, D::Error> {
    let list = bounded::list::<D, Register, 4096>(deserializer)?;
    Ok(list
        .into_iter()
        .map(|register| Msr {
            index: register.index,
            value: register.value,
        })
        .collect())
}

fn write_msrs<S: serde::Serializer>(msrs: &[Msr], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(msrs.iter().map(|msr| Register {
        index: msr.index,
        value: msr.value,
    }))
}
