//! The device with a driver's rings and real memory, and its requests against a simple model.

use std::cell::RefCell;
use std::ops::Range;

use memory::PAGE_SIZE;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::request::{Answer, BlockState, Extent, Host, REQUEST_LEN, Request};
use super::*;
use crate::virtio::testing::{Counted, Driver};

impl VirtioMem {
    /// Plugs a block as a driver would.
    pub(crate) fn plug_for_tests(&self, block: u64) {
        let gpa = self.shared.gpa + block * BLOCK_SIZE;
        let answer = self.shared.serve(Request::Plug(Extent { gpa, blocks: 1 }));
        assert_eq!(answer, Answer::Ack);
    }
}

/// The block in which the tests' region begins; the driver's rings and buffers are below.
const FIRST: u64 = 8;
const MIB: u64 = 1 << 20;

/// A driver, and a device for all of its memory: 32 blocks.
fn setup(requested: u64) -> (VirtioMem, Driver, Arc<Counted>) {
    let driver = Driver::new(0);
    let device = VirtioMem::new(driver.ram.clone(), 0, requested).expect("a region");
    device.begin();
    let interrupt = Arc::new(Counted::default());
    device.connect(interrupt.clone());
    device.start_queue(driver.queue()).expect("a thread");
    (device, driver, interrupt)
}

fn request(kind: u16, gpa: u64, blocks: u16) -> [u8; REQUEST_LEN] {
    let mut bytes = [0; REQUEST_LEN];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&gpa.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// Sends a request; the answer's type and state.
fn ask(driver: &mut Driver, kind: u16, gpa: u64, blocks: u16) -> (u8, u8) {
    let bytes = request(kind, gpa, blocks);
    let head = driver.offer(&[&bytes[..3], &bytes[3..]], &[4, 6]);
    assert_eq!(driver.wait_used(), (head, 10));
    let answer = driver.written(head);
    (answer[0], answer[8])
}

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: (u8, u8) = (0, 0);
const NACK: (u8, u8) = (1, 0);
const BUSY: (u8, u8) = (2, 0);
const ERROR: (u8, u8) = (3, 0);

fn config(device: &VirtioMem) -> [u64; 7] {
    let mut bytes = [0; 56];
    device.read_config(0, &mut bytes);
    std::array::from_fn(|at| {
        let mut field = [0; 8];
        field.copy_from_slice(&bytes[at * 8..at * 8 + 8]);
        u64::from_le_bytes(field)
    })
}

/// Pages of a block that hold something.
fn populated(driver: &Driver, block: u64) -> usize {
    let found = driver.ram.populated(0).expect("a region");
    let pages = BLOCK_SIZE / PAGE_SIZE;
    (block * pages..(block + 1) * pages)
        .filter(|page| found.get(*page))
        .count()
}

fn write(driver: &Driver, block: u64) {
    let at = GuestAddress(block * BLOCK_SIZE + 5 * PAGE_SIZE);
    driver.memory().write_obj(7u8, at).expect("RAM");
}

fn reads(driver: &Driver, block: u64) -> u8 {
    let at = GuestAddress(block * BLOCK_SIZE + 5 * PAGE_SIZE);
    driver.memory().read_obj(at).expect("RAM")
}

#[test]
fn memory_comes_zeroed_and_goes_back_to_the_host() {
    let (device, mut driver, _) = setup(8 * MIB);
    let gpa = FIRST * BLOCK_SIZE;
    assert_eq!(
        config(&device),
        [2 * MIB, 0, 0, 64 * MIB, 64 * MIB, 0, 8 * MIB]
    );
    // Against the rules, before it is there.
    write(&driver, FIRST);
    assert_eq!(populated(&driver, FIRST), 0);
    assert_eq!(ask(&mut driver, PLUG, gpa, 3), ACK);
    assert_eq!(device.plugged_bytes(), 6 * MIB);
    assert_eq!(reads(&driver, FIRST), 0);
    write(&driver, FIRST);
    write(&driver, FIRST + 1);
    assert_eq!(populated(&driver, FIRST + 1), 1);
    assert_eq!(ask(&mut driver, UNPLUG, gpa + BLOCK_SIZE, 1), ACK);
    assert_eq!(config(&device)[5], 4 * MIB);
    driver.ram.set_present(0, 0..16384, true);
    assert_eq!(populated(&driver, FIRST + 1), 0, "the host has it back");
    assert_eq!((reads(&driver, FIRST), reads(&driver, FIRST + 1)), (7, 0));
    assert_eq!(ask(&mut driver, STATE, gpa, 1), (0, 0));
    assert_eq!(ask(&mut driver, STATE, gpa + BLOCK_SIZE, 1), (0, 1));
    assert_eq!(ask(&mut driver, STATE, gpa, 3), (0, 2));
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(device.plugged_bytes(), 0);
    assert_eq!(reads(&driver, FIRST), 0);
    device.stop_queue(0).expect("it ran");
}

#[test]
fn nonsense_is_refused_and_changes_nothing() {
    let (device, mut driver, _) = setup(4 * MIB);
    let gpa = FIRST * BLOCK_SIZE;
    assert_eq!(ask(&mut driver, PLUG, gpa, 1), ACK);
    for (kind, gpa, blocks, answer) in [
        (PLUG, gpa, 1, ERROR),
        (PLUG, gpa - BLOCK_SIZE, 2, ERROR),
        (PLUG, gpa + BLOCK_SIZE, 2, NACK),
        (PLUG, gpa + BLOCK_SIZE, 0, ERROR),
        (PLUG, gpa + BLOCK_SIZE + 4096, 1, ERROR),
        (PLUG, gpa + BLOCK_SIZE, u16::MAX, ERROR),
        (PLUG, 64 * MIB, 1, ERROR),
        (PLUG, 62 * MIB, 2, ERROR),
        (PLUG, !(BLOCK_SIZE - 1), 1, ERROR),
        (UNPLUG, gpa, 2, ERROR),
        (UNPLUG, gpa + BLOCK_SIZE, 1, ERROR),
        (UNPLUG, gpa, 0, ERROR),
        (UNPLUG, gpa + 1, 1, ERROR),
        (STATE, gpa, 0, ERROR),
        (STATE, u64::MAX, 1, ERROR),
        (4, gpa, 1, ERROR),
        (u16::MAX, gpa, 1, ERROR),
    ] {
        let given = ask(&mut driver, kind, gpa, blocks);
        assert_eq!(given, answer, "{kind} {gpa:#x} {blocks}");
    }
    assert_eq!(device.plugged_bytes(), BLOCK_SIZE);
    let refused = ("refused_requests", 17);
    assert!(
        device.counters().contains(&refused),
        "{:?}",
        device.counters()
    );
    assert_eq!(driver.interrupt.reset.load(Ordering::SeqCst), 0);
    // Too short, and no room for an answer: no request at all.
    driver.offer(&[&[0; REQUEST_LEN]], &[9]);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while driver.interrupt.reset.load(Ordering::SeqCst) == 0 {
        assert!(std::time::Instant::now() < until, "no NEEDS_RESET");
        std::thread::yield_now();
    }
    device.stop_queue(0).expect("it ran");
}

#[test]
fn the_driver_is_told_what_is_wanted_and_when_to_try_again() {
    let (device, mut driver, interrupt) = setup(0);
    let told = || interrupt.config.swap(0, Ordering::SeqCst);
    let gpa = FIRST * BLOCK_SIZE;
    device.set_requested_bytes(5 * MIB);
    assert_eq!((device.requested_bytes(), told()), (4 * MIB, 1));
    device.set_requested_bytes(4 * MIB);
    assert_eq!(told(), 0);
    device.set_requested_bytes(u64::MAX);
    assert_eq!((device.requested_bytes(), told()), (64 * MIB, 1));
    device.hold(true);
    assert_eq!(ask(&mut driver, PLUG, gpa, 1), BUSY);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK, "nothing to do");
    assert_eq!(ask(&mut driver, STATE, gpa, 1), (0, 1));
    assert_eq!(told(), 0);
    device.hold(false);
    assert_eq!(told(), 1);
    assert_eq!(ask(&mut driver, PLUG, gpa, 1), ACK);
    device.hold(true);
    assert_eq!(ask(&mut driver, UNPLUG, gpa, 1), BUSY);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), BUSY);
    device.hold(false);
    assert_eq!(told(), 1);
    device.hold(true);
    device.hold(false);
    assert_eq!(told(), 0, "nobody was refused");
    device.nudge();
    assert_eq!(told(), 1);
    device.set_requested_bytes(BLOCK_SIZE);
    told();
    device.nudge();
    assert_eq!(told(), 0, "it has what it should");
    // A reset of the device leaves memory where it is.
    device.stop_queue(0).expect("it ran");
    device.reset();
    assert_eq!(device.plugged_bytes(), BLOCK_SIZE);
}

#[test]
fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
    let (device, mut driver, _) = setup(4 * MIB);
    ask(&mut driver, PLUG, FIRST * BLOCK_SIZE, 2);
    device.stop_queue(0).expect("it ran");
    let saved = device.save();
    let other = VirtioMem::new(driver.ram.clone(), 0, 0).expect("a region");
    other.restore(&saved).expect("its own kind");
    assert_eq!(other.save(), saved);
    assert_eq!(
        (other.requested_bytes(), other.plugged_bytes()),
        (4 * MIB, 4 * MIB)
    );
    write(&driver, FIRST + 1);
    write(&driver, FIRST + 2);
    assert_eq!(
        (populated(&driver, FIRST + 1), populated(&driver, FIRST + 2)),
        (1, 0)
    );
    let good = || State {
        gpa: 0,
        len: 64 * MIB,
        block_size: BLOCK_SIZE,
        requested_bytes: BLOCK_SIZE,
        plugged: vec![0, 1, 0, 0],
    };
    let bad = [
        State {
            gpa: 4096,
            ..good()
        },
        State {
            len: 32 * MIB,
            ..good()
        },
        State {
            block_size: 4096,
            ..good()
        },
        State {
            requested_bytes: 4096,
            ..good()
        },
        State {
            requested_bytes: 66 * MIB,
            ..good()
        },
        State {
            plugged: vec![0; 3],
            ..good()
        },
        State {
            plugged: vec![0; 1 << 20],
            ..good()
        },
        State::default(),
    ];
    for state in bad {
        let bytes = rmp_serde::to_vec_named(&state).expect("encodes");
        assert!(other.restore(&bytes).is_err(), "{state:?}");
        assert_eq!(other.save(), saved);
    }
    assert!(other.restore(&[0xc1, 0xff]).is_err());
    let bytes = rmp_serde::to_vec_named(&good()).expect("encodes");
    other.restore(&bytes).expect("a good one");
    assert_eq!(other.plugged_bytes(), BLOCK_SIZE);
}

#[test]
fn a_region_that_is_not_there_or_no_blocks_is_refused() {
    let ranges = [memory::RamRange {
        gpa: 0,
        len: 3 * MIB,
    }];
    let backing = memory::Backing::Anonymous { thp: false };
    let ram = Arc::new(GuestRam::new(&ranges, backing).expect("memory"));
    assert!(VirtioMem::new(ram.clone(), 0, 0).is_err());
    assert!(VirtioMem::new(ram, 1, 0).is_err());
}

/// A host that can do it or not, and keeps a list.
struct Model {
    able: bool,
    blocks: RefCell<Vec<bool>>,
}

impl Host for Model {
    fn plug(&self, blocks: Range<u64>) -> io::Result<()> {
        self.set(blocks, true)
    }
    fn unplug(&self, blocks: Range<u64>) -> io::Result<()> {
        self.set(blocks, false)
    }
}

impl Model {
    fn set(&self, blocks: Range<u64>, plugged: bool) -> io::Result<()> {
        if !self.able {
            return Err(io::Error::other("not now"));
        }
        for block in blocks {
            let known = &mut self.blocks.borrow_mut()[block as usize];
            assert_ne!(*known, plugged, "plugged or unplugged twice");
            *known = plugged;
        }
        Ok(())
    }
}

/// Where the model's region is, and how many blocks it has.
const GPA: u64 = 1 << 32;
const COUNT: u64 = 100;

fn requests() -> impl Strategy<Value = [u8; REQUEST_LEN]> {
    let gpa = prop_oneof![
        8 => (0..COUNT + 2).prop_map(|block| GPA + block * BLOCK_SIZE),
        1 => any::<u64>(),
    ];
    let blocks = prop_oneof![8 => 0..40u16, 1 => any::<u16>()];
    let kind =
        prop_oneof![6 => Just(0u16), 6 => Just(1), 1 => Just(2), 3 => Just(3), 1 => any::<u16>()];
    (kind, gpa, blocks).prop_map(|(kind, gpa, blocks)| request(kind, gpa, blocks))
}

proptest! {
    #[test]
    fn requests_do_what_a_list_of_blocks_says(
        steps in proptest::collection::vec((requests(), 0..COUNT + 1, any::<u8>()), 0..80)
    ) {
        let mut region = Region { gpa: GPA, blocks: Blocks::none(COUNT) };
        let mut model = Model { able: true, blocks: RefCell::new(vec![false; COUNT as usize]) };
        for (bytes, most, dice) in steps {
            let (busy, able) = (dice % 8 == 0, dice % 8 != 1);
            model.able = able;
            let before = model.blocks.borrow().clone();
            let plugged = before.iter().filter(|plugged| **plugged).count() as u64;
            let parsed = Request::parse(&bytes);
            let answer = region.serve(parsed, most, busy, &model);
            let valid = |extent: Extent| {
                let first = extent.gpa.checked_sub(GPA)? / BLOCK_SIZE;
                let end = first + u64::from(extent.blocks);
                (extent.gpa.is_multiple_of(BLOCK_SIZE) && extent.blocks > 0 && end <= COUNT)
                    .then(|| before[first as usize..end as usize].to_vec())
            };
            let change = if busy || !able { Answer::Busy } else { Answer::Ack };
            let expected = match parsed {
                Request::Plug(extent) => match valid(extent) {
                    None => Answer::Error,
                    Some(list) if list.contains(&true) => Answer::Error,
                    Some(list) if plugged + list.len() as u64 > most => Answer::Nack,
                    Some(_) => change,
                },
                Request::Unplug(extent) => match valid(extent) {
                    None => Answer::Error,
                    Some(list) if list.contains(&false) => Answer::Error,
                    Some(_) => change,
                },
                Request::UnplugAll if plugged == 0 => Answer::Ack,
                Request::UnplugAll => change,
                Request::State(extent) => match valid(extent) {
                    None => Answer::Error,
                    Some(list) if !list.contains(&true) => Answer::State(BlockState::Unplugged),
                    Some(list) if !list.contains(&false) => Answer::State(BlockState::Plugged),
                    Some(_) => Answer::State(BlockState::Mixed),
                },
                Request::Unknown(_) => Answer::Error,
            };
            prop_assert_eq!(answer, expected);
            let now = model.blocks.borrow().clone();
            prop_assert!(answer == Answer::Ack || now == before);
            let known = Blocks::from_bytes(&region.blocks.to_bytes(), COUNT);
            prop_assert_eq!(known.as_ref(), Some(&region.blocks));
            let mut runs = vec![false; COUNT as usize];
            for run in region.blocks.runs() {
                runs[run.start as usize..run.end as usize].fill(true);
            }
            prop_assert_eq!(&runs, &now);
            let plugged = now.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(region.blocks.plugged(), plugged);
        }
    }
}
