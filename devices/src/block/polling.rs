//! How long a queue's thread looks for work by itself before it sleeps.
//!
//! ```text
//!   no more work ─► credit? ── yes ─► look for WINDOW ─┬─ found: credit grows, no notification and no wake-up was needed
//!                      │ no                            └─ nothing: credit shrinks ─┐
//!                      └─► sleep ◄─────────────────────────────────────────────────┘
//!                            └─ woken soon: credit grows
//! ```
//!
//! To wake a thread takes longer than most reads of cached data, and so does the exit of the vCPU that notifies. A thread that looks takes a
//! CPU, though: it does so only where work came soon before, it stops when it is not let run while it looks, and never do more than half of the host's CPUs' worth of threads look at once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long to look: about what it takes to sleep and to be woken.
const WINDOW: Duration = Duration::from_micros(50);
/// A sleep that would rather have been a look. Most of a short one is what waking takes, on a busy or nested host.
const SHORT: Duration = Duration::from_micros(250);
/// What a look costs that finds nothing: as many short sleeps must follow before the next one. Where driver and device share a CPU, every look
/// is in vain and holds the driver up.
const FAILURE: i32 = 8;
/// The bounds of credit.
const LEAST_CREDIT: i32 = -FAILURE;
const MOST_CREDIT: i32 = 8 * FAILURE;
/// Looks between two at the time.
const LOOKS: u32 = 16;

/// Threads of this process that look now.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// How many may: none on a host with a single CPU.
fn most_looking() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| std::thread::available_parallelism().map_or(0, |cpus| cpus.get() / 2))
}

/// Leave to look.
struct Looking(&'static AtomicUsize);

impl Looking {
    fn begin(looking: &'static AtomicUsize) -> Option<Self> {
        let most = most_looking();
        let more = |now| (now < most).then_some(now + 1);
        looking
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()
            .map(|_| Self(looking))
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether one queue's thread looks.
#[derive(Debug)]
pub(super) struct Polling {
    credit: i32,
    asleep: Option<Instant>,
    /// How many threads look, this one among them.
    looking: &'static AtomicUsize,
}

impl Polling {
    pub(super) fn new() -> Self {
        // Here, where a thread may still ask for the number of CPUs.
        most_looking();
        Self {
            credit: 0,
            asleep: None,
            looking: &LOOKING,
        }
    }

    /// The thread sleeps from now on.
    pub(super) fn sleeps(&mut self) {
        self.asleep = Some(Instant::now());
    }

    /// It does not any more.
    pub(super) fn woken(&mut self) {
        if let Some(asleep) = self.asleep.take() {
            self.slept(asleep.elapsed());
        }
    }

    fn slept(&mut self, time: Duration) {
        if time < SHORT {
            self.gain();
        }
    }

    fn gain(&mut self) {
        self.credit = (self.credit + 1).min(MOST_CREDIT);
    }

    /// Looks for work; false if there was none in time or it is not worth it.
    pub(super) fn look<E>(&mut self, mut work: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if self.credit <= 0 {
            return Ok(false);
        }
        let Some(_looking) = Looking::begin(self.looking) else {
            return Ok(false);
        };
        let begin = Instant::now();
        let (mut found, mut looked) = (false, Duration::ZERO);
        while !found && looked < WINDOW {
            for _ in 0..LOOKS {
                found = work()?;
                if found {
                    break;
                }
                std::hint::spin_loop();
            }
            looked = begin.elapsed();
        }
        if looked > WINDOW * 4 {
            // Something else had this CPU in between: it is needed.
            self.credit = LEAST_CREDIT;
        } else if found {
            self.gain();
        } else {
            self.credit = (self.credit - FAILURE).max(LEAST_CREDIT);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(polling: &mut Polling, found: bool) -> (bool, u32) {
        let mut looks = 0;
        let result = polling.look(|| {
            looks += 1;
            Ok::<_, ()>(found)
        });
        (result.expect("no error"), looks)
    }

    #[test]
    fn it_looks_where_work_comes_soon() {
        static HERE: AtomicUsize = AtomicUsize::new(0);
        let mut polling = Polling::new();
        polling.looking = &HERE;
        assert_eq!(look(&mut polling, true), (false, 0), "nothing came yet");
        polling.slept(SHORT * 2);
        assert_eq!(look(&mut polling, true), (false, 0), "it came late");
        polling.slept(SHORT / 2);
        if most_looking() == 0 {
            return;
        }
        let (found, looks) = look(&mut polling, false);
        assert!(!found && looks >= LOOKS);
        assert_eq!(look(&mut polling, true), (false, 0), "it looked in vain");
        for _ in 0..FAILURE {
            assert_eq!(look(&mut polling, true), (false, 0));
            polling.slept(Duration::ZERO);
        }
        let (found, looks) = look(&mut polling, true);
        assert!(found && looks == 1);
        polling.credit = MOST_CREDIT;
        let not_let_run = polling.look(|| {
            std::thread::sleep(WINDOW * 5);
            Ok::<_, ()>(true)
        });
        assert_eq!((not_let_run, polling.credit), (Ok(true), LEAST_CREDIT));
        for _ in 0..1000 {
            polling.slept(Duration::ZERO);
        }
        assert_eq!(polling.credit, MOST_CREDIT);
        assert_eq!(polling.look(|| Err(1)), Err(1));
        assert_eq!(HERE.load(Ordering::Relaxed), 0);
    }
}
