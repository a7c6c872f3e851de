//! Model-specific registers: each is a VP register under another name.
//!
//! A restore sets all that exist here, and goes on after one that does not, or cannot be set, if nothing is lost by it; otherwise the
//! restore is refused by the register's name. The TSC comes last, then its adjustment and the deadline, which is armed against it.

use std::sync::PoisonError;

use arch::x86_64::state::{Msr, StateElement, VcpuState};
use mshv_bindings::{
    hv_register_name_HV_REGISTER_GUEST_OS_ID as GUEST_OS_ID,
    hv_register_name_HV_REGISTER_REFERENCE_TSC as REFERENCE_TSC,
    hv_register_name_HV_REGISTER_VP_ASSIST_PAGE as VP_ASSIST_PAGE,
    hv_register_name_HV_X64_REGISTER_BNDCFGS as BNDCFGS,
    hv_register_name_HV_X64_REGISTER_CSTAR as CSTAR,
    hv_register_name_HV_X64_REGISTER_DEBUG_CTL as DEBUG_CTL,
    hv_register_name_HV_X64_REGISTER_HYPERCALL as HYPERCALL,
    hv_register_name_HV_X64_REGISTER_KERNEL_GS_BASE as KERNEL_GS_BASE,
    hv_register_name_HV_X64_REGISTER_LSTAR as LSTAR,
    hv_register_name_HV_X64_REGISTER_MSR_IA32_MISC_ENABLE as MISC_ENABLE,
    hv_register_name_HV_X64_REGISTER_MSR_MTRR_DEF_TYPE as MTRR_DEF_TYPE,
    hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX4KC0000 as MTRR_FIX4K,
    hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX16K80000 as MTRR_FIX16K,
    hv_register_name_HV_X64_REGISTER_MSR_MTRR_FIX64K00000 as MTRR_FIX64K,
    hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_BASE0 as MTRR_BASE0,
    hv_register_name_HV_X64_REGISTER_MSR_MTRR_PHYS_MASK0 as MTRR_MASK0,
    hv_register_name_HV_X64_REGISTER_PAT as PAT, hv_register_name_HV_X64_REGISTER_S_CET as S_CET,
    hv_register_name_HV_X64_REGISTER_SFMASK as SFMASK,
    hv_register_name_HV_X64_REGISTER_SPEC_CTRL as SPEC_CTRL,
    hv_register_name_HV_X64_REGISTER_STAR as STAR,
    hv_register_name_HV_X64_REGISTER_SYSENTER_CS as SYSENTER_CS,
    hv_register_name_HV_X64_REGISTER_SYSENTER_EIP as SYSENTER_EIP,
    hv_register_name_HV_X64_REGISTER_SYSENTER_ESP as SYSENTER_ESP,
    hv_register_name_HV_X64_REGISTER_TSC as TSC,
    hv_register_name_HV_X64_REGISTER_TSC_ADJUST as TSC_ADJUST,
    hv_register_name_HV_X64_REGISTER_TSC_AUX as TSC_AUX,
    hv_register_name_HV_X64_REGISTER_U_CET as U_CET, hv_register_name_HV_X64_REGISTER_U_XSS as XSS,
    hv_register_name_HV_X64_REGISTER_VIRT_SPEC_CTRL as VIRT_SPEC_CTRL,
};
use mshv_ioctls::VcpuFd;

use super::refused;
use crate::Result;
use crate::mshv::registers::{self, Register};
use crate::mshv::vcpu::MshvVcpu;
use crate::msr::{cannot_have_used, in_order, refusal};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
// Register names of the TLFS that the bindings lack.
const TSX_CTRL: u32 = 0x0008_0088;
const TSC_DEADLINE: u32 = 0x0008_0095;
const UMWAIT_CONTROL: u32 = 0x0008_0098;
const XFD: u32 = 0x0008_0099;
const XFD_ERR: u32 = 0x0008_009a;

/// MSR indices (SDM vol. 4; TLFS for those of 0x4000_0000 on) and the registers that they are. The bases of FS and GS, EFER and the
/// APIC base belong to the special registers.
const NAMES: [(u32, u32); 32] = [
    (IA32_TSC, TSC),
    (IA32_TSC_ADJUST, TSC_ADJUST),
    (0x48, SPEC_CTRL),
    (0xe1, UMWAIT_CONTROL),
    (0x122, TSX_CTRL),
    (0x174, SYSENTER_CS),
    (0x175, SYSENTER_ESP),
    (0x176, SYSENTER_EIP),
    (0x1a0, MISC_ENABLE),
    (0x1c4, XFD),
    (0x1c5, XFD_ERR),
    (0x1d9, DEBUG_CTL),
    (0x250, MTRR_FIX64K),
    (0x258, MTRR_FIX16K),
    (0x259, MTRR_FIX16K + 1),
    (0x277, PAT),
    (0x2ff, MTRR_DEF_TYPE),
    (0x6a0, U_CET),
    (0x6a2, S_CET),
    (IA32_TSC_DEADLINE, TSC_DEADLINE),
    (0xd90, BNDCFGS),
    (0xda0, XSS),
    (0x4000_0000, GUEST_OS_ID),
    (0x4000_0001, HYPERCALL),
    (0x4000_0021, REFERENCE_TSC),
    (0x4000_0073, VP_ASSIST_PAGE),
    (0xc000_0081, STAR),
    (0xc000_0082, LSTAR),
    (0xc000_0083, CSTAR),
    (0xc000_0084, SFMASK),
    (0xc000_0103, TSC_AUX),
    (0xc001_011f, VIRT_SPEC_CTRL),
];
/// KVM's own (Linux Documentation/virt/kvm/x86/msr.rst).
const KVM: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4d08;
/// Hyper-V's.
const HYPERV: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// The register that an MSR is here.
fn register_name(index: u32) -> Option<u32> {
    match index {
        IA32_KERNEL_GS_BASE => Some(KERNEL_GS_BASE),
        // Eight pairs of base and mask.
        0x200..=0x20f => {
            let first = if index.is_multiple_of(2) {
                MTRR_BASE0
            } else {
                MTRR_MASK0
            };
            Some(first + (index - 0x200) / 2)
        }
        0x268..=0x26f => Some(MTRR_FIX4K + index - 0x268),
        _ => NAMES
            .iter()
            .find(|(known, _)| *known == index)
            .map(|(_, name)| *name),
    }
}

/// Every MSR that may exist here, sorted.
fn candidates() -> Vec<u32> {
    let named = NAMES.iter().map(|(index, _)| *index);
    let mut all: Vec<u32> = named
        .chain([IA32_KERNEL_GS_BASE])
        .chain(0x200..=0x20f)
        .chain(0x268..=0x26f)
        .collect();
    all.sort_unstable();
    all
}

/// The MSRs that a VP of this host can read, sorted. One that the partition's features leave out fails by itself.
pub(crate) fn readable(vp: &VcpuFd) -> Result<Vec<u32>> {
    Ok(candidates()
        .into_iter()
        .filter(|&index| {
            register_name(index).is_some_and(|name| registers::read(vp, &[name]).is_ok())
        })
        .collect())
}

pub(super) fn save(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    let indices = vcpu.vm.host.msr_indices()?;
    let names: Vec<(u32, u32)> = indices
        .iter()
        .filter_map(|&index| Some((index, register_name(index)?)))
        .collect();
    // Hyper-V's registers are not there where the guest does not have that interface.
    let (synthetic, own): (Vec<_>, Vec<_>) = names
        .into_iter()
        .partition(|(index, _)| HYPERV.contains(index));
    let values = registers::read(
        &vcpu.fd,
        &own.iter().map(|(_, name)| *name).collect::<Vec<_>>(),
    )?;
    let own = own.iter().zip(values).map(|((index, _), [value, _])| Msr {
        index: *index,
        value,
    });
    state.msrs = own.collect();
    if vcpu.vm.hyperv {
        let names: Vec<u32> = synthetic.iter().map(|(_, name)| *name).collect();
        let values = registers::read(&vcpu.fd, &names)?;
        let synthetic = synthetic.iter().zip(values);
        state
            .msrs
            .extend(synthetic.map(|((index, _), [value, _])| Msr {
                index: *index,
                value,
            }));
    }
    state.msrs.sort_unstable();
    Ok(())
}

pub(super) fn restore(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    let here = vcpu.vm.host.msr_indices()?;
    let (known, unknown): (Vec<Msr>, Vec<Msr>) = in_order(&state.msrs)
        .into_iter()
        .partition(|msr| here.binary_search(&msr.index).is_ok());
    let lost = unknown
        .into_iter()
        .filter(|msr| msr.index != IA32_ARCH_CAPABILITIES || vcpu.arch_capabilities)
        // A guest that was told of KVM's interface is refused before it gets here.
        .filter(|msr| !KVM.contains(&msr.index))
        .find(|&msr| msr.value != 0 && !cannot_have_used(msr));
    if let Some(lost) = lost {
        return Err(refused(vcpu, StateElement::Msrs, refusal(lost, None)));
    }
    let table: Vec<Register> = known
        .iter()
        .filter_map(|msr| Some(Register::new(register_name(msr.index)?, msr.value)))
        .map(|register| in_step(vcpu, state.tsc_khz, register))
        .collect();
    if registers::write(&vcpu.fd, &table).is_ok() {
        return Ok(());
    }
    // One of them is refused: which?
    for (msr, register) in known.iter().zip(&table) {
        if let Err(error) = registers::write(&vcpu.fd, &[*register]) {
            let [value, _] = registers::read_array(&vcpu.fd, &[register.name])?[0];
            if value != msr.value && !cannot_have_used(*msr) {
                tracing::debug!(%error, "an MSR was refused");
                return Err(refused(
                    vcpu,
                    StateElement::Msrs,
                    refusal(*msr, Some(value)),
                ));
            }
        }
    }
    Ok(())
}

/// The TSC of a later vCPU, in step with the first one's.
///
/// KVM's vCPUs are saved one after the other while their TSCs run on, so what was in step is apart by the time that took. KVM itself
/// brings values back in step that are less than a second apart; here time is frozen and each would be kept as it was read.
fn in_step(vcpu: &MshvVcpu, tsc_khz: Option<u32>, mut register: Register) -> Register {
    if register.name != TSC {
        return register;
    }
    let mut first = vcpu
        .vm
        .first_tsc
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let value = &mut register.value[0];
    // A second at a frequency that no TSC is below, should it not be known.
    let second = u64::from(tsc_khz.unwrap_or(1_000_000)) * 1000;
    match *first {
        Some(first) if vcpu.id != 0 && value.abs_diff(first) < second => *value = first,
        _ if vcpu.id == 0 => *first = Some(*value),
        _ => {}
    }
    register
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_candidate_is_one_register_of_its_own() {
        let names: HashSet<u32> = candidates()
            .into_iter()
            .map(|index| register_name(index).expect("a candidate has a name"))
            .collect();
        assert_eq!(names.len(), candidates().len());
        assert!(candidates().windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(register_name(0x20f), Some(MTRR_MASK0 + 7));
        assert_eq!(register_name(0x20e), Some(MTRR_BASE0 + 7));
        assert_eq!(register_name(0x4b56_4d00), None);
    }

    #[test]
    fn where_the_bindings_name_an_msr_they_name_it_as_we_do() {
        for index in candidates() {
            if let Ok(name) = mshv_bindings::msr_to_hv_reg_name(index) {
                assert_eq!(Some(name), register_name(index), "{index:#x}");
            }
        }
    }
}
