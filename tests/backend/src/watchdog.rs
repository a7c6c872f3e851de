//! Kicks guests that do not come back.
//!
//! One thread for the process looks after every vCPU that is inside [`run`]. A run that the watchdog had to end is a failure that
//! says where the guest was.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hypervisor::{ExitBus, Vcpu, VcpuExit, VcpuKick};

use crate::outcome::{Outcome, fail};

/// Longest run of a guest. The programs take milliseconds, on an emulated host a second.
const PATIENCE: Duration = Duration::from_secs(10);

struct Watched {
    kick: Arc<dyn VcpuKick>,
    deadline: Instant,
    fired: Arc<AtomicBool>,
}

#[derive(Default)]
struct Watchdog {
    watched: Mutex<Vec<Watched>>,
}

impl Watchdog {
    fn get() -> &'static Self {
        static WATCHDOG: OnceLock<Watchdog> = OnceLock::new();
        static THREAD: OnceLock<()> = OnceLock::new();
        let watchdog = WATCHDOG.get_or_init(Self::default);
        THREAD.get_or_init(|| drop(std::thread::spawn(move || watchdog.watch())));
        watchdog
    }

    fn watched(&self) -> MutexGuard<'_, Vec<Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        loop {
            let now = Instant::now();
            let mut next = PATIENCE;
            self.watched().retain(|one| {
                if one.deadline <= now {
                    one.fired.store(true, Ordering::SeqCst);
                    one.kick.kick();
                } else {
                    next = next.min(one.deadline - now);
                }
                one.deadline > now
            });
            // A run that begins meanwhile ends later than this sleep does.
            std::thread::sleep(next);
        }
    }
}

/// Runs a vCPU, ten seconds at most.
pub(crate) fn run(vcpu: &mut dyn Vcpu, bus: &dyn ExitBus) -> Outcome<VcpuExit> {
    let watchdog = Watchdog::get();
    let fired = Arc::new(AtomicBool::new(false));
    watchdog.watched().push(Watched {
        kick: vcpu.kick_handle(),
        deadline: Instant::now() + PATIENCE,
        fired: Arc::clone(&fired),
    });
    let exit = vcpu.run(bus);
    watchdog
        .watched()
        .retain(|one| !Arc::ptr_eq(&one.fired, &fired));
    if fired.load(Ordering::SeqCst) {
        return fail(format!(
            "the guest hung for {} s: {}",
            PATIENCE.as_secs(),
            place(vcpu)
        ));
    }
    Ok(exit?)
}

/// Where a vCPU stands, for a message.
pub(crate) fn place(vcpu: &dyn Vcpu) -> String {
    match vcpu.save_state() {
        Ok(state) => format!(
            "vCPU {} at rip {:#x} (cs base {:#x}), rflags {:#x}, {:?}",
            state.id,
            state.general.rip,
            state.special.cs.base,
            state.general.rflags,
            state.activity
        ),
        Err(error) => format!("vCPU {}, whose state cannot be read: {error}", vcpu.id()),
    }
}
