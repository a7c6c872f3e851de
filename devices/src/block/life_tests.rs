//! Queues that start, stop, wait and fail; disks that grow. One body over the engines, with and without O_DIRECT.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memory::PageBitmap;
use tempfile::NamedTempFile;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config_space;
use super::request::{FLUSH, IN, IOERR, OK, OUT, WRITE_ZEROES};
use super::testing::{Machine, SIZE, each, folder, header, same, ways};
use super::*;
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};
use crate::virtio::testing::Driver;
use crate::virtio::{VirtioDevice, Virtqueue};

#[test]
fn a_request_that_cannot_be_answered_needs_a_reset() {
    each(|machine| {
        let driver = &mut machine.driver;
        driver.offer(&[&header(IN, 0)[..15]], &[512, 1]);
        wait_reset(driver, 1);
        assert_eq!(driver.used(), None);
        assert!(machine.block.stop_queue(0).is_some());
        let mut driver = Driver::new(0);
        machine.block.start_queue(driver.queue()).expect("a thread");
        driver.offer(&[&header(FLUSH, 0)], &[]);
        wait_reset(&driver, 1);
    });
}

fn wait_reset(driver: &Driver, wanted: usize) {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while driver.interrupt.reset.load(Ordering::SeqCst) < wanted {
        assert!(std::time::Instant::now() < until, "no reset is asked for");
        std::thread::yield_now();
    }
}

#[test]
fn without_flush_writes_go_through() {
    each(|machine| {
        machine.block.stop_queue(0).expect("a queue");
        machine
            .block
            .set_features(machine.block.features() & !config_space::FLUSH);
        machine.driver = Driver::new(0);
        machine
            .block
            .start_queue(machine.driver.queue())
            .expect("a thread");
        assert_eq!(machine.ask(OUT, 8, &[&[9; 4096]], &[]).0, OK);
        assert_eq!(machine.range(WRITE_ZEROES, 64, 8, 1), OK);
        assert_eq!(machine.on_disk(4096, 4096), [9; 4096]);
        assert_eq!(machine.on_disk(64 * 512, 4096), [0; 4096]);
    });
}

#[test]
fn read_pages_are_dirty() {
    each(|machine| {
        let pages = 64 << 20 >> 12;
        let at = 0x200_0800;
        let header_at = machine.driver.buffer(16);
        machine
            .driver
            .memory()
            .write_slice(&header(IN, 0), GuestAddress(header_at))
            .expect("RAM");
        machine
            .driver
            .ram
            .take_device_dirty(0, &mut PageBitmap::new(pages));
        machine.driver.offer_parts(&[
            (header_at, 16, false),
            (at, 8192, true),
            (0x300_0000, 1, true),
        ]);
        machine.driver.wait_used();
        let mut dirty = PageBitmap::new(pages);
        machine.driver.ram.take_device_dirty(0, &mut dirty);
        for page in [0x2000, 0x2001, 0x2002, 0x3000] {
            assert!(dirty.get(page), "page {page:#x}");
        }
        assert!(!dirty.get(0x1fff) && !dirty.get(0x2003));
    });
}

#[test]
fn stopping_finishes_what_is_under_way_and_nothing_is_lost() {
    each(|machine| {
        let mut queue = None;
        for round in 0..20u8 {
            let heads: Vec<u16> = (0..20)
                .map(|number| machine.offer(OUT, number * 16, &[&[round; 8192]], &[]))
                .collect();
            queue = machine.block.stop_queue(0);
            let mut stopped = queue.take().expect("a queue");
            // What it took has come back; the rest is in the ring.
            let mut back = 0;
            while machine.driver.used().is_some() {
                back += 1;
            }
            let mut left = 0;
            while stopped.pop().expect("a ring").is_some() {
                left += 1;
            }
            assert_eq!(back + left, heads.len());
            for _ in 0..left {
                stopped.unpop();
            }
            machine.block.start_queue(stopped).expect("a thread");
            for _ in 0..left {
                machine.driver.wait_used();
            }
            same(&machine.on_disk(0, 20 * 8192), &[round; 20 * 8192]);
        }
        assert!(queue.is_none());
        assert_eq!(machine.counter("write_ops"), 400);
    });
}

#[test]
fn a_ring_full_of_one_request() {
    each(|machine| {
        // The same descriptors again and again, more often than the queue is long.
        let header_at = machine.driver.buffer(16);
        machine
            .driver
            .memory()
            .write_slice(&header(IN, 0), GuestAddress(header_at))
            .expect("RAM");
        let head = machine
            .driver
            .offer_parts(&[(header_at, 16, false), (0x200_0000, 513, true)]);
        for _ in 0..500 {
            for _ in 0..Driver::SIZE - 2 {
                machine.driver.make_available(head);
            }
            for _ in 0..Driver::SIZE - 2 {
                assert_eq!(machine.driver.wait_used(), (head, 513));
            }
        }
        assert_eq!(machine.driver.wait_used(), (head, 513));
    });
}

#[test]
fn a_rate_limiter_delays_and_stops_with_requests_in_the_ring() {
    let folder = folder();
    for way in ways(folder.path()) {
        let limits = |refill_time_ms| RateLimiterConfig {
            bandwidth: Some(TokenBucketConfig {
                size: 4096,
                one_time_burst: 4096,
                refill_time_ms,
            }),
            ops: None,
        };
        let mut machine = Machine::new(folder.path(), way, |config| {
            config.rate_limiter = Some(limits(5));
        });
        for number in 0..8 {
            machine.offer(IN, number, &[], &[4096]);
        }
        for _ in 0..8 {
            machine.driver.wait_used();
        }
        assert!(machine.counter("throttled") > 0);
        assert_eq!(machine.counter("read_bytes"), 8 * 4096);
        // An hour's wait does not keep a stop waiting, nor loses a request.
        let mut machine = Machine::new(folder.path(), way, |config| {
            config.rate_limiter = Some(limits(3_600_000));
        });
        let heads: Vec<u16> = (0..5)
            .map(|number| machine.offer(IN, number, &[], &[4096]))
            .collect();
        machine.driver.wait_used();
        machine.driver.wait_used();
        let mut queue = machine.block.stop_queue(0).expect("a queue");
        for head in &heads[2..] {
            assert_eq!(
                queue.pop().expect("a ring").map(|chain| chain.head),
                Some(*head)
            );
        }
    }
}

#[test]
fn a_disk_grows_and_its_driver_hears_of_it() {
    each(|machine| {
        let capacity = |block: &Block| {
            let mut bytes = [0; 8];
            block.read_config(0, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        let told = |machine: &Machine| machine.driver.interrupt.config.load(Ordering::SeqCst);
        assert_eq!(capacity(&machine.block), SIZE / 512);
        assert_eq!(
            machine.block.resize(Some(2 * SIZE)).expect("room"),
            2 * SIZE
        );
        assert_eq!(
            (capacity(&machine.block), told(machine)),
            (2 * SIZE / 512, 1)
        );
        let (status, read, _) = machine.ask(IN, SIZE / 512, &[], &[512]);
        assert_eq!((status, read), (OK, vec![0; 512]));
        assert!(matches!(
            machine.block.resize(Some(SIZE)),
            Err(DiskError::Resize { .. })
        ));
        assert!(matches!(
            machine.block.resize(Some(2 * SIZE + 1)),
            Err(DiskError::Resize { .. })
        ));
        machine.file.as_file().set_len(3 * SIZE).expect("room");
        assert_eq!(machine.block.resize(None).expect("a size"), 3 * SIZE);
        assert_eq!(machine.block.resize(None).expect("a size"), 3 * SIZE);
        assert_eq!(
            (machine.block.capacity_bytes(), told(machine)),
            (3 * SIZE, 2)
        );
        // A file that was cut behind its back: an error, not old bytes.
        machine.file.as_file().set_len(SIZE).expect("a size");
        assert_eq!(machine.ask(IN, SIZE / 512 - 1, &[], &[1024]).0, IOERR);
        assert_eq!(machine.counter("errors"), 1);
    });
}

#[test]
fn several_queues_at_once() {
    let folder = folder();
    for way in ways(folder.path()) {
        let file = NamedTempFile::new_in(folder.path()).expect("a file");
        file.as_file().set_len(SIZE).expect("a size");
        let config = DiskConfig {
            direct: way.direct,
            engine: Some(way.engine),
            num_queues: 2,
            ..DiskConfig::new(file.path())
        };
        let block = Arc::new(Block::new("disk", config).expect("a disk"));
        block.set_features(block.features());
        std::thread::scope(|scope| {
            for index in 0..2u16 {
                let block = Arc::clone(&block);
                scope.spawn(move || {
                    let mut driver = Driver::new(index);
                    block.start_queue(driver.queue()).expect("a thread");
                    assert!(
                        block.start_queue(driver.queue()).is_err(),
                        "it runs already"
                    );
                    for round in 0..100u64 {
                        let sector = u64::from(index) * 4096 + round * 8;
                        let mut bytes = header(OUT, sector);
                        bytes.extend([index as u8 + 1; 4096]);
                        driver.offer(&[&bytes], &[1]);
                        driver.wait_used();
                    }
                    block.stop_queue(index).expect("a queue");
                });
            }
        });
        assert!(block.stop_queue(0).is_none() && block.stop_queue(9).is_none());
        let mut bytes = vec![0; 100 * 4096];
        for index in 0..2u8 {
            file.as_file()
                .read_exact_at(&mut bytes, u64::from(index) << 21)
                .expect("bytes");
            assert!(bytes.iter().all(|byte| *byte == index + 1));
        }
    }
}

/// With event indices the driver notifies only when asked to: none of its requests may wait for a notification that does not come.
#[test]
fn no_notification_is_lost() {
    // Where the test driver has its rings, and the device's wish behind the used ring.
    const RINGS: [u32; 3] = [0x1000, 0x5000, 0x6000];
    let wish_at = GuestAddress(u64::from(RINGS[2]) + 4 + 8 * u64::from(Driver::SIZE));
    each(|machine| {
        machine.block.stop_queue(0).expect("a queue");
        machine.driver = Driver::new(0);
        let mut queue = Queue::new(Driver::SIZE).expect("a queue");
        queue.set_desc_table_address(Some(RINGS[0]), Some(0));
        queue.set_avail_ring_address(Some(RINGS[1]), Some(0));
        queue.set_used_ring_address(Some(RINGS[2]), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let memory = machine.driver.memory().clone();
        let interrupt = machine.driver.interrupt.clone();
        let queue = Virtqueue::new(0, queue, memory.clone(), kick.clone(), interrupt);
        machine.block.start_queue(queue).expect("a thread");
        let mut offered = 0u16;
        for round in 0..1500u64 {
            let burst = round % 5 + 1;
            for number in 0..burst {
                machine.offer(IN, number, &[], &[512]);
                std::sync::atomic::fence(Ordering::SeqCst);
                let wish: u16 = memory.load(wish_at, Ordering::Acquire).expect("RAM");
                if wish == offered {
                    kick.write(1).expect("an eventfd");
                }
                offered = offered.wrapping_add(1);
            }
            for _ in 0..burst {
                machine.driver.wait_used();
            }
        }
    });
}

/// A guest's disk does not become smaller by a move; one that is larger there is so for the guest once somebody says it.
#[test]
fn an_image_that_is_too_small_is_refused() {
    let file = NamedTempFile::new().expect("a file");
    let make = |bytes: u64| {
        file.as_file().set_len(bytes).expect("room");
        Block::new("disk", DiskConfig::new(file.path())).expect("a disk")
    };
    let saved = make(1 << 20).save();
    let refusal = make(1 << 19).restore(&saved).expect_err("too small");
    assert!(refusal.contains("2048"), "{refusal}");
    let larger = make(1 << 21);
    larger.restore(&saved).expect("large enough");
    assert_eq!(larger.capacity_bytes(), 1 << 20);
    assert_eq!(larger.resize(None).expect("a size"), 1 << 21);
    larger.restore(&[]).expect("an earlier build kept nothing");
    assert!(larger.restore(&[1]).is_err());
}
