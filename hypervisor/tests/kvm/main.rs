//! The KVM back end against a real `/dev/kvm`, with guests of a few instructions.
//!
//! The guests are hand-assembled and keep to plain integer instructions, so that a KVM which interprets ring 0 runs them too.
//! Without `/dev/kvm` each test prints why it is skipped.

mod accesses;
mod dirty_log;
mod faults;
mod guest;
mod interrupts;
mod kicks;
mod machine;
mod start_cost;
mod state;
