//! Exceptions, interrupts, NMIs and SMIs on their way.
//!
//! The machine is created with KVM_CAP_EXCEPTION_PAYLOAD and KVM_CAP_X86_TRIPLE_FAULT_EVENT where KVM has them, so that a pending
//! exception is told from an injected one, and a triple fault that waits to be reported is not lost.

use arch::x86_64::state::{
    PendingEvents, PendingException, PendingInterrupt, StateElement, VcpuState,
};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    kvm_vcpu_events,
};

use super::refused;
use crate::Result;
use crate::kvm::call;
use crate::kvm::vcpu::KvmVcpu;

/// What KVM's structure can express on this host.
#[derive(Clone, Copy)]
struct Expressible {
    payload: bool,
    triple_fault: bool,
}

fn expressible(vcpu: &KvmVcpu) -> Expressible {
    let host = &vcpu.vm.host;
    Expressible {
        payload: host.exception_payload,
        triple_fault: host.triple_fault_event,
    }
}

/// Reads what is on its way.
pub(crate) fn read(vcpu: &KvmVcpu) -> Result<PendingEvents> {
    let events = vcpu
        .fd
        .get_vcpu_events()
        .map_err(call("KVM_GET_VCPU_EVENTS"))?;
    Ok(from_kvm(&events))
}

pub(super) fn save(vcpu: &KvmVcpu, state: &mut VcpuState) -> Result<()> {
    state.events = read(vcpu)?;
    Ok(())
}

pub(super) fn restore(vcpu: &KvmVcpu, state: &VcpuState) -> Result<()> {
    write(vcpu, &state.events)
}

/// Writes what is on its way.
pub(crate) fn write(vcpu: &KvmVcpu, events: &PendingEvents) -> Result<()> {
    let events = to_kvm(events, expressible(vcpu))
        .map_err(|reason| refused(vcpu, StateElement::Events, reason))?;
    vcpu.fd
        .set_vcpu_events(&events)
        .map_err(call("KVM_SET_VCPU_EVENTS"))
}

/// Writes exceptions, interrupts being delivered and the interrupt shadow. What others may make pending meanwhile (NMI, SMI, start-up) is
/// left alone.
pub(crate) fn write_delivered(vcpu: &KvmVcpu, events: &PendingEvents) -> Result<()> {
    let mut events = to_kvm(events, expressible(vcpu))
        .map_err(|reason| refused(vcpu, StateElement::Events, reason))?;
    events.flags &= !(KVM_VCPUEVENT_VALID_NMI_PENDING
        | KVM_VCPUEVENT_VALID_SMM
        | KVM_VCPUEVENT_VALID_SIPI_VECTOR
        | KVM_VCPUEVENT_VALID_TRIPLE_FAULT);
    vcpu.fd
        .set_vcpu_events(&events)
        .map_err(call("KVM_SET_VCPU_EVENTS"))
}

fn from_kvm(e: &kvm_vcpu_events) -> PendingEvents {
    let valid = |flag: u32| e.flags & flag != 0;
    let exception =
        (e.exception.injected != 0 || e.exception.pending != 0).then(|| PendingException {
            vector: e.exception.nr,
            error_code: (e.exception.has_error_code != 0).then_some(e.exception.error_code),
            payload: (valid(KVM_VCPUEVENT_VALID_PAYLOAD) && e.exception_has_payload != 0)
                .then_some(e.exception_payload),
            injected: e.exception.injected != 0,
        });
    let interrupt = (e.interrupt.injected != 0).then_some(PendingInterrupt {
        vector: e.interrupt.nr,
        soft: e.interrupt.soft != 0,
    });
    PendingEvents {
        exception,
        interrupt,
        interrupt_shadow: e.interrupt.shadow,
        nmi_injected: e.nmi.injected != 0,
        nmi_pending: e.nmi.pending != 0,
        nmi_masked: e.nmi.masked != 0,
        // Vectors are 8 bits; KVM's field is wider for its own reasons.
        sipi_vector: valid(KVM_VCPUEVENT_VALID_SIPI_VECTOR).then_some(e.sipi_vector as u8),
        smm: e.smi.smm != 0,
        smi_pending: e.smi.pending != 0,
        triple_fault_pending: valid(KVM_VCPUEVENT_VALID_TRIPLE_FAULT)
            && e.triple_fault.pending != 0,
    }
}

fn to_kvm(
    events: &PendingEvents,
    can: Expressible,
) -> std::result::Result<kvm_vcpu_events, &'static str> {
    let mut e = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM,
        ..Default::default()
    };
    if can.payload {
        e.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if let Some(exception) = &events.exception {
        e.exception.nr = exception.vector;
        e.exception.has_error_code = exception.error_code.is_some().into();
        e.exception.error_code = exception.error_code.unwrap_or(0);
        // Without payloads KVM knows one kind of exception: one that is injected.
        e.exception.injected = (exception.injected || !can.payload).into();
        e.exception.pending = (!exception.injected && can.payload).into();
        if let Some(payload) = exception.payload {
            if !can.payload {
                return Err(
                    "an exception with a payload is pending and this KVM has no KVM_CAP_EXCEPTION_PAYLOAD",
                );
            }
            (e.exception_has_payload, e.exception_payload) = (1, payload);
        }
    }
    if let Some(interrupt) = &events.interrupt {
        (e.interrupt.injected, e.interrupt.nr, e.interrupt.soft) =
            (1, interrupt.vector, interrupt.soft.into());
    }
    e.interrupt.shadow = events.interrupt_shadow;
    e.nmi.injected = events.nmi_injected.into();
    e.nmi.pending = events.nmi_pending.into();
    e.nmi.masked = events.nmi_masked.into();
    if let Some(vector) = events.sipi_vector {
        e.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        e.sipi_vector = vector.into();
    }
    e.smi.smm = events.smm.into();
    e.smi.pending = events.smi_pending.into();
    if can.triple_fault {
        e.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        e.triple_fault.pending = events.triple_fault_pending.into();
    } else if events.triple_fault_pending {
        return Err("a triple fault is pending and this KVM has no KVM_CAP_X86_TRIPLE_FAULT_EVENT");
    }
    Ok(e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Expressible = Expressible {
        payload: true,
        triple_fault: true,
    };
    const NONE: Expressible = Expressible {
        payload: false,
        triple_fault: false,
    };

    fn events() -> impl Strategy<Value = PendingEvents> {
        let exception = (
            any::<u8>(),
            any::<Option<u32>>(),
            any::<Option<u64>>(),
            any::<bool>(),
        )
            .prop_map(|(vector, error_code, payload, injected)| PendingException {
                vector,
                error_code,
                payload,
                injected,
            });
        let interrupt = (any::<u8>(), any::<bool>())
            .prop_map(|(vector, soft)| PendingInterrupt { vector, soft });
        (
            proptest::option::of(exception),
            proptest::option::of(interrupt),
            0u8..4,
            any::<[bool; 6]>(),
            any::<Option<u8>>(),
        )
            .prop_map(|(exception, interrupt, interrupt_shadow, b, sipi_vector)| {
                PendingEvents {
                    exception,
                    interrupt,
                    interrupt_shadow,
                    nmi_injected: b[0],
                    nmi_pending: b[1],
                    nmi_masked: b[2],
                    sipi_vector,
                    smm: b[3],
                    smi_pending: b[4],
                    triple_fault_pending: b[5],
                }
            })
    }

    proptest! {
        #[test]
        fn roundtrip(events in events()) {
            let kvm = to_kvm(&events, ALL).expect("all of it can be expressed");
            prop_assert_eq!(from_kvm(&kvm), events);
        }

        #[test]
        fn nothing_is_dropped_silently(events in events()) {
            match to_kvm(&events, NONE) {
                Err(_) => prop_assert!(
                    events.triple_fault_pending || events.exception.is_some_and(|e| e.payload.is_some())
                ),
                Ok(kvm) => {
                    let mut expected = events;
                    if let Some(exception) = &mut expected.exception {
                        exception.injected = true;
                    }
                    prop_assert_eq!(from_kvm(&kvm), expected);
                }
            }
        }
    }
}
