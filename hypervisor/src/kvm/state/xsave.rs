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

/// End of the legacy region, where the header begins (SDM vol. 1, section 13.4.1).
const HEADER: usize = 512;
/// End of the header.
const HEADER_END: usize = 576;

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

/// The area in this host's size, or why it cannot be taken. `components` is a mask of what the host has.
fn fit(area: &[u8], host_size: usize, components: u64) -> std::result::Result<Vec<u8>, String> {
    let (Some(in_use), Some(compaction)) = (word(area, HEADER), word(area, HEADER + 8)) else {
        return Err(format!("an area of {} bytes has no header", area.len()));
    };
    if area.len() < HEADER_END {
        return Err(format!(
            "an area of {} bytes has no full header",
            area.len()
        ));
    }
    if compaction != 0 {
        return Err("the area is in the compacted format".to_owned());
    }
    let lacking = in_use & !components;
    if lacking != 0 {
        return Err(format!(
            "this host lacks the XSTATE components {}, which are in use",
            bits(lacking)
        ));
    }
    let mut fitted = area[..area.len().min(host_size)].to_vec();
    fitted.resize(host_size, 0);
    Ok(fitted)
}

fn word(area: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(area.get(at..at + 8)?.try_into().ok()?))
}

/// "5 (opmask), 18 (tile data)".
fn bits(mask: u64) -> String {
    let name = |bit: u32| match bit {
        0 => "x87",
        1 => "SSE",
        2 => "AVX",
        3 => "BNDREGS",
        4 => "BNDCSR",
        5 => "opmask",
        6 => "ZMM_Hi256",
        7 => "Hi16_ZMM",
        9 => "PKRU",
        17 => "tile configuration",
        18 => "tile data",
        19 => "APX",
        _ => "unknown",
    };
    let listed: Vec<_> = (0..u64::BITS)
        .filter(|&bit| mask >> bit & 1 != 0)
        .map(|bit| format!("{bit} ({})", name(bit)))
        .collect();
    listed.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn area(len: usize, in_use: u64) -> Vec<u8> {
        let mut area: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        if len >= HEADER_END {
            area[HEADER..HEADER_END].fill(0);
            area[HEADER..HEADER + 8].copy_from_slice(&in_use.to_le_bytes());
        }
        area
    }

    #[test]
    fn a_shorter_area_is_filled_up_and_a_longer_one_cut() {
        let short = fit(&area(832, 0b111), 4096, 0b111).expect("fits");
        assert_eq!((short.len(), &short[..832]), (4096, &area(832, 0b111)[..]));
        assert!(short[832..].iter().all(|&b| b == 0));
        let long = fit(&area(11_008, 0b111), 4096, 0b111).expect("the tail is not in use");
        assert_eq!(long, area(11_008, 0b111)[..4096]);
    }

    #[test]
    fn components_in_use_that_the_host_lacks_are_refused_by_name() {
        let reason =
            fit(&area(11_008, 0b111 | 1 << 18), 4096, 0b111).expect_err("tile data is in use");
        assert!(reason.contains("18 (tile data)"), "{reason}");
    }

    #[test]
    fn compacted_and_truncated_areas_are_refused() {
        let mut compacted = area(4096, 1);
        compacted[HEADER + 15] = 0x80;
        assert!(fit(&compacted, 4096, 0b111).is_err());
        for len in [0, 1, 512, 519, 527, 528, 575] {
            assert!(fit(&area(len, 0), 4096, 0b111).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn there_and_back_keeps_what_is_in_use(len in HEADER_END..12_000, host in 4096usize..12_000) {
            let from = area(len, 0b11);
            let there = fit(&from, host, 0b111).expect("only x87 and SSE are in use");
            prop_assert_eq!(there.len(), host);
            let back = fit(&there, len, 0b111).expect("still");
            let kept = len.min(host);
            prop_assert_eq!(&back[..kept], &from[..kept]);
        }
    }
}
