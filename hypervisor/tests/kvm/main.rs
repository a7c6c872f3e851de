//! What is about KVM alone, against a real `/dev/kvm`. What every back end must do is in the conformance suite, tests/backend.
//!
//! Without `/dev/kvm` each test prints why it is skipped.

mod faults;
mod machine;
mod msrs;
mod rescue;
mod start_cost;
mod state;

use hypervisor::{Hypervisor, kvm::Kvm};

/// KVM, or a printed reason why there is none.
fn kvm() -> Option<Box<dyn Hypervisor>> {
    match Kvm::open() {
        Ok(kvm) => Some(Box::new(kvm)),
        Err(error) => {
            println!("SKIP: {error}");
            None
        }
    }
}
