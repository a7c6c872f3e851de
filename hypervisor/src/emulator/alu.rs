//! Results and status flags of integer arithmetic: pure functions (SDM vol. 1, section 3.4.3.1).
//!
//! Operands are `bytes` wide (1, 2, 4, 8); bits above are ignored and come back clear. Each function returns the result
//! and all six status flags. A flag that the manual leaves undefined has the value that is cheapest; callers
//! of the emulator must not rely on it.

use super::cpu::rflags::{AF, CF, OF, PF, SF, ZF};
use super::operand::mask;

/// A result and the status flags that go with it.
pub(super) type Computed = (u64, u64);

/// The top bit of `value`, as 0 or 1.
pub(super) fn sign(value: u64, bytes: usize) -> u64 {
    value >> (8 * bytes as u32 - 1) & 1
}

/// ZF, SF and PF of a result.
pub(super) fn result_flags(value: u64, bytes: usize) -> u64 {
    let value = value & mask(bytes);
    let mut flags = 0;
    if value == 0 {
        flags |= ZF;
    }
    if sign(value, bytes) != 0 {
        flags |= SF;
    }
    if (value as u8).count_ones() & 1 == 0 {
        flags |= PF;
    }
    flags
}

fn when(condition: u64, flag: u64) -> u64 {
    if condition & 1 != 0 { flag } else { 0 }
}

/// `a + b + carry`.
pub(super) fn add(bytes: usize, a: u64, b: u64, carry: bool) -> Computed {
    let (a, b) = (a & mask(bytes), b & mask(bytes));
    let sum = a.wrapping_add(b).wrapping_add(u64::from(carry)) & mask(bytes);
    let carries = a & b | (a | b) & !sum;
    let overflow = (a ^ sum) & (b ^ sum);
    let flags = result_flags(sum, bytes)
        | when(sign(carries, bytes), CF)
        | when(sign(overflow, bytes), OF)
        | (a ^ b ^ sum) & AF;
    (sum, flags)
}

/// `a - b - borrow`.
pub(super) fn sub(bytes: usize, a: u64, b: u64, borrow: bool) -> Computed {
    let (a, b) = (a & mask(bytes), b & mask(bytes));
    let difference = a.wrapping_sub(b).wrapping_sub(u64::from(borrow)) & mask(bytes);
    let borrows = !a & b | (!a | b) & difference;
    let overflow = (a ^ b) & (a ^ difference);
    let flags = result_flags(difference, bytes)
        | when(sign(borrows, bytes), CF)
        | when(sign(overflow, bytes), OF)
        | (a ^ b ^ difference) & AF;
    (difference, flags)
}

/// The flags of AND, OR, XOR and TEST: CF and OF clear (AF is undefined, clear here).
pub(super) fn logic(bytes: usize, value: u64) -> Computed {
    (value & mask(bytes), result_flags(value, bytes))
}
