//! What can be wrong with a TAP interface, and what to do about it.

use std::io;

/// Why a TAP interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is none that an interface can have.
    #[error(
        "{name:?} cannot be the name of a network interface: {reason}; give one of 1 to 15 bytes, in which %d stands for a free number"
    )]
    Name {
        /// The name, cut.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A number of queue pairs that is not possible.
    #[error("a network device with {0} queue pairs is not possible: it has 1 to {max}", max = super::MAX_QUEUE_PAIRS)]
    QueuePairs(usize),
    /// A mask without an address.
    #[error("a network mask was given for interface {0:?}, but no IP address that it belongs to")]
    MaskWithoutIp(String),
    /// The host has no TAP interfaces, or not for this process.
    #[error(
        "cannot open /dev/net/tun: {0}; the host needs the kernel module tun, and the process access to the device"
    )]
    NoDriver(#[source] io::Error),
    /// The process may not make or attach it.
    #[error(
        "no permission to attach TAP interface {name:?}; run with CAP_NET_ADMIN, or make it beforehand for this user (ip tuntap add mode tap user …), or pass an open descriptor"
    )]
    Permission {
        /// Its name.
        name: String,
    },
    /// Another process uses it.
    #[error("TAP interface {name:?} is in use; stop the process that has it, or choose another")]
    InUse {
        /// Its name.
        name: String,
    },
    /// An interface of that name exists and does not suit.
    #[error(
        "interface {name:?} exists, but is not a TAP interface {with} multiple queues, which {queue_pairs} queue pair(s) need; delete it, or make it with the same kind (ip tuntap add mode tap [multi_queue])",
        with = if *queue_pairs > 1 { "with" } else { "without" }
    )]
    Mismatch {
        /// Its name.
        name: String,
        /// How many were asked for.
        queue_pairs: u16,
    },
    /// A call failed that sets it up.
    #[error("interface {name:?}: cannot {what}: {source}{hint}", hint = hint(source))]
    SetUp {
        /// Its name.
        name: String,
        /// What was to be done.
        what: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// A descriptor that was passed is not what it must be.
    #[error("descriptor {number} that was passed for a network device {reason}")]
    Passed {
        /// Its place among those passed, from 0.
        number: usize,
        /// What is wrong with it, and what to do.
        reason: String,
    },
}

fn hint(source: &io::Error) -> &'static str {
    if source.kind() == io::ErrorKind::PermissionDenied {
        "; this needs CAP_NET_ADMIN, or an interface that is set up already"
    } else {
        ""
    }
}
