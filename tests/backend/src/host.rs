//! What kind of machine this runs on, where that decides what a guest can show.

use std::arch::x86_64::__cpuid;
use std::path::Path;

/// Whether this processor is QEMU's emulator (TCG): hypervisor leaf 0x4000_0000 says so.
pub(crate) fn is_emulated() -> bool {
    let leaf = __cpuid(0x4000_0000);
    is_guest()
        && [leaf.ebx, leaf.ecx, leaf.edx]
            .map(u32::to_le_bytes)
            .concat()
            == b"TCGTCGTCGTCG"
}

/// Whether guests run on a KVM without hardware virtualisation, which interprets ring 0 and shows ring 3 the host's CPUID.
pub(crate) fn interprets_ring_0() -> bool {
    let vmx = __cpuid(1).ecx & 1 << 5 != 0;
    let svm = __cpuid(0x8000_0001).ecx & 1 << 2 != 0;
    Path::new("/dev/kvm").exists() && !vmx && !svm
}

/// CPUID.1:ECX, "running under a hypervisor".
fn is_guest() -> bool {
    __cpuid(1).ecx & 1 << 31 != 0
}
