//! A bounds-checked view of some pages of guest memory.

use std::marker::PhantomData;
use std::ptr::NonNull;

use crate::zero::Scanner;
use crate::{GuestRam, PAGE_SIZE};

/// A run of pages that are all zero, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// First page, counted from the start of the view.
    pub first: u64,
    /// Number of pages, not zero.
    pub pages: u64,
    /// Whether the pages are zero.
    pub zero: bool,
}

/// Some contiguous pages of guest memory: inside one region, mapped for as long as the view lives.
///
/// The guest may write the pages at any moment, so the contents are never lent out, only copied.
#[derive(Clone, Copy, Debug)]
pub struct GuestPages<'a> {
    base: NonNull<u8>,
    pages: u64,
    ram: PhantomData<&'a GuestRam>,
}

// SAFETY: the view allows only copies from and to memory that belongs to no thread; the borrow of `GuestRam`, which is
// Sync, keeps it mapped.
unsafe impl Send for GuestPages<'_> {}
// SAFETY: as above.
unsafe impl Sync for GuestPages<'_> {}

impl<'a> GuestPages<'a> {
    /// # Safety
    ///
    /// `pages` pages from `base` on, page aligned, must stay mapped for `'a`.
    pub(crate) unsafe fn new(base: NonNull<u8>, pages: u64) -> Self {
        Self {
            base,
            pages,
            ram: PhantomData,
        }
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        (self.pages * PAGE_SIZE) as usize
    }

    /// Whether the view holds no page.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Address of the first byte, for a system call that copies.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// A part of the view: `pages` pages from its page `first` on, cut off at its end.
    pub fn part(&self, first: u64, pages: u64) -> GuestPages<'a> {
        let first = first.min(self.pages);
        let pages = pages.min(self.pages - first);
        // SAFETY: the part lies within the view.
        unsafe { Self::new(self.base.add((first * PAGE_SIZE) as usize), pages) }
    }

    /// The view as runs of zero and other pages, in order.
    ///
    /// Pages that change meanwhile may be called either. Reading a page that was never touched may map the host's
    /// shared zero page, so such pages are better left out beforehand: [`GuestRam::populated`].
    pub fn zero_runs(&self) -> impl Iterator<Item = PageRun> + use<'a> {
        ZeroRuns {
            view: *self,
            scanner: Scanner::best(),
            next: 0,
            known: None,
        }
    }

    /// Copies the contents, as they are at the moment, to `into`, which must be as long as the view.
    pub fn read_into(&self, into: &mut [u8]) {
        assert_eq!(
            into.len(),
            self.len(),
            "the buffer must be as long as the view"
        );
        // SAFETY: both are valid for the length, which was just checked; guest memory and a Rust buffer never overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.base.as_ptr(), into.as_mut_ptr(), into.len()) }
    }

    /// Copies `from`, which must be as long as the view, into the guest's pages. No dirty bit is set.
    pub fn write_from(&self, from: &[u8]) {
        assert_eq!(
            from.len(),
            self.len(),
            "the buffer must be as long as the view"
        );
        // SAFETY: both are valid for the length, which was just checked; guest memory and a Rust buffer never overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.base.as_ptr(), from.len()) }
    }

    /// Fills the pages with zeros, which makes them resident. No dirty bit is set.
    pub(crate) fn fill_zero(&self) {
        // SAFETY: the view is mapped and writable.
        unsafe { std::ptr::write_bytes(self.base.as_ptr(), 0, self.len()) }
    }
}

/// Iterator of [`GuestPages::zero_runs`].
struct ZeroRuns<'a> {
    view: GuestPages<'a>,
    scanner: Scanner,
    next: u64,
    /// What page `next` is, if it was looked at already.
    known: Option<bool>,
}

impl Iterator for ZeroRuns<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let pages = self.view.pages;
        let first = self.next;
        if first >= pages {
            return None;
        }
        let (scanner, base) = (self.scanner, self.view.base.as_ptr());
        // SAFETY: the view's pages are mapped and aligned, and callers keep `page` below their number;
        // `scanner` comes from `Scanner::best`.
        let is_zero = |page: u64| unsafe { scanner.is_zero(base, page as usize, pages as usize) };
        let zero = self.known.take().unwrap_or_else(|| is_zero(first));
        let mut end = first + 1;
        while end < pages {
            if is_zero(end) != zero {
                self.known = Some(!zero);
                break;
            }
            end += 1;
        }
        self.next = end;
        Some(PageRun {
            first,
            pages: end - first,
            zero,
        })
    }
}
