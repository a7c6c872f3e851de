//! placeholder
use crate::*;
/// Takes a machine in.
pub fn receive(
    listener: &Listener,
    machine: &mut dyn DestinationMachine,
    options: &ReceiveOptions,
    control: &MoveControl,
) -> Result<ReceiveReport, ReceiveError> {
    let _ = (listener, machine, options, control);
    Err(ReceiveError { phase: Phase::Connect, cause: Cause::Cancelled })
}
