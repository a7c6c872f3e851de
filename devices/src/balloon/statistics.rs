//! The driver's statistics (section 5.5.6.3): pairs of a tag and a value.

use std::collections::BTreeMap;

/// Names of the tags, in the order of their numbers.
const NAMES: [&str; 10] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free-memory",
    "total-memory",
    "available-memory",
    "disk-caches",
    "hugetlb-allocations",
    "hugetlb-failures",
];
/// `le16 tag; le64 val;`, packed.
const PAIR: usize = 10;
/// Most bytes that are looked at: more pairs than there are tags, since drivers know tags that this build does not.
pub(super) const MOST_BYTES: usize = 64 * PAIR;

/// What is in the driver's buffer. Tags that are not known are left out.
pub(super) fn parse(bytes: &[u8]) -> BTreeMap<&'static str, u64> {
    let (pairs, _) = bytes.as_chunks::<PAIR>();
    let known = pairs.iter().filter_map(|pair| {
        let [t0, t1, value @ ..] = *pair;
        let name = NAMES.get(usize::from(u16::from_le_bytes([t0, t1])))?;
        Some((*name, u64::from_le_bytes(value)))
    });
    known.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_are_taken() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 1u64 << 40), (0, 7), (10, 9), (u16::MAX, 9)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        // A pair that is cut off.
        bytes.extend([1, 0, 3]);
        assert_eq!(
            parse(&bytes),
            BTreeMap::from([("free-memory", 1 << 40), ("swap-in", 7)])
        );
        assert_eq!(parse(&[]), BTreeMap::new());
    }
}
