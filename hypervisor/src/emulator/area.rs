//! Vector registers in an XSAVE area of the standard format, which is how hypervisors hand them over.

use super::platform::VectorRegisters;

/// Offsets in the area (SDM vol. 1, sections 13.4.1 to 13.5.3): MXCSR, XMM0, XSTATE_BV, and the upper halves of
/// the YMM registers, which every processor has at the same place.
const MXCSR: usize = 24;
const XMM: usize = 160;
const XSTATE_BV: usize = 512;
const YMM_UPPER: usize = 576;
const REGISTER_BYTES: usize = 16;
/// Bits of XSTATE_BV.
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
/// Initial MXCSR.
const INITIAL_MXCSR: u32 = 0x1f80;

fn lanes(area: &[u8], at: usize) -> Option<[u128; 16]> {
    let mut lanes = [0; 16];
    let bytes = area.get(at..at + 16 * REGISTER_BYTES)?;
    for (lane, chunk) in lanes.iter_mut().zip(bytes.chunks_exact(REGISTER_BYTES)) {
        *lane = u128::from_le_bytes(chunk.try_into().ok()?);
    }
    Some(lanes)
}

fn set_lanes(area: &mut [u8], at: usize, lanes: &[u128; 16]) -> Option<()> {
    let bytes = area.get_mut(at..at + 16 * REGISTER_BYTES)?;
    for (lane, chunk) in lanes.iter().zip(bytes.chunks_exact_mut(REGISTER_BYTES)) {
        chunk.copy_from_slice(&lane.to_le_bytes());
    }
    Some(())
}

impl VectorRegisters {
    /// Reads the registers from an area; with `avx` also their upper halves. A component that XSTATE_BV says is not in
    /// use reads as its initial state. `None` if the area is too short.
    pub fn from_xsave_area(area: &[u8], avx: bool) -> Option<Self> {
        let in_use = u64::from_le_bytes(area.get(XSTATE_BV..XSTATE_BV + 8)?.try_into().ok()?);
        let mxcsr = u32::from_le_bytes(area.get(MXCSR..MXCSR + 4)?.try_into().ok()?);
        let used = |bit: u64, at: usize| match in_use & bit {
            0 => Some([0; 16]),
            _ => lanes(area, at),
        };
        Some(Self {
            xmm: used(SSE, XMM)?,
            upper: if avx {
                Some(used(AVX, YMM_UPPER)?)
            } else {
                None
            },
            // MXCSR belongs to both components.
            mxcsr: if in_use & (SSE | AVX) != 0 {
                mxcsr
            } else {
                INITIAL_MXCSR
            },
            zero_above: 0,
        })
    }

    /// Writes the registers to an area and marks the components as in use. `zmm_upper` is the offset of component 6 (bits 511:256
    /// of ZMM0 to ZMM15; CPUID 0DH, sub-leaf 6, EBX), whose registers in `zero_above` become zero. `None`, with the
    /// area half written, if it is too short.
    pub fn to_xsave_area(&self, area: &mut [u8], zmm_upper: Option<usize>) -> Option<()> {
        let header = area.get(XSTATE_BV..XSTATE_BV + 8)?;
        let mut in_use = u64::from_le_bytes(header.try_into().ok()?);
        set_lanes(area, XMM, &self.xmm)?;
        in_use |= SSE;
        area.get_mut(MXCSR..MXCSR + 4)?
            .copy_from_slice(&self.mxcsr.to_le_bytes());
        if let Some(upper) = &self.upper {
            set_lanes(area, YMM_UPPER, upper)?;
            in_use |= AVX;
        }
        if let Some(base) = zmm_upper {
            for index in (0..16).filter(|index| self.zero_above >> index & 1 != 0) {
                let at = base.checked_add(2 * REGISTER_BYTES * index)?;
                area.get_mut(at..at.checked_add(2 * REGISTER_BYTES)?)?
                    .fill(0);
            }
        }
        area.get_mut(XSTATE_BV..XSTATE_BV + 8)?
            .copy_from_slice(&in_use.to_le_bytes());
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> VectorRegisters {
        let mut registers = VectorRegisters {
            mxcsr: 0x9fc0,
            ..VectorRegisters::default()
        };
        let mut upper = [0; 16];
        for (index, (xmm, upper)) in registers.xmm.iter_mut().zip(&mut upper).enumerate() {
            *xmm = 0x1111_0000 + index as u128;
            *upper = 0x2222_0000 + index as u128;
        }
        registers.upper = Some(upper);
        registers
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut area = vec![0; 2048];
        registers()
            .to_xsave_area(&mut area, None)
            .expect("long enough");
        let found = VectorRegisters::from_xsave_area(&area, true);
        assert_eq!(found, Some(registers()));
        let narrow = VectorRegisters::from_xsave_area(&area, false).expect("long enough");
        assert_eq!((narrow.xmm, narrow.upper), (registers().xmm, None));
        assert_eq!(area[160 + 5 * 16], 5);
        assert_eq!(area[576 + 5 * 16], 5);
        assert_eq!(area[512], 6);
    }

    #[test]
    fn components_not_in_use_read_as_initial() {
        let mut area = vec![0xee; 1024];
        area[512..520].fill(0);
        let found = VectorRegisters::from_xsave_area(&area, true).expect("long enough");
        assert_eq!((found.xmm, found.upper), ([0; 16], Some([0; 16])));
        assert_eq!(found.mxcsr, 0x1f80);
    }

    #[test]
    fn vex_writes_clear_what_is_above() {
        let mut area = vec![0xee; 2048];
        let mut registers = registers();
        registers.zero_above = 1 << 3;
        registers
            .to_xsave_area(&mut area, Some(1152))
            .expect("long enough");
        let third = 1152 + 3 * 32;
        assert!(area[third..third + 32].iter().all(|byte| *byte == 0));
        assert!(area[third - 1] == 0xee && area[third + 32] == 0xee);
    }

    #[test]
    fn short_areas_are_refused() {
        for bytes in [0, 24, 512, 575, 800] {
            let mut area = vec![0xff; bytes];
            assert_eq!(VectorRegisters::from_xsave_area(&area, true), None);
            assert_eq!(registers().to_xsave_area(&mut area, None), None);
        }
    }
}
