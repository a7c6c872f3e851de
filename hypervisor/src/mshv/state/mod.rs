//! How the Microsoft hypervisor saves and restores each element of a VP's state. [`crate::state_walk`] walks their list.
//!
//! Where the neutral state and Hyper-V's cut differ:
//! - An NMI that waits is bit 2 of the local APIC's first request word, which no interrupt uses; the neutral state has it among the events.
//! - The task priority is CR8; the local APIC's state has none.
//! - "Waits for INIT" and "waits for a start-up IPI" are one state.

pub(super) mod events;
mod lapic;
pub(crate) mod msrs;
pub(crate) mod xsave;

use arch::x86_64::cpu_model::frequencies_agree;
use arch::x86_64::state::{NestedState, StateElement, VcpuState, Xcr};
use mshv_bindings::hv_register_name_HV_X64_REGISTER_XFEM as XFEM;

use super::registers::{self, Register};
use super::vcpu::MshvVcpu;
use crate::state_walk::{Codec, Stateful, refused};
pub(crate) use crate::state_walk::{restore, save};
use crate::{Result, Vcpu};

impl Stateful for MshvVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn codec(element: StateElement) -> Codec<Self> {
        match element {
            StateElement::TscFrequency => (save_tsc_frequency, restore_tsc_frequency),
            StateElement::Special => (save_special, restore_special),
            StateElement::General => (save_general, restore_general),
            StateElement::Xcrs => (save_xcrs, restore_xcrs),
            StateElement::Xsave => (xsave::save, xsave::restore),
            StateElement::Debug => (save_debug, restore_debug),
            StateElement::Lapic => (lapic::save, lapic::restore),
            StateElement::Msrs => (msrs::save, msrs::restore),
            StateElement::Nested => (save_nested, restore_nested),
            StateElement::Events => (events::save, events::restore),
            StateElement::Activity => (events::save_activity, events::restore_activity),
        }
    }
}

fn save_tsc_frequency(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    state.tsc_khz = vcpu.tsc_khz();
    Ok(())
}

fn restore_tsc_frequency(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    let (Some(saved), Some(here)) = (state.tsc_khz, vcpu.tsc_khz()) else {
        return Ok(());
    };
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

fn save_special(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    state.special = registers::special(&vcpu.fd)?;
    Ok(())
}

fn restore_special(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    registers::set_special(&vcpu.fd, &state.special)
}

fn save_general(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    state.general = registers::general(&vcpu.fd)?;
    Ok(())
}

fn restore_general(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    registers::set_general(&vcpu.fd, &state.general)
}

fn save_debug(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    state.debug = Some(registers::debug(&vcpu.fd)?);
    Ok(())
}

fn restore_debug(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    match &state.debug {
        Some(debug) => registers::set_debug(&vcpu.fd, debug),
        None => Ok(()),
    }
}

fn save_xcrs(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    let [[value, _]] = registers::read_array(&vcpu.fd, &[XFEM])?;
    state.xcrs = Some(vec![Xcr { index: 0, value }]);
    Ok(())
}

fn restore_xcrs(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    for xcr in state.xcrs.iter().flatten() {
        if xcr.index != 0 {
            return Err(refused(
                vcpu,
                StateElement::Xcrs,
                format!("there is no XCR{} here", xcr.index),
            ));
        }
        registers::write(&vcpu.fd, &[Register::new(XFEM, xcr.value)])?;
    }
    Ok(())
}

/// Nested virtualisation is not offered here: [`crate::Capabilities::nested_state`].
fn save_nested(_vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    state.nested = None;
    Ok(())
}

fn restore_nested(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    match &state.nested {
        None => Ok(()),
        Some(NestedState { format, .. }) => Err(refused(
            vcpu,
            StateElement::Nested,
            format!("this hypervisor cannot take nested state ({format:?})"),
        )),
    }
}
