//! The limit of the disk's cases: the same reads by one thread around io_uring on the host, with a ring for each queue.
//!
//! It looks for completions as the guest does, without sleeping, and starts as many reads anew in one system call.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, types};
use serde_json::Value;

use crate::blk::{BLOCK, Load, figures};

/// A ring with its buffers.
struct Queue {
    ring: IoUring,
    buffers: Vec<[u8; BLOCK]>,
    started: Vec<Instant>,
    /// Buffers without a read under way.
    free: Vec<usize>,
    under_way: usize,
}

/// What was counted.
#[derive(Default)]
struct Count {
    requests: u64,
    latency: Duration,
}

impl Queue {
    fn new(file: &File, depth: usize) -> Result<Self> {
        let ring = IoUring::new(u32::try_from(depth)?.next_power_of_two())
            .context("this host gives no io_uring")?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self {
            ring,
            buffers: vec![[0; BLOCK]; depth],
            started: vec![Instant::now(); depth],
            free: (0..depth).collect(),
            under_way: 0,
        })
    }

    fn look(&mut self, count: &mut Count) -> Result<()> {
        let mut now = None;
        for entry in self.ring.completion() {
            self.under_way -= 1;
            ensure!(
                entry.result() == BLOCK as i32,
                "a read returned {}",
                entry.result()
            );
            let slot = entry.user_data() as usize;
            let now = *now.get_or_insert_with(Instant::now);
            count.requests += 1;
            count.latency += now - self.started[slot];
            self.free.push(slot);
        }
        Ok(())
    }

    fn start(&mut self, mut block: impl FnMut() -> u64) -> Result<()> {
        if self.free.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        for slot in self.free.drain(..) {
            self.started[slot] = now;
            let buffer = self.buffers[slot].as_mut_ptr();
            let entry = opcode::Read::new(types::Fixed(0), buffer, BLOCK as u32)
                .offset(block() * BLOCK as u64)
                .build()
                .user_data(slot as u64);
            // SAFETY: the buffer is this slot's own, and `drain` waits for its read before it goes.
            unsafe { self.ring.submission().push(&entry)? };
            self.under_way += 1;
        }
        self.ring.submit()?;
        Ok(())
    }

    /// Waits for what is under way.
    fn drain(&mut self) -> Result<()> {
        while self.under_way > 0 {
            self.ring.submit_and_wait(1)?;
            self.under_way -= self.ring.completion().count();
        }
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Err(error) = self.drain() {
            eprintln!("bench: reads cannot be waited for, their buffers are kept: {error:#}");
            std::mem::forget(std::mem::take(&mut self.buffers));
        }
    }
}

/// Reads for the load's time, after a tenth of it that is not counted.
pub(crate) fn reads(load: &Load<'_>) -> Result<Value> {
    let file = File::open(load.image)?;
    let blocks = file.metadata()?.len() / BLOCK as u64;
    let mut queues = (0..load.case.queues)
        .map(|_| Queue::new(&file, load.case.depth.into()))
        .collect::<Result<Vec<_>>>()?;
    // xorshift64*, as the guest does.
    let mut random = load.seed | 1;
    let mut block = || {
        random ^= random >> 12;
        random ^= random << 25;
        random ^= random >> 27;
        ((random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) * blocks.min(1 << 32)) >> 32
    };
    let mut run = |time: Duration| -> Result<(Count, Duration)> {
        let begin = Instant::now();
        let mut count = Count::default();
        while begin.elapsed() < time {
            for queue in &mut queues {
                queue.look(&mut count)?;
                queue.start(&mut block)?;
            }
        }
        Ok((count, begin.elapsed()))
    };
    run(load.time / 10)?;
    let (count, elapsed) = run(load.time)?;
    let mean = count.latency.as_nanos() / u128::from(count.requests.max(1));
    Ok(figures(count.requests, elapsed, u64::try_from(mean)?))
}
