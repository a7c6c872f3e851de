//! TSC frequencies.

/// How far two TSC frequencies may be apart and still count as one, in parts per million: what an NTP client corrects
/// without stepping (the kernel's `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Whether a guest that was told `saved` kHz can live with `here` kHz.
pub(crate) fn frequencies_agree(saved: u32, here: u32) -> bool {
    u64::from(saved.abs_diff(here)) * 1_000_000 <= u64::from(saved) * TSC_TOLERANCE_PPM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tsc_tolerance_is_250_ppm_either_way() {
        assert!(frequencies_agree(2_000_000, 2_000_500));
        assert!(frequencies_agree(2_000_000, 1_999_500));
        assert!(!frequencies_agree(2_000_000, 2_000_501));
        assert!(!frequencies_agree(2_000_000, 0));
        assert!(frequencies_agree(u32::MAX, u32::MAX - 1));
    }
}
