//! What every device does with a state that is not its own, or is damaged, and the encoding's tolerance.

use std::sync::Arc;

use serde::Serialize;

use super::saved::{CmosState, IoapicState, PowerState, SerialState};
use super::{MAX_STATE_BYTES, Persist, SavedState, StateError, encode};
use crate::interrupt::Unconnected;
use crate::testing::{MsiLog, POWER_CONFIG, PowerLog};
use crate::{AcpiPower, Cmos, GuestMemorySize, I8042, Ioapic, Serial, SerialBackend};

/// One of each.
fn devices() -> Vec<Arc<dyn Persist>> {
    let power = Arc::new(PowerLog::default());
    vec![
        Arc::new(Ioapic::new(Arc::new(MsiLog::default()))),
        Arc::new(Serial::new(SerialBackend::Null, Arc::new(Unconnected)).expect("needs nothing")),
        Arc::new(Cmos::new(GuestMemorySize::default())),
        Arc::new(I8042::new(power.clone())),
        Arc::new(AcpiPower::new(POWER_CONFIG, power, Arc::new(Unconnected))),
    ]
}

#[test]
fn kinds_differ_and_own_states_load() {
    let devices = devices();
    for device in &devices {
        let saved = device.save();
        assert_eq!(
            (saved.kind.as_str(), saved.version),
            (device.kind(), device.version())
        );
        device.restore(&saved).expect("own state");
        assert_eq!(device.save(), saved);
        assert_eq!(
            devices
                .iter()
                .filter(|other| other.kind() == device.kind())
                .count(),
            1
        );
    }
}

#[test]
fn what_is_not_a_devices_own_is_refused_and_changes_nothing() {
    for device in devices() {
        let good = device.save();
        let kind = device.kind();
        let refuse = |bad: SavedState| {
            let error = device.restore(&bad).expect_err("refused");
            assert!(error.to_string().contains(kind), "{error}");
            assert_eq!(device.save(), good, "{error}");
            error
        };
        let other = SavedState {
            kind: "x".repeat(1 << 20),
            ..good.clone()
        };
        let error = refuse(other);
        assert!(matches!(error, StateError::WrongKind { .. }));
        assert!(error.to_string().len() < 256);
        for version in [0, device.version() + 1, u16::MAX] {
            let error = refuse(SavedState {
                version,
                ..good.clone()
            });
            assert!(
                matches!(error, StateError::Version { found, .. } if found == version),
                "{error}"
            );
        }
        for len in 0..good.data.len() {
            let error = refuse(SavedState {
                data: good.data[..len].to_vec(),
                ..good.clone()
            });
            assert!(matches!(error, StateError::Damaged { .. }), "{error}");
        }
        // Lengths that lie: a map, an array, a string and bytes of 4 GiB.
        for marker in [0xdf, 0xdd, 0xdb, 0xc6] {
            refuse(SavedState {
                data: vec![marker, 0xff, 0xff, 0xff, 0xff],
                ..good.clone()
            });
        }
        let error = refuse(SavedState {
            data: vec![0; MAX_STATE_BYTES + 1],
            ..good.clone()
        });
        assert!(matches!(error, StateError::TooLarge { .. }), "{error}");
    }
}

#[test]
fn unknown_fields_are_ignored_and_missing_ones_have_defaults() {
    #[derive(Serialize)]
    struct Newer {
        events: u8,
        not_known_yet: Vec<String>,
    }
    #[derive(Serialize)]
    struct Older {}

    let device = AcpiPower::new(
        POWER_CONFIG,
        Arc::new(PowerLog::default()),
        Arc::new(Unconnected),
    );
    device
        .restore(&encode(
            &device,
            &Newer {
                events: 1,
                not_known_yet: vec!["a".into()],
            },
        ))
        .expect("tolerated");
    assert_eq!(device.save(), encode(&device, &PowerState { events: 1 }));
    device
        .restore(&encode(&device, &Older {}))
        .expect("tolerated");
    assert_eq!(device.save(), encode(&device, &PowerState { events: 0 }));
}

#[test]
fn states_travel_inside_other_encodings() {
    for device in devices() {
        let saved = device.save();
        let bytes = rmp_serde::to_vec_named(&saved).expect("encodes");
        assert_eq!(
            rmp_serde::from_slice::<SavedState>(&bytes).expect("decodes"),
            saved
        );
    }
}

/// The field that the device complains of.
fn refused_field(device: &dyn Persist, saved: &impl Serialize) -> &'static str {
    let before = device.save();
    let error = device.restore(&encode(device, saved)).expect_err("refused");
    assert_eq!(device.save(), before, "{error}");
    match error {
        StateError::OutOfRange { field, .. } => field,
        other => panic!("{other}"),
    }
}

#[test]
fn impossible_ioapic_values_are_refused() {
    let device = Arc::new(Ioapic::new(Arc::new(MsiLog::default())));
    let good = IoapicState {
        entries: vec![1 << 16; 24],
        ..IoapicState::default()
    };
    device.restore(&encode(&*device, &good)).expect("good");
    let with = |pin: usize, entry: u64| {
        let mut state = good.clone();
        state.entries[pin] = entry;
        state
    };
    assert_eq!(
        refused_field(
            &*device,
            &IoapicState {
                id: 16,
                ..good.clone()
            }
        ),
        "id"
    );
    assert_eq!(
        refused_field(
            &*device,
            &IoapicState {
                levels: 1 << 24,
                ..good.clone()
            }
        ),
        "levels"
    );
    assert_eq!(
        refused_field(
            &*device,
            &IoapicState {
                entries: vec![0; 23],
                ..good.clone()
            }
        ),
        "entries"
    );
    assert_eq!(
        refused_field(
            &*device,
            &IoapicState {
                entries: vec![0; 25],
                ..good.clone()
            }
        ),
        "entries"
    );
    assert_eq!(refused_field(&*device, &IoapicState::default()), "entries");
    assert_eq!(refused_field(&*device, &with(3, 1 << 17)), "entries");
    assert_eq!(refused_field(&*device, &with(3, 1 << 12)), "entries");
    // Remote IRR of an edge-triggered pin.
    assert_eq!(refused_field(&*device, &with(23, 1 << 14)), "entries");
}

#[test]
fn impossible_serial_values_are_refused() {
    let device = Serial::new(SerialBackend::Null, Arc::new(Unconnected)).expect("needs nothing");
    let good = SerialState {
        interrupt_identification: 1,
        ..SerialState::default()
    };
    device.restore(&encode(&device, &good)).expect("good");
    assert_eq!(
        refused_field(
            &device,
            &SerialState {
                interrupt_enable: 0x10,
                ..good.clone()
            }
        ),
        "interrupt_enable"
    );
    for interrupt_identification in [0, 3, 8, 0xff] {
        let bad = SerialState {
            interrupt_identification,
            ..good.clone()
        };
        assert_eq!(refused_field(&device, &bad), "interrupt_identification");
    }
    assert_eq!(
        refused_field(
            &device,
            &SerialState {
                receive_fifo: vec![0; 65],
                ..good.clone()
            }
        ),
        "receive_fifo"
    );
    assert_eq!(
        refused_field(
            &device,
            &SerialState {
                pending_input: vec![0; 65],
                ..good.clone()
            }
        ),
        "pending_input"
    );
    let bad = SerialState {
        unsent_output: vec![0; (64 << 10) + 1],
        ..good.clone()
    };
    assert_eq!(refused_field(&device, &bad), "unsent_output");
}

#[test]
fn impossible_cmos_values_are_refused() {
    let device = Cmos::new(GuestMemorySize::default());
    let good = CmosState {
        nvram: vec![0; 128],
        ..CmosState::default()
    };
    device.restore(&encode(&device, &good)).expect("good");
    assert_eq!(
        refused_field(
            &device,
            &CmosState {
                index: 128,
                ..good.clone()
            }
        ),
        "index"
    );
    assert_eq!(
        refused_field(
            &device,
            &CmosState {
                nvram: vec![0; 127],
                ..good.clone()
            }
        ),
        "nvram"
    );
    assert_eq!(
        refused_field(
            &device,
            &CmosState {
                nvram: vec![0; 129],
                ..good.clone()
            }
        ),
        "nvram"
    );
    for offset_s in [i64::MIN, i64::MAX, 1 << 41] {
        assert_eq!(
            refused_field(
                &device,
                &CmosState {
                    offset_s,
                    ..good.clone()
                }
            ),
            "offset_s"
        );
    }
}
