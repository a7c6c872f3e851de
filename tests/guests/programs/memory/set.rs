//! The working set: which pages there are, who owns them, and the run's parameters.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::AtomicU32;

use crate::page::{Identity, mix};
use crate::rt::machine::{MAX_RANGES, Machine, PAGE, Range};
use crate::rt::serial;

const PAGES_PER_MIB: u64 = 256;
/// Left free for nothing in particular: allocations round up.
const MARGIN_PAGES: u64 = 16;

/// Order of writes within the hot set.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other.
    Sequential,
    /// Any.
    Random,
    /// In steps of this many pages.
    Strided(u64),
}

/// The working set and the parameters of the run; the same for all vCPUs.
pub struct WorkingSet {
    /// Pages in it.
    pub pages: u64,
    /// vCPUs that share it.
    pub cpus: usize,
    /// Writes per second and vCPU; `u64::MAX`: no limit.
    pub rate: u64,
    /// Order of writes.
    pub pattern: Pattern,
    /// Of contents and order.
    pub seed: u64,
    /// Interval of reports, 0 for none.
    pub report_ns: u64,
    /// Whether pages are checked while running.
    pub verify: bool,
    /// Speed of the walk per vCPU, in pages; 0: hot pages at each report.
    pub verify_pages_per_s: u64,
    /// Timer period.
    pub tick_ms: u64,
    /// Whether to damage pages.
    pub corrupt: bool,
    hot_per_cpu: u64,
    zero_ppm: u64,
    ranges: [Range; MAX_RANGES],
    range_count: usize,
    expected: &'static [AtomicU32],
}

struct Place(UnsafeCell<MaybeUninit<WorkingSet>>);
// SAFETY: written once by CPU 0 before the others are let go (`GO` in memory.rs), read only then.
unsafe impl Sync for Place {}
static PLACE: Place = Place(UnsafeCell::new(MaybeUninit::uninit()));

impl WorkingSet {
    /// Reads the parameters and lays the set out over free RAM. Once, on CPU 0.
    pub fn lay_out(machine: &Machine, cpus: usize) -> &'static WorkingSet {
        let params = &machine.params;
        let (ranges, range_count) = machine.free_ranges();
        let free: u64 = ranges[..range_count].iter().map(Range::pages).sum();
        // One u32 a page.
        let most = free.saturating_sub(free.div_ceil(PAGE / 4) + MARGIN_PAGES);
        let want = match (params.text("pages"), params.text("working_set_mib")) {
            (None, Some("max")) | (Some("max"), _) => most,
            (None, _) => params
                .number("working_set_mib")
                .unwrap_or(256)
                .saturating_mul(PAGES_PER_MIB),
            (Some(_), _) => params.number("pages").unwrap_or(256 * PAGES_PER_MIB),
        };
        let pages = want.min(most);
        let array = machine.allocate(pages * 4, PAGE);
        // SAFETY: fresh memory of our own, aligned; every value is valid, `fill` sets each.
        let expected =
            unsafe { core::slice::from_raw_parts(array as *const AtomicU32, pages as usize) };
        let pattern = match params.text("pattern") {
            None | Some("sequential") => Pattern::Sequential,
            Some("random") => Pattern::Random,
            Some("strided") => Pattern::Strided(params.number("stride").unwrap_or(17).max(1)),
            Some(other) => {
                serial::line(format_args!(
                    "guest: ignored pattern={other}: sequential, random or strided"
                ));
                Pattern::Sequential
            }
        };
        let rate = match params.text("rate") {
            Some("max") => u64::MAX,
            _ => params.number("rate").unwrap_or(1000).min(1 << 32),
        };
        let per_cpu = |total: u64| total.div_ceil(cpus as u64);
        let verify_mib_per_s = params.number("verify_mib_per_s").unwrap_or(64).min(1 << 20);
        let (ranges, range_count) = machine.free_ranges();
        let set = WorkingSet {
            pages,
            cpus,
            rate,
            pattern,
            seed: params.number("seed").unwrap_or(1),
            report_ns: params.number("report_ms").unwrap_or(1000).min(1 << 32) * 1_000_000,
            verify: params.flag("verify", true),
            verify_pages_per_s: per_cpu(verify_mib_per_s * PAGES_PER_MIB),
            tick_ms: params.number("tick_ms").unwrap_or(10).clamp(1, 1000),
            corrupt: params.flag("corrupt", false),
            hot_per_cpu: per_cpu(
                params.number("hot_mib").unwrap_or(16).min(1 << 30) * PAGES_PER_MIB,
            ),
            zero_ppm: params.parts_per_million("zero_fraction").unwrap_or(0),
            ranges,
            range_count,
            expected,
        };
        // SAFETY: no other CPU looks at it yet, and this happens once.
        unsafe { (*PLACE.0.get()).write(set) }
    }

    /// The set, once CPU 0 has laid it out.
    pub fn get() -> &'static WorkingSet {
        // SAFETY: the caller has seen `GO`.
        unsafe { (*PLACE.0.get()).assume_init_ref() }
    }

    /// First page and number of pages that vCPU `index` owns.
    pub fn part(&self, index: usize) -> (u64, u64) {
        let (cpus, index) = (self.cpus as u64, index as u64);
        let first = self.pages * index / cpus;
        (first, self.pages * (index + 1) / cpus - first)
    }

    /// Hot pages of vCPU `index`: the first of its part.
    pub fn hot_part(&self, index: usize) -> u64 {
        self.hot_per_cpu.min(self.part(index).1)
    }

    /// Hot pages of all.
    pub fn hot_pages(&self) -> u64 {
        (0..self.cpus).map(|index| self.hot_part(index)).sum()
    }

    /// Whether a page outside the hot set is left untouched.
    pub fn stays_zero(&self, page: u64) -> bool {
        self.zero_ppm != 0 && mix(self.seed ^ mix(page ^ 0x7a65_726f)) % 1_000_000 < self.zero_ppm
    }

    /// What the page must be.
    pub fn identity(&self, page: u64, owner: usize) -> Identity {
        Identity {
            page,
            owner: owner as u64,
            seed: self.seed,
        }
    }

    /// The counter that the page must have.
    pub fn expected(&self, page: u64) -> &AtomicU32 {
        &self.expected[page as usize]
    }

    /// Where the page is.
    pub fn address(&self, page: u64) -> *mut u64 {
        let mut left = page;
        for range in &self.ranges[..self.range_count] {
            if left < range.pages() {
                return (range.start + left * PAGE) as *mut u64;
            }
            left -= range.pages();
        }
        panic!("page {page} is outside of the working set");
    }
}
