//! How KVM saves and restores each element of a vCPU's state. [`crate::state_walk`] walks their list.
//!
//! Saving runs backwards because reading has demands of its own, and they are the mirror of writing's:
//! - Reading the activity makes KVM act on a pending INIT or start-up IPI, which changes registers: it must come first.
//! - Reading the events may deliver an exception's payload into CR2 or DR6: before those registers.
//! - TSC_DEADLINE (an MSR) before the local APIC. The timer may fire between the two: then the deadline was read as still to
//!   come *and* the interrupt as requested, so a tick may come twice. The other way round it would be lost.
//!
//! What KVM refuses and the guest cannot have used is skipped.

pub(crate) mod events;
pub(crate) mod msrs;
mod nested;
pub(crate) mod registers;
mod xsave;

use arch::x86_64::cpu_model::frequencies_agree;
use arch::x86_64::state::{Activity, Bytes, Lapic, StateElement, VcpuState};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state, kvm_mp_state,
};

use super::call;
use super::vcpu::KvmVcpu;
use crate::state_walk::{Codec, Stateful, refused};
pub(crate) use crate::state_walk::{restore, save};
use crate::{Error, Result, Vcpu};

impl Stateful for KvmVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn codec(element: StateElement) -> Codec<Self> {
        match element {
            StateElement::TscFrequency => (save_tsc_frequency, restore_tsc_frequency),
            StateElement::Special => (registers::save_special, registers::restore_special),
            StateElement::General => (registers::save_general, registers::restore_general),
            StateElement::Xcrs => (registers::save_xcrs, registers::restore_xcrs),
            StateElement::Xsave => (xsave::save, xsave::restore),
            StateElement::Debug => (registers::save_debug, registers::restore_debug),
            StateElement::Lapic => (save_lapic, restore_lapic),
            StateElement::Msrs => (msrs::save, msrs::restore),
            StateElement::Nested => (nested::save, nested::restore),
            StateElement::Events => (events::save, events::restore),
            StateElement::Activity => (save_activity, restore_activity),
        }
    }
}

fn save_tsc_frequency(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    state.tsc_khz = vcpu.tsc_khz();
    Ok(())
}

fn restore_tsc_frequency(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let Some(saved) = state.tsc_khz else {
        return Ok(());
    };
    let here = vcpu.fd.get_tsc_khz().unwrap_or(0);
    if saved == here {
        return Ok(());
    }
    if vcpu.vm.host.tsc_scaling {
        return vcpu.fd.set_tsc_khz(saved).map_err(call("KVM_SET_TSC_KHZ"));
    }
    if frequencies_agree(saved, here) {
        return Ok(());
    }
    Err(refused(
        vcpu,
        StateElement::TscFrequency,
        format!(
            "the guest's TSC runs at {saved} kHz, this host's at {here} kHz, and it cannot scale"
        ),
    ))
}

fn save_lapic(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    let lapic = vcpu.fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
    let registers = lapic.regs.iter().map(|&byte| byte as u8).collect();
    state.lapic = Some(Lapic {
        registers: Bytes(registers),
    });
    Ok(())
}

fn restore_lapic(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let Some(lapic) = &state.lapic else {
        return Ok(());
    };
    let bytes = &lapic.registers.0;
    let mut page = kvm_lapic_state::default();
    if bytes.len() != page.regs.len() {
        return Err(refused(
            vcpu,
            StateElement::Lapic,
            format!(
                "its register page has {} bytes instead of {}",
                bytes.len(),
                page.regs.len()
            ),
        ));
    }
    for (to, &from) in page.regs.iter_mut().zip(bytes) {
        *to = from as std::ffi::c_char;
    }
    vcpu.fd.set_lapic(&page).map_err(call("KVM_SET_LAPIC"))
}

/// Activities and their KVM_MP_STATE.
const ACTIVITIES: [(Activity, u32); 5] = [
    (Activity::Running, KVM_MP_STATE_RUNNABLE),
    (Activity::Halted, KVM_MP_STATE_HALTED),
    (Activity::Uninitialized, KVM_MP_STATE_UNINITIALIZED),
    (Activity::WaitForSipi, KVM_MP_STATE_INIT_RECEIVED),
    (Activity::SipiReceived, KVM_MP_STATE_SIPI_RECEIVED),
];

fn save_activity(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    let mp_state = vcpu
        .fd
        .get_mp_state()
        .map_err(call("KVM_GET_MP_STATE"))?
        .mp_state;
    let known = ACTIVITIES.iter().find(|(_, kvm)| *kvm == mp_state);
    state.activity = known
        .ok_or_else(|| {
            Error::Invalid(format!(
                "vCPU {} is in KVM_MP_STATE {mp_state}, which cannot be saved",
                vcpu.id
            ))
        })?
        .0;
    Ok(())
}

fn restore_activity(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let mp_state = ACTIVITIES
        .iter()
        .find(|(activity, _)| *activity == state.activity)
        .map_or(KVM_MP_STATE_RUNNABLE, |(_, kvm)| *kvm);
    vcpu.fd
        .set_mp_state(kvm_mp_state { mp_state })
        .map_err(call("KVM_SET_MP_STATE"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_activity_has_one_kvm_state() {
        use std::collections::HashSet;
        assert_eq!(
            ACTIVITIES
                .iter()
                .map(|(_, kvm)| kvm)
                .collect::<HashSet<_>>()
                .len(),
            ACTIVITIES.len()
        );
        // A new activity makes this match fail to compile; then it belongs into the table.
        for (activity, _) in ACTIVITIES {
            match activity {
                Activity::Running
                | Activity::Halted
                | Activity::Uninitialized
                | Activity::WaitForSipi
                | Activity::SipiReceived => {}
            }
        }
    }
}
