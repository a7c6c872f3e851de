//! CPU guest: keeps known contents in every kind of vCPU register, reads its clocks, counts its timer
//! interrupts, and tells what changed that must not.
//!
//! ```text
//!  every vCPU:  new patterns ─> load all registers ─> spin ─> store, compare ─> clocks ─> debug registers ─┐
//!                   ^                            (timer interrupts)                                        │
//!                   └──────────────────── vCPU 0: report, serial input <───────────────────────────────────┘
//! ```
//!
//! | count        | what was found                                                                  |
//! |--------------|---------------------------------------------------------------------------------|
//! | `fpu`        | ST0–ST7 or the x87 control word changed                                         |
//! | `sse`        | XMM0–15 or MXCSR changed                                                        |
//! | `avx`        | upper halves of YMM0–15 changed (when XCR0 has AVX)                             |
//! | `avx512`     | the rest of ZMM0–31, or k0–k7 changed (when XCR0 has AVX-512)                   |
//! | `gpr`        | rbx, rbp, r8–r15 changed                                                        |
//! | `seg`        | FS or GS base changed                                                           |
//! | `dr`         | DR0–DR3, DR6 or DR7 changed                                                     |
//! | `tsc_back`   | the TSC stepped back, on a vCPU or from one to another                          |
//! | `clock_back` | so did the KVM clock (between vCPUs: when it says that it is stable)            |
//!
//! # Parameters (`key=value` on the command line)
//!
//! | key         | default | meaning                                                               |
//! |-------------|---------|-----------------------------------------------------------------------|
//! | `cpus`      | all     | vCPUs to use                                                          |
//! | `report_ms` | 1000    | interval of reports; 0: none                                          |
//! | `tick_ms`   | 10      | period of the local APIC timer (1–1000)                               |
//! | `spins`     | 1000000 | turns of the loop that a round holds its registers for                |
//! | `rest`      | `off`   | `on`: a vCPU halts until the next tick after each round               |
//! | `corrupt`   | 0       | test of the test: `1` makes vCPU 0 find one fault of each kind        |
//!
//! # Serial input
//!
//! `v`: every vCPU goes round once more, then `cpu: verdict …`; `q`: power off; `r`: reset.
//!
//! # Output
//!
//! ```text
//! cpu: ready cpus=2 xcr0=231 kvmclock=1
//! cpu: report t_ms=1000 rounds=2000 fpu=0 sse=0 avx=0 avx512=0 gpr=0 seg=0 dr=0 tsc_back=0 clock_back=0 ticks=200 max_gap_ms=11 errors=0
//! cpu: verdict rounds=2100 fpu=0 … errors=0 ok
//! ```
//!
//! `errors` is the sum of the counts; `ticks` are timer interrupts of all vCPUs, `max_gap_ms` the
//! longest time by the guest's clock that any vCPU saw none (a lasting one counts as long as it is
//! now; rounds are its grain). Whether a gap is too long is for the reader to say.

#![no_std]
#![no_main]

#[path = "cpu/registers.rs"]
mod registers;
mod rt;
#[path = "cpu/time.rs"]
mod time;

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use registers::{Level, Registers, mix};
use rt::machine::{MAX_CPUS, Machine};
use rt::percpu::PerCpu;
use rt::{clock, power, serial, service, smp};
use time::Readings;

const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
/// Readings of the clocks a round.
const CLOCK_READINGS: usize = 100;
const INPUT_NS: u64 = 10_000_000;

/// What a vCPU counts; written by it alone. The order of `NAMES`.
#[repr(align(64))]
struct Tally {
    faults: [AtomicU64; NAMES.len()],
    rounds: AtomicU64,
    last_tick_ns: AtomicU64,
    max_gap_ns: AtomicU64,
}

const NAMES: [&str; 9] = [
    "fpu",
    "sse",
    "avx",
    "avx512",
    "gpr",
    "seg",
    "dr",
    "tsc_back",
    "clock_back",
];

static TALLIES: [Tally; MAX_CPUS] = [const {
    Tally {
        faults: [const { AtomicU64::new(0) }; NAMES.len()],
        rounds: AtomicU64::new(0),
        last_tick_ns: AtomicU64::new(0),
        max_gap_ns: AtomicU64::new(0),
    }
}; MAX_CPUS];

/// The words that FS:0 and GS:0 must show.
static BASE_WORDS: [[AtomicU64; 2]; MAX_CPUS] =
    [const { [AtomicU64::new(0), AtomicU64::new(0)] }; MAX_CPUS];
/// Addresses that nothing ever touches: breakpoints stand on them.
#[repr(align(4096))]
struct Untouched([AtomicU64; 512]);
static UNTOUCHED: Untouched = Untouched([const { AtomicU64::new(0) }; 512]);

static GO: AtomicBool = AtomicBool::new(false);
static CPUS: AtomicU32 = AtomicU32::new(0);
static SPINS: AtomicU64 = AtomicU64::new(0);
static TICK_MS: AtomicU64 = AtomicU64::new(0);
static REST: AtomicBool = AtomicBool::new(false);
static ARRIVED: AtomicU32 = AtomicU32::new(0);
static VERDICT: AtomicU32 = AtomicU32::new(0);
static VERDICT_PARTS: AtomicU32 = AtomicU32::new(0);

fn main(machine: &Machine) -> ! {
    let params = &machine.params;
    let cpus = smp::start(machine, machine.wanted_cpus());
    CPUS.store(cpus as u32, Ordering::Relaxed);
    SPINS.store(
        params.number("spins").unwrap_or(1_000_000),
        Ordering::Relaxed,
    );
    TICK_MS.store(
        params.number("tick_ms").unwrap_or(10).clamp(1, 1000),
        Ordering::Relaxed,
    );
    REST.store(params.flag("rest", false), Ordering::Relaxed);
    GO.store(true, Ordering::Release);
    let mut checker = Checker::new(0);
    checker.report_ns = params.number("report_ms").unwrap_or(1000).min(1 << 32) * 1_000_000;
    checker.corrupt = params.flag("corrupt", false);
    while ARRIVED.load(Ordering::Acquire) < cpus as u32 {
        core::hint::spin_loop();
    }
    serial::line(format_args!(
        "cpu: ready cpus={cpus} xcr0={} kvmclock={}",
        PerCpu::of(0).xcr0,
        u8::from(clock::is_paravirtual(0)),
    ));
    checker.run()
}

fn ap_main(index: usize) -> ! {
    while !GO.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    Checker::new(index).run()
}

struct Checker {
    cpu: usize,
    level: Level,
    round: u64,
    before: Registers,
    after: Registers,
    debug: service::DebugRegisters,
    latest: Readings,
    ticks: u64,
    verdicts: u32,
    report_ns: u64,
    corrupt: bool,
}

impl Checker {
    /// The checker of vCPU `cpu`, which runs this; sets its bases, debug registers and timer.
    fn new(cpu: usize) -> Checker {
        let words = &BASE_WORDS[cpu];
        for (slot, word) in words.iter().enumerate() {
            word.store(mix((cpu * 2 + slot) as u64 + 1), Ordering::Relaxed);
        }
        // SAFETY: nothing else here uses FS or GS.
        unsafe {
            service::write_msr(FS_BASE, (&raw const words[0]) as u64);
            service::write_msr(GS_BASE, (&raw const words[1]) as u64);
        }
        service::start_ticks(TICK_MS.load(Ordering::Relaxed));
        TALLIES[cpu]
            .last_tick_ns
            .store(clock::now_ns(cpu), Ordering::Relaxed);
        let mut checker = Checker {
            cpu,
            level: Level::of(PerCpu::of(cpu).xcr0),
            round: 0,
            before: Registers::zero(),
            after: Registers::zero(),
            debug: [0; 6],
            latest: Readings::ZERO,
            ticks: 0,
            verdicts: 0,
            report_ns: 0,
            corrupt: false,
        };
        checker.set_debug();
        ARRIVED.fetch_add(1, Ordering::Release);
        checker
    }

    fn count(&self, kind: &str) {
        let index = NAMES
            .iter()
            .position(|&name| name == kind)
            .expect("a kind of NAMES");
        let counter = &TALLIES[self.cpu].faults[index];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Other breakpoints every time: 8-byte data writes on words that nobody writes.
    fn set_debug(&mut self) {
        let word = |slot: u64| {
            let index = mix(self.round * 8 + slot + self.cpu as u64 * 1_000_003) % 512;
            (&raw const UNTOUCHED.0[index as usize]) as u64
        };
        // DR6 as after reset. DR7: L0–L3, bit 10 fixed, R/W 01 (write) and LEN 10 (8 bytes) four times.
        self.debug = [word(0), word(1), word(2), word(3), 0xffff_0ff0, 0x9999_0455];
        service::write_debug(&self.debug);
    }

    fn go_round(&mut self) {
        self.round += 1;
        let bases = [0, 1].map(|slot| BASE_WORDS[self.cpu][slot].load(Ordering::Relaxed));
        self.before
            .fill(self.round ^ ((self.cpu as u64) << 48), bases);
        self.before
            .hold(&mut self.after, self.level, SPINS.load(Ordering::Relaxed));
        if self.corrupt {
            self.before.damage(self.level);
            self.debug[2] ^= 8;
            // A latest reading in the future makes the next one a step back; of both clocks.
            let now = Readings::now(self.cpu);
            self.latest = Readings {
                tsc: now.tsc + (1 << 40),
                ns: now.ns + (1 << 40),
            };
            self.corrupt = false;
        }
        let changed = self.before.compare(&self.after, self.level);
        for (kind, changed) in [
            ("fpu", changed.fpu),
            ("sse", changed.sse),
            ("avx", changed.avx),
            ("avx512", changed.avx512),
            ("gpr", changed.gpr),
            ("seg", changed.seg),
        ] {
            if changed {
                self.count(kind);
            }
        }
        self.read_clocks();
        let changed = service::read_debug() != self.debug;
        if changed {
            self.count("dr");
        }
        if changed || self.round.is_multiple_of(16) {
            self.set_debug();
        }
        self.look_at_ticks();
        TALLIES[self.cpu]
            .rounds
            .store(self.round, Ordering::Relaxed);
    }

    fn read_clocks(&mut self) {
        for _ in 0..CLOCK_READINGS {
            let (tsc_back, clock_back) = self.latest.advance(Readings::now(self.cpu));
            let (tsc_across, clock_across) = time::advance_together(self.cpu);
            if tsc_back || tsc_across {
                self.count("tsc_back");
            }
            // Without the stable flag a KVM clock promises nothing between vCPUs.
            let together = clock::is_stable() || !clock::is_paravirtual(self.cpu);
            if clock_back || clock_across && together {
                self.count("clock_back");
            }
        }
    }

    fn look_at_ticks(&mut self) {
        let ticks = PerCpu::of(self.cpu).ticks();
        if ticks == self.ticks {
            return;
        }
        self.ticks = ticks;
        let tally = &TALLIES[self.cpu];
        let now = clock::now_ns(self.cpu);
        let gap = now.saturating_sub(tally.last_tick_ns.load(Ordering::Relaxed));
        tally.last_tick_ns.store(now, Ordering::Relaxed);
        if gap > tally.max_gap_ns.load(Ordering::Relaxed) {
            tally.max_gap_ns.store(gap, Ordering::Relaxed);
        }
    }

    fn run(&mut self) -> ! {
        let start = clock::now_ns(self.cpu);
        let (mut next_report, mut next_input) = (start + self.report_ns, start);
        loop {
            self.go_round();
            self.serve_verdict();
            let now = clock::now_ns(self.cpu);
            if self.cpu == 0 {
                if self.report_ns != 0 && now >= next_report {
                    next_report = now + self.report_ns - (now - next_report) % self.report_ns;
                    tell(
                        format_args!("report t_ms={}", (now - start) / 1_000_000),
                        "",
                    );
                }
                if now >= next_input {
                    next_input = now + INPUT_NS;
                    self.listen();
                }
            }
            if REST.load(Ordering::Relaxed) {
                service::idle();
            }
        }
    }

    fn serve_verdict(&mut self) {
        if VERDICT.load(Ordering::Acquire) != self.verdicts {
            self.verdicts += 1;
            self.go_round();
            VERDICT_PARTS.fetch_add(1, Ordering::Release);
        }
    }

    fn listen(&mut self) {
        while let Some(byte) = serial::receive() {
            match byte {
                b'v' => {
                    VERDICT.fetch_add(1, Ordering::Release);
                    self.serve_verdict();
                    let parts = self.verdicts.wrapping_mul(CPUS.load(Ordering::Relaxed));
                    while VERDICT_PARTS.load(Ordering::Acquire) != parts {
                        core::hint::spin_loop();
                    }
                    tell(
                        format_args!("verdict"),
                        if errors() == 0 { " ok" } else { " damaged" },
                    );
                }
                b'q' => power::power_off(),
                b'r' => power::reset(),
                _ => {}
            }
        }
    }
}

fn tallies() -> &'static [Tally] {
    &TALLIES[..CPUS.load(Ordering::Relaxed) as usize]
}

fn errors() -> u64 {
    tallies()
        .iter()
        .flat_map(|tally| &tally.faults)
        .map(|count| count.load(Ordering::Relaxed))
        .sum()
}

/// Writes a line of all counts; by vCPU 0.
fn tell(head: core::fmt::Arguments<'_>, tail: &str) {
    let now = clock::now_ns(0);
    let sum = |of: &dyn Fn(&Tally) -> u64| tallies().iter().map(of).sum::<u64>();
    let fault = |index: usize| sum(&|tally| tally.faults[index].load(Ordering::Relaxed));
    let ticks: u64 = (0..tallies().len())
        .map(|cpu| PerCpu::of(cpu).ticks())
        .sum();
    let gap = tallies()
        .iter()
        .map(|tally| {
            let open = now.saturating_sub(tally.last_tick_ns.load(Ordering::Relaxed));
            tally.max_gap_ns.load(Ordering::Relaxed).max(open)
        })
        .max()
        .unwrap_or(0);
    serial::line(format_args!(
        "cpu: {head} rounds={} {}={} {}={} {}={} {}={} {}={} {}={} {}={} {}={} {}={} ticks={ticks} \
         max_gap_ms={} errors={}{tail}",
        sum(&|tally| tally.rounds.load(Ordering::Relaxed)),
        NAMES[0],
        fault(0),
        NAMES[1],
        fault(1),
        NAMES[2],
        fault(2),
        NAMES[3],
        fault(3),
        NAMES[4],
        fault(4),
        NAMES[5],
        fault(5),
        NAMES[6],
        fault(6),
        NAMES[7],
        fault(7),
        NAMES[8],
        fault(8),
        gap / 1_000_000,
        errors(),
    ));
}
