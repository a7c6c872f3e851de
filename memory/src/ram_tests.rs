//! Tests of guest RAM.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::layout::ram_ranges;

const MIB: u64 = 1 << 20;

fn ram(bytes: u64, backing: Backing) -> GuestRam {
    GuestRam::new(&[RamRange { gpa: 0, len: bytes }], backing).expect("a little memory")
}

const BACKINGS: [Backing; 3] = [
    Backing::Anonymous { thp: false },
    Backing::Anonymous { thp: true },
    Backing::Memfd { thp: false },
];

/// Resident pages of a region, by mincore(2), which looks and does not touch.
fn resident(ram: &GuestRam, region: usize) -> u64 {
    let region = &ram.regions()[region];
    let mut vec = vec![0u8; region.pages() as usize];
    // SAFETY: the region is mapped and `vec` has a byte for each of its pages.
    let rc = unsafe {
        libc::mincore(
            region.hva() as *mut libc::c_void,
            region.len() as usize,
            vec.as_mut_ptr(),
        )
    };
    assert_eq!(rc, 0);
    vec.iter().filter(|byte| **byte & 1 == 1).count() as u64
}

#[test]
fn populated_finds_what_was_written_and_touches_nothing() {
    for backing in BACKINGS {
        let ram = ram(64 * MIB, backing);
        assert_eq!(resident(&ram, 0), 0, "{backing:?}");
        assert!(
            ram.populated(0).expect("readable").is_empty(),
            "{backing:?}"
        );
        let written = [0u64, 1, 700, 701, 5000, 16383];
        for page in written {
            ram.guest_memory()
                .write_obj(1u8, GuestAddress(page * PAGE_SIZE))
                .expect("in range");
        }
        let before = resident(&ram, 0);
        let populated = ram.populated(0).expect("readable");
        assert!(
            written.iter().all(|page| populated.get(*page)),
            "{backing:?}"
        );
        assert_eq!(populated.count(), before, "{backing:?}");
        assert_eq!(
            resident(&ram, 0),
            before,
            "looking touched pages of {backing:?}"
        );
        if backing != (Backing::Anonymous { thp: true }) {
            assert_eq!(before, written.len() as u64, "{backing:?}");
        }
        let mut part = PageBitmap::new(16384);
        ram.populated_in(0, 700..5000, &mut part).expect("in range");
        let expected: Vec<_> = populated.runs_in(700..5000).collect();
        assert_eq!(part.runs().collect::<Vec<_>>(), expected, "{backing:?}");
    }
}

#[test]
fn device_writes_are_reported_once() {
    let ram = GuestRam::new(
        &ram_ranges(crate::layout::MMIO_HOLE_START + 16 * MIB).expect("valid"),
        Backing::Anonymous { thp: false },
    )
    .expect("address space");
    let high = crate::layout::MMIO_HOLE_END;
    ram.guest_memory()
        .write_slice(&[1; 5000], GuestAddress(high + 3 * PAGE_SIZE))
        .expect("in range");
    let mut dirty = PageBitmap::new(ram.regions()[1].pages());
    ram.take_device_dirty(1, &mut dirty);
    assert_eq!(dirty.runs().collect::<Vec<_>>(), [(3, 2)]);
    dirty.clear_all();
    ram.take_device_dirty(1, &mut dirty);
    ram.take_device_dirty(7, &mut dirty);
    assert!(dirty.is_empty());
}

#[test]
fn addresses_suit_huge_pages() {
    for backing in BACKINGS {
        for gpa in [0, 4096, 3 * MIB] {
            let range = RamRange { gpa, len: 8 * MIB };
            let ram = GuestRam::new(&[range], backing).expect("a little memory");
            assert_eq!((ram.regions()[0].hva() - gpa) % (2 * MIB), 0);
        }
    }
}

#[test]
fn views_outside_of_a_region_are_refused() {
    let ram = ram(MIB, BACKINGS[0]);
    for (region, first, pages) in [
        (0, 0, 257),
        (0, 256, 1),
        (0, u64::MAX, 2),
        (0, 1, u64::MAX),
        (1, 0, 1),
    ] {
        assert!(ram.pages(region, first, pages).is_err());
        assert!(ram.discard(region, first, pages).is_err());
        assert!(ram.zero(region, first, pages.min(8)).is_err() || pages > 8);
    }
    assert!(
        ram.pages(0, 256, 0)
            .expect("an empty view is fine")
            .is_empty()
    );
}

#[test]
fn discarded_and_zeroed_pages_read_as_zeros() {
    for backing in BACKINGS {
        let ram = ram(16 * MIB, backing);
        let all = ram.pages(0, 0, 4096).expect("in range");
        let mut copy = vec![0u8; 16 << 20];
        for (first, pages) in [(0, 4096), (1, 600), (5, 3)] {
            all.write_from(&vec![7u8; 16 << 20]);
            ram.zero(0, first, pages).expect("in range");
            all.read_into(&mut copy);
            for page in 0..4096u64 {
                let expected = if (first..first + pages).contains(&page) {
                    0
                } else {
                    7
                };
                let at = (page * PAGE_SIZE) as usize;
                assert!(
                    copy[at..at + 4096].iter().all(|byte| *byte == expected),
                    "page {page}"
                );
            }
        }
        ram.discard(0, 0, 4096).expect("in range");
        assert_eq!(resident(&ram, 0), 0, "{backing:?}");
    }
}

#[test]
fn a_view_may_outlive_the_memory() {
    let ram = ram(4 * MIB, BACKINGS[0]);
    let view = ram.guest_memory().clone();
    view.write_obj(5u64, GuestAddress(0x1000))
        .expect("in range");
    drop(ram);
    assert_eq!(
        view.read_obj::<u64>(GuestAddress(0x1000))
            .expect("still mapped"),
        0
    );
    assert_eq!(view.num_regions(), 1);
}

#[test]
fn more_than_the_host_has_is_refused_with_the_numbers() {
    let ranges = ram_ranges(crate::layout::MAX_RAM).expect("valid");
    let error = GuestRam::new(&ranges, BACKINGS[0]).expect_err("no host has 16 TiB");
    assert!(error.to_string().contains("17592186044416"), "{error}");
    let odd = Backing::Hugetlbfs { page_size: 12345 };
    assert!(GuestRam::new(&ram_ranges(64 * MIB).expect("valid"), odd).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn zero_runs_agree_with_a_plain_look(dirty in proptest::collection::btree_set((0..96u64, 0..4096usize), 0..40), first in 0..96u64, n in 0..96u64) {
        let ram = ram(96 * PAGE_SIZE, BACKINGS[0]);
        let mut bytes = vec![0u8; 96 * 4096];
        for (page, at) in &dirty {
            bytes[*page as usize * 4096 + at] = 1;
        }
        ram.pages(0, 0, 96).expect("in range").write_from(&bytes);
        let n = n.min(96 - first);
        let mut expected: Vec<crate::PageRun> = Vec::new();
        for page in 0..n {
            let zero = !dirty.iter().any(|(dirty, _)| *dirty == first + page);
            match expected.last_mut() {
                Some(run) if run.zero == zero => run.pages += 1,
                _ => expected.push(crate::PageRun { first: page, pages: 1, zero }),
            }
        }
        let runs: Vec<_> = ram.pages(0, first, n).expect("in range").zero_runs().collect();
        prop_assert_eq!(runs, expected);
    }
}
