//! Interrupts on their way into the guest.

use hypervisor::{GsiRoute, Hypervisor, Msi, Vm};
use iced_x86::code_asm::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{APIC, Access, CODE, DATA, Guest, Idioms as _, MORE_DATA};
use crate::outcome::{Outcome, ensure, same};

/// Level-triggered, asserted (SDM vol. 3, section 11.11.2).
const LEVEL: u32 = 0xc000;
/// Delivery mode NMI (SDM vol. 3, section 11.11.2).
const NMI: u32 = 0x400;

/// Where programs put handlers of their own.
const HANDLER: u64 = 0x1_3000;

/// A message to the local APIC 0, in physical mode.
fn msi(data: u32) -> Msi {
    Msi {
        address: APIC,
        data,
    }
}

pub(super) fn event() -> Outcome<EventFd> {
    Ok(EventFd::new(EFD_NONBLOCK)?)
}

/// Interrupts on, and a loop that counts at [`DATA`].
fn counting(hypervisor: &dyn Hypervisor, ring: u16) -> Outcome<Guest> {
    let mut guest = Guest::in_ring(hypervisor, ring, &|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(qword_ptr(DATA))?;
        a.jmp(again)
    })?;
    guest.enable_apic()?;
    guest.change(|state| state.general.rflags |= 0x200)?;
    guest.stop_at_interrupts(true);
    Ok(guest)
}

/// A message that comes before the run, and one that comes during it.
pub(super) fn messages(hypervisor: &dyn Hypervisor) -> Outcome {
    for ring in [0, 3] {
        let mut guest = counting(hypervisor, ring)?;
        guest.vm.signal_msi(msi(0x40))?;
        guest.run()?;
        same!(
            guest.interrupts(0x40),
            1,
            "interrupts before the run in ring {ring}"
        );
        signal_while_running(&mut guest, |vm| Ok(vm.signal_msi(msi(0x41))?))?;
        same!(
            guest.interrupts(0x41),
            1,
            "interrupts during the run in ring {ring}"
        );
        same!(guest.interrupts(0x40), 1, "interrupts of the first vector");
        same!(guest.bus.take(), [], "ends of edge-triggered interrupts");
    }
    Ok(())
}

/// Runs the guest until it stops; `signal` is called once it has counted on.
fn signal_while_running(
    guest: &mut Guest,
    signal: impl FnOnce(&dyn Vm) -> Outcome + Send,
) -> Outcome {
    let vm = std::sync::Arc::clone(&guest.vm);
    let before = guest.ram.read_u64(DATA);
    let ended = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (ram, ended) = (&guest.ram, &ended);
        let signaller = scope.spawn(move || {
            while ram.read_u64(DATA) == before && !ended.load(std::sync::atomic::Ordering::SeqCst) {
                std::thread::yield_now();
            }
            signal(&*vm)
        });
        let exit = crate::watchdog::run(&mut *guest.vcpu, &guest.bus);
        ended.store(true, std::sync::atomic::Ordering::SeqCst);
        ensure!(
            matches!(exit?, hypervisor::VcpuExit::Interrupted),
            "the run ended otherwise"
        );
        signaller
            .join()
            .unwrap_or_else(|_| crate::outcome::fail("the signaller panicked"))
    })
}

pub(super) fn irqfds_follow_their_routes(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = counting(hypervisor, 3)?;
    let irq = event()?;
    // Registering before there is a route is allowed.
    guest.vm.register_irqfd(&irq, 24)?;
    let route = |vector| GsiRoute {
        gsi: 24,
        msi: msi(vector),
    };
    guest.vm.set_gsi_routes(&[route(0x41)])?;
    irq.write(1)?;
    guest.run()?;
    same!(guest.interrupts(0x41), 1, "interrupts by the first route");
    guest.vm.set_gsi_routes(&[route(0x42)])?;
    signal_while_running(&mut guest, |_| Ok(irq.write(1)?))?;
    same!(guest.interrupts(0x42), 1, "interrupts by the second route");
    guest.vm.unregister_irqfd(&irq, 24)?;
    irq.write(1)?;
    // Nothing is delivered any more: only the kick ends the run, and not before a delivery would have.
    let kick = guest.vcpu.kick_handle();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            kick.kick();
        });
        guest.run()
    })?;
    same!(
        [0x41, 0x42].map(|vector| guest.interrupts(vector)),
        [1, 1],
        "interrupts after the end"
    );
    Ok(())
}

pub(super) fn routes_without_end_are_refused(hypervisor: &dyn Hypervisor) -> Outcome {
    let guest = Guest::new(hypervisor)?;
    let route = GsiRoute {
        gsi: 30,
        msi: msi(0x40),
    };
    ensure!(
        guest.vm.set_gsi_routes(&vec![route; 5000]).is_err(),
        "5000 routes were taken"
    );
    Ok(())
}

/// With IF clear an interrupt waits; STI lets it in, but not before the end of the next instruction.
pub(super) fn the_window_opens_with_sti(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.stop()?;
        a.mov(dword_ptr(DATA), 1)?;
        a.stop()?;
        a.sti()?;
        a.mov(dword_ptr(DATA), 2)?;
        // A hypervisor that interprets ring 0 may look for interrupts at longer intervals than an instruction.
        a.spin()
    })?;
    // The handler looks at how far the guest was.
    guest.place(64, HANDLER, &|a| {
        a.mov(eax, dword_ptr(DATA))?;
        a.mov(dword_ptr(MORE_DATA), eax)?;
        a.mov(rax, qword_ptr(rsp))?;
        a.mov(qword_ptr(MORE_DATA + 8), rax)?;
        a.mov(eax, APIC as u32 + 0xb0)?;
        a.mov(dword_ptr(rax), 0)?;
        a.stop_for_good()
    })?;
    guest.handle(0x43, HANDLER);
    guest.enable_apic()?;
    guest.run()?;
    guest.vm.signal_msi(msi(0x43))?;
    guest.run()?;
    same!(guest.ram.read_u32(DATA), 1, "progress with interrupts off");
    same!(
        guest.ram.read_u64(MORE_DATA + 8),
        0,
        "what the handler noted before STI"
    );
    guest.run()?;
    same!(
        guest.ram.read_u32(MORE_DATA),
        2,
        "progress when the interrupt came: one instruction after STI at least"
    );
    let spin = CODE + 2 + 11 + 2 + 1 + 11;
    same!(guest.ram.read_u64(MORE_DATA + 8), spin, "the saved RIP");
    Ok(())
}

/// An interrupt that waits when the state is saved is there after the restore.
pub(super) fn a_waiting_interrupt_travels(hypervisor: &dyn Hypervisor) -> Outcome {
    let build = || -> Outcome<Guest> {
        let guest = Guest::long(hypervisor, &|a| {
            a.stop()?;
            a.push(0x202)?;
            a.popfq()?;
            a.spin()
        })?;
        guest.stop_at_interrupts(true);
        Ok(guest)
    };
    let mut first = build()?;
    first.enable_apic()?;
    first.run()?;
    first.vm.signal_msi(msi(0x44))?;
    let state = first.vcpu.save_state()?;
    let mut second = build()?;
    second.vcpu.restore_state(&state)?;
    second.run()?;
    same!(
        second.interrupts(0x44),
        1,
        "interrupts in the second machine"
    );
    first.run()?;
    same!(
        first.interrupts(0x44),
        1,
        "interrupts in the first machine, which goes on too"
    );
    Ok(())
}

/// Of those that wait the highest comes first (SDM vol. 3, section 11.8.3).
pub(super) fn priorities(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        let mut wait = a.create_label();
        a.push(0x202)?;
        a.popfq()?;
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(DATA), 0x1_0000)?;
        a.jb(wait)?;
        a.stop_for_good()
    })?;
    for (vector, at) in [
        (0x51u8, HANDLER),
        (0x71, HANDLER + 0x100),
        (0x61, HANDLER + 0x200),
    ] {
        guest.place(64, at, &|a| {
            a.shl(qword_ptr(DATA), 8)?;
            a.or(qword_ptr(DATA), i32::from(vector))?;
            a.mov(eax, APIC as u32 + 0xb0)?;
            a.mov(dword_ptr(rax), 0)?;
            a.iretq()
        })?;
        guest.handle(vector, at);
    }
    guest.enable_apic()?;
    for vector in [0x51, 0x71, 0x61] {
        guest.vm.signal_msi(msi(vector))?;
    }
    guest.run()?;
    same!(
        guest.ram.read_u64(DATA),
        0x71_61_51,
        "the order of the interrupts"
    );
    Ok(())
}

pub(super) fn hlt_wakes_by_a_message(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(qword_ptr(DATA))?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.jmp(again)
    })?;
    guest.enable_apic()?;
    guest.stop_at_interrupts(true);
    for round in 1..=20 {
        signal_while_running(&mut guest, |vm| {
            // Mostly it is halted by then; either way it must wake.
            std::thread::sleep(std::time::Duration::from_micros(300));
            Ok(vm.signal_msi(msi(0x45))?)
        })?;
        same!(guest.interrupts(0x45), round, "interrupts");
    }
    Ok(())
}

/// Once in the handler another NMI waits until IRET (SDM vol. 3, section 6.7.1).
pub(super) fn nmi_by_a_message(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::user(hypervisor, &|a| a.spin())?;
    guest.enable_apic()?;
    guest.stop_at_interrupts(true);
    // Interrupts are off, which an NMI does not care about.
    guest.vm.signal_msi(msi(NMI))?;
    guest.run()?;
    same!(guest.interrupts(2), 1, "NMIs");
    same!(
        guest.vcpu.save_state()?.events.nmi_masked,
        true,
        "NMIs are masked in the handler"
    );
    guest.vm.signal_msi(msi(NMI))?;
    guest.run()?;
    same!(guest.interrupts(2), 2, "NMIs after the IRET");
    Ok(())
}

pub(super) fn the_end_of_a_level_triggered_one_is_reported(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = counting(hypervisor, 0)?;
    guest.stop_at_interrupts(false);
    let message = msi(0x42 | LEVEL);
    guest.vm.set_gsi_routes(&[GsiRoute {
        gsi: 4,
        msi: message,
    }])?;
    for round in 1..=3 {
        guest.vm.signal_msi(message)?;
        guest.run()?;
        same!(
            guest.bus.take(),
            [Access::EndOfInterrupt(0x42)],
            "ends of interrupt"
        );
        // The end is reported from within the handler, which may not have returned yet.
        same!(guest.interrupts(0x42), round, "interrupts");
    }
    Ok(())
}

/// The local APIC's own timer, in one-shot mode (SDM vol. 3, section 11.5.4).
pub(super) fn the_local_timer_wakes(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.mov(edi, APIC as u32)?;
        // Divide by 1; vector 0x46, one-shot; 100,000 ticks.
        a.mov(dword_ptr(rdi + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rdi + 0x320), 0x46)?;
        a.mov(dword_ptr(rdi + 0x380), 100_000)?;
        a.sti()?;
        a.hlt()?;
        a.mov(eax, dword_ptr(rdi + 0x390))?;
        a.mov(qword_ptr(DATA), rax)?;
        a.stop_for_good()
    })?;
    guest.enable_apic()?;
    guest.run()?;
    same!(guest.interrupts(0x46), 1, "timer interrupts");
    same!(
        guest.ram.read_u64(DATA),
        0,
        "the current count of a one-shot timer that has fired"
    );
    Ok(())
}

/// An interrupt that a vCPU sends to itself.
pub(super) fn self_ipi(hypervisor: &dyn Hypervisor) -> Outcome {
    let mut guest = Guest::long(hypervisor, &|a| {
        a.mov(edi, APIC as u32)?;
        a.sti()?;
        // Destination shorthand: self (SDM vol. 3, section 11.6.1).
        a.mov(dword_ptr(rdi + 0x300), 0x4_0047)?;
        a.spin()
    })?;
    guest.stop_at_interrupts(true);
    guest.enable_apic()?;
    guest.run()?;
    same!(guest.interrupts(0x47), 1, "interrupts");
    Ok(())
}
