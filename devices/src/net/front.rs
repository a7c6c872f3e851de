//! What a network device keeps in this process when its packets go through another one: address, status, control queue.
//!
//! ```text
//!   control ── command ──► Control ─┬─► active pairs ──► Attach (the rings that the other process serves)
//!                                   └─► address, announcement ──► configuration space
//! ```

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::Control;
use super::device::space;
use super::features::{self, MQ};
use super::mac::MacAddr;
use super::persist;
use super::port::Port;
use super::shared::Shared;
use crate::virtio::{VirtioInterrupt, Virtqueue, Worker};

/// Lets the rings of a pair be served, or not.
pub(crate) type Attach = Box<dyn Fn(u16, bool) -> io::Result<()> + Send + Sync>;

/// What of a network device does not depend on who moves its packets.
pub(crate) struct NetFront {
    shared: Arc<Shared>,
    attach: Arc<OnceLock<Attach>>,
    mtu: Option<u16>,
    control: Mutex<Option<Worker<Control>>>,
}

/// A pair whose packets never come here.
struct Elsewhere {
    pair: u16,
    attach: Arc<OnceLock<Attach>>,
    /// Never readable.
    nothing: EventFd,
}

impl Port for Elsewhere {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.nothing.as_raw_fd()) }
    }

    fn set_offloads(&self, _offloads: u32) -> io::Result<()> {
        // The other side knows the features.
        Ok(())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        match self.attach.get() {
            Some(attach) => attach(self.pair, attached),
            None => Ok(()),
        }
    }
}

impl NetFront {
    pub(crate) fn new(mac: MacAddr, mtu: Option<u16>, pairs: u16) -> io::Result<Self> {
        let attach = Arc::new(OnceLock::new());
        let ports = (0..pairs).map(|pair| {
            let port = Elsewhere {
                pair,
                attach: Arc::clone(&attach),
                nothing: EventFd::new(EFD_NONBLOCK)?,
            };
            Ok(Box::new(port) as Box<dyn Port>)
        });
        Ok(Self {
            shared: Arc::new(Shared::new(ports.collect::<io::Result<_>>()?, mac)?),
            attach,
            mtu,
            control: Mutex::default(),
        })
    }

    /// Who serves the pairs; called once.
    pub(crate) fn attach_by(&self, attach: Attach) {
        // A second is no other.
        let _ = self.attach.set(attach);
    }

    pub(crate) fn connect(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        // As above.
        let _ = self.shared.interrupt.set(interrupt);
    }

    /// Features that need nobody else.
    pub(crate) fn features(&self) -> u64 {
        features::of_control(self.mtu.is_some(), self.shared.pairs() > 1)
    }

    pub(crate) fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    pub(crate) fn is_active(&self, pair: u16) -> bool {
        self.shared.is_active(pair)
    }

    pub(crate) fn mac(&self) -> MacAddr {
        self.shared.choices().mac
    }

    pub(crate) fn announce(&self) -> bool {
        self.shared.announce()
    }

    pub(crate) fn space(&self) -> [u8; 12] {
        space(&self.shared, self.mtu)
    }

    pub(crate) fn set_features(&self, accepted: u64) {
        self.shared.choices().accepted = accepted;
    }

    /// Which queue is the control queue.
    pub(crate) fn control_index(&self) -> u16 {
        let several = self.shared.choices().accepted & MQ != 0;
        2 * if several { self.shared.pairs() } else { 1 }
    }

    pub(crate) fn start_control(&self, queue: Virtqueue) -> io::Result<()> {
        let worker = Worker::start("net-ctl", Control::new(Arc::clone(&self.shared)), queue)?;
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) = Some(worker);
        Ok(())
    }

    pub(crate) fn stop_control(&self) -> Option<Virtqueue> {
        let worker = self
            .control
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        worker.stop().map(|(_, queue)| queue)
    }

    /// The driver has reset the device, which had this address at first.
    pub(crate) fn reset(&self, mac: MacAddr) {
        let result = self.shared.change(|choices| {
            choices.accepted = 0;
            choices.mac = mac;
            choices.announce = false;
            choices.offloads = None;
        });
        if let Err(error) = result.and_then(|()| self.shared.activate(1)) {
            tracing::debug!(%error, "a network device is reset while nobody serves it");
        }
    }

    pub(crate) fn save(&self) -> Vec<u8> {
        persist::save(&self.shared)
    }

    pub(crate) fn restore(&self, saved: &[u8]) -> Result<(), String> {
        persist::restore(&self.shared, saved)
    }
}
