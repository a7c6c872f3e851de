//! How a test body becomes tests: one a back end or a pair of them, named, skipped with a reason where the host cannot run it.

use anyhow::Result;
use libtest_mimic::{Completion, Failed, Trial};
use native::back_end::Hosts;
use native::process::Folder;

/// One test of this body for each of `hosts`.
pub(crate) fn guest_trials(
    hosts: &[Hosts],
    name: impl AsRef<str>,
    body: impl Fn(&Folder) -> Result<()> + Clone + Send + 'static,
) -> Vec<Trial> {
    guest_trials_with(hosts, || None, name, body)
}

/// The same for a body that needs something of the host besides, of which `missing` says why it is not there.
pub(crate) fn guest_trials_with(
    hosts: &[Hosts],
    missing: fn() -> Option<String>,
    name: impl AsRef<str>,
    body: impl Fn(&Folder) -> Result<()> + Clone + Send + 'static,
) -> Vec<Trial> {
    let name = name.as_ref();
    let trial = |hosts: &Hosts| {
        let (hosts, body) = (*hosts, body.clone());
        Trial::ignorable_test(format!("{name}::{}", hosts.name()), move || {
            match hosts.missing().or_else(missing) {
                Some(reason) => Ok(Completion::ignored_with(reason)),
                None => {
                    let folder = Folder::on(hosts).map_err(failed)?;
                    body(&folder).map_err(failed)?;
                    Ok(Completion::Completed)
                }
            }
        })
    };
    hosts.iter().map(trial).collect()
}

fn failed(error: anyhow::Error) -> Failed {
    Failed::from(format!("{error:#}"))
}
