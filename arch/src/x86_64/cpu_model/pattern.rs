//! Bit patterns: which bits of a register must be 0, which 1, and which are left alone.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A pattern of `BITS` (at most 64) bits: written with `0`, `1` and `x`, the most significant bit first, `_` between groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitPattern<const BITS: usize> {
    /// Bits that the pattern decides.
    fixed: u64,
    /// Their values; 0 where it decides nothing.
    value: u64,
}

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// A character with no meaning.
    #[error("`{0}` has no place in a bit pattern: write 0, 1, x and, between groups, _")]
    Character(char),
    /// Too few or too many bits.
    #[error("the bit pattern has {is} bits instead of {wanted}")]
    Length {
        /// Bits there are.
        is: usize,
        /// Bits there must be.
        wanted: usize,
    },
}

impl<const BITS: usize> BitPattern<BITS> {
    /// A pattern that sets `ones`, clears `zeros`, and leaves the rest alone. A bit in both is set.
    pub fn new(zeros: u64, ones: u64) -> Self {
        Self {
            fixed: zeros | ones,
            value: ones,
        }
    }

    /// A register after the pattern.
    pub fn apply(self, register: u64) -> u64 {
        (register & !self.fixed) | self.value
    }

    /// The bits that must be 1.
    pub fn ones(self) -> u64 {
        self.value
    }

    /// The bits that must be 0.
    pub fn zeros(self) -> u64 {
        self.fixed & !self.value
    }

    /// Whether it decides nothing.
    pub fn is_open(&self) -> bool {
        self.fixed == 0
    }

    /// Both patterns, `over` where they disagree.
    pub fn overlaid(self, over: Self) -> Self {
        Self {
            fixed: self.fixed | over.fixed,
            value: over.apply(self.value),
        }
    }
}

impl<const BITS: usize> FromStr for BitPattern<BITS> {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let (mut fixed, mut value, mut count) = (0, 0, 0);
        for character in text.chars().filter(|c| *c != '_') {
            let (decided, set) = match character {
                '0' => (1, 0),
                '1' => (1, 1),
                'x' | 'X' => (0, 0),
                other => return Err(PatternError::Character(other)),
            };
            fixed = fixed << 1 | decided;
            value = value << 1 | set;
            count += 1;
        }
        if count != BITS {
            return Err(PatternError::Length {
                is: count,
                wanted: BITS,
            });
        }
        Ok(Self { fixed, value })
    }
}

impl<const BITS: usize> fmt::Display for BitPattern<BITS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for number in (0..BITS).rev() {
            f.write_str(match (self.fixed >> number & 1, self.value >> number & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })?;
            if number != 0 && number % 8 == 0 {
                f.write_str("_")?;
            }
        }
        Ok(())
    }
}

impl<const BITS: usize> Serialize for BitPattern<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const BITS: usize> Deserialize<'de> for BitPattern<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_ones_and_the_rest() {
        let pattern: BitPattern<8> = "1x0_x_0001".parse().expect("a pattern");
        assert_eq!((pattern.ones(), pattern.zeros()), (0x81, 0x2e));
        assert_eq!(pattern.apply(0x7e), 0xd1);
        assert_eq!(pattern.to_string(), "1x0x0001");
        assert_eq!(
            pattern.overlaid("0xxxxxx0".parse().expect("a pattern")),
            "0x0x0000".parse().expect("a pattern")
        );
        assert!(BitPattern::<64>::default().is_open());
        let widest: BitPattern<64> = "1".repeat(64).parse().expect("a pattern");
        assert_eq!(widest.ones(), u64::MAX);
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        assert_eq!(
            "0x2".parse::<BitPattern<3>>(),
            Err(PatternError::Character('2'))
        );
        for text in ["", "0101", &"1".repeat(1000)] {
            assert_eq!(
                text.parse::<BitPattern<3>>(),
                Err(PatternError::Length {
                    is: text.len(),
                    wanted: 3
                })
            );
        }
    }
}
