//! placeholder
use crate::*;
/// Moves a machine away.
pub fn send(
    url: &MoveUrl,
    machine: &mut dyn SourceMachine,
    options: &SendOptions,
    control: &MoveControl,
) -> Result<SendReport, SendError> {
    let _ = (url, machine, options, control);
    Err(SendError { phase: Phase::Connect, cause: Cause::Cancelled, outcome: SourceOutcome::RunningHere })
}
