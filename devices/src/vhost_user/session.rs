//! A back end that has been talked into serving the device: what it offers, and the requests that it gets.
//!
//! ```text
//!   open:      GET_FEATURES ─ GET/SET_PROTOCOL_FEATURES ─ GET_QUEUE_NUM ─ SET_BACKEND_REQ_FD ─ SET_OWNER ─ GET_CONFIG
//!   configure: SET_FEATURES ─ SET_MEM_TABLE ─ SET_LOG_BASE ─ GET/SET_INFLIGHT_FD       once the driver has said what it wants
//!   start:     SET_VRING_NUM, _BASE, _ADDR, _CALL, _KICK, _ENABLE ─ kick
//!   stop:      GET_VRING_BASE
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use memory::GuestRam;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemory, VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol, VhostUserU64,
    VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::connection::Connection;
use super::error::VhostError;
use super::kind::Kind;
use super::log::DirtyLog;
use crate::virtio::{VERSION_1, Virtqueue};

/// VHOST_F_LOG_ALL: the back end can mark what it writes.
const LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Most memory regions that every back end takes (VHOST_MEMORY_BASELINE_NREGIONS).
const MAX_REGIONS: usize = 8;
/// A back end may take that many times longer than for other answers to finish what is under way in a ring.
pub(super) const DRAIN_FACTOR: u32 = 2;

/// What is used of the protocol if the back end has it.
const WANTED: Protocol = Protocol::MQ
    .union(Protocol::LOG_SHMFD)
    .union(Protocol::RARP)
    .union(Protocol::REPLY_ACK)
    .union(Protocol::MTU)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::CONFIG)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::RESET_DEVICE);

/// What a back end offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// Virtio's and vhost's.
    pub(super) features: u64,
    /// As far as they are used here.
    pub(super) protocol: Protocol,
    /// Rings; none if it does not say.
    pub(super) rings: Option<u64>,
}

impl Offer {
    pub(super) fn logs(&self) -> bool {
        self.features & LOG_ALL != 0 && self.protocol.contains(Protocol::LOG_SHMFD)
    }

    pub(super) fn tracks_requests(&self) -> bool {
        self.protocol.contains(Protocol::INFLIGHT_SHMFD)
    }

    /// What of `before` is not there any more.
    pub(super) fn lacks(&self, before: &Self, features: u64) -> Option<String> {
        let missing = before.features & features & !self.features;
        let protocol =
            before.protocol & !self.protocol & (Protocol::INFLIGHT_SHMFD | Protocol::LOG_SHMFD);
        if missing != 0 {
            Some(format!("features {missing:#x} that the one before it had"))
        } else if !protocol.is_empty() {
            Some(format!(
                "protocol features {:#x} that the one before it had",
                protocol.bits()
            ))
        } else {
            None
        }
    }
}

/// Where the keeper sees that something happens with the connection.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) socket: UnixStream,
    /// The back end's own requests.
    pub(super) requests: Option<UnixStream>,
}

/// The buffer in which a back end notes the requests that it has begun. It outlives the back end.
#[derive(Debug)]
pub(super) struct Inflight {
    /// As the back end has described it.
    description: [u8; size_of::<VhostUserInflight>()],
    file: OwnedFd,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Session {
    connection: Connection,
    pub(super) offer: Offer,
    pub(super) watch: Arc<Watch>,
    /// Features and memory are known to it.
    pub(super) configured: bool,
    logging: bool,
}

fn number(value: u64) -> [u8; 8] {
    value.to_ne_bytes()
}

fn state(ring: u16, value: u32) -> VhostUserVringState {
    VhostUserVringState::new(ring.into(), value)
}

impl Session {
    /// Connects and agrees on what is used.
    pub(super) fn open(path: &Path, patience: Duration) -> Result<Self, VhostError> {
        Self::agree(Connection::connect(path, patience)?)
    }

    pub(super) fn agree(mut connection: Connection) -> Result<Self, VhostError> {
        use FrontendReq as Request;
        let features = connection.ask(Request::GET_FEATURES, &[], &[])?.u64()?;
        if features & PROTOCOL_FEATURES == 0 {
            return Err(VhostError::Lacks("protocol features".to_owned()));
        }
        if features & VERSION_1 == 0 {
            return Err(VhostError::Lacks(
                "virtio 1 (VIRTIO_F_VERSION_1)".to_owned(),
            ));
        }
        let offered = connection
            .ask(Request::GET_PROTOCOL_FEATURES, &[], &[])?
            .u64()?;
        let protocol = Protocol::from_bits_truncate(offered) & WANTED;
        connection.tell(
            Request::SET_PROTOCOL_FEATURES,
            &number(protocol.bits()),
            &[],
        )?;
        connection.acknowledges = protocol.contains(Protocol::REPLY_ACK);
        let rings = match protocol.contains(Protocol::MQ) {
            true => Some(connection.ask(Request::GET_QUEUE_NUM, &[], &[])?.u64()?),
            false => None,
        };
        let requests = match protocol.contains(Protocol::BACKEND_REQ) {
            true => {
                let (ours, theirs) = UnixStream::pair()?;
                ours.set_nonblocking(true)?;
                connection.tell(Request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
                Some(ours)
            }
            false => None,
        };
        connection.tell(Request::SET_OWNER, &[], &[])?;
        let watch = Watch {
            socket: connection.socket()?,
            requests,
        };
        Ok(Self {
            connection,
            offer: Offer {
                features,
                protocol,
                rings,
            },
            watch: Arc::new(watch),
            configured: false,
            logging: false,
        })
    }

    /// The first `len` bytes of the configuration space.
    pub(super) fn config(&mut self, len: u32) -> Result<Vec<u8>, VhostError> {
        if !self.offer.protocol.contains(Protocol::CONFIG) {
            let what = "a configuration space (VHOST_USER_PROTOCOL_F_CONFIG)";
            return Err(VhostError::Lacks(what.to_owned()));
        }
        let head = VhostUserConfig::new(0, len, VhostUserConfigFlags::empty());
        let mut body = head.as_slice().to_vec();
        let at = body.len();
        body.resize(at + len as usize, 0);
        let mut reply = self.connection.ask(FrontendReq::GET_CONFIG, &body, &[])?;
        if reply.body.len() != body.len() {
            return Err(reply.nonsense("it is not as long as what was asked for"));
        }
        Ok(reply.body.split_off(at))
    }

    fn features(&self, accepted: u64, logging: bool) -> u64 {
        let log = if logging { LOG_ALL } else { 0 };
        accepted & self.offer.features | PROTOCOL_FEATURES | log
    }

    fn set_features(&mut self, accepted: u64, logging: bool) -> Result<(), VhostError> {
        let features = self.features(accepted, logging);
        self.connection
            .tell(FrontendReq::SET_FEATURES, &number(features), &[])
    }

    /// Tells what the driver has accepted, where memory is, where to log, and where to note requests.
    pub(super) fn configure(
        &mut self,
        accepted: u64,
        ram: &GuestRam,
        log: Option<&DirtyLog>,
        inflight: &mut Option<Inflight>,
        (rings, size): (u16, u16),
    ) -> Result<(), VhostError> {
        self.set_features(accepted, log.is_some())?;
        let regions = ram.regions();
        if regions.len() > MAX_REGIONS {
            let what = format!("room for {} memory regions", regions.len());
            return Err(VhostError::Lacks(what));
        }
        let mut body = VhostUserMemory::new(regions.len() as u32)
            .as_slice()
            .to_vec();
        let mut files: Vec<BorrowedFd<'_>> = Vec::with_capacity(regions.len());
        for region in regions {
            let file = region.file().ok_or_else(|| {
                VhostError::Config("guest memory is not shared: set memory.shared".to_owned())
            })?;
            files.push(file);
            let region = VhostUserMemoryRegion::new(region.gpa(), region.len(), region.hva(), 0);
            body.extend(region.as_slice());
        }
        self.connection
            .tell(FrontendReq::SET_MEM_TABLE, &body, &files)?;
        if let Some(log) = log {
            self.set_log_base(log)?;
        }
        self.logging = log.is_some();
        if self.offer.tracks_requests() {
            self.share_inflight(inflight, rings, size)?;
        }
        self.configured = true;
        Ok(())
    }

    fn share_inflight(
        &mut self,
        inflight: &mut Option<Inflight>,
        rings: u16,
        size: u16,
    ) -> Result<(), VhostError> {
        if inflight.is_none() {
            let wish = VhostUserInflight::new(0, 0, rings, size);
            let mut reply =
                self.connection
                    .ask(FrontendReq::GET_INFLIGHT_FD, wish.as_slice(), &[])?;
            let description = reply.body.as_slice().try_into();
            match (description, reply.fds.pop()) {
                (Ok(description), Some(file)) => *inflight = Some(Inflight { description, file }),
                _ => return Err(reply.nonsense("it describes no buffer")),
            }
        }
        match inflight {
            Some(buffer) => self.connection.tell(
                FrontendReq::SET_INFLIGHT_FD,
                &buffer.description,
                &[buffer.file.as_fd()],
            ),
            None => Ok(()),
        }
    }

    fn set_log_base(&mut self, log: &DirtyLog) -> Result<(), VhostError> {
        let body = VhostUserLog::new(log.len(), 0);
        // What the answer holds differs from back end to back end.
        self.connection
            .ask(FrontendReq::SET_LOG_BASE, body.as_slice(), &[log.fd()])
            .map(drop)
    }

    /// Lets a ring be served from `base` on.
    pub(super) fn start(
        &mut self,
        queue: &Virtqueue,
        base: u16,
        call: &EventFd,
        active: bool,
    ) -> Result<(), VhostError> {
        use FrontendReq as Request;
        let ring = queue.index();
        let size = state(ring, queue.rings()[0].1 as u32 / 16);
        self.connection
            .tell(Request::SET_VRING_NUM, size.as_slice(), &[])?;
        let base = state(ring, base.into());
        self.connection
            .tell(Request::SET_VRING_BASE, base.as_slice(), &[])?;
        self.set_addresses(queue)?;
        let index = VhostUserU64::new(ring.into());
        let kick = queue.shared_kick();
        for (request, event) in [
            (Request::SET_VRING_CALL, call),
            (Request::SET_VRING_KICK, &kick),
        ] {
            self.connection
                .tell(request, index.as_slice(), &[borrowed(event)])?;
        }
        self.enable(ring, active)?;
        // The driver may have notified one that did not come to it.
        kick.write(1)?;
        Ok(())
    }

    fn set_addresses(&mut self, queue: &Virtqueue) -> Result<(), VhostError> {
        let flags = match self.logging {
            true => VhostUserVringAddrFlags::VHOST_VRING_F_LOG,
            false => VhostUserVringAddrFlags::empty(),
        };
        let [descriptors, available, used] = host_addresses(queue)?;
        let log = queue.rings()[2].0;
        let ring = queue.index().into();
        let body = VhostUserVringAddr::new(ring, flags, descriptors, used, available, log);
        self.connection
            .tell(FrontendReq::SET_VRING_ADDR, body.as_slice(), &[])
    }

    pub(super) fn enable(&mut self, ring: u16, active: bool) -> Result<(), VhostError> {
        let body = state(ring, active.into());
        self.connection
            .tell(FrontendReq::SET_VRING_ENABLE, body.as_slice(), &[])
    }

    /// Stops a ring; returns the position that the back end says to have come to.
    pub(super) fn stop(&mut self, ring: u16) -> Result<u16, VhostError> {
        let body = state(ring, 0);
        let request = FrontendReq::GET_VRING_BASE;
        let patience = self.connection.patience * DRAIN_FACTOR;
        let reply = self
            .connection
            .ask_within(patience, request, body.as_slice(), &[])?;
        let bytes: [u8; 8] = reply
            .body
            .as_slice()
            .try_into()
            .map_err(|_| reply.nonsense("it is not 8 bytes long"))?;
        let [a, b, c, d, value @ ..] = bytes;
        if u32::from_ne_bytes([a, b, c, d]) != u32::from(ring) {
            return Err(reply.nonsense("it is about another ring"));
        }
        u16::try_from(u32::from_ne_bytes(value))
            .map_err(|_| reply.nonsense("a position has 16 bits"))
    }

    /// From now on, or from now on no longer, it logs what it writes. All that it writes after the return is logged.
    pub(super) fn set_logging<'a>(
        &mut self,
        accepted: u64,
        log: Option<&DirtyLog>,
        running: impl Iterator<Item = (&'a Virtqueue, bool)>,
    ) -> Result<(), VhostError> {
        if !self.configured {
            return Ok(());
        }
        if let Some(log) = log {
            self.set_log_base(log)?;
        }
        self.logging = log.is_some();
        self.set_features(accepted, log.is_some())?;
        for (queue, active) in running {
            self.set_addresses(queue)?;
            // Some take new features as a new beginning.
            self.enable(queue.index(), active)?;
        }
        // An answer means that all before has been carried out.
        self.connection
            .ask(FrontendReq::GET_FEATURES, &[], &[])
            .map(drop)
    }

    /// The driver has reset the device. No ring runs.
    pub(super) fn reset(&mut self) -> Result<(), VhostError> {
        self.configured = false;
        match self.offer.protocol.contains(Protocol::RESET_DEVICE) {
            true => self.connection.tell(FrontendReq::RESET_DEVICE, &[], &[]),
            false => Ok(()),
        }
    }

    /// Has it tell the network, in the guest's name, where the guest is now; false if it cannot.
    pub(super) fn send_rarp(&mut self, mac: [u8; 6]) -> Result<bool, VhostError> {
        if !self.offer.protocol.contains(Protocol::RARP) {
            return Ok(false);
        }
        let mut body = [0; 8];
        body[..6].copy_from_slice(&mac);
        self.connection
            .tell(FrontendReq::SEND_RARP, &body, &[])
            .map(|()| true)
    }

    pub(super) fn set_mtu(&mut self, mtu: u16) -> Result<(), VhostError> {
        match self.offer.protocol.contains(Protocol::MTU) {
            true => self
                .connection
                .tell(FrontendReq::NET_SET_MTU, &number(mtu.into()), &[]),
            false => Ok(()),
        }
    }
}

/// Where the rings are in this process: by these addresses a back end finds them in the memory table.
pub(super) fn host_addresses(queue: &Virtqueue) -> Result<[u64; 3], VhostError> {
    let mut addresses = [0; 3];
    for (address, (gpa, len)) in addresses.iter_mut().zip(queue.rings()) {
        let slice = queue
            .memory()
            .get_slice(GuestAddress(gpa), len)
            .map_err(|error| {
                VhostError::Config(format!(
                    "a ring does not lie in one piece of memory: {error}"
                ))
            })?;
        *address = slice.ptr_guard_mut().as_ptr().addr() as u64;
    }
    Ok(addresses)
}

fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: an EventFd is an open file descriptor until it is dropped, which the borrow prevents.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// For those who poll it.
pub(super) fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    borrowed(event)
}

impl Kind {
    /// What a new session must be told and asked before the driver does anything; the back end's part of the configuration space.
    pub(super) fn introduce(
        &self,
        session: &mut Session,
        queues: u16,
    ) -> Result<Vec<u8>, VhostError> {
        self.check(session.offer.features, queues)?;
        let rings = u64::from(self.rings(queues));
        match session.offer.rings {
            Some(theirs) if theirs < rings => {
                return Err(VhostError::Lacks(format!(
                    "{rings} queues: it has {theirs}"
                )));
            }
            None if rings > 2 => {
                return Err(VhostError::Lacks(format!(
                    "{rings} queues (VHOST_USER_PROTOCOL_F_MQ)"
                )));
            }
            _ => {}
        }
        if let Some(mtu) = self.front().and_then(|front| front.mtu()) {
            session.set_mtu(mtu)?;
        }
        match self.space_from_back_end() {
            Some(len) => session.config(len),
            None => Ok(Vec::new()),
        }
    }
}
