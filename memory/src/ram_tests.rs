//! Tests of guest RAM.

use std::path::Path;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

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

/// A sparse file of `pages` pages in which those of `data` are filled with their number.
fn sparse_file(pages: u64, data: &[u64]) -> (tempfile::TempDir, File) {
    use std::os::unix::fs::FileExt;
    let folder = tempfile::tempdir().expect("a folder");
    let file = File::create_new(folder.path().join("ram")).expect("a file");
    file.set_len(pages * PAGE_SIZE).expect("a long file");
    for &page in data {
        file.write_all_at(&[page as u8; PAGE_SIZE as usize], page * PAGE_SIZE)
            .expect("written");
    }
    let file = File::open(folder.path().join("ram")).expect("readable");
    (folder, file)
}

#[test]
fn a_mapped_file_is_the_memory_and_is_never_changed() {
    use std::os::unix::fs::FileExt;
    for thp in [false, true] {
        let (_folder, file) = sparse_file(1024, &[16, 17, 900]);
        let copy = file.try_clone().expect("a descriptor");
        let ram = ram(2 * MIB, Backing::Anonymous { thp });
        ram.map_file(0, file, 16 * PAGE_SIZE).expect("mapped");
        let memory = ram.guest_memory();
        let byte = |page: u64| -> u8 {
            memory
                .read_obj(GuestAddress(page * PAGE_SIZE))
                .expect("in range")
        };
        // Nothing has been used yet, but all that the file holds counts.
        let populated = ram.populated(0).expect("readable");
        let found: Vec<u64> = populated.runs().flat_map(|(at, n)| at..at + n).collect();
        assert_eq!(found, [0, 1], "thp {thp}");
        assert_eq!((byte(0), byte(1), byte(2)), (16, 17, 0));
        memory.write_obj(7u8, GuestAddress(0)).expect("in range");
        memory
            .write_obj(8u8, GuestAddress(300 * PAGE_SIZE))
            .expect("in range");
        let populated = ram.populated(0).expect("readable");
        assert!([0, 1, 300].iter().all(|&page| populated.get(page)));
        let mut dirty = PageBitmap::new(512);
        ram.take_device_dirty(0, &mut dirty);
        let dirty: Vec<u64> = dirty.runs().flat_map(|(at, n)| at..at + n).collect();
        assert_eq!(dirty, [0, 300]);
        let mut there = [0; 1];
        copy.read_exact_at(&mut there, 16 * PAGE_SIZE)
            .expect("readable");
        assert_eq!(there, [16], "the file was written");
    }
}

#[test]
fn what_is_given_back_reads_as_zeros_and_not_as_the_file() {
    let all: Vec<u64> = (0..1024).collect();
    let (_folder, file) = sparse_file(1024, &all);
    let ram = ram(4 * MIB, Backing::Anonymous { thp: true });
    ram.map_file(0, file, 0).expect("mapped");
    ram.discard(0, 3, 2).expect("given back");
    ram.zero(0, 100, 1).expect("zeroed");
    ram.zero(0, 512, 512).expect("given back");
    for page in 0..1024u64 {
        let zero = [3, 4, 100].contains(&page) || page >= 512;
        let byte: u8 = ram
            .guest_memory()
            .read_obj(GuestAddress(page * PAGE_SIZE + 9))
            .expect("in range");
        assert_eq!(byte, if zero { 0 } else { page as u8 }, "page {page}");
    }
}

#[test]
fn files_that_cannot_be_mapped_are_refused() {
    let refused = |backing, offset, pages| {
        let (_folder, file) = sparse_file(pages, &[]);
        let error = ram(MIB, backing)
            .map_file(0, file, offset)
            .expect_err("refused");
        assert!(matches!(error, Error::MapFile { .. }), "{error}");
    };
    let anonymous = Backing::Anonymous { thp: false };
    refused(Backing::Memfd { thp: false }, 0, 256);
    refused(anonymous, 0, 255);
    refused(anonymous, PAGE_SIZE, 256);
    refused(anonymous, 1, 512);
    refused(anonymous, u64::MAX - 4095, 512);
    let ram = ram(MIB, anonymous);
    let (_folder, file) = sparse_file(256, &[]);
    let again = file.try_clone().expect("a descriptor");
    ram.map_file(0, file, 0).expect("mapped");
    assert!(ram.map_file(0, again, 0).is_err());
    assert!(
        ram.map_file(1, File::open("/dev/null").expect("there"), 0)
            .is_err()
    );
}

#[test]
fn nothing_is_found_in_blocks_that_are_absent() {
    for backing in BACKINGS {
        let ram = ram(16 * MIB, backing);
        for page in [0, 600, 1500, 4095] {
            ram.guest_memory()
                .write_obj(1u8, GuestAddress(page * PAGE_SIZE))
                .expect("in range");
        }
        let found = |ram: &GuestRam| {
            let populated = ram.populated(0).expect("readable");
            [0, 600, 1500, 4095].map(|page| populated.get(page))
        };
        assert_eq!(found(&ram), [true; 4], "{backing:?}");
        ram.set_present(0, 512..2048, false);
        assert_eq!(found(&ram), [true, false, false, true], "{backing:?}");
        ram.set_present(0, 1024..1536, true);
        assert_eq!(found(&ram), [true, false, true, true], "{backing:?}");
        // It is still mapped.
        let kept: u8 = ram
            .guest_memory()
            .read_obj(GuestAddress(600 * PAGE_SIZE))
            .expect("in range");
        assert_eq!(kept, 1);
        // Of no region.
        ram.set_present(1, 0..512, false);
    }
}

#[test]
fn pinned_memory_stays_in_its_place() {
    for backing in BACKINGS {
        let fresh = ram(8 * MIB, backing);
        fresh.find_pinning();
        assert!(!fresh.is_pinned(), "{backing:?}");
        // What a driver does that pins it.
        let pinned = ram(8 * MIB, backing);
        pinned.pages(0, 0, 2048).expect("in range").fill_zero();
        pinned.find_pinning();
        assert!(pinned.is_pinned(), "{backing:?}");
        let view = pinned.pages(0, 0, 2048).expect("in range");
        view.write_from(&vec![7; 8 << 20]);
        let before = resident(&pinned, 0);
        pinned.discard(0, 0, 1024).expect("in range");
        pinned.zero(0, 1024, 512).expect("in range");
        assert_eq!(resident(&pinned, 0), before, "{backing:?}");
        let runs: Vec<_> = view.zero_runs().map(|run| (run.pages, run.zero)).collect();
        assert_eq!(runs, [(1536, true), (512, false)], "{backing:?}");
        let file = tempfile::tempfile().expect("a file");
        file.set_len(8 * MIB).expect("room");
        assert!(pinned.map_file(0, file, 0).is_err());
    }
}

/// A back end of vhost-user has the file too, and may be the first to write a page.
#[test]
fn huge_pages_that_another_process_has_filled_are_found() {
    const PAGE: u64 = 2 << 20;
    let pool = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
    let before = std::fs::read_to_string(pool).unwrap_or_default();
    if std::fs::write(pool, "8").is_err() {
        eprintln!("SKIP: huge pages cannot be reserved here");
        return;
    }
    let ranges = [RamRange {
        gpa: 0,
        len: 4 * PAGE,
    }];
    let found = GuestRam::new(&ranges, Backing::Hugetlbfs { page_size: PAGE }).map(|ram| {
        ram.guest_memory()
            .write_obj(1u8, GuestAddress(0))
            .expect("RAM");
        let ours = ram.populated(0).expect("a region");
        let file = ram.regions()[0].file().expect("a file");
        // SAFETY: a new mapping, unmapped below; the guest's memory is never seen as a reference.
        unsafe {
            let other = rustix::mm::mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                file,
                2 * PAGE,
            )
            .expect("a mapping");
            other.cast::<u8>().write_volatile(7);
            rustix::mm::munmap(other, PAGE as usize).expect("a mapping");
        }
        (ours, ram.populated(0).expect("a region"))
    });
    std::fs::write(pool, before.trim()).expect("the pool as it was");
    let (ours, all) = found.expect("memory");
    assert_eq!(ours.runs().collect::<Vec<_>>(), [(0, 512)]);
    assert!(all.get(2 * PAGE / PAGE_SIZE), "the other's page is missing");
}
