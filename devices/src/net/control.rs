//! Commands of the driver (section 5.1.6.5): class and command, their data, and a byte for the answer.

use std::sync::Arc;

use super::features::{
    CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, GUEST_ANNOUNCE, GUEST_OFFLOADS, MQ,
};
use super::mac::MacAddr;
use super::shared::Shared;
use crate::virtio::{QueueError, QueueHandler, Virtqueue};

const OK: u8 = 0;
const ERR: u8 = 1;
/// Longest command that is read, in bytes. The longest that makes sense has two tables of addresses, of a few hundred at most.
const MAX_COMMAND: u64 = 64 << 10;

const RX: u8 = 0;
/// VIRTIO_NET_CTRL_RX_PROMISC and _ALLMULTI; those after them need VIRTIO_NET_F_CTRL_RX_EXTRA, which is not offered.
const RX_LAST: u8 = 1;
const MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const MULTIQUEUE: u8 = 4;
const VQ_PAIRS_SET: u8 = 0;
const OFFLOADS: u8 = 5;
const OFFLOADS_SET: u8 = 0;

/// A command that is not carried out; the driver is told no more than that.
struct Refused;

pub(super) struct Control {
    shared: Arc<Shared>,
}

impl Control {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn carry_out(&self, command: &[u8]) -> Result<(), Refused> {
        let [class, number, data @ ..] = command else {
            return Err(Refused);
        };
        let accepted = self.shared.choices().accepted;
        let with = |features: u64| {
            if accepted & features == features {
                Ok(())
            } else {
                Err(Refused)
            }
        };
        match (*class, *number) {
            // Every frame that the host gives is passed on, which is more than any filter asks for.
            (RX, 0..=RX_LAST) => {
                with(CTRL_RX)?;
                matches!(data, [0 | 1]).then_some(()).ok_or(Refused)
            }
            (MAC, MAC_TABLE_SET) => {
                with(CTRL_RX)?;
                let multicast = after_table(after_table(data)?)?;
                multicast.is_empty().then_some(()).ok_or(Refused)
            }
            (MAC, MAC_ADDR_SET) => {
                with(CTRL_MAC_ADDR)?;
                let mac = MacAddr::new(all(data)?).map_err(|_| Refused)?;
                self.shared.choices().mac = mac;
                Ok(())
            }
            (ANNOUNCE, ANNOUNCE_ACK) => {
                with(GUEST_ANNOUNCE)?;
                if !data.is_empty() {
                    return Err(Refused);
                }
                self.shared.choices().announce = false;
                Ok(())
            }
            (MULTIQUEUE, VQ_PAIRS_SET) => {
                with(MQ)?;
                let pairs = u16::from_le_bytes(all(data)?);
                if pairs == 0 || pairs > self.shared.pairs() {
                    return Err(Refused);
                }
                self.shared.activate(pairs).map_err(|error| {
                    tracing::warn!(pairs, %error, "the network interface does not take as many queue pairs");
                    Refused
                })
            }
            (OFFLOADS, OFFLOADS_SET) => {
                with(CTRL_GUEST_OFFLOADS)?;
                let offloads = u64::from_le_bytes(all(data)?);
                if offloads & !(accepted & GUEST_OFFLOADS) != 0 {
                    return Err(Refused);
                }
                let changed = self
                    .shared
                    .change(|choices| choices.offloads = Some(offloads));
                changed.map_err(|error| {
                    tracing::warn!(offloads, %error, "the network interface does not take the offloads");
                    Refused
                })
            }
            _ => Err(Refused),
        }
    }
}

/// All of the data, which must have just that length.
fn all<const LEN: usize>(data: &[u8]) -> Result<[u8; LEN], Refused> {
    data.try_into().map_err(|_| Refused)
}

/// What follows a table of addresses: a number of entries, then as many of 6 bytes.
fn after_table(data: &[u8]) -> Result<&[u8], Refused> {
    let (entries, rest) = data.split_first_chunk().ok_or(Refused)?;
    let len = usize::try_from(u32::from_le_bytes(*entries))
        .ok()
        .and_then(|entries| entries.checked_mul(6))
        .ok_or(Refused)?;
    rest.get(len..).ok_or(Refused)
}

impl QueueHandler for Control {
    fn process(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        // A full queue at most: the driver notifies of what it adds.
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                // With event indices, a driver notifies of what comes after this only if it is asked to. A Linux driver waits for its answer
                // without letting anybody else run.
                if queue.enable_notification()? {
                    continue;
                }
                return queue.signal();
            };
            if chain.writable.is_empty() {
                return Err(QueueError::Request("a command has no room for its answer"));
            }
            let len = chain.readable.len();
            let answer = if len > MAX_COMMAND {
                ERR
            } else {
                let mut command = vec![0; len as usize];
                chain.readable.read(queue.memory(), 0, &mut command)?;
                self.carry_out(&command).map_or(ERR, |()| OK)
            };
            queue.write(&chain.writable, 0, &[answer])?;
            queue.complete(chain.head, 1)?;
        }
        queue.kick().write(1)?;
        queue.signal()
    }
}
