//! The other end of a serial port or console: standard streams, a file, a pseudo-terminal, a socket, nothing.
//!
//! ```text
//!   guest's port ── Output ──► queue, 64 KiB ──wake──► Pump (a thread) ──► Endpoint   (stdio, pty, socket)
//!                          └─► file, written at once; nowhere
//!   guest's port ◄── GuestPort::input ◄─────────────── Pump ◄───────────── Endpoint, no more than GuestPort::input_room
//! ```
//!
//! Promises:
//!
//! - No call into `Output` waits for the other end. What it does with output for which there is no room is its user's choice: send it
//!   all the same, and lose the oldest, or ask for `Output::room` first and wait for `GuestPort::output_left`.
//! - Input is read only as far as the port has room, and given to it at once: the pump keeps none.
//! - `Pump::pause` returns when the pump does nothing any more. `Pump::stop`, or dropping, joins the thread and leaves nothing behind: no
//!   socket file, no raw terminal.

mod error;
mod file;
#[cfg(feature = "fuzzing")]
mod hand;
mod output;
mod pty;
mod pump;
mod socket;
mod stdio;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

pub use self::error::EndpointError;
#[cfg(feature = "fuzzing")]
pub use self::hand::Hand;
pub use self::output::OUTPUT_CAPACITY;
pub(crate) use self::output::Output;
use self::output::{OutputQueue, signal};
pub(crate) use self::pump::Pump;
pub(crate) use self::socket::Listener;

/// What is on the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointConfig {
    /// Nothing: output is lost, no input comes.
    Null,
    /// This process's standard input and output. A terminal is in raw mode meanwhile, and gets its mode back when the
    /// device stops, when the process exits, and before a panic's message.
    Stdio,
    /// A file that takes the output.
    File {
        /// Its path.
        path: PathBuf,
        /// Keep what it has; otherwise it is emptied.
        append: bool,
    },
    /// A new pseudo-terminal: [`crate::Serial::pty_path`], [`crate::Console::pty_path`].
    Pty,
    /// A new unix socket that serves one client at a time; others wait for their turn.
    Socket {
        /// Its path, where nothing may be yet.
        path: PathBuf,
    },
}

/// What reading from a back end has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// None now. When none will ever come, [`Endpoint::input`] is `None` from now on.
    Nothing,
    /// None, and waiting for readiness would not wait.
    Later,
}

/// A back end, as the pump uses it. No call blocks.
pub(crate) trait Endpoint: Send {
    /// What to watch for input.
    fn input(&self) -> Option<BorrowedFd<'_>>;
    /// What to watch for room for output.
    fn output(&self) -> Option<BorrowedFd<'_>>;
    /// What to watch for a new peer.
    fn listener(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Takes a new peer.
    fn accept(&mut self) {}
    /// No output will ever be taken any more.
    fn output_closed(&self) -> bool {
        false
    }
    /// Reads input.
    fn read(&mut self, buffer: &mut [u8]) -> Received;
    /// Writes output; how much was taken.
    fn write(&mut self, bytes: &[u8]) -> usize;
}

/// The guest's side of a pump. No call waits for the guest.
pub(crate) trait GuestPort: Send + Sync {
    /// How many bytes of input it takes now. Whoever makes room wakes the pump ([`Pump::wake`], [`Wake::signal`]).
    fn input_room(&self) -> usize;
    /// Takes input, no more than it has had room for.
    fn input(&self, bytes: &[u8]);
    /// Some output has left, or none is kept any more.
    fn output_left(&self) {}
}

/// What is there after opening the other end.
pub(crate) struct Opened {
    /// Where output goes.
    pub(crate) output: Output,
    /// What a pump is needed for.
    pub(crate) endpoint: Option<Pumped>,
    /// The path of a new pseudo-terminal.
    pub(crate) pty_path: Option<PathBuf>,
}

impl Opened {
    /// Opens the other end.
    pub(crate) fn new(config: EndpointConfig) -> Result<Self, EndpointError> {
        let mut pty_path = None;
        let endpoint: Box<dyn Endpoint> = match config {
            EndpointConfig::Null => return Ok(Self::without_pump(Output::nowhere())),
            EndpointConfig::File { path, append } => {
                return Ok(Self::without_pump(Output::file(file::open(&path, append)?)));
            }
            EndpointConfig::Stdio => Box::new(stdio::Stdio::new()?),
            EndpointConfig::Pty => {
                let pty = pty::Pty::new()?;
                pty_path = Some(pty.path().to_owned());
                Box::new(pty)
            }
            EndpointConfig::Socket { path } => Box::new(socket::Socket::new(&path)?),
        };
        let (queue, wake) = OutputQueue::new()?;
        let queue = Arc::new(queue);
        Ok(Self {
            output: Output::queue(queue.clone()),
            endpoint: Some(Pumped {
                endpoint,
                queue,
                wake,
            }),
            pty_path,
        })
    }

    fn without_pump(output: Output) -> Self {
        Self {
            output,
            endpoint: None,
            pty_path: None,
        }
    }
}

/// An open back end that needs a pump.
pub(crate) struct Pumped {
    endpoint: Box<dyn Endpoint>,
    queue: Arc<OutputQueue>,
    wake: Arc<OwnedFd>,
}

impl Pumped {
    /// What wakes the pump once it is there.
    pub(crate) fn wake(&self) -> Wake {
        Wake(self.wake.clone())
    }

    /// Starts the pump, whose thread has this name of at most 15 bytes.
    pub(crate) fn start(self, name: &str, port: Arc<dyn GuestPort>) -> Result<Pump, EndpointError> {
        Pump::start(name, self.endpoint, port, self.queue, self.wake)
    }
}

/// Wakes a pump.
pub(crate) struct Wake(Arc<OwnedFd>);

impl Wake {
    /// There is room for input.
    pub(crate) fn signal(&self) {
        signal(&self.0);
    }
}
