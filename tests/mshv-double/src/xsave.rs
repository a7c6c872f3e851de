//! The compacted XSAVE image of the interface, and the standard one of KVM (Intel SDM vol. 1, 13.4.2 and 13.4.3).

use kvm_bindings::kvm_cpuid_entry2;

use crate::cpuid;

/// The legacy region and the header, which both formats begin with.
const HEAD: usize = 576;
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
/// Bit 63 of XCOMP_BV: the image is compacted.
const COMPACTED: u64 = 1 << 63;

/// Where an extended state lies in either format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Component {
    state: u32,
    size: usize,
    standard: usize,
    compacted: usize,
    aligned: bool,
}

/// The layout for a set of states.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    states: u64,
    components: Vec<Component>,
    /// Bytes of the compacted image.
    pub(crate) size: usize,
}

impl Layout {
    /// Lays out `states` with the sizes and offsets that CPUID leaf 0xD tells.
    pub(crate) fn new(table: &[kvm_cpuid_entry2], states: u64) -> Self {
        let mut at = HEAD;
        let mut components = Vec::new();
        for state in (2..63).filter(|state| states >> state & 1 != 0) {
            let Some(entry) = cpuid::find(table, 0xd, state) else {
                continue;
            };
            let aligned = entry.ecx & 2 != 0;
            if aligned {
                at = at.next_multiple_of(64);
            }
            let size = entry.eax as usize;
            components.push(Component {
                state,
                size,
                standard: entry.ebx as usize,
                compacted: at,
                aligned,
            });
            at += size;
        }
        Layout {
            states,
            components,
            size: at,
        }
    }

    /// Compacts a standard image. Components in their initial state are left zero.
    pub(crate) fn compact(&self, standard: &[u8]) -> Vec<u8> {
        let mut image = vec![0; self.size];
        copy(&standard[..XSTATE_BV.min(standard.len())], &mut image);
        let present = word(standard, XSTATE_BV) & self.states;
        image[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
        image[XCOMP_BV..XCOMP_BV + 8].copy_from_slice(&(COMPACTED | self.states).to_le_bytes());
        for part in self
            .components
            .iter()
            .filter(|part| present >> part.state & 1 != 0)
        {
            if let Some(from) = standard.get(part.standard..part.standard + part.size) {
                image[part.compacted..part.compacted + part.size].copy_from_slice(from);
            }
        }
        image
    }

    /// Spreads a compacted image over a standard one; None if it is not compacted, holds states that are not offered,
    /// or is too short.
    pub(crate) fn expand(&self, image: &[u8], standard: &mut [u8]) -> Option<()> {
        if image.len() < HEAD {
            return None;
        }
        let (present, format) = (word(image, XSTATE_BV), word(image, XCOMP_BV));
        let reserved = image[XCOMP_BV + 8..HEAD].iter().any(|byte| *byte != 0);
        if format & COMPACTED == 0
            || format & !COMPACTED & !self.states != 0
            || present & !format != 0
            || reserved
        {
            return None;
        }
        standard.fill(0);
        copy(&image[..XSTATE_BV], standard);
        standard[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
        // The image may hold fewer states than are offered; then later ones move up.
        let mut at = HEAD;
        for part in self
            .components
            .iter()
            .filter(|part| format >> part.state & 1 != 0)
        {
            if part.aligned {
                at = at.next_multiple_of(64);
            }
            if present >> part.state & 1 != 0 {
                let from = image.get(at..at + part.size)?;
                standard
                    .get_mut(part.standard..part.standard + part.size)?
                    .copy_from_slice(from);
            }
            at += part.size;
        }
        Some(())
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|raw| raw.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

fn copy(from: &[u8], to: &mut [u8]) {
    let length = from.len().min(to.len());
    to[..length].copy_from_slice(&from[..length]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Vec<kvm_cpuid_entry2> {
        let part = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
            function: 0xd,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            ..Default::default()
        };
        vec![
            part(2, 256, 576, 0),
            part(5, 64, 1088, 0),
            part(6, 512, 1152, 0),
            part(9, 8, 2688, 0),
        ]
    }

    #[test]
    fn a_compacted_image_leaves_no_holes() {
        let layout = Layout::new(&table(), 0x67);
        assert_eq!(layout.size, 576 + 256 + 64 + 512);
        let mut standard = vec![0u8; 4096];
        standard[..512].fill(1);
        standard[XSTATE_BV] = 0x27;
        standard[576..832].fill(2);
        standard[1088..1152].fill(5);
        let image = layout.compact(&standard);
        assert_eq!(word(&image, XCOMP_BV), COMPACTED | 0x67);
        assert!(image[832..896].iter().all(|byte| *byte == 5));
        assert!(image[896..].iter().all(|byte| *byte == 0));
        let mut back = vec![9u8; 4096];
        layout.expand(&image, &mut back).expect("it is compacted");
        assert_eq!(back, standard);
    }

    #[test]
    fn a_standard_image_or_foreign_state_is_refused() {
        let layout = Layout::new(&table(), 7);
        let mut standard = vec![0u8; 4096];
        let mut image = layout.compact(&standard);
        image[XCOMP_BV + 7] = 0;
        assert!(layout.expand(&image, &mut standard).is_none());
        image[XCOMP_BV + 7] = 0x80;
        image[XCOMP_BV] = 0x27;
        assert!(layout.expand(&image, &mut standard).is_none());
    }
}
