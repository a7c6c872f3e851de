//! I/O events as this process knows them.
//!
//! The hypervisor turns a guest's write into an event by itself where it can. What it hands over undecoded (or has no such thing for: ports
//! on the Microsoft hypervisor) is matched here, before the bus sees it, so that a doorbell rings whoever serves the write.

use std::os::fd::AsRawFd;
use std::sync::{PoisonError, RwLock};

use vmm_sys_util::eventfd::EventFd;

use crate::{Error, IoEventAddress, IoEventMatch, Result};

struct Known {
    at: IoEventAddress,
    when: IoEventMatch,
    /// The number under which it was registered.
    fd: i32,
    event: EventFd,
}

/// The I/O events of a machine.
#[derive(Default)]
pub(crate) struct IoEvents(RwLock<Vec<Known>>);

impl IoEvents {
    /// Adds an event, unless a write could be meant by it and by another.
    pub(crate) fn add(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
    ) -> Result<()> {
        let mut events = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let taken = events
            .iter()
            .any(|known| known.at == at && overlap(known.when, when));
        if taken {
            return Err(failed(std::io::Error::from_raw_os_error(libc::EEXIST)));
        }
        events.push(Known {
            at,
            when,
            fd: event.as_raw_fd(),
            event: event.try_clone().map_err(failed)?,
        });
        Ok(())
    }

    /// Takes an event away.
    pub(crate) fn remove(
        &self,
        event: &EventFd,
        at: IoEventAddress,
        when: IoEventMatch,
    ) -> Result<()> {
        let mut events = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let index = events.iter().position(|known| {
            known.at == at && known.when == when && known.fd == event.as_raw_fd()
        });
        let index = index
            .ok_or_else(|| Error::Invalid(format!("there is no such I/O event of {at:x?}")))?;
        events.remove(index);
        Ok(())
    }

    /// The guest writes `data` there. Answers whether that was an event.
    pub(crate) fn write(&self, at: IoEventAddress, data: &[u8]) -> bool {
        let events = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = [0; 8];
        let Some(low) = bytes.get_mut(..data.len()) else {
            return false;
        };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let size = data.len();
        let hit = events.iter().find(|known| {
            known.at == at
                && match known.when {
                    IoEventMatch::Any => true,
                    IoEventMatch::Value {
                        size: wanted_size,
                        value: wanted,
                    } => usize::from(wanted_size) == size && wanted == value,
                }
        });
        if let Some(hit) = hit
            && let Err(error) = hit.event.write(1)
        {
            // The counter of an event that nobody reads is full: whoever reads it will know.
            tracing::debug!(?at, %error, "an I/O event was not counted");
        }
        hit.is_some()
    }
}

fn failed(source: std::io::Error) -> Error {
    Error::Call {
        operation: "register_ioevent",
        source,
    }
}

/// Whether one write could be meant by both.
fn overlap(a: IoEventMatch, b: IoEventMatch) -> bool {
    matches!(a, IoEventMatch::Any) || matches!(b, IoEventMatch::Any) || a == b
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn only_the_write_that_matches_is_an_event() {
        let events = IoEvents::default();
        let event = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        let exact = IoEventMatch::Value { size: 4, value: 5 };
        let at = IoEventAddress::Pio(0x30);
        events.add(&event, at, exact).expect("add");
        assert!(events.add(&event, at, IoEventMatch::Any).is_err());
        assert!(!events.write(at, &[6, 0, 0, 0]));
        assert!(!events.write(at, &[5]));
        assert!(!events.write(IoEventAddress::Mmio(0x30), &[5, 0, 0, 0]));
        assert!(!events.write(at, &[0; 32]));
        assert!(events.write(at, &[5, 0, 0, 0]));
        assert_eq!(event.read().ok(), Some(1));
        events.remove(&event, at, exact).expect("remove");
        assert!(events.remove(&event, at, exact).is_err());
        assert!(!events.write(at, &[5, 0, 0, 0]));
    }
}
