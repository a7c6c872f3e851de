//! A back end for tests that agrees to everything and serves nothing, or behaves badly in one way.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vhost::vhost_user::message::{FrontendReq as Request, VhostUserProtocolFeatures as Protocol};

use super::{VhostConfig, VhostKind, VhostUser};
use crate::virtio::testing::Driver;

/// LOG_ALL, PROTOCOL_FEATURES, indirect descriptors, event indices, VERSION_1, and of a disk: SEG_MAX, BLK_SIZE, FLUSH, MQ.
pub(crate) const FEATURES: u64 =
    1 << 26 | 1 << 30 | 1 << 28 | 1 << 29 | 1 << 32 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 12;

/// What it does.
#[derive(Clone, Debug)]
pub(crate) struct Manner {
    pub(crate) features: u64,
    pub(crate) protocol: Protocol,
    pub(crate) rings: u64,
    pub(crate) sectors: u64,
    /// The position that it says of every ring.
    pub(crate) base: u32,
    /// What it does when it is asked this.
    pub(crate) bad: Option<(Request, Bad)>,
}

/// What a bad one does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    /// Nothing.
    Silent,
    /// Ends the connection.
    HangsUp,
    /// Says no.
    Refuses,
    /// These bytes instead of a message.
    Bytes(Vec<u8>),
    /// An answer with this body, of whatever length.
    Body(Vec<u8>),
}

impl Manner {
    pub(crate) fn good() -> Self {
        Self {
            features: FEATURES,
            protocol: Protocol::MQ
                | Protocol::LOG_SHMFD
                | Protocol::REPLY_ACK
                | Protocol::CONFIG
                | Protocol::INFLIGHT_SHMFD,
            rings: 8,
            sectors: 2048,
            base: 0,
            bad: None,
        }
    }

    pub(crate) fn bad(request: Request, bad: Bad) -> Self {
        Self {
            bad: Some((request, bad)),
            ..Self::good()
        }
    }
}

/// One that listens; gone on drop.
pub(crate) struct BackEnd {
    socket: PathBuf,
    manner: Arc<Mutex<Manner>>,
    heard: Arc<Mutex<Vec<u32>>>,
    switched: Arc<Mutex<Vec<(u32, u32)>>>,
    connection: Arc<Mutex<Option<UnixStream>>>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BackEnd {
    pub(crate) fn new(socket: &Path, manner: Manner) -> Self {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).expect("a socket");
        let mut this = Self {
            socket: socket.to_owned(),
            manner: Arc::new(Mutex::new(manner)),
            heard: Arc::default(),
            switched: Arc::default(),
            connection: Arc::default(),
            ends: Arc::default(),
            thread: None,
        };
        let (manner, heard) = (Arc::clone(&this.manner), Arc::clone(&this.heard));
        let switched = Arc::clone(&this.switched);
        let (connection, ends) = (Arc::clone(&this.connection), Arc::clone(&this.ends));
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if ends.load(Ordering::SeqCst) {
                    return;
                }
                *locked(&connection) = stream.try_clone().ok();
                let _ = serve(stream, &manner, &heard, &switched);
                *locked(&connection) = None;
            }
        });
        this.thread = Some(thread);
        this
    }

    /// Ends the connection, and takes the next one.
    pub(crate) fn hang_up(&self) {
        if let Some(stream) = locked(&self.connection).take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    pub(crate) fn behave(&self, manner: Manner) {
        *locked(&self.manner) = manner;
    }

    /// What it was asked, in order, since the last call.
    pub(crate) fn heard(&self) -> Vec<u32> {
        std::mem::take(&mut locked(&self.heard))
    }

    /// Rings that it was told to serve (1) or not to (0), in order, since the last call.
    pub(crate) fn switched(&self) -> Vec<(u32, u32)> {
        std::mem::take(&mut locked(&self.switched))
    }

    /// Waits until it has been asked this, and forgets what came before.
    pub(crate) fn wait_for(&self, request: Request) -> bool {
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            if self.heard().contains(&(request as u32)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        self.hang_up();
        // So that it looks.
        let _ = UnixStream::connect(&self.socket);
        let _ = std::fs::remove_file(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    mut stream: UnixStream,
    manner: &Mutex<Manner>,
    heard: &Mutex<Vec<u32>>,
    switched: &Mutex<Vec<(u32, u32)>>,
) -> std::io::Result<()> {
    loop {
        let mut header = [0; 12];
        // File descriptors that come are closed by the system: nothing here uses them.
        stream.read_exact(&mut header)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let (code, flags, len) = (word(0), word(4), word(8) as usize);
        let mut body = vec![0; len];
        stream.read_exact(&mut body)?;
        let manner = locked(manner).clone();
        locked(heard).push(code);
        if code == Request::SET_VRING_ENABLE as u32 {
            let word =
                |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().expect("4 bytes"));
            locked(switched).push((word(0), word(4)));
        }
        let bad = manner
            .bad
            .as_ref()
            .filter(|(request, _)| *request as u32 == code);
        let send = |body: &[u8], file: Option<OwnedFd>| -> std::io::Result<()> {
            let mut message = Vec::new();
            for word in [code, 5, body.len() as u32] {
                message.extend(word.to_ne_bytes());
            }
            message.extend(body);
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
            if !files.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
            }
            let part = [std::io::IoSlice::new(&message)];
            rustix::net::sendmsg(&stream, &part, &mut control, SendFlags::NOSIGNAL)?;
            Ok(())
        };
        match bad.map(|(_, bad)| bad) {
            Some(Bad::Silent) => continue,
            Some(Bad::HangsUp) => return Ok(()),
            Some(Bad::Refuses) => {
                send(&7u64.to_ne_bytes(), None)?;
                continue;
            }
            Some(Bad::Bytes(bytes)) => {
                stream.write_all(bytes)?;
                continue;
            }
            Some(Bad::Body(body)) => {
                send(body, None)?;
                continue;
            }
            None => {}
        }
        let is = |request: Request| code == request as u32;
        if is(Request::GET_FEATURES) {
            send(&manner.features.to_ne_bytes(), None)?;
        } else if is(Request::GET_PROTOCOL_FEATURES) {
            send(&manner.protocol.bits().to_ne_bytes(), None)?;
        } else if is(Request::GET_QUEUE_NUM) {
            send(&manner.rings.to_ne_bytes(), None)?;
        } else if is(Request::GET_CONFIG) {
            body[12..20].copy_from_slice(&manner.sectors.to_le_bytes());
            send(&body, None)?;
        } else if is(Request::GET_VRING_BASE) {
            body[4..].copy_from_slice(&manner.base.to_ne_bytes());
            send(&body, None)?;
        } else if is(Request::GET_INFLIGHT_FD) {
            let file = File::open("/dev/null")?;
            send(&body, Some(file.into()))?;
        } else if is(Request::SET_LOG_BASE) {
            send(&[], None)?;
        } else if flags & 8 != 0 {
            send(&0u64.to_ne_bytes(), None)?;
        }
    }
}

pub(crate) fn disk(socket: &Path) -> VhostConfig {
    VhostConfig {
        socket: socket.to_owned(),
        kind: VhostKind::Block { read_only: false },
        num_queues: 1,
        queue_size: 64,
    }
}

/// A device on a back end of its own; answers are waited for only for a moment.
pub(crate) fn connected(
    socket: &Path,
    driver: &Driver,
    manner: Manner,
) -> (BackEnd, Result<VhostUser, super::VhostError>) {
    let back_end = BackEnd::new(socket, manner);
    let ram = Arc::clone(&driver.ram);
    let device = VhostUser::open("disk", disk(socket), ram, Duration::from_millis(200));
    (back_end, device)
}
