//! The device as its transport and the vmm see it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::control::Control;
use super::features::{self, MQ, MRG_RXBUF, Offloads};
use super::limits::Limits;
use super::mac::MacAddr;
use super::port::{self, Port};
use super::rx::Rx;
use super::shared::Shared;
use super::tap::{Tap, TapOffloads};
use super::tx::Tx;
use super::{HEADER_LEN, MAX_QUEUE_PAIRS, persist};
use crate::rate_limiter::RateLimiterConfig;
use crate::virtio::{DeviceType, VirtioDevice, VirtioInterrupt, Virtqueue, Worker, read_space};

/// Bits of the status field of the configuration space (section 5.1.4).
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;
/// Commands are few and short.
const CONTROL_QUEUE_SIZE: u16 = 64;
const SMALLEST_QUEUE: u16 = 64;
/// No chain of a larger queue could be handed to the system in one call.
const LARGEST_QUEUE: u16 = super::MAX_IOVECS as u16;
/// Least MTU of IPv4 (RFC 791).
const SMALLEST_MTU: u16 = 68;

/// How a device looks to its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The guest's address, until the driver sets another.
    pub mac: MacAddr,
    /// The MTU that the driver is told, if it is told any. At least 68.
    pub mtu: Option<u16>,
    /// How much may go each way, all queue pairs together: each direction has such a limit of its own.
    pub rate_limiter: Option<RateLimiterConfig>,
    /// What it offers of what its interface can.
    pub offloads: Offloads,
    /// Descriptors of each receive and transmit queue: a power of two from 64 to 1024.
    pub queue_size: u16,
}

impl NetConfig {
    /// 256 descriptors, no MTU.
    pub fn new(mac: MacAddr) -> Self {
        Self {
            mac,
            mtu: None,
            rate_limiter: None,
            offloads: Offloads::default(),
            queue_size: 256,
        }
    }
}

/// Why a device cannot be.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Not as many interface queues as a device can have.
    #[error("a network device has 1 to {MAX_QUEUE_PAIRS} queue pairs, not {0}")]
    QueuePairs(usize),
    /// A queue size that is not possible.
    #[error(
        "a network device's queue has a power of two of {SMALLEST_QUEUE} to {LARGEST_QUEUE} descriptors, not {0}"
    )]
    QueueSize(u16),
    /// An MTU that no driver takes.
    #[error("an MTU of {0} is below the least of {SMALLEST_MTU}")]
    Mtu(u16),
    /// The host refuses something.
    #[error("the network device's interface cannot be used: {0}")]
    Host(#[from] io::Error),
}

enum Running {
    Rx(Worker<Rx>),
    Tx(Worker<Tx>),
    Control(Worker<Control>),
}

/// A virtio network device. Queues: rx0, tx0, rx1, tx1, …, control.
pub struct Net {
    config: NetConfig,
    interface: Option<String>,
    features: u64,
    shared: Arc<Shared>,
    running: Mutex<BTreeMap<u16, Running>>,
}

impl Net {
    /// A device on the queues of one interface, one a queue pair.
    pub fn new(config: NetConfig, taps: Vec<Tap>) -> Result<Self, NetError> {
        let offloads = taps.first().map(Tap::offloads).unwrap_or_default();
        let interface = taps.first().map(|tap| tap.name().to_owned());
        let ports = taps
            .into_iter()
            .map(|tap| Box::new(tap) as Box<dyn Port>)
            .collect();
        let mut net = Self::on_ports(config, ports, offloads)?;
        net.interface = interface;
        Ok(net)
    }

    pub(crate) fn on_ports(
        config: NetConfig,
        ports: Vec<Box<dyn Port>>,
        offloads: TapOffloads,
    ) -> Result<Self, NetError> {
        if ports.is_empty() || ports.len() > usize::from(MAX_QUEUE_PAIRS) {
            return Err(NetError::QueuePairs(ports.len()));
        }
        let size = config.queue_size;
        if !size.is_power_of_two() || !(SMALLEST_QUEUE..=LARGEST_QUEUE).contains(&size) {
            return Err(NetError::QueueSize(size));
        }
        if let Some(mtu) = config.mtu.filter(|&mtu| mtu < SMALLEST_MTU) {
            return Err(NetError::Mtu(mtu));
        }
        let limits = config.rate_limiter.as_ref().map(Limits::new);
        let limits = limits.unwrap_or_default();
        Ok(Self {
            features: features::offered(
                offloads,
                config.offloads,
                config.mtu.is_some(),
                ports.len() > 1,
            ),
            shared: Arc::new(Shared::new(ports, config.mac)?.limited(limits)),
            config,
            interface: None,
            running: Mutex::default(),
        })
    }

    /// The name of its interface, if it has one.
    pub fn interface(&self) -> Option<&str> {
        self.interface.as_deref()
    }

    /// The address that the guest uses.
    pub fn mac(&self) -> MacAddr {
        self.shared.choices().mac
    }

    /// Asks the guest to tell the network where it is; false if its driver does not know how to (see [`Net::send_rarp`]).
    pub fn announce(&self) -> bool {
        self.shared.announce()
    }

    /// Tells the network where the guest is, in the guest's name. Call it a few times after a move: nothing says that it arrived.
    pub fn send_rarp(&self) -> io::Result<()> {
        let mut packet = [0_u8; HEADER_LEN + 60];
        packet[HEADER_LEN..].copy_from_slice(&port::rarp_frame(self.mac()));
        let buffer = libc::iovec {
            iov_base: packet.as_mut_ptr().cast(),
            iov_len: packet.len(),
        };
        // SAFETY: the buffer outlives the call.
        unsafe { port::write_packet(self.shared.port(0).fd(), &[buffer]) }.map(drop)
    }

    /// Packets, bytes (without virtio header), packets dropped and errors, as the guest sees the directions, since the device was made.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.all()
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<u16, Running>> {
        // Entries come and go whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which queue is the control queue: the last, of all pairs with VIRTIO_NET_F_MQ, of one without (section 5.1.2).
    fn control_index(&self) -> u16 {
        let several = self.shared.choices().accepted & MQ != 0;
        2 * if several { self.shared.pairs() } else { 1 }
    }
}

/// The configuration space (section 5.1.4), up to the MTU.
pub(super) fn space(shared: &Shared, mtu: Option<u16>) -> [u8; 12] {
    let (mac, announce) = {
        let choices = shared.choices();
        (choices.mac, choices.announce)
    };
    let status = LINK_UP | if announce { ANNOUNCE } else { 0 };
    let mut space = [0; 12];
    space[..6].copy_from_slice(&mac.octets());
    space[6..8].copy_from_slice(&status.to_le_bytes());
    space[8..10].copy_from_slice(&shared.pairs().to_le_bytes());
    space[10..].copy_from_slice(&mtu.unwrap_or(0).to_le_bytes());
    space
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            name: "virtio-net",
            id: 1,
            pci_class: [0x02, 0, 0],
        }
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn feature_name(&self, bit: u32) -> Option<&'static str> {
        features::name(bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.config.queue_size; usize::from(self.shared.pairs()) * 2];
        sizes.push(CONTROL_QUEUE_SIZE);
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&space(&self.shared, self.config.mtu), offset, data);
    }

    fn set_features(&self, accepted: u64) {
        if let Err(error) = self.shared.change(|choices| choices.accepted = accepted) {
            // It took them when it was asked at the start. The guest copes with packets that are cut already.
            tracing::error!(%error, "a network interface does not take the driver's features");
            self.shared.choices().accepted = accepted;
        }
    }

    fn connect(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        if self.shared.interrupt.set(interrupt).is_err() {
            tracing::error!("a network device was connected twice");
        }
    }

    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        let index = queue.index();
        let accepted = self.shared.choices().accepted;
        let shared = Arc::clone(&self.shared);
        let pair = index / 2;
        let worker = if index == self.control_index() {
            Running::Control(Worker::start("net-ctl", Control::new(shared), queue)?)
        } else if pair >= shared.pairs() {
            return Err(io::Error::other(format!(
                "a network device has no queue {index}"
            )));
        } else if index.is_multiple_of(2) {
            let rx = Rx::new(shared, pair, accepted & MRG_RXBUF != 0, self.config.mtu);
            Running::Rx(Worker::start(&format!("net-rx{pair}"), rx, queue)?)
        } else {
            Running::Tx(Worker::start(
                &format!("net-tx{pair}"),
                Tx::new(shared, pair),
                queue,
            )?)
        };
        self.running().insert(index, worker);
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<Virtqueue> {
        let running = self.running().remove(&index)?;
        match running {
            Running::Rx(worker) => worker.stop().map(|(_, queue)| queue),
            Running::Tx(worker) => worker.stop().map(|(_, queue)| queue),
            Running::Control(worker) => worker.stop().map(|(_, queue)| queue),
        }
    }

    fn reset(&self) {
        let result = self.shared.change(|choices| {
            choices.accepted = 0;
            choices.mac = self.config.mac;
            choices.announce = false;
            choices.offloads = None;
        });
        if let Err(error) = result.and_then(|()| self.shared.activate(1)) {
            tracing::error!(%error, "a network interface cannot be set back");
        }
    }

    fn save(&self) -> Vec<u8> {
        persist::save(&self.shared)
    }

    fn restore(&self, saved: &[u8]) -> Result<(), String> {
        persist::restore(&self.shared, saved)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // Threads would go on for ever otherwise.
        let indices: Vec<_> = self.running().keys().copied().collect();
        for index in indices {
            drop(self.stop_queue(index));
        }
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("config", &self.config)
            .field("features", &self.features)
            .finish_non_exhaustive()
    }
}
