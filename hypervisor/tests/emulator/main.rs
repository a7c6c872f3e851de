//! The instruction emulator: against the real processor, against tables, and against nonsense.

mod accesses;
mod bench;
mod compare;
mod flat;
mod generate;
mod modes;
mod native;
mod nonsense;
mod paging;
mod random;
mod speed;
mod undefined;
