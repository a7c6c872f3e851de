//! The instruction emulator: against the real processor, against tables, and against nonsense.

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
