//! XSAVE areas: what this host can take, and the two formats.
//!
//! ```text
//!   standard    each component at the offset that CPUID.0DH gives it        XCOMP_BV = 0
//!   compacted   those of XCOMP_BV one behind the other, some of them        XCOMP_BV bit 63
//!               aligned to 64 bytes
//! ```
//!
//! A saved state holds the standard format: it can be read without knowing which components the saving host had. SDM vol. 1, section
//! 13.4.

use arch::x86_64::cpuid::Cpuid;

use crate::emulator::XsaveComponent;

/// End of the legacy region, where the header begins (SDM vol. 1, section 13.4.1).
const HEADER: usize = 512;
/// End of the header.
pub(crate) const HEADER_END: usize = 576;
/// Bit 63 of XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;
/// MXCSR in the legacy region, its value after reset, and that of the x87 control word at 0.
const MXCSR: usize = 24;
const MXCSR_RESET: u32 = 0x1f80;
const FCW_RESET: u16 = 0x37f;
/// x87 and SSE, which are in the legacy region.
const LEGACY: u64 = 0b11;

/// The area in this host's size, or why it cannot be taken. `components` is a mask of what the host has.
pub(crate) fn fit(area: &[u8], host_size: usize, components: u64) -> Result<Vec<u8>, String> {
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

/// Where a component lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    component: u32,
    size: usize,
    standard: usize,
    /// Bit 1 of ECX: aligned to 64 bytes in the compacted format.
    aligned: bool,
}

/// Sizes and offsets of the extended components, from CPUID.0DH.
pub(crate) struct Layout(Vec<Place>);

impl Layout {
    /// The layout on the host with this CPUID.
    pub(crate) fn of(cpuid: &Cpuid) -> Self {
        let places = (2..63).filter_map(|component| {
            let entry = cpuid.get(0xd, component)?;
            (entry.eax != 0).then_some(Place {
                component,
                size: entry.eax as usize,
                standard: entry.ebx as usize,
                aligned: entry.ecx & 0b10 != 0,
            })
        });
        Self(places.collect())
    }

    /// Bytes of a standard area with every component.
    fn standard_size(&self) -> usize {
        let ends = self.0.iter().map(|place| place.standard + place.size);
        ends.max().unwrap_or(0).max(HEADER_END)
    }

    /// The offsets of `components` in the compacted format.
    fn compacted(&self, components: u64) -> impl Iterator<Item = (Place, usize)> + '_ {
        let mut at = HEADER_END;
        self.0
            .iter()
            .filter(move |place| components >> place.component & 1 != 0)
            .map(move |&place| {
                if place.aligned {
                    at = at.next_multiple_of(64);
                }
                let here = at;
                at += place.size;
                (place, here)
            })
    }

    /// The standard format of an area in either. Supervisor components (offset 0 in the standard format) have no place in it.
    pub(crate) fn standard(&self, area: &[u8]) -> Result<Vec<u8>, String> {
        let (Some(in_use), Some(compaction)) = (word(area, HEADER), word(area, HEADER + 8)) else {
            return Err(format!("an area of {} bytes has no header", area.len()));
        };
        if compaction & COMPACTED == 0 {
            return Ok(area.to_vec());
        }
        let mut standard = vec![0; self.standard_size()];
        let legacy = area
            .get(..HEADER)
            .ok_or_else(|| "the area has no legacy region".to_owned())?;
        standard[..HEADER].copy_from_slice(legacy);
        // What is not in use need not have been written (SDM vol. 1, section 13.10), and MXCSR is loaded with AVX too.
        if in_use & 1 == 0 {
            standard[..2].copy_from_slice(&FCW_RESET.to_le_bytes());
        }
        if in_use >> 1 & 1 == 0 {
            standard[MXCSR..MXCSR + 4].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        }
        let mut kept = in_use & LEGACY;
        for (place, at) in self.compacted(compaction) {
            if in_use >> place.component & 1 == 0 {
                continue;
            }
            if place.standard < HEADER_END {
                return Err(format!(
                    "supervisor component {} is in use and has no place in the standard format",
                    place.component
                ));
            }
            let from = area
                .get(at..at + place.size)
                .ok_or_else(|| format!("component {} lies outside the area", place.component))?;
            standard[place.standard..place.standard + place.size].copy_from_slice(from);
            kept |= 1 << place.component;
        }
        if kept != in_use {
            return Err(format!(
                "the components {} are in use and not described by CPUID",
                bits(in_use & !kept)
            ));
        }
        standard[HEADER..HEADER + 8].copy_from_slice(&in_use.to_le_bytes());
        Ok(standard)
    }

    /// Where a component lies, for the emulator.
    pub(crate) fn component(&self, component: u32) -> Option<XsaveComponent> {
        let place = self.0.iter().find(|place| place.component == component)?;
        Some(XsaveComponent {
            offset: u32::try_from(place.standard).ok()?,
            bytes: u32::try_from(place.size).ok()?,
            aligned: place.aligned,
        })
    }

    /// A standard area in the format, and of the size, of `like`, an area of the VP that is to take it.
    pub(crate) fn in_format_of(&self, area: &[u8], like: &[u8]) -> Result<Vec<u8>, String> {
        let components = self
            .0
            .iter()
            .fold(LEGACY, |mask, place| mask | 1 << place.component);
        let fitted = fit(area, like.len().max(self.standard_size()), components)?;
        let compaction = word(like, HEADER + 8).unwrap_or(0);
        if compaction & COMPACTED == 0 {
            if fitted.len() > like.len() && fitted[like.len()..].iter().any(|&byte| byte != 0) {
                return Err(format!("the area has no room for it: {} bytes", like.len()));
            }
            let mut fitted = fitted;
            fitted.truncate(like.len());
            return Ok(fitted);
        }
        let mut in_use = word(&fitted, HEADER).unwrap_or(0);
        // In the standard format MXCSR is loaded with SSE or AVX, in this one with SSE alone.
        if in_use & 0b110 != 0 && fitted[MXCSR..MXCSR + 4] != MXCSR_RESET.to_le_bytes() {
            in_use |= 1 << 1;
        }
        let lacking = in_use & !(compaction | LEGACY);
        if lacking != 0 {
            return Err(format!(
                "this host's area lacks the components {}, which are in use",
                bits(lacking)
            ));
        }
        let mut compacted = vec![0; like.len()];
        let room = |range: std::ops::Range<usize>| {
            format!(
                "the area has no room for bytes {range:?}: {} bytes",
                like.len()
            )
        };
        compacted
            .get_mut(..HEADER)
            .ok_or_else(|| room(0..HEADER))?
            .copy_from_slice(&fitted[..HEADER]);
        for (place, at) in self.compacted(compaction) {
            if in_use >> place.component & 1 == 0 || place.standard < HEADER_END {
                continue;
            }
            compacted
                .get_mut(at..at + place.size)
                .ok_or_else(|| room(at..at + place.size))?
                .copy_from_slice(&fitted[place.standard..place.standard + place.size]);
        }
        let mut put = |at: usize, value: u64| {
            if let Some(to) = compacted.get_mut(at..at + 8) {
                to.copy_from_slice(&value.to_le_bytes());
            }
        };
        put(HEADER, in_use);
        put(HEADER + 8, compaction);
        Ok(compacted)
    }
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

    fn layout() -> Layout {
        let place = |component, size, standard, aligned| Place {
            component,
            size,
            standard,
            aligned,
        };
        // AVX, then an unaligned one of 8 bytes, then an aligned one.
        Layout(vec![
            place(2, 256, 576, false),
            place(5, 8, 1088, false),
            place(6, 128, 1152, true),
        ])
    }

    #[test]
    fn compacted_and_back_keeps_every_component() {
        let mut standard = area(layout().standard_size(), LEGACY | 1 << 5 | 1 << 6);
        // What is not in use does not travel.
        standard[576..832].fill(0);
        standard[832..1088].fill(0);
        standard[1096..1152].fill(0);
        let mut like = vec![0; 4096];
        like[HEADER + 8..HEADER + 16]
            .copy_from_slice(&(COMPACTED | LEGACY | 1 << 5 | 1 << 6).to_le_bytes());
        let compacted = layout().in_format_of(&standard, &like).expect("compacts");
        assert_eq!(compacted.len(), 4096);
        assert_eq!(compacted[576..584], standard[1088..1096]);
        assert_eq!(compacted[640..768], standard[1152..1280]);
        assert_eq!(layout().standard(&compacted).expect("back"), standard);
    }

    #[test]
    fn a_component_without_a_place_is_refused() {
        let mut like = vec![0; 4096];
        like[HEADER + 8..HEADER + 16].copy_from_slice(&(COMPACTED | LEGACY).to_le_bytes());
        let standard = area(layout().standard_size(), LEGACY | 1 << 2);
        let reason = layout().in_format_of(&standard, &like).expect_err("AVX");
        assert!(reason.contains("2 (AVX)"), "{reason}");
        let mut unknown = vec![0; 4096];
        unknown[HEADER..HEADER + 8].copy_from_slice(&(1u64 << 9).to_le_bytes());
        unknown[HEADER + 8..HEADER + 16].copy_from_slice(&(COMPACTED | 1 << 9).to_le_bytes());
        assert!(layout().standard(&unknown).is_err());
        assert!(layout().standard(&[0; 100]).is_err());
    }
}
