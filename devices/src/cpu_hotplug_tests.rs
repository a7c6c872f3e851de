//! The registers, driven as the DSDT's methods do, and by nonsense.

use super::*;
use crate::testing::{LineLog, POWER_CONFIG, PowerLog};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Did {
    Plug(u32),
    Unplug(u32),
    Restored(u32, bool),
}

#[derive(Default)]
struct Log(Mutex<Vec<Did>>);

impl Log {
    fn add(&self, did: Did) {
        self.0.lock().expect("no panic").push(did);
    }

    fn take(&self) -> Vec<Did> {
        std::mem::take(&mut *self.0.lock().expect("no panic"))
    }
}

impl VcpuSwitch for Log {
    fn plug(&self, ids: &[u32]) {
        ids.iter().for_each(|&id| self.add(Did::Plug(id)));
    }
    fn unplug(&self, id: u32) {
        self.add(Did::Unplug(id));
    }
    fn restored(&self, id: u32, present: bool) {
        self.add(Did::Restored(id, present));
    }
}

struct Machine {
    device: CpuHotplug,
    power: Arc<AcpiPower>,
    line: Arc<LineLog>,
    log: Arc<Log>,
}

fn machine(present: u32, max: u32) -> Machine {
    let (line, log) = (Arc::new(LineLog::default()), Arc::new(Log::default()));
    let power = AcpiPower::new(POWER_CONFIG, Arc::new(PowerLog::default()), line.clone());
    let power = Arc::new(power);
    Machine {
        device: CpuHotplug::new(power.clone(), log.clone(), present, max),
        power,
        line,
        log,
    }
}

impl Machine {
    fn word(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn eject(&self, id: u32) {
        let at = 0x60 + u64::from(id / 32) * 4;
        self.device.write(at, &(1u32 << (id % 32)).to_le_bytes());
    }

    fn ost(&self, id: u32, event: u32, status: u32) {
        let value = id << 24 | status << 16 | event;
        self.device.write(0x80, &value.to_le_bytes());
    }

    /// (inserted, leaving), and whether the guest was told that there is something to read.
    fn news(&self) -> (u32, u32, bool) {
        let mut events = [0];
        self.power.read(POWER_CONFIG.event, &mut events);
        (self.word(0x20), self.word(0x40), events == [EVENT_CPU])
    }

    fn refused(&self) -> Vec<(u32, u8)> {
        self.device.status().refused
    }

    fn unanswered(&self) -> Vec<u32> {
        self.device.status().unanswered
    }
}

#[test]
fn vcpus_come_and_go_as_the_guest_says() {
    let m = machine(1, 4);
    assert_eq!((m.word(0), m.news()), (1, (0, 0, false)));
    m.device.resize(4);
    assert_eq!(m.log.take(), [1, 2, 3].map(Did::Plug));
    assert_eq!((m.word(0), m.unanswered()), (0b1111, vec![1, 2, 3]));
    assert_eq!((m.line.pulses(), m.news()), (1, (0b1110, 0, true)));
    assert_eq!(m.news(), (0, 0, false), "read once");
    for id in [1, 2] {
        m.ost(id, 1, 0x80);
        m.ost(id, 1, 0);
    }
    m.ost(3, 1, 2);
    assert_eq!((m.unanswered(), m.refused()), (vec![], vec![(3, 2)]));

    m.device.resize(2);
    assert_eq!((m.log.take(), m.news()), (vec![], (0, 0b1100, true)));
    assert_eq!((m.word(0), m.unanswered()), (0b1111, vec![2, 3]));
    m.ost(2, 0x103, 0x84);
    m.eject(2);
    m.ost(2, 3, 0);
    m.ost(3, 3, 1);
    assert_eq!(m.log.take(), [Did::Unplug(2)]);
    assert_eq!(m.word(0), 0b1011);
    assert_eq!((m.unanswered(), m.refused()), (vec![], vec![(3, 1)]));
    assert_eq!(m.device.status().present, 3);
    // Asked again, it is asked again; it comes again.
    m.device.resize(2);
    assert_eq!(m.news(), (0, 0b1000, true));
    m.eject(3);
    assert_eq!((m.log.take(), m.refused()), (vec![Did::Unplug(3)], vec![]));
    m.device.resize(3);
    assert_eq!(
        (m.log.take(), m.news()),
        (vec![Did::Plug(2)], (0b100, 0, true))
    );
}

#[test]
fn the_newest_resize_counts() {
    let m = machine(4, 4);
    m.device.resize(2);
    m.device.resize(4);
    assert_eq!(m.word(0x40), 0, "what was asked is taken back");
    assert!(m.unanswered().is_empty() && m.refused().is_empty());
    // A guest that has read it before lets it go all the same.
    m.eject(3);
    assert_eq!(m.device.status().present, 3);
    m.device.resize(4);
    assert_eq!(m.log.take(), [Did::Unplug(3), Did::Plug(3)]);
    // Not told yet, and to go again: the guest hears both, in this order.
    m.device.resize(3);
    assert_eq!((m.word(0x20), m.word(0x40)), (0b1000, 0b1000));
    // Unanswered, it is told again; settled, it is not.
    let m = machine(1, 2);
    m.device.resize(2);
    assert_eq!(m.word(0x20), 2);
    m.device.resize(2);
    assert_eq!(m.word(0x20), 2);
    m.ost(1, 1, 0);
    m.device.resize(2);
    assert_eq!(m.word(0x20), 0);
    // One that it has refused, it is told of again.
    let m = machine(1, 2);
    m.device.resize(2);
    assert_eq!(m.word(0x20), 2);
    m.ost(1, 1, 1);
    assert_eq!((m.refused(), m.unanswered()), (vec![(1, 1)], vec![]));
    m.device.resize(2);
    assert_eq!((m.refused(), m.unanswered()), (vec![], vec![1]));
    assert_eq!(m.word(0x20), 2);
    // The boot processor always stays.
    m.device.resize(0);
    assert_eq!((m.word(0), m.word(0x40)), (3, 2));
}

#[test]
fn nonsense_changes_nothing() {
    let m = machine(2, 3);
    let before = m.device.save();
    for id in [0, 2, 3, 31, 32, 255] {
        m.eject(id);
        for (event, status) in [(3, 1), (1, 0), (0x103, 0), (0xffff, 0xff)] {
            m.ost(id, event, status);
        }
    }
    // Of one that is there and of which nothing was asked.
    for (event, status) in [(3, 1), (1, 2), (0x103, 0), (0xffff, 0xff)] {
        m.ost(1, event, status);
    }
    for offset in 0..0x200 {
        for len in [0, 1, 2, 3, 5, 8, 16] {
            m.device.write(offset, &vec![0xff; len]);
            let mut data = vec![0x55; len];
            m.device.read(offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0));
        }
        if !(0x60..0x84).contains(&offset) {
            m.device.write(offset, &[0xff; 4]);
        }
        if offset % 4 != 0 {
            m.device.write(offset, &[0xff; 4]);
        }
        let mut data = [0x55; 4];
        m.device.read(offset, &mut data);
        assert_eq!(u32::from_le_bytes(data), if offset == 0 { 0b11 } else { 0 });
    }
    assert_eq!((m.device.save(), m.log.take()), (before, vec![]));
    // All at once takes those that are there, but the first.
    m.device.write(0x60, &[0xff; 4]);
    assert_eq!(m.log.take(), [Did::Unplug(1)]);
    assert_eq!(machine(300, 300).device.places().len(), 256);
}

#[test]
fn everything_travels() {
    let m = machine(3, 40);
    m.device.resize(36);
    assert_eq!(m.word(0x20), !0b111, "the second word stays unread");
    m.device.resize(2);
    m.ost(2, 3, 0x82);
    m.eject(35);
    let other = machine(1, 40);
    other.device.restore(&m.device.save()).expect("ours");
    assert_eq!(other.log.take().len(), 40);
    assert_eq!(other.line.pulses(), 0);
    assert_eq!(other.device.status(), m.device.status());
    assert_eq!(other.refused(), [(2, 0x82)]);
    for offset in [0x00, 0x04, 0x20, 0x24, 0x40, 0x44] {
        assert_eq!(m.word(offset), other.word(offset), "{offset:#x}");
    }
}

#[test]
fn impossible_states_are_refused() {
    let m = machine(1, 3);
    let before = m.device.save();
    let there = HotVcpuState {
        present: true,
        ..HotVcpuState::default()
    };
    let absent = HotVcpuState::default();
    let pending = HotVcpuState {
        leaving: true,
        ..absent
    };
    for vcpus in [
        vec![],
        vec![there; 2],
        vec![there; 4],
        vec![absent; 3],
        vec![there, pending, absent],
    ] {
        let state = state::encode(&m.device, &CpuHotplugState { vcpus });
        assert!(matches!(
            m.device.restore(&state),
            Err(StateError::OutOfRange { field: "vcpus", .. })
        ));
    }
    assert_eq!((m.device.save(), m.log.take()), (before, vec![]));
}
