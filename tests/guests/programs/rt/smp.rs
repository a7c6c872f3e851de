//! Starting the other CPUs: INIT, SIPI, one after the other.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::machine::{MAX_CPUS, Machine};
use super::{clock, serial, service};

/// The page that holds the real-mode trampoline while CPUs start: below 1 MiB, away from the first
/// page (BIOS data) and from 0x6000 on, where loaders keep start info and page tables.
const TRAMPOLINE: u64 = 0x1000;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static ap_index: AtomicU32;
}

/// Bit per started CPU.
static STARTED: AtomicU64 = AtomicU64::new(0);

/// Called by each CPU when it arrives in ring 3.
pub fn announce(index: usize) {
    if index < MAX_CPUS {
        STARTED.fetch_or(1 << index, Ordering::Release);
    }
}

fn wait_for(index: usize, limit_ns: u64) -> bool {
    let start = clock::now_ns(0);
    while STARTED.load(Ordering::Acquire) & (1 << index) == 0 {
        if clock::now_ns(0).saturating_sub(start) > limit_ns {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Starts up to `want` CPUs in all, this one included; returns how many run. They enter `ap_main`
/// with 1, 2, …
pub fn start(machine: &Machine, want: usize) -> usize {
    let own = machine.own_apic_id();
    let want = want.min(machine.apic_ids.len);
    // SAFETY: the page is free (see TRAMPOLINE), mapped, and larger than the code.
    unsafe {
        let start = &raw const ap_trampoline;
        let len = (&raw const ap_trampoline_end).offset_from_unsigned(start);
        core::ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, len);
    }
    let mut running = 1;
    for &apic_id in machine.apic_ids.ids[..machine.apic_ids.len]
        .iter()
        .filter(|&&id| id != own)
    {
        if running >= want {
            break;
        }
        // SAFETY: a word that `boot.s` reads when the CPU starts; the last one has read it.
        unsafe { (*(&raw const ap_index)).store(running as u32, Ordering::Release) };
        service::send_ipi(apic_id, INIT);
        let command = STARTUP | (TRAMPOLINE >> 12) as u32;
        service::send_ipi(apic_id, command);
        // The SDM (3A, 9.4.4.1) sends a second SIPI: an emulator may drop one that comes while it still
        // handles the INIT. A CPU that already runs ignores it.
        let arrived = wait_for(running, 10_000_000)
            || (0..20).any(|_| {
                service::send_ipi(apic_id, command);
                wait_for(running, 100_000_000)
            });
        if !arrived {
            serial::line(format_args!(
                "guest: cpu {running} apic_id={apic_id} did not start"
            ));
            // It may still arrive late and must not share an index with another.
            break;
        }
        running += 1;
    }
    running
}
