//! demo
use clap::Args;
use std::process::ExitCode;
/// Demo.
#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// json
    #[arg(long)]
    json: bool,
}
pub(super) fn demo(_: &DemoArgs) -> anyhow::Result<ExitCode> {
    Ok(super::UNUSABLE.into())
}
