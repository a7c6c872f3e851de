//! The KVM back end.
