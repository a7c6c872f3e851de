//! What a processor architecture is, as data and pure functions: no ioctl, no thread, no file.
//!
//! Only x86_64 exists so far; everything lives under [`x86_64`] so that another architecture can
//! stand beside it.

pub mod x86_64;
