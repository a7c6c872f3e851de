//! A balloon for the guest's memory.

use std::sync::Arc;

use devices::{Balloon, BalloonOptions};
use memory::GuestRam;

use super::{Subject, number};
use crate::machine::{Driver, Host};

struct Operator(Arc<Balloon>);

impl Host for Operator {
    fn event(&mut self, kind: u8, data: &[u8]) {
        let number = number(data).0;
        match kind % 3 {
            0 => self.0.set_target_bytes(u64::from(number) << 12),
            1 => self.0.request_statistics(),
            _ => self.0.set_discarding(number & 1 != 0),
        }
    }

    fn settle(&mut self) {
        self.0.set_discarding(true);
    }

    fn features(&self) -> u64 {
        1 << 1 | 1 << 2 | 1 << 5
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        let before = self.0.counters();
        // The last page below 1 MiB, and one that is not RAM.
        let pages = [0xff_u32.to_le_bytes(), 0x1000_u32.to_le_bytes()].concat();
        driver.request(0, &[&pages], &[]);
        driver.request(1, &[&pages], &[]);
        let after = self.0.counters();
        assert_eq!(after.inflated_pages, before.inflated_pages + 2);
        assert_eq!(after.discarded_pages, before.discarded_pages + 1);
        assert_eq!(after.ignored_pages, before.ignored_pages + 1);
        // Memory that is free, total, in bytes.
        let mut statistics = 4_u16.to_le_bytes().to_vec();
        statistics.extend(77_u64.to_le_bytes());
        let request = driver.offer(2, &[&statistics], &[]);
        devices::fuzzing::step(false);
        self.0.request_statistics();
        driver.wait(2, &request);
        assert_eq!(self.0.statistics().values().collect::<Vec<_>>(), [&77]);
    }
}

/// The device.
pub fn balloon(ram: &Arc<GuestRam>) -> Subject {
    let options = BalloonOptions {
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    let balloon = Balloon::new(ram.clone(), 64 << 10, options).expect("an event");
    let balloon = Arc::new(balloon);
    (balloon.clone(), Box::new(Operator(balloon)))
}
