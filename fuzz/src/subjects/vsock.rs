//! Streams to clients and servers that are the input's.

use std::cell::OnceCell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use devices::Vsock;
use tempfile::TempDir;

use super::Subject;
use crate::machine::{Driver, Host};

const CID: u64 = 7;
/// The port of the host at which somebody listens.
const PORT: u32 = 52;
/// Most streams that the host keeps.
const MOST: usize = 8;

thread_local! {
    static FOLDER: OnceCell<TempDir> = const { OnceCell::new() };
}

struct Peers {
    path: PathBuf,
    server: UnixListener,
    streams: Vec<UnixStream>,
}

impl Peers {
    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).expect("a socket");
        self.streams.push(stream);
        if self.streams.len() > MOST {
            self.streams.remove(0);
        }
    }
}

impl Host for Peers {
    fn event(&mut self, kind: u8, data: &[u8]) {
        let number = usize::from(kind >> 3);
        let count = self.streams.len();
        match kind & 7 {
            0 | 1 => {
                if let Ok(stream) = UnixStream::connect(&self.path) {
                    let _ = (&stream).write(data);
                    self.keep(stream);
                }
            }
            2 => {
                if let Ok((stream, _)) = self.server.accept() {
                    let _ = (&stream).write(data);
                    self.keep(stream);
                }
            }
            _ if count == 0 => {}
            3 => drop((&self.streams[number % count]).write(data)),
            4 => drop((&self.streams[number % count]).read(&mut [0; 4096])),
            5 => drop(self.streams.remove(number % count)),
            6 => drop(self.streams[number % count].shutdown(std::net::Shutdown::Write)),
            // More than there is room for.
            _ => drop((&self.streams[number % count]).write(&data.repeat(300))),
        }
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        assert_eq!(u64::from_le_bytes(driver.read(0x2000)), CID);
        while self.server.accept().is_ok() {}
        // A request to somebody who listens, from a port that is not used.
        let header = |op: u16, len: u32| {
            let mut bytes = CID.to_le_bytes().to_vec();
            bytes.extend(2_u64.to_le_bytes());
            bytes.extend(9_999_u32.to_le_bytes());
            bytes.extend(PORT.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend(1_u16.to_le_bytes());
            bytes.extend(op.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(65_536_u32.to_le_bytes());
            bytes.extend([0; 4]);
            bytes
        };
        driver.request(1, &[&header(1, 0)], &[]);
        // Others are greeted meanwhile.
        for _ in 0..1000 {
            let (packet, len) = driver.request(0, &[], &[4096]);
            assert!(len >= 44);
            if packet[20..24] == 9_999_u32.to_le_bytes() {
                assert_eq!(packet[30], 2, "the answer is a response");
                break;
            }
        }
        driver.request(1, &[&header(5, 5), b"hello"], &[]);
        let (mut stream, _) = self.server.accept().expect("the guest's connection");
        let mut bytes = [0; 5];
        stream
            .read_exact(&mut bytes)
            .expect("what the guest has sent");
        assert_eq!(&bytes, b"hello");
    }
}

/// The device.
pub fn vsock() -> Subject {
    let path = FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| tempfile::tempdir().expect("a folder"));
        folder.path().join("vsock")
    });
    let device = Vsock::new(CID, path.clone()).expect("a socket");
    let mut named = path.clone().into_os_string();
    named.push(format!("_{PORT}"));
    // What the last input has left.
    let _ = std::fs::remove_file(&named);
    let server = UnixListener::bind(&named).expect("a socket");
    server.set_nonblocking(true).expect("a socket");
    let peers = Peers {
        path,
        server,
        streams: Vec::new(),
    };
    (Arc::new(device), Box::new(peers))
}
