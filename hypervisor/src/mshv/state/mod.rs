//! A VP's state, saved and restored by walking the one list of its elements, as the KVM back end does.
//!
//! ```text
//!   restore: StateElement::ALL, first to last      save: last to first
//! ```
//!
//! [`codec`] is an exhaustive match: an element that is added to the list does not compile until it can be saved *and*
//! restored here. A restore that the hypervisor refuses names the element ([`Error::StateRefused`]).
//!
//! Where the neutral state and Hyper-V's cut differ:
//! - An NMI that waits is bit 2 of the local APIC's first request word, which no interrupt uses; the neutral state has it among the events.
//! - The task priority is CR8; the local APIC's state has none.
//! - "Waits for INIT" and "waits for a start-up IPI" are one state.

pub(super) mod events;
mod lapic;
pub(crate) mod msrs;
pub(crate) mod xsave;

use arch::x86_64::state::{NestedState, StateElement, VcpuState, Xcr};
use mshv_bindings::hv_register_name_HV_X64_REGISTER_XFEM as XFEM;

use super::registers::{self, Register};
use super::time;
use super::vcpu::MshvVcpu;
use crate::tsc::frequencies_agree;
use crate::{Error, Result};

type Save = fn(&MshvVcpu, &mut VcpuState) -> Result<()>;
type Restore = fn(&MshvVcpu, &VcpuState) -> Result<()>;

/// How one element is saved and restored.
struct Codec {
    save: Save,
    restore: Restore,
}

/// The codec of an element.
fn codec(element: StateElement) -> Codec {
    let (save, restore): (Save, Restore) = match element {
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
    };
    Codec { save, restore }
}

/// Reads every element.
pub(crate) fn save(vcpu: &MshvVcpu) -> Result<VcpuState> {
    let mut state = VcpuState {
        id: vcpu.id,
        ..VcpuState::default()
    };
    for element in StateElement::ALL.into_iter().rev() {
        (codec(element).save)(vcpu, &mut state)?;
    }
    Ok(state)
}

/// Writes every element.
pub(crate) fn restore(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    if state.id != vcpu.id {
        return Err(Error::Invalid(format!(
            "the state of vCPU {} cannot be restored into vCPU {}",
            state.id, vcpu.id
        )));
    }
    for element in StateElement::ALL {
        (codec(element).restore)(vcpu, state).map_err(|error| match error {
            Error::Call { operation, source } => {
                refused(vcpu, element, format!("{operation} failed: {source}"))
            }
            other => other,
        })?;
    }
    Ok(())
}

/// An element that this host cannot take.
fn refused(vcpu: &MshvVcpu, element: StateElement, reason: impl Into<String>) -> Error {
    Error::StateRefused {
        vcpu: vcpu.id,
        element: element.name(),
        reason: reason.into(),
    }
}

fn save_tsc_frequency(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    state.tsc_khz = time::tsc_khz(&vcpu.vm.fd);
    Ok(())
}

fn restore_tsc_frequency(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    let (Some(saved), Some(here)) = (state.tsc_khz, time::tsc_khz(&vcpu.vm.fd)) else {
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
