//! Block guest: reads and writes a virtio disk by a driver that polls, to measure it and to check what it reads.
//!
//! ```text
//!  find the disk (ECAM), set it up ─> "block: ready …" ─> ┌ `work=read`, `write`: the whole disk, again and again ┐
//!                                                         │ `work=wait`: halted until the next tick      │
//!                                                         └ look at serial input: `m`, `v`, `q`, `r`     ┘
//! ```
//!
//! One vCPU polls all queues, in ring 3; the device's used rings are all that it looks at, and it takes no
//! interrupt of the disk. A request is a read of one aligned 4 KiB block, in three descriptors as Linux' driver
//! makes them without indirect ones; what is done in one look at a queue is asked again in one batch, with one
//! notification if the device wants it.
//!
//! # Parameters (`key=value` on the command line)
//!
//! | key         | default | meaning                                                                              |
//! |-------------|---------|--------------------------------------------------------------------------------------|
//! | `queues`    | 1       | queues used (1–16)                                                                   |
//! | `depth`     | 32      | requests under way in each                                                           |
//! | `run_ms`    | 1000    | how long a measurement takes, after a tenth of it that is not counted                |
//! | `seed`      | 1       | of the random order                                                                  |
//! | `event_idx` | `on`    | `off`: does without VIRTIO_F_EVENT_IDX                                               |
//! | `work`      | `wait`  | `read`: reads and checks the disk all the time; `write`: writes it before each time  |
//! | `ecam`      |         | address of the ECAM window; else ACPI's, else 0xe0000000 (this project, QEMU microvm) |
//! | `report_ms` | 1000    | interval of reports while `work=read`                                                |
//!
//! # Serial input
//!
//! `m`: measures: random blocks for `run_ms`, then `block: result …`; `v`: reads the whole disk, then
//! `block: verdict …`; `q`: power off; `r`: reset.
//!
//! # Output
//!
//! ```text
//! block: ready blocks=65536 queues=1 depth=32 event_idx=1
//! block: result requests=100000 errors=0 elapsed_ns=1000000000 latency_ns=10000 notified=3000
//! block: report t_ms=1000 passes=12 requests=786432 errors=0 damaged=0
//! block: verdict passes=13 requests=851968 errors=0 damaged=0 checksum=1234 ok
//! ```
//!
//! `latency_ns` is the mean from a request's start to the look that found it done; `notified` counts
//! notifications. With `work=write` each pass first writes every block anew: its number, then the pass, as 64-bit words that
//! fill it in turn; `damaged` are then blocks that read back as something else. `errors` are requests that the device did not answer with success and the whole block;
//! `damaged` are passes over the disk with another checksum than the first one (`block/checksum.rs`).

#![no_std]
#![no_main]

#[path = "block/checksum.rs"]
mod checksum;
#[path = "block/disk.rs"]
mod disk;
#[path = "block/pci.rs"]
mod pci;
#[path = "block/queue.rs"]
mod queue;
mod rt;

use disk::{Disk, MAX_QUEUES};
use rt::machine::Machine;
use rt::{clock, power, serial, service};

const DEFAULT_ECAM: u64 = 0xe000_0000;
const TICK_MS: u64 = 2;
/// Blocks between two that are read one after the other; a prime, so that each comes once in a pass.
const STEP: u64 = 1_000_003;
const NS_PER_MS: u64 = 1_000_000;

fn main(machine: &Machine) -> ! {
    let params = &machine.params;
    let number = |key, default| params.number(key).unwrap_or(default);
    let queues = number("queues", 1).clamp(1, MAX_QUEUES as u64) as usize;
    let depth = number("depth", 32).clamp(1, 1024) as u16;
    let ecam = params
        .number("ecam")
        .or(machine.ecam)
        .unwrap_or(DEFAULT_ECAM);
    let Some(function) = pci::find_block_device(ecam) else {
        machine.give_up("no virtio disk on PCI bus 0");
    };
    let disk = match Disk::set_up(
        machine,
        function,
        queues,
        depth,
        params.flag("event_idx", true),
    ) {
        Ok(disk) => disk,
        Err(why) => machine.give_up(why),
    };
    serial::line(format_args!(
        "block: ready blocks={} queues={queues} depth={depth} event_idx={}",
        disk.blocks,
        u8::from(disk.event_idx),
    ));
    let mut reader = Reader {
        disk,
        random: number("seed", 1) | 1,
        run_ns: number("run_ms", 1000).clamp(1, 600_000) * NS_PER_MS,
        passes: 0,
        requests: 0,
        errors: 0,
        damaged: 0,
        checksum: 0,
        writes: false,
    };
    service::start_ticks(TICK_MS);
    match params.text("work") {
        Some("write") => {
            reader.writes = true;
            reader.read_on(number("report_ms", 1000) * NS_PER_MS)
        }
        Some("read") => reader.read_on(number("report_ms", 1000) * NS_PER_MS),
        _ => loop {
            service::idle();
            reader.listen();
        },
    }
}

fn ap_main(_index: usize) -> ! {
    service::halt()
}

struct Reader {
    disk: Disk,
    random: u64,
    run_ns: u64,
    passes: u64,
    requests: u64,
    errors: u64,
    damaged: u64,
    /// Of the first pass.
    checksum: u64,
    /// Each pass writes the disk first.
    writes: bool,
}

/// What a measurement counted.
#[derive(Default)]
struct Count {
    requests: u64,
    errors: u64,
    latency: u64,
    notified: u64,
}

impl Reader {
    fn listen(&mut self) {
        while let Some(byte) = serial::receive() {
            match byte {
                b'm' => self.measure(),
                b'v' => {
                    self.pass();
                    self.tell_verdict();
                }
                b'q' => power::power_off(),
                b'r' => power::reset(),
                _ => {}
            }
        }
    }

    /// xorshift64*, as a block of the disk.
    fn random_block(random: &mut u64, blocks: u64) -> u64 {
        *random ^= *random >> 12;
        *random ^= *random << 25;
        *random ^= *random >> 27;
        let high = random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        high * blocks.min(1 << 32) >> 32
    }

    /// Random reads at full depth for `ns`; every request that was found done in that time is counted.
    fn load(&mut self, ns: u64) -> Count {
        let (blocks, mut random) = (self.disk.blocks, self.random);
        let mut count = Count::default();
        let end = clock::now_ns(0) + ns;
        loop {
            for queue in self.disk.queues() {
                if queue.under_way() == 0 {
                    let now = clock::tsc();
                    for slot in 0..queue.depth() {
                        queue.start(slot, Self::random_block(&mut random, blocks), now);
                    }
                } else {
                    while let Some(done) = queue.next_done() {
                        let now = clock::tsc();
                        count.requests += 1;
                        count.errors += u64::from(!done.ok);
                        count.latency += now.saturating_sub(done.started);
                        queue.start(done.slot, Self::random_block(&mut random, blocks), now);
                    }
                }
                count.notified += u64::from(queue.publish());
            }
            if clock::now_ns(0) >= end {
                break;
            }
        }
        self.random = random;
        count
    }

    /// Waits for what is under way and drops it.
    fn drain(&mut self) {
        for queue in self.disk.queues() {
            while queue.under_way() > 0 {
                if let Some(done) = queue.next_done() {
                    self.errors += u64::from(!done.ok);
                }
            }
        }
    }

    fn measure(&mut self) {
        service::lapic_write(service::lapic::INITIAL_COUNT, 0);
        let warm = self.load(self.run_ns / 10);
        let (start_ns, start) = (clock::now_ns(0), clock::tsc());
        let count = self.load(self.run_ns);
        let (elapsed_ns, ticks) = (clock::now_ns(0) - start_ns, clock::tsc() - start);
        self.drain();
        service::start_ticks(TICK_MS);
        self.requests += warm.requests + count.requests;
        self.errors += warm.errors + count.errors;
        let mean = u128::from(count.latency) * u128::from(elapsed_ns)
            / u128::from(ticks.max(1))
            / u128::from(count.requests.max(1));
        serial::line(format_args!(
            "block: result requests={} errors={} elapsed_ns={elapsed_ns} latency_ns={mean} notified={}",
            count.requests, self.errors, count.notified,
        ));
    }

    /// Writes every block once.
    fn write_pass(&mut self) {
        let (blocks, mut next, passes) = (self.disk.blocks, 0, self.passes);
        let mut left = blocks;
        while left > 0 {
            for queue in self.disk.queues() {
                let mut ask = |queue: &mut queue::Queue, slot| {
                    if next < blocks {
                        for words in queue.data_mut(slot).chunks_exact_mut(16) {
                            words[..8].copy_from_slice(&u64::to_le_bytes(next));
                            words[8..].copy_from_slice(&passes.to_le_bytes());
                        }
                        queue.start_write(slot, next);
                        next += 1;
                    }
                };
                if queue.under_way() == 0 {
                    for slot in 0..queue.depth() {
                        ask(queue, slot);
                    }
                } else {
                    while let Some(done) = queue.next_done() {
                        left -= 1;
                        self.requests += 1;
                        self.errors += u64::from(!done.ok);
                        ask(queue, done.slot);
                    }
                }
                queue.publish();
            }
        }
    }

    /// Reads every block once and compares the checksum with that of the first pass.
    fn pass(&mut self) {
        if self.writes {
            self.write_pass();
        }
        let writes = self.writes;
        let pass = self.passes;
        let (blocks, mut next, mut sum) = (self.disk.blocks, 0, 0u64);
        // A disk of a multiple of STEP blocks is read in order.
        let step = if blocks.is_multiple_of(STEP) { 1 } else { STEP };
        let mut left = blocks;
        while left > 0 {
            for queue in self.disk.queues() {
                let mut ask = |queue: &mut queue::Queue, slot| {
                    if next < blocks {
                        let block = (u128::from(next) * u128::from(step) % u128::from(blocks)) as u64;
                        queue.start(slot, block, 0);
                        next += 1;
                    }
                };
                if queue.under_way() == 0 {
                    for slot in 0..queue.depth() {
                        ask(queue, slot);
                    }
                } else {
                    while let Some(done) = queue.next_done() {
                        left -= 1;
                        self.requests += 1;
                        self.errors += u64::from(!done.ok);
                        let data = queue.data(done.slot);
                        if writes {
                            let wrong = |words: &[u8]| {
                                words[..8] != done.block.to_le_bytes() || words[8..] != pass.to_le_bytes()
                            };
                            self.damaged += u64::from(data.chunks_exact(16).any(wrong));
                        } else {
                            sum = sum.wrapping_add(checksum::of_block(done.block, data));
                        }
                        ask(queue, done.slot);
                    }
                }
                queue.publish();
            }
        }
        self.passes += 1;
        if self.passes == 1 {
            self.checksum = sum;
        }
        self.damaged += u64::from(sum != self.checksum);
    }

    fn read_on(&mut self, report_ns: u64) -> ! {
        let start = clock::now_ns(0);
        let mut next_report = start + report_ns;
        loop {
            self.pass();
            let now = clock::now_ns(0);
            if report_ns != 0 && now >= next_report {
                next_report = now + report_ns;
                serial::line(format_args!(
                    "block: report t_ms={} passes={} requests={} errors={} damaged={}",
                    (now - start) / NS_PER_MS,
                    self.passes,
                    self.requests,
                    self.errors,
                    self.damaged,
                ));
            }
            self.listen();
        }
    }

    fn tell_verdict(&self) {
        let conclusion = if self.errors == 0 && self.damaged == 0 {
            "ok"
        } else {
            "damaged"
        };
        serial::line(format_args!(
            "block: verdict passes={} requests={} errors={} damaged={} checksum={} {conclusion}",
            self.passes, self.requests, self.errors, self.damaged, self.checksum,
        ));
    }
}
