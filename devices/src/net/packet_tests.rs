//! Packets both ways, on a socket.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use memory::PageBitmap;

use super::features::{GUEST_CSUM, GUEST_TSO4, MQ, MRG_RXBUF};
use super::rx::Rx;
use super::testing::*;
use super::tx::Tx;
use super::{HEADER_LEN, MAX_PACKET};
use crate::virtio::testing::Driver;
use crate::virtio::{QueueHandler, VirtioDevice};

const LARGE: u64 = MRG_RXBUF | GUEST_CSUM | GUEST_TSO4;

/// The next packet that the driver receives, and its num_buffers.
fn next(driver: &mut Driver) -> (Vec<u8>, u16) {
    let (head, len) = driver.wait_used();
    let mut all = driver.written(head);
    all.truncate(len as usize);
    let buffers = u16::from_le_bytes([all[10], all[11]]);
    for _ in 1..buffers {
        // They come together.
        let (head, len) = driver.used().expect("all buffers of a packet at once");
        let mut part = driver.written(head);
        part.truncate(len as usize);
        all.extend(part);
    }
    all[10..12].fill(0);
    (all, buffers)
}

#[test]
fn packets_go_both_ways() {
    for accepted in [0, MRG_RXBUF, LARGE] {
        let (net, others, _) = device(1, accepted);
        let mut rx = started(&net, 0);
        let mut tx = started(&net, 1);
        for round in 0..100_u8 {
            rx.offer(&[], &[12, 60, 1500]);
            let sent = packet(round, 40 + usize::from(round) * 10);
            others[0].send(&sent).expect("room");
            assert_eq!(next(&mut rx), (sent, 1), "{accepted:#x}");
            let sent = packet(round, 1000);
            let (header, rest) = sent.split_at(HEADER_LEN);
            let head = match round % 3 {
                0 => tx.offer(&[header, &rest[..14], &rest[14..]], &[]),
                1 => tx.offer(&[&sent[..20], &sent[20..]], &[]),
                _ => tx.offer(&[&sent[..3], &sent[3..]], &[]),
            };
            assert_eq!(tx.wait_used(), (head, 0));
            assert_eq!(receive(&others[0]), Some(sent));
        }
        assert_eq!(counter(&net, "rx_packets"), 100);
        assert_eq!(counter(&net, "tx_bytes"), 100_000);
        let bytes: u64 = (0..100).map(|round| 40 + round * 10).sum();
        assert_eq!(counter(&net, "rx_bytes"), bytes);
        assert!(rx.interrupt.used.load(Ordering::SeqCst) > 0);
        assert!(tx.interrupt.used.load(Ordering::SeqCst) > 0);
    }
}

#[test]
fn a_large_packet_fills_several_buffers() {
    let (net, others, _) = device(1, LARGE);
    let mut rx = started(&net, 0);
    for round in 0..4 {
        for _ in 0..45 {
            rx.offer(&[], &[1536]);
        }
        let sent = packet(round, 60_000);
        others[0].send(&sent).expect("room");
        assert_eq!(next(&mut rx), (sent, 40));
        let sent = packet(round, 5 * 1536 - HEADER_LEN);
        others[0].send(&sent).expect("room");
        assert_eq!(next(&mut rx), (sent, 5));
    }
    assert_eq!(rx.used(), None);
}

#[test]
fn a_packet_waits_for_the_buffers_it_lacks() {
    for accepted in [MRG_RXBUF, LARGE] {
        let (shared, other) = shared(accepted);
        let mut driver = Driver::new(0);
        let mut queue = driver.queue();
        let mut rx = Rx::new(shared, 0, true, None);
        driver.offer(&[], &[100, 1436]);
        driver.offer(&[], &[1536]);
        let sent = packet(3, 9000);
        other.send(&sent).expect("room");
        rx.process(&mut queue).expect("a ring");
        assert_eq!(driver.used(), None);
        assert!(rx.timeout().is_some());
        assert_eq!(rx.sources().len(), 1, "only to be woken");
        for _ in 0..3 {
            driver.offer(&[], &[1536]);
        }
        rx.process(&mut queue).expect("a ring");
        assert_eq!(driver.used(), None);
        driver.offer(&[], &[4000]);
        driver.offer(&[], &[4000]);
        rx.process(&mut queue).expect("a ring");
        assert_eq!(next(&mut driver), (sent, 6));
        assert_eq!(rx.timeout(), None);
        assert_eq!(rx.sources().len(), 2);
    }
}

#[test]
fn a_flood_that_uses_up_the_buffers_does_not_end_the_reception() {
    let (shared, other) = shared(0);
    let mut driver = Driver::new(0);
    driver.event_idx = true;
    let mut queue = driver.queue();
    let mut rx = Rx::new(shared, 0, false, None);
    for _ in 0..Driver::SIZE {
        driver.offer(&[], &[1536]);
    }
    driver.kick.read().expect("the first one");
    // As many packets as are taken in one go, and as buffers: none is left when it ends.
    for round in 0..Driver::SIZE {
        other.send(&packet(round as u8, 100)).expect("room");
    }
    rx.process(&mut queue).expect("a ring");
    for _ in 0..Driver::SIZE {
        assert!(driver.used().is_some());
    }
    assert!(
        driver.kick.read().is_ok() || rx.sources().len() == 2 || rx.timeout().is_some(),
        "nothing wakes the thread"
    );
}

#[test]
fn a_packet_without_enough_buffers_is_dropped_in_the_end() {
    let (net, others, _) = device(1, LARGE);
    let mut rx = started(&net, 0);
    rx.offer(&[], &[1536]);
    others[0].send(&packet(1, 3000)).expect("room");
    until("dropped", || counter(&net, "rx_dropped") == 1);
    let sent = packet(2, 300);
    others[0].send(&sent).expect("room");
    assert_eq!(next(&mut rx), (sent, 1));
}

#[test]
fn a_packet_that_does_not_fit_its_buffer_is_dropped() {
    let (net, others, _) = device(1, 0);
    let mut rx = started(&net, 0);
    rx.offer(&[], &[12, 500]);
    others[0].send(&packet(1, 501)).expect("room");
    // Not a packet at all, and one that is larger than any.
    others[0].send(&[0; 5]).expect("room");
    others[0].send(&vec![0; MAX_PACKET + 600]).expect("room");
    let sent = packet(2, 500);
    others[0].send(&sent).expect("room");
    assert_eq!(next(&mut rx), (sent, 1));
    assert_eq!(counter(&net, "rx_dropped"), 1);
    assert_eq!(counter(&net, "rx_errors"), 2);
}

#[test]
fn without_buffers_the_host_keeps_the_packets() {
    let (shared, other) = shared(MRG_RXBUF);
    let mut driver = Driver::new(0);
    let mut queue = driver.queue();
    let mut rx = Rx::new(shared, 0, true, None);
    let sent: Vec<_> = (0..3).map(|seed| packet(seed, 200)).collect();
    for each in &sent {
        other.send(each).expect("room");
    }
    rx.process(&mut queue).expect("a ring");
    assert_eq!(rx.sources().len(), 1);
    assert_eq!(rx.timeout(), None);
    driver.offer(&[], &[1536]);
    driver.offer(&[], &[1536]);
    rx.process(&mut queue).expect("a ring");
    assert_eq!(next(&mut driver).0, sent[0]);
    assert_eq!(next(&mut driver).0, sent[1]);
    assert_eq!(rx.sources().len(), 1);
    driver.offer(&[], &[1536]);
    rx.process(&mut queue).expect("a ring");
    assert_eq!(next(&mut driver).0, sent[2]);
    driver.offer(&[], &[1536]);
    rx.process(&mut queue).expect("a ring");
    assert_eq!(rx.sources().len(), 2);
    assert_eq!(driver.used(), None);
}

#[test]
fn an_interface_that_gives_errors_is_left_alone_for_a_while() {
    // A directory cannot be read; a file that has ended is readable all the time.
    for path in ["/", "/dev/null"] {
        let file = std::fs::File::open(path).expect("a file");
        let mut driver = Driver::new(0);
        let mut queue = driver.queue();
        let shared = shared_on(file.into());
        let mut rx = Rx::new(shared.clone(), 0, true, None);
        driver.offer(&[], &[1536]);
        for errors in 1..3 {
            rx.process(&mut queue).expect("a ring");
            assert_eq!((rx.sources().len(), rx.timeout().is_some()), (1, true));
            assert!(
                shared.counters.all().contains(&("rx_errors", errors)),
                "{path}"
            );
        }
        assert_eq!(driver.used(), None);
    }
}

#[test]
fn what_a_driver_may_not_do_stops_its_queue_only() {
    let (net, others, _) = device(2, MQ);
    let short_rx = {
        let mut driver = started(&net, 0);
        driver.offer(&[], &[11]);
        driver
    };
    let short_tx = {
        let mut driver = started(&net, 1);
        driver.offer(&[&[0; 11]], &[]);
        driver
    };
    for driver in [&short_rx, &short_tx] {
        until("reset", || {
            driver.interrupt.reset.load(Ordering::SeqCst) == 1
        });
    }
    let mut tx = started(&net, 3);
    let sent = packet(1, 100);
    tx.offer(&[&sent], &[]);
    tx.wait_used();
    assert_eq!(receive(&others[1]), Some(sent));
    for index in [0, 1, 3] {
        assert!(net.stop_queue(index).is_some());
        assert!(net.stop_queue(index).is_none());
    }
}

#[test]
fn packets_that_cannot_be_sent_are_dropped() {
    let (net, others, _) = device(1, 0);
    let mut tx = started(&net, 1);
    tx.offer(&[&vec![0; MAX_PACKET + 1]], &[]);
    tx.wait_used();
    assert_eq!(counter(&net, "tx_errors"), 1);
    // Nobody reads: the socket is full after some.
    for seed in 0..20 {
        tx.offer(&[&packet(seed, 20_000)], &[]);
    }
    for _ in 0..20 {
        tx.wait_used();
    }
    let dropped = counter(&net, "tx_dropped");
    assert!(dropped > 0);
    assert_eq!(counter(&net, "tx_packets"), 20 - dropped);
    while receive(&others[0]).is_some() {}
    let sent = packet(9, 100);
    tx.offer(&[&sent], &[]);
    tx.wait_used();
    assert_eq!(receive(&others[0]), Some(sent));
    drop(others);
    tx.offer(&[&packet(1, 1)], &[]);
    tx.wait_used();
    assert_eq!(counter(&net, "tx_errors"), 2);
    assert_eq!(tx.interrupt.reset.load(Ordering::SeqCst), 0);
}

#[test]
fn a_full_host_is_tried_again() {
    let (shared, other) = shared(0);
    let mut driver = Driver::new(1);
    let mut queue = driver.queue();
    let mut tx = Tx::new(shared, 0);
    let mut sent = Vec::new();
    while tx.timeout().is_none() {
        sent.push(packet(sent.len() as u8, 20_000));
        driver.offer(&[sent.last().expect("one")], &[]);
        tx.process(&mut queue).expect("a ring");
    }
    let before = sent.len() - 1;
    for _ in 0..before {
        assert!(driver.used().is_some());
    }
    assert_eq!(driver.used(), None);
    let mut got = vec![receive(&other).expect("a packet")];
    tx.process(&mut queue).expect("a ring");
    assert_eq!(tx.timeout(), None);
    assert!(driver.used().is_some());
    got.extend(std::iter::from_fn(|| receive(&other)));
    assert_eq!(got, sent);
}

#[test]
fn a_stop_and_a_start_lose_nothing() {
    let (net, others, _) = device(1, LARGE);
    let mut rx = started(&net, 0);
    let mut tx = started(&net, 1);
    let mut page = PageBitmap::new(rx.ram.regions()[0].pages());
    for round in 0..10_u8 {
        for _ in 0..3 {
            rx.offer(&[], &[1536]);
        }
        let sent = packet(round, 2000);
        others[0].send(&sent).expect("room");
        assert_eq!(next(&mut rx), (sent, 2));
        let queues = [0, 1].map(|index| net.stop_queue(index).expect("a queue"));
        rx.ram.take_device_dirty(0, &mut page);
        page.clear_all();
        // While it stands still, both sides go on.
        let sent = packet(round, 500);
        others[0].send(&sent).expect("room");
        tx.offer(&[&packet(round, 70)], &[]);
        rx.ram.take_device_dirty(0, &mut page);
        assert!(page.is_empty());
        assert_eq!((rx.used(), tx.used()), (None, None));
        for queue in queues {
            net.start_queue(queue).expect("a thread");
        }
        assert_eq!(next(&mut rx), (sent, 1));
        tx.wait_used();
        assert_eq!(receive(&others[0]), Some(packet(round, 70)));
    }
}

#[test]
fn what_is_written_is_dirty_when_the_driver_sees_it() {
    let (net, others, _) = device(1, LARGE);
    let mut rx = started(&net, 0);
    let mut pages = PageBitmap::new(rx.ram.regions()[0].pages());
    // Two buffers of two pages each, and one that stays empty.
    for gpa in [0x40_0800, 0x40_8800, 0x41_0800] {
        rx.offer_parts(&[(gpa, 0x1800, true)]);
    }
    rx.ram.take_device_dirty(0, &mut pages);
    pages.clear_all();
    let sent = packet(1, 0x1800 + 0x100);
    others[0].send(&sent).expect("room");
    assert_eq!(next(&mut rx), (sent, 2));
    rx.ram.take_device_dirty(0, &mut pages);
    let runs: Vec<_> = pages.runs().collect();
    // The used ring is at 0x6000.
    assert_eq!(runs, [(6, 1), (0x400, 2), (0x408, 1)]);
}

#[test]
fn pairs_are_apart_and_only_active_ones_receive() {
    let (net, others, _) = device(2, MRG_RXBUF | MQ);
    let mut first = started(&net, 0);
    let mut second = started(&net, 2);
    second.offer(&[], &[1536]);
    first.offer(&[], &[1536]);
    others[1].send(&packet(2, 60)).expect("room");
    others[0].send(&packet(1, 60)).expect("room");
    assert_eq!(next(&mut first), (packet(1, 60), 1));
    assert_eq!(second.used(), None);
}

/// Numbers that look random and are the same each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn any_descriptors_are_survived() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for round in 0..3000 {
        let (shared, other) = shared(u64::MAX);
        let mut driver = Driver::new(0);
        let mut queue = driver.queue();
        for at in 0..Driver::SIZE {
            let gpa = match numbers.next() % 8 {
                0 => numbers.next(),
                1 => (64 << 20) - numbers.next() % 64,
                _ => 0x20_0000 + numbers.next() % 0x10_0000,
            };
            let len = match numbers.next() % 8 {
                0 => numbers.next() as u32,
                _ => (numbers.next() % 3000) as u32,
            };
            // Seldom indirect.
            let flags =
                (numbers.next() % 4) as u16 | u16::from(numbers.next().is_multiple_of(32)) << 2;
            let next = (numbers.next() % 66) as u16;
            driver.descriptor(at, gpa, len, flags, next);
        }
        for _ in 0..8 {
            driver.make_available((numbers.next() % 65) as u16);
        }
        for len in [1500, 9000] {
            other.send(&packet(1, len)).expect("room");
        }
        let shared = Arc::clone(&shared);
        let mut handler: Box<dyn QueueHandler> = match round % 4 {
            0 => Box::new(Rx::new(shared, 0, true, None)),
            1 => Box::new(Rx::new(shared, 0, false, None)),
            2 => Box::new(Tx::new(shared, 0)),
            _ => Box::new(super::control::Control::new(shared)),
        };
        // An error is a fine answer.
        for _ in 0..3 {
            if handler.process(&mut queue).is_err() {
                break;
            }
        }
        handler.drain(&mut queue).expect("rings are in RAM");
    }
}
