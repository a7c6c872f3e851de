//! The balloon with a driver's rings and real memory.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{Counted, Driver};

/// First of some pages that nothing else is in.
const FIRST: u64 = 0x200_0000 / PAGE_SIZE;

/// A driver whose memory the balloon has too; the device is made once the driver is.
struct Setup {
    device: Balloon,
    driver: Driver,
}

fn setup(queue: u16, features: u64) -> Setup {
    let driver = Driver::new(queue);
    let options = BalloonOptions {
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    let device = Balloon::new(driver.ram.clone(), 0, options).expect("an eventfd");
    device.set_features(features);
    Setup { device, driver }
}

fn started(queue: u16, features: u64) -> Setup {
    let setup = setup(queue, features);
    setup
        .device
        .start_queue(setup.driver.queue())
        .expect("a thread");
    setup
}

/// Writes into pages.
fn fill(driver: &Driver, pages: std::ops::Range<u64>) {
    for page in pages {
        driver
            .memory()
            .write_slice(&[7; PAGE_SIZE as usize], GuestAddress(page * PAGE_SIZE))
            .expect("RAM");
    }
}

fn populated(driver: &Driver, pages: std::ops::Range<u64>) -> Vec<u64> {
    let found = driver.ram.populated(0).expect("a region");
    pages.filter(|page| found.get(*page)).collect()
}

fn numbers(pages: impl IntoIterator<Item = u64>) -> Vec<u8> {
    pages
        .into_iter()
        .flat_map(|page| (page as u32).to_le_bytes())
        .collect()
}

fn pair(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

/// Waits; ten seconds only turn a hang into a failure.
fn wait_until(mut done: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !done() {
        assert!(std::time::Instant::now() < until, "waited too long");
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
}

#[test]
fn inflated_pages_are_given_back_and_others_stay() {
    let mut s = started(0, 0);
    fill(&s.driver, FIRST..FIRST + 10);
    assert_eq!(populated(&s.driver, FIRST..FIRST + 10).len(), 10);
    // In any order, twice, and two that are not RAM.
    let list = [3, 2, 1, 7, 8, 2].map(|page| FIRST + page);
    let list = numbers(list.into_iter().chain([1 << 20, u64::from(u32::MAX)]));
    let head = s.driver.offer(&[&list[..6], &list[6..]], &[]);
    assert_eq!(s.driver.wait_used(), (head, 0));
    assert_eq!(
        populated(&s.driver, FIRST..FIRST + 10),
        [0, 4, 5, 6, 9].map(|page| FIRST + page)
    );
    let counters = s.device.counters();
    assert_eq!(
        (
            counters.inflated_pages,
            counters.discarded_pages,
            counters.ignored_pages,
            counters.failed_pages
        ),
        (8, 5, 2, 0)
    );
    s.device.stop_queue(0).expect("it ran");
}

#[test]
fn deflating_changes_nothing() {
    let mut s = started(1, 0);
    fill(&s.driver, FIRST..FIRST + 2);
    let list = numbers([FIRST, FIRST + 1]);
    let head = s.driver.offer(&[&list], &[]);
    assert_eq!(s.driver.wait_used(), (head, 0));
    assert_eq!(populated(&s.driver, FIRST..FIRST + 2).len(), 2);
    assert_eq!(s.device.counters().deflated_pages, 2);
}

#[test]
fn nothing_is_given_back_while_that_is_held_back() {
    let mut s = started(0, 0);
    s.device.set_discarding(false);
    fill(&s.driver, FIRST..FIRST + 2);
    s.driver.offer(&[&numbers([FIRST])], &[]);
    s.driver.wait_used();
    assert_eq!(populated(&s.driver, FIRST..FIRST + 2).len(), 2);
    s.device.set_discarding(true);
    s.driver.offer(&[&numbers([FIRST])], &[]);
    s.driver.wait_used();
    assert_eq!(populated(&s.driver, FIRST..FIRST + 2), [FIRST + 1]);
}

#[test]
fn reports_give_whole_pages_back_on_every_queue_that_can_be_meant() {
    for (queue, features) in [
        (2, REPORTING),
        (3, REPORTING | STATS_VQ),
        (4, REPORTING | STATS_VQ),
    ] {
        let mut s = started(queue, features);
        fill(&s.driver, FIRST..FIRST + 8);
        let at = FIRST * PAGE_SIZE;
        // Pages 1 and 2 whole, 0 and 3 in part; page 5 in part only; page 7 from the first byte to the last.
        let parts = [
            (at + 1, 3 * PAGE_SIZE as u32, true),
            (at + 5 * PAGE_SIZE, 4095, true),
            (at + 7 * PAGE_SIZE, 4096, true),
        ];
        let head = s.driver.offer_parts(&parts);
        assert_eq!(s.driver.wait_used(), (head, 0));
        assert_eq!(
            populated(&s.driver, FIRST..FIRST + 8),
            [0, 3, 4, 5, 6].map(|page| FIRST + page)
        );
        assert_eq!(s.device.counters().reported_pages, 3);
    }
}

#[test]
fn queues_without_their_feature_take_nothing() {
    for queue in [2, 3, 4] {
        let mut s = started(queue, 0);
        s.driver.offer(&[], &[4096]);
        s.device.stop_queue(queue).expect("it ran");
        assert_eq!(s.driver.used(), None);
    }
}

#[test]
fn statistics_are_held_and_go_back_for_new_ones() {
    let mut s = started(2, STATS_VQ);
    let first = s.driver.offer(&[&pair(4, 100), &pair(5, 200)], &[]);
    wait_until(|| s.device.statistics().len() == 2);
    assert_eq!(s.device.statistics()["free-memory"], 100);
    assert_eq!(s.driver.used(), None);
    s.device.request_statistics();
    assert_eq!(s.driver.wait_used(), (first, 0));
    assert_eq!(s.driver.interrupt.used.load(Ordering::SeqCst), 1);
    let second = s.driver.offer(&[&pair(6, 50)], &[]);
    wait_until(|| s.device.statistics().len() == 1);
    // A stop gives it back to the ring, and a start takes it again.
    let queue = s.device.stop_queue(2).expect("it ran");
    s.device.reset();
    assert!(s.device.statistics().is_empty());
    assert_eq!(s.driver.used(), None);
    s.device.start_queue(queue).expect("a thread");
    wait_until(|| s.device.statistics().len() == 1);
    // A request from before the start is not lost.
    let queue = s.device.stop_queue(2).expect("it ran");
    s.device.request_statistics();
    s.device.start_queue(queue).expect("a thread");
    assert_eq!(s.driver.wait_used(), (second, 0));
}

#[test]
fn a_second_statistics_buffer_waits() {
    let mut s = started(2, STATS_VQ);
    let first = s.driver.offer(&[&pair(0, 1)], &[]);
    let second = s.driver.offer(&[&pair(0, 2)], &[]);
    wait_until(|| s.device.statistics().get("swap-in") == Some(&1));
    s.device.request_statistics();
    assert_eq!(s.driver.wait_used(), (first, 0));
    wait_until(|| s.device.statistics().get("swap-in") == Some(&2));
    s.device.request_statistics();
    assert_eq!(s.driver.wait_used(), (second, 0));
}

#[test]
fn nonsense_is_harmless() {
    // No buffer to read, a number that is cut off.
    let mut s = started(0, 0);
    let head = s.driver.offer(&[], &[16]);
    assert_eq!(s.driver.wait_used(), (head, 0));
    let head = s.driver.offer(&[&[0; 3]], &[]);
    assert_eq!(s.driver.wait_used(), (head, 0));
    assert_eq!(s.device.counters(), BalloonCounters::default());
    // Too many at once, and a buffer that is not RAM.
    for parts in [(0, 32 << 20, false), (1 << 40, 16, false)] {
        let mut s = started(0, 0);
        s.driver.offer_parts(&[parts]);
        wait_until(|| s.driver.interrupt.reset.load(Ordering::SeqCst) > 0);
        assert_eq!(s.driver.used(), None);
        s.device.stop_queue(0).expect("it ran");
    }
}

#[test]
fn the_target_shows_in_the_configuration_and_interrupts() {
    let s = setup(0, 0);
    let interrupt = Arc::new(Counted::default());
    s.device.connect(interrupt.clone());
    for (bytes, pages) in [(5 << 20, 1280u32), (8191, 1), (u64::MAX, 16384)] {
        s.device.set_target_bytes(bytes);
        assert_eq!(s.device.target_bytes(), u64::from(pages) * PAGE_SIZE);
        let mut config = [0xff; 12];
        s.device.read_config(0, &mut config);
        assert_eq!(config[..4], pages.to_le_bytes());
        assert_eq!(config[4..], [0; 8]);
    }
    s.device.set_target_bytes(u64::MAX);
    assert_eq!(interrupt.config.load(Ordering::SeqCst), 3);
}

#[test]
fn the_driver_writes_actual_and_nothing_else() {
    let s = setup(0, 0);
    s.device.write_config(4, &1280u32.to_le_bytes());
    assert_eq!(s.device.actual_bytes(), 5 << 20);
    s.device.write_config(0, &[0xff; 4]);
    s.device.write_config(u64::MAX, &[0xff; 4]);
    s.device.write_config(8, &[0xff; 8]);
    assert_eq!(s.device.actual_bytes(), 5 << 20);
    assert_eq!(s.device.target_bytes(), 0);
    s.device.write_config(2, &[0xff, 0xff, 1]);
    assert_eq!(s.device.actual_bytes(), 1281 * PAGE_SIZE);
    s.device.write_config(7, &[1, 0xff]);
    assert_eq!(s.device.actual_bytes(), (0x100_0501) * PAGE_SIZE);
    s.device.reset();
    assert_eq!(s.device.actual_bytes(), 0);
}

#[test]
fn sizes_are_saved_and_impossible_ones_refused() {
    let from = setup(0, 0).device;
    from.set_target_bytes(6 << 20);
    from.write_config(4, &77u32.to_le_bytes());
    let to = setup(0, 0).device;
    to.restore(&from.save()).expect("own state");
    assert_eq!(
        (to.target_bytes(), to.actual_bytes()),
        (6 << 20, 77 * PAGE_SIZE)
    );
    let state = State {
        target_pages: 1 << 30,
        actual_pages: 0,
    };
    let large = rmp_serde::to_vec_named(&state).expect("encodes");
    for bad in [&large[..], &[], &[0xc1], &[0xdf, 0xff, 0xff, 0xff, 0xff]] {
        assert!(to.restore(bad).is_err(), "{bad:x?}");
        assert_eq!(to.target_bytes(), 6 << 20);
    }
}
