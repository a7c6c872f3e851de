//! This host as a dump.

use arch::x86_64::cpu_model::{CpuDump, DumpFormat, DumpVersion};
use arch::x86_64::cpuid::Cpuid;
use hypervisor::Hypervisor;

/// Everything that decides which guests this host can run.
pub(crate) fn dump(hypervisor: &dyn Hypervisor) -> hypervisor::Result<CpuDump> {
    let cpuid = hypervisor.supported_cpuid()?;
    Ok(CpuDump {
        format: DumpFormat::Dump,
        version: DumpVersion,
        name: brand(&cpuid)
            .or_else(|| proc_cpuinfo("model name"))
            .unwrap_or_else(|| "a processor without a name".to_owned()),
        source: None,
        kernel: read("/proc/sys/kernel/osrelease"),
        microcode: proc_cpuinfo("microcode"),
        hypervisor: Some(hypervisor.kind().name().to_owned()),
        cpuid,
        msrs: hypervisor.feature_msrs()?,
        tsc_khz: hypervisor.tsc_khz()?,
        tsc_scaling: hypervisor.capabilities().tsc_scaling,
    })
}

/// The brand string (leaves 0x8000_0002 to 4; SDM vol. 2A, CPUID).
fn brand(cpuid: &Cpuid) -> Option<String> {
    let mut bytes = Vec::new();
    for leaf in 0x8000_0002..=0x8000_0004 {
        let entry = cpuid.get(leaf, 0)?;
        for register in [entry.eax, entry.ebx, entry.ecx, entry.edx] {
            bytes.extend(register.to_le_bytes());
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(['\0', ' ']);
    (!text.is_empty()).then(|| text.to_owned())
}

fn read(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// The first processor's field.
fn proc_cpuinfo(field: &str) -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let (_, value) = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == field)?;
    Some(value.trim().to_owned())
}
