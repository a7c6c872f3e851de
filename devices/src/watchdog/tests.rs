//! A guest that pets it, and one that does not.

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct Bites(AtomicU64);

impl WatchdogSink for Bites {
    fn bites(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn watchdog(period: Duration) -> (Watchdog, Arc<Bites>) {
    let bites = Arc::new(Bites::default());
    let config = WatchdogConfig {
        period,
        shortest: 1,
        longest: 0xffff,
    };
    let made = Watchdog::new(config, bites.clone()).expect("a thread");
    (made, bites)
}

fn read(device: &Watchdog, at: u64) -> u32 {
    let mut word = [0; 4];
    device.read(at, &mut word);
    u32::from_le_bytes(word)
}

fn write(device: &Watchdog, at: u64, value: u32) {
    device.write(at, &value.to_le_bytes());
}

fn bitten(bites: &Bites) -> u64 {
    bites.0.load(Ordering::SeqCst)
}

fn wait_for_a_bite(bites: &Bites) {
    let end = Instant::now() + Duration::from_secs(10);
    while bitten(bites) == 0 {
        assert!(Instant::now() < end, "it never bites");
        std::thread::sleep(Duration::from_millis(1));
    }
}

const HOUR: Duration = Duration::from_secs(3600);
const MOMENT: Duration = Duration::from_millis(1);

#[test]
fn it_bites_once_when_nobody_pets_it() {
    let (device, bites) = watchdog(MOMENT);
    device.resume();
    write(&device, COUNTDOWN, 5);
    assert_eq!((read(&device, CONTROL), read(&device, COUNTDOWN)), (0, 5));
    write(&device, CONTROL, 1);
    wait_for_a_bite(&bites);
    assert_eq!((read(&device, CONTROL), read(&device, CURRENT)), (0, 0));
    std::thread::sleep(20 * MOMENT);
    assert_eq!(bitten(&bites), 1);
}

#[test]
fn a_stopped_or_paused_one_does_not_bite() {
    let (device, bites) = watchdog(MOMENT);
    write(&device, COUNTDOWN, 3);
    write(&device, CONTROL, 1);
    assert_eq!(read(&device, CURRENT), 3, "it is paused");
    std::thread::sleep(20 * MOMENT);
    assert_eq!((bitten(&bites), read(&device, CURRENT)), (0, 3));
    write(&device, CONTROL, 0);
    device.resume();
    std::thread::sleep(20 * MOMENT);
    assert_eq!(bitten(&bites), 0);
    write(&device, CONTROL, 1);
    wait_for_a_bite(&bites);
}

#[test]
fn petting_begins_the_countdown_anew() {
    let (device, bites) = watchdog(HOUR);
    device.resume();
    write(&device, COUNTDOWN, 2);
    write(&device, CONTROL, 1);
    write(&device, COUNTDOWN, 9);
    assert_eq!(read(&device, CURRENT), 2, "from the next time on");
    write(&device, CURRENT, 1);
    assert_eq!(read(&device, CURRENT), 9);
    assert_eq!(bitten(&bites), 0);
}

#[test]
fn what_is_left_goes_along() {
    let (from, _) = watchdog(HOUR);
    from.resume();
    write(&from, COUNTDOWN, 7);
    write(&from, CONTROL, 1);
    from.was_reset(3, true);
    from.pause();
    let saved = from.save();
    let (to, bites) = watchdog(HOUR);
    to.restore(&saved).expect("ours");
    assert_eq!(to.save(), saved, "it stands still");
    to.resume();
    assert_eq!((read(&to, CONTROL), read(&to, CURRENT)), (1, 7));
    assert_eq!((to.resets(), read(&to, STATUS)), (3, 1));
    write(&to, STATUS, 0xfe);
    assert_eq!(read(&to, STATUS), 1);
    write(&to, STATUS, 1);
    assert_eq!(read(&to, STATUS), 0);
    assert_eq!(bitten(&bites), 0);
    // A moment is left of a long countdown.
    let mut state: WatchdogState = state::decode(&to, &saved).expect("ours");
    state.left_ns = 1_000_000;
    to.pause();
    to.restore(&state::encode(&to, &state)).expect("ours");
    to.resume();
    wait_for_a_bite(&bites);
    for nonsense in [
        WatchdogState {
            countdown: 0,
            ..state.clone()
        },
        WatchdogState {
            countdown: 0x1_0000,
            ..state.clone()
        },
    ] {
        assert!(to.restore(&state::encode(&to, &nonsense)).is_err());
    }
    let (short, _) = watchdog(MOMENT);
    state.left_ns = u64::MAX;
    assert!(short.restore(&state::encode(&short, &state)).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a guest writes wherever: the countdown stays in its limits, and with such a long period it does not bite.
    #[test]
    fn nonsense_is_harmless(writes in prop::collection::vec((0u64..20, prop::collection::vec(any::<u8>(), 0..9)), 0..40)) {
        let (device, bites) = watchdog(HOUR);
        device.resume();
        for (offset, data) in writes {
            device.write(offset, &data);
            let mut back = vec![0xa5; data.len()];
            device.read(offset, &mut back);
            prop_assert!((1..=0xffff).contains(&read(&device, COUNTDOWN)));
            prop_assert!(read(&device, CURRENT) <= 0xffff);
        }
        device.read(u64::MAX, &mut [0; 4]);
        prop_assert_eq!(bitten(&bites), 0);
    }
}
