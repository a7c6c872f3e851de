//! virtio-rng: randomness for the guest (Virtual I/O Device specification 1.3, section 5.4).
//!
//! ```text
//!   driver ── empty buffers ─► requestq ─► Handler ◄── getrandom, or a file or device that was opened at the start
//!          ◄─ filled ────────────────────────┘  │ nothing there now: put the request back, wait for the source
//! ```
//!
//! Promises:
//!
//! - A request takes at most [`MAX_REQUEST_BYTES`] and gets at least one byte; the used length says how many. A buffer of no bytes comes
//!   back as it is.
//! - A source that is empty for now is waited for on the queue's thread, with the request still in the ring: stopping does not wait.
//! - A source that ends or fails is left for good, with a warning: `getrandom` serves from then on. Nothing is ever given twice, neither by
//!   reading a file again nor by carrying bytes along in a saved state; there is none.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::virtio::{
    Chain, DeviceType, QueueError, QueueHandler, VirtioDevice, Virtqueue, Worker, read_space,
};

/// Most bytes that one request gets.
pub const MAX_REQUEST_BYTES: u64 = 64 << 10;
/// Bytes that are read at a time.
const CHUNK: usize = 4096;
/// Descriptors of the queue.
const QUEUE_SIZE: u16 = 64;

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// The source cannot be opened.
    #[error("cannot open the source of randomness {}: {source}", .path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The source is no file to read from.
    #[error("the source of randomness {} is a directory; name a file or a device such as /dev/urandom", .path.display())]
    Directory {
        /// Its path.
        path: PathBuf,
    },
}

/// Where the randomness comes from.
struct Source {
    file: Option<File>,
    /// The file has ended or failed.
    over: AtomicBool,
}

impl Source {
    fn open(path: Option<PathBuf>) -> Result<Self, RngError> {
        let file = match path {
            None => None,
            Some(path) => {
                let opened = File::options()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(&path)
                    .and_then(|file| Ok((file.metadata()?.is_dir(), file)));
                match opened {
                    Ok((false, file)) => Some(file),
                    Ok((true, _)) => return Err(RngError::Directory { path }),
                    Err(source) => return Err(RngError::Open { path, source }),
                }
            }
        };
        Ok(Self {
            file,
            over: AtomicBool::new(false),
        })
    }

    /// The file that is in use.
    fn file(&self) -> Option<&File> {
        let file = self.file.as_ref()?;
        (!self.over.load(Ordering::Relaxed)).then_some(file)
    }

    /// Reads some bytes, at least one; none if there is nothing now.
    fn read(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        while let Some(mut file) = self.file() {
            let failed = match file.read(into) {
                Ok(count @ 1..) => return Ok(Some(count)),
                Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                Err(error) => error,
            };
            match failed.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                io::ErrorKind::Interrupted => {}
                _ => {
                    tracing::warn!(error = %failed, "the source of randomness has ended; the system's own serves from now on");
                    self.over.store(true, Ordering::Relaxed);
                }
            }
        }
        getrandom::fill(into).map_err(io::Error::other)?;
        Ok(Some(into.len()))
    }
}

/// The device.
pub struct Rng {
    source: Arc<Source>,
    worker: Mutex<Option<Worker<Handler>>>,
}

impl Rng {
    /// A device that is fed from the system's `getrandom`, or from a file or character device, which is opened now.
    pub fn new(source: Option<PathBuf>) -> Result<Self, RngError> {
        Ok(Self {
            source: Arc::new(Source::open(source)?),
            worker: Mutex::new(None),
        })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType {
            name: "virtio-rng",
            id: 4,
            pci_class: [0x00, 0xff, 0x00],
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&[], offset, data);
    }

    fn start_queue(&self, queue: Virtqueue) -> io::Result<()> {
        let handler = Handler {
            source: Arc::clone(&self.source),
            waiting: false,
        };
        let worker = Worker::start("rng", handler, queue)?;
        *self.worker.lock().unwrap_or_else(PoisonError::into_inner) = Some(worker);
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<Virtqueue> {
        if index != 0 {
            return None;
        }
        let worker = self
            .worker
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        Some(worker.stop()?.1)
    }
}

/// Serves the one queue.
struct Handler {
    source: Arc<Source>,
    /// The first request in the ring waits for the source.
    waiting: bool,
}

impl Handler {
    /// How many bytes a request has got; none if it has to wait.
    fn fill(&self, queue: &mut Virtqueue, chain: &Chain) -> Result<Option<u32>, QueueError> {
        let wanted = chain.writable.len().min(MAX_REQUEST_BYTES);
        let mut chunk = [0; CHUNK];
        let mut done = 0;
        while done < wanted {
            let len = (wanted - done).min(CHUNK as u64) as usize;
            let Some(count) = self.source.read(&mut chunk[..len])? else {
                break;
            };
            queue.write(&chain.writable, done, &chunk[..count])?;
            done += count as u64;
        }
        Ok((done > 0 || wanted == 0).then_some(done as u32))
    }
}

impl QueueHandler for Handler {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        self.waiting = false;
        // A driver that never stops asking must not keep the worker from stopping.
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                queue.signal()?;
                if queue.enable_notification()? {
                    continue;
                }
                return Ok(());
            };
            match self.fill(queue, &chain)? {
                Some(written) => queue.complete(chain.head, written)?,
                None => {
                    queue.unpop();
                    self.waiting = true;
                    return queue.signal();
                }
            }
        }
        queue.signal()?;
        queue.kick().write(1)?;
        Ok(())
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        let file = self.source.file().filter(|_| self.waiting);
        file.map(|file| file.as_fd()).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;
    use crate::virtio::testing::Driver;

    fn start(source: Option<PathBuf>) -> (Rng, Driver) {
        let device = Rng::new(source).expect("a source");
        let driver = Driver::new(0);
        device.start_queue(driver.queue()).expect("a thread");
        (device, driver)
    }

    #[test]
    fn all_writable_buffers_are_filled_up_to_the_limit() {
        let (device, mut driver) = start(None);
        let head = driver.offer(&[], &[40, 5000, 3]);
        assert_eq!(driver.wait_used(), (head, 5043));
        let bytes = driver.written(head);
        for part in [0..40, 40..5040] {
            assert!(bytes[part].iter().any(|byte| *byte != 0));
        }
        let head = driver.offer(&[], &[100 << 10]);
        assert_eq!(driver.wait_used(), (head, 64 << 10));
        assert!(
            driver.written(head)[64 << 10..]
                .iter()
                .all(|byte| *byte == 0)
        );
        assert!(device.stop_queue(0).is_some());
        assert!(device.stop_queue(0).is_none());
        assert!(device.stop_queue(1).is_none());
        assert_eq!(driver.interrupt.reset.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_is_written_is_marked_dirty() {
        let (device, mut driver) = start(None);
        let mut before = memory::PageBitmap::new(driver.ram.regions()[0].pages());
        driver.ram.take_device_dirty(0, &mut before);
        let at = driver.buffer(100);
        driver.offer_parts(&[(at, 100, true)]);
        driver.wait_used();
        device.stop_queue(0);
        let mut dirty = memory::PageBitmap::new(before.pages());
        driver.ram.take_device_dirty(0, &mut dirty);
        assert!(dirty.get(at / memory::PAGE_SIZE));
    }

    #[test]
    fn requests_without_room_come_back_and_nonsense_needs_a_reset() {
        let (device, mut driver) = start(None);
        let head = driver.offer(&[b"why?"], &[]);
        assert_eq!(driver.wait_used(), (head, 0));
        let head = driver.offer(&[b"why?"], &[16]);
        assert_eq!(driver.wait_used(), (head, 16));
        driver.offer_parts(&[(1 << 40, 16, true)]);
        while driver.interrupt.reset.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        assert!(device.stop_queue(0).is_some());
    }

    #[test]
    fn more_requests_than_the_queue_has_descriptors_are_served() {
        let (device, mut driver) = start(None);
        for _ in 0..5 {
            let heads: Vec<_> = (0..Driver::SIZE).map(|_| driver.offer(&[], &[8])).collect();
            for head in heads {
                assert_eq!(driver.wait_used(), (head, 8));
            }
        }
        device.stop_queue(0);
    }

    #[test]
    fn a_file_is_read_once_and_then_the_system_serves() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("seed");
        std::fs::write(&path, [7; 100]).expect("a file");
        let (_device, mut driver) = start(Some(path));
        let head = driver.offer(&[], &[60]);
        assert_eq!(driver.wait_used(), (head, 60));
        assert_eq!(driver.written(head), [7; 60]);
        let head = driver.offer(&[], &[200]);
        assert_eq!(driver.wait_used(), (head, 200));
        let bytes = driver.written(head);
        assert_eq!(bytes[..40], [7; 40]);
        assert!(bytes[40..].iter().any(|byte| *byte != 7));
    }

    #[test]
    fn an_empty_source_is_waited_for_and_keeps_nobody_from_stopping() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
        // Both ends, so that opening does not wait and the reader sees no end.
        let mut pipe = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .expect("a FIFO");
        let (device, mut driver) = start(Some(path));
        let head = driver.offer(&[], &[10]);
        let queue = device.stop_queue(0).expect("it ran");
        assert_eq!(driver.used(), None);
        device.start_queue(queue).expect("a thread");
        pipe.write_all(b"abc").expect("room");
        assert_eq!(driver.wait_used(), (head, 3));
        assert_eq!(driver.written(head)[..3], *b"abc");
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(matches!(
            Rng::new(Some(dir.path().to_owned())),
            Err(RngError::Directory { .. })
        ));
        assert!(matches!(
            Rng::new(Some(dir.path().join("none"))),
            Err(RngError::Open { .. })
        ));
    }
}
