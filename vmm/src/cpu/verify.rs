//! A model tried on this host.

use arch::x86_64::cpu_model::{CpuModel, Unavailable};
use arch::x86_64::cpuid::features::{self, Feature};
use arch::x86_64::cpuid::{Cpuid, MissingFeature, differences, for_vcpu, has_hyperv};
use arch::x86_64::layout;
use arch::x86_64::msr;
use arch::x86_64::topology::Topology;
use hypervisor::{Hypervisor, VmOptions};

/// What came of it.
pub(crate) struct Verdict {
    /// What the host cannot give: no guest of the model starts.
    pub missing: Vec<Unavailable>,
    /// What it says it gives and does not, in words.
    pub dropped: Vec<String>,
    /// What it shows although the model does not have it, in words.
    pub excess: Vec<String>,
    /// Features that it shows without one that they need, in words. Most do no harm.
    pub notes: Vec<String>,
    /// The features that a guest would be shown.
    pub shown: Vec<&'static Feature>,
}

/// Applies a model, gives it to a vCPU that never runs, and reads back what that shows.
pub(crate) fn verify(hypervisor: &dyn Hypervisor, model: &CpuModel) -> hypervisor::Result<Verdict> {
    let supported = hypervisor.supported_cpuid()?;
    super::check_interface(hypervisor, model.interface)?;
    let cpuid = match model.apply(&supported) {
        Ok(cpuid) => cpuid,
        Err(missing) => return Ok(refused(missing)),
    };
    let feature_msrs = match model.apply_msrs(&cpuid, &hypervisor.feature_msrs()?) {
        Ok(registers) => registers,
        Err(missing) => return Ok(refused(missing)),
    };
    let vm = hypervisor.create_vm(&VmOptions {
        ioapic_pins: layout::IOAPIC_PINS,
        hyperv: has_hyperv(&cpuid),
        apic_timer_hz: None,
    })?;
    let mut vcpu = vm.create_vcpu(0)?;
    let wanted: Cpuid = for_vcpu(&cpuid, &Topology::flat(1), 0);
    vcpu.set_cpuid(&wanted)?;
    let given = vcpu.cpuid()?;
    let different = differences(&wanted, &given);
    let words = |list: &[MissingFeature]| list.iter().map(ToString::to_string).collect();
    let mut dropped: Vec<String> = words(&different.lacking);
    let mut state = vcpu.save_state()?;
    msr::apply(&mut state, &feature_msrs);
    if let Err(error) = vcpu.restore_state(&state) {
        dropped.push(error.to_string());
    }
    Ok(Verdict {
        missing: Vec::new(),
        dropped,
        excess: words(&different.excess),
        notes: features::contradictions(&given)
            .into_iter()
            .map(|(feature, need)| format!("{feature} is shown without {need}, which it needs"))
            .collect(),
        shown: features::of(&given),
    })
}

fn refused(missing: Vec<Unavailable>) -> Verdict {
    Verdict {
        missing,
        dropped: Vec::new(),
        excess: Vec::new(),
        notes: Vec::new(),
        shown: Vec::new(),
    }
}
