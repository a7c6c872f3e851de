//! What a state holds on KVM alone.

use arch::x86_64::state::{Msr, PendingException};
use backend::guest::Guest;

use crate::kvm;

/// An exception that is pending, not yet injected, keeps its payload (KVM_CAP_EXCEPTION_PAYLOAD).
#[test]
fn the_payload_of_a_pending_exception_travels() {
    let Some(kvm) = kvm() else { return };
    let pending = PendingException {
        vector: 14,
        error_code: Some(2),
        payload: Some(0xdead_f000),
        injected: false,
    };
    let mut first = Guest::new(&*kvm).expect("a guest");
    first
        .change(|state| state.events.exception = Some(pending))
        .expect("a state");
    let saved = first.vcpu.save_state().expect("save");
    assert_eq!(saved.events.exception, Some(pending));
    let mut second = Guest::new(&*kvm).expect("a guest");
    second.vcpu.restore_state(&saved).expect("restore");
    let again = second.vcpu.save_state().expect("save");
    assert_eq!(again.events, saved.events);
}

/// The paravirtual clock's registers are among those that are saved.
#[test]
fn the_clocks_registers_travel() {
    let Some(kvm) = kvm() else { return };
    // MSR_KVM_SYSTEM_TIME_NEW (Documentation/virt/kvm/x86/msr.rst).
    const SYSTEM_TIME: u32 = 0x4b56_4d01;
    let value = |guest: &Guest| {
        let state = guest.vcpu.save_state().expect("save");
        let msr = state.msrs.iter().find(|msr| msr.index == SYSTEM_TIME);
        msr.map(|msr| msr.value)
    };
    let mut first = Guest::new(&*kvm).expect("a guest");
    first
        .change(|state| {
            for msr in state.msrs.iter_mut().filter(|msr| msr.index == SYSTEM_TIME) {
                msr.value = 0x7000 | 1;
            }
        })
        .expect("a state");
    assert_eq!(value(&first), Some(0x7001));
    let state = first.vcpu.save_state().expect("save");
    let mut second = Guest::new(&*kvm).expect("a guest");
    second.vcpu.restore_state(&state).expect("restore");
    assert_eq!(value(&second), Some(0x7001));
}

/// KVM takes fewer than 256 registers a call. Some hosts list more.
#[test]
fn any_number_of_registers_travels() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&*kvm).expect("a guest");
    let mut state = guest.vcpu.save_state().expect("save");
    // LSTAR, over and over.
    for count in [255, 256, 257, 600] {
        state.msrs = vec![
            Msr {
                index: 0xc000_0082,
                value: count,
            };
            count as usize
        ];
        guest.vcpu.restore_state(&state).expect("restore");
        let saved = guest.vcpu.save_state().expect("save");
        let lstar = saved.msrs.iter().find(|msr| msr.index == 0xc000_0082);
        assert_eq!(lstar.map(|msr| msr.value), Some(count));
    }
}
