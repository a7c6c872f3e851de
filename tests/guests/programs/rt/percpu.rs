//! What ring 0 keeps for each CPU: the lower end of its ring 0 stack page.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::machine::MAX_CPUS;

const STACK: usize = 4096;

/// The KVM clock of one CPU (`struct pvclock_vcpu_time_info`, Documentation/virt/kvm/x86/msr.rst).
#[repr(C)]
pub struct PvClock {
    /// Odd while KVM writes.
    pub version: AtomicU32,
    pad: u32,
    /// TSC at `system_time`.
    pub tsc_timestamp: AtomicU64,
    /// Nanoseconds since the machine's start.
    pub system_time: AtomicU64,
    /// Multiplier from TSC ticks to ns, as a fraction of 2^32.
    pub tsc_to_system_mul: AtomicU32,
    /// Byte 0: shift (signed), byte 1: flags (bit 0: monotonic across vCPUs).
    pub shift_and_flags: AtomicU32,
}

/// Layout shared with `boot.s` (`PERCPU_…`).
#[repr(C)]
pub struct PerCpu {
    /// Timer interrupts of this CPU.
    ticks: AtomicU64,
    /// XCR0 as set by ring 0; 0 without XSAVE.
    pub xcr0: u64,
    /// Not 0 when the KVM clock was switched on.
    pub has_clock: u64,
    pad: [u64; 5],
    /// Written by KVM.
    pub clock: PvClock,
}

unsafe extern "C" {
    static ring0_stacks: [u8; MAX_CPUS * STACK];
}

impl PerCpu {
    /// The block of CPU `index`.
    pub fn of(index: usize) -> &'static PerCpu {
        assert!(index < MAX_CPUS);
        // SAFETY: the index is in range; the block at the lower end of each stack page belongs to
        // nothing else (the stack uses some hundred bytes at the upper end), and what changes in it
        // is atomic.
        unsafe {
            &*(&raw const ring0_stacks)
                .cast::<u8>()
                .add(index * STACK)
                .cast()
        }
    }

    /// Timer interrupts of this CPU up to now.
    pub fn ticks(&self) -> u64 {
        self.ticks.load(Ordering::Relaxed)
    }
}
