//! The thread of a device: passes interrupts on, hears the back end's own requests, and looks for a back end that has gone.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::BackendReq;

use super::error::VhostError;
use super::link::Shared;
use super::session::{Session, Watch, event_fd};

/// First and longest time between two looks for a back end that has gone.
const INTERVALS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// Request, flags and length.
const HEADER: usize = 12;
/// Of the flags: version 1; an answer; an answer is wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// Longest request of a back end that is read.
const MAX_BODY: usize = 4096;

pub(super) fn start(shared: &Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
    let name: String = format!("{}-vhost", shared.id).chars().take(15).collect();
    let shared = Arc::clone(shared);
    std::thread::Builder::new()
        .name(name)
        .spawn(move || Keeper::new(shared).run())
}

struct Keeper {
    shared: Arc<Shared>,
    interval: Duration,
    next_look: Instant,
    /// What the last look failed with, so that it is said once.
    said: String,
}

/// What became readable.
struct Ready {
    calls: Vec<u16>,
    requests: bool,
    ended: bool,
}

impl Keeper {
    fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            interval: INTERVALS.0,
            next_look: Instant::now(),
            said: String::new(),
        }
    }

    fn run(mut self) {
        let mut here = true;
        while !self.shared.stops() {
            let watch = self.shared.watch();
            if here && watch.is_none() {
                self.interval = INTERVALS.0;
                self.next_look = Instant::now() + self.interval;
            }
            here = watch.is_some();
            let ready = match self.wait(watch.as_deref()) {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(id = self.shared.id, %error, "a device's thread cannot wait");
                    self.shared.needs_reset();
                    return;
                }
            };
            for ring in ready.calls {
                if let Some(interrupt) = self.shared.interrupt.get() {
                    interrupt.used(ring);
                }
            }
            match watch {
                Some(watch) if ready.ended => self.lose(&watch, &VhostError::Gone),
                Some(watch) if ready.requests => self.hear(&watch),
                Some(_) => {}
                None if Instant::now() >= self.next_look => self.look(),
                None => {}
            }
        }
    }

    fn wait(&self, watch: Option<&Watch>) -> rustix::io::Result<Ready> {
        let shared = &self.shared;
        let mut fds = vec![PollFd::from_borrowed_fd(
            event_fd(&shared.wake),
            PollFlags::IN,
        )];
        let calls = shared.calls.iter();
        fds.extend(calls.map(|call| PollFd::from_borrowed_fd(event_fd(call), PollFlags::IN)));
        if let Some(watch) = watch {
            // Answers are for whoever asks.
            fds.push(PollFd::from_borrowed_fd(
                watch.socket.as_fd(),
                PollFlags::RDHUP,
            ));
            if let Some(requests) = &watch.requests {
                fds.push(PollFd::from_borrowed_fd(requests.as_fd(), PollFlags::IN));
            }
        }
        let timeout = watch.is_none().then(|| {
            let left = self.next_look.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut calls = Vec::new();
        for (call, ring) in shared.calls.iter().zip(0u16..) {
            if ready[1 + usize::from(ring)] {
                // The count says nothing.
                let _ = call.read();
                calls.push(ring);
            }
        }
        if ready[0] {
            let _ = shared.wake.read();
        }
        let of_watch = |number: usize| ready.get(1 + shared.calls.len() + number).copied();
        Ok(Ready {
            calls,
            ended: of_watch(0).unwrap_or(false),
            requests: of_watch(1).unwrap_or(false),
        })
    }

    fn lose(&self, watch: &Arc<Watch>, error: &VhostError) {
        let mut state = self.shared.state();
        // Another may have come meanwhile.
        if state
            .session
            .as_ref()
            .is_some_and(|session| Arc::ptr_eq(&session.watch, watch))
        {
            self.shared.lose(&mut state, error);
        }
    }

    /// Looks for the back end.
    fn look(&mut self) {
        let shared = &self.shared;
        let found = Session::open(&shared.socket, shared.patience).and_then(|mut session| {
            let space = shared.kind.introduce(&mut session, shared.queues)?;
            shared.check_offer(&session, &space)?;
            shared.install(session, space)
        });
        match found {
            Ok(()) => self.said.clear(),
            Err(error) => {
                let text = error.to_string();
                if self.said != text {
                    tracing::info!(id = shared.id, "{text}");
                    self.said = text;
                }
                self.interval = (self.interval * 2).min(INTERVALS.1);
                self.next_look = Instant::now() + self.interval;
            }
        }
    }

    /// Serves one request of the back end. It may wait for the answer while somebody here waits for it: nothing is locked until it has it.
    fn hear(&self, watch: &Arc<Watch>) {
        match request(watch) {
            Ok(Some(BackendReq::CONFIG_CHANGE_MSG)) => {
                let Some(len) = self.shared.kind.space_from_back_end() else {
                    return;
                };
                let mut state = self.shared.state();
                let space = self
                    .shared
                    .exchange(&mut state, |_, session| session.config(len));
                drop(state);
                if let Some(space) = space {
                    self.shared.take_space(space);
                }
            }
            Ok(_) => {}
            Err(error) => self.lose(watch, &error),
        }
    }
}

/// Reads a request and answers it; only a changed configuration is one that is known here.
fn request(watch: &Watch) -> Result<Option<BackendReq>, VhostError> {
    let Some(mut socket) = watch.requests.as_ref() else {
        return Ok(None);
    };
    // Small messages come whole; one that does not is no message.
    let mut header = [0; HEADER];
    if let Err(error) = socket.read_exact(&mut header) {
        return match error.kind() {
            std::io::ErrorKind::WouldBlock => Ok(None),
            std::io::ErrorKind::UnexpectedEof => Err(VhostError::Gone),
            _ => Err(error.into()),
        };
    }
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&header[at..at + 4]);
        u32::from_ne_bytes(bytes)
    };
    let (code, flags, len) = (word(0), word(4), word(8) as usize);
    if len > MAX_BODY {
        let problem = format!("the vhost-user back end sends a request of {len} bytes");
        return Err(VhostError::Config(problem));
    }
    socket.read_exact(&mut vec![0; len])?;
    let known = code == BackendReq::CONFIG_CHANGE_MSG as u32;
    if flags & NEED_REPLY != 0 {
        let answer = if known { 0 } else { u64::MAX };
        let mut reply = Vec::with_capacity(HEADER + 8);
        for word in [code, VERSION | REPLY, 8] {
            reply.extend(word.to_ne_bytes());
        }
        reply.extend(answer.to_ne_bytes());
        socket.write_all(&reply)?;
    }
    Ok(known.then_some(BackendReq::CONFIG_CHANGE_MSG))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A watch, and the back end's end of its requests.
    fn pair() -> (Watch, UnixStream) {
        let (socket, _) = UnixStream::pair().expect("sockets");
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        ours.set_nonblocking(true).expect("a socket");
        let watch = Watch {
            socket,
            requests: Some(ours),
        };
        (watch, theirs)
    }

    fn message(words: [u32; 3], body: &[u8]) -> Vec<u8> {
        let words = words.iter().flat_map(|word| word.to_ne_bytes());
        words.chain(body.iter().copied()).collect()
    }

    #[test]
    fn a_back_end_may_say_that_its_configuration_has_changed_and_nothing_else() {
        let change = BackendReq::CONFIG_CHANGE_MSG as u32;
        let (watch, mut back_end) = pair();
        assert!(matches!(request(&watch), Ok(None)));
        let mut send = |words, body: &[u8]| {
            back_end.write_all(&message(words, body)).expect("room");
            let heard = request(&watch).expect("a message");
            let mut answer = [0; HEADER + 8];
            if words[1] & NEED_REPLY != 0 {
                back_end.read_exact(&mut answer).expect("an answer");
            }
            (heard.is_some(), answer)
        };
        assert!(send([change, VERSION, 0], &[]).0);
        let (heard, answer) = send([change, VERSION | NEED_REPLY, 0], &[]);
        assert!(heard);
        let yes = message([change, VERSION | REPLY, 8], &[0; 8]);
        assert_eq!(answer.as_slice(), yes);
        // Shared memory is not ours to map.
        let (heard, answer) = send([9, VERSION | NEED_REPLY, 4], &[1; 4]);
        assert!(!heard);
        let no = message([9, VERSION | REPLY, 8], &[0xff; 8]);
        assert_eq!(answer.as_slice(), no);
    }

    #[test]
    fn one_that_makes_no_sense_is_given_up() {
        let (watch, mut back_end) = pair();
        back_end
            .write_all(&message([2, VERSION, u32::MAX], &[]))
            .expect("room");
        assert!(request(&watch).is_err());
        let (watch, mut back_end) = pair();
        back_end
            .write_all(&message([2, VERSION, 8], &[0; 3]))
            .expect("room");
        assert!(request(&watch).is_err());
        let (watch, back_end) = pair();
        drop(back_end);
        assert!(matches!(request(&watch), Err(VhostError::Gone)));
    }
}
