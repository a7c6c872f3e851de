//! A double of the Microsoft Hypervisor's driver, for tests: preload it, and `/dev/mshv` is there.
//!
//! ```text
//!   LD_PRELOAD=target/release/libmshv_double.so  vmm …
//!
//!   client ── open, ioctl, mmap, close ──► interpose ─► table ─┬─► device      host properties, MSHV_CREATE_PARTITION
//!                                             │ not ours       ├─► partition   memory, properties, interrupts, hypercalls
//!                                             ▼                └─► vp          run, registers, state pages
//!                                          the kernel                             │
//!                                                              KVM ◄──────────────┘
//!                                                               └─ exit ─► intercept ─► prestate ─► message
//! ```
//!
//! It is written from the public interface alone (include/uapi/linux/mshv.h, drivers/hv/mshv_*.c, the Hypervisor Top Level
//! Functional Specification), and knows nothing of this project's back end, so that it can catch its errors.
//!
//! Promises:
//!
//! - It refuses what the driver and the hypervisor refuse, with their errno and status. `MSHV_DOUBLE_LOG=1` tells each
//!   refusal on stderr.
//! - An intercept message shows the processor before the instruction, and so do the registers; nothing of the
//!   instruction has happened that the client's emulation of it does not do again.
//! - A signal makes MSHV_RUN_VP fail with EINTR, with nothing half done.
//! - Descriptors of other kinds are left alone, at the cost of one comparison.
//! - Where `/dev/mshv` exists, the double does nothing.
//! - When the last descriptor of a partition is closed, all its KVM descriptors are.
//!
//! What it does not have: the VP register page (ENODEV, as from a hypervisor without it), synthetic interrupts and timers
//! beyond keeping their registers, isolation, intercepts of CPUID and of exceptions.

mod cpuid;
mod events;
mod gva;
mod hypercall;
mod intercept;
pub mod interpose;
mod interrupt;
mod kvm;
mod memory;
mod message;
mod partition;
mod prestate;
mod property;
mod registers;
mod state_pages;
mod status;
mod sys;
mod table;
mod vp;
mod xsave;
