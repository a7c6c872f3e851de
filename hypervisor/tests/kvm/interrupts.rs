//! Interrupts in, and events out, without leaving the kernel.

use arch::x86_64::state::Segment;
use hypervisor::{GsiRoute, IoEventAddress, IoEventMatch, Msi};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{Access, DATA, Guest, SPIN, STOP16, STOP64, code, kvm};

/// Spurious-interrupt vector register, bit 8: the local APIC is on.
const SVR: usize = 0xf0;
/// Level-triggered, asserted (SDM vol. 3, section 11.11.2).
const LEVEL: u32 = 0xc000;

fn msi(vector: u32) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: vector,
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("eventfd")
}

/// A real-mode guest that spins with interrupts on; each interrupt counts at 0x2000, is acknowledged, and does `then`.
fn counting_guest(kvm: &dyn hypervisor::Hypervisor, then: &[u8]) -> Guest {
    let mut guest = Guest::real_mode(kvm, &code(&[&[0xfb], &SPIN])); // sti
    let handler = code(&[
        &[0x50, 0x52],                                     // push ax; push dx
        &[0xff, 0x06, 0x00, 0x20],                         // inc word [0x2000]
        &[0x64, 0x66, 0xc7, 0x06, 0xb0, 0x00, 0, 0, 0, 0], // mov dword fs:[0xb0], 0: end of interrupt
        then,
        &[0x5a, 0x58, 0xcf], // pop dx; pop ax; iret
    ]);
    guest.ram.write(0x1100, &handler);
    for vector in 0x40..0x50u64 {
        guest.ram.write(vector * 4, &[0x00, 0x11, 0, 0]);
    }
    guest.change(|state| {
        state.special.fs = Segment {
            selector: 0,
            base: 0xfee0_0000,
            limit: 0xffff,
            access: 0x93,
        };
        let lapic = state.lapic.as_mut().expect("a local APIC");
        lapic.registers.0[SVR..SVR + 4].copy_from_slice(&0x1ffu32.to_le_bytes());
    });
    guest
}

#[test]
fn messages_and_irqfds_interrupt_the_guest() {
    let Some(kvm) = kvm() else { return };
    let mut guest = counting_guest(&*kvm, &STOP16);
    guest.vm.signal_msi(msi(0x40)).expect("signal");
    guest.run();
    assert_eq!(guest.ram.read::<2>(DATA), [1, 0]);
    let irq = event();
    guest
        .vm
        .register_irqfd(&irq, 24)
        .expect("register before there is a route");
    guest
        .vm
        .set_gsi_routes(&[GsiRoute {
            gsi: 24,
            msi: msi(0x41),
        }])
        .expect("routes");
    irq.write(1).expect("write");
    guest.run();
    assert_eq!(guest.ram.read::<2>(DATA), [2, 0]);
    guest.vm.unregister_irqfd(&irq, 24).expect("unregister");
    irq.write(1).expect("write");
    // Nothing is delivered any more: only the kick ends the run.
    guest.bus.kick.kick();
    guest.run();
    assert_eq!(guest.ram.read::<2>(DATA), [2, 0]);
    assert_eq!(
        guest.bus.take(),
        [],
        "edge-triggered interrupts have no end of interrupt"
    );
}

#[test]
fn the_end_of_a_level_triggered_interrupt_of_the_ioapic_is_reported() {
    let Some(kvm) = kvm() else { return };
    let mut guest = counting_guest(&*kvm, &[]);
    let message = msi(0x42 | LEVEL);
    guest
        .vm
        .set_gsi_routes(&[GsiRoute {
            gsi: 4,
            msi: message,
        }])
        .expect("routes");
    guest.vm.signal_msi(message).expect("signal");
    guest.run();
    assert_eq!(guest.bus.take(), [Access::EndOfInterrupt(0x42)]);
}

#[test]
fn io_events_take_the_writes_that_match() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(
        &*kvm,
        &code(&[
            &[0xba, 0x30, 0, 0, 0, 0xb8, 5, 0, 0, 0, 0xef], // mov edx, 0x30; mov eax, 5; out dx, eax
            &[0xb8, 6, 0, 0, 0, 0xef],                      // mov eax, 6; out dx, eax
            &[0xbf, 0x00, 0x00, 0x00, 0x30],                // mov edi, 0x3000_0000
            &[0x66, 0x89, 0x07, 0x89, 0x07],                // mov [rdi], ax; mov [rdi], eax
            &[0x66, 0x89, 0x47, 0x10],                      // mov [rdi + 0x10], ax
            &STOP64,
            &SPIN,
        ]),
    );
    let (port, any, word) = (event(), event(), event());
    let exact = IoEventMatch::Value { size: 4, value: 5 };
    let two = IoEventMatch::Value { size: 2, value: 6 };
    let vm = &guest.vm;
    vm.register_ioevent(&port, IoEventAddress::Pio(0x30), exact)
        .expect("port");
    vm.register_ioevent(&any, IoEventAddress::Mmio(0x3000_0000), IoEventMatch::Any)
        .expect("any");
    vm.register_ioevent(&word, IoEventAddress::Mmio(0x3000_0010), two)
        .expect("word");
    let odd = IoEventMatch::Value { size: 3, value: 0 };
    assert!(
        vm.register_ioevent(&word, IoEventAddress::Pio(0x31), odd)
            .is_err()
    );
    let vm = std::sync::Arc::clone(vm);
    guest.run();
    assert_eq!(
        guest.bus.take(),
        [Access::Out(0x30, vec![6, 0, 0, 0])],
        "only what matches no event comes out"
    );
    assert_eq!(
        [port.read().ok(), any.read().ok(), word.read().ok()],
        [Some(1), Some(2), Some(1)]
    );
    vm.unregister_ioevent(&port, IoEventAddress::Pio(0x30), exact)
        .expect("unregister");
    assert!(
        vm.unregister_ioevent(&port, IoEventAddress::Pio(0x30), exact)
            .is_err(),
        "it is gone"
    );
}

#[test]
fn too_many_routes_are_refused() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&*kvm);
    assert!(
        guest
            .vm
            .set_gsi_routes(&vec![
                GsiRoute {
                    gsi: 30,
                    msi: msi(0x40)
                };
                5000
            ])
            .is_err()
    );
}
