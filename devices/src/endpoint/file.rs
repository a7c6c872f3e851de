//! A file that takes the output.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::error::EndpointError;

/// Opens the file, which is made if it is not there. A FIFO without a reader is refused, not waited for, and what a full
/// FIFO or terminal does not take is lost: non-blocking mode makes no difference to other files.
pub(crate) fn open(path: &Path, append: bool) -> Result<File, EndpointError> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .append(append)
        .truncate(!append)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|source| EndpointError::File {
            path: path.to_owned(),
            source,
        })
}
