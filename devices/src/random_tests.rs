//! Random accesses: no device panics, and a saved state restores to itself.

use std::sync::Arc;

use proptest::prelude::*;

use crate::interrupt::Unconnected;
use crate::testing::{MsiLog, POWER_CONFIG, PowerLog};
use crate::{
    AcpiPower, BusDevice, Cmos, GuestMemorySize, I8042, Ioapic, Persist, SavedState, Serial,
    SerialBackend,
};

trait Device: BusDevice + Persist {}
impl<T: BusDevice + Persist> Device for T {}

type Make = fn() -> Arc<dyn Device>;

/// How to make each, and how many addresses it has.
const DEVICES: [(Make, u64); 5] = [
    (|| Arc::new(Ioapic::new(Arc::new(MsiLog::default()))), 0x50),
    (
        || {
            Arc::new(
                Serial::new(SerialBackend::Null, Arc::new(Unconnected)).expect("needs nothing"),
            )
        },
        8,
    ),
    (|| Arc::new(Cmos::new(GuestMemorySize::default())), 2),
    (|| Arc::new(I8042::new(Arc::new(PowerLog::default()))), 5),
    (
        || {
            Arc::new(AcpiPower::new(
                POWER_CONFIG,
                Arc::new(PowerLog::default()),
                Arc::new(Unconnected),
            ))
        },
        8,
    ),
];

#[derive(Clone, Debug)]
struct Access {
    offset: u64,
    data: Vec<u8>,
    write: bool,
}

/// Mostly inside the device, with sizes that exist; sometimes anything.
fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let offset = prop_oneof![8 => 0..0x50u64, 4 => 0..8u64, 4 => Just(0x10u64), 1 => any::<u64>()];
    let data = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 1),
        2 => prop::collection::vec(any::<u8>(), 4),
        1 => prop::collection::vec(any::<u8>(), 0..17),
    ];
    let access = (offset, data, prop::bool::weighted(0.7));
    prop::collection::vec(
        access.prop_map(|(offset, data, write)| Access {
            offset,
            data,
            write,
        }),
        0..200,
    )
}

fn run(device: &dyn Device, size: u64, accesses: &[Access]) {
    for access in accesses {
        // Every other device is smaller than the IOAPIC: fold the offset, but keep some wild ones.
        let offset = if access.offset < 0x50 {
            access.offset % size
        } else {
            access.offset
        };
        if access.write {
            device.write(offset, &access.data);
        } else {
            device.read(offset, &mut access.data.clone());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn accesses_never_panic_and_states_restore_to_themselves(accesses in accesses()) {
        for (make, size) in DEVICES {
            let device = make();
            run(&*device, size, &accesses);
            let saved = device.save();
            let other = make();
            other.restore(&saved).expect("a state that accesses can reach is possible");
            prop_assert_eq!(other.save(), saved);
            run(&*other, size, &accesses);
        }
    }

    #[test]
    fn damaged_states_never_panic(at in any::<prop::sample::Index>(), bits in any::<u8>(), accesses in accesses()) {
        for (make, size) in DEVICES {
            let device = make();
            let mut saved = device.save();
            let at = at.index(saved.data.len());
            saved.data[at] ^= bits;
            if device.restore(&saved).is_ok() {
                run(&*device, size, &accesses);
                device.save();
            }
        }
    }

    #[test]
    fn noise_never_panics(data in prop::collection::vec(any::<u8>(), 0..300)) {
        for (make, _) in DEVICES {
            let device = make();
            let before = device.save();
            let noise = SavedState { data: data.clone(), ..before.clone() };
            if device.restore(&noise).is_err() {
                prop_assert_eq!(device.save(), before);
            }
        }
    }
}
