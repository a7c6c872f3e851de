//! The phases of a move: one list for code, progress, log and tests.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A phase of a move, the same on both sides.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The two processes find each other.
    #[default]
    Connect,
    /// They agree on a protocol version and on features.
    Negotiate,
    /// The destination learns what is to come and builds the machine, or refuses.
    Reserve,
    /// Memory travels while the guest runs on.
    Precopy,
    /// The guest is stopped and what it has written last is found.
    Pause,
    /// The last pages and the state travel, and the right to run the guest changes hands.
    Handover,
    /// Memory goes to the files of a snapshot, or comes from them: no phase of a move.
    Memory,
    /// The guest runs at the destination, or the snapshot is done.
    Complete,
}

impl Phase {
    /// All phases of a move, in order.
    pub const ALL: [Self; 7] = [
        Self::Connect,
        Self::Negotiate,
        Self::Reserve,
        Self::Precopy,
        Self::Pause,
        Self::Handover,
        Self::Complete,
    ];

    /// The name in messages, progress and logs; the same as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Negotiate => "negotiate",
            Self::Reserve => "reserve",
            Self::Precopy => "precopy",
            Self::Pause => "pause",
            Self::Handover => "handover",
            Self::Memory => "memory",
            Self::Complete => "complete",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_in_order_and_names_match_json() {
        assert!(Phase::ALL.is_sorted());
        for phase in Phase::ALL {
            assert_eq!(serde_json::json!(phase), phase.name());
        }
    }
}
