//! Which blocks of the region are plugged.

use std::ops::Range;

/// A bit a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    count: u64,
    plugged: u64,
}

impl Blocks {
    /// None of `count` blocks.
    pub(super) fn none(count: u64) -> Self {
        Self {
            words: vec![0; count.div_ceil(64) as usize],
            count,
            plugged: 0,
        }
    }

    /// What [`Blocks::to_bytes`] gave of as many blocks, if it can be that.
    pub(super) fn from_bytes(bytes: &[u8], count: u64) -> Option<Self> {
        if bytes.len() as u64 != count.div_ceil(8) {
            return None;
        }
        let mut words: Vec<u64> = Vec::with_capacity(bytes.len().div_ceil(8));
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            words.push(u64::from_le_bytes(word));
        }
        let stray = match count % 64 {
            0 => 0,
            used => words.last()? >> used,
        };
        let plugged = words.iter().map(|word| u64::from(word.count_ones())).sum();
        (stray == 0).then_some(Self {
            words,
            count,
            plugged,
        })
    }

    /// Bit `n % 8` of byte `n / 8` is block `n`.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self
            .words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        bytes.truncate(self.count.div_ceil(8) as usize);
        bytes
    }

    /// All blocks.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// How many are plugged.
    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    fn get(&self, block: u64) -> bool {
        self.words
            .get((block / 64) as usize)
            .is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    /// How many of these are plugged.
    pub(super) fn plugged_in(&self, blocks: Range<u64>) -> u64 {
        blocks.filter(|block| self.get(*block)).count() as u64
    }

    /// Plugs or unplugs them. Those beyond the last do nothing.
    pub(super) fn set(&mut self, blocks: Range<u64>, plugged: bool) {
        for block in blocks.start..blocks.end.min(self.count) {
            if self.get(block) == plugged {
                continue;
            }
            self.words[(block / 64) as usize] ^= 1 << (block % 64);
            match plugged {
                true => self.plugged += 1,
                false => self.plugged -= 1,
            }
        }
    }

    /// The first run of plugged blocks from `from` on.
    pub(super) fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = (from..self.count).find(|block| self.get(*block))?;
        let end = (start..self.count)
            .find(|block| !self.get(*block))
            .unwrap_or(self.count);
        Some(start..end)
    }

    /// All runs of plugged blocks.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from)?;
            from = run.end;
            Some(run)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_as_many_as_the_blocks_need_and_no_others_are_taken() {
        for count in [1, 7, 8, 63, 64, 65, 200] {
            let mut blocks = Blocks::none(count);
            blocks.set(0..1, true);
            blocks.set(count - 1..count + 9, true);
            let bytes = blocks.to_bytes();
            assert_eq!(bytes.len() as u64, count.div_ceil(8));
            assert_eq!(Blocks::from_bytes(&bytes, count), Some(blocks));
            assert_eq!(
                Blocks::from_bytes(&[&bytes[..], &[0]].concat(), count),
                None
            );
            assert_eq!(Blocks::from_bytes(&bytes[1..], count), None);
            if count % 8 != 0 {
                let all = vec![0xff; bytes.len()];
                assert_eq!(Blocks::from_bytes(&all, count), None, "{count}");
            }
        }
    }
}
