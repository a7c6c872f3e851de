//! A network device whose interface is a pair of sockets.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use devices::net::Net;

use super::{Subject, number};
use crate::machine::{Driver, Host};

const HEADER: usize = 12;
/// The receive and transmit queues of the first pair, and the control queue of two pairs.
const RX: u8 = 0;
const TX: u8 = 1;
const CONTROL: u8 = 4;

struct Network {
    net: Arc<Net>,
    others: Vec<UnixDatagram>,
}

impl Network {
    fn drain(&self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut packet = vec![0; 1 << 17];
        for other in &self.others {
            while let Ok(len) = other.recv(&mut packet) {
                all.push(packet[..len].to_vec());
            }
        }
        all
    }
}

impl Host for Network {
    fn event(&mut self, kind: u8, data: &[u8]) {
        match kind % 8 {
            // Packets of the length that the data says, short ones with the data in them.
            kind @ 0..=3 => {
                let (len, data) = number(data);
                let mut packet = data.to_vec();
                let long = if kind & 2 != 0 {
                    usize::from(len) + 100
                } else {
                    0
                };
                packet.resize(packet.len().max(long), 0x33);
                // It may be full.
                let _ = self.others[usize::from(kind & 1)].send(&packet);
            }
            4 | 5 => drop(self.drain()),
            6 => {
                self.net.announce();
            }
            _ => drop(self.net.send_rarp()),
        }
    }

    fn settle(&mut self) {
        self.drain();
    }

    fn features(&self) -> u64 {
        // All but event indices.
        !(1 << 29)
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        let mut packet = vec![0; HEADER];
        packet.extend(b"from the guest to the host");
        driver.request(TX, &[&packet[..5], &packet[5..]], &[]);
        assert_eq!(self.drain(), [packet]);
        // What has come before is received first.
        let mut packet = vec![0; HEADER];
        packet.extend(b"from the host to the guest");
        let mut sent = false;
        for _ in 0..10_000 {
            let request = driver.offer(RX, &[], &[70_000]);
            if !sent {
                devices::fuzzing::step(false);
                sent = self.others[0].send(&packet).is_ok();
            }
            let (received, len) = driver.wait(RX, &request);
            if received[HEADER..len as usize] == packet[HEADER..] {
                let command = [1, 1, 0x52, 0x54, 0, 1, 2, 3];
                assert_eq!(driver.request(CONTROL, &[&command], &[1]).0, [0]);
                assert_eq!(self.net.mac().octets(), command[2..]);
                return;
            }
        }
        panic!("a packet is never received");
    }
}

/// The device, with two queue pairs.
pub fn net() -> Subject {
    let mac = "52:54:00:12:34:56".parse().expect("an address");
    let (net, others) = devices::fuzzing::net(mac, 2).expect("sockets");
    let net = Arc::new(net);
    let network = Network {
        net: net.clone(),
        others,
    };
    (net, Box::new(network))
}
