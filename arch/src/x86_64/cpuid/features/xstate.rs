//! The parts of an XSAVE area, and the features that bring them (SDM vol. 1, sections 13.1 and 13.5; APM vol. 2, section 11.5).
//!
//! Leaf 0xd says which a CPUID has: subleaf 0 those of XCR0, subleaf 1 those of IA32_XSS. Their sizes and offsets are numbers,
//! and not here.

use super::{Feature, Place, by_name, has};
use crate::x86_64::cpuid::{Cpuid, Register};

/// A part of an XSAVE area.
#[derive(Debug, PartialEq, Eq)]
pub struct Component {
    /// Its bit in XCR0 or IA32_XSS, and its subleaf of leaf 0xd.
    pub number: u32,
    /// What it is called.
    pub name: &'static str,
    /// Which register turns it on.
    pub selector: Selector,
    /// Components without which it cannot be on. Some need one another: they go together.
    pub needs: &'static [u32],
    /// Names of the features whose state it is. One of them is enough.
    pub features: &'static [&'static str],
}

/// The register that turns a component on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Selector {
    /// XCR0: user state, which every form of XSAVE saves.
    Xcr0,
    /// IA32_XSS: supervisor state, which XSAVES alone saves.
    Xss,
}

/// In order of their numbers. APX took the room that MPX had in the standard format; no processor has both.
const COMPONENTS: &[Component] = &[
    user(0, "x87 state", &[], &["fpu"]),
    user(1, "SSE state", &[0], &["sse"]),
    user(2, "AVX state", &[1], &["avx"]),
    user(3, "MPX bounds state", &[0, 4], &["mpx"]),
    user(4, "MPX configuration state", &[0, 3], &["mpx"]),
    user(5, "AVX-512 opmask state", &[2, 6, 7], &["avx512f"]),
    user(6, "AVX-512 ZMM_Hi256 state", &[2, 5, 7], &["avx512f"]),
    user(7, "AVX-512 Hi16_ZMM state", &[2, 5, 6], &["avx512f"]),
    supervisor(8, "PT state", &["intel_pt"]),
    user(9, "PKRU state", &[0], &["pku"]),
    supervisor(10, "PASID state", &["enqcmd"]),
    supervisor(11, "CET user state", &["shstk", "ibt"]),
    supervisor(12, "CET supervisor state", &["shstk", "ibt"]),
    supervisor(13, "HDC state", &["hdc"]),
    supervisor(14, "UINTR state", &["uintr"]),
    supervisor(15, "LBR state", &["arch_lbr"]),
    supervisor(16, "HWP state", &["hwp"]),
    user(17, "AMX tile configuration state", &[0, 18], &["amx_tile"]),
    user(18, "AMX tile data state", &[0, 17], &["amx_tile"]),
    user(19, "APX registers state", &[0], &["apx"]),
    user(62, "LWP state", &[0], &["lwp"]),
];

const fn user(
    number: u32,
    name: &'static str,
    needs: &'static [u32],
    features: &'static [&'static str],
) -> Component {
    Component {
        number,
        name,
        selector: Selector::Xcr0,
        needs,
        features,
    }
}

const fn supervisor(
    number: u32,
    name: &'static str,
    features: &'static [&'static str],
) -> Component {
    Component {
        number,
        name,
        selector: Selector::Xss,
        needs: &[],
        features,
    }
}

/// All components, in order of their numbers.
pub fn all() -> impl Iterator<Item = &'static Component> {
    COMPONENTS.iter()
}

/// The component with this number.
pub fn component(number: u32) -> Option<&'static Component> {
    all().find(|component| component.number == number)
}

/// The component that a bit of leaf 0xd stands for.
pub fn at(place: Place) -> Option<&'static Component> {
    let (first, selector) = match (place.leaf, place.subleaf, place.register) {
        (0xd, 0, Register::Eax) => (0, Selector::Xcr0),
        (0xd, 0, Register::Edx) => (32, Selector::Xcr0),
        (0xd, 1, Register::Ecx) => (0, Selector::Xss),
        (0xd, 1, Register::Edx) => (32, Selector::Xss),
        _ => return None,
    };
    component(first + place.bit).filter(|component| component.selector == selector)
}

/// The components that a feature brings; those that they need come with the features that it needs.
pub fn of_feature(feature: &Feature) -> impl Iterator<Item = &'static Component> + use<> {
    let name = feature.name;
    all().filter(move |component| component.features.contains(&name))
}

/// The components of the features that a CPUID shows, as bits of XCR0 and IA32_XSS together: what leaf 0xd offers beyond them
/// is the state of nothing.
pub fn of(cpuid: &Cpuid) -> u64 {
    all()
        .filter(|component| {
            let features = component.features.iter();
            let mut known = features.filter_map(|name| by_name(name));
            known.any(|feature| has(cpuid, feature))
        })
        .fold(0, |mask, component| mask | 1 << component.number)
}
