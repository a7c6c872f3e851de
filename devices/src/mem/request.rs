//! The driver's requests and what becomes of them (Virtual I/O Device specification 1.3, section 5.15.6).
//!
//! ```text
//!   bytes ──► Request ──► is it in the region, aligned, not empty? ──no──► ERROR
//!                             PLUG    all unplugged? ──no──► ERROR    more than is requested? ──yes──► NACK
//!                             UNPLUG  all plugged?   ──no──► ERROR
//!                         held back, or the host cannot? ──yes──► BUSY ──► the driver tries again later
//!                         done ──► ACK
//! ```

use std::io;
use std::ops::Range;

use memory::BLOCK_SIZE;

use super::blocks::Blocks;

/// `struct virtio_mem_req`.
pub(super) const REQUEST_LEN: usize = 24;
/// `struct virtio_mem_resp`.
pub(super) const ANSWER_LEN: usize = 10;

/// What a driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Extent),
    Unplug(Extent),
    UnplugAll,
    State(Extent),
    /// Of a type that does not exist.
    Unknown(u16),
}

/// Some blocks, as the driver names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) gpa: u64,
    pub(super) blocks: u16,
}

impl Request {
    /// Type, padding, address, number of blocks, padding: all little endian.
    pub(super) fn parse(bytes: &[u8; REQUEST_LEN]) -> Self {
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut gpa = [0; 8];
        gpa.copy_from_slice(&bytes[8..16]);
        let extent = Extent {
            gpa: u64::from_le_bytes(gpa),
            blocks: short(16),
        };
        match short(0) {
            0 => Self::Plug(extent),
            1 => Self::Unplug(extent),
            2 => Self::UnplugAll,
            3 => Self::State(extent),
            other => Self::Unknown(other),
        }
    }
}

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Ack,
    Nack,
    Busy,
    Error,
    /// To [`Request::State`].
    State(BlockState),
}

/// What some blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

impl Answer {
    /// Type, padding, state.
    pub(super) fn to_bytes(self) -> [u8; ANSWER_LEN] {
        let (kind, state) = match self {
            Self::Ack => (0u8, 0),
            Self::State(state) => (0, state as u8),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let mut bytes = [0; ANSWER_LEN];
        bytes[0] = kind;
        bytes[8] = state;
        bytes
    }
}

/// The host's side of blocks.
pub(super) trait Host {
    /// Makes blocks usable, and all zero.
    fn plug(&self, blocks: Range<u64>) -> io::Result<()>;
    /// Takes blocks away: what they held is lost, and the host has their memory.
    fn unplug(&self, blocks: Range<u64>) -> io::Result<()>;
}

/// The region and its blocks.
#[derive(Clone, Debug)]
pub(super) struct Region {
    /// First guest-physical address.
    pub(super) gpa: u64,
    pub(super) blocks: Blocks,
}

impl Region {
    /// The blocks of an extent, if they are some, and all in the region.
    fn blocks_of(&self, extent: Extent) -> Option<Range<u64>> {
        let offset = extent.gpa.checked_sub(self.gpa)?;
        if extent.blocks == 0 || !offset.is_multiple_of(BLOCK_SIZE) {
            return None;
        }
        let first = offset / BLOCK_SIZE;
        let end = first.checked_add(u64::from(extent.blocks))?;
        (end <= self.blocks.count()).then_some(first..end)
    }

    /// Serves a request. `most` is how many blocks the driver may have; `busy`: nothing may change now.
    pub(super) fn serve(
        &mut self,
        request: Request,
        most: u64,
        busy: bool,
        host: &dyn Host,
    ) -> Answer {
        match request {
            Request::Plug(extent) => {
                let Some(blocks) = self.blocks_of(extent) else {
                    return Answer::Error;
                };
                if self.blocks.plugged_in(blocks.clone()) != 0 {
                    return Answer::Error;
                }
                if self.blocks.plugged() + (blocks.end - blocks.start) > most {
                    return Answer::Nack;
                }
                if busy || !done("plug", host.plug(blocks.clone())) {
                    return Answer::Busy;
                }
                self.blocks.set(blocks, true);
                Answer::Ack
            }
            Request::Unplug(extent) => {
                let Some(blocks) = self.blocks_of(extent) else {
                    return Answer::Error;
                };
                if self.blocks.plugged_in(blocks.clone()) != blocks.end - blocks.start {
                    return Answer::Error;
                }
                self.unplug(blocks, busy, host)
            }
            Request::UnplugAll => {
                while let Some(run) = self.blocks.next_run(0) {
                    let answer = self.unplug(run, busy, host);
                    if answer != Answer::Ack {
                        return answer;
                    }
                }
                Answer::Ack
            }
            Request::State(extent) => {
                let Some(blocks) = self.blocks_of(extent) else {
                    return Answer::Error;
                };
                let all = blocks.end - blocks.start;
                Answer::State(match self.blocks.plugged_in(blocks) {
                    0 => BlockState::Unplugged,
                    plugged if plugged == all => BlockState::Plugged,
                    _ => BlockState::Mixed,
                })
            }
            Request::Unknown(_) => Answer::Error,
        }
    }

    fn unplug(&mut self, blocks: Range<u64>, busy: bool, host: &dyn Host) -> Answer {
        if busy || !done("unplug", host.unplug(blocks.clone())) {
            return Answer::Busy;
        }
        self.blocks.set(blocks, false);
        Answer::Ack
    }
}

fn done(what: &str, result: io::Result<()>) -> bool {
    if let Err(error) = &result {
        tracing::warn!(%error, "the host cannot {what} memory; the guest will try again");
    }
    result.is_ok()
}
