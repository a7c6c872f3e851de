//! One vCPU's share of the work.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::page::{self, Found};
use crate::rt::machine::MAX_CPUS;
use crate::rt::{clock, power, serial, service};
use crate::set::{Pattern, WorkingSet};

/// Pages written or checked between two looks at the clock.
const BATCH: u64 = 64;
/// What was missed for longer than this (a pause, a move) is not made up for.
const MAX_BACKLOG_NS: u64 = 100_000_000;
/// How often serial input is looked at; each look is an exit.
const INPUT_NS: u64 = 10_000_000;
/// Damaged pages told in detail per vCPU.
const MAX_DETAILS: u64 = 8;

/// What a vCPU tells about itself; written by it alone.
#[repr(align(64))]
struct Tally {
    writes: AtomicU64,
    verified: AtomicU64,
    passes: AtomicU64,
    lost: AtomicU64,
    torn: AtomicU64,
    stale: AtomicU64,
}

static TALLIES: [Tally; MAX_CPUS] = [const {
    Tally {
        writes: AtomicU64::new(0),
        verified: AtomicU64::new(0),
        passes: AtomicU64::new(0),
        lost: AtomicU64::new(0),
        torn: AtomicU64::new(0),
        stale: AtomicU64::new(0),
    }
}; MAX_CPUS];
static FILLED: AtomicU32 = AtomicU32::new(0);
/// Number of the verdict asked for.
static VERDICT: AtomicU32 = AtomicU32::new(0);
/// vCPUs that have done their part of all verdicts so far.
static VERDICT_PARTS: AtomicU32 = AtomicU32::new(0);

fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
}

fn sum(cpus: usize, field: impl Fn(&Tally) -> &AtomicU64) -> u64 {
    TALLIES[..cpus]
        .iter()
        .map(|tally| field(tally).load(Ordering::Relaxed))
        .sum()
}

/// CPU 0 waits here for the others' parts.
pub fn wait_for_all_filled(set: &WorkingSet) {
    while FILLED.load(Ordering::Acquire) < set.cpus as u32 {
        core::hint::spin_loop();
    }
}

/// Work that falls due evenly over time.
struct Pace {
    per_s: u64,
    since_ns: u64,
    done: u64,
}

impl Pace {
    fn new(per_s: u64, now: u64) -> Pace {
        Pace {
            per_s,
            since_ns: now,
            done: 0,
        }
    }

    /// How much is due now, a batch at most.
    fn due(&mut self, now: u64) -> u64 {
        if self.per_s == u64::MAX {
            return BATCH;
        }
        let elapsed = now.saturating_sub(self.since_ns);
        let owed = |ns: u64| (u128::from(self.per_s) * u128::from(ns) / 1_000_000_000) as u64;
        let total = owed(elapsed);
        let due = total.saturating_sub(self.done);
        if due > owed(MAX_BACKLOG_NS) + BATCH {
            *self = Pace::new(self.per_s, now);
            return 0;
        }
        // Starting over each second keeps the numbers small; nothing is owed then.
        if due == 0 && elapsed > 1_000_000_000 && total == self.done {
            *self = Pace::new(self.per_s, now);
        }
        due.min(BATCH)
    }
}

/// One vCPU at work on its part.
pub struct Worker {
    set: &'static WorkingSet,
    cpu: usize,
    first: u64,
    pages: u64,
    hot: u64,
    /// All writes of this vCPU: what the counters of its pages must add up to.
    writes: u64,
    cursor: u64,
    stride_start: u64,
    random: u64,
    walk: u64,
    verdicts: u32,
    details: u64,
}

impl Worker {
    /// The worker of vCPU `cpu`, which runs this.
    pub fn new(set: &'static WorkingSet, cpu: usize) -> Worker {
        let (first, pages) = set.part(cpu);
        Worker {
            set,
            cpu,
            first,
            pages,
            hot: set.hot_part(cpu),
            writes: 0,
            cursor: 0,
            stride_start: 0,
            random: page::mix(set.seed ^ cpu as u64) | 1,
            walk: 0,
            verdicts: 0,
            details: 0,
        }
    }

    fn tally(&self) -> &'static Tally {
        &TALLIES[self.cpu]
    }

    /// Writes the first version of every page of the part that is not to stay zero.
    pub fn fill(&mut self) {
        for index in 0..self.pages {
            let page = self.first + index;
            self.set.expected(page).store(0, Ordering::Relaxed);
            if index < self.hot || !self.set.stays_zero(page) {
                self.write(page);
            }
        }
        FILLED.fetch_add(1, Ordering::Release);
    }

    /// The next version of a page.
    fn write(&mut self, page: u64) {
        let expected = self.set.expected(page);
        let counter = expected.load(Ordering::Relaxed).wrapping_add(1);
        let identity = self.set.identity(page, self.cpu);
        // SAFETY: a page of this vCPU's part.
        unsafe { page::write(self.set.address(page), &identity, u64::from(counter)) };
        expected.store(counter, Ordering::Relaxed);
        self.writes += 1;
        self.tally().writes.store(self.writes, Ordering::Relaxed);
    }

    /// Checks a page; counts, tells and mends what is wrong with it.
    fn verify(&mut self, page: u64) {
        let expected = u64::from(self.set.expected(page).load(Ordering::Relaxed));
        let identity = self.set.identity(page, self.cpu);
        let at = self.set.address(page);
        // SAFETY: a page of this vCPU's part.
        let found = unsafe { page::check(at, &identity, expected) };
        let tally = self.tally();
        bump(&tally.verified, 1);
        let (kind, count, counter) = match found {
            Found::Whole => return,
            Found::Lost(counter) => ("lost", &tally.lost, counter),
            Found::Torn(counter) => ("torn", &tally.torn, counter),
            Found::Stale(counter) => ("stale", &tally.stale, counter),
        };
        bump(count, 1);
        self.details += 1;
        if self.details <= MAX_DETAILS {
            serial::line(format_args!(
                "memory: damage kind={kind} page={page} gpa={:#x} expected={expected} found={counter}",
                at as u64,
            ));
        }
        // SAFETY: as above.
        unsafe {
            if expected == 0 {
                page::wipe(at);
            } else {
                page::write(at, &identity, expected);
            }
        }
    }

    /// Checks the whole part, and that no write is missing in pages and array alike.
    fn verify_all(&mut self) {
        let mut counted = 0u64;
        for page in self.first..self.first + self.pages {
            self.verify(page);
            counted += u64::from(self.set.expected(page).load(Ordering::Relaxed));
        }
        // The array counts modulo 2^32 a page, which no run reaches.
        if counted != self.writes {
            bump(&self.tally().lost, counted.abs_diff(self.writes));
            serial::line(format_args!(
                "memory: damage kind=lost cpu={} expected={} found={counted}",
                self.cpu, self.writes,
            ));
            self.writes = counted;
        }
    }

    /// The next hot page to write.
    fn next_hot(&mut self) -> u64 {
        let index = match self.set.pattern {
            Pattern::Sequential => {
                let index = self.cursor;
                self.cursor = (self.cursor + 1) % self.hot;
                index
            }
            Pattern::Random => {
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                self.random % self.hot
            }
            Pattern::Strided(stride) => {
                let index = self.cursor;
                self.cursor += stride;
                if self.cursor >= self.hot {
                    self.stride_start = (self.stride_start + 1) % stride.min(self.hot);
                    self.cursor = self.stride_start;
                }
                index
            }
        };
        self.first + index
    }

    /// Damages three pages of this part, one in each way; the walk or the verdict must find them.
    pub fn corrupt(&mut self) {
        let mut victims = (self.first..self.first + self.pages)
            .rev()
            .filter(|&page| self.set.expected(page).load(Ordering::Relaxed) != 0);
        let (Some(lost), Some(torn), Some(stale)) =
            (victims.next(), victims.next(), victims.next())
        else {
            serial::line(format_args!("guest: corrupt=1 needs three written pages"));
            return;
        };
        self.write(stale);
        let identity = self.set.identity(stale, self.cpu);
        let older = u64::from(self.set.expected(stale).load(Ordering::Relaxed)) - 1;
        // SAFETY: pages of this vCPU's part.
        unsafe {
            page::wipe(self.set.address(lost));
            let word = self.set.address(torn).add(300);
            word.write_volatile(!word.read_volatile());
            page::write(self.set.address(stale), &identity, older);
        }
    }

    /// Dirties, verifies and, on vCPU 0, reports and listens, for ever.
    pub fn run(&mut self) -> ! {
        let set = self.set;
        service::start_ticks(set.tick_ms);
        let start = clock::now_ns(self.cpu);
        let mut writes = Pace::new(if self.hot == 0 { 0 } else { set.rate }, start);
        let walk_rate = if set.verify && self.pages > 0 {
            set.verify_pages_per_s
        } else {
            0
        };
        let mut walk = Pace::new(walk_rate, start);
        let (mut next_report, mut next_input) = (start + set.report_ns, start);
        loop {
            let now = clock::now_ns(self.cpu);
            let due = writes.due(now);
            for _ in 0..due {
                let page = self.next_hot();
                if set.verify {
                    // Damage must be seen before the next version covers it.
                    self.verify(page);
                }
                self.write(page);
            }
            writes.done += due;
            let looks = walk.due(now);
            for _ in 0..looks {
                self.verify(self.first + self.walk);
                self.walk += 1;
                if self.walk == self.pages {
                    self.walk = 0;
                    bump(&self.tally().passes, 1);
                }
            }
            walk.done += looks;
            if set.report_ns != 0 && now >= next_report {
                next_report = now + set.report_ns - (now - next_report) % set.report_ns;
                if set.verify && walk_rate == 0 {
                    for index in 0..self.hot {
                        self.verify(self.first + index);
                    }
                }
                if self.cpu == 0 {
                    self.report(now - start);
                }
            }
            self.serve_verdict();
            if self.cpu == 0 && now >= next_input {
                next_input = now + INPUT_NS;
                self.listen();
            }
            if due < BATCH && looks < BATCH {
                service::idle();
            }
        }
    }

    fn report(&self, since_ns: u64) {
        let cpus = self.set.cpus;
        let passes = TALLIES[..cpus]
            .iter()
            .enumerate()
            .filter(|&(cpu, _)| self.set.part(cpu).1 > 0)
            .map(|(_, tally)| tally.passes.load(Ordering::Relaxed))
            .min()
            .unwrap_or(0);
        serial::line(format_args!(
            "memory: report t_ms={} writes={} verified={} lost={} torn={} stale={} passes={passes}",
            since_ns / 1_000_000,
            sum(cpus, |tally| &tally.writes),
            sum(cpus, |tally| &tally.verified),
            sum(cpus, |tally| &tally.lost),
            sum(cpus, |tally| &tally.torn),
            sum(cpus, |tally| &tally.stale),
        ));
    }

    /// Does this vCPU's part of a verdict that was asked for.
    fn serve_verdict(&mut self) {
        if VERDICT.load(Ordering::Acquire) != self.verdicts {
            self.verdicts += 1;
            self.verify_all();
            VERDICT_PARTS.fetch_add(1, Ordering::Release);
        }
    }

    fn listen(&mut self) {
        while let Some(byte) = serial::receive() {
            match byte {
                b'v' => self.verdict(),
                b'q' => power::power_off(),
                b'r' => power::reset(),
                _ => {}
            }
        }
    }

    fn verdict(&mut self) {
        let cpus = self.set.cpus;
        VERDICT.fetch_add(1, Ordering::Release);
        self.serve_verdict();
        while VERDICT_PARTS.load(Ordering::Acquire) != self.verdicts.wrapping_mul(cpus as u32) {
            core::hint::spin_loop();
        }
        let (lost, torn, stale) = (
            sum(cpus, |tally| &tally.lost),
            sum(cpus, |tally| &tally.torn),
            sum(cpus, |tally| &tally.stale),
        );
        serial::line(format_args!(
            "memory: verdict pages={} writes={} lost={lost} torn={torn} stale={stale} {}",
            self.set.pages,
            sum(cpus, |tally| &tally.writes),
            if lost + torn + stale == 0 {
                "ok"
            } else {
                "damaged"
            },
        ));
    }
}
