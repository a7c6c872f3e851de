//! One bit a page, with fast iteration over runs.

use std::ops::Range;

/// A set of the pages of one RAM region.
///
/// Bit `n % 64` of word `n / 64` is page `n`, which is also the form in which KVM reports its dirty log. Bits past
/// the last page, which only [`PageBitmap::words_mut`] can set, count for nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl PageBitmap {
    /// An empty set for a region of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            pages,
        }
    }

    /// A set that holds every page.
    pub fn full(pages: u64) -> Self {
        let mut all = Self::new(pages);
        all.set_range(0..pages);
        all
    }

    /// How many pages the region has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds a page. A page past the end is ignored.
    pub fn set(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Takes a page out. A page past the end is ignored.
    pub fn clear(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] &= !(1 << (page % 64));
        }
    }

    /// Whether a page is in the set.
    pub fn get(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// Adds a range of pages; the part past the end is ignored.
    pub fn set_range(&mut self, pages: Range<u64>) {
        self.for_each_mask(pages, |word, mask| *word |= mask);
    }

    /// Takes out a range of pages; the part past the end is ignored.
    pub fn clear_range(&mut self, pages: Range<u64>) {
        self.for_each_mask(pages, |word, mask| *word &= !mask);
    }

    fn for_each_mask(&mut self, pages: Range<u64>, mut change: impl FnMut(&mut u64, u64)) {
        let end = pages.end.min(self.pages);
        let mut page = pages.start;
        while page < end {
            let bit = page % 64;
            let count = (64 - bit).min(end - page);
            let mask = (u64::MAX >> (64 - count)) << bit;
            change(&mut self.words[(page / 64) as usize], mask);
            page += count;
        }
    }

    /// Empties the set.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        let all: u64 = self
            .words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        let stray = self.words.last().map_or(0, |word| word & !self.tail_mask());
        all - u64::from(stray.count_ones())
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.runs().next().is_none()
    }

    /// The words.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The words, for a dirty log to be read into.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Adds the pages of `words`, in the same form. Words past the end are ignored.
    pub fn or_words(&mut self, words: &[u64]) {
        for (word, other) in self.words.iter_mut().zip(words) {
            *word |= other;
        }
        let tail = self.tail_mask();
        if let Some(last) = self.words.last_mut() {
            *last &= tail;
        }
    }

    /// The set as runs `(first page, number of pages)`, lowest first, each as long as possible.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_in(0..self.pages)
    }

    /// The runs of that part of the set that lies in `pages`.
    pub fn runs_in(&self, pages: Range<u64>) -> Runs<'_> {
        Runs {
            words: &self.words,
            next: pages.start,
            end: pages.end.min(self.pages),
        }
    }

    fn tail_mask(&self) -> u64 {
        match self.pages % 64 {
            0 => u64::MAX,
            bits => (1 << bits) - 1,
        }
    }
}

/// Iterator over the runs of a [`PageBitmap`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    words: &'a [u64],
    next: u64,
    end: u64,
}

impl Runs<'_> {
    /// The first page at or after `from` whose bit equals `wanted`, or `end`.
    fn seek(&self, from: u64, wanted: bool) -> u64 {
        let flip = if wanted { 0 } else { u64::MAX };
        let mut page = from;
        while page < self.end {
            let word = (self.words[(page / 64) as usize] ^ flip) >> (page % 64);
            if word != 0 {
                return (page + u64::from(word.trailing_zeros())).min(self.end);
            }
            page = (page / 64 + 1) * 64;
        }
        self.end
    }
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let first = self.seek(self.next, true);
        if first >= self.end {
            self.next = self.end;
            return None;
        }
        let end = self.seek(first, false);
        self.next = end;
        Some((first, end - first))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// The plainest way to find runs.
    fn naive_runs(set: &BTreeSet<u64>, within: Range<u64>) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for &page in set.iter().filter(|page| within.contains(page)) {
            match runs.last_mut() {
                Some((first, len)) if *first + *len == page => *len += 1,
                _ => runs.push((page, 1)),
            }
        }
        runs
    }

    #[derive(Clone, Debug)]
    enum Op {
        Set(u64),
        Clear(u64),
        SetRange(u64, u64),
        ClearRange(u64, u64),
        Or(Vec<u64>),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..400u64).prop_map(Op::Set),
            (0..400u64).prop_map(Op::Clear),
            (0..400u64, 0..200u64).prop_map(|(a, n)| Op::SetRange(a, a + n)),
            (0..400u64, 0..200u64).prop_map(|(a, n)| Op::ClearRange(a, a + n)),
            proptest::collection::vec(any::<u64>(), 0..6).prop_map(Op::Or),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_set(pages in 0..330u64, ops in proptest::collection::vec(op(), 0..20), from in 0..400u64, n in 0..400u64) {
            let mut bitmap = PageBitmap::new(pages);
            let mut set = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Set(p) => { bitmap.set(p); set.insert(p); }
                    Op::Clear(p) => { bitmap.clear(p); set.remove(&p); }
                    Op::SetRange(a, b) => { bitmap.set_range(a..b); set.extend(a..b); }
                    Op::ClearRange(a, b) => { bitmap.clear_range(a..b); set.retain(|p| !(a..b).contains(p)); }
                    Op::Or(words) => {
                        bitmap.or_words(&words);
                        for p in 0..words.len() as u64 * 64 {
                            if words[(p / 64) as usize] >> (p % 64) & 1 == 1 { set.insert(p); }
                        }
                    }
                }
                set.retain(|p| *p < pages);
            }
            prop_assert_eq!(bitmap.count(), set.len() as u64);
            prop_assert_eq!(bitmap.is_empty(), set.is_empty());
            prop_assert!((0..400).all(|p| bitmap.get(p) == set.contains(&p)));
            prop_assert_eq!(bitmap.runs().collect::<Vec<_>>(), naive_runs(&set, 0..pages));
            prop_assert_eq!(bitmap.runs_in(from..from + n).collect::<Vec<_>>(), naive_runs(&set, from..from + n));
        }
    }

    #[test]
    fn stray_bits_past_the_end_count_for_nothing() {
        let mut bitmap = PageBitmap::new(70);
        bitmap.words_mut().fill(u64::MAX);
        assert_eq!(bitmap.count(), 70);
        assert_eq!(bitmap.runs().collect::<Vec<_>>(), [(0, 70)]);
        bitmap.clear_range(0..70);
        assert!(bitmap.is_empty());
        assert_eq!(PageBitmap::full(70).count(), 70);
    }
}
