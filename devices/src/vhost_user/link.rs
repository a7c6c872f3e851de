//! The connection as it is now: there or gone, and what a back end must know again when it comes back.
//!
//! ```text
//!   Up(session) ──── an exchange fails, the socket ends ────► gone: requests wait ── keeper: try again, 50 ms … 5 s ──► Up
//!      rings: with the back end                                  │ without a note of what was under way: NEEDS_RESET
//! ```

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use memory::GuestRam;
use vmm_sys_util::eventfd::EventFd;

use super::error::VhostError;
use super::kind::{Kind, capacity};
use super::log::DirtyLog;
use super::session::{DRAIN_FACTOR, Inflight, Offer, Session, Watch};
use crate::virtio::{VirtioInterrupt, Virtqueue};

/// How long the end of requests that are said to be over is waited for between two looks.
const LOOK: Duration = Duration::from_micros(500);

/// A ring that the transport has handed over.
pub(super) struct Ring {
    pub(super) queue: Virtqueue,
    /// Nobody knows which of its requests were carried out: it waits for the driver's reset. No back end has it.
    lost: bool,
    /// A back end that has gone may have begun requests of it that are not done.
    begun: bool,
}

/// What the lock protects: whoever talks to the back end holds it.
pub(super) struct State {
    pub(super) session: Option<Session>,
    pub(super) accepted: u64,
    pub(super) rings: Vec<Option<Ring>>,
    pub(super) log: Option<DirtyLog>,
    inflight: Option<Inflight>,
    /// Rings that were given back with requests that a back end has begun and not finished: only one with the same notes can.
    unfinished: BTreeSet<u16>,
    /// When the back end went.
    gone_since: Option<Instant>,
}

/// What the device and its keeper share.
pub(super) struct Shared {
    pub(super) id: String,
    pub(super) socket: PathBuf,
    pub(super) kind: Kind,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    pub(super) ram: Arc<GuestRam>,
    /// What the first back end offered: a later one must have it too.
    pub(super) offer: Offer,
    /// Written by the back end when it has used buffers, one for each ring.
    pub(super) calls: Vec<EventFd>,
    pub(super) interrupt: OnceLock<Arc<dyn VirtioInterrupt>>,
    /// The back end's part of the configuration space.
    pub(super) space: Mutex<Vec<u8>>,
    /// What the keeper looks at; none while the back end is gone.
    pub(super) watch: Mutex<Option<Arc<Watch>>>,
    /// Written when the keeper has to look again.
    pub(super) wake: EventFd,
    pub(super) stop: AtomicBool,
    /// How long one answer may take.
    pub(super) patience: Duration,
    state: Mutex<State>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is kept is changed in single assignments.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    pub(super) fn new(session: Session, rings: u16) -> Self {
        Self {
            session: Some(session),
            accepted: 0,
            rings: (0..rings).map(|_| None).collect(),
            log: None,
            inflight: None,
            unfinished: BTreeSet::new(),
            gone_since: None,
        }
    }

    /// Whether a back end has requests that it has not finished, of rings that are not with the device.
    pub(super) fn has_unfinished(&self) -> bool {
        !self.unfinished.is_empty()
    }

    /// Requests that the driver has made available and that are not done, in rings that are with the device.
    fn under_way(&self) -> u16 {
        let rings = self.rings.iter().flatten();
        rings
            .filter_map(|ring| ring.queue.indices().ok())
            .map(|(available, used)| available.wrapping_sub(used))
            .fold(0, u16::saturating_add)
    }
}

impl Shared {
    #[expect(
        clippy::too_many_arguments,
        reason = "one for each thing that the config says"
    )]
    pub(super) fn new(
        id: &str,
        socket: PathBuf,
        kind: Kind,
        (queues, queue_size): (u16, u16),
        ram: Arc<GuestRam>,
        session: Session,
        space: Vec<u8>,
        events: (Vec<EventFd>, EventFd),
        patience: Duration,
    ) -> Self {
        let rings = kind.rings(queues);
        Self {
            id: id.to_owned(),
            socket,
            kind,
            queues,
            queue_size,
            ram,
            offer: session.offer.clone(),
            calls: events.0,
            interrupt: OnceLock::new(),
            space: Mutex::new(space),
            watch: Mutex::new(Some(Arc::clone(&session.watch))),
            wake: events.1,
            stop: AtomicBool::new(false),
            patience,
            state: Mutex::new(State::new(session, rings)),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    pub(super) fn space(&self) -> MutexGuard<'_, Vec<u8>> {
        locked(&self.space)
    }

    pub(super) fn watch(&self) -> Option<Arc<Watch>> {
        locked(&self.watch).clone()
    }

    /// Has the keeper look again.
    pub(super) fn call_keeper(&self) {
        // Full means that it has been told.
        let _ = self.wake.write(1);
    }

    pub(super) fn needs_reset(&self) {
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.needs_reset();
        }
    }

    /// The back end is of no use any more. Returns at once; the keeper looks for it.
    pub(super) fn lose(&self, state: &mut State, error: &VhostError) {
        if state.session.take().is_none() {
            return;
        }
        *locked(&self.watch) = None;
        state.gone_since = Some(Instant::now());
        let waiting = state.under_way();
        tracing::warn!(
            id = self.id,
            waiting,
            "{error}; requests wait until it is back"
        );
        for ring in state.rings.iter_mut().flatten() {
            self.abandon(ring);
        }
        self.call_keeper();
    }

    /// A ring's back end has gone, or was cut off.
    fn abandon(&self, ring: &mut Ring) {
        // It may have shown the driver requests that are done, and gone before it logged that and called.
        ring.queue.mark_used_ring();
        self.interrupt(ring.queue.index());
        // One that is lost was lost before; what the driver has made available since, nobody has begun.
        if !ring.lost {
            ring.begun |= !is_done(&ring.queue);
            ring.lost = self.is_in_doubt(&ring.queue);
        }
    }

    /// One interrupt too many harms nobody.
    fn interrupt(&self, index: u16) {
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.used(index);
        }
    }

    /// Whether nobody can know which requests of a ring were carried out by a back end that has gone. The device needs a reset then.
    fn is_in_doubt(&self, queue: &Virtqueue) -> bool {
        if self.offer.tracks_requests() || self.kind.forgives() {
            return false;
        }
        let doubt = !is_done(queue);
        if doubt {
            tracing::error!(
                id = self.id,
                queue = queue.index(),
                "the back end has kept no note of the requests that it had begun (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD), so none can be \
                 begun again: the device needs a reset"
            );
            self.needs_reset();
        }
        doubt
    }

    /// Runs an exchange with the back end, if there is one; one that fails is the end of it.
    pub(super) fn exchange<T>(
        &self,
        state: &mut State,
        exchange: impl FnOnce(&mut State, &mut Session) -> Result<T, VhostError>,
    ) -> Option<T> {
        let mut session = state.session.take()?;
        let result = exchange(state, &mut session);
        state.session = Some(session);
        result.map_err(|error| self.lose(state, &error)).ok()
    }

    /// Features and memory, if the back end does not know them yet.
    fn configure(&self, state: &mut State, session: &mut Session) -> Result<(), VhostError> {
        if session.configured {
            return Ok(());
        }
        let shape = (self.kind.rings(self.queues), self.queue_size);
        let log = state.log.as_ref();
        session.configure(state.accepted, &self.ram, log, &mut state.inflight, shape)
    }

    fn start_ring(&self, session: &mut Session, ring: &Ring, base: u16) -> Result<(), VhostError> {
        let index = ring.queue.index();
        let call = self
            .calls
            .get(usize::from(index))
            .ok_or_else(|| VhostError::Config(format!("there is no queue {index}")))?;
        let active = self.kind.is_active(index);
        session.start(&ring.queue, base, call, active)
    }

    /// Takes a ring over and has it served, now or when the back end is back.
    pub(super) fn start(&self, queue: Virtqueue) -> Result<(), VhostError> {
        super::session::host_addresses(&queue)?;
        let (index, base) = (usize::from(queue.index()), queue.next_available());
        let mut state = self.state();
        let begun = state.unfinished.remove(&queue.index());
        let mut ring = Ring {
            queue,
            lost: false,
            begun,
        };
        let there = state.session.is_some();
        let started = self.exchange(&mut state, |state, session| {
            self.configure(state, session)?;
            self.start_ring(session, &ring, base)
        });
        // `lose` could not see it, as it was not in its place.
        if there && started.is_none() {
            self.abandon(&mut ring);
        }
        match state.rings.get_mut(index) {
            Some(place) => *place = Some(ring),
            None => return Err(VhostError::Config(format!("there is no queue {index}"))),
        }
        Ok(())
    }

    /// Gives a ring back, at the position up to which requests are done. Without its back end this is what the used ring says.
    pub(super) fn stop(&self, index: u16) -> Option<Virtqueue> {
        let mut state = self.state();
        let mut ring = state.rings.get_mut(usize::from(index))?.take()?;
        // A ring that is lost was not given to the back end that came after.
        let there = state.session.is_some() && !ring.lost;
        let served = match there {
            true => self.exchange(&mut state, |_, session| {
                let base = session.stop(index)?;
                await_end(&ring.queue, base, self.patience * DRAIN_FACTOR)?;
                Ok(base)
            }),
            false => None,
        };
        if there && served.is_none() {
            // `lose` could not see it, as it was not in its place.
            self.abandon(&mut ring);
        }
        // Some log that they have written the used ring after they have shown what is in it.
        ring.queue.mark_used_ring();
        match (served, ring.queue.indices()) {
            (Some(base), _) => ring.queue.served_until(base),
            (None, Ok((available, used))) => {
                ring.queue.served_until(used);
                let forgotten = ring.lost || self.kind.forgives();
                if ring.begun && available != used && !forgotten {
                    state.unfinished.insert(index);
                }
            }
            (None, Err(error)) => {
                tracing::error!(id = self.id, %error, "a ring is not readable any more");
                self.needs_reset();
            }
        }
        // Whatever the back end has called for or would have: a call on its way to the keeper would come after the machine's state is saved,
        // and some end requests without one after they have said that they stop.
        if let Some(call) = self.calls.get(usize::from(index)) {
            let _ = call.read();
        }
        self.interrupt(index);
        Some(ring.queue)
    }

    /// Puts a new session in place of one that has gone, with all that ran before.
    pub(super) fn install(&self, mut session: Session, space: Vec<u8>) -> Result<(), VhostError> {
        let mut state = self.state();
        if state.rings.iter().any(Option::is_some) {
            self.configure(&mut state, &mut session)?;
        }
        for index in 0..state.rings.len() {
            let Some(ring) = state.rings[index].as_ref().filter(|ring| !ring.lost) else {
                continue;
            };
            let started = match ring.queue.indices() {
                // What was begun and is not done, the back end finds in its notes.
                Ok((_, used)) => self.start_ring(&mut session, ring, used),
                Err(error) => Err(VhostError::Config(error.to_string())),
            };
            if let Err(error) = started {
                // It may have begun requests already of those that it has.
                for ring in state.rings[..=index].iter_mut().flatten() {
                    self.abandon(ring);
                }
                return Err(error);
            }
        }
        for ring in state.rings.iter().flatten() {
            // What came after the last one had gone was not called for.
            self.interrupt(ring.queue.index());
        }
        *locked(&self.watch) = Some(Arc::clone(&session.watch));
        state.session = Some(session);
        let seconds = state
            .gone_since
            .take()
            .map_or(0.0, |since| since.elapsed().as_secs_f64());
        tracing::warn!(
            id = self.id,
            "the vhost-user back end is back after {seconds:.1} s"
        );
        drop(state);
        self.take_space(space);
        Ok(())
    }

    /// The back end's part of the configuration space may have changed.
    pub(super) fn take_space(&self, new: Vec<u8>) {
        let changed = {
            let mut space = self.space();
            let changed = *space != new;
            *space = new;
            changed
        };
        if changed && let Some(interrupt) = self.interrupt.get() {
            interrupt.config_changed();
        }
    }

    /// The driver has reset the device. No ring runs.
    pub(super) fn reset(&self) {
        let mut state = self.state();
        state.accepted = 0;
        state.inflight = None;
        state.unfinished.clear();
        self.exchange(&mut state, |_, session| session.reset());
    }

    /// A new back end must be able to stand in for the first.
    pub(super) fn check_offer(&self, session: &Session, space: &[u8]) -> Result<(), VhostError> {
        let features = self.kind.carried() | crate::virtio::TRANSPORT_FEATURES;
        if let Some(what) = session.offer.lacks(&self.offer, features) {
            return Err(VhostError::Lacks(what));
        }
        let (before, now) = (capacity(&self.space()), capacity(space));
        if now < before {
            let sectors = before.unwrap_or(0);
            return Err(VhostError::Lacks(format!(
                "the {sectors} sectors that its disk had"
            )));
        }
        Ok(())
    }

    pub(super) fn stops(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// Whether all that the driver has made available is done, as far as can be seen.
fn is_done(queue: &Virtqueue) -> bool {
    queue
        .indices()
        .is_ok_and(|(available, used)| available == used)
}

/// Some back ends answer before the requests that they have begun are done: waits for those. A position that cannot be is refused.
fn await_end(queue: &Virtqueue, base: u16, patience: Duration) -> Result<(), VhostError> {
    let until = Instant::now() + patience;
    let size = (queue.rings()[0].1 / 16) as u16;
    let index = queue.index();
    loop {
        let (available, used) = queue
            .indices()
            .map_err(|error| VhostError::Config(error.to_string()))?;
        if used == base {
            return Ok(());
        }
        if available.wrapping_sub(base) > size || base.wrapping_sub(used) > size {
            return Err(VhostError::Config(format!(
                "the vhost-user back end says that it is at {base} of queue {index}, which the driver has filled up to {available}"
            )));
        }
        if Instant::now() >= until {
            return Err(VhostError::Unfinished(index));
        }
        std::thread::sleep(LOOK);
    }
}
