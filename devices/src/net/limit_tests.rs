//! Packets that a rate limiter makes wait.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use super::features::MRG_RXBUF;
use super::testing::*;
use super::{HEADER_LEN, Net};
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};
use crate::virtio::VirtioDevice;

const HOUR_MS: u64 = 3_600_000;

fn bucket(size: u64, refill_time_ms: u64) -> Option<TokenBucketConfig> {
    Some(TokenBucketConfig {
        size,
        one_time_burst: 0,
        refill_time_ms,
    })
}

fn device_with(
    bandwidth: Option<TokenBucketConfig>,
    ops: Option<TokenBucketConfig>,
) -> (Net, UnixDatagram) {
    let limits = RateLimiterConfig { bandwidth, ops };
    let (net, mut others, _) = limited_device(1, MRG_RXBUF, Some(limits));
    (net, others.remove(0))
}

fn wait_for(other: &UnixDatagram) -> Vec<u8> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match receive(other) {
            Some(packet) => return packet,
            None => assert!(Instant::now() < end, "no packet has come"),
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn packets_wait_and_all_of_them_come_in_order() {
    for (bandwidth, ops) in [(bucket(1000, 5), None), (None, bucket(2, 5))] {
        let (net, other) = device_with(bandwidth, ops);
        let (mut rx, mut tx) = (started(&net, 0), started(&net, 1));
        for round in 0..12 {
            tx.offer(&[&packet(round, 600)], &[]);
            rx.offer(&[], &[1536]);
            other.send(&packet(round, 600)).expect("room");
        }
        for round in 0..12 {
            assert_eq!(wait_for(&other), packet(round, 600));
            tx.wait_used();
            let (head, len) = rx.wait_used();
            let mut got = rx.written(head);
            got.truncate(len as usize);
            assert_eq!(got[HEADER_LEN..], packet(round, 600)[HEADER_LEN..]);
        }
        for name in ["rx_throttled", "tx_throttled"] {
            assert!(counter(&net, name) > 0, "{name}");
        }
        for name in ["rx_dropped", "tx_dropped", "rx_errors", "tx_errors"] {
            assert_eq!(counter(&net, name), 0, "{name}");
        }
    }
}

/// What goes out does not use up what may come in.
#[test]
fn each_direction_has_its_own_limit() {
    let (net, other) = device_with(None, bucket(1, HOUR_MS));
    let (mut rx, mut tx) = (started(&net, 0), started(&net, 1));
    for round in 0..2 {
        tx.offer(&[&packet(round, 60)], &[]);
        rx.offer(&[], &[1536]);
        other.send(&packet(round, 60)).expect("room");
    }
    tx.wait_used();
    rx.wait_used();
    until("both wait", || {
        counter(&net, "rx_throttled") == 1 && counter(&net, "tx_throttled") == 1
    });
    assert_eq!((tx.used(), rx.used()), (None, None));
    assert_eq!(receive(&other), Some(packet(0, 60)));
    assert_eq!(receive(&other), None);
}

/// A wait of an hour keeps no stop waiting, and what waits is where the next device finds it.
#[test]
fn a_stop_finds_all_that_waits() {
    let (net, other) = device_with(bucket(100, HOUR_MS), None);
    let (mut rx, mut tx) = (started(&net, 0), started(&net, 1));
    let heads: Vec<u16> = (0..4)
        .map(|round| tx.offer(&[&packet(round, 200)], &[]))
        .collect();
    for round in 0..4 {
        rx.offer(&[], &[1536]);
        other.send(&packet(round, 200)).expect("room");
    }
    assert_eq!(tx.wait_used(), (heads[0], 0), "it leaves a debt");
    rx.wait_used();
    let mut queue = net.stop_queue(1).expect("a queue");
    for head in &heads[1..] {
        let next = queue.pop().expect("a ring").map(|chain| chain.head);
        assert_eq!(next, Some(*head));
    }
    let mut queue = net.stop_queue(0).expect("a queue");
    let mut left = 0;
    while queue.pop().expect("a ring").is_some() {
        left += 1;
    }
    assert_eq!(left, 3, "the buffers of packets that have not come");
    assert_eq!(counter(&net, "rx_dropped"), 0);
}
