//! Saved state of devices.
//!
//! ```text
//!   device ──save──► SavedState { kind, version, data: MessagePack map with field names }
//!   device ◄─restore── kind right? ─► version known? ─► decodes? ─► values possible? ─► taken over, all at once
//! ```
//!
//! Promises: kind and version can be read without decoding the rest. A field that is added gets a default, so that an older
//! build's state loads; a change that a default cannot express gets a new version number, and the older one is converted. A
//! state that fails any check leaves the device as it was.

pub mod saved;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Largest encoded state that is decoded. The largest device here saves some 70 KiB.
pub const MAX_STATE_BYTES: usize = 1 << 20;

/// The state of one device, as it is stored or sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Which device type it belongs to: [`Persist::kind`].
    pub kind: String,
    /// Version of the saved type: [`Persist::version`].
    pub version: u16,
    /// The saved type, as MessagePack with field names.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}

/// Why a saved state was not taken.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The state belongs to another device type.
    #[error(
        "state of a {found:?} device was given to {expected}; the two machines' devices differ"
    )]
    WrongKind {
        /// The device's kind.
        expected: &'static str,
        /// The state's kind.
        found: String,
    },
    /// A newer build saved it, or it carries no version at all.
    #[error(
        "state of {kind} has version {found}, this build reads 1 to {newest}; use a build that is as new as the one that saved it"
    )]
    Version {
        /// The device's kind.
        kind: &'static str,
        /// The state's version.
        found: u16,
        /// The newest version that this build reads.
        newest: u16,
    },
    /// It does not decode.
    #[error("state of {kind} is damaged: {source}")]
    Damaged {
        /// The device's kind.
        kind: &'static str,
        /// What the decoder says.
        source: rmp_serde::decode::Error,
    },
    /// It is larger than any state of this build.
    #[error("state of {kind} has {len} bytes, more than the {MAX_STATE_BYTES} that are read")]
    TooLarge {
        /// The device's kind.
        kind: &'static str,
        /// The state's size in bytes.
        len: usize,
    },
    /// It decodes, but a value cannot be.
    #[error("state of {kind} has an impossible {field}: {reason}")]
    OutOfRange {
        /// The device's kind.
        kind: &'static str,
        /// The field.
        field: &'static str,
        /// The value and what is wrong with it.
        reason: String,
    },
}

/// A device whose state can be saved and restored. The vCPUs are stopped, and the device's threads are paused, when it is
/// called.
pub trait Persist: Send + Sync {
    /// Name of the device type; never changes.
    fn kind(&self) -> &'static str;
    /// Version that [`Persist::save`] writes, and newest that [`Persist::restore`] reads. Starts at 1.
    fn version(&self) -> u16;
    /// Reads the state.
    fn save(&self) -> SavedState;
    /// Takes the state over. On failure the device is unchanged.
    fn restore(&self, state: &SavedState) -> Result<(), StateError>;
}

/// Encodes a saved type.
pub(crate) fn encode<T: Serialize>(device: &dyn Persist, saved: &T) -> SavedState {
    SavedState {
        kind: device.kind().to_owned(),
        version: device.version(),
        data: rmp_serde::to_vec_named(saved)
            .expect("a struct of numbers and bytes always encodes into memory"),
    }
}

/// Checks kind, version and size, then decodes.
pub(crate) fn decode<T: DeserializeOwned>(
    device: &dyn Persist,
    state: &SavedState,
) -> Result<T, StateError> {
    let kind = device.kind();
    if state.kind != kind {
        // A hostile name is cut, so that the message stays readable.
        return Err(StateError::WrongKind {
            expected: kind,
            found: state.kind.chars().take(64).collect(),
        });
    }
    if state.version == 0 || state.version > device.version() {
        return Err(StateError::Version {
            kind,
            found: state.version,
            newest: device.version(),
        });
    }
    if state.data.len() > MAX_STATE_BYTES {
        return Err(StateError::TooLarge {
            kind,
            len: state.data.len(),
        });
    }
    rmp_serde::from_slice(&state.data).map_err(|source| StateError::Damaged { kind, source })
}

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod tests;
