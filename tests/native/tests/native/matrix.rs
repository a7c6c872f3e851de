//! How a test body becomes a test: named, skipped with a reason where the host cannot run it.

use anyhow::Result;
use libtest_mimic::{Completion, Failed, Trial};
use native::process::{Folder, no_kvm};

/// A test that needs a guest.
pub(crate) fn guest_trial(
    name: impl Into<String>,
    body: impl FnOnce(&Folder) -> Result<()> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match no_kvm() {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => {
            let folder = Folder::new().map_err(failed)?;
            body(&folder).map_err(failed)?;
            Ok(Completion::Completed)
        }
    })
}

fn failed(error: anyhow::Error) -> Failed {
    Failed::from(format!("{error:#}"))
}
