//! Exceptions, interrupts and NMIs on their way, and what a VP is doing.
//!
//! ```text
//!   being delivered ──► HV_REGISTER_PENDING_INTERRUPTION   bit 0 there is one   3:1 type   4 with error code
//!                                                          8:5 instruction length   31:16 vector   63:32 error code
//!   queued exception ─► HV_REGISTER_PENDING_EVENT0         bit 0 there is one   3:1 type 0   8 with error code
//!                                                          31:16 vector   63:32 error code   127:64 parameter
//!   shadow, NMI mask ─► HV_REGISTER_INTERRUPT_STATE        bit 0 shadow   1 NMIs masked
//!   activity ─────────► HV_REGISTER_INTERNAL_ACTIVITY_STATE bit 0 waits for start-up   1 halted
//! ```
//! (TLFS, virtual processor registers; Linux `include/hyperv/hvgdk_mini.h`.)

use arch::x86_64::state::{
    Activity, PendingEvents, PendingException, PendingInterrupt, Segment, StateElement, VcpuState,
};
use mshv_bindings::{
    hv_register_name_HV_REGISTER_INTERNAL_ACTIVITY_STATE as ACTIVITY,
    hv_register_name_HV_REGISTER_INTERRUPT_STATE as INTERRUPT_STATE,
    hv_register_name_HV_REGISTER_PENDING_EVENT0 as PENDING_EVENT0,
    hv_register_name_HV_REGISTER_PENDING_EVENT1 as PENDING_EVENT1,
    hv_register_name_HV_REGISTER_PENDING_INTERRUPTION as PENDING_INTERRUPTION,
    hv_register_name_HV_X64_REGISTER_RFLAGS as RFLAGS,
};

use super::{lapic, refused};
use crate::Result;
use crate::mshv::registers::{self, Register, Words};
use crate::mshv::vcpu::MshvVcpu;

// HV_X64_PENDING_INTERRUPTION_TYPE.
const EXTERNAL: u64 = 0;
const NMI: u64 = 2;
const EXCEPTION: u64 = 3;
const SOFT_INTERRUPT: u64 = 4;
const PRIVILEGED_SOFT_EXCEPTION: u64 = 5;
const SOFT_EXCEPTION: u64 = 6;

/// Interrupt shadow in the neutral state: by STI. The hypervisor does not say which instruction it was.
const SHADOW_BY_STI: u8 = 0b10;
/// By MOV SS.
const SHADOW_BY_MOV_SS: u8 = 0b01;
/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;
/// #PF.
const PAGE_FAULT: u8 = 14;
/// HV_X64_PENDING_EVENT_TYPE of an exception.
const EVENT_EXCEPTION: u64 = 0;

/// A queued exception as PENDING_EVENT0 has it.
pub(crate) fn exception_event(exception: &PendingException) -> Register {
    let error = exception.error_code;
    let low = 1
        | EVENT_EXCEPTION << 1
        | u64::from(error.is_some()) << 8
        | u64::from(exception.vector) << 16
        | u64::from(error.unwrap_or(0)) << 32;
    Register {
        name: PENDING_EVENT0,
        value: [low, exception.payload.unwrap_or(0)],
    }
}

/// Ends the interrupt shadow; NMIs stay as masked as they are.
pub(crate) fn without_shadow(interrupt_state: Words) -> Register {
    Register::new(INTERRUPT_STATE, interrupt_state[0] & !1)
}

/// HV_REGISTER_INTERRUPT_STATE.
pub(crate) const SHADOW_REGISTER: u32 = INTERRUPT_STATE;

pub(super) fn save(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    let [
        [interruption, _],
        event,
        other,
        [interrupt_state, _],
        [rflags, _],
    ] = registers::read_array(
        &vcpu.fd,
        &[
            PENDING_INTERRUPTION,
            PENDING_EVENT0,
            PENDING_EVENT1,
            INTERRUPT_STATE,
            RFLAGS,
        ],
    )?;
    let nmi_pending = lapic::read(&vcpu.fd)?.apic_irr[0] & lapic::NMI_REQUEST != 0;
    state.events = events_from(interruption, event, other, interrupt_state, nmi_pending)
        .map_err(|reason| refused(vcpu, StateElement::Events, reason))?;
    // After STI interrupts are on; a processor refuses to enter a guest of which only one of the two is said.
    if state.events.interrupt_shadow != 0 && rflags & INTERRUPT_FLAG == 0 {
        state.events.interrupt_shadow = SHADOW_BY_MOV_SS;
    }
    Ok(())
}

pub(super) fn restore(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    let mut events = state.events;
    // A page fault of which no address was said has it in CR2 already, where the hypervisor would put the parameter.
    if let Some(exception) = &mut events.exception
        && exception.vector == PAGE_FAULT
    {
        exception.payload.get_or_insert(state.special.cr2);
    }
    let table = events_to(&events).map_err(|reason| refused(vcpu, StateElement::Events, reason))?;
    // A waiting NMI has gone with the local APIC.
    registers::write(&vcpu.fd, &table)
}

fn events_from(
    interruption: u64,
    event: Words,
    other: Words,
    interrupt_state: u64,
    nmi_pending: bool,
) -> std::result::Result<PendingEvents, String> {
    let mut events = PendingEvents {
        interrupt_shadow: if interrupt_state & 1 != 0 {
            SHADOW_BY_STI
        } else {
            0
        },
        nmi_masked: interrupt_state & 2 != 0,
        nmi_pending,
        ..PendingEvents::default()
    };
    if interruption & 1 != 0 {
        let vector = (interruption >> 16) as u8;
        let error_code = (interruption & 1 << 4 != 0).then_some((interruption >> 32) as u32);
        match interruption >> 1 & 0b111 {
            EXTERNAL => {
                events.interrupt = Some(PendingInterrupt {
                    vector,
                    soft: false,
                });
            }
            SOFT_INTERRUPT => events.interrupt = Some(PendingInterrupt { vector, soft: true }),
            NMI => events.nmi_injected = true,
            EXCEPTION | PRIVILEGED_SOFT_EXCEPTION | SOFT_EXCEPTION => {
                events.exception = Some(PendingException {
                    vector,
                    error_code,
                    payload: None,
                    injected: true,
                });
            }
            kind => return Err(format!("an event of type {kind} is being delivered")),
        }
    }
    if other[0] & 1 != 0 {
        return Err("a second event is pending".to_owned());
    }
    if event[0] & 1 != 0 {
        if event[0] >> 1 & 0b111 != EVENT_EXCEPTION {
            return Err(format!(
                "an event of type {} is pending",
                event[0] >> 1 & 0b111
            ));
        }
        if events.exception.is_some() {
            return Err("an exception is pending while another is being delivered".to_owned());
        }
        let vector = (event[0] >> 16) as u8;
        events.exception = Some(PendingException {
            vector,
            error_code: (event[0] & 1 << 8 != 0).then_some((event[0] >> 32) as u32),
            // Debug exceptions and page faults have one (for DR6 and CR2).
            payload: matches!(vector, 1 | 14).then_some(event[1]),
            injected: false,
        });
    }
    Ok(events)
}

fn events_to(events: &PendingEvents) -> std::result::Result<Vec<Register>, &'static str> {
    if events.smm || events.smi_pending {
        return Err(
            "the vCPU is in, or on its way into, system management mode, which is not there",
        );
    }
    if events.triple_fault_pending {
        return Err("a triple fault is waiting to be reported");
    }
    let pending = |kind: u64, length: u64, vector: u8, error: Option<u32>| {
        1 | kind << 1
            | u64::from(error.is_some()) << 4
            | length << 5
            | u64::from(vector) << 16
            | u64::from(error.unwrap_or(0)) << 32
    };
    let (mut interruption, mut event) = (0, [0; 2]);
    match (&events.exception, &events.interrupt, events.nmi_injected) {
        (Some(exception), None, false) if exception.injected => {
            // INT3 and INTO are the ones that an instruction of one byte makes.
            let (kind, length) = if matches!(exception.vector, 3 | 4) {
                (SOFT_EXCEPTION, 1)
            } else {
                (EXCEPTION, 0)
            };
            interruption = pending(kind, length, exception.vector, exception.error_code);
        }
        (exception, interrupt, nmi) => {
            if let Some(exception) = exception {
                if exception.injected {
                    return Err("an exception and an interrupt are being delivered at once");
                }
                event = exception_event(exception).value;
            }
            match (interrupt, nmi) {
                (Some(_), true) => {
                    return Err("an interrupt and an NMI are being delivered at once");
                }
                // INT n has two bytes.
                (Some(interrupt), false) if interrupt.soft => {
                    interruption = pending(SOFT_INTERRUPT, 2, interrupt.vector, None);
                }
                (Some(interrupt), false) => {
                    interruption = pending(EXTERNAL, 0, interrupt.vector, None);
                }
                (None, true) => interruption = pending(NMI, 0, 2, None),
                (None, false) => {}
            }
        }
    }
    let shadow = u64::from(events.interrupt_shadow != 0);
    let masked = u64::from(events.nmi_masked) << 1;
    Ok(vec![
        Register::new(PENDING_INTERRUPTION, interruption),
        Register {
            name: PENDING_EVENT0,
            value: event,
        },
        Register::new(INTERRUPT_STATE, shadow | masked),
    ])
}

pub(super) fn save_activity(vcpu: &MshvVcpu, state: &mut VcpuState) -> Result<()> {
    let [[activity, _]] = registers::read_array(&vcpu.fd, &[ACTIVITY])?;
    state.activity = activity_from(activity);
    Ok(())
}

fn activity_from(register: u64) -> Activity {
    match (register & 1 != 0, register & 2 != 0) {
        (true, _) => Activity::WaitForSipi,
        (false, true) => Activity::Halted,
        (false, false) => Activity::Running,
    }
}

pub(super) fn restore_activity(vcpu: &MshvVcpu, state: &VcpuState) -> Result<()> {
    let register = match state.activity {
        Activity::Running => 0,
        Activity::Halted => 2,
        Activity::Uninitialized | Activity::WaitForSipi => 1,
        Activity::SipiReceived => {
            // The hypervisor has no such state: the VP begins where the start-up IPI sends it (SDM vol. 3, section 9.4.4).
            let vector = state.events.sipi_vector.unwrap_or(0);
            let mut special = state.special;
            special.cs = Segment {
                selector: u16::from(vector) << 8,
                base: u64::from(vector) << 12,
                ..special.cs
            };
            let mut general = state.general;
            general.rip = 0;
            registers::set_special(&vcpu.fd, &special)?;
            registers::set_general(&vcpu.fd, &general)?;
            0
        }
    };
    registers::write(&vcpu.fd, &[Register::new(ACTIVITY, register)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn back(events: &PendingEvents) -> PendingEvents {
        let table = events_to(events).expect("can be expressed");
        let value = |name| {
            table
                .iter()
                .find(|register| register.name == name)
                .expect("written")
                .value
        };
        events_from(
            value(PENDING_INTERRUPTION)[0],
            value(PENDING_EVENT0),
            [0; 2],
            value(INTERRUPT_STATE)[0],
            events.nmi_pending,
        )
        .expect("can be read")
    }

    proptest! {
        #[test]
        fn there_and_back(vector in any::<u8>(), error in any::<Option<u32>>(), kind in 0..5, flags in any::<[bool; 3]>()) {
            let exception = |injected, payload| Some(PendingException { vector, error_code: error, payload, injected });
            let mut events = PendingEvents {
                interrupt_shadow: if flags[0] { SHADOW_BY_STI } else { 0 },
                nmi_masked: flags[1],
                nmi_pending: flags[2],
                ..PendingEvents::default()
            };
            match kind {
                0 => events.exception = exception(true, None),
                1 => events.exception = exception(false, matches!(vector, 1 | 14).then_some(0x1234)),
                2 => events.interrupt = Some(PendingInterrupt { vector, soft: false }),
                3 => events.interrupt = Some(PendingInterrupt { vector, soft: true }),
                _ => events.nmi_injected = true,
            }
            prop_assert_eq!(back(&events), events);
        }
    }

    #[test]
    fn what_cannot_be_expressed_is_refused() {
        let refused = |change: fn(&mut PendingEvents)| {
            let mut events = PendingEvents::default();
            change(&mut events);
            events_to(&events).is_err()
        };
        assert!(refused(|e| e.smm = true));
        assert!(refused(|e| e.triple_fault_pending = true));
        assert!(refused(|e| {
            e.nmi_injected = true;
            e.interrupt = Some(PendingInterrupt::default());
        }));
        assert!(events_from(1 | 7 << 1, [0; 2], [0; 2], 0, false).is_err());
        assert!(events_from(0, [1 | 5 << 1, 0], [0; 2], 0, false).is_err());
    }

    #[test]
    fn our_bits_are_the_bindings_bits() {
        use mshv_bindings::{hv_x64_pending_exception_event, hv_x64_pending_interruption_register};
        let exception = PendingException {
            vector: 14,
            error_code: Some(6),
            payload: Some(0xdead_0000),
            injected: true,
        };
        let events = PendingEvents {
            exception: Some(exception),
            ..PendingEvents::default()
        };
        let register = hv_x64_pending_interruption_register {
            as_uint64: events_to(&events).expect("fits")[0].value[0],
        };
        // SAFETY: both views are integers of the same bytes.
        let bits = unsafe { register.__bindgen_anon_1 };
        assert_eq!(
            (
                bits.interruption_pending(),
                u64::from(bits.interruption_type()),
                bits.deliver_error_code(),
                bits.interruption_vector(),
                { bits.error_code }
            ),
            (1, EXCEPTION, 1, 14, 6)
        );
        let event = hv_x64_pending_exception_event {
            as_uint64: exception_event(&exception).value,
        };
        // SAFETY: as above.
        let bits = unsafe { event.__bindgen_anon_1 };
        assert_eq!(
            (
                bits.event_pending(),
                bits.event_type(),
                bits.deliver_error_code(),
                bits.vector(),
                { bits.error_code },
                { bits.exception_parameter }
            ),
            (1, 0, 1, 14, 6, 0xdead_0000)
        );
    }

    #[test]
    fn activities() {
        assert_eq!(activity_from(0), Activity::Running);
        assert_eq!(activity_from(2), Activity::Halted);
        assert_eq!(activity_from(1), Activity::WaitForSipi);
        assert_eq!(activity_from(3), Activity::WaitForSipi);
    }
}
