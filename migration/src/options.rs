//! What a caller can choose, and what it is told in the end.

use std::num::{NonZeroU16, NonZeroUsize};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::control::RoundProgress;

/// What to do when a move does not converge in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeoutStrategy {
    /// Give the move up; the guest stays.
    #[default]
    Cancel,
    /// Pause the guest and finish, however long that takes.
    Ignore,
}

/// How to move a machine away. The defaults of the first three are those of Cloud Hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendOptions {
    /// The longest downtime that is acceptable, in milliseconds. A ceiling, not a goal: rounds go on below it while
    /// they still help.
    pub downtime_ms: u64,
    /// How long pre-copy may take, in seconds, before [`SendOptions::timeout_strategy`] decides.
    pub timeout_s: u64,
    /// What to do then.
    pub timeout_strategy: TimeoutStrategy,
    /// After how many rounds [`SendOptions::timeout_strategy`] decides as well.
    pub max_rounds: u32,
    /// Data channels to open, if the destination takes as many; `None` is [`SendOptions::usual_data_channels`].
    pub data_channels: Option<NonZeroU16>,
    /// How long connecting and negotiating may take.
    pub connect_timeout: Duration,
    /// How long the destination may take to build the machine.
    pub reserve_timeout: Duration,
    /// How long the destination may be silent, or take nothing, while memory travels.
    pub peer_timeout: Duration,
    /// How long the destination may take to answer in the handover, with the guest standing still.
    pub handover_timeout: Duration,
}

impl Default for SendOptions {
    fn default() -> Self {
        Self {
            downtime_ms: 300,
            timeout_s: 3600,
            timeout_strategy: TimeoutStrategy::Cancel,
            max_rounds: 1000,
            data_channels: None,
            connect_timeout: Duration::from_secs(10),
            reserve_timeout: Duration::from_secs(60),
            peer_timeout: Duration::from_secs(30),
            handover_timeout: Duration::from_secs(30),
        }
    }
}

impl SendOptions {
    /// As many as there are processors here to feed them, up to 4: beyond that a network is the limit.
    pub fn usual_data_channels() -> NonZeroU16 {
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        NonZeroU16::new(processors.min(4) as u16).unwrap_or(NonZeroU16::MIN)
    }
}

/// How to take a machine in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveOptions {
    /// How long to wait for a source; `None` is until cancelled.
    pub wait: Option<Duration>,
    /// How long a connection may take to say what it is, and a source to negotiate and describe its machine.
    pub connect_timeout: Duration,
    /// How long the source may be silent afterwards.
    pub peer_timeout: Duration,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self {
            wait: None,
            connect_timeout: Duration::from_secs(10),
            peer_timeout: Duration::from_secs(30),
        }
    }
}

/// A move that has succeeded, as the source saw it. The guest runs at the destination; the source's copy is paused for
/// good.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SendReport {
    /// All rounds, the last one with the guest paused.
    pub rounds: Vec<RoundProgress>,
    /// From the first connection to the destination's word that the guest runs, in milliseconds.
    pub total_ms: f64,
    /// From asking the guest to stop to the destination's word that it runs, in milliseconds.
    pub downtime_ms: f64,
    /// The estimate that the guest was paused on, in milliseconds.
    pub estimated_downtime_ms: f64,
    /// Size of the guest's RAM in bytes.
    pub ram_bytes: u64,
    /// Bytes sent over all data channels, with headers.
    pub bytes_sent: u64,
    /// Pages that were found to be zero and not sent as data.
    pub zero_pages: u64,
}

/// A move that has succeeded, as the destination saw it. The guest runs here, or is paused if it was.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReceiveReport {
    /// Number of rounds.
    pub rounds: u32,
    /// From the source's first message to the guest running here, in milliseconds.
    pub total_ms: f64,
    /// Page data that has arrived, in bytes.
    pub bytes_received: u64,
    /// The source could still be told that the guest runs here, as far as can be seen from here. If not, the connection
    /// broke after the commit, and the source believes to be in doubt.
    pub source_informed: bool,
}
