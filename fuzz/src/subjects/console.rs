//! A console whose other end the input is.

use std::sync::Arc;

use devices::Console;
use devices::fuzzing::Hand;

use super::{Subject, number};
use crate::machine::{Driver, Host};

struct Terminal {
    console: Arc<Console>,
    hand: Hand,
}

impl Host for Terminal {
    fn event(&mut self, kind: u8, data: &[u8]) {
        match kind % 4 {
            0 => {
                self.hand.give(data);
            }
            1 => drop(self.hand.take(number(data).0.into())),
            // More than there is room for.
            2 => {
                self.hand.give(&data.repeat(64));
            }
            _ => {
                let (columns, rest) = number(data);
                self.console.set_size(columns, number(rest).0);
            }
        }
    }

    fn settle(&mut self) {
        self.hand.take(usize::MAX);
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        driver.request(1, &[b"to the ", b"host"], &[]);
        assert_eq!(self.hand.take(usize::MAX), b"to the host");
        let input = b"to the guest";
        let mut received = Vec::new();
        let mut given = false;
        // What has come before is received first.
        while !received.ends_with(input) {
            assert!(received.len() < 10_000, "input is never received");
            let request = driver.offer(0, &[], &[100]);
            devices::fuzzing::step(false);
            given = given || self.hand.give(input) == input.len();
            let (bytes, len) = driver.wait(0, &request);
            received.extend(&bytes[..len as usize]);
        }
    }
}

/// The device.
pub fn console() -> Subject {
    let (console, hand) = Console::in_hand(Some((80, 25))).expect("events");
    let console = Arc::new(console);
    let terminal = Terminal {
        console: console.clone(),
        hand,
    };
    (console, Box::new(terminal))
}
