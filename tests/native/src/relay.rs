//! A relay between a source and a destination that stops a move at a chosen point.
//!
//! ```text
//!   source ──► Relay ──► destination
//!                │ reads hellos and frame headers of the control channel, counts bytes of data channels
//!                └ at the point: holds everything ─► test: cut() | release() | kill a process
//! ```

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migration::Phase;

/// Where a relay stops a move: just before this goes on to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The source's first connection.
    Connection,
    /// The source's hello.
    Hello,
    /// This many bytes on a data channel.
    Data(usize),
    /// A control message of this kind (its number on the wire).
    Message(u16),
}

/// Numbers of control messages on the wire. Written down here once more, so that a change of the protocol is noticed.
pub mod kind {
    #![expect(missing_docs, reason = "the names are those of the protocol")]
    pub const MANIFEST: u16 = 1;
    pub const STATE: u16 = 5;
    pub const READY: u16 = 6;
    pub const COMMIT: u16 = 7;
    pub const RESUMED: u16 = 8;
}

impl Point {
    /// A point at which a move is in this phase. Pausing sends nothing of its own: the first thing that is seen of a paused
    /// guest is its state.
    pub fn in_phase(phase: Phase) -> Self {
        match phase {
            Phase::Connect => Self::Connection,
            Phase::Negotiate => Self::Hello,
            Phase::Reserve => Self::Message(kind::MANIFEST),
            Phase::Precopy => Self::Data(1 << 20),
            Phase::Pause => Self::Message(kind::STATE),
            Phase::Handover => Self::Message(kind::READY),
            Phase::Complete => Self::Message(kind::RESUMED),
            Phase::Memory => unreachable!("no phase of a move"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// Forwarding until the point.
    Armed,
    /// At the point.
    Held,
    /// Forwarding for good.
    Released,
    /// All connections closed.
    Cut,
}

struct State {
    flow: Flow,
    streams: Vec<TcpStream>,
}

struct Shared {
    point: Point,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn set(&self, flow: Flow) {
        let mut state = self.state();
        state.flow = flow;
        if flow == Flow::Cut {
            for stream in state.streams.drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        self.changed.notify_all();
    }

    /// Called before something is forwarded; `at` says that it is the point. Returns whether to forward it.
    fn pass(&self, at: bool) -> bool {
        let mut state = self.state();
        if at && state.flow == Flow::Armed {
            state.flow = Flow::Held;
            self.changed.notify_all();
        }
        while state.flow == Flow::Held {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.flow != Flow::Cut
    }
}

/// A relay; everything it holds is cut when it is dropped.
pub struct Relay {
    url: String,
    address: std::net::SocketAddr,
    shared: Arc<Shared>,
}

impl Relay {
    /// Relays to a `tcp:` URL and stops at `point`.
    pub fn start(target: &str, point: Point) -> Result<Self> {
        let target = target
            .strip_prefix("tcp:")
            .context("the relay wants a tcp: URL")?
            .to_owned();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            point,
            state: Mutex::new(State {
                flow: Flow::Armed,
                streams: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let own = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut control = true;
            for stream in listener.incoming() {
                let Ok(source) = stream else { return };
                if own.state().flow == Flow::Cut {
                    return;
                }
                let (shared, target) = (Arc::clone(&own), target.clone());
                let is_control = std::mem::take(&mut control);
                std::thread::spawn(move || relay(&shared, source, &target, is_control));
            }
        });
        Ok(Self {
            url: format!("tcp:{address}"),
            address,
            shared,
        })
    }

    /// Where the source connects.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Waits until the point has been reached; everything stands still then.
    pub fn wait_held(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.state();
        while state.flow == Flow::Armed {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "the move never came to {:?}",
                self.shared.point
            );
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .0;
        }
        Ok(())
    }

    /// Closes all connections on both sides.
    pub fn cut(&self) {
        self.shared.set(Flow::Cut);
    }

    /// Forwards again, for good.
    pub fn release(&self) {
        self.shared.set(Flow::Released);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut();
        // Wakes the accepting thread, which then sees the cut.
        let _ = TcpStream::connect(self.address);
    }
}

fn relay(shared: &Arc<Shared>, source: TcpStream, target: &str, control: bool) {
    if let Ok(stream) = source.try_clone() {
        shared.state().streams.push(stream);
    }
    if !shared.pass(control && shared.point == Point::Connection) {
        let _ = source.shutdown(Shutdown::Both);
        return;
    }
    let Ok(destination) = TcpStream::connect(target) else {
        let _ = source.shutdown(Shutdown::Both);
        return;
    };
    for stream in [&source, &destination] {
        let _ = stream.set_nodelay(true);
    }
    if let Ok(stream) = destination.try_clone() {
        shared.state().streams.push(stream);
    }
    let (Ok(source2), Ok(destination2)) = (source.try_clone(), destination.try_clone()) else {
        return;
    };
    let back = Arc::clone(shared);
    std::thread::spawn(move || pump(&back, destination2, source2, control, false));
    pump(shared, source, destination, control, true);
}

/// Forwards one direction until it ends, then ends the other side's input.
fn pump(shared: &Shared, mut from: TcpStream, mut to: TcpStream, control: bool, outward: bool) {
    let result = if control {
        pump_messages(shared, &mut from, &mut to, outward)
    } else {
        pump_bytes(shared, &mut from, &mut to, outward)
    };
    // Whatever ended it, the other side must notice.
    let _ = result;
    let _ = to.shutdown(Shutdown::Write);
}

fn pump_bytes(
    shared: &Shared,
    from: &mut TcpStream,
    to: &mut TcpStream,
    outward: bool,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut passed = 0;
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        passed += n;
        let at = outward && matches!(shared.point, Point::Data(bytes) if passed >= bytes);
        if !shared.pass(at) {
            return Ok(());
        }
        to.write_all(&buffer[..n])?;
    }
}

fn pump_messages(
    shared: &Shared,
    from: &mut TcpStream,
    to: &mut TcpStream,
    outward: bool,
) -> std::io::Result<()> {
    // Hello: 8 bytes magic, two versions, length of the body.
    let mut hello = [0; 16];
    from.read_exact(&mut hello)?;
    let length = u32::from_le_bytes([hello[12], hello[13], hello[14], hello[15]]);
    if !shared.pass(outward && shared.point == Point::Hello) {
        return Ok(());
    }
    to.write_all(&hello)?;
    std::io::copy(&mut from.take(u64::from(length)), to)?;
    loop {
        // Frame: kind, flags, length of the body.
        let mut header = [0; 8];
        from.read_exact(&mut header)?;
        let kind = u16::from_le_bytes([header[0], header[1]]);
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        if !shared.pass(shared.point == Point::Message(kind)) {
            return Ok(());
        }
        to.write_all(&header)?;
        std::io::copy(&mut from.take(u64::from(length)), to)?;
    }
}
