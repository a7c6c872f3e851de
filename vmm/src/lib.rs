//! The product: the `vmm` binary, its config, HTTP API, machine and jobs.
//!
//! ```text
//!   cli ──┬─► machine (the thread that owns the machine) ◄── service (requests, replies) ◄── api (HTTP)
//!         │        └─► memory, hypervisor, devices, migration, arch                          ▲
//!         └─► client ────────────────────────── unix socket ─────────────────────────────────┘
//! ```
//!
//! Only this crate knows all rooms. It promises that a request, a config file, a guest or a peer can make it refuse, but
//! not panic, and that a failed operation leaves the guest as it was.

pub mod api;
pub mod boot;
pub mod cli;
pub mod client;
pub mod config;
mod cpu;
pub mod job;
mod json;
pub mod machine;
pub mod service;
