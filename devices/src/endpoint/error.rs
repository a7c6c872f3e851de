//! Why the other end of a serial port or console cannot be made.

use std::io;
use std::path::PathBuf;

/// Why the other end of a serial port or console cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The output file cannot be opened.
    #[error("cannot open output file {}: {source}", .path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Something is at the socket's path.
    #[error("socket {} exists already; remove it if no other process uses it, or choose another path", .path.display())]
    SocketExists {
        /// Its path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot listen on socket {}: {source}", .path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The pseudo-terminal cannot be made.
    #[error("cannot make a pseudo-terminal: {0}")]
    Pty(#[source] io::Error),
    /// The terminal cannot be put into raw mode.
    #[error("cannot put the terminal into raw mode: {0}")]
    Terminal(#[source] io::Error),
    /// Another serial port or console of this process has standard input and output.
    #[error(
        "another serial port or console of this process uses standard input and output; give one of them another back end"
    )]
    StdioBusy,
    /// The worker cannot be started.
    #[error("cannot start the thread of a serial port or console: {0}")]
    Worker(#[source] io::Error),
}
