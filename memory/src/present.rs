//! Which parts of a region the guest has at all, where memory can be plugged and unplugged.
//!
//! ```text
//!   fresh region        all of it is there, and nothing is kept
//!   set_present(false)  its whole blocks are absent: nobody looks for contents in them
//!   set_present(true)   they are there again
//! ```

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{BLOCK_SIZE, PAGE_SIZE};

/// Pages of a block.
const BLOCK_PAGES: u64 = BLOCK_SIZE / PAGE_SIZE;

/// The blocks of a region, counted from its first page.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    /// A bit a block that is absent; not there as long as no block ever was.
    absent: OnceLock<Box<[AtomicU64]>>,
}

impl Presence {
    /// `pages` of a region with `region_pages` come or go. Only blocks that lie in it whole can go; a block that it touches comes.
    pub(crate) fn set(&self, region_pages: u64, pages: Range<u64>, present: bool) {
        if present && self.absent.get().is_none() {
            return;
        }
        let absent = self.absent.get_or_init(|| {
            let blocks = region_pages.div_ceil(BLOCK_PAGES);
            (0..blocks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect()
        });
        let blocks = match present {
            true => pages.start / BLOCK_PAGES..pages.end.div_ceil(BLOCK_PAGES),
            false => pages.start.div_ceil(BLOCK_PAGES)..pages.end / BLOCK_PAGES,
        };
        for block in blocks {
            let Some(word) = absent.get((block / 64) as usize) else {
                return;
            };
            let bit = 1 << (block % 64);
            match present {
                true => word.fetch_and(!bit, Ordering::SeqCst),
                false => word.fetch_or(bit, Ordering::SeqCst),
            };
        }
    }

    /// The parts of `pages` that are there, in order.
    pub(crate) fn parts(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let mut at = pages.start;
        std::iter::from_fn(move || {
            while at < pages.end && self.is_absent(at) {
                at = self.run_end(at).min(pages.end);
            }
            let start = at;
            while at < pages.end && !self.is_absent(at) {
                at = self.run_end(at).min(pages.end);
            }
            (start < at).then_some(start..at)
        })
    }

    fn is_absent(&self, page: u64) -> bool {
        let block = page / BLOCK_PAGES;
        self.word(block)
            .is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    /// Where the run of blocks that are as the one of `page` ends, as far as one word says.
    fn run_end(&self, page: u64) -> u64 {
        let block = page / BLOCK_PAGES;
        let Some(word) = self.word(block) else {
            return u64::MAX;
        };
        let ahead = word >> (block % 64);
        let same = match ahead & 1 {
            0 => ahead.trailing_zeros(),
            _ => ahead.trailing_ones(),
        };
        let left = 64 - block % 64;
        (block + u64::from(same).min(left)) * BLOCK_PAGES
    }

    fn word(&self, block: u64) -> Option<u64> {
        let words = self.absent.get()?;
        let word = words.get((block / 64) as usize)?;
        Some(word.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_region_that_was_never_told_of_is_all_there() {
        let all = Presence::default();
        all.set(5000, 0..5000, true);
        assert!(all.absent.get().is_none());
        assert!(all.parts(3..5000).eq(std::iter::once(3..5000)));
        assert_eq!(all.parts(7..7).count(), 0);
    }

    #[test]
    fn only_whole_blocks_go_and_every_block_that_is_touched_comes() {
        let some = Presence::default();
        some.set(512 * 8, 1..512 * 4 - 1, false);
        assert_eq!(
            some.parts(0..512 * 8).collect::<Vec<_>>(),
            [0..512, 512 * 3..512 * 8]
        );
        some.set(512 * 8, 1000..1001, true);
        assert_eq!(
            some.parts(10..512 * 8).collect::<Vec<_>>(),
            [10..1024, 512 * 3..512 * 8]
        );
    }

    proptest! {
        #[test]
        fn agrees_with_a_list_of_blocks(
            changes in proptest::collection::vec((0..200u64, 0..80u64, any::<bool>()), 0..20),
            from in 0..200 * BLOCK_PAGES,
            pages in 0..200 * BLOCK_PAGES,
        ) {
            let (presence, mut list) = (Presence::default(), [true; 200]);
            for (first, count, present) in changes {
                let end = (first + count).min(200);
                presence.set(200 * BLOCK_PAGES, first * BLOCK_PAGES..end * BLOCK_PAGES, present);
                list[first as usize..end as usize].fill(present);
            }
            let looked_at = from..(from + pages).min(200 * BLOCK_PAGES);
            let mut naive: Vec<Range<u64>> = Vec::new();
            for page in looked_at.clone().filter(|page| list[(page / BLOCK_PAGES) as usize]) {
                match naive.last_mut() {
                    Some(last) if last.end == page => last.end += 1,
                    _ => naive.push(page..page + 1),
                }
            }
            prop_assert_eq!(presence.parts(looked_at).collect::<Vec<_>>(), naive);
        }
    }
}
