//! The programs, by what they are about.

mod cpuid;
mod debug;
mod dirty_log;
mod ends;
mod exceptions;
mod floating_point;
mod host_facts;
mod interrupts;
mod io_events;
mod kicks;
mod memory_slots;
mod mmio;
mod mmio_operations;
mod mmio_strings;
mod modes;
mod msrs;
mod port_strings;
mod ports;
mod processors;
mod state;
mod time;

use hypervisor::Hypervisor;
use iced_x86::code_asm::*;

use crate::guest::{DATA, Guest, Idioms as _};
use crate::harness::Program;
use crate::host;
use crate::outcome::{Outcome, skip};

/// A leaf of CPUID, and a bit of its ECX.
type Feature = (u32, u32);

/// Whether the hypervisor offers guests a feature, so that it can emulate what belongs to it.
fn is_offered(hypervisor: &dyn Hypervisor, (leaf, feature): Feature) -> Outcome<bool> {
    let cpuid = hypervisor.supported_cpuid()?;
    Ok(cpuid
        .get(leaf, 0)
        .is_some_and(|entry| entry.ecx & feature != 0))
}

/// Whether ring 3 of a guest sees a feature, which can be more than its table shows.
fn is_seen(hypervisor: &dyn Hypervisor, (leaf, feature): Feature) -> Outcome<bool> {
    let mut guest = Guest::user(hypervisor, &|a| {
        a.mov(eax, leaf)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.mov(dword_ptr(DATA), ecx)?;
        a.stop_for_good()
    })?;
    guest.run()?;
    Ok(guest.ram.read_u32(DATA) & feature != 0)
}

/// Skips where breakpoint registers are kept, but never compared with anything.
fn no_breakpoints_here() -> Outcome {
    if host::is_emulated() {
        return skip(
            "the host is QEMU's emulator, which delivers no breakpoints to a nested guest",
        );
    }
    if host::interprets_ring_0() {
        return skip(
            "this host's KVM has no hardware virtualisation and does not load a guest's breakpoints",
        );
    }
    Ok(())
}

/// A group of programs from one module, named after it.
macro_rules! programs {
    ($($module:ident: $($name:ident),+ $(,)?;)+) => {
        /// Every program, in the order of a run.
        pub const PROGRAMS: &[Program] = &[$($(
            Program {
                name: concat!(stringify!($module), "::", stringify!($name)),
                body: $module::$name,
            },
        )+)+];
    };
}

programs! {
    ports: all_widths, immediate_forms, read_only_what_they_must, in_ring_3, a_kick_finds_the_access_complete;
    port_strings: outs_makes_one_access_an_element, ins_makes_one_access_an_element, downwards, counts_of_zero,
        buffers_across_pages, long_transfers;
    mmio: moves_of_all_widths, moves_of_immediates, extending_moves, byte_swapping_moves, sixteen_byte_moves, unaligned,
        across_the_edge_of_memory, across_pages_of_devices, in_real_mode, in_segments_with_a_base, in_sixteen_bit_protected_mode, through_fs_and_gs,
        every_register;
    mmio_operations: arithmetic, arithmetic_of_other_widths, comparisons_only_read, exchanges, compare_and_exchange,
        exchange_and_add, bit_operations, stack_operations, jumps_through_device_memory;
    mmio_strings: stores, moves_between_memory_and_device, moves_between_devices, loads, comparisons_and_scans,
        a_page_fault_in_the_middle_of_a_store, a_page_fault_in_the_middle_of_a_move,
        a_move_in_the_middle_of_a_store;
    exceptions: divide_error, undefined_opcode, general_protection, page_faults, page_fault_beside_a_device,
        breakpoint_instruction, in_real_mode, pending_in_a_restored_state, denied_ports;
    modes: real_mode_segments_and_calls, protected_mode_loads_segments, from_real_to_long_mode, compatibility_mode,
        code_segments_with_a_base, self_modifying_code, code_changed_from_outside;
    interrupts: messages, irqfds_follow_their_routes, routes_without_end_are_refused, the_window_opens_with_sti,
        a_waiting_interrupt_travels, priorities, hlt_wakes_by_a_message, nmi_by_a_message,
        the_end_of_a_level_triggered_one_is_reported, the_local_timer_wakes, self_ipi;
    io_events: memory_writes, memory_writes_of_a_value, port_writes, wrong_registrations_are_refused;
    processors: after_reset_one_waits_and_one_runs, start_up_by_ipi, one_that_is_reset_starts_again, interrupts_between_two;
    cpuid: what_is_shown_is_what_is_read, masked_features_stay_masked, the_table_is_kept, leaves_beyond_the_table, each_vcpu_reads_its_own_apic_id;
    msrs: what_is_written_is_read_and_saved, what_is_restored_is_read, efer, unknown_ones_are_refused, privileged,
        the_list_is_sorted_and_complete;
    time: the_counter_never_goes_back, the_counter_goes_on_after_a_restore, two_counters_are_in_step,
        two_counters_are_in_step_after_a_restore, the_deadline_timer_wakes, the_clock_goes_on_from_where_it_was_read;
    debug: registers_keep_their_values, breakpoints, single_steps, single_steps_over_reads,
        single_steps_over_writes;
    floating_point: sse_over_exits, sse_over_a_move, avx_over_exits, avx_over_a_move;
    state: every_element_travels, a_guest_goes_on_where_it_was, a_loop_moved_again_and_again, halted_guests_wake_elsewhere,
        what_cannot_be_taken_is_refused_by_name, impossible_registers_are_refused, xsave_areas_of_other_sizes_are_taken;
    dirty_log: exactly_what_was_written, marks_stay_until_they_are_cleared, slots_that_fill_no_word, long_stores, data_of_devices,
        writes_in_ring_3, started_again, wrong_ranges_are_refused, slots_that_come_and_go;
    memory_slots: taken_away_becomes_a_device, read_only, added_under_a_running_vcpu, removed_under_a_running_vcpu,
        moved_elsewhere, bad_ones_are_refused;
    kicks: before_the_run, a_spinning_guest, a_guest_spinning_in_ring_3, a_halted_guest, a_vcpu_that_waits_for_its_start,
        after_the_vcpu_has_gone, from_thread_to_thread;
    ends: triple_fault, code_that_is_not_there;
    host_facts: capabilities, cpuid_is_sorted_and_whole;
}
