//! The state of a guest's own guests: opaque, KVM's format, and only where it is really in use.

use arch::x86_64::state::{Bytes, NestedFormat, NestedState, StateElement, VcpuState};
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GIF_SET,
};

use super::refused;
use crate::Result;
use crate::kvm::vcpu::KvmVcpu;
use crate::kvm::{call, ioctl};

pub(super) fn save(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    let max = vcpu.vm.host.nested_size;
    if !vcpu.nests || max == 0 {
        return Ok(());
    }
    match ioctl::get_nested_state(&vcpu.fd, max) {
        Ok(data) => state.nested = from_kvm(data),
        // A KVM that reports the capability without having it lets no guest enter VMX or SVM operation.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {}
        Err(error) => return Err(call("KVM_GET_NESTED_STATE")(error)),
    }
    Ok(())
}

pub(super) fn restore(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    let Some(nested) = &state.nested else {
        return Ok(());
    };
    let refuse = |reason: String| Err(refused(vcpu, StateElement::Nested, reason));
    let max = vcpu.vm.host.nested_size;
    let data = &nested.data.0;
    if max == 0 {
        return refuse(
            "the guest runs guests of its own and this host has no nested virtualisation"
                .to_owned(),
        );
    }
    if data.len() > max || ioctl::nested_format(data) != Some(kvm_format(nested.format)) {
        return refuse(format!(
            "its {} bytes are not a nested state that this host knows",
            data.len()
        ));
    }
    ioctl::set_nested_state(&vcpu.fd, data).map_err(call("KVM_SET_NESTED_STATE"))
}

fn kvm_format(format: NestedFormat) -> u16 {
    match format {
        NestedFormat::KvmVmx => KVM_STATE_NESTED_FORMAT_VMX as u16,
        NestedFormat::KvmSvm => KVM_STATE_NESTED_FORMAT_SVM as u16,
    }
}

/// `None` for a vCPU that is as after its reset: nothing to carry, so a host without nesting can take it.
fn from_kvm(data: Vec<u8>) -> Option<NestedState> {
    let format = [NestedFormat::KvmVmx, NestedFormat::KvmSvm]
        .into_iter()
        .find(|&format| ioctl::nested_format(&data) == Some(kvm_format(format)))?;
    let flags = u16::from_ne_bytes([data[0], data[1]]);
    let header_only = data.len() == ioctl::NESTED_HEADER;
    let unused = match format {
        // `vmxon_pa` follows the 8 bytes of flags, format and size; all ones means "not in VMX operation".
        NestedFormat::KvmVmx => flags == 0 && data[8..16] == [0xff; 8],
        NestedFormat::KvmSvm => u32::from(flags) == KVM_STATE_NESTED_GIF_SET,
    };
    (!(header_only && unused)).then_some(NestedState {
        format,
        data: Bytes(data),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u16, format: NestedFormat, size: u32) -> Vec<u8> {
        let mut data = vec![0; size as usize];
        data[..2].copy_from_slice(&flags.to_ne_bytes());
        data[2..4].copy_from_slice(&kvm_format(format).to_ne_bytes());
        data[4..8].copy_from_slice(&size.to_ne_bytes());
        data
    }

    #[test]
    fn a_vcpu_that_never_nested_carries_nothing() {
        let mut vmx = header(0, NestedFormat::KvmVmx, 128);
        vmx[8..16].fill(0xff);
        assert_eq!(from_kvm(vmx.clone()), None);
        vmx[8..16].fill(0);
        assert_eq!(from_kvm(vmx).map(|n| n.format), Some(NestedFormat::KvmVmx));
        assert_eq!(from_kvm(header(0x100, NestedFormat::KvmSvm, 128)), None);
        assert!(
            from_kvm(header(0, NestedFormat::KvmSvm, 128)).is_some(),
            "GIF is clear: SVM is in use"
        );
        assert!(from_kvm(header(0x101, NestedFormat::KvmSvm, 4224)).is_some());
    }

    #[test]
    fn a_size_field_that_lies_is_no_nested_state() {
        let mut data = header(0, NestedFormat::KvmVmx, 256);
        data[4..8].copy_from_slice(&8192u32.to_ne_bytes());
        assert_eq!(ioctl::nested_format(&data), None);
        assert_eq!(ioctl::nested_format(&[]), None);
    }
}
