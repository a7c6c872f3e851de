//! The thread that serves the API.

use std::io;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use super::socket::{ApiSocket, ApiSocketError};
use crate::service::Service;

/// How long answers that are on their way may take when the process ends.
const DRAIN: Duration = Duration::from_secs(2);

/// A running API. Dropping it lets answers that are on their way leave, and removes the socket.
#[derive(Debug)]
pub struct ApiServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    socket: ApiSocket,
}

impl ApiServer {
    /// Makes the socket at `path` (mode 0600; nothing may be there) and serves `service` on it from a
    /// thread of its own. On return, clients can connect.
    pub fn start(path: &Path, service: Service) -> Result<Self, ApiSocketError> {
        let mut socket = ApiSocket::bind(path)?;
        let failed = |what| {
            move |source: io::Error| ApiSocketError::Io {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let listener = socket
            .take_listener()
            .ok_or_else(|| failed("use it")(io::ErrorKind::NotConnected.into()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(failed("start an event loop for it"))?;
        let listener = {
            let _entered = runtime.enter();
            tokio::net::UnixListener::from_std(listener).map_err(failed("watch it"))?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("api".into())
            .spawn(move || runtime.block_on(serve(listener, service, stopped)))
            .map_err(failed("start a thread for it"))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
            socket,
        })
    }

    /// Where the socket is, as an absolute path.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // The thread may have ended on its own.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the API's thread panicked");
        }
    }
}

async fn serve(
    listener: tokio::net::UnixListener,
    service: Service,
    stopped: oneshot::Receiver<()>,
) {
    let (drain, draining) = oneshot::channel();
    let server = axum::serve(listener, super::router(service)).with_graceful_shutdown(async {
        // Either way it is time to end.
        let _ = stopped.await;
        let _ = drain.send(());
    });
    let limit = async {
        let _ = draining.await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        ended = server => {
            if let Err(e) = ended {
                tracing::error!(error = %e, "the API ended");
            }
        }
        () = limit => tracing::debug!("API clients still wait for an answer; leaving them"),
    }
}
