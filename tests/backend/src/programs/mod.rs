//! The programs, by what they are about.

mod ports;

use crate::harness::Program;

/// A group of programs from one module, named after it.
macro_rules! programs {
    ($($module:ident: $($name:ident),+ $(,)?;)+) => {
        /// Every program, in the order of a run.
        pub const PROGRAMS: &[Program] = &[$($(
            Program {
                name: concat!(stringify!($module), "::", stringify!($name)),
                body: $module::$name,
            },
        )+)+];
    };
}

programs! {
    ports: all_widths, immediate_forms, read_only_what_they_must, in_ring_3, a_kick_finds_the_access_complete;
}
