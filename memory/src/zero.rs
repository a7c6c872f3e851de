//! Telling zero pages from others.
//!
//! A page in use usually shows it in its first bytes, so the first and last cache lines are looked at before the
//! whole page is. The scan of a run of pages asks for the first line of pages further on in advance: without that, each
//! page would cost a full memory latency.
//!
//! Guest memory changes under the scan, so every read is volatile. A page that changes *while* it is scanned may be
//! called either; its new contents show in the dirty log.

use std::arch::x86_64::{
    __m128i, __m256i, _MM_HINT_T0, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_prefetch,
    _mm_setzero_si128, _mm256_or_si256, _mm256_testz_si256,
};

use crate::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
/// How many pages ahead the scan asks for memory: about one memory latency at the speed of the scan.
const PREFETCH_PAGES: usize = 12;

/// How a page is tested; picked once for the processor at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scanner {
    /// 16 bytes at a time; every x86_64 processor has it.
    Sse2,
    /// 32 bytes at a time.
    Avx2,
}

impl Scanner {
    /// The fastest that this processor has.
    pub(crate) fn best() -> Self {
        if std::arch::is_x86_feature_detected!("avx2") {
            Self::Avx2
        } else {
            Self::Sse2
        }
    }

    /// Whether page `index` of the `pages` pages from `base` on is all zero.
    ///
    /// # Safety
    ///
    /// `base` is page aligned, `pages` pages from it on are mapped and readable, `index < pages`, and the
    /// processor has the scanner's instructions.
    pub(crate) unsafe fn is_zero(self, base: *const u8, index: usize, pages: usize) -> bool {
        // SAFETY: `index` is within the mapped pages.
        let page = unsafe { base.add(index * PAGE) };
        let ahead = index + PREFETCH_PAGES;
        if ahead < pages {
            // SAFETY: within the mapped pages; a prefetch has no effect but on the cache.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(base.add(ahead * PAGE).cast()) };
        }
        // SAFETY: both words lie in the page, which is mapped and aligned.
        let quick = unsafe {
            page.cast::<u64>().read_volatile() | page.add(PAGE - 8).cast::<u64>().read_volatile()
        };
        if quick != 0 {
            return false;
        }
        match self {
            // SAFETY: the page is mapped and aligned; the caller vouches for the instructions.
            Self::Avx2 => unsafe { is_zero_avx2(page) },
            // SAFETY: the page is mapped and aligned; SSE2 is part of x86_64.
            Self::Sse2 => unsafe { is_zero_sse2(page) },
        }
    }
}

/// # Safety
///
/// `page` is aligned and mapped, and the processor has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn is_zero_avx2(page: *const u8) -> bool {
    let vectors = page.cast::<__m256i>();
    for block in 0..PAGE / 128 {
        // SAFETY: the four vectors lie in the page, which is mapped and aligned.
        let [a, b, c, d] =
            [0, 1, 2, 3].map(|i| unsafe { vectors.add(block * 4 + i).read_volatile() });
        let any = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
        if _mm256_testz_si256(any, any) == 0 {
            return false;
        }
    }
    true
}

/// # Safety
///
/// `page` is aligned and mapped.
unsafe fn is_zero_sse2(page: *const u8) -> bool {
    let vectors = page.cast::<__m128i>();
    for block in 0..PAGE / 64 {
        // SAFETY: the four vectors lie in the page, which is mapped and aligned; SSE2 is part of x86_64.
        let zero = unsafe {
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| vectors.add(block * 4 + i).read_volatile());
            let any = _mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d));
            _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128())) == 0xffff
        };
        if !zero {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[repr(align(4096))]
    struct Pages([[u8; PAGE]; 4]);

    fn scan(pages: &Pages, scanner: Scanner) -> Vec<bool> {
        (0..4)
            // SAFETY: four aligned pages; `scanner` comes from `best` or is SSE2.
            .map(|i| unsafe { scanner.is_zero(pages.0.as_ptr().cast(), i, 4) })
            .collect()
    }

    proptest! {
        #[test]
        fn agrees_with_the_naive_test(dirt in proptest::collection::vec((0..4usize, 0..PAGE, any::<u8>()), 0..4)) {
            let mut pages = Box::new(Pages([[0; PAGE]; 4]));
            for (page, at, value) in dirt {
                pages.0[page][at] = value;
            }
            let naive: Vec<bool> = pages.0.iter().map(|page| page.iter().all(|byte| *byte == 0)).collect();
            prop_assert_eq!(&scan(&pages, Scanner::best()), &naive);
            prop_assert_eq!(&scan(&pages, Scanner::Sse2), &naive);
        }
    }

    #[test]
    fn every_single_bit_is_seen() {
        let mut pages = Box::new(Pages([[0; PAGE]; 4]));
        for at in 0..PAGE {
            pages.0[1][at] = 1 << (at % 8);
            for scanner in [Scanner::best(), Scanner::Sse2] {
                assert_eq!(
                    scan(&pages, scanner),
                    [true, false, true, true],
                    "byte {at}"
                );
            }
            pages.0[1][at] = 0;
        }
    }
}
