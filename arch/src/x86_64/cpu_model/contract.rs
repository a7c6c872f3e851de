//! What a guest was told about its processor: it travels with the guest, and each destination says yes or no to it.
//!
//! ```text
//!   source: model applied to its host ──► contract ──► manifest
//!   destination: contract.refusals(what its own host offers) ──► empty, or the move is refused with the whole list
//!                      └──► the guest is made again from the contract, not from the model
//! ```
//!
//! It is checked against the destination's host, not the source's: old → new → old works as long as the guest was never shown what is new.

use serde::{Deserialize, Serialize};

use super::model::CpuModel;
use super::msrs::{bit_names, feature_msr_name, is_shown, not_carried, unkept_promises};
use crate::x86_64::bounded;
use crate::x86_64::cpuid::{
    Cpuid, Interface, MissingFeature, feature_bits, features, missing_features,
};
use crate::x86_64::state::Msr;

/// What the guest was told about its processor, not what the host has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuContract {
    /// CPUID as every vCPU was given it, before what tells one from another.
    pub cpuid: Cpuid,
    /// Its model was made for several vendors.
    pub cross_vendor: bool,
    /// Frequency of the guest's TSC in kHz, where known.
    pub tsc_khz: Option<u32>,
    /// Ticks a second of the local APIC's timer, where known.
    pub apic_timer_hz: Option<u64>,
    /// Indices of the MSRs that the guest could have used.
    #[serde(deserialize_with = "bounded::list::<_, _, 8192>")]
    pub msrs: Vec<u32>,
    /// The feature registers, as the guest reads them.
    #[serde(deserialize_with = "bounded::list::<_, _, 64>")]
    pub feature_msrs: Vec<Msr>,
}

/// What a host can give a guest that comes from elsewhere.
#[derive(Clone, Debug, Default)]
pub struct HostOffer {
    /// What it shows a guest of the same interface.
    pub cpuid: Cpuid,
    /// Its feature registers.
    pub feature_msrs: Vec<Msr>,
    /// The MSRs that it saves and restores; not looked at if there are none.
    pub msrs: Vec<u32>,
    /// Frequency of its guests' TSC in kHz, where known.
    pub tsc_khz: Option<u32>,
    /// That can be another one.
    pub tsc_scaling: bool,
    /// A guest may get a TSC of another frequency.
    pub tsc_may_change: bool,
    /// Ticks a second of the local APIC's timer, where known.
    pub apic_timer_hz: Option<u64>,
    /// That can be another one.
    pub apic_timer_adjustable: bool,
    /// The source has the same kind of hypervisor: what nobody can tell is the same there.
    pub same_hypervisor: bool,
}

/// How far two TSC frequencies may be apart and still count as one, in parts per million: what an NTP client corrects
/// without stepping (the kernel's `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Whether a guest that was told `told` kHz can live with `here` kHz.
pub fn frequencies_agree(told: u32, here: u32) -> bool {
    u64::from(told.abs_diff(here)) * 1_000_000 <= u64::from(told) * TSC_TOLERANCE_PPM
}

impl CpuContract {
    /// Which hypervisor's interface the guest sees.
    pub fn interface(&self) -> Interface {
        Interface::of(&self.cpuid)
    }

    /// Every reason why this host cannot be what the guest was told; none if it can.
    pub fn refusals(&self, host: &HostOffer) -> Vec<String> {
        let mut reasons: Vec<String> = missing_features(&self.cpuid, &host.cpuid)
            .into_iter()
            .filter(|missing| !(self.cross_vendor && missing.is_vendor()))
            .map(|missing| format!("this host's CPU lacks {missing}"))
            .collect();
        reasons.extend(self.feature_msrs.iter().filter_map(|&msr| {
            let here = host
                .feature_msrs
                .iter()
                .find(|here| here.index == msr.index)
                .map_or(0, |here| here.value);
            let bits = unkept_promises(msr, here);
            let name = feature_msr_name(msr.index).unwrap_or("a register");
            (bits != 0).then(|| {
                format!(
                    "this host's CPU lacks {} ({name}, MSR {:#x} bits {bits:#x})",
                    bit_names(msr.index, bits),
                    msr.index
                )
            })
        }));
        if !host.msrs.is_empty() {
            let lost = not_carried(&self.msrs, &self.cpuid, &host.msrs);
            reasons.extend(lost.into_iter().map(|index| {
                format!("this host's hypervisor does not carry MSR {index:#x}, which the guest could have used")
            }));
        }
        reasons.extend(self.tsc_refusal(host));
        reasons.extend(self.timer_refusal(host));
        reasons
    }

    /// Takes features out that the host listed and does not give, if the model did not ask for them by name. Returns whether any went.
    pub fn give_up(&mut self, lacking: &[MissingFeature], model: &CpuModel) -> bool {
        if !model.open {
            return false;
        }
        let mut gone = false;
        for missing in lacking {
            let (leaf, subleaf) = (missing.leaf, missing.subleaf);
            let mut bits = missing.bits & feature_bits(leaf, subleaf, missing.register);
            for number in 0..u32::BITS {
                let named = features::at(leaf, subleaf, missing.register, number);
                if named.is_some_and(|feature| model.on.contains(feature.name)) {
                    bits &= !(1 << number);
                }
            }
            if let Some(entry) = self.cpuid.get_mut(leaf, subleaf) {
                *missing.register.of_mut(entry) &= !bits;
                gone |= bits != 0;
            }
        }
        let cpuid = &self.cpuid;
        self.feature_msrs.retain(|msr| is_shown(msr.index, cpuid));
        gone
    }

    /// The frequencies of the guest's TSC and of the one that it would get here, if that is another one.
    pub fn tsc_change(&self, host: &HostOffer) -> Option<(u32, u32)> {
        let (there, here) = (self.tsc_khz?, host.tsc_khz?);
        (!host.tsc_scaling && !frequencies_agree(there, here)).then_some((there, here))
    }

    fn tsc_refusal(&self, host: &HostOffer) -> Option<String> {
        let (there, here) = self.tsc_change(host)?;
        (!host.tsc_may_change).then(|| {
            format!(
                "the guest's TSC runs at {there} kHz, this host's at {here} kHz, and it cannot be scaled here (a guest that does not \
                 tell the time by it can be let in all the same: `--allow-tsc-change`, `allow_tsc_change`)"
            )
        })
    }

    fn timer_refusal(&self, host: &HostOffer) -> Option<String> {
        match (self.apic_timer_hz, host.apic_timer_hz) {
            (Some(there), Some(here)) if there != here && !host.apic_timer_adjustable => {
                Some(format!(
                    "the guest's local APIC timer runs at {there} Hz, this host's at {here} Hz, and cannot be changed"
                ))
            }
            // On one kind of hypervisor it is the same, even if nobody can say what.
            (None, _) | (_, None) if !host.same_hypervisor => Some(
                "it is not known whether the guest's local APIC timer runs as fast as this host's"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86_64::cpuid::CpuidEntry;

    fn host() -> HostOffer {
        HostOffer {
            tsc_khz: Some(2_000_000),
            apic_timer_hz: Some(1_000_000_000),
            same_hypervisor: true,
            ..HostOffer::default()
        }
    }

    fn guest() -> CpuContract {
        CpuContract {
            tsc_khz: Some(2_000_000),
            apic_timer_hz: Some(1_000_000_000),
            ..CpuContract::default()
        }
    }

    #[test]
    fn tsc_tolerance_is_250_ppm_either_way() {
        assert!(frequencies_agree(2_000_000, 2_000_500));
        assert!(frequencies_agree(2_000_000, 1_999_500));
        assert!(!frequencies_agree(2_000_000, 2_000_501));
        assert!(!frequencies_agree(2_000_000, 0));
        assert!(frequencies_agree(u32::MAX, u32::MAX - 1));
    }

    #[test]
    fn a_frequency_is_kept_scaled_or_refused() {
        assert_eq!(guest().refusals(&host()), Vec::<String>::new());
        let slower = HostOffer {
            tsc_khz: Some(1_900_000),
            ..host()
        };
        let reasons = guest().refusals(&slower);
        assert!(
            reasons.len() == 1
                && reasons[0].contains("2000000 kHz")
                && reasons[0].contains("1900000 kHz"),
            "{reasons:?}"
        );
        for allowed in [
            HostOffer {
                tsc_scaling: true,
                ..slower.clone()
            },
            HostOffer {
                tsc_may_change: true,
                ..slower.clone()
            },
            HostOffer {
                tsc_khz: None,
                ..slower
            },
        ] {
            assert!(guest().refusals(&allowed).is_empty());
        }
    }

    #[test]
    fn a_timer_that_differs_is_refused() {
        let other = HostOffer {
            apic_timer_hz: Some(200_000_000),
            ..host()
        };
        assert!(guest().refusals(&other)[0].contains("200000000 Hz"));
        let adjustable = HostOffer {
            apic_timer_adjustable: true,
            ..other
        };
        assert!(guest().refusals(&adjustable).is_empty());
        let unknown = CpuContract {
            apic_timer_hz: None,
            ..guest()
        };
        assert!(unknown.refusals(&host()).is_empty());
        let elsewhere = HostOffer {
            same_hypervisor: false,
            ..host()
        };
        assert_eq!(unknown.refusals(&elsewhere).len(), 1);
    }

    #[test]
    fn a_register_that_the_guest_could_have_used_must_be_carried() {
        let leaf = |leaf, ecx, edx| CpuidEntry {
            leaf,
            ecx,
            edx,
            ..CpuidEntry::default()
        };
        // The guest has RDTSCP and no deadline timer.
        let told = CpuContract {
            cpuid: Cpuid {
                entries: vec![leaf(1, 0, 0), leaf(0x8000_0001, 0, 1 << 27)],
            },
            msrs: vec![0x10, 0x6e0, 0xc000_0103],
            ..guest()
        };
        let offer = |msrs: &[u32]| HostOffer {
            cpuid: told.cpuid.clone(),
            msrs: msrs.to_vec(),
            ..host()
        };
        assert!(told.refusals(&offer(&[0x10, 0xc000_0103])).is_empty());
        let reasons = told.refusals(&offer(&[0x10]));
        assert!(
            reasons.len() == 1 && reasons[0].contains("0xc0000103"),
            "{reasons:?}"
        );
    }

    #[test]
    fn promises_of_feature_registers_must_be_kept() {
        let told = CpuContract {
            feature_msrs: vec![Msr {
                index: 0x10a,
                value: 0b10_0001,
            }],
            ..guest()
        };
        let reasons = told.refusals(&host());
        assert!(
            reasons.len() == 1 && reasons[0].contains("RDCL_NO, MDS_NO"),
            "{reasons:?}"
        );
        let better = HostOffer {
            feature_msrs: vec![Msr {
                index: 0x10a,
                value: 0b11_0001,
            }],
            ..host()
        };
        assert!(told.refusals(&better).is_empty());
    }
}
