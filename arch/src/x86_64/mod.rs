//! x86_64: the state of a vCPU, what CPUID shows, and how a guest is started.
//!
//! ```text
//!   config ──► cpuid (what the guest sees) ─┐
//!   kernel ──► boot  (ELF/PVH, bzImage)  ───┼──► VcpuState ──► hypervisor back end
//!              acpi  (tables in guest RAM) ─┘        ▲
//!                                                    └── saved on another host, maybe another back end
//! ```
//!
//! Nothing here names a hypervisor's types: the types are the neutral form that every back end
//! converts to and from.

pub mod acpi;
pub mod boot;
pub mod bounded;
pub mod cpu_model;
pub mod cpuid;
pub mod fresh;
pub mod layout;
pub mod msr;
pub mod state;
pub mod topology;
