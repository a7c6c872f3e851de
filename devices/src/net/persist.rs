//! What a network device keeps over a move, besides configuration, features and queues.

use serde::{Deserialize, Serialize};

use super::features;
use super::mac::MacAddr;
use super::shared::Shared;

/// Largest encoded state that is decoded, in bytes; this build's has some 60.
const MAX_BYTES: usize = 4096;

/// The saved type. Never rename or retype a field; a new field has a default that means "as before it existed".
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Saved {
    /// Six octets; the driver may have set another address than the configured one.
    #[serde(with = "serde_bytes")]
    mac: Vec<u8>,
    /// The driver is asked to announce itself, and has not done so.
    announce: bool,
    /// Queue pairs in use, from 1.
    active_pairs: u16,
    /// Feature bits that the driver has set by VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, if it has.
    offloads: Option<u64>,
}

pub(super) fn save(shared: &Shared) -> Vec<u8> {
    let choices = shared.choices();
    let saved = Saved {
        mac: choices.mac.octets().to_vec(),
        announce: choices.announce,
        active_pairs: shared.active(),
        offloads: choices.offloads,
    };
    rmp_serde::to_vec_named(&saved).expect("a struct of numbers and bytes encodes into memory")
}

/// On failure the device is as it was.
pub(super) fn restore(shared: &Shared, saved: &[u8]) -> Result<(), String> {
    if saved.len() > MAX_BYTES {
        return Err(format!(
            "{} bytes are more than the {MAX_BYTES} that are read",
            saved.len()
        ));
    }
    let saved: Saved = rmp_serde::from_slice(saved).map_err(|error| error.to_string())?;
    let octets: [u8; 6] = saved
        .mac
        .as_slice()
        .try_into()
        .map_err(|_| format!("an address of {} octets", saved.mac.len()))?;
    let mac = MacAddr::new(octets).map_err(|error| error.to_string())?;
    let pairs = saved.active_pairs;
    if pairs == 0 || pairs > shared.pairs() {
        return Err(format!(
            "{pairs} active queue pairs, where 1 to {} can be",
            shared.pairs()
        ));
    }
    if let Some(offloads) = saved.offloads
        && offloads & !features::GUEST_OFFLOADS != 0
    {
        return Err(format!("{offloads:#x} has bits that are no offloads"));
    }
    let before = shared.active();
    shared
        .activate(pairs)
        .map_err(|error| format!("the interface does not take {pairs} queue pairs: {error}"))?;
    let changed = shared.change(|choices| {
        choices.mac = mac;
        choices.announce = saved.announce;
        choices.offloads = saved.offloads;
    });
    changed.map_err(|error| {
        if let Err(error) = shared.activate(before) {
            tracing::warn!(%error, "the queues of a network interface cannot be set back");
        }
        format!("the interface does not take the offloads: {error}")
    })
}
