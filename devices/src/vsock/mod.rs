//! virtio-vsock in user space (Virtual I/O Device specification 1.3, section 5.10): streams between ports of the guest and unix sockets.
//!
//! ```text
//!   a client of <path>: "CONNECT 1024\n" ─► REQUEST ─► guest listens at 1024 ─► RESPONSE ─► "OK <host's port>\n", then data
//!   guest connects to host's port 52 ─► REQUEST ─► <path>_52 is connected to ─► RESPONSE, then data; RST if nobody listens there
//!
//!   driver ── tx ─► Transmit ─► Switch ─► Connection, 64 KiB ─► socket
//!   driver ◄─ rx ── Receive ◄── Switch ◄─ Connection ◄────────── socket    (epoll, edges)
//!   driver ◄─ event: TRANSPORT_RESET, once after a restore
//! ```
//!
//! Promises:
//!
//! - What the guest sends to somebody who is not there, or what makes no sense, is answered by RST, and changes nothing else.
//! - Neither side gets more than it said to have room for: at most 256 connections, 64 KiB from the guest for each. A guest that sends more
//!   loses the connection. A host that does not read, or a guest, holds up its own connection only.
//! - No thread of a vCPU touches a socket; nobody waits for a peer.
//! - Pausing keeps all connections. A move does not: they end with the source, and the guest is told by TRANSPORT_RESET at the destination,
//!   where its driver resets all of its sockets and reads its context identifier again. So there is no state to move.

mod connection;
mod packet;
mod serve;
mod switch;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::serve::{Handler, Role};
use self::switch::Switch;
use crate::endpoint::{EndpointError, Listener};
use crate::virtio::{DeviceType, VirtioDevice, Virtqueue, Worker, read_space};

/// VIRTIO_VSOCK_F_STREAM.
const STREAM: u64 = 1 << 0;
/// Clients that may wait to be accepted.
const BACKLOG: i32 = 64;
/// Context identifiers below are those of the hypervisor, the loopback and the host.
const FIRST_CID: u64 = 3;

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// No guest can have this context identifier.
    #[error("a guest's context identifier is between 3 and 4294967294, not {0}")]
    Cid(u64),
    /// The socket cannot be made.
    #[error(transparent)]
    Socket(#[from] EndpointError),
    /// The system refuses what is needed to watch sockets.
    #[error("cannot watch sockets: {0}")]
    Watch(#[from] io::Error),
}

/// What the queues share.
struct Shared {
    switch: Mutex<Switch>,
    /// The epoll instance with all sockets.
    events: OwnedFd,
    /// There may be something to say to the guest.
    work: EventFd,
    /// The guest has to be told that its connections are gone.
    reset_pending: AtomicBool,
}

impl Shared {
    fn switch(&self) -> MutexGuard<'_, Switch> {
        self.switch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The saved state. The context identifier is for those who read it: the machine's configuration says what it is.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    guest_cid: u64,
}

/// The device.
pub struct Vsock {
    guest_cid: u64,
    shared: Arc<Shared>,
    workers: Mutex<BTreeMap<u16, Worker<Handler>>>,
}

impl Vsock {
    /// A device for the guest with this context identifier. Clients connect to a new socket at `path`; a guest's connection to a port goes
    /// to the socket at `path`, `_` and the port.
    pub fn new(guest_cid: u64, path: PathBuf) -> Result<Self, VsockError> {
        if !(FIRST_CID..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let listener = Listener::new(&path, BACKLOG)?;
        // Another directory may be the current one when the guest connects.
        let path = std::path::absolute(&path)?;
        let switch = Switch::new(guest_cid, path, listener, &events).map_err(io::Error::from)?;
        Ok(Self {
            guest_cid,
            shared: Arc::new(Shared {
                switch: Mutex::new(switch),
                events,
                work: EventFd::new(EFD_NONBLOCK)?,
                reset_pending: AtomicBool::new(false),
            }),
            workers: Mutex::default(),
        })
    }

    fn workers(&self) -> MutexGuard<'_, BTreeMap<u16, Worker<Handler>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            name: "virtio-vsock",
            id: 19,
            pci_class: [0x07, 0x80, 0x00],
        }
    }

    fn features(&self) -> u64 {
        STREAM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128, 128, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        let index = queue.index();
        let (name, role) = match index {
            0 => ("vsock-rx", Role::Receive),
            1 => ("vsock-tx", Role::Transmit),
            2 => ("vsock-event", Role::Event),
            _ => return Err(io::Error::other("vsock has three queues")),
        };
        let shared = Arc::clone(&self.shared);
        let worker = Worker::start(name, Handler { shared, role }, queue)?;
        self.workers().insert(index, worker);
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<Virtqueue> {
        let worker = self.workers().remove(&index)?;
        Some(worker.stop()?.1)
    }

    fn reset(&self) {
        self.shared.switch().clear();
        self.shared.reset_pending.store(false, Ordering::SeqCst);
    }

    fn save(&self) -> Vec<u8> {
        let state = State {
            guest_cid: self.guest_cid,
        };
        rmp_serde::to_vec_named(&state).expect("a struct of numbers always encodes into memory")
    }

    fn restore(&self, saved: &[u8]) -> Result<(), String> {
        let state: State = rmp_serde::from_slice(saved).map_err(|error| error.to_string())?;
        tracing::debug!(
            before = state.guest_cid,
            now = self.guest_cid,
            "the guest's connections are reset"
        );
        self.shared.switch().clear();
        self.shared.reset_pending.store(true, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
