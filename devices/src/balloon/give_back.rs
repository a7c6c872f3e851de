//! From page numbers to memory that the host has back.

use std::ops::Range;
use std::sync::PoisonError;

use memory::PAGE_SIZE;

use super::Shared;

/// Runs of page numbers that follow each other, from numbers in any order, some perhaps more than once.
pub(super) fn runs(mut pages: Vec<u32>) -> Vec<Range<u64>> {
    pages.sort_unstable();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in pages.into_iter().map(u64::from) {
        match runs.last_mut() {
            Some(run) if page < run.end => {}
            Some(run) if page == run.end => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

impl Shared {
    /// Gives guest-physical pages back to the host, as far as they are RAM and fill pages of the backing. The rest is left as it is: to
    /// zero it would cost memory, where the point is to save some.
    pub(super) fn give_back(&self, pages: Range<u64>) {
        let discarding = self
            .discarding
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let unit = self.ram.backing().page_size() / PAGE_SIZE;
        let mut outside = pages.end.saturating_sub(pages.start);
        let (mut discarded, mut failed) = (0, 0);
        for (index, region) in self.ram.regions().iter().enumerate() {
            let base = region.gpa() / PAGE_SIZE;
            let start = pages.start.max(base);
            let end = pages.end.min(base + region.pages());
            if start >= end {
                continue;
            }
            outside -= end - start;
            let first = (start - base).next_multiple_of(unit);
            let count = ((end - base) / unit * unit).saturating_sub(first);
            if count == 0 || !*discarding {
                continue;
            }
            match self.ram.discard(index, first, count) {
                Ok(()) => discarded += count,
                Err(error) => {
                    failed += count;
                    tracing::debug!(%error, "the host does not take the balloon's pages");
                }
            }
        }
        drop(discarding);
        self.count(|counters| {
            counters.ignored_pages += outside;
            counters.discarded_pages += discarded;
            counters.failed_pages += failed;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_runs() {
        assert_eq!(runs(Vec::new()), []);
        assert_eq!(
            runs(vec![9, 3, 4, u32::MAX, 5, 4, 8]),
            [3..6, 8..10, u64::from(u32::MAX)..1 << 32]
        );
    }
}
