//! What all queues of a device share, and what its driver has chosen.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::counters::Counters;
use super::features::{self, GUEST_ANNOUNCE};
use super::limits::Limits;
use super::mac::MacAddr;
use super::port::Port;
use crate::virtio::VirtioInterrupt;

/// What the driver has chosen, besides queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choices {
    pub(super) accepted: u64,
    pub(super) mac: MacAddr,
    /// The driver is asked to announce itself, and has not done so.
    pub(super) announce: bool,
    /// What it has set, if it has, whatever it has accepted.
    pub(super) offloads: Option<u64>,
}

impl Choices {
    /// The offloads that are in use: all that were accepted, until the driver sets them.
    fn guest_offloads(&self) -> u64 {
        self.accepted & features::GUEST_OFFLOADS & self.offloads.unwrap_or(u64::MAX)
    }
}

struct Pair {
    port: Box<dyn Port>,
    /// Readable when its receiver is to look whether it is active.
    wake: EventFd,
    /// Whether that was written since it was read last, so that it need not be read each time.
    called: AtomicBool,
}

pub(super) struct Shared {
    pub(super) counters: Counters,
    pub(super) interrupt: OnceLock<Arc<dyn VirtioInterrupt>>,
    pairs: Vec<Pair>,
    active: AtomicU16,
    large_packets: AtomicBool,
    choices: Mutex<Choices>,
    pub(super) limits: Limits,
}

impl Shared {
    /// Pair 0 is active.
    pub(super) fn new(ports: Vec<Box<dyn Port>>, mac: MacAddr) -> io::Result<Self> {
        let pairs: Vec<_> = ports
            .into_iter()
            .map(|port| {
                let wake = EventFd::new(EFD_NONBLOCK)?;
                Ok(Pair {
                    port,
                    wake,
                    called: AtomicBool::new(false),
                })
            })
            .collect::<io::Result<_>>()?;
        let shared = Self {
            counters: Counters::default(),
            interrupt: OnceLock::new(),
            active: AtomicU16::new(0),
            large_packets: AtomicBool::new(false),
            choices: Mutex::new(Choices {
                accepted: 0,
                mac,
                announce: false,
                offloads: None,
            }),
            limits: Limits::default(),
            pairs,
        };
        shared.activate(1)?;
        Ok(shared)
    }

    /// The same with limits of how much goes each way.
    pub(super) fn limited(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// Pairs that there are; not more than [`super::MAX_QUEUE_PAIRS`].
    pub(super) fn pairs(&self) -> u16 {
        self.pairs.len() as u16
    }

    pub(super) fn port(&self, pair: u16) -> &dyn Port {
        &*self.pairs[usize::from(pair)].port
    }

    /// Readable when the receiver of this pair has to look.
    pub(super) fn wake(&self, pair: u16) -> BorrowedFd<'_> {
        let wake = &self.pairs[usize::from(pair)].wake;
        // SAFETY: it is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(wake.as_raw_fd()) }
    }

    pub(super) fn woken(&self, pair: u16) {
        let pair = &self.pairs[usize::from(pair)];
        if pair.called.swap(false, Ordering::SeqCst) {
            // It may be empty still, and is read once more then; the count says nothing.
            pair.called
                .fetch_or(pair.wake.read().is_err(), Ordering::SeqCst);
        }
    }

    /// The choices, and with them the right to change what follows from them.
    pub(super) fn choices(&self) -> MutexGuard<'_, Choices> {
        // They are changed in single assignments, so a panic leaves them whole.
        self.choices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn active(&self) -> u16 {
        self.active.load(Ordering::SeqCst)
    }

    pub(super) fn is_active(&self, pair: u16) -> bool {
        pair < self.active()
    }

    /// Whether packets larger than the MTU may come in.
    pub(super) fn large_packets(&self) -> bool {
        self.large_packets.load(Ordering::Relaxed)
    }

    /// Lets the host give packets to the first `count` pairs. If it refuses, the number stays as it was.
    pub(super) fn activate(&self, count: u16) -> io::Result<()> {
        let before = self.active();
        let result = self.attach(count);
        if result.is_ok() {
            self.active.store(count, Ordering::SeqCst);
        } else if let Err(error) = self.attach(before) {
            tracing::warn!(%error, "the queues of a network interface cannot be set back");
        }
        for pair in &self.pairs {
            pair.called.store(true, Ordering::SeqCst);
            if let Err(error) = pair.wake.write(1) {
                tracing::warn!(%error, "a network device's receiver cannot be woken");
            }
        }
        result
    }

    fn attach(&self, count: u16) -> io::Result<()> {
        for (number, pair) in self.pairs.iter().enumerate().skip(1) {
            pair.port.set_attached(number < usize::from(count))?;
        }
        Ok(())
    }

    /// Changes the choices, and tells the host which packets the driver takes then. If the host refuses, they stay as they were.
    pub(super) fn change(&self, change: impl FnOnce(&mut Choices)) -> io::Result<()> {
        let mut choices = self.choices();
        let mut new = choices.clone();
        change(&mut new);
        let offloads = new.guest_offloads();
        self.port(0).set_offloads(features::tap_flags(offloads))?;
        self.large_packets
            .store(features::large_packets(offloads), Ordering::Relaxed);
        *choices = new;
        Ok(())
    }

    /// Asks the driver to announce itself; false if it does not know how to.
    pub(super) fn announce(&self) -> bool {
        {
            let mut choices = self.choices();
            if choices.accepted & GUEST_ANNOUNCE == 0 {
                return false;
            }
            choices.announce = true;
        }
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.config_changed();
        }
        true
    }
}
