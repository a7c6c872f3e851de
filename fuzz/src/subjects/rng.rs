//! Randomness that the input brings along.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use devices::Rng;

use super::Subject;
use crate::machine::{Driver, Host};

struct Source {
    pipe: File,
    /// The reader's end stays open, too.
    _end: File,
}

impl Host for Source {
    fn event(&mut self, _kind: u8, data: &[u8]) {
        // It may be full.
        let _ = self.pipe.write(data);
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        let request = driver.offer(0, &[], &[20, 30]);
        devices::fuzzing::step(false);
        self.event(0, b"not very random at all");
        let (_, len) = driver.wait(0, &request);
        assert!((1..=50).contains(&len));
    }
}

/// The device.
pub fn rng() -> Subject {
    let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
    let (end, pipe) = rustix::pipe::pipe_with(flags).expect("a pipe");
    let path = PathBuf::from(format!("/proc/self/fd/{}", end.as_raw_fd()));
    let device = Rng::new(Some(path)).expect("a pipe");
    let source = Source {
        pipe: pipe.into(),
        _end: end.into(),
    };
    (Arc::new(device), Box::new(source))
}
