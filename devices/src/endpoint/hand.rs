//! The other end in the hand of a fuzz target, which is its pump.

use std::sync::Arc;

use super::{EndpointError, GuestPort, Opened, Output, OutputQueue};

/// What is on the other end of a console or serial port without a pump.
pub struct Hand {
    queue: Arc<OutputQueue>,
    port: Arc<dyn GuestPort>,
}

impl Hand {
    /// An other end, and what makes its hand once there is a port.
    pub(crate) fn open() -> Result<(Opened, impl FnOnce(Arc<dyn GuestPort>) -> Self), EndpointError>
    {
        let (queue, _) = OutputQueue::new()?;
        let queue = Arc::new(queue);
        let opened = Opened::without_pump(Output::queue(queue.clone()));
        Ok((opened, move |port| Self { queue, port }))
    }

    /// Gives input, as much of it as there is room for; returns how much that was.
    pub fn give(&self, bytes: &[u8]) -> usize {
        let count = self.port.input_room().min(bytes.len());
        if count > 0 {
            self.port.input(&bytes[..count]);
        }
        count
    }

    /// Takes output, at most so many bytes.
    pub fn take(&self, most: usize) -> Vec<u8> {
        let bytes: Vec<u8> = {
            let mut queue = self.queue.lock();
            let count = queue.bytes.len().min(most);
            queue.bytes.drain(..count).collect()
        };
        if !bytes.is_empty() {
            self.port.output_left();
        }
        bytes
    }
}
