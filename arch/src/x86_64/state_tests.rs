//! The serialised form: complete, and open to change in both directions.

use serde::de::DeserializeOwned;

use super::*;

/// A state in which every field differs from its default.
fn full() -> VcpuState {
    let segment = Segment {
        selector: 0x10,
        base: 1 << 40,
        limit: u32::MAX,
        access: 0xa09b,
    };
    VcpuState {
        id: 3,
        general: GeneralRegisters {
            rax: u64::MAX,
            r15: 15,
            rip: 0xffff_ffff_8100_0000,
            rflags: 0x246,
            ..GeneralRegisters::default()
        },
        special: SpecialRegisters {
            cs: segment,
            gdt: DescriptorTable {
                base: 0xfe00_0000,
                limit: 0x7f,
            },
            cr0: 0x8005_0033,
            efer: 0xd01,
            apic_base: 0xfee0_0d00,
            pdptrs: Some([1, 2, 3, 4]),
            ..SpecialRegisters::default()
        },
        debug: Some(DebugRegisters {
            db: [1, 2, 3, 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
        }),
        xcrs: Some(vec![Xcr {
            index: 0,
            value: 0x2e7,
        }]),
        xsave: Some(Bytes((0..=255).cycle().take(4096).collect())),
        lapic: Some(Lapic {
            registers: Bytes(vec![7; 1024]),
        }),
        msrs: vec![
            Msr {
                index: 0x10,
                value: 99,
            },
            Msr {
                index: 0xc000_0080,
                value: 0xd01,
            },
        ],
        events: PendingEvents {
            exception: Some(PendingException {
                vector: 14,
                error_code: Some(2),
                payload: Some(0xdead),
                injected: true,
            }),
            interrupt: Some(PendingInterrupt {
                vector: 0x20,
                soft: true,
            }),
            interrupt_shadow: 1,
            nmi_masked: true,
            sipi_vector: Some(0x9a),
            ..PendingEvents::default()
        },
        activity: Activity::Halted,
        tsc_khz: Some(2_400_000),
        nested: Some(NestedState {
            format: NestedFormat::KvmSvm,
            data: Bytes(vec![1, 2]),
        }),
    }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(value).expect("encodes")
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> T {
    rmp_serde::from_slice(bytes).expect("decodes")
}

#[test]
fn a_state_survives_the_journey() {
    for state in [full(), VcpuState::default()] {
        assert_eq!(decode::<VcpuState>(&encode(&state)), state);
    }
    let clock = MachineClock {
        guest_ns: 1,
        host_realtime_ns: Some(2),
        host_tsc: None,
    };
    assert_eq!(decode::<MachineClock>(&encode(&clock)), clock);
}

#[test]
fn byte_strings_are_encoded_as_such() {
    // One length and the bytes, not one number after the other (which would double values above 127).
    let bytes = Bytes(vec![0xff; 1000]);
    assert_eq!(encode(&bytes).len(), 1003);
}

#[test]
fn a_newer_builds_fields_are_skipped() {
    #[derive(Serialize)]
    struct Newer {
        id: u32,
        invented_later: Vec<u64>,
        general: NewerRegisters,
    }
    #[derive(Serialize)]
    struct NewerRegisters {
        rax: u64,
        r31: u64,
    }
    let newer = Newer {
        id: 7,
        invented_later: vec![1, 2],
        general: NewerRegisters { rax: 5, r31: 6 },
    };
    let state: VcpuState = decode(&encode(&newer));
    assert_eq!((state.id, state.general.rax), (7, 5));
}

#[test]
fn an_older_builds_missing_fields_have_defaults() {
    #[derive(Serialize)]
    struct Older {
        id: u32,
    }
    let state: VcpuState = decode(&encode(&Older { id: 9 }));
    assert_eq!(
        state,
        VcpuState {
            id: 9,
            ..VcpuState::default()
        }
    );
}

#[test]
fn garbage_is_an_error() {
    let good = encode(&full());
    for cut in [0, 1, 10, good.len() / 2, good.len() - 1] {
        assert!(
            rmp_serde::from_slice::<VcpuState>(&good[..cut]).is_err(),
            "cut at {cut}"
        );
    }
    // A byte string that claims 4 GiB.
    assert!(rmp_serde::from_slice::<Bytes>(&[0xc6, 0xff, 0xff, 0xff, 0xff, 1]).is_err());
}

#[test]
fn every_element_has_a_name_of_its_own_and_a_place_in_the_order() {
    let mut names: Vec<_> = StateElement::ALL
        .iter()
        .map(|element| element.name())
        .collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), StateElement::ALL.len());
    let place = |element| StateElement::ALL.iter().position(|one| *one == element);
    assert!(place(StateElement::Special) < place(StateElement::Msrs));
    assert!(place(StateElement::Xcrs) < place(StateElement::Xsave));
    assert!(place(StateElement::Lapic) < place(StateElement::Msrs));
}
