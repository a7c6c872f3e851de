//! A small generator of random numbers (xorshift64*), so that a seed names a run.

/// The generator.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 32) % bound
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn byte(&mut self) -> u8 {
        (self.next() >> 40) as u8
    }

    /// A number of a kind that finds errors: any, small, near a power of two, or near a width.
    pub(crate) fn interesting(&mut self) -> u64 {
        let any = self.next();
        const WIDTHS: [u64; 12] = [7, 8, 9, 15, 16, 31, 32, 33, 63, 64, 65, 128];
        match self.below(7) {
            0 => any & 0xff,
            1 => (any & 7).wrapping_sub(4),
            2 => (1u64 << (any & 63))
                .wrapping_add(any >> 8 & 3)
                .wrapping_sub(2),
            3 => u64::from(any as u32),
            4 => WIDTHS[(any >> 8) as usize % WIDTHS.len()],
            _ => any,
        }
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let value = self.next().to_le_bytes();
            chunk.copy_from_slice(&value[..chunk.len()]);
        }
    }
}
