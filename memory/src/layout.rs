//! Where RAM lies in the guest-physical address space.
//!
//! ```text
//!   0 ── low RAM ── 0xc000_0000 ── no RAM: MMIO ── 0x1_0000_0000 ── high RAM ── next multiple of 2 GiB ── what can be plugged ──►
//! ```

use serde::{Deserialize, Serialize};

use crate::{Error, PAGE_SIZE};

/// Start of the window below 4 GiB that holds no RAM.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// End of that window.
pub const MMIO_HOLE_END: u64 = 1 << 32;
/// Most RAM a guest can be given: 16 TiB, which leaves room in the 46 physical address bits that the smallest
/// server processors have.
pub const MAX_RAM: u64 = 1 << 44;

/// What the size of memory that can be plugged must be a multiple of: Linux on x86 adds memory in blocks of at least this size
/// (`SECTION_SIZE_BITS`).
pub const HOTPLUG_UNIT: u64 = 128 << 20;
/// What its address must be a multiple of: the largest such block (`MAX_BLOCK_SIZE` in Linux `arch/x86/mm/init_64.c`). A guest with more than
/// 64 GiB may use those, and what does not begin at one is lost to it.
const HOTPLUG_ALIGNMENT: u64 = 2 << 30;

/// A range of guest-physical addresses that is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RamRange {
    /// First guest-physical address, page aligned.
    pub gpa: u64,
    /// Length in bytes, page aligned, not zero.
    pub len: u64,
}

impl RamRange {
    /// The address after the last byte, or `None` when it does not fit 64 bits.
    pub fn end(&self) -> Option<u64> {
        self.gpa.checked_add(self.len)
    }
}

/// The RAM ranges of a guest with `size` bytes of memory, lowest first.
pub fn ram_ranges(size: u64) -> Result<Vec<RamRange>, Error> {
    let refuse = |reason| Err(Error::Size { size, reason });
    if size == 0 {
        return refuse("it must not be zero");
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return refuse("it must be a multiple of 4096 bytes");
    }
    if size > MAX_RAM {
        return refuse("the most is 16 TiB");
    }
    let low = size.min(MMIO_HOLE_START);
    let mut ranges = vec![RamRange { gpa: 0, len: low }];
    if size > low {
        ranges.push(RamRange {
            gpa: MMIO_HOLE_END,
            len: size - low,
        });
    }
    Ok(ranges)
}

/// Where memory lies that can be plugged into a guest with `size` bytes of RAM, `plug` bytes at most: above 4 GiB and all RAM.
pub fn hotplug_range(size: u64, plug: u64) -> Result<RamRange, Error> {
    let refuse = |reason| Err(Error::Size { size: plug, reason });
    if plug == 0 || !plug.is_multiple_of(HOTPLUG_UNIT) {
        return refuse("memory that can be plugged must be a multiple of 128 MiB");
    }
    if size.checked_add(plug).is_none_or(|all| all > MAX_RAM) {
        return refuse("with the guest's RAM the most is 16 TiB");
    }
    let end = ram_ranges(size)?.last().and_then(RamRange::end);
    Ok(RamRange {
        gpa: end
            .unwrap_or_default()
            .max(MMIO_HOLE_END)
            .next_multiple_of(HOTPLUG_ALIGNMENT),
        len: plug,
    })
}

/// Checks that ranges are page aligned, not empty, in rising order and apart from each other.
pub(crate) fn check_ranges(ranges: &[RamRange]) -> Result<u64, Error> {
    if ranges.is_empty() {
        return Err(Error::Size {
            size: 0,
            reason: "there must be at least one RAM range",
        });
    }
    let mut total = 0u64;
    let mut previous_end = 0;
    for range in ranges {
        let refuse = |reason| {
            Err(Error::Range {
                gpa: range.gpa,
                len: range.len,
                reason,
            })
        };
        if range.len == 0 {
            return refuse("it is empty");
        }
        if !range.gpa.is_multiple_of(PAGE_SIZE) || !range.len.is_multiple_of(PAGE_SIZE) {
            return refuse("address and length must be multiples of 4096");
        }
        let Some(end) = range.end().filter(|end| *end <= 1 << 52) else {
            return refuse("it ends beyond the 52 physical address bits of x86_64");
        };
        if range.gpa < previous_end {
            return refuse("it overlaps the range before, or the ranges are not in rising order");
        }
        previous_end = end;
        total += range.len;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_around_the_hole() {
        let cases: [(u64, &[(u64, u64)]); 4] = [
            (PAGE_SIZE, &[(0, PAGE_SIZE)]),
            (MMIO_HOLE_START, &[(0, MMIO_HOLE_START)]),
            (
                MMIO_HOLE_START + PAGE_SIZE,
                &[(0, MMIO_HOLE_START), (MMIO_HOLE_END, PAGE_SIZE)],
            ),
            (
                MAX_RAM,
                &[
                    (0, MMIO_HOLE_START),
                    (MMIO_HOLE_END, MAX_RAM - MMIO_HOLE_START),
                ],
            ),
        ];
        for (size, expected) in cases {
            let ranges: Vec<_> = ram_ranges(size)
                .expect("valid size")
                .iter()
                .map(|r| (r.gpa, r.len))
                .collect();
            assert_eq!(ranges, expected, "{size:#x}");
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 1, PAGE_SIZE + 1, MAX_RAM + PAGE_SIZE, u64::MAX] {
            assert!(ram_ranges(size).is_err(), "{size:#x}");
        }
    }

    #[test]
    fn what_can_be_plugged_is_above_everything_else() {
        let gib = 1 << 30;
        for (size, gpa) in [
            (256 << 20, 4 * gib),
            (3 * gib, 4 * gib),
            (3 * gib + PAGE_SIZE, 6 * gib),
            (5 * gib, 6 * gib),
            (64 * gib, 66 * gib),
        ] {
            let range = hotplug_range(size, gib).expect("valid sizes");
            assert_eq!((range.gpa, range.len), (gpa, gib), "{size:#x}");
        }
        for (size, plug) in [
            (gib, 0),
            (gib, 64 << 20),
            (gib, gib + PAGE_SIZE),
            (gib, MAX_RAM),
            (0, gib),
            (gib, !(HOTPLUG_UNIT - 1)),
        ] {
            assert!(hotplug_range(size, plug).is_err(), "{size:#x} {plug:#x}");
        }
    }

    #[test]
    fn bad_ranges_are_refused() {
        let r = |gpa, len| RamRange { gpa, len };
        let bad: [&[RamRange]; 7] = [
            &[],
            &[r(0, 0)],
            &[r(1, PAGE_SIZE)],
            &[r(0, 100)],
            &[r(u64::MAX - PAGE_SIZE + 1, PAGE_SIZE)],
            &[r(0, 2 * PAGE_SIZE), r(PAGE_SIZE, PAGE_SIZE)],
            &[r(1 << 20, PAGE_SIZE), r(0, PAGE_SIZE)],
        ];
        for ranges in bad {
            assert!(check_ranges(ranges).is_err(), "{ranges:?}");
        }
        assert_eq!(
            check_ranges(&[r(0, PAGE_SIZE), r(PAGE_SIZE, PAGE_SIZE)]).expect("adjacent is fine"),
            2 * PAGE_SIZE
        );
    }
}
