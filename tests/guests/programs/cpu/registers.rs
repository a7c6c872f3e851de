//! Register contents that are held over a spin, and the comparison afterwards.

core::arch::global_asm!(include_str!("hold.s"), options(att_syntax));

/// What `hold.s` loads and stores; its offsets are there.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Registers {
    /// ZMM0–31; the lower parts are YMM and XMM.
    vectors: [[u64; 8]; 32],
    /// Mask registers k0–k7, 16 bits each.
    masks: [u64; 8],
    /// ST0–ST7: significand, exponent and sign.
    x87: [[u64; 2]; 8],
    /// rbx, rbp, r8–r15.
    general: [u64; 10],
    mxcsr: u32,
    control: u32,
    /// The words at FS:0 and GS:0.
    bases: [u64; 2],
}

const _: () = assert!(core::mem::offset_of!(Registers, bases) == 2328);

/// The widest vector state that XCR0 allows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// XMM0–15.
    Sse,
    /// YMM0–15.
    Avx,
    /// ZMM0–31 and masks.
    Avx512,
}

impl Level {
    /// By XCR0 (Intel SDM 1, 13.3); 0 means there is none.
    pub fn of(xcr0: u64) -> Level {
        if xcr0 & 0xe6 == 0xe6 {
            Level::Avx512
        } else if xcr0 & 6 == 6 {
            Level::Avx
        } else {
            Level::Sse
        }
    }
}

/// Which parts changed.
#[derive(Default)]
pub struct Changed {
    /// x87.
    pub fpu: bool,
    /// XMM or MXCSR.
    pub sse: bool,
    /// Upper halves of YMM.
    pub avx: bool,
    /// ZMM beyond YMM, or masks.
    pub avx512: bool,
    /// General registers.
    pub gpr: bool,
    /// FS or GS base.
    pub seg: bool,
}

type Hold = unsafe extern "C" fn(*const Registers, *mut Registers, u64);

unsafe extern "C" {
    fn hold_sse(before: *const Registers, after: *mut Registers, spins: u64);
    fn hold_avx(before: *const Registers, after: *mut Registers, spins: u64);
    fn hold_avx512(before: *const Registers, after: *mut Registers, spins: u64);
}

/// Scatters the bits of a word (the finaliser of splitmix64).
pub fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

impl Registers {
    /// Nothing.
    pub const fn zero() -> Registers {
        Registers {
            vectors: [[0; 8]; 32],
            masks: [0; 8],
            x87: [[0; 2]; 8],
            general: [0; 10],
            mxcsr: 0,
            control: 0,
            bases: [0; 2],
        }
    }

    /// Another pattern in every register, for every `salt`; `bases` are the words at FS:0 and GS:0.
    pub fn fill(&mut self, salt: u64, bases: [u64; 2]) {
        let mut state = mix(salt);
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        };
        self.vectors.as_flattened_mut().fill_with(&mut next);
        self.masks.fill_with(|| next() & 0xffff);
        // Normal numbers: the integer bit is set, the exponent is neither of the special ones.
        self.x87
            .fill_with(|| [next() | (1 << 63), (next() & 0x8fff) | 0x1000]);
        self.general.fill_with(&mut next);
        // Any sticky flags and rounding mode, exceptions masked. (Reserved bits stay zero.)
        self.mxcsr = 0x1f80 | (next() as u32 & 0x603f);
        // Precision and rounding, exceptions masked; bit 6 reads as one.
        self.control = 0x37f ^ (next() as u32 & 0xc00);
        self.bases = bases;
    }

    /// Changes one bit in each part: the next comparison must find all of them.
    pub fn damage(&mut self, level: Level) {
        self.x87[3][0] ^= 1 << 5;
        self.vectors[7][1] ^= 1 << 6;
        self.general[4] ^= 1 << 7;
        self.bases[1] ^= 1 << 8;
        if level != Level::Sse {
            self.vectors[9][3] ^= 1 << 9;
        }
        if level == Level::Avx512 {
            self.vectors[30][7] ^= 1 << 10;
        }
    }

    /// Holds these contents for `spins` turns of a loop; what is in the registers then goes to `after`.
    pub fn hold(&self, after: &mut Registers, level: Level, spins: u64) {
        let hold: Hold = match level {
            Level::Sse => hold_sse,
            Level::Avx => hold_avx,
            Level::Avx512 => hold_avx512,
        };
        // SAFETY: both blocks are valid for it, the level is one that XCR0 allows, at least one turn.
        unsafe { hold(self, after, spins.max(1)) };
    }

    /// Compares with what came back.
    pub fn compare(&self, after: &Registers, level: Level) -> Changed {
        let differs = |words: core::ops::Range<usize>, registers: core::ops::Range<usize>| {
            registers.into_iter().any(|register| {
                self.vectors[register][words.clone()] != after.vectors[register][words.clone()]
            })
        };
        let x87_exponents = |block: &Registers| block.x87.map(|[_, exponent]| exponent & 0xffff);
        let x87_significands = |block: &Registers| block.x87.map(|[significand, _]| significand);
        Changed {
            fpu: x87_significands(self) != x87_significands(after)
                || x87_exponents(self) != x87_exponents(after)
                || self.control & 0xffff != after.control & 0xffff,
            sse: differs(0..2, 0..16) || self.mxcsr != after.mxcsr,
            avx: level != Level::Sse && differs(2..4, 0..16),
            avx512: level == Level::Avx512
                && (differs(4..8, 0..16) || differs(0..8, 16..32) || self.masks != after.masks),
            gpr: self.general != after.general,
            seg: self.bases != after.bases,
        }
    }
}
