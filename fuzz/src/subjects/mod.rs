//! The devices, each with its host's end.

mod balloon;
mod block;
mod console;
mod echo;
mod net;
mod rng;
mod vsock;

use std::sync::Arc;

use devices::virtio::VirtioDevice;

pub use balloon::balloon;
pub use block::block;
pub use console::console;
pub use echo::echo;
pub use net::net;
pub use rng::rng;
pub use vsock::vsock;

use crate::machine::Host;

/// A device and its host's end.
pub type Subject = (Arc<dyn VirtioDevice>, Box<dyn Host>);

/// A number that an event brings along, and the rest.
fn number(data: &[u8]) -> (u16, &[u8]) {
    match data.split_first_chunk() {
        Some((number, rest)) => (u16::from_le_bytes(*number), rest),
        None => (0, data),
    }
}
