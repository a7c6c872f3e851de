//! A vhost-user back end for tests, on the `vhost` crate's side of the protocol, so that the product's own is checked by somebody else's.
//!
//! ```text
//!   vhost-back-end disk SOCKET IMAGE QUEUES   a disk that takes all that is offered and answers it from the last to the first
//!   vhost-back-end net SOCKET                 a network on which every address answers ARP and pings
//!
//!   accept ─► poll { connection ─► Handler, kicks ─► take all, note each } ─► a few requests are done ─► poll …
//!                └─ the front end has gone ─► accept
//! ```
//!
//! It notes what it has begun (INFLIGHT_SHMFD), so that it may be killed at any moment, and logs what it writes (LOG_SHMFD).

mod disk;
mod handler;
mod memory;
mod net;
mod ring;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::BackendReqHandler;

use handler::Handler;

/// Requests of a ring that are done between two looks at the connection.
const AT_ONCE: usize = 3;
/// How long it rests after those, in nanoseconds: whoever kills it finds it with requests under way.
const REST_NS: i64 = 200_000;

/// What is served.
pub(crate) enum Device {
    /// A disk.
    Disk(disk::Disk),
    /// A network.
    Net(net::Net),
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (socket, device, queues) = match arguments.as_slice() {
        ["disk", socket, image, queues] => {
            let disk = disk::Disk::open(image)?;
            (*socket, Device::Disk(disk), queues.parse()?)
        }
        ["net", socket] => (*socket, Device::Net(net::Net::default()), 2),
        _ => bail!("usage: vhost-back-end disk SOCKET IMAGE QUEUES | net SOCKET"),
    };
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| socket.to_owned())?;
    let device = Arc::new(Mutex::new(device));
    loop {
        let (stream, _) = listener.accept()?;
        let connection = stream.try_clone()?;
        let handler = Arc::new(Mutex::new(Handler::new(Arc::clone(&device), queues)));
        let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&handler));
        let gone = loop {
            let ready = wait(connection.as_raw_fd(), &locked(&handler))?;
            if ready && let Err(error) = requests.handle_request() {
                break error;
            }
            locked(&handler).work(AT_ONCE)?;
        };
        eprintln!("vhost-back-end: the front end has gone: {gone}");
    }
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for something to do; whether it is a request of the front end.
fn wait(connection: i32, handler: &Handler) -> Result<bool> {
    let all = [connection].into_iter().chain(handler.kicks());
    let mut fds: Vec<PollFd<'_>> = all
        .map(|fd| {
            // SAFETY: the connection and the kicks are open until the caller lets go of them, after this call.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            PollFd::from_borrowed_fd(fd, PollFlags::IN)
        })
        .collect();
    let rest = Timespec {
        tv_sec: 0,
        tv_nsec: REST_NS,
    };
    // New requests do not end the rest.
    let watched = if handler.is_busy() { 1 } else { fds.len() };
    let timeout = handler.is_busy().then_some(&rest);
    match poll(&mut fds[..watched], timeout) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(fds.first().is_some_and(|fd| !fd.revents().is_empty()))
}
