//! The device: what the transport and the machine see of it.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use memory::GuestRam;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::connection::PATIENCE;
use super::error::VhostError;
use super::keeper;
use super::kind::{Kind, VhostKind, capacity, check_queues};
use super::link::Shared;
use super::log::DirtyLog;
use super::session::Session;
use crate::virtio::{DeviceType, TRANSPORT_FEATURES, VirtioDevice, VirtioInterrupt, Virtqueue};

/// VIRTIO_F_VERSION_1 and queue reset (bit 40), which need nothing of who serves the queues; the rest of the transport's features do.
const ANYWAY: u64 = 1 << 32 | 1 << 40;
/// Largest encoded state that is decoded, in bytes; this build's has some 100.
const MAX_BYTES: usize = 4096;

/// What a device is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostConfig {
    /// Where the back end listens.
    pub socket: PathBuf,
    /// What it is.
    pub kind: VhostKind,
    /// Queues of a disk, requests queues of a file system, both directions of a network.
    pub num_queues: u16,
    /// Descriptors of each, a power of two.
    pub queue_size: u16,
}

/// A virtio device whose queues another process serves. See the module's text.
pub struct VhostUser {
    shared: Arc<Shared>,
    keeper: Mutex<Option<JoinHandle<()>>>,
}

/// The saved state. Never rename or retype a field; a new field has a default that means "as before it existed".
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Saved {
    /// What the guest knows of a disk's size; zero is nothing.
    capacity_sectors: u64,
    /// What a network device keeps, encoded as that of one on a TAP.
    #[serde(with = "serde_bytes")]
    net: Vec<u8>,
}

impl VhostUser {
    /// Connects to the back end and agrees with it. `ram` must be shared memory.
    pub fn new(id: &str, config: VhostConfig, ram: Arc<GuestRam>) -> Result<Self, VhostError> {
        Self::open(id, config, ram, PATIENCE)
    }

    /// The same, with a limit of time for each answer.
    pub(super) fn open(
        id: &str,
        config: VhostConfig,
        ram: Arc<GuestRam>,
        patience: Duration,
    ) -> Result<Self, VhostError> {
        check_queues(&config.kind, config.num_queues, config.queue_size)?;
        if ram.regions().iter().any(|region| region.file().is_none()) {
            let problem = "guest memory is not shared: set memory.shared";
            return Err(VhostError::Config(problem.to_owned()));
        }
        let queues = config.num_queues;
        let kind = Kind::new(config.kind, queues)?;
        let mut session = Session::open(&config.socket, patience)?;
        let space = kind.introduce(&mut session, queues)?;
        let calls = (0..kind.rings(queues))
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<_>>()?;
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared::new(
            id,
            config.socket,
            kind,
            (queues, config.queue_size),
            ram,
            session,
            space,
            (calls, wake),
            patience,
        ));
        if let Some(front) = shared.kind.front() {
            let weak = Arc::downgrade(&shared);
            front.attach_by(Box::new(move |pair, attached| {
                if let Some(shared) = weak.upgrade() {
                    attach(&shared, pair, attached);
                }
                Ok(())
            }));
        }
        let keeper = keeper::start(&shared)?;
        Ok(Self {
            shared,
            keeper: Mutex::new(Some(keeper)),
        })
    }

    /// Whether the back end is there.
    pub fn is_connected(&self) -> bool {
        self.shared.watch().is_some()
    }

    /// Why its guest's memory and state, the device's among them, cannot be taken now, if so.
    pub fn check_complete(&self) -> Result<(), String> {
        if let Some(reason) = self.shared.kind.stays() {
            return Err(reason.to_owned());
        }
        let at = self.shared.socket.display();
        if !self.is_connected() {
            return Err(format!(
                "its vhost-user back end at {at} is gone, with requests of the guest: start it again first"
            ));
        }
        match self.shared.state().has_unfinished() {
            false => Ok(()),
            true => Err(format!(
                "its vhost-user back end at {at} went while the guest was being paused, and is back with requests to finish: resume the \
                 guest first"
            )),
        }
    }

    /// Why its guest cannot move now, if so.
    pub fn check_movable(&self) -> Result<(), String> {
        self.check_complete()?;
        match self.shared.offer.logs() {
            true => Ok(()),
            false => Err(
                "its vhost-user back end cannot log what it writes to guest memory (VHOST_F_LOG_ALL, VHOST_USER_PROTOCOL_F_LOG_SHMFD), so \
                 that would not all arrive"
                    .to_owned(),
            ),
        }
    }

    /// Has the back end log what it writes: from the return on, all of it shows in [`VhostUser::collect_dirty`].
    pub fn start_logging(&self) -> Result<(), VhostError> {
        let log = DirtyLog::new(self.shared.ram.guest_memory())?;
        self.set_log(Some(log))
    }

    /// Ends it.
    pub fn stop_logging(&self) {
        if let Err(error) = self.set_log(None) {
            tracing::debug!(id = self.shared.id, %error, "nobody is there to end logging");
        }
    }

    fn set_log(&self, log: Option<DirtyLog>) -> Result<(), VhostError> {
        let mut state = self.shared.state();
        let wanted = log.is_some();
        state.log = log;
        let done = self.shared.exchange(&mut state, |state, session| {
            let rings = state.rings.iter().flatten();
            let running = rings.map(|ring| {
                let active = self.shared.kind.is_active(ring.queue.index());
                (&ring.queue, active)
            });
            session.set_logging(state.accepted, state.log.as_ref(), running)
        });
        match done {
            None if wanted => Err(VhostError::Gone),
            _ => Ok(()),
        }
    }

    /// Marks in the guest memory's own bitmap what the back end has written since the last call.
    pub fn collect_dirty(&self) {
        if let Some(log) = &self.shared.state().log {
            log.collect(self.shared.ram.guest_memory());
        }
    }

    /// Asks the guest to tell the network where it is; false if its driver does not know how to, or it is no network.
    pub fn announce(&self) -> bool {
        self.shared
            .kind
            .front()
            .is_some_and(|front| front.announce())
    }

    /// Has the back end tell the network where the guest is, if it is one of a network and can.
    pub fn send_rarp(&self) {
        if let Some(front) = self.shared.kind.front() {
            let mac = front.mac().octets();
            let mut state = self.shared.state();
            self.shared
                .exchange(&mut state, |_, session| session.send_rarp(mac));
        }
    }

    fn control_index(&self) -> Option<u16> {
        self.shared.kind.front().map(|front| front.control_index())
    }
}

/// The driver uses a pair of rings, or not any more.
fn attach(shared: &Shared, pair: u16, attached: bool) {
    let mut state = shared.state();
    for index in [pair * 2, pair * 2 + 1] {
        let runs = state
            .rings
            .get(usize::from(index))
            .is_some_and(Option::is_some);
        if runs {
            shared.exchange(&mut state, |_, session| session.enable(index, attached));
        }
    }
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> DeviceType {
        self.shared.kind.device_type()
    }

    fn features(&self) -> u64 {
        let kind = &self.shared.kind;
        self.shared.offer.features & kind.carried() | kind.own()
    }

    fn feature_name(&self, bit: u32) -> Option<&'static str> {
        match &self.shared.kind {
            Kind::Block { .. } => crate::block::feature_name(bit),
            Kind::Net { .. } => crate::net::feature_name(bit),
            Kind::Fs { .. } => None,
        }
    }

    fn transport_features(&self) -> u64 {
        self.shared.offer.features & TRANSPORT_FEATURES | ANYWAY
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let shared = &self.shared;
        shared.kind.queue_sizes(shared.queues, shared.queue_size)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.shared.space();
        self.shared
            .kind
            .read_space(&space, self.shared.queues, offset, data);
    }

    fn set_features(&self, accepted: u64) {
        if let Some(front) = self.shared.kind.front() {
            front.set_features(accepted);
        }
        let mut state = self.shared.state();
        state.accepted = accepted;
        if let Some(session) = &mut state.session {
            session.configured = false;
        }
    }

    fn connect(&self, interrupt: Arc<dyn VirtioInterrupt>) {
        if let Some(front) = self.shared.kind.front() {
            front.connect(Arc::clone(&interrupt));
        }
        // Called once; a second is no other.
        let _ = self.shared.interrupt.set(interrupt);
    }

    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        if let Some(front) = self.shared.kind.front()
            && Some(queue.index()) == self.control_index()
        {
            return front.start_control(queue);
        }
        self.shared.start(queue).map_err(io::Error::other)
    }

    fn stop_queue(&self, index: u16) -> Option<Virtqueue> {
        if let Some(front) = self.shared.kind.front()
            && Some(index) == self.control_index()
        {
            return front.stop_control();
        }
        self.shared.stop(index)
    }

    fn reset(&self) {
        if let Kind::Net { front, first_mac } = &self.shared.kind {
            front.reset(*first_mac);
        }
        self.shared.reset();
    }

    fn save(&self) -> Vec<u8> {
        let saved = Saved {
            capacity_sectors: capacity(&self.shared.space()).unwrap_or(0),
            net: self
                .shared
                .kind
                .front()
                .map(|front| front.save())
                .unwrap_or_default(),
        };
        rmp_serde::to_vec_named(&saved).unwrap_or_default()
    }

    fn restore(&self, saved: &[u8]) -> Result<(), String> {
        if saved.len() > MAX_BYTES {
            let len = saved.len();
            return Err(format!(
                "{len} bytes are more than the {MAX_BYTES} that are read"
            ));
        }
        let saved: Saved = rmp_serde::from_slice(saved).map_err(|error| error.to_string())?;
        let here = capacity(&self.shared.space()).unwrap_or(0);
        if saved.capacity_sectors > here {
            return Err(format!(
                "the back end at {} has {here} sectors of 512 bytes, the guest's disk has {}: does it serve the right image?",
                self.shared.socket.display(),
                saved.capacity_sectors
            ));
        }
        match self.shared.kind.front() {
            Some(front) => front.restore(&saved.net),
            None => Ok(()),
        }
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.call_keeper();
        let keeper = self
            .keeper
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if keeper.is_some_and(|keeper| keeper.join().is_err()) {
            tracing::error!(id = self.shared.id, "a device's thread has panicked");
        }
    }
}

impl fmt::Debug for VhostUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUser")
            .field("id", &self.shared.id)
            .field("socket", &self.shared.socket)
            .finish_non_exhaustive()
    }
}
