//! The run time of the guest programs: from the PVH entry to Rust in ring 3.
//!
//! ```text
//!  VMM ─ PVH, 32 bit ─> _start ──────────── `!` on the serial port, before anything else
//!                         │ boot.s, ring 0: paging, long mode, SSE, XCR0, GDT, TSS, IDT,
//!                         │                 local APIC, KVM clock; ready-made tables, no loops
//!                         v iretq
//!                       ring3_entry ─> bss ─> Machine::discover ─> main(&Machine)        CPU 0
//!                         ^                                            │ smp::start
//!            SIPI ─> ap_trampoline (real mode) ─> boot.s ─> ring3_entry ─> ap_main(index)  others
//!
//!  ring 3 ── ud2 ──────> boot.s service (idle, MSR, CPUID, debug registers, IPI, …) ── iretq ──> ring 3
//!  timer  ── vector 0x20 ─> PerCpu::ticks += 1, EOI
//!  exception ──> "guest: exception VECTOR ERROR RIP CR2" on the serial port, CPU stops
//! ```
//!
//! Ring 0 is assembly of plain integer instructions only, because a KVM without hardware
//! virtualisation interprets it; Rust code, which uses SSE2, runs in ring 3, natively.
//!
//! A program provides `fn main(&Machine) -> !` and `fn ap_main(usize) -> !` and brings this module in
//! with `mod rt;`.

#![allow(dead_code, reason = "each program uses its own part of the run time")]

pub mod acpi;
pub mod clock;
pub mod machine;
pub mod params;
pub mod percpu;
pub mod power;
pub mod serial;
pub mod service;
pub mod smp;
mod support;

use machine::Machine;

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));

unsafe extern "C" {
    static mut __bss_start: u8;
    static mut __bss_end: u8;
}

/// Where `boot.s` enters ring 3 on every CPU.
#[unsafe(no_mangle)]
extern "C" fn ring3_entry(index: usize, start_info: usize) -> ! {
    if index != 0 {
        smp::announce(index);
        crate::ap_main(index)
    }
    // SAFETY: the linker script's symbols enclose the .bss; nothing in it is in use yet, and the
    // stacks are in a section of their own. A reset may leave old contents in RAM.
    unsafe {
        let start = &raw mut __bss_start;
        core::ptr::write_bytes(start, 0, (&raw mut __bss_end).offset_from_unsigned(start));
    }
    let machine = Machine::discover(start_info);
    crate::main(&machine)
}
