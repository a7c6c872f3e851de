//! The HTTP API on a unix socket: methods, paths and JSON of Cloud Hypervisor's API v1 as far as the
//! features exist here, and the job interface beside them.
//!
//! ```text
//!  client ──unix socket, mode 0600──► hyper ──► Router ──► handler ──Request──► machine's thread
//!                                    (one thread)            ▲                        │
//!                                                            └──oneshot── Reply ◄─────┘
//! ```
//!
//! Promises:
//!
//! - No handler blocks the API's thread: answers come back through a channel, and a move is waited for
//!   through its job.
//! - A client that goes away cancels nothing: what it asked for has been handed over.
//! - Every answer that is not a success has the body `{"kind": "…", "message": "…"}`.
//! - The socket is never open to other users, not even while it is being made, and is removed at the end.

mod problem;
mod routes;
mod server;
mod socket;

pub use routes::router;
pub use server::ApiServer;
pub use socket::ApiSocketError;

/// Where all endpoints are.
pub const PREFIX: &str = "/api/v1";

/// Longest request body in bytes.
pub const MAX_BODY: usize = 1 << 20;
