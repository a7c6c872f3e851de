//! What the fuzz targets need besides what a machine uses: `fuzz/` in the repository's root.
//!
//! ```text
//!   fuzz target ── as a vCPU ──► Bus, PciBus, VirtioPci ─► VirtioDevice ─► Worker without a thread ◄── step()
//!               ── as the host ─► Hand (console, serial), sockets (net, vsock), a file (block)
//! ```
//!
//! With the feature of this name no queue has a thread of its own, so that an input always leads to the same calls in the same order. It is
//! never part of the product.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use crate::net::port::Port;
use crate::net::{MacAddr, Net, NetConfig, NetError, TapOffloads};

pub use crate::endpoint::Hand;
pub use crate::virtio::stepped::step;

/// A host side that is a socket and takes everything.
struct Socket(OwnedFd);

impl Port for Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn set_offloads(&self, _offloads: u32) -> io::Result<()> {
        Ok(())
    }
    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }
}

/// A network device with an MTU of 1500 and so many queue pairs, and the other ends of their sockets, which do not wait.
pub fn net(mac: MacAddr, pairs: u16) -> Result<(Net, Vec<UnixDatagram>), NetError> {
    let (mut ports, mut others) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let (socket, other) = UnixDatagram::pair()?;
        socket.set_nonblocking(true)?;
        other.set_nonblocking(true)?;
        ports.push(Box::new(Socket(socket.into())) as Box<dyn Port>);
        others.push(other);
    }
    let config = NetConfig {
        mtu: Some(1500),
        ..NetConfig::new(mac)
    };
    let all = TapOffloads {
        ufo: true,
        uso: true,
    };
    Ok((Net::on_ports(config, ports, all)?, others))
}
