//! The instruction emulator: against the real processor, against tables, and against nonsense.

mod compare;
mod flat;
mod generate;
mod native;
mod random;
mod speed;
mod undefined;
