//! Operations on 128-bit lanes, element by element: pure functions.

use super::operand::{mask, sign_extend};

/// Applies an operation to every pair of elements of `WIDTH` bytes.
fn elements<const WIDTH: usize>(a: u128, b: u128, operation: impl Fn(u64, u64) -> u64) -> u128 {
    (0..16 / WIDTH).fold(0, |result, n| {
        let shift = 8 * WIDTH * n;
        let element = |value: u128| (value >> shift) as u64 & mask(WIDTH);
        let value = operation(element(a), element(b)) & mask(WIDTH);
        result | u128::from(value) << shift
    })
}

fn signed<const WIDTH: usize>(value: u64) -> i64 {
    sign_extend(value, WIDTH) as i64
}

fn all_ones(condition: bool) -> u64 {
    if condition { u64::MAX } else { 0 }
}

/// The smallest and the largest signed element.
fn signed_range<const WIDTH: usize>() -> (i64, i64) {
    let largest = (mask(WIDTH) >> 1) as i64;
    (-largest - 1, largest)
}

pub(super) fn xor(a: u128, b: u128) -> u128 {
    a ^ b
}

pub(super) fn or(a: u128, b: u128) -> u128 {
    a | b
}

pub(super) fn and(a: u128, b: u128) -> u128 {
    a & b
}

pub(super) fn and_not(a: u128, b: u128) -> u128 {
    !a & b
}

pub(super) fn add<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, u64::wrapping_add)
}

pub(super) fn sub<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, u64::wrapping_sub)
}

pub(super) fn equal<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, |a, b| all_ones(a == b))
}

pub(super) fn greater<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, |a, b| {
        all_ones(signed::<WIDTH>(a) > signed::<WIDTH>(b))
    })
}

pub(super) fn minimum<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, u64::min)
}

pub(super) fn maximum<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, u64::max)
}

pub(super) fn minimum_signed<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, |a, b| {
        signed::<WIDTH>(a).min(signed::<WIDTH>(b)) as u64
    })
}

pub(super) fn maximum_signed<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, |a, b| {
        signed::<WIDTH>(a).max(signed::<WIDTH>(b)) as u64
    })
}

/// Saturating; for elements of 1 or 2 bytes.
pub(super) fn add_unsigned<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, |a, b| (a + b).min(mask(WIDTH)))
}

/// Saturating.
pub(super) fn sub_unsigned<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, u64::saturating_sub)
}

/// Saturating; for elements of 1 or 2 bytes.
pub(super) fn add_signed<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    let (smallest, largest) = signed_range::<WIDTH>();
    elements::<WIDTH>(a, b, |a, b| {
        (signed::<WIDTH>(a) + signed::<WIDTH>(b)).clamp(smallest, largest) as u64
    })
}

/// Saturating; for elements of 1 or 2 bytes.
pub(super) fn sub_signed<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    let (smallest, largest) = signed_range::<WIDTH>();
    elements::<WIDTH>(a, b, |a, b| {
        (signed::<WIDTH>(a) - signed::<WIDTH>(b)).clamp(smallest, largest) as u64
    })
}

/// Rounded up; for elements of 1 or 2 bytes.
pub(super) fn average<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, |a, b| (a + b + 1) >> 1)
}

/// The low halves of the products.
pub(super) fn multiply_low<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    elements::<WIDTH>(a, b, u64::wrapping_mul)
}

/// Products of the even 32-bit elements, 64 bits wide.
pub(super) fn multiply_even(a: u128, b: u128) -> u128 {
    elements::<8>(a, b, |a, b| (a & mask(4)) * (b & mask(4)))
}

/// PSHUFB: every byte of `b` picks one of `a`, or zero.
pub(super) fn shuffle_bytes(a: u128, b: u128) -> u128 {
    let from = a.to_le_bytes();
    let picked = b.to_le_bytes().map(|index| {
        if index & 0x80 != 0 {
            0
        } else {
            from[usize::from(index & 15)]
        }
    });
    u128::from_le_bytes(picked)
}

pub(super) fn unpack_low<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    let half = u128::from(u64::MAX);
    interleave(a & half, b & half, WIDTH)
}

pub(super) fn unpack_high<const WIDTH: usize>(a: u128, b: u128) -> u128 {
    interleave(a >> 64, b >> 64, WIDTH)
}

fn interleave(a: u128, b: u128, width: usize) -> u128 {
    let mask = u128::from(mask(width));
    (0..8 / width).fold(0, |result, n| {
        let from = 8 * width * n;
        let to = 2 * from;
        result | (a >> from & mask) << to | (b >> from & mask) << (to + 8 * width)
    })
}

/// PALIGNR: `a:b` shifted right by bytes.
pub(super) fn align(a: u128, b: u128, count: u8) -> u128 {
    let bits = 8 * u32::from(count);
    match bits {
        0 => b,
        1..128 => b >> bits | a << (128 - bits),
        128..256 => a >> (bits - 128),
        _ => 0,
    }
}

/// SHUFPS: two elements of `a`, two of `b`.
pub(super) fn shuffle_pairs(a: u128, b: u128, order: u8) -> u128 {
    (0..4u32).fold(0, |result, n| {
        let source = if n < 2 { a } else { b };
        result | (pick(source, order, n) << (32 * n))
    })
}

/// PSHUFD.
pub(super) fn shuffle(a: u128, order: u8) -> u128 {
    (0..4u32).fold(0, |result, n| result | (pick(a, order, n) << (32 * n)))
}

/// PSHUFLW: shuffles the words of the low half.
pub(super) fn shuffle_low_words(a: u128, order: u8) -> u128 {
    let low = (0..4u32).fold(0, |result, n| {
        let from = u32::from(order >> (2 * n) & 3);
        result | (a >> (16 * from) & 0xffff) << (16 * n)
    });
    a & !u128::from(u64::MAX) | low
}

/// PSHUFHW: shuffles the words of the high half.
pub(super) fn shuffle_high_words(a: u128, order: u8) -> u128 {
    a & u128::from(u64::MAX) | shuffle_low_words(a >> 64, order) << 64
}

/// The 32-bit element that two bits of `order` name.
fn pick(a: u128, order: u8, n: u32) -> u128 {
    let from = u32::from(order >> (2 * n) & 3);
    a >> (32 * from) & 0xffff_ffff
}

/// Which way elements are shifted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    Left,
    Right,
    /// Right, with copies of the sign.
    Arithmetic,
}

/// Shifts every element of `WIDTH` bytes by `count` bits.
pub(super) fn shift<const WIDTH: usize>(a: u128, count: u64, direction: Shift) -> u128 {
    let bits = 8 * WIDTH as u64;
    let within = count.min(63) as u32;
    elements::<WIDTH>(a, 0, |a, _| match direction {
        Shift::Arithmetic => (signed::<WIDTH>(a) >> within.min(bits as u32 - 1)) as u64,
        _ if count >= bits => 0,
        Shift::Left => a << within,
        Shift::Right => a >> within,
    })
}
