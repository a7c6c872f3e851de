//! `vmm send`: starts a move in a running `vmm` and follows it.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use super::{FAILED, IN_DOUBT, SendArgs, progress, signals};
use crate::client::{Client, Job, Status};
use crate::service::SendMigration;

/// `vmm send`.
pub(super) fn send(args: SendArgs) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.api_socket).context("cannot start a client")?;
    let cancel = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&cancel);
    // Before the move starts, so that no signal can leave it running unattended.
    signals::on_stop(
        move || asked.store(true, Ordering::Relaxed),
        || eprintln!("vmm: no longer waiting; the move may still go on, see `vmm ctl … jobs`"),
    )?;
    let request = SendMigration {
        destination_url: args.url,
        downtime_ms: args.downtime_ms,
        timeout_s: args.timeout_s,
        timeout_strategy: args.timeout_strategy.into(),
        connections: args.connections,
    };
    let request = serde_json::to_vec(&request).context("cannot write the request")?;
    let id = client.start_job("vm.send-migration", request)?;
    let job = match progress::follow(&client, id, &cancel)? {
        Ok(job) => job,
        Err(error) => {
            eprintln!(
                "vmm: the vmm that runs the machine is gone before it said how the move ended ({error}); \
                 look whether the guest runs at the destination"
            );
            return Ok(ExitCode::from(IN_DOUBT));
        }
    };
    if args.json {
        println!("{}", job.raw);
    }
    Ok(report(
        &job,
        &args.api_socket.display().to_string(),
        args.json,
    ))
}

/// Says how the move ended, and gives the exit status for it.
fn report(job: &Job, api_socket: &str, json: bool) -> ExitCode {
    let reason = job.error.as_ref().map_or("no reason given", |e| &e.message);
    match job.status {
        Status::Succeeded => {
            if !json {
                println!("{}", progress::summary(job));
            }
            ExitCode::SUCCESS
        }
        Status::Cancelled => {
            eprintln!("vmm: the move was cancelled; the guest runs on here");
            ExitCode::from(FAILED)
        }
        Status::Failed | Status::Running => {
            // The reason says where the guest is.
            eprintln!("vmm: {reason}");
            ExitCode::from(FAILED)
        }
        Status::InDoubt => {
            eprintln!(
                "vmm: it is unknown whether the guest runs at {url}: {reason}\n\
                 It is paused here until this is settled. Look at the destination, then:\n\
                 \x20 if it runs there:            vmm ctl --api-socket {api_socket} settle {id} runs_there\n\
                 \x20 if it certainly does not:    vmm ctl --api-socket {api_socket} settle {id} resume_here",
                url = job.url,
                id = job.id,
            );
            ExitCode::from(IN_DOUBT)
        }
    }
}
