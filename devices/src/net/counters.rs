//! What has gone through a device, all queue pairs together.

use std::sync::atomic::{AtomicU64, Ordering};

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Direction {
    pub(super) packets: Counter,
    /// Without the virtio header.
    pub(super) bytes: Counter,
    /// Fine packets for which there was no room or no interface.
    pub(super) dropped: Counter,
    /// Packets that were not fine, and calls that failed.
    pub(super) errors: Counter,
    /// Times that a rate limiter made packets wait.
    pub(super) throttled: Counter,
}

/// Both, as the guest sees them.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) rx: Direction,
    pub(super) tx: Direction,
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Direction {
    pub(super) fn passed(&self, packet_with_header: usize) {
        self.packets.add(1);
        self.bytes
            .add((packet_with_header.saturating_sub(super::HEADER_LEN)) as u64);
    }
}

impl Counters {
    pub(super) fn all(&self) -> Vec<(&'static str, u64)> {
        let (rx, tx) = (&self.rx, &self.tx);
        vec![
            ("rx_packets", rx.packets.get()),
            ("rx_bytes", rx.bytes.get()),
            ("rx_dropped", rx.dropped.get()),
            ("rx_errors", rx.errors.get()),
            ("tx_packets", tx.packets.get()),
            ("tx_bytes", tx.bytes.get()),
            ("tx_dropped", tx.dropped.get()),
            ("tx_errors", tx.errors.get()),
            ("rx_throttled", rx.throttled.get()),
            ("tx_throttled", tx.throttled.get()),
        ]
    }
}
