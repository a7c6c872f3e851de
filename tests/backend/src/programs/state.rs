//! A vCPU's state, out of one machine and into another.

use std::time::Duration;

use arch::x86_64::state::{
    Activity, Bytes, DescriptorTable, NestedFormat, NestedState, PendingException, StateElement,
    VcpuState,
};
use hypervisor::{Error, Hypervisor, Msi, Vcpu};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::msrs::set;
use crate::guest::{APIC, CODE, DATA, Guest, Idioms as _};
use crate::outcome::{Outcome, ensure, fail, same};

const IA32_TSC: u32 = 0x10;
/// HV_X64_MSR_TIME_REF_COUNT (TLFS, section 12.4), a clock too.
const TIME_REF_COUNT: u32 = 0x4000_0020;
/// HV_X64_MSR_VP_RUNTIME (TLFS, section 7.9.1): how long the processor has run, by the host's count of its thread's time.
const VP_RUNTIME: u32 = 0x4000_0010;

/// One element in a form that can be compared, without what time changes by itself.
fn element(state: &VcpuState, element: StateElement) -> String {
    match element {
        StateElement::TscFrequency => format!("{:?}", state.tsc_khz),
        StateElement::Special => format!("{:x?}", state.special),
        StateElement::General => format!("{:x?}", state.general),
        StateElement::Xcrs => format!("{:x?}", state.xcrs),
        StateElement::Xsave => format!("{:x?}", state.xsave),
        StateElement::Debug => format!("{:x?}", state.debug),
        StateElement::Lapic => format!("{:x?}", state.lapic),
        StateElement::Msrs => {
            let still: Vec<_> = state
                .msrs
                .iter()
                .filter(|msr| ![IA32_TSC, TIME_REF_COUNT, VP_RUNTIME].contains(&msr.index))
                .collect();
            format!("{still:x?}")
        }
        StateElement::Events => format!("{:x?}", state.events),
        StateElement::Activity => format!("{:?}", state.activity),
        StateElement::Nested => format!("{:x?}", state.nested),
    }
}

fn same_state(found: &VcpuState, expected: &VcpuState) -> Outcome {
    for which in StateElement::ALL {
        same!(
            element(found, which),
            element(expected, which),
            "{}",
            which.name()
        );
    }
    Ok(())
}

fn msr(state: &VcpuState, index: u32) -> Option<u64> {
    state
        .msrs
        .iter()
        .find(|msr| msr.index == index)
        .map(|msr| msr.value)
}

/// Gives every element a value that no reset leaves.
fn make_unusual(hypervisor: &dyn Hypervisor, state: &mut VcpuState) -> Outcome {
    let g = &mut state.general;
    for (n, register) in [
        &mut g.rax, &mut g.rbx, &mut g.rcx, &mut g.rdx, &mut g.rsi, &mut g.rdi, &mut g.rbp,
        &mut g.r8, &mut g.r15,
    ]
    .into_iter()
    .enumerate()
    {
        *register = 0x1111_2222_3333_4444u64.wrapping_mul(n as u64 + 3);
    }
    state.special.cr2 = 0x7fff_1234_5678;
    state.special.gdt = DescriptorTable {
        base: 0x5000,
        limit: 0x37,
    };
    state.special.idt = DescriptorTable {
        base: 0x6000,
        limit: 0x1ff,
    };
    state.special.fs.base = 0x1234_5000;
    if let Some(debug) = &mut state.debug {
        (debug.db, debug.dr7) = ([0x1000, 0x2000, 0x3000, 0x4000], 0x400);
    }
    if let Some(Bytes(area)) = &mut state.xsave {
        area[..2].copy_from_slice(&0x27fu16.to_le_bytes()); // FCW
        area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes()); // MXCSR
        area[160..416].copy_from_slice(&std::array::from_fn::<u8, 256, _>(|i| i as u8 ^ 0x5a)); // XMM0–15
        area[512] = 0b11;
    }
    let Some(lapic) = &mut state.lapic else {
        return fail("no local APIC was saved");
    };
    let lapic = &mut lapic.registers.0;
    lapic[0xf0..0xf2].copy_from_slice(&0x1abu16.to_le_bytes()); // SVR: on, vector 0xab
    lapic[0x80] = 0x20; // TPR
    state.special.cr8 = 2; // the same register, seen from the processor
    lapic[0x320..0x324].copy_from_slice(&0x1_00ecu32.to_le_bytes()); // LVT timer: masked, vector 0xec
    lapic[0x212] = 0x04; // IRR: vector 50 is requested
    let known = hypervisor.msr_indices()?;
    for (index, value) in [
        (0x174, 0x10),
        (0x175, 0x8000_1000),
        (0x277, 0x0007_0406_0007_0406),
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_ffff_8100_0000),
        (0xc000_0102, 0xffff_8880_1234_0000),
        (0x3b, 0x77),
        (0x2ff, 0xc06),
        (0x4b56_4d01, 0x7000 | 1),
    ] {
        if known.binary_search(&index).is_ok() {
            set(state, index, value);
        }
    }
    state.events.nmi_masked = true;
    state.events.nmi_pending = true;
    state.events.exception = Some(PendingException {
        vector: 14,
        error_code: Some(2),
        payload: None,
        injected: true,
    });
    state.activity = Activity::Halted;
    Ok(())
}

pub(super) fn every_element_travels(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut a = Guest::long(hypervisor, &|a| a.hlt())?;
    let mut unusual = a.vcpu.save_state()?;
    make_unusual(hypervisor, &mut unusual)?;
    a.vcpu.restore_state(&unusual)?;
    let saved = a.vcpu.save_state()?;
    // What was set is what is there, where the program knows it.
    same!(saved.general, unusual.general, "general registers");
    same!(saved.debug, unusual.debug, "debug registers");
    let area = |state: &VcpuState| state.xsave.as_ref().map(|area| area.0[160..416].to_vec());
    same!(area(&saved), area(&unusual), "XMM registers");
    same!(
        msr(&saved, 0xc000_0082),
        Some(0xffff_ffff_8100_0000),
        "LSTAR"
    );
    same!(
        (saved.events, saved.activity),
        (unusual.events, Activity::Halted),
        "events and activity"
    );
    let timer = |state: &VcpuState| state.lapic.as_ref().map(|lapic| lapic.registers.0[0x320]);
    same!(timer(&saved), Some(0xec), "the timer's vector");
    ensure!(
        saved
            .msrs
            .windows(2)
            .all(|pair| pair[0].index < pair[1].index),
        "the MSRs are not sorted"
    );
    let mut b = Guest::new(hypervisor)?;
    b.vcpu.restore_state(&saved)?;
    let again = b.vcpu.save_state()?;
    same_state(&again, &saved)?;
    ensure!(
        msr(&again, IA32_TSC) >= msr(&saved, IA32_TSC),
        "the TSC goes back"
    );
    // And once more over itself.
    b.vcpu.restore_state(&again)?;
    same_state(&b.vcpu.save_state()?, &again)
}

pub(super) fn a_guest_goes_on_where_it_was(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let code = |a: &mut CodeAssembler| -> Result<(), IcedError> {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(rbx)?;
            a.mov(qword_ptr(DATA), rbx)?;
            a.stop()?;
            a.jmp(again)
        };
        let mut a = Guest::in_ring(hypervisor, ring, &code)?;
        a.change(|state| state.general.rbx = 0)?;
        for _ in 0..5 {
            a.run()?;
        }
        let saved = a.vcpu.save_state()?;
        same!(saved.general.rbx, 5, "RBX as saved");
        let mut b = Guest::in_ring(hypervisor, ring, &code)?;
        b.vcpu.restore_state(&saved)?;
        for _ in 0..5 {
            b.run()?;
        }
        same!(b.ram.read_u64(DATA), 10, "RBX in the second machine");
        let rip = b.vcpu.save_state()?.general.rip;
        ensure!((CODE..CODE + 0x40).contains(&rip), "RIP is {rip:#x}");
    }
    Ok(())
}

/// A computation over all general registers, the stack and XMM0, to last `DATA[0x100]` rounds. Its results go to [`DATA`], a 1
/// behind them to `DATA[0x108]`.
fn computation(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let ring = [
        rax, rbx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15,
    ];
    let mut again = a.create_label();
    a.mov(rcx, qword_ptr(DATA + 0x100))?;
    a.mov(eax, 1)?;
    for register in &ring[1..] {
        a.lea(rax, rax + rax * 2 + 1)?;
        a.mov(*register, rax)?;
    }
    a.set_label(&mut again)?;
    for (n, register) in ring.iter().enumerate() {
        a.add(*register, ring[(n + 1) % ring.len()])?;
        a.rol(*register, 7)?;
    }
    a.push(rax)?;
    a.movq(xmm0, rbx)?;
    a.pop(rbx)?;
    a.movq(rax, xmm0)?;
    a.adc(rax, 0)?;
    a.dec(rcx)?;
    a.jne(again)?;
    for (n, register) in (0..).zip(ring) {
        a.mov(qword_ptr(DATA + n * 8), register)?;
    }
    a.mov(qword_ptr(DATA + 0x108), 1)?;
    a.stop_for_good()
}

/// Interrupted at whatever moment and carried to the next machine, a computation has the same result as without.
pub(super) fn a_loop_moved_again_and_again(hypervisor: &dyn Hypervisor) -> Outcome {
    // On a busy or a fast host a short one is over before it can be moved.
    for rounds in [1_000_000, 10_000_000, 100_000_000] {
        let start = || -> Outcome<Guest> {
            let guest = Guest::user(hypervisor, &computation)?;
            guest.ram.write_u64(DATA + 0x100, rounds);
            Ok(guest)
        };
        let mut undisturbed = start()?;
        undisturbed.run()?;
        let expected = undisturbed.ram.quads::<14>(DATA);
        let (moves, found) = moved(start)?;
        same!(found, expected, "the result after {moves} moves");
        if moves >= 3 {
            return Ok(());
        }
    }
    fail("it was over before it could be moved")
}

/// Runs the computation for a millisecond at a time, each time in another machine. Answers how often it was moved, and its result.
fn moved(start: impl Fn() -> Outcome<Guest>) -> Outcome<(u32, [u64; 14])> {
    let mut guest = start()?;
    let mut moves = 0;
    loop {
        let kick = guest.vcpu.kick_handle();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(1));
                kick.kick();
            });
            guest.run()
        })?;
        if guest.ram.read_u64(DATA + 0x108) == 1 {
            return Ok((moves, guest.ram.quads(DATA)));
        }
        let mut next = start()?;
        next.ram.copy(&guest.ram);
        next.vcpu.restore_state(&guest.vcpu.save_state()?)?;
        guest = next;
        moves += 1;
    }
}

pub(super) fn halted_guests_wake_elsewhere(hypervisor: &dyn Hypervisor) -> Outcome {
    let build = || -> Outcome<Guest> {
        let mut guest = Guest::long(hypervisor, &|a| {
            a.sti()?;
            a.hlt()?;
            a.mov(dword_ptr(DATA), 1)?;
            a.stop_for_good()
        })?;
        guest.enable_apic()?;
        Ok(guest)
    };
    let mut first = build()?;
    let kick = first.vcpu.kick_handle();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            kick.kick();
        });
        first.run()
    })?;
    let state = first.vcpu.save_state()?;
    same!(state.activity, Activity::Halted, "the activity");
    same!(state.general.rip, CODE + 2, "RIP, behind the HLT");
    let mut second = build()?;
    second.vcpu.restore_state(&state)?;
    second.vm.signal_msi(Msi {
        address: APIC,
        data: 0x45,
    })?;
    second.run()?;
    same!(second.interrupts(0x45), 1, "interrupts");
    same!(second.ram.read_u32(DATA), 1, "what follows the HLT");
    Ok(())
}

/// The element that a state was refused for.
fn refusal(vcpu: &mut dyn Vcpu, state: &VcpuState) -> Outcome<(&'static str, String)> {
    match vcpu.restore_state(state) {
        Err(Error::StateRefused {
            vcpu: 0,
            element,
            reason,
        }) => Ok((element, reason)),
        other => fail(format!("not a refusal: {other:?}")),
    }
}

pub(super) fn what_cannot_be_taken_is_refused_by_name(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| a.hlt())?;
    let good = guest.vcpu.save_state()?;
    let vcpu = &mut *guest.vcpu;

    let mut state = good.clone();
    set(&mut state, 0x1234_5678, 0);
    // A register that is not here and was zero is skipped.
    vcpu.restore_state(&state)?;
    set(&mut state, 0x1234_5678, 1);
    let (element, reason) = refusal(vcpu, &state)?;
    same!(element, "msrs", "the element");
    ensure!(
        reason.contains("0x12345678"),
        "the reason does not name the MSR: {reason}"
    );

    let mut state = good.clone();
    if let Some(area) = &mut state.xsave {
        area.0[519] = 0x40; // component 62
        let (element, reason) = refusal(vcpu, &state)?;
        same!(element, "xsave", "the element");
        ensure!(
            reason.contains("62"),
            "the reason does not name the component: {reason}"
        );
    }

    let mut state = good.clone();
    if let Some(lapic) = &mut state.lapic {
        lapic.registers = Bytes(vec![0; 7]);
        same!(refusal(vcpu, &state)?.0, "lapic", "the element");
    }

    let mut state = good.clone();
    state.nested = Some(NestedState {
        format: NestedFormat::KvmVmx,
        data: Bytes(vec![1; 9]),
    });
    same!(refusal(vcpu, &state)?.0, "nested_state", "the element");

    if !hypervisor.capabilities().tsc_scaling {
        let mut state = good.clone();
        state.tsc_khz = state.tsc_khz.map(|khz| khz / 2);
        same!(refusal(vcpu, &state)?.0, "tsc_frequency", "the element");
        // 100 ppm are within tolerance.
        state.tsc_khz = good.tsc_khz.map(|khz| khz + khz / 10_000);
        vcpu.restore_state(&state)?;
    }

    let other = VcpuState {
        id: 3,
        ..good.clone()
    };
    let answer = vcpu.restore_state(&other);
    ensure!(
        matches!(answer, Err(Error::Invalid(_))),
        "the state of another vCPU: {answer:?}"
    );
    // The good state still goes in.
    Ok(vcpu.restore_state(&good)?)
}

/// Values that no processor can hold.
pub(super) fn impossible_registers_are_refused(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| a.hlt())?;
    let good = guest.vcpu.save_state()?;
    let vcpu = &mut *guest.vcpu;
    let mut state = good.clone();
    set(&mut state, 0xc000_0082, 1 << 62); // IA32_LSTAR takes canonical addresses only
    let (element, reason) = refusal(vcpu, &state)?;
    same!(element, "msrs", "the element");
    ensure!(
        reason.contains("0xc0000082"),
        "the reason does not name the MSR: {reason}"
    );
    let mut state = good.clone();
    state.special.cr0 = 0x8000_0000; // paging without protection
    same!(refusal(vcpu, &state)?.0, "special_registers", "the element");
    Ok(vcpu.restore_state(&good)?)
}

pub(super) fn xsave_areas_of_other_sizes_are_taken(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| a.hlt())?;
    let mut saved = guest.vcpu.save_state()?;
    make_unusual(hypervisor, &mut saved)?;
    guest.vcpu.restore_state(&saved)?;
    let saved = guest.vcpu.save_state()?;
    let Some(Bytes(area)) = saved.xsave.clone() else {
        return fail("no XSAVE area was saved");
    };
    for len in [832, area.len() + 4096] {
        let mut state = saved.clone();
        let mut other = area.clone();
        other.resize(len, 0);
        other[512..520].copy_from_slice(&3u64.to_le_bytes());
        state.xsave = Some(Bytes(other));
        guest.vcpu.restore_state(&state)?;
        let now = guest.vcpu.save_state()?.xsave.unwrap_or_default().0;
        same!(
            now.len(),
            area.len(),
            "the size after an area of {len} bytes"
        );
        same!(
            now[160..416],
            area[160..416],
            "XMM registers after an area of {len} bytes"
        );
    }
    Ok(())
}
