//! I/O events of ports. The driver has them only for memory, so those of ports are matched here, at the intercept: the write still
//! costs an exit, but no access of the bus.

use std::os::fd::AsRawFd;
use std::sync::{PoisonError, RwLock};

use vmm_sys_util::eventfd::EventFd;

use super::call;
use crate::{Error, IoEventMatch, Result};

struct PortEvent {
    port: u16,
    when: IoEventMatch,
    /// The number under which it was registered.
    fd: i32,
    event: EventFd,
}

/// The I/O events of a machine's ports.
#[derive(Default)]
pub(crate) struct PortEvents(RwLock<Vec<PortEvent>>);

impl PortEvents {
    pub(crate) fn add(&self, event: &EventFd, port: u16, when: IoEventMatch) -> Result<()> {
        let mut events = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if events
            .iter()
            .any(|known| known.port == port && overlap(known.when, when))
        {
            return Err(call("register_ioevent")(std::io::Error::from_raw_os_error(
                libc::EEXIST,
            )));
        }
        events.push(PortEvent {
            port,
            when,
            fd: event.as_raw_fd(),
            event: event.try_clone().map_err(call("dup"))?,
        });
        Ok(())
    }

    pub(crate) fn remove(&self, event: &EventFd, port: u16, when: IoEventMatch) -> Result<()> {
        let mut events = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let at = events.iter().position(|known| {
            known.port == port && known.when == when && known.fd == event.as_raw_fd()
        });
        let at = at.ok_or_else(|| {
            Error::Invalid(format!("there is no such I/O event of port {port:#x}"))
        })?;
        events.remove(at);
        Ok(())
    }

    /// The guest writes `data` to `port`. Answers whether that was an event.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> bool {
        let events = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = [0; 8];
        let Some(low) = bytes.get_mut(..data.len()) else {
            return false;
        };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let size = data.len();
        let hit = events.iter().find(|known| {
            known.port == port
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
            tracing::debug!(port, %error, "an I/O event was not counted");
        }
        hit.is_some()
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
        let events = PortEvents::default();
        let event = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        let exact = IoEventMatch::Value { size: 4, value: 5 };
        events.add(&event, 0x30, exact).expect("add");
        assert!(events.add(&event, 0x30, IoEventMatch::Any).is_err());
        assert!(!events.write(0x30, &[6, 0, 0, 0]));
        assert!(!events.write(0x30, &[5]));
        assert!(!events.write(0x31, &[5, 0, 0, 0]));
        assert!(events.write(0x30, &[5, 0, 0, 0]));
        assert_eq!(event.read().ok(), Some(1));
        events.remove(&event, 0x30, exact).expect("remove");
        assert!(events.remove(&event, 0x30, exact).is_err());
        assert!(!events.write(0x30, &[5, 0, 0, 0]));
    }
}
