//! A virtual processor: its locks, and how it runs.
//!
//! ```text
//!   MSHV_RUN_VP ─► signals blocked ─► KVM_RUN ─► exit ─┬─► handled here ──► KVM_RUN again
//!        ▲                              │ signal       └─► message, registers as before the instruction
//!        └──────── EINTR ◄──────────────┘
//! ```
//!
//! The driver's VP lock is held while running, so other ioctls of the same VP wait. A hypercall of the partition does not:
//! it *visits* the VP, that is, it takes it out of KVM_RUN, does its work, and lets it go on (see [`Vp::visit`]).
//!
//! Signals are blocked from entry to exit except inside KVM_RUN, which unblocks them atomically: a signal that arrives at
//! any moment of the ioctl makes it return EINTR, as it would in the driver, and nothing is half done.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use kvm_bindings::kvm_cpuid_entry2;
use mshv_bindings::{
    hv_message, hv_message_type_HVMSG_X64_INTERRUPTION_DELIVERABLE as DELIVERABLE,
    hv_register_name_HV_REGISTER_DELIVERABILITY_NOTIFICATIONS as NOTIFICATIONS,
};

use crate::cpuid::{self, Registered};
use crate::kvm::Vcpu;
use crate::partition::Partition;
use crate::registers::Value;
use crate::sys::Answer;

/// Locks, also after another thread panicked: the state is plain data.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a VP has besides its KVM vCPU.
#[derive(Debug)]
pub(crate) struct VpState {
    pub(crate) index: u32,
    /// The thread inside KVM_RUN.
    running: Option<i32>,
    /// Threads that wait to visit, or do.
    visitors: u32,
    /// Whether the guest has run, after which KVM takes no other CPUID.
    pub(crate) ran: bool,
    pub(crate) cpuid_base: Vec<kvm_cpuid_entry2>,
    pub(crate) results: Vec<Registered>,
    pub(crate) explicit_suspend: bool,
    pub(crate) intercept_suspend: bool,
    kept: BTreeMap<u32, Value>,
    /// MSHV_VP_STATE_SIMP, _SIEFP and _SYNTHETIC_TIMERS, by type.
    pub(crate) pages: BTreeMap<u8, Vec<u8>>,
    signal_mask: Option<u64>,
    pub(crate) timing: Arc<Timing>,
}

/// What all VPs of a partition share of its time.
#[derive(Debug)]
pub(crate) struct Timing {
    /// Whether the TSC of any of them has been set.
    pub(crate) tsc_written: AtomicBool,
    /// Ticks a second of their local APIC timers.
    pub(crate) apic_timer_hz: u64,
}

impl VpState {
    /// A register that is only kept; zero until set.
    pub(crate) fn kept(&self, name: u32) -> Value {
        self.kept.get(&name).copied().unwrap_or_default()
    }

    pub(crate) fn keep(&mut self, name: u32, value: Value) {
        self.kept.insert(name, value);
    }

    /// Whether the client wants to hear when an external interrupt can be delivered: bit 1 of
    /// HV_DELIVERABILITY_NOTIFICATIONS_REGISTER.
    fn wants_window(&self) -> bool {
        self.kept(NOTIFICATIONS).0[0] & 2 != 0
    }

    /// A notification is given once.
    fn forget_window(&mut self) {
        let Value([low, high]) = self.kept(NOTIFICATIONS);
        self.keep(NOTIFICATIONS, Value([low & !2, high]));
    }

    /// Registers a CPUID result; the same leaf and subleaf again replaces it.
    pub(crate) fn register(&mut self, result: Registered) {
        self.results
            .retain(|old| (old.leaf, old.subleaf) != (result.leaf, result.subleaf));
        self.results.push(result);
    }

    pub(crate) fn cpuid(&self, with_results: bool) -> Vec<kvm_cpuid_entry2> {
        let results: &[Registered] = if with_results { &self.results } else { &[] };
        cpuid::with_results(self.cpuid_base.clone(), results)
    }
}

/// A virtual processor.
#[derive(Debug)]
pub(crate) struct Vp {
    pub(crate) index: u32,
    pub(crate) vcpu: Vcpu,
    /// The driver's `vp_mutex`.
    pub(crate) ioctl: Mutex<()>,
    state: Mutex<VpState>,
    /// Loads in a row that KVM took for ones from a device though memory is mapped there.
    pub(crate) stale_loads: AtomicU32,
    /// Signalled when `running` or `visitors` change.
    changed: Condvar,
}

impl Vp {
    pub(crate) fn new(
        index: u32,
        vcpu: Vcpu,
        cpuid_base: Vec<kvm_cpuid_entry2>,
        timing: Arc<Timing>,
    ) -> Self {
        let state = VpState {
            index,
            running: None,
            visitors: 0,
            ran: false,
            cpuid_base,
            results: Vec::new(),
            // A VP is born suspended; running it lifts that.
            explicit_suspend: true,
            intercept_suspend: false,
            kept: BTreeMap::new(),
            pages: BTreeMap::new(),
            signal_mask: None,
            timing,
        };
        Vp {
            index,
            vcpu,
            ioctl: Mutex::new(()),
            state: Mutex::new(state),
            stale_loads: AtomicU32::new(0),
            changed: Condvar::new(),
        }
    }

    /// Does something with the VP while it does not run, taking it out of the guest if need be.
    ///
    /// The run that was interrupted returns EINTR to its caller, which a client must expect at any time.
    pub(crate) fn visit<T>(&self, work: impl FnOnce(&mut VpState) -> T) -> T {
        let mut state = lock(&self.state);
        state.visitors += 1;
        while let Some(thread) = state.running {
            self.vcpu.set_immediate_exit(true);
            kick(thread);
            // The signal may come before KVM_RUN; immediate exit covers that. The timeout covers a lost wake-up.
            let waited = self.changed.wait_timeout(state, Duration::from_millis(5));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let result = work(&mut state);
        state.visitors -= 1;
        self.changed.notify_all();
        result
    }

    /// MSHV_RUN_VP.
    pub(crate) fn run(&self, partition: &Partition) -> Answer<hv_message> {
        let before = block_signals();
        let result = self.run_blocked(partition, before);
        restore_signals(before);
        result
    }

    fn run_blocked(&self, partition: &Partition, allowed: u64) -> Answer<hv_message> {
        loop {
            let mut state = lock(&self.state);
            while state.visitors > 0 {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if partition.frozen() {
                drop(state);
                wait_for_signal(allowed, Duration::from_millis(2))?;
                continue;
            }
            // The kick must get through whatever the client blocks.
            let inside = allowed & !kick_bit();
            if state.signal_mask != Some(inside) {
                self.vcpu.set_signal_mask(inside)?;
                state.signal_mask = Some(inside);
            }
            if state.wants_window() {
                if let Some(message) = partition.deliverable(self)? {
                    state.forget_window();
                    state.intercept_suspend = true;
                    return Ok(message);
                }
                self.vcpu.request_interrupt_window(true);
            }
            (state.explicit_suspend, state.intercept_suspend, state.ran) = (false, false, true);
            self.vcpu.set_immediate_exit(false);
            // SAFETY: gettid has no arguments and cannot fail.
            state.running = Some(unsafe { libc::syscall(libc::SYS_gettid) } as i32);
            drop(state);

            let entered = self.vcpu.enter();

            let mut state = lock(&self.state);
            state.running = None;
            self.changed.notify_all();
            match entered {
                Ok(_) => {
                    if let Some(message) = partition.handle_exit(self)? {
                        if { message.header.message_type } == DELIVERABLE {
                            state.forget_window();
                        }
                        state.intercept_suspend = true;
                        return Ok(message);
                    }
                }
                // A vCPU that was waiting for its start-up IPI looks again.
                Err(libc::EAGAIN) => {}
                Err(error) => {
                    state.explicit_suspend = true;
                    return Err(error);
                }
            }
        }
    }
}

/// The signal that takes a thread out of KVM_RUN.
fn kick_signal() -> i32 {
    libc::SIGRTMAX()
}

fn kick_bit() -> u64 {
    1 << (kick_signal() - 1)
}

extern "C" fn ignore(_: i32) {}

fn kick(thread: i32) {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // SAFETY: the handler does nothing; zero is a valid start for the structure.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut());
        }
    });
    // SAFETY: a signal to a thread of this process, which handles it.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
}

/// Bytes of the kernel's signal set.
const SIGNAL_SET: usize = 8;

/// Signals that an instruction of this very thread raises; blocked, they would end the process instead of being handled.
const OWN_FAULTS: [i32; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGSYS,
];

/// Blocks the signals of this thread and returns the mask that held before.
fn block_signals() -> u64 {
    let faults = OWN_FAULTS
        .iter()
        .fold(0u64, |set, signal| set | 1 << (signal - 1));
    let (all, mut before) = (!faults, 0u64);
    // SAFETY: both sets are 8 bytes, the kernel's size.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const all,
            &raw mut before,
            SIGNAL_SET,
        );
    }
    before
}

fn restore_signals(mask: u64) {
    let nowhere: *mut u64 = std::ptr::null_mut();
    // SAFETY: the set is 8 bytes, the kernel's size.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            nowhere,
            SIGNAL_SET,
        )
    };
}

/// Sleeps with the given mask; EINTR if a signal came.
fn wait_for_signal(mask: u64, time: Duration) -> Answer<()> {
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: i64::from(time.subsec_nanos()),
    };
    let none: *const libc::pollfd = std::ptr::null();
    // SAFETY: no descriptors are polled; the time and the mask live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_ppoll,
            none,
            0,
            &raw const time,
            &raw const mask,
            SIGNAL_SET,
        )
    };
    if result == -1 {
        Err(libc::EINTR)
    } else {
        Ok(())
    }
}
