//! What decides whether a vCPU's thread is in the guest: the machine's mode, and whether the vCPU is there.
//!
//! ```text
//!   mode:          Parked ⇄ Running ──► Ended
//!   each vCPU:     absent ──plug: reset due──► (its thread resets it) ──► present ──unplug: reset due, kick──► (as before) ──► absent
//! ```
//!
//! A thread is in the guest only while the mode is Running, its vCPU is there and no reset is due. All resets are done by the vCPU's own
//! thread, parked or not: [`Gate::park`] waits for them too, so that a saved state is never that of a vCPU half gone.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use devices::VcpuSwitch;
use hypervisor::VcpuKick;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Parked,
    Running,
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reset {
    Done,
    Due,
    Doing,
}

#[derive(Clone, Copy)]
struct Place {
    present: bool,
    reset: Reset,
}

struct State {
    mode: Mode,
    /// Threads that wait here.
    parked: usize,
    /// Counts up at every resume, so that a thread which parked alone knows a new one.
    resumes: u64,
    /// By id.
    places: Vec<Place>,
}

/// What a thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// Run the guest; this is the number of the resume.
    Run(u64),
    /// Put the vCPU into its state after reset.
    Reset,
    /// Return.
    End,
}

/// The gate of one machine's vCPUs.
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// By id; there once the threads are.
    kicks: OnceLock<Vec<Arc<dyn VcpuKick>>>,
}

impl Gate {
    /// Parked, for `max` vCPUs of which the first `present` are there.
    pub(super) fn new(present: u32, max: u32) -> Self {
        let places = (0..max)
            .map(|id| Place {
                present: id < present,
                reset: Reset::Done,
            })
            .collect();
        Self {
            state: Mutex::new(State {
                mode: Mode::Parked,
                parked: 0,
                resumes: 0,
                places,
            }),
            changed: Condvar::new(),
            kicks: OnceLock::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, id: u32, change: impl FnOnce(&mut Place)) {
        if let Some(place) = self.state().places.get_mut(id as usize) {
            change(place);
        }
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// How to make the vCPUs leave the guest, by id. Once.
    pub(super) fn connect(&self, kicks: Vec<Arc<dyn VcpuKick>>) {
        // A second call would be our own fault, and the first one's are right.
        let _ = self.kicks.set(kicks);
    }

    // --- the threads' side ---

    /// Waits, parked, until there is something to do for the thread of vCPU `id`. One that stays has left the guest by itself, in the resume
    /// `seen`, and goes on with another.
    pub(super) fn next(&self, id: u32, seen: u64, stay: bool) -> Task {
        let at = id as usize;
        let mut state = self.state();
        state.parked += 1;
        if let Some(place) = state.places.get_mut(at)
            && place.reset == Reset::Doing
        {
            place.reset = Reset::Done;
        }
        self.changed.notify_all();
        loop {
            let (mode, resumes) = (state.mode, state.resumes);
            if mode == Mode::Ended {
                return Task::End;
            }
            if let Some(place) = state.places.get_mut(at) {
                if place.reset == Reset::Due {
                    place.reset = Reset::Doing;
                    state.parked -= 1;
                    return Task::Reset;
                }
                if mode == Mode::Running && place.present && (!stay || resumes != seen) {
                    state.parked -= 1;
                    return Task::Run(resumes);
                }
            }
            state = self.wait(state);
        }
    }

    /// Whether the thread of vCPU `id` may go on in the guest.
    pub(super) fn may_run(&self, id: u32) -> bool {
        let state = self.state();
        let place = state.places.get(id as usize);
        state.mode == Mode::Running
            && place.is_some_and(|place| place.present && place.reset == Reset::Done)
    }

    /// Counts a thread that ends by a panic as parked: nobody must wait for it.
    pub(super) fn panicked(&self, id: u32) {
        self.state().parked += 1;
        self.change(id, |place| {
            *place = Place {
                present: false,
                reset: Reset::Done,
            };
        });
    }

    // --- the machine's side ---

    /// Parks all threads. On return none is inside the guest or about to reset its vCPU.
    pub(super) fn park(&self) {
        let mut state = self.state();
        if state.mode == Mode::Running {
            state.mode = Mode::Parked;
        }
        drop(state);
        self.kicks().iter().for_each(|kick| kick.kick());
        let threads = self.kicks().len();
        let mut state = self.state();
        while state.mode == Mode::Parked
            && (state.parked < threads
                || state.places.iter().any(|place| place.reset == Reset::Due))
        {
            state = self.wait(state);
        }
    }

    pub(super) fn is_parked(&self) -> bool {
        self.state().mode == Mode::Parked
    }

    /// Lets the threads of those that are there into the guest.
    pub(super) fn run(&self) {
        let mut state = self.state();
        if state.mode == Mode::Parked {
            state.mode = Mode::Running;
            state.resumes += 1;
            self.changed.notify_all();
        }
    }

    /// Ends the threads, which are parked.
    pub(super) fn end(&self) {
        self.state().mode = Mode::Ended;
        self.changed.notify_all();
    }

    fn kicks(&self) -> &[Arc<dyn VcpuKick>] {
        self.kicks.get().map_or(&[], Vec::as_slice)
    }
}

impl VcpuSwitch for Gate {
    fn plug(&self, ids: &[u32]) {
        for &id in ids {
            self.change(id, |place| place.reset = Reset::Due);
        }
        let mut state = self.state();
        let is_reset = |state: &State, id: u32| {
            let place = state.places.get(id as usize);
            place.is_none_or(|place| place.reset == Reset::Done)
        };
        while state.mode != Mode::Ended && !ids.iter().all(|&id| is_reset(&state, id)) {
            state = self.wait(state);
        }
        drop(state);
        for &id in ids {
            self.change(id, |place| place.present = true);
        }
    }

    fn unplug(&self, id: u32) {
        self.change(id, |place| {
            place.present = false;
            place.reset = Reset::Due;
        });
        if let Some(kick) = self.kicks().get(id as usize) {
            kick.kick();
        }
    }

    fn restored(&self, id: u32, present: bool) {
        self.change(id, |place| place.present = present);
    }
}
