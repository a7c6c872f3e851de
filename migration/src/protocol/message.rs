//! Control messages: a fixed header with kind and length, then msgpack with field names.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ProtocolError;
use crate::{MachineState, Manifest, Refusal};

/// Flag of a frame: a reader that does not know the kind skips the message.
pub const OPTIONAL: u16 = 1;

/// What precedes every control message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    /// Which message: [`Kind`].
    pub kind: U16,
    /// [`OPTIONAL`]; other bits are zero and ignored.
    pub flags: U16,
    /// Length of the body in bytes.
    pub length: U32,
}

impl FrameHeader {
    /// Size in bytes.
    pub const SIZE: usize = size_of::<Self>();
}

/// The kinds of messages, their names and the longest bodies they may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Message::Manifest`]
    Manifest,
    /// [`Message::Accept`]
    Accept,
    /// [`Message::Refuse`]
    Refuse,
    /// [`Message::RoundDone`]
    RoundDone,
    /// [`Message::State`]
    State,
    /// [`Message::Ready`]
    Ready,
    /// [`Message::Commit`]
    Commit,
    /// [`Message::Resumed`]
    Resumed,
    /// [`Message::Abort`]
    Abort,
}

/// Longest body of a message that may be skipped.
const MAX_OPTIONAL: u32 = 64 << 10;

impl Kind {
    /// Kind, number on the wire, name, longest body in bytes.
    const TABLE: [(Self, u16, &'static str, u32); 9] = [
        (Self::Manifest, 1, "manifest", 16 << 20),
        (Self::Accept, 2, "accept", 4 << 10),
        (Self::Refuse, 3, "refuse", 1 << 20),
        (Self::RoundDone, 4, "round_done", 4 << 10),
        (Self::State, 5, "state", 64 << 20),
        (Self::Ready, 6, "ready", 4 << 10),
        (Self::Commit, 7, "commit", 4 << 10),
        (Self::Resumed, 8, "resumed", 4 << 10),
        (Self::Abort, 9, "abort", 64 << 10),
    ];

    fn row(self) -> &'static (Self, u16, &'static str, u32) {
        // The table is in the order of the enum; a test compares them.
        &Self::TABLE[self as usize]
    }

    /// The kind's name in messages.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// The longest body in bytes.
    pub fn max_len(self) -> u32 {
        self.row().3
    }
}

/// What a frame header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// A message of a known kind with a body of this many bytes.
    Message(Kind, u32),
    /// A message to be skipped with a body of this many bytes.
    Skip(u32),
}

impl FrameHeader {
    /// Checks kind and length.
    pub fn check(&self) -> Result<Announced, ProtocolError> {
        let (number, length) = (self.kind.get(), self.length.get());
        let too_long = |what, limit: u32| {
            Err(ProtocolError::TooLong {
                what,
                found: length.into(),
                limit: limit.into(),
            })
        };
        match Kind::TABLE.iter().find(|row| row.1 == number) {
            Some((_, _, name, limit)) if length > *limit => too_long(name, *limit),
            Some((kind, ..)) => Ok(Announced::Message(*kind, length)),
            None if self.flags.get() & OPTIONAL == 0 => {
                Err(ProtocolError::UnknownKind { kind: number })
            }
            None if length > MAX_OPTIONAL => too_long("an optional message", MAX_OPTIONAL),
            None => Ok(Announced::Skip(length)),
        }
    }
}

/// A control message.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Source: what is to come.
    Manifest(Box<Manifest>),
    /// Destination: the machine is built; memory may come.
    Accept(Accept),
    /// Destination: it cannot take the machine. A proof that the guest does not run there.
    Refuse(Refuse),
    /// Destination: everything of a round has arrived.
    RoundDone(RoundDone),
    /// Source: everything but memory, with the guest paused.
    State(Box<State>),
    /// Destination: the whole machine is in place.
    Ready,
    /// Source: the guest is yours.
    Commit,
    /// Destination: the guest runs, or is paused as it was.
    Resumed,
    /// Either side: it gives up. From a destination, a proof that the guest does not run there.
    Abort(Abort),
}

/// Body of [`Message::Accept`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// Random; what data channels identify themselves with.
    pub session: [u8; 16],
    /// Most data channels that the source may open.
    pub data_channels: u16,
}

/// Body of [`Message::Refuse`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// All that is in the way.
    pub reasons: Vec<Refusal>,
}

/// Body of [`Message::RoundDone`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundDone {
    /// The round's number.
    pub round: u32,
    /// Contents of pages that arrived in it, in bytes.
    pub bytes: u64,
}

/// Body of [`Message::State`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The number of the last round: the state is valid once that has arrived.
    pub last_round: u32,
    /// The state.
    pub machine: MachineState,
    /// When this was sent, by the source's CLOCK_REALTIME in nanoseconds since 1970.
    #[serde(default)]
    pub sent_ns: Option<u64>,
}

/// Body of [`Message::Abort`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {
    /// Why, for people.
    pub reason: String,
}

impl Message {
    /// Which kind it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Manifest(_) => Kind::Manifest,
            Self::Accept(_) => Kind::Accept,
            Self::Refuse(_) => Kind::Refuse,
            Self::RoundDone(_) => Kind::RoundDone,
            Self::State(_) => Kind::State,
            Self::Ready => Kind::Ready,
            Self::Commit => Kind::Commit,
            Self::Resumed => Kind::Resumed,
            Self::Abort(_) => Kind::Abort,
        }
    }

    /// Its name in messages.
    pub fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// Header and body, ready to be sent.
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        let kind = self.kind();
        let body = match self {
            Self::Manifest(body) => rmp_serde::to_vec_named(body),
            Self::Accept(body) => rmp_serde::to_vec_named(body),
            Self::Refuse(body) => rmp_serde::to_vec_named(body),
            Self::RoundDone(body) => rmp_serde::to_vec_named(body),
            Self::State(body) => rmp_serde::to_vec_named(body),
            Self::Abort(body) => rmp_serde::to_vec_named(body),
            Self::Ready | Self::Commit | Self::Resumed => Ok(Vec::new()),
        }
        .map_err(|error| ProtocolError::Malformed {
            message: kind.name(),
            reason: error.to_string(),
        })?;
        let header = FrameHeader {
            kind: kind.row().1.into(),
            flags: 0.into(),
            length: u32::try_from(body.len()).unwrap_or(u32::MAX).into(),
        };
        header.check()?;
        Ok([header.as_bytes(), &body].concat())
    }

    /// Reads a body.
    pub fn decode(kind: Kind, body: &[u8]) -> Result<Self, ProtocolError> {
        fn read<T: DeserializeOwned>(kind: Kind, body: &[u8]) -> Result<T, ProtocolError> {
            rmp_serde::from_slice(body).map_err(|error| ProtocolError::Malformed {
                message: kind.name(),
                reason: error.to_string(),
            })
        }
        Ok(match kind {
            Kind::Manifest => Self::Manifest(read(kind, body)?),
            Kind::Accept => Self::Accept(read(kind, body)?),
            Kind::Refuse => Self::Refuse(read(kind, body)?),
            Kind::RoundDone => Self::RoundDone(read(kind, body)?),
            Kind::State => Self::State(read(kind, body)?),
            Kind::Abort => Self::Abort(read(kind, body)?),
            // A newer build may say more here.
            Kind::Ready => Self::Ready,
            Kind::Commit => Self::Commit,
            Kind::Resumed => Self::Resumed,
        })
    }
}

#[cfg(test)]
mod tests {
    use arch::x86_64::state::{Bytes, VcpuState};
    use proptest::prelude::*;

    use super::*;
    use crate::{DeviceState, RefusalKind, RunState};

    fn one_of_each() -> Vec<Message> {
        vec![
            Message::Manifest(Box::new(Manifest {
                vcpus: 3,
                config: "{}".into(),
                ..Manifest::default()
            })),
            Message::Accept(Accept {
                session: [7; 16],
                data_channels: 1,
            }),
            Message::Refuse(Refuse {
                reasons: vec![Refusal::new(RefusalKind::Cpu, "no AVX")],
            }),
            Message::RoundDone(RoundDone {
                round: 3,
                bytes: 1 << 40,
            }),
            Message::State(Box::new(State {
                last_round: 4,
                machine: MachineState {
                    run_state: RunState::Paused,
                    vcpus: vec![VcpuState {
                        xsave: Some(Bytes(vec![1; 2696])),
                        ..VcpuState::default()
                    }],
                    devices: vec![DeviceState {
                        id: "serial0".into(),
                        kind: "16550".into(),
                        version: 1,
                        data: Bytes(vec![1, 2]),
                    }],
                    ..MachineState::default()
                },
                sent_ns: Some(7),
            })),
            Message::Ready,
            Message::Commit,
            Message::Resumed,
            Message::Abort(Abort {
                reason: "enough".into(),
            }),
        ]
    }

    #[test]
    fn every_message_survives_a_round_trip() {
        let messages = one_of_each();
        assert_eq!(messages.len(), Kind::TABLE.len());
        for (message, row) in messages.into_iter().zip(Kind::TABLE) {
            assert_eq!(message.kind(), row.0);
            assert_eq!(
                message.kind().row().0,
                row.0,
                "the table is in the order of the enum"
            );
            let bytes = message.encode().expect("short enough");
            let (header, body) = FrameHeader::read_from_prefix(&bytes).expect("long enough");
            let Ok(Announced::Message(kind, length)) = header.check() else {
                panic!("{message:?}")
            };
            assert_eq!(length as usize, body.len());
            assert_eq!(Message::decode(kind, body).expect("valid"), message);
        }
    }

    #[test]
    fn unknown_kinds_and_lengths_over_the_cap_are_refused_by_name() {
        let header = |kind: u16, flags: u16, length: u32| FrameHeader {
            kind: kind.into(),
            flags: flags.into(),
            length: length.into(),
        };
        for (_, number, name, limit) in Kind::TABLE {
            assert!(header(number, 0, limit).check().is_ok());
            let error = header(number, 0, limit + 1).check().expect_err("too long");
            assert!(error.to_string().contains(name), "{error}");
        }
        assert_eq!(
            header(99, 0, 0).check(),
            Err(ProtocolError::UnknownKind { kind: 99 })
        );
        assert_eq!(header(99, OPTIONAL, 5).check(), Ok(Announced::Skip(5)));
        assert!(header(99, OPTIONAL, u32::MAX).check().is_err());
    }

    proptest! {
        #[test]
        fn no_body_makes_it_panic(kind in 0..9usize, body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Message::decode(Kind::TABLE[kind].0, &body);
        }

        #[test]
        fn no_damage_to_a_good_body_makes_it_panic(kind in 0..9usize, at in any::<proptest::sample::Index>(), value in any::<u8>(), cut in any::<proptest::sample::Index>()) {
            let message = &one_of_each()[kind];
            let mut bytes = message.encode().expect("short enough").split_off(FrameHeader::SIZE);
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = value;
                bytes.truncate(cut.index(bytes.len()) + 1);
            }
            let _ = Message::decode(message.kind(), &bytes);
        }
    }

    #[test]
    fn a_claimed_length_allocates_nothing() {
        // A map with one entry "reasons" whose array claims 4 billion elements, and none of them.
        let mut body = vec![0x81, 0xa7];
        body.extend_from_slice(b"reasons");
        body.extend_from_slice(&[0xdd, 0xff, 0xff, 0xff, 0xff]);
        assert!(Message::decode(Kind::Refuse, &body).is_err());
    }

    #[test]
    fn cheap_elements_do_not_become_much_memory() {
        // An empty map is a whole vCPU of defaults: one byte becomes hundreds.
        for (list, element) in [("vcpus", 0x80), ("devices", 0x80)] {
            let mut body = vec![0x82, 0xaa];
            body.extend_from_slice(b"last_round");
            body.extend_from_slice(&[0x01, 0xa7]);
            body.extend_from_slice(b"machine");
            body.extend_from_slice(&[0x84, 0xa9]);
            body.extend_from_slice(b"run_state");
            body.extend_from_slice(&[0xa7]);
            body.extend_from_slice(b"running");
            body.push(0xa0 | list.len() as u8);
            body.extend_from_slice(list.as_bytes());
            body.extend_from_slice(&[0xdd, 0x00, 0x10, 0x00, 0x00]);
            body.extend(std::iter::repeat_n(element, 1 << 20));
            let error = Message::decode(Kind::State, &body).expect_err("too many");
            assert!(error.to_string().contains("at most 4096"), "{error}");
        }
    }
}
