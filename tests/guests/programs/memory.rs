//! Memory guest: fills a working set, dirties it, and checks every page of it against what it knows.
//!
//! ```text
//!  fill own part ─> "memory: ready …" ─> ┌ dirty hot pages at `rate`    ┐ ─ tick (hlt) ─┐
//!  (every vCPU)                          │ verify the set bit by bit    │ <─────────────┘
//!                                        └ report; look at serial input ┘
//! ```
//!
//! Each vCPU owns a contiguous part of the working set and alone writes and checks it. A page is a
//! function of (seed, page, counter), see `page.rs`; the counter that a page must have stands outside
//! of it in an array, and the sum of the array in the owner's registers and stack. So:
//!
//! | count   | what was found                                                                      |
//! |---------|-------------------------------------------------------------------------------------|
//! | `lost`  | a page that holds no write of ours (zero, or another page's), a counter in the array behind its page, writes missing in both |
//! | `torn`  | a page that mixes versions or holds foreign bytes                                   |
//! | `stale` | a whole page of ours in an older version                                            |
//!
//! Damage is counted once: a damaged page is written anew. The first few are told in detail:
//! `memory: damage kind=… page=… gpa=… expected=… found=…`.
//!
//! # Parameters (`key=value` on the command line)
//!
//! | key                | default      | meaning                                                     |
//! |--------------------|--------------|-------------------------------------------------------------|
//! | `working_set_mib`  | 256          | size of the set; `max`: all free RAM; cut to what there is  |
//! | `pages`            |              | the same in pages; wins over `working_set_mib`              |
//! | `cpus`             | all          | vCPUs to use                                                |
//! | `hot_mib`          | 16           | the part that is dirtied again and again, over all vCPUs    |
//! | `rate`             | 1000         | pages written per second and vCPU; 0: idle; `max`: no limit |
//! | `pattern`          | `sequential` | order within the hot set: `sequential`, `random`, `strided` |
//! | `stride`           | 17           | step of `strided`, in pages                                 |
//! | `seed`             | 1            | of page contents and of random order                        |
//! | `zero_fraction`    | 0            | part of the pages outside the hot set never written (0–1)   |
//! | `report_ms`        | 1000         | interval of reports; 0: none                                |
//! | `verify`           | `on`         | `off`: only the verdict looks at pages                      |
//! | `verify_mib_per_s` | 64           | speed of the walk, over all vCPUs; 0: only the hot pages at each report |
//! | `tick_ms`          | 10           | timer period: how often an idle vCPU wakes (1–1000)         |
//! | `corrupt`          | 0            | test of the test: `1` damages three pages after the fill, one each lost, torn, stale |
//!
//! With `rate=0 verify=off` a vCPU is halted but for its ticks.
//!
//! # Serial input
//!
//! `v`: all vCPUs check all their pages, then `memory: verdict …`; `q`: power off; `r`: reset.
//!
//! # Output
//!
//! ```text
//! memory: ready pages=65536 cpus=2 hot=4096 fill_ms=80
//! memory: report t_ms=1000 writes=67536 verified=16384 lost=0 torn=0 stale=0 passes=0
//! memory: verdict pages=65536 writes=70000 lost=0 torn=0 stale=0 ok
//! ```
//!
//! `writes` counts page writes, the fill included; `verified` pages looked at; `passes` whole walks
//! over the set (of the slowest vCPU); a verdict ends in `ok` or `damaged`. `t_ms` is time since
//! `ready` by the guest's clock.

#![no_std]
#![no_main]

#[path = "memory/page.rs"]
mod page;
mod rt;
#[path = "memory/set.rs"]
mod set;
#[path = "memory/worker.rs"]
mod worker;

use core::sync::atomic::{AtomicBool, Ordering};

use rt::machine::Machine;
use rt::{clock, serial, smp};
use set::WorkingSet;
use worker::Worker;

/// The set is laid out and `WorkingSet::get` may be used.
static GO: AtomicBool = AtomicBool::new(false);

fn main(machine: &Machine) -> ! {
    let cpus = smp::start(machine, machine.wanted_cpus());
    let start_ns = clock::now_ns(0);
    let set = WorkingSet::lay_out(machine, cpus);
    if set.pages == 0 {
        machine.give_up("no free RAM for a working set");
    }
    GO.store(true, Ordering::Release);
    let mut worker = Worker::new(set, 0);
    worker.fill();
    worker::wait_for_all_filled(set);
    let now = clock::now_ns(0);
    serial::line(format_args!(
        "memory: ready pages={} cpus={} hot={} fill_ms={}",
        set.pages,
        set.cpus,
        set.hot_pages(),
        (now - start_ns) / 1_000_000,
    ));
    if set.corrupt {
        worker.corrupt();
    }
    worker.run()
}

fn ap_main(index: usize) -> ! {
    while !GO.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let mut worker = Worker::new(WorkingSet::get(), index);
    worker.fill();
    worker.run()
}
