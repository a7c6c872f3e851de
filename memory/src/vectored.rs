//! Vectored socket I/O straight from and to guest memory.
//!
//! The kernel copies between the socket and the guest's pages; this process does not. The calls never block by
//! themselves: when the socket is not ready they call `wait`, which decides how long to wait, and whether to go on.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::GuestPages;

/// Most vectors in one call (UIO_MAXIOV of linux/uio.h).
const MAX_VECTORS: usize = 1024;

/// Something to send.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Bytes of this process.
    Bytes(&'a [u8]),
    /// Pages of the guest.
    Guest(GuestPages<'a>),
}

/// Sends all of `pieces`, in order, over a stream socket.
///
/// `wait` is called whenever the socket takes nothing more; it returns when trying again makes sense, or an error that
/// ends the transfer. How much has been sent by then is not told, so the stream is of no use afterwards.
pub fn send_vectored(
    socket: BorrowedFd<'_>,
    pieces: &[Piece<'_>],
    wait: &mut dyn FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut vectors: Vec<libc::iovec> = pieces
        .iter()
        .map(|piece| match piece {
            Piece::Bytes(bytes) => libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            },
            Piece::Guest(pages) => guest_vector(pages),
        })
        .collect();
    transfer(&mut vectors, wait, |message| {
        // SAFETY: the vectors point to `pieces`, which are borrowed for the whole call, and are only read. MSG_NOSIGNAL:
        // a vanished peer is an error here, not a signal.
        unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                message,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        }
    })
}

/// Fills all of `pages`, in order, from a stream socket. An end of the stream before that is
/// [`io::ErrorKind::UnexpectedEof`].
///
/// `wait` is called whenever nothing has arrived; it returns when trying again makes sense, or an error that ends the
/// transfer.
pub fn recv_vectored(
    socket: BorrowedFd<'_>,
    pages: &[GuestPages<'_>],
    wait: &mut dyn FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut vectors: Vec<libc::iovec> = pages.iter().map(guest_vector).collect();
    transfer(&mut vectors, wait, |message| {
        // SAFETY: the vectors point to guest pages that are mapped for the whole call; nobody holds a reference into
        // them.
        unsafe { libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT) }
    })
}

fn guest_vector(pages: &GuestPages<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: pages.as_ptr().cast(),
        iov_len: pages.len(),
    }
}

/// Calls `call` until all vectors are used up.
fn transfer(
    vectors: &mut [libc::iovec],
    wait: &mut dyn FnMut() -> io::Result<()>,
    mut call: impl FnMut(&mut libc::msghdr) -> isize,
) -> io::Result<()> {
    let mut rest = skip(vectors, 0);
    while !rest.is_empty() {
        // SAFETY: all zeros is a valid `msghdr`: no name, no vectors, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = rest.as_mut_ptr();
        message.msg_iovlen = rest.len().min(MAX_VECTORS);
        match call(&mut message) {
            0 => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the peer closed the connection",
                ));
            }
            done if done > 0 => rest = skip(rest, done as usize),
            _ => {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => wait()?,
                    _ => return Err(error),
                }
            }
        }
    }
    Ok(())
}

/// What is left of the vectors after `done` bytes; never begins with an empty vector.
fn skip(mut vectors: &mut [libc::iovec], mut done: usize) -> &mut [libc::iovec] {
    while let Some(first) = vectors.first_mut() {
        if done < first.iov_len {
            // SAFETY: the new start lies inside the vector.
            first.iov_base = unsafe { first.iov_base.cast::<u8>().add(done) }.cast();
            first.iov_len -= done;
            break;
        }
        done -= first.iov_len;
        vectors = &mut vectors[1..];
    }
    vectors
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::{Backing, GuestRam, PAGE_SIZE, RamRange};

    fn ram(pages: u64) -> GuestRam {
        let range = RamRange {
            gpa: 0,
            len: pages * PAGE_SIZE,
        };
        GuestRam::new(&[range], Backing::Anonymous { thp: false }).expect("a little memory")
    }

    fn poll(socket: &UnixStream, events: rustix::event::PollFlags) -> io::Result<()> {
        rustix::event::poll(&mut [rustix::event::PollFd::new(socket, events)], None)?;
        Ok(())
    }

    #[test]
    fn more_vectors_than_one_call_takes_arrive_in_order() {
        let (from, to) = (ram(3000), ram(3000));
        let mut page = vec![0u8; PAGE_SIZE as usize];
        for i in 0..3000u64 {
            page[..8].copy_from_slice(&(i + 1).to_ne_bytes());
            from.pages(0, i, 1).expect("in range").write_from(&page);
        }
        let (a, b) = UnixStream::pair().expect("socket pair");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Every page is a vector of its own, with a few bytes and an empty piece in front.
                let mut pieces = vec![Piece::Bytes(b"head"), Piece::Bytes(b"")];
                pieces.extend(
                    (0..3000).map(|i| Piece::Guest(from.pages(0, i, 1).expect("in range"))),
                );
                send_vectored(a.as_fd(), &pieces, &mut || {
                    poll(&a, rustix::event::PollFlags::OUT)
                })
                .expect("sent");
            });
            let mut head = [0; 4];
            Read::read_exact(&mut &b, &mut head).expect("head");
            assert_eq!(&head, b"head");
            let pages: Vec<_> = (0..3000)
                .map(|i| to.pages(0, i, 1).expect("in range"))
                .collect();
            recv_vectored(b.as_fd(), &pages, &mut || {
                poll(&b, rustix::event::PollFlags::IN)
            })
            .expect("received");
        });
        let (mut x, mut y) = (vec![0; 3000 * 4096], vec![0; 3000 * 4096]);
        from.pages(0, 0, 3000).expect("in range").read_into(&mut x);
        to.pages(0, 0, 3000).expect("in range").read_into(&mut y);
        assert!(x == y);
    }

    #[test]
    fn a_closed_peer_and_a_failing_wait_are_errors() {
        let memory = ram(1);
        let pages = [memory.pages(0, 0, 1).expect("in range")];
        let (a, b) = UnixStream::pair().expect("socket pair");
        let stop = recv_vectored(b.as_fd(), &pages, &mut || Err(io::Error::other("enough")));
        assert_eq!(stop.expect_err("wait failed").to_string(), "enough");
        drop(a);
        let eof = recv_vectored(b.as_fd(), &pages, &mut || Ok(())).expect_err("closed");
        assert_eq!(eof.kind(), io::ErrorKind::UnexpectedEof);
        let pipe = send_vectored(b.as_fd(), &[Piece::Guest(pages[0])], &mut || Ok(()));
        assert_eq!(pipe.expect_err("closed").kind(), io::ErrorKind::BrokenPipe);
    }
}
