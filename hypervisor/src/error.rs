//! Errors of the hypervisor seam.

/// Result of the hypervisor seam.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a hypervisor could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A device node cannot be opened.
    #[error("cannot open {path}: {source}; {advice}")]
    Open {
        /// The device node.
        path: &'static str,
        /// The system's reason.
        source: std::io::Error,
        /// What to do about it.
        advice: &'static str,
    },
    /// The host's hypervisor lacks something that cannot be done without.
    #[error("the host's hypervisor lacks {what}")]
    Missing {
        /// Its name.
        what: &'static str,
    },
    /// A call to the hypervisor failed.
    #[error("{operation} failed: {source}")]
    Call {
        /// The call.
        operation: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A state element cannot be restored here although the guest could have used it.
    #[error("this host cannot restore {element} of vCPU {vcpu}: {reason}")]
    StateRefused {
        /// The vCPU.
        vcpu: u32,
        /// [`arch::x86_64::state::StateElement::name`].
        element: &'static str,
        /// Which part, and why.
        reason: String,
    },
    /// An argument breaks the trait's contract.
    #[error("{0}")]
    Invalid(String),
}
