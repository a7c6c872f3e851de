//! The XSAVE area: FPU, SSE, AVX and what came later.
//!
//! ```text
//!   0          512                    576                             host size
//!   ├─ legacy ─┼─ header: XSTATE_BV ──┼─ components, each at the place CPUID.0DH gives it ─┤
//!              │          XCOMP_BV = 0 (standard format)
//! ```
//!
//! Hosts differ in how large the area is. A shorter one is filled up with zeros, which the header says are not in use. From a
//! longer one only what this host has components for may be in use; then the rest is cut off.

use arch::x86_64::state::{Bytes, StateElement, VcpuState};

use super::refused;
use crate::Result;
use crate::kvm::vcpu::KvmVcpu;
use crate::kvm::{call, cpuid, ioctl};
use crate::xsave::fit;

pub(super) fn save(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    let area =
        ioctl::get_xsave(&vcpu.fd, vcpu.vm.host.xsave_size).map_err(call("KVM_GET_XSAVE2"))?;
    state.xsave = Some(Bytes(area));
    Ok(())
}

pub(super) fn restore(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let Some(area) = &state.xsave else {
        return Ok(());
    };
    let host = &vcpu.vm.host;
    let components = cpuid::xstate_components(host.supported_cpuid()?);
    let fitted = fit(&area.0, host.xsave_size, components)
        .map_err(|reason| refused(vcpu, StateElement::Xsave, reason))?;
    ioctl::set_xsave(&vcpu.fd, host.xsave_size, &fitted).map_err(call("KVM_SET_XSAVE"))
}
