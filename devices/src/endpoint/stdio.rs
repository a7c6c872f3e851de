//! Standard input and output.
//!
//! Non-blocking mode belongs to the open file, which the shell and others share; so terminals and pipes are opened a second
//! time, and sockets are asked call by call.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, TryLockError};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

use super::error::EndpointError;
use super::{Endpoint, Received};

/// Standard input and output are taken.
static TAKEN: AtomicBool = AtomicBool::new(false);
/// The mode that the terminal gets back.
static TERMINAL_MODE: Mutex<Option<Termios>> = Mutex::new(None);

/// Both ends, and the terminal's raw mode.
pub(crate) struct Stdio {
    input: Option<Stream>,
    output: Option<Stream>,
    _terminal: Terminal,
    _taken: Taken,
}

impl Stdio {
    pub(crate) fn new() -> Result<Self, EndpointError> {
        let taken = Taken::new()?;
        let terminal = Terminal::raw(io::stdin().as_fd()).map_err(EndpointError::Terminal)?;
        Ok(Stdio {
            // A stream that is closed already is one without input, or whose output nobody wants.
            input: Stream::new(io::stdin().as_fd(), OFlags::RDONLY).ok(),
            output: Stream::new(io::stdout().as_fd(), OFlags::WRONLY).ok(),
            _terminal: terminal,
            _taken: taken,
        })
    }
}

impl Endpoint for Stdio {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(|stream| stream.fd.as_fd())
    }

    fn output(&self) -> Option<BorrowedFd<'_>> {
        self.output.as_ref().map(|stream| stream.fd.as_fd())
    }

    fn output_closed(&self) -> bool {
        self.output.is_none()
    }

    fn read(&mut self, buffer: &mut [u8]) -> Received {
        let Some(input) = &self.input else {
            return Received::Nothing;
        };
        match input.read(buffer) {
            Ok(count @ 1..) => return Received::Bytes(count),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A terminal that this process is in the background of.
            Err(Errno::IO) => return Received::Later,
            Ok(0) | Err(_) => self.input = None,
        }
        Received::Nothing
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        let Some(output) = &self.output else { return 0 };
        match output.write(bytes) {
            Ok(count) => return count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => {
                tracing::debug!(%error, "standard output takes no more");
                self.output = None;
            }
        }
        0
    }
}

/// How a stream is used without blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// It is non-blocking itself, or a file, which is always ready.
    Plain,
    /// Each call says that it must not block.
    Socket,
    /// It could not be opened a second time: after `poll`, one byte does not block.
    ByteWise,
}

struct Stream {
    fd: OwnedFd,
    access: Access,
}

impl Stream {
    fn new(fd: BorrowedFd<'_>, mode: OFlags) -> Result<Self, Errno> {
        let duplicate = || rustix::io::fcntl_dupfd_cloexec(fd, 3);
        let stat = fstat(fd)?;
        let (fd, access) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket => (duplicate()?, Access::Socket),
            kind if kind == FileType::Fifo || isatty(fd) => {
                let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
                match open(
                    path,
                    mode | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC,
                    Mode::empty(),
                ) {
                    Ok(second) => (second, Access::Plain),
                    Err(_) => (duplicate()?, Access::ByteWise),
                }
            }
            _ => (duplicate()?, Access::Plain),
        };
        Ok(Stream { fd, access })
    }

    fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match self.access {
            Access::Socket => recv(&self.fd, buffer, RecvFlags::DONTWAIT).map(|(count, _)| count),
            Access::Plain | Access::ByteWise => rustix::io::read(&self.fd, buffer),
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self.access {
            Access::Socket => send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Access::Plain => rustix::io::write(&self.fd, bytes),
            Access::ByteWise => rustix::io::write(&self.fd, &bytes[..bytes.len().min(1)]),
        }
    }
}

/// The right to use standard input and output.
struct Taken;

impl Taken {
    fn new() -> Result<Self, EndpointError> {
        if TAKEN.swap(true, Ordering::SeqCst) {
            Err(EndpointError::StdioBusy)
        } else {
            Ok(Taken)
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::SeqCst);
    }
}

/// A terminal in raw mode, until it is dropped.
struct Terminal;

impl Terminal {
    /// Does nothing to what is no terminal, or one of which this process is in the background (changing it would stop the
    /// process).
    fn raw(fd: BorrowedFd<'_>) -> io::Result<Self> {
        // A terminal that is not the session's own knows no background.
        let foreground = isatty(fd) && tcgetpgrp(fd).map_or(true, |group| group == getpgrp());
        if foreground {
            restore_at_exit();
            let saved = tcgetattr(fd)?;
            let mut raw = saved.clone();
            raw.make_raw();
            *TERMINAL_MODE
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(saved);
            if let Err(error) = tcsetattr(fd, OptionalActions::Now, &raw) {
                restore_terminal();
                return Err(error.into());
            }
        }
        Ok(Terminal)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Gives the terminal its mode back, once.
fn restore_terminal() {
    let mut mode = match TERMINAL_MODE.try_lock() {
        Ok(mode) => mode,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        // Another thread is at it.
        Err(TryLockError::WouldBlock) => return,
    };
    if let Some(mode) = mode.take() {
        // A terminal that has gone needs no mode.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &mode);
    }
}

/// Makes `exit` and panics give the terminal its mode back. A signal that kills the process cannot be helped.
fn restore_at_exit() {
    extern "C" fn at_exit() {
        restore_terminal();
    }

    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the function is one of this program, never unloaded, and does nothing that is forbidden at exit: it takes
        // a lock without waiting and makes a system call.
        unsafe {
            libc::atexit(at_exit);
        }
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore_terminal();
            previous(panic);
        }));
    });
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn stdio(input: &OwnedFd, output: &OwnedFd) -> Stdio {
        Stdio {
            input: Some(Stream::new(input.as_fd(), OFlags::RDONLY).expect("open")),
            output: Some(Stream::new(output.as_fd(), OFlags::WRONLY).expect("open")),
            _terminal: Terminal,
            _taken: Taken,
        }
    }

    #[test]
    fn the_end_of_input_is_not_watched_any_more() {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let (_reader, out) = io::pipe().expect("a pipe");
        let mut stdio = stdio(&reader.into(), &out.into());
        let mut buffer = [0; 8];
        assert_eq!(stdio.read(&mut buffer), Received::Nothing);
        assert!(stdio.input().is_some());
        writer.write_all(b"ab").expect("room");
        assert_eq!(stdio.read(&mut buffer), Received::Bytes(2));
        drop(writer);
        assert_eq!(stdio.read(&mut buffer), Received::Nothing);
        assert!(stdio.input().is_none());
    }

    #[test]
    fn a_full_pipe_takes_nothing_and_a_broken_one_closes_the_output() {
        let (reader, writer) = io::pipe().expect("a pipe");
        let (input, _writer) = io::pipe().expect("a pipe");
        let mut stdio = stdio(&input.into(), &writer.into());
        let total: usize = std::iter::repeat_with(|| stdio.write(&[0; 4096]))
            .take_while(|count| *count != 0)
            .sum();
        assert!(total >= 4096);
        assert!(!stdio.output_closed());
        drop(reader);
        assert_eq!(stdio.write(b"x"), 0);
        assert!(stdio.output_closed());
    }

    #[test]
    fn sockets_do_not_block_either() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let ours: OwnedFd = ours.into();
        let mut stdio = stdio(&ours, &ours);
        assert_eq!(stdio.read(&mut [0; 8]), Received::Nothing);
        while stdio.write(&[0; 4096]) != 0 {}
        assert!(!stdio.output_closed());
        drop(theirs);
        stdio.write(b"x");
        assert!(stdio.output_closed());
    }
}
