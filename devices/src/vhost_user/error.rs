//! Why a back end cannot be used, or cannot be used any more.

use std::io;
use std::path::PathBuf;

use vhost::vhost_user::message::FrontendReq;

/// What is wrong with a back end.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// Nobody listens there.
    #[error("no vhost-user back end answers at {}: {source}", path.display())]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The connection has ended.
    #[error("the vhost-user back end has hung up")]
    Gone,
    /// An answer did not come in time.
    #[error("the vhost-user back end does not answer {0:?}")]
    Silent(FrontendReq),
    /// An answer is not one.
    #[error("the vhost-user back end's answer to {request:?} makes no sense: {what}")]
    Nonsense {
        /// What was asked.
        request: FrontendReq,
        /// What is wrong with the answer.
        what: &'static str,
    },
    /// It says no.
    #[error("the vhost-user back end refuses {request:?} (it says {code})")]
    Refused {
        /// What was asked.
        request: FrontendReq,
        /// Its number for the reason.
        code: i64,
    },
    /// The system refuses something.
    #[error("the connection to the vhost-user back end: {0}")]
    Host(#[from] io::Error),
    /// It cannot do what is needed.
    #[error("the vhost-user back end lacks {0}")]
    Lacks(String),
    /// Requests that were under way are not finished, and did not come to an end.
    #[error(
        "the vhost-user back end does not finish the requests of queue {0} although it says that it has stopped"
    )]
    Unfinished(u16),
    /// The device is not one that can be.
    #[error("{0}")]
    Config(String),
}

impl From<rustix::io::Errno> for VhostError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Host(error.into())
    }
}
