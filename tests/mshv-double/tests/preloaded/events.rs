//! What the client makes pending: exceptions, NMIs, and word of when an external interrupt can be delivered.

use std::thread::{self, sleep};
use std::time::Duration;

use libtest_mimic::Trial;
use mshv_bindings::*;
use mshv_ioctls::InterruptRequest;

use crate::guest::{CODE, Guest};
use crate::interrupts::request;
use crate::trial;

const RIP: u32 = hv_register_name_HV_X64_REGISTER_RIP;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("an_injected_exception", an_injected_exception),
        trial("a_pending_exception_stays", a_pending_exception_stays),
        trial("an_nmi", an_nmi),
        trial("an_interrupt_window", an_interrupt_window),
    ]
}

fn an_injected_exception() {
    // nop, with a handler of #DE at 0x6000: out 3, al
    let guest = Guest::new(&[0x90, 0xe6, 0x01]);
    guest.ram.write(0x6000, &[0xe6, 0x03]);
    guest.ram.write(0, &[0x00, 0x60, 0x00, 0x00]);
    // Pending, an exception, vector 0.
    guest.set(&[(hv_register_name_HV_REGISTER_PENDING_EVENT0, 1)]);
    assert_eq!(guest.get(hv_register_name_HV_REGISTER_PENDING_EVENT0), 1);
    assert_eq!({ guest.port().port_number }, 3);
    assert_eq!(guest.get(hv_register_name_HV_REGISTER_PENDING_EVENT0), 0);
}

fn a_pending_exception_stays() {
    // out 1, al; nop, with a handler of #UD at 0x6000: out 3, al
    let guest = Guest::new(&[0xe6, 0x01, 0x90, 0xe6, 0x02]);
    guest.ram.write(0x6000, &[0xe6, 0x03]);
    guest.ram.write(6 * 4, &[0x00, 0x60, 0x00, 0x00]);
    guest.port();
    // Set first, and other registers after it, in calls of their own.
    guest.set(&[(hv_register_name_HV_REGISTER_PENDING_EVENT0, 1 | 6 << 16)]);
    guest.set(&[(RIP, CODE + 2)]);
    guest.set(&[(hv_register_name_HV_X64_REGISTER_CR2, 0x1234)]);
    assert_eq!(
        guest.get(hv_register_name_HV_REGISTER_PENDING_EVENT0),
        1 | 6 << 16
    );
    assert_eq!({ guest.port().port_number }, 3);
    assert_eq!(guest.get(hv_register_name_HV_X64_REGISTER_CR2), 0x1234);
}

fn an_nmi() {
    // cli; hlt; out 1, al, with a handler of NMI that does out 2, al; iret
    let guest = Guest::new(&[0xfa, 0xf4, 0xe6, 0x01]);
    guest.ram.write(0x6000, &[0xe6, 0x02, 0xcf]);
    guest.ram.write(2 * 4, &[0x00, 0x60, 0x00, 0x00]);
    thread::scope(|scope| {
        scope.spawn(|| {
            sleep(Duration::from_millis(20));
            let kind = hv_interrupt_type_HV_X64_INTERRUPT_TYPE_NMI;
            let nmi = InterruptRequest {
                interrupt_type: kind,
                vector: 0,
                ..request(false)
            };
            guest.vm.request_virtual_interrupt(&nmi).expect("an NMI");
        });
        let message = guest.port();
        assert_eq!({ message.port_number }, 2);
    });
    // Further ones wait for IRET.
    assert_eq!(
        guest.get(hv_register_name_HV_REGISTER_INTERRUPT_STATE) & 2,
        2
    );
    guest.set(&[(RIP, 0x6002)]);
    assert_eq!({ guest.port().port_number }, 1);
    assert_eq!(
        guest.get(hv_register_name_HV_REGISTER_INTERRUPT_STATE) & 2,
        0
    );
}

fn an_interrupt_window() {
    // sti; nop; jmp $
    let guest = Guest::new(&[0xfb, 0x90, 0xeb, 0xfe]);
    let notifications = hv_register_name_HV_REGISTER_DELIVERABILITY_NOTIFICATIONS;
    guest.set(&[(notifications, 2)]);
    let window = |message: hv_message| {
        message.header.message_type == hv_message_type_HVMSG_X64_INTERRUPTION_DELIVERABLE
    };
    // Closed until STI has taken effect.
    assert!(window(guest.run()));
    assert!(guest.get(RIP) > CODE);
    assert_eq!(guest.get(notifications), 0, "told once");
    // An interrupt of the client's own: its handler does out 2, al.
    guest.ram.write(0x6000, &[0xe6, 0x02]);
    guest.ram.write(4 * 0x50, &[0x00, 0x60, 0x00, 0x00]);
    guest.set(&[(
        hv_register_name_HV_REGISTER_PENDING_INTERRUPTION,
        1 | 0x50 << 16,
    )]);
    assert_eq!({ guest.port().port_number }, 2);
    // Open right away: the client is told before the guest runs.
    guest.ram.write(CODE as usize + 2, &[0xe6, 0x01]);
    guest.set(&[
        (RIP, CODE + 1),
        (hv_register_name_HV_X64_REGISTER_RFLAGS, 0x202),
        (notifications, 2),
    ]);
    assert!(window(guest.run()));
    assert_eq!(guest.get(RIP), CODE + 1);
    assert_eq!({ guest.port().port_number }, 1);
}
