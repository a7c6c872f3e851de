//! CPU models and hosts: from the names in a config and the files on a disk to what `arch` works with.
//!
//! ```text
//!   cpus.model, cpus.features ──resolve──► CpuModel ──► what a guest is shown (machine)
//!   NAME or FILE ─────────────load──────┘
//!   this host ─────────────────dump──► CpuDump ──► `vmm cpu …`, GET /cpu
//! ```

mod host;
mod model;
mod verify;

pub(crate) use host::dump;
pub(crate) use model::{check, check_interface, list, load, offered, resolve};
pub(crate) use verify::{Verdict, verify};
