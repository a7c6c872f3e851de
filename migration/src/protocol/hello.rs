//! The first thing each side says: readable without decoding anything else.

use std::fmt;

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ProtocolError;

/// First bytes of a control channel, in both directions.
pub const MAGIC: [u8; 8] = *b"VMMMOVE\n";
/// Longest body in bytes.
pub const MAX_BODY: u32 = 64 << 10;

/// A range of protocol versions, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionRange {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

impl VersionRange {
    /// The newest version that both ranges hold. Both sides come to the same answer.
    pub fn newest_common(self, theirs: Self) -> Result<u16, ProtocolError> {
        let newest = self.max.min(theirs.max);
        if self.min <= self.max && theirs.min <= theirs.max && newest >= self.min.max(theirs.min) {
            Ok(newest)
        } else {
            Err(ProtocolError::Versions { ours: self, theirs })
        }
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.min, self.max)
    }
}

/// The hello's fixed part. Its form never changes. The body follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HelloHeader {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// Oldest protocol version the sender speaks.
    pub min_version: U16,
    /// Newest protocol version the sender speaks.
    pub max_version: U16,
    /// Length of the body in bytes, at most [`MAX_BODY`].
    pub body_len: U32,
}

impl HelloHeader {
    /// Size in bytes.
    pub const SIZE: usize = size_of::<Self>();

    /// Checks magic and body length.
    pub fn check(&self) -> Result<VersionRange, ProtocolError> {
        if self.magic != MAGIC {
            return Err(ProtocolError::Magic { found: self.magic });
        }
        if self.body_len.get() > MAX_BODY {
            return Err(ProtocolError::TooLong {
                what: "a hello",
                found: self.body_len.get().into(),
                limit: MAX_BODY.into(),
            });
        }
        Ok(VersionRange {
            min: self.min_version.get(),
            max: self.max_version.get(),
        })
    }
}

/// The hello's body, in msgpack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HelloBody {
    /// Named abilities; one is used only if both sides have it. None exist yet.
    pub features: Vec<String>,
    /// Version of the sender's VMM, for messages.
    pub vmm_version: String,
}

/// A hello, ready to be sent.
pub fn encode(versions: VersionRange, body: &HelloBody) -> Result<Vec<u8>, ProtocolError> {
    let malformed = |reason: String| ProtocolError::Malformed {
        message: "hello",
        reason,
    };
    let body = rmp_serde::to_vec_named(body).map_err(|error| malformed(error.to_string()))?;
    let header = HelloHeader {
        magic: MAGIC,
        min_version: versions.min.into(),
        max_version: versions.max.into(),
        body_len: u32::try_from(body.len()).unwrap_or(u32::MAX).into(),
    };
    header.check()?;
    Ok([header.as_bytes(), &body].concat())
}

/// Reads a hello's body.
pub fn decode_body(body: &[u8]) -> Result<HelloBody, ProtocolError> {
    rmp_serde::from_slice(body).map_err(|error| ProtocolError::Malformed {
        message: "hello",
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(min: u16, max: u16) -> VersionRange {
        VersionRange { min, max }
    }

    #[test]
    fn the_newest_common_version_wins_or_both_ranges_are_named() {
        for (a, b, common) in [
            (range(1, 1), range(1, 1), Some(1)),
            (range(1, 3), range(2, 5), Some(3)),
            (range(2, 5), range(1, 3), Some(3)),
            (range(1, 2), range(3, 4), None),
            (range(3, 4), range(1, 2), None),
            (range(1, 4), range(3, 2), None),
        ] {
            match (a.newest_common(b), common) {
                (Ok(found), Some(common)) => assert_eq!(found, common),
                (Err(error), None) => {
                    let text = error.to_string();
                    assert!(
                        text.contains(&a.to_string()) && text.contains(&b.to_string()),
                        "{text}"
                    );
                }
                other => panic!("{a} and {b}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_hello_survives_a_round_trip_and_unknown_fields() {
        let body = HelloBody {
            features: vec!["x".into()],
            vmm_version: "1".into(),
        };
        let bytes = encode(range(1, 2), &body).expect("short");
        let (header, rest) = HelloHeader::read_from_prefix(&bytes).expect("long enough");
        assert_eq!(header.check().expect("valid"), range(1, 2));
        assert_eq!(decode_body(rest).expect("valid"), body);

        #[derive(Serialize)]
        struct Newer {
            novelty: Vec<u8>,
            vmm_version: &'static str,
        }
        let newer = rmp_serde::to_vec_named(&Newer {
            novelty: vec![1],
            vmm_version: "9",
        })
        .expect("encoded");
        assert_eq!(decode_body(&newer).expect("tolerant").vmm_version, "9");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 16..200)) {
            let (header, rest) = HelloHeader::read_from_prefix(&bytes).expect("long enough");
            let _ = header.check();
            let _ = decode_body(rest);
        }
    }
}
