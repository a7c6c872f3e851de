//! `vmm run`, `vmm serve`, `vmm receive` and `vmm restore`: processes that own a machine.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};
use hypervisor::HypervisorKind;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::{FAILED, ReceiveArgs, RestoreArgs, RunArgs, ServeArgs, directory_url, signals};
use crate::api::ApiServer;
use crate::config::VmConfig;
use crate::job::{JobId, JobInfo, JobStatus};
use crate::machine::{ExitReason, GuestEnd, MachineThread};
use crate::service::{ReceiveMigration, Request, Response, RestoreRequest, Service};

/// A machine's thread, and the API if it was asked for.
struct Host {
    machine: MachineThread,
    api: Option<ApiServer>,
}

impl Host {
    /// Starts both, and takes signals.
    fn start(
        guest_end: GuestEnd,
        hypervisor: Option<HypervisorKind>,
        api_socket: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let machine = MachineThread::start(guest_end, hypervisor)
            .context("cannot start the machine's thread")?;
        let service = machine.service();
        let api = api_socket
            .map(|path| ApiServer::start(path, service.clone()))
            .transpose()?;
        let terminal = terminal();
        let socket = api.as_ref().map(|api| api.path().to_owned());
        let service = service.clone();
        signals::on_stop(
            move || {
                eprintln!("vmm: stopping; a second signal ends the process at once");
                service.submit(
                    Request::VmmShutdown,
                    Box::new(|reply| {
                        if let Err(error) = reply {
                            eprintln!("vmm: not stopping: {error}");
                        }
                    }),
                );
            },
            move || leave_tidy(terminal.as_ref(), socket),
        )?;
        Ok(Self { machine, api })
    }

    fn service(&self) -> &Service {
        self.machine.service()
    }

    /// Waits for the end, and says what ended it.
    fn wait(self) -> ExitReason {
        let reason = self.machine.wait();
        // After the machine, so that those who wait for an answer about its end get it.
        drop(self.api);
        reason
    }

    /// Ends the process's machine, whatever it is doing.
    fn stop(self) {
        self.service()
            .submit(Request::VmmShutdown, Box::new(|_| ()));
        self.wait();
    }
}

/// The terminal's settings as they were before a guest's serial port may have changed them.
fn terminal() -> Option<Termios> {
    tcgetattr(std::io::stdin()).ok()
}

/// What must be undone even if the process ends at once.
fn leave_tidy(terminal: Option<&Termios>, api_socket: Option<PathBuf>) {
    if let Some(settings) = terminal {
        // Nothing is left that could be done about a failure.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, settings);
    }
    if let Some(path) = api_socket {
        let _ = std::fs::remove_file(path);
    }
}

/// `vmm run`.
pub(super) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let mut config = read_config(&args.config)?;
    if let Some(name) = args.hypervisor {
        config.hypervisor = Some(name.into());
    }
    let host = Host::start(GuestEnd::EndsProcess, None, args.api_socket.as_deref())?;
    for request in [Request::Create(Box::new(config)), Request::Boot] {
        if let Err(error) = host.service().call(request) {
            host.stop();
            return Err(error.into());
        }
    }
    guest_ended(&host.wait())
}

/// `vmm serve`.
pub(super) fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let host = Host::start(
        GuestEnd::Stays,
        args.hypervisor.map(Into::into),
        Some(&args.api_socket),
    )?;
    guest_ended(&host.wait())
}

/// `vmm receive`.
pub(super) fn receive(args: ReceiveArgs) -> anyhow::Result<ExitCode> {
    let host = Host::start(GuestEnd::EndsProcess, None, args.api_socket.as_deref())?;
    let service = host.service().clone();
    let arrival = args.arrival;
    let receive = ReceiveMigration {
        receiver_url: args.url,
        disks: arrival.disks(),
        taps: arrival.taps(),
        vhost: arrival.vhost(),
        serial: arrival.serial,
        console: arrival.console,
        vsock: arrival.vsock,
        kernel: arrival.kernel,
        initramfs: arrival.initramfs,
        hypervisor: arrival.hypervisor.map(Into::into),
        trust_source: args.trust_source,
        allow_tsc_change: arrival.allow_tsc_change,
    };
    let id = match service.call(Request::Receive(Box::new(receive))) {
        Ok(Response::JobStarted(id)) => id,
        Ok(other) => bail!("the machine's thread gave an answer to another question: {other:?}"),
        Err(error) => {
            host.stop();
            return Err(error.into());
        }
    };
    if let Some(job) = service.jobs().get(id) {
        eprintln!("listening on {}", job.url);
    }
    run_arrival(
        host,
        id,
        "has arrived and runs here",
        "no machine has arrived",
    )
}

/// `vmm restore`.
pub(super) fn restore(args: RestoreArgs) -> anyhow::Result<ExitCode> {
    let arrival = args.arrival;
    let restore = RestoreRequest {
        source_url: directory_url(&args.directory)?,
        prefault: args.verify,
        resume: !args.paused,
        disks: arrival.disks(),
        taps: arrival.taps(),
        vhost: arrival.vhost(),
        serial: arrival.serial,
        console: arrival.console,
        vsock: arrival.vsock,
        kernel: arrival.kernel,
        initramfs: arrival.initramfs,
        hypervisor: arrival.hypervisor.map(Into::into),
        allow_tsc_change: arrival.allow_tsc_change,
    };
    let host = Host::start(GuestEnd::EndsProcess, None, args.api_socket.as_deref())?;
    let id = match host.service().call(Request::Restore(Box::new(restore))) {
        Ok(Response::JobStarted(id)) => id,
        Ok(other) => bail!("the machine's thread gave an answer to another question: {other:?}"),
        Err(error) => {
            host.stop();
            return Err(error.into());
        }
    };
    run_arrival(host, id, "is restored", "no machine was restored")
}

/// Waits for the job that brings a machine here, and then for the machine's end.
fn run_arrival(
    host: Host,
    id: JobId,
    arrived: &'static str,
    nothing: &'static str,
) -> anyhow::Result<ExitCode> {
    let service = host.service().clone();
    // Whatever happens to the job, this thread waits for the machine's: the one that decides.
    let arrival: Arc<Mutex<Option<JobInfo>>> = Arc::default();
    let ended = Arc::clone(&arrival);
    let watched = service.clone();
    service.jobs().on_end(id, move |job| {
        if job.status == JobStatus::Succeeded {
            eprintln!("the machine {arrived}");
        } else {
            watched.submit(Request::VmmShutdown, Box::new(|_| ()));
        }
        *ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
    });
    let reason = host.wait();
    let arrival = arrival
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    match arrival {
        Some(job) if job.status == JobStatus::Succeeded => guest_ended(&reason),
        Some(JobInfo {
            error: Some(error), ..
        }) => bail!("{nothing}: {error}"),
        _ => bail!("stopped before there was a machine"),
    }
}

/// The exit status for the end of a guest.
fn guest_ended(reason: &ExitReason) -> anyhow::Result<ExitCode> {
    match reason {
        ExitReason::Requested | ExitReason::PowerOff => Ok(ExitCode::SUCCESS),
        ExitReason::MovedAway => {
            eprintln!("the machine has moved away");
            Ok(ExitCode::SUCCESS)
        }
        ExitReason::Fault(why) => {
            eprintln!("vmm: {why}");
            Ok(ExitCode::from(FAILED))
        }
    }
}

fn read_config(path: &Path) -> anyhow::Result<VmConfig> {
    let json = crate::json::read_file(path)
        .map_err(anyhow::Error::msg)
        .context("config")?;
    VmConfig::from_json(&json).with_context(|| format!("config {}", path.display()))
}
