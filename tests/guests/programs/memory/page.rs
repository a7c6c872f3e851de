//! The contents of one page of the working set.
//!
//! ```text
//!  0      8     16       24     32    40             48           56     64                    4096
//!  | magic| page| counter| owner| seed| body checksum| header mix | 0    | body: 63 lines of 8 words |
//! ```
//!
//! The body is eight streams of words side by side (counters with a random start and a random odd
//! stride, scrambled), set by (seed, page, counter), so two versions of a page differ in every line, and a
//! check can compare all of it with what must be there. It does not compress.

/// Words of a page.
const WORDS: usize = 512;
const LANES: usize = 8;
const MAGIC: u64 = 0x6d65_6d67_7565_7374;

/// What a page must be.
#[derive(Clone, Copy)]
pub struct Identity {
    /// Index in the working set.
    pub page: u64,
    /// vCPU that writes it.
    pub owner: u64,
    /// Of the whole run.
    pub seed: u64,
}

/// What a check found; the number is the counter found.
pub enum Found {
    /// As it must be.
    Whole,
    /// Nothing of ours, or the expectation is behind the page.
    Lost(u64),
    /// A mix.
    Torn(u64),
    /// Ours, older.
    Stale(u64),
}

type Line = [u64; LANES];

/// Scatters the bits of a word (the finaliser of splitmix64).
pub fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Starts and strides of the streams of one version of a page.
fn streams(identity: &Identity, counter: u64) -> (Line, Line) {
    let base = mix(identity.seed ^ mix(identity.page) ^ mix(!counter));
    let (mut state, mut strides) = ([0; LANES], [0; LANES]);
    for lane in 0..LANES {
        state[lane] = mix(base.wrapping_add((lane as u64 + 1) * 0x9e37_79b9_7f4a_7c15));
        // Odd: a stream never stands still.
        strides[lane] = mix(!state[lane]) | 1;
    }
    (state, strides)
}

/// The next line of a body. Cheap on purpose (SSE2 has no 64-bit multiplication): a guest writes some
/// GB/s of these.
#[inline(always)]
fn step(state: &mut Line, strides: &Line) -> Line {
    let mut line = [0; LANES];
    for lane in 0..LANES {
        state[lane] = state[lane].wrapping_add(strides[lane]);
        line[lane] = state[lane] ^ (state[lane] >> 29);
    }
    line
}

fn fold(line: &Line) -> u64 {
    line.iter().fold(0, |sum, &word| mix(sum ^ word))
}

fn header(identity: &Identity, counter: u64, checksum: u64) -> Line {
    let mut line = [
        MAGIC,
        identity.page,
        counter,
        identity.owner,
        identity.seed,
        checksum,
        0,
        0,
    ];
    line[6] = fold(&line);
    line
}

/// Writes version `counter` of a page.
///
/// # Safety
/// `at` must be a page that the caller alone uses.
pub unsafe fn write(at: *mut u64, identity: &Identity, counter: u64) {
    let (mut state, strides) = streams(identity, counter);
    let mut sums = [0; LANES];
    let lines = at.cast::<Line>();
    for index in 1..WORDS / LANES {
        let line = step(&mut state, &strides);
        for (sum, word) in sums.iter_mut().zip(&line) {
            *sum ^= word;
        }
        // SAFETY: the caller's page has 64 lines.
        unsafe { lines.add(index).write(line) };
    }
    // SAFETY: as above.
    unsafe { lines.write(header(identity, counter, fold(&sums))) };
}

/// Fills a page with zeros.
///
/// # Safety
/// As [`write`].
pub unsafe fn wipe(at: *mut u64) {
    // SAFETY: the caller's page.
    unsafe { core::ptr::write_bytes(at, 0, WORDS) };
}

/// Compares a page with version `expected` of it; 0 means never written.
///
/// # Safety
/// As [`write`].
pub unsafe fn check(at: *const u64, identity: &Identity, expected: u64) -> Found {
    // The page may have been replaced behind the compiler's back: it must be read.
    let lines = core::hint::black_box(at).cast::<Line>();
    // SAFETY: the caller's page, which has 64 lines.
    let head: Line = unsafe { lines.read() };
    let counter = head[2];
    if expected == 0 {
        // SAFETY: as above.
        return if unsafe { is_zero(lines) } {
            Found::Whole
        } else {
            Found::Torn(counter)
        };
    }
    let [magic, page, _, owner, seed, checksum, own_mix, _] = head;
    let claimed = Identity { page, owner, seed };
    if magic != MAGIC || own_mix != header(&claimed, counter, checksum)[6] || head[7] != 0 {
        // SAFETY: as above.
        return if unsafe { is_zero(lines) } {
            Found::Lost(0)
        } else {
            Found::Torn(counter)
        };
    }
    let (mut state, strides) = streams(&claimed, counter);
    let mut sums = [0; LANES];
    let mut differences = [0; LANES];
    for index in 1..WORDS / LANES {
        let line = step(&mut state, &strides);
        // SAFETY: as above.
        let there: Line = unsafe { lines.add(index).read() };
        for lane in 0..LANES {
            sums[lane] ^= there[lane];
            differences[lane] |= there[lane] ^ line[lane];
        }
    }
    if differences != [0; LANES] || fold(&sums) != checksum {
        return Found::Torn(counter);
    }
    if page != identity.page || owner != identity.owner || seed != identity.seed {
        return Found::Lost(counter);
    }
    match counter.cmp(&expected) {
        core::cmp::Ordering::Equal => Found::Whole,
        core::cmp::Ordering::Less => Found::Stale(counter),
        core::cmp::Ordering::Greater => Found::Lost(counter),
    }
}

/// # Safety
/// `lines` must be a page.
unsafe fn is_zero(lines: *const Line) -> bool {
    let mut any = [0; LANES];
    for index in 0..WORDS / LANES {
        // SAFETY: the caller's page has 64 lines.
        let there: Line = unsafe { lines.add(index).read() };
        for lane in 0..LANES {
            any[lane] |= there[lane];
        }
    }
    any == [0; LANES]
}
