//! Pending events and activity: Hyper-V's registers and KVM's `kvm_vcpu_events` and MP state.

use kvm_bindings::*;

use crate::status::{self, Status};

/// Kinds of HV_X64_PENDING_INTERRUPTION_REGISTER (TLFS).
const EXTERNAL: u64 = 0;
const NMI: u64 = 2;
const EXCEPTION: u64 = 3;
const SOFTWARE: u64 = 4;

/// Kinds of a pending event (TLFS, HV_X64_PENDING_EVENT): an exception, an external interrupt.
const EVENT_EXCEPTION: u64 = 0;
const EVENT_EXTERNAL: u64 = 5;

/// HV_INTERNAL_ACTIVITY_REGISTER: bit 0 waits for a start-up IPI, bit 1 is halted.
pub(crate) fn activity(state: &kvm_mp_state) -> u64 {
    match state.mp_state {
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => 1,
        KVM_MP_STATE_HALTED => 2,
        _ => 0,
    }
}

pub(crate) fn set_activity(state: &mut kvm_mp_state, value: u64) -> Result<(), Status> {
    state.mp_state = match value {
        0 => KVM_MP_STATE_RUNNABLE,
        // KVM has two states for it; this one takes a start-up IPI at once, and an INIT too.
        1 | 3 => KVM_MP_STATE_INIT_RECEIVED,
        2 => KVM_MP_STATE_HALTED,
        _ => return Err(status::InvalidRegisterValue),
    };
    Ok(())
}

/// HV_X64_PENDING_INTERRUPTION_REGISTER: what was being delivered when the VP stopped.
pub(crate) fn pending_interruption(events: &kvm_vcpu_events) -> u64 {
    let word = |kind: u64, vector: u8| 1 | kind << 1 | u64::from(vector) << 16;
    if events.exception.injected != 0 {
        let error = match events.exception.has_error_code {
            0 => 0,
            _ => 1 << 4 | u64::from(events.exception.error_code) << 32,
        };
        word(EXCEPTION, events.exception.nr) | error
    } else if events.nmi.injected != 0 {
        word(NMI, 2)
    } else if events.interrupt.injected != 0 {
        word(
            if events.interrupt.soft != 0 {
                SOFTWARE
            } else {
                EXTERNAL
            },
            events.interrupt.nr,
        )
    } else {
        0
    }
}

pub(crate) fn set_pending_interruption(
    events: &mut kvm_vcpu_events,
    value: u64,
) -> Result<(), Status> {
    events.exception.injected = 0;
    events.nmi.injected = 0;
    events.interrupt.injected = 0;
    if value & 1 == 0 {
        return Ok(());
    }
    let vector = value >> 16 & 0xffff;
    let Ok(vector) = u8::try_from(vector) else {
        return Err(status::InvalidRegisterValue);
    };
    match value >> 1 & 7 {
        EXTERNAL => {
            (
                events.interrupt.injected,
                events.interrupt.nr,
                events.interrupt.soft,
            ) = (1, vector, 0);
        }
        SOFTWARE => {
            (
                events.interrupt.injected,
                events.interrupt.nr,
                events.interrupt.soft,
            ) = (1, vector, 1);
        }
        NMI => events.nmi.injected = 1,
        EXCEPTION if vector < 32 => {
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = (value >> 4 & 1) as u8;
            events.exception.error_code = (value >> 32) as u32;
        }
        _ => return Err(status::InvalidRegisterValue),
    }
    Ok(())
}

/// HV_X64_INTERRUPT_STATE_REGISTER: bit 0 shadow of STI or MOV SS, bit 1 NMIs masked.
pub(crate) fn interrupt_state(events: &kvm_vcpu_events) -> u64 {
    u64::from(events.interrupt.shadow != 0) | u64::from(events.nmi.masked != 0) << 1
}

pub(crate) fn set_interrupt_state(events: &mut kvm_vcpu_events, value: u64) -> Result<(), Status> {
    if value >> 2 != 0 {
        return Err(status::InvalidRegisterValue);
    }
    events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
    // Which of STI and MOV SS it was does not matter for what is held back: KVM's bit of STI.
    events.interrupt.shadow = if value & 1 != 0 {
        KVM_X86_SHADOW_INT_STI as u8
    } else {
        0
    };
    events.nmi.masked = (value >> 1 & 1) as u8;
    Ok(())
}

/// HV_X64_PENDING_EXCEPTION_EVENT: an exception that is to be raised on entry.
pub(crate) fn pending_event(events: &kvm_vcpu_events) -> [u64; 2] {
    if events.exception.pending == 0 {
        return [0; 2];
    }
    let head = 1 | EVENT_EXCEPTION << 1 | u64::from(events.exception.nr) << 16;
    let error = match events.exception.has_error_code {
        0 => 0,
        _ => 1 << 8 | u64::from(events.exception.error_code) << 32,
    };
    [head | error, events.exception_payload]
}

/// Page fault and debug exception carry a parameter (CR2, DR6).
const PAGE_FAULT: u8 = 14;
const DEBUG: u8 = 1;

pub(crate) fn set_pending_event(
    events: &mut kvm_vcpu_events,
    [head, parameter]: [u64; 2],
) -> Result<(), Status> {
    events.exception.pending = 0;
    events.exception_has_payload = 0;
    if head & 1 == 0 {
        return Ok(());
    }
    let vector = head >> 16 & 0xffff;
    let Ok(vector) = u8::try_from(vector) else {
        return Err(status::InvalidRegisterValue);
    };
    match head >> 1 & 7 {
        EVENT_EXCEPTION if vector < 32 && vector != 2 => {
            events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
            events.exception.injected = 0;
            events.exception.pending = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = (head >> 8 & 1) as u8;
            events.exception.error_code = (head >> 32) as u32;
            if matches!(vector, PAGE_FAULT | DEBUG) {
                events.exception_has_payload = 1;
                events.exception_payload = parameter;
            }
        }
        // HV_X64_PENDING_EXT_INT_EVENT has its vector in bits 8 to 15.
        EVENT_EXTERNAL => {
            let vector = (head >> 8 & 0xff) as u8;
            (
                events.interrupt.injected,
                events.interrupt.nr,
                events.interrupt.soft,
            ) = (1, vector, 0);
        }
        _ => return Err(status::InvalidRegisterValue),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_pending_interruption_survives() {
        for value in [
            0,
            1 | 0x31 << 16,
            1 | NMI << 1 | 2 << 16,
            1 | SOFTWARE << 1 | 0x80 << 16,
        ] {
            let mut events = kvm_vcpu_events::default();
            set_pending_interruption(&mut events, value).expect("it is valid");
            assert_eq!(pending_interruption(&events), value);
        }
        let fault = 1 | EXCEPTION << 1 | 1 << 4 | 13 << 16 | 0x1234 << 32;
        let mut events = kvm_vcpu_events::default();
        set_pending_interruption(&mut events, fault).expect("it is valid");
        assert_eq!(pending_interruption(&events), fault);
        assert!(set_pending_interruption(&mut events, 1 | 1 << 1).is_err());
    }

    #[test]
    fn a_page_fault_keeps_its_address() {
        let mut events = kvm_vcpu_events::default();
        let event = [1 | 1 << 8 | 14 << 16 | 6 << 32, 0xdead_b000];
        set_pending_event(&mut events, event).expect("it is valid");
        assert_eq!(pending_event(&events), event);
        set_pending_event(&mut events, [0, 0]).expect("it is valid");
        assert_eq!(pending_event(&events)[0], 0);
    }
}
