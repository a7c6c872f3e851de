//! What CPUID shows a guest, as plain data.

use serde::{Deserialize, Serialize};

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
    pub entries: Vec<CpuidEntry>,
}

impl Cpuid {
    /// The answer for a leaf and subleaf, if it is listed.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
    }
}
