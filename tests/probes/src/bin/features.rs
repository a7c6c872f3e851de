//! Uses every instruction set extension that the processor says it has, over and over, and compares what comes out with the same computed
//! without. For a guest that moves: `features FILE` keeps its progress in a file, and prints `FEATURES-BAD name` when an answer is wrong. An
//! instruction that is gone ends it with SIGILL.

use std::arch::asm;
use std::arch::x86_64::*;
use std::process::ExitCode;

/// An extension, whether the processor says it has it, and a round of its use with a number that differs from round to round.
struct Check {
    name: &'static str,
    here: bool,
    right: unsafe fn(u64) -> bool,
}

macro_rules! checks {
    ($($feature:tt => $function:ident,)+) => {
        [$(Check {
            name: $feature,
            here: is_x86_feature_detected!($feature),
            right: $function,
        },)+]
    };
}

fn main() -> ExitCode {
    let Some(file) = std::env::args().nth(1) else {
        eprintln!("usage: features FILE");
        return ExitCode::from(2);
    };
    let checks: Vec<Check> = checks! {
        "sse3" => sse3,
        "ssse3" => ssse3,
        "sse4.1" => sse41,
        "sse4.2" => sse42,
        "popcnt" => popcnt,
        "aes" => aes,
        "pclmulqdq" => pclmulqdq,
        "sha" => sha,
        "bmi1" => bmi1,
        "bmi2" => bmi2,
        "lzcnt" => lzcnt,
        "adx" => adx,
        "movbe" => movbe,
        "cmpxchg16b" => cmpxchg16b,
        "rdrand" => rdrand,
        "rdseed" => rdseed,
        "avx" => avx,
        "avx2" => avx2,
        "fma" => fma,
        "f16c" => f16c,
    }
    .into_iter()
    // The standard library takes F16C for usable without asking whether the system keeps its registers, as it does for AVX.
    .filter(|check| check.here && (check.name != "f16c" || is_x86_feature_detected!("avx")))
    .collect();
    let names: Vec<&str> = checks.iter().map(|check| check.name).collect();
    println!("features: {}", names.join(" "));
    for round in 1u64.. {
        // A different number each round (a step of Weyl's sequence, mixed).
        let number = round.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31) ^ round;
        for check in &checks {
            // SAFETY: the processor says that it has the extension.
            if !unsafe { (check.right)(number) } {
                println!("FEATURES-BAD {} in round {round}", check.name);
                return ExitCode::FAILURE;
            }
        }
        if round == 1 || round.is_multiple_of(20) {
            let line = format!("features-ok {} of {round} rounds\n", names.len());
            if let Err(error) = probes::replace(file.as_ref(), &line) {
                eprintln!("features: {file}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn bytes(vector: __m128i) -> [u8; 16] {
    // SAFETY: both are 16 bytes in which every pattern is a value.
    unsafe { std::mem::transmute(vector) }
}

fn vector(low: u64, high: u64) -> __m128i {
    // SAFETY: as above.
    unsafe { std::mem::transmute([low, high]) }
}

#[target_feature(enable = "sse3")]
fn sse3(n: u64) -> bool {
    let (a, b) = ((n & 0xff) as f32, (n >> 8 & 0xff) as f32);
    let sum = _mm_hadd_ps(_mm_set_ps(0.0, 0.0, b, a), _mm_setzero_ps());
    _mm_cvtss_f32(sum) == a + b
}

#[target_feature(enable = "ssse3")]
fn ssse3(n: u64) -> bool {
    let reverse = _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let turned = bytes(_mm_shuffle_epi8(vector(n, !n), reverse));
    let mut expected = bytes(vector(n, !n));
    expected.reverse();
    turned == expected
}

#[target_feature(enable = "sse4.1")]
fn sse41(n: u64) -> bool {
    let (a, b) = (n as i32, (n >> 32) as i32);
    let product = _mm_mullo_epi32(_mm_set1_epi32(a), _mm_set1_epi32(b));
    _mm_extract_epi32::<3>(product) == a.wrapping_mul(b)
}

#[target_feature(enable = "sse4.2")]
fn sse42(n: u64) -> bool {
    // CRC-32C, bit by bit.
    let mut crc = 0xffff_ffffu32;
    for byte in n.to_le_bytes() {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    _mm_crc32_u64(0xffff_ffff, n) == u64::from(crc)
}

#[target_feature(enable = "popcnt")]
fn popcnt(n: u64) -> bool {
    let ones = (0..64).filter(|bit| n >> bit & 1 != 0).count();
    usize::try_from(_popcnt64(n.cast_signed())) == Ok(ones)
}

#[target_feature(enable = "aes")]
fn aes(n: u64) -> bool {
    // The last round with its shift undone by the inverse: what went in comes out (FIPS 197, section 5.3).
    let (state, key) = (vector(n, !n), vector(n.rotate_left(7), n));
    let there = _mm_aesenclast_si128(state, key);
    let back = _mm_aesdeclast_si128(_mm_xor_si128(there, key), _mm_setzero_si128());
    // And a known answer: SubBytes of zeros is 0x63 everywhere.
    let zeros = _mm_aesenclast_si128(_mm_setzero_si128(), _mm_setzero_si128());
    bytes(back) == bytes(state) && bytes(zeros) == [0x63; 16]
}

#[target_feature(enable = "pclmulqdq")]
fn pclmulqdq(n: u64) -> bool {
    let m = n.rotate_left(17) | 1;
    let mut product = 0u128;
    for bit in 0..64 {
        if m >> bit & 1 != 0 {
            product ^= u128::from(n) << bit;
        }
    }
    let by_hardware = _mm_clmulepi64_si128::<0>(vector(n, 0), vector(m, 0));
    u128::from_le_bytes(bytes(by_hardware)) == product
}

#[target_feature(enable = "sha,sse2")]
fn sha(n: u64) -> bool {
    // SHA-256 message schedule, sigma 0 of the next words (FIPS 180-4, section 4.1.2).
    let words = |low: u64, high: u64| {
        [
            low as u32,
            (low >> 32) as u32,
            high as u32,
            (high >> 32) as u32,
        ]
    };
    let (first, second) = (words(n, !n), words(n.rotate_left(9), 0));
    let sigma = |x: u32| x.rotate_right(7) ^ x.rotate_right(18) ^ x >> 3;
    let next = [first[1], first[2], first[3], second[0]];
    let expected: [u32; 4] = std::array::from_fn(|at| first[at].wrapping_add(sigma(next[at])));
    let scheduled = _mm_sha256msg1_epu32(vector(n, !n), vector(n.rotate_left(9), 0));
    let got = bytes(scheduled);
    let (got, _) = got.as_chunks::<4>();
    got.iter()
        .zip(expected)
        .all(|(word, expected)| u32::from_le_bytes(*word) == expected)
}

#[target_feature(enable = "bmi1")]
fn bmi1(n: u64) -> bool {
    let m = n.rotate_left(23);
    _andn_u64(n, m) == !n & m
        && _blsr_u64(n) == n & n.wrapping_sub(1)
        && _tzcnt_u64(n | 1 << 63) == u64::from((n | 1 << 63).trailing_zeros())
}

#[target_feature(enable = "bmi2")]
fn bmi2(n: u64) -> bool {
    let mask = n.rotate_left(29);
    let (mut gathered, mut at) = (0, 0);
    for bit in 0..64 {
        if mask >> bit & 1 != 0 {
            gathered |= (n >> bit & 1) << at;
            at += 1;
        }
    }
    let mut high = 0;
    let low = _mulx_u64(n, mask, &mut high);
    let product = u128::from(n) * u128::from(mask);
    _pext_u64(n, mask) == gathered
        && _pdep_u64(gathered, mask) == n & mask
        && u128::from(high) << 64 | u128::from(low) == product
}

#[target_feature(enable = "lzcnt")]
fn lzcnt(n: u64) -> bool {
    let value = n >> (n & 63);
    let expected = (0..64)
        .rev()
        .take_while(|bit| value >> bit & 1 == 0)
        .count();
    usize::try_from(_lzcnt_u64(value)) == Ok(expected)
}

#[target_feature(enable = "adx")]
fn adx(n: u64) -> bool {
    let (mut low, mut high): (u64, u64) = (n, !n);
    // SAFETY: changes registers only, and the flags, which asm! takes for changed.
    unsafe {
        asm!(
            "xor eax, eax", "adcx {low}, {m}", "adox {high}, {m}",
            low = inout(reg) low, high = inout(reg) high, m = in(reg) 5u64, out("rax") _
        );
    }
    low == n.wrapping_add(5) && high == (!n).wrapping_add(5)
}

#[target_feature(enable = "movbe")]
fn movbe(n: u64) -> bool {
    let turned: u64;
    // SAFETY: reads `n`, which lives.
    unsafe { asm!("movbe {}, [{}]", out(reg) turned, in(reg) &raw const n) };
    turned == n.swap_bytes()
}

#[target_feature(enable = "cmpxchg16b")]
fn cmpxchg16b(n: u64) -> bool {
    use std::sync::atomic::Ordering::SeqCst;
    #[repr(align(16))]
    struct Aligned(u128);
    let (old, new) = (u128::from(n) << 64 | 3, u128::from(!n));
    let mut place = Aligned(old);
    // SAFETY: the address is that of 16 aligned bytes that nobody else has.
    let before = unsafe { std::arch::x86_64::cmpxchg16b(&mut place.0, old, new, SeqCst, SeqCst) };
    before == old && place.0 == new
}

#[target_feature(enable = "rdrand")]
fn rdrand(_: u64) -> bool {
    let (mut one, mut other) = (0, 0);
    // Either may have none ready for a while.
    let drawn = |value: &mut u64| (0..1000).any(|_| _rdrand64_step(value) == 1);
    drawn(&mut one) && drawn(&mut other) && one != other
}

#[target_feature(enable = "rdseed")]
fn rdseed(_: u64) -> bool {
    let mut value = 0;
    (0..100_000).any(|_| _rdseed64_step(&mut value) == 1)
}

#[target_feature(enable = "avx")]
fn avx(n: u64) -> bool {
    let a = (n & 0xffff) as f64;
    let sum = _mm256_add_pd(_mm256_set1_pd(a), _mm256_set1_pd(1.0));
    _mm256_cvtsd_f64(_mm256_permute2f128_pd::<1>(sum, sum)) == a + 1.0
}

#[target_feature(enable = "avx2")]
fn avx2(n: u64) -> bool {
    let sum = _mm256_add_epi64(_mm256_set1_epi64x(n.cast_signed()), _mm256_set1_epi64x(7));
    _mm256_extract_epi64::<3>(sum).cast_unsigned() == n.wrapping_add(7)
}

#[target_feature(enable = "fma")]
fn fma(n: u64) -> bool {
    let (a, b) = ((n & 0xfff) as f64, (n >> 12 & 0xfff) as f64);
    _mm_cvtsd_f64(_mm_fmadd_pd(
        _mm_set1_pd(a),
        _mm_set1_pd(b),
        _mm_set1_pd(1.0),
    )) == a * b + 1.0
}

#[target_feature(enable = "f16c")]
fn f16c(n: u64) -> bool {
    // Integers up to 2048 are exact in 16 bits.
    let a = (n & 0x7ff) as f32;
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtps_ph::<0>(_mm_set1_ps(a)))) == a
}
