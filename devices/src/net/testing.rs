//! A host side that is a socket, and drivers for the queues of a device.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::port::Port;
use super::shared::Shared;
use super::tap::TapOffloads;
use super::{HEADER_LEN, MacAddr, Net, NetConfig};
use crate::rate_limiter::RateLimiterConfig;
use crate::virtio::testing::Driver;
use crate::virtio::{VERSION_1, VirtioDevice};

pub(super) const OFFLOADS: TapOffloads = TapOffloads {
    ufo: true,
    uso: true,
};

/// What a device has asked of its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Offloads(u32),
    Attached(usize, bool),
}

#[derive(Default)]
pub(super) struct Host {
    asked: Mutex<Vec<Asked>>,
    pub(super) refuses: AtomicBool,
}

impl Host {
    pub(super) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().expect("no panic"))
    }

    fn ask(&self, what: Asked) -> io::Result<()> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err(io::Error::other("the test refuses"));
        }
        self.asked.lock().expect("no panic").push(what);
        Ok(())
    }
}

struct Socket {
    socket: OwnedFd,
    number: usize,
    host: Arc<Host>,
}

impl Port for Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        self.host.ask(Asked::Offloads(offloads))
    }
    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.host.ask(Asked::Attached(self.number, attached))
    }
}

/// Ports and their other ends, which do not wait.
pub(super) fn ports(count: usize) -> (Vec<Box<dyn Port>>, Vec<UnixDatagram>, Arc<Host>) {
    let host = Arc::new(Host::default());
    let (mut ports, mut others) = (Vec::new(), Vec::new());
    for number in 0..count {
        let (socket, other) = UnixDatagram::pair().expect("sockets");
        socket.set_nonblocking(true).expect("a socket");
        other.set_nonblocking(true).expect("a socket");
        ports.push(Box::new(Socket {
            socket: socket.into(),
            number,
            host: host.clone(),
        }) as Box<dyn Port>);
        others.push(other);
    }
    (ports, others, host)
}

pub(super) fn mac() -> MacAddr {
    "52:54:00:12:34:56".parse().expect("an address")
}

/// What a device's queues share, for a handler without a thread.
pub(super) fn shared(accepted: u64) -> (Arc<Shared>, UnixDatagram) {
    let (ports, mut others, _) = ports(1);
    let shared = Shared::new(ports, mac()).expect("a host");
    shared
        .change(|choices| choices.accepted = accepted)
        .expect("a host");
    (Arc::new(shared), others.remove(0))
}

/// The same on something that is no interface.
pub(super) fn shared_on(fd: OwnedFd) -> Arc<Shared> {
    let port = Socket {
        socket: fd,
        number: 0,
        host: Arc::default(),
    };
    Arc::new(Shared::new(vec![Box::new(port)], mac()).expect("a host"))
}

/// A device whose driver has accepted `accepted`, and its other ends.
pub(super) fn device(pairs: usize, accepted: u64) -> (Net, Vec<UnixDatagram>, Arc<Host>) {
    limited_device(pairs, accepted, None)
}

/// The same with limits.
pub(super) fn limited_device(
    pairs: usize,
    accepted: u64,
    rate_limiter: Option<RateLimiterConfig>,
) -> (Net, Vec<UnixDatagram>, Arc<Host>) {
    let (ports, others, host) = ports(pairs);
    let config = NetConfig {
        mtu: Some(1500),
        rate_limiter,
        ..NetConfig::new(mac())
    };
    let net = Net::on_ports(config, ports, OFFLOADS).expect("a device");
    net.set_features(accepted | VERSION_1);
    host.asked();
    (net, others, host)
}

/// A driver whose queue the device serves, with event indices, as Linux has them: a device that does not ask hears nothing.
pub(super) fn started(net: &Net, index: u16) -> Driver {
    let mut driver = Driver::new(index);
    driver.event_idx = true;
    net.start_queue(driver.queue()).expect("a thread");
    driver
}

/// A packet of `len` bytes behind a header of zeros.
pub(super) fn packet(seed: u8, len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER_LEN];
    packet.extend((0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)));
    packet
}

/// What has come to the other end.
pub(super) fn receive(other: &UnixDatagram) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 17];
    match other.recv(&mut bytes) {
        Ok(len) => {
            bytes.truncate(len);
            Some(bytes)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

pub(super) fn counter(net: &Net, name: &str) -> u64 {
    net.counters()
        .into_iter()
        .find(|(each, _)| *each == name)
        .map(|(_, value)| value)
        .expect("a counter")
}

/// A device with one pair of queues and nobody at the other end.
pub(crate) fn unconnected() -> Net {
    Net::on_ports(NetConfig::new(mac()), ports(1).0, OFFLOADS).expect("a device")
}
