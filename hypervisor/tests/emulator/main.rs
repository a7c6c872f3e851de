//! The instruction emulator: against the real processor, against tables, and against nonsense.
//!
//! ```text
//!  compare    generate ─► instruction, registers ─┬─► emulate (flat platform) ─┬─► equal?
//!                         64-bit, or 16- and      └─► native (stub, signals) ──┘   but for `undefined`
//!                         32-bit in `segments`
//!  modes, protection, accesses    exact expectations on a `bench`
//!  paging                         the page walker over tables made by hand
//!  nonsense                       any bytes in any state do no harm
//!  speed                          instructions a second (ignored; run by name)
//! ```
//!
//! `EMULATOR_CASES`, `EMULATOR_NONSENSE` and `EMULATOR_SEED` set how many and which; `EMULATOR_LIST=1` prints how often each
//! mnemonic was compared.

mod accesses;
mod bench;
mod compare;
mod flat;
mod generate;
mod host;
mod modes;
mod native;
mod nonsense;
mod paging;
mod protection;
mod random;
mod segments;
mod speed;
mod undefined;
