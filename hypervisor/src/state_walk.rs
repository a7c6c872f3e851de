//! A vCPU's state, saved and restored by walking the one list of its elements. Each back end says how it saves and restores one.
//!
//! ```text
//!   restore: StateElement::ALL, first to last   TscFrequency ► Special ► … ► Msrs ► Nested ► Events ► Activity
//!   save:    StateElement::ALL, last to first   Activity ► Events ► Nested ► Msrs ► Lapic ► … ► TscFrequency
//! ```
//!
//! A restore that the hypervisor refuses names the element ([`Error::StateRefused`]).

use arch::x86_64::state::{StateElement, VcpuState};

use crate::{Error, Result};

/// How one element of a `V` is saved (read into the state), and how it is restored (written from it).
pub(crate) type Codec<V> = (
    fn(&V, &mut VcpuState) -> Result<()>,
    fn(&V, &VcpuState) -> Result<()>,
);

/// A vCPU of a back end.
pub(crate) trait Stateful: Sized {
    /// Its id.
    fn id(&self) -> u32;
    /// The codec of an element: an exhaustive match, so that an element which is added to the list does not compile until it can be
    /// saved *and* restored.
    fn codec(element: StateElement) -> Codec<Self>;
}

/// Reads every element.
pub(crate) fn save<V: Stateful>(vcpu: &V) -> Result<VcpuState> {
    let mut state = VcpuState {
        id: vcpu.id(),
        ..VcpuState::default()
    };
    for element in StateElement::ALL.into_iter().rev() {
        let (save, _) = V::codec(element);
        save(vcpu, &mut state)?;
    }
    Ok(state)
}

/// Writes every element.
pub(crate) fn restore<V: Stateful>(vcpu: &V, state: &VcpuState) -> Result<()> {
    if state.id != vcpu.id() {
        return Err(Error::Invalid(format!(
            "the state of vCPU {} cannot be restored into vCPU {}",
            state.id,
            vcpu.id()
        )));
    }
    for element in StateElement::ALL {
        let (_, restore) = V::codec(element);
        restore(vcpu, state).map_err(|error| match error {
            Error::Call { operation, source } => {
                refused(vcpu, element, format!("{operation} failed: {source}"))
            }
            other => other,
        })?;
    }
    Ok(())
}

/// An element that this host cannot take.
pub(crate) fn refused<V: Stateful>(
    vcpu: &V,
    element: StateElement,
    reason: impl Into<String>,
) -> Error {
    Error::StateRefused {
        vcpu: vcpu.id(),
        element: element.name(),
        reason: reason.into(),
    }
}
