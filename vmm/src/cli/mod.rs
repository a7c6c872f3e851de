//! The command line.
//!
//! ```text
//!  run, serve, receive, restore ─► host.rs: own a machine until it ends      (machine's thread, API if asked for)
//!  send, ctl           ─► send.rs, ctl.rs: talk to the API of such a process
//!  cpu                 ─► cpu.rs: this and other hosts, CPU models
//!  demo                ─► demo/: start two of them and move a guest from one to the other
//! ```
//!
//! Results go to standard output, everything else to standard error. Exit status: 0 done, 1 failed
//! (the reason is the last line on standard error), 2 wrong usage or no hypervisor for the demo,
//! 3 a move whose outcome is unknown.

mod cpu;
mod ctl;
mod demo;
mod host;
mod logging;
mod progress;
mod send;
mod signals;

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use hypervisor::HypervisorKind;

use crate::config::SerialConfig;
use crate::service::{SendMigration, TimeoutStrategy};

/// Runs virtual machines and moves them, live, from one process or host to another.
#[derive(Debug, Parser)]
#[command(
    name = "vmm",
    version,
    max_term_width = 100,
    disable_help_subcommand = true
)]
#[command(after_help = "\
Examples:
  vmm demo                                       boot a guest and watch it move
  vmm run --config vm.json                       boot a machine in the foreground
  vmm run --config vm.json --api-socket a.sock   the same, and it can be talked to
  vmm receive tcp:0.0.0.0:4600                   wait for a machine and run it
  vmm send tcp:host-b:4600 --api-socket a.sock   move the machine behind a.sock there
  vmm ctl --api-socket a.sock info               ask about it
  vmm ctl --api-socket a.sock snapshot /srv/s1   write the paused machine to files
  vmm restore /srv/s1                            run the machine that such files hold
  vmm cpu compare a.json b.json                  whether guests move between two hosts

Exit status: 0 done, 1 failed, 2 wrong usage, 3 a move whose outcome is unknown.")]
struct Cli {
    /// What is logged to standard error: off, error, warn, info, debug or trace, for all parts or for
    /// some, e.g. `warn,migration=debug` [default: the environment's VMM_LOG, or warn]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<logging::Filter>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(RunArgs),
    Serve(ServeArgs),
    Receive(ReceiveArgs),
    Restore(RestoreArgs),
    Send(SendArgs),
    Ctl(ctl::CtlArgs),
    Cpu(cpu::CpuArgs),
    Demo(demo::DemoArgs),
}

/// Boot a machine and stay until it ends.
///
/// The process ends with status 0 when the guest powers off or has moved away, and with 1 when it
/// cannot go on. SIGTERM and SIGINT power it off; a second one ends the process at once.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vmm run --config vm.json
  vmm run --config vm.json --api-socket /run/vm1.sock

`cpus.model` in the config says what the guest sees of the processor: host (default), a baseline such as x86-64-v3 or
EPYC-Rome, portable (it can move between KVM and the Microsoft hypervisor), or a file; see `vmm cpu --help`.

A config that boots a Linux kernel, with its console on this terminal:
  {
    \"cpus\": { \"boot_vcpus\": 2 },
    \"memory\": { \"size\": 1073741824 },
    \"payload\": { \"kernel\": \"vmlinuz\", \"initramfs\": \"initrd.img\", \"cmdline\": \"console=ttyS0\" },
    \"serial\": { \"mode\": \"Tty\" }
  }")]
struct RunArgs {
    /// The machine's config, a JSON file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Offer the HTTP API on a unix socket that is made here.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// Which hypervisor to use instead of the one in the config [default: mshv where /dev/mshv exists, else kvm]
    #[arg(long, value_name = "NAME")]
    hypervisor: Option<HypervisorName>,
}

/// Names of hypervisors on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum HypervisorName {
    /// Linux KVM.
    Kvm,
    /// The Microsoft hypervisor.
    Mshv,
}

impl From<HypervisorName> for HypervisorKind {
    fn from(name: HypervisorName) -> Self {
        match name {
            HypervisorName::Kvm => Self::Kvm,
            HypervisorName::Mshv => Self::Mshv,
        }
    }
}

/// Offer the HTTP API, without a machine yet.
///
/// The process stays when its guest powers off, which can then be booted again; `vmm ctl … vmm-shutdown`,
/// SIGTERM or SIGINT end it.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  vmm serve --api-socket /run/vm1.sock &
  vmm ctl --api-socket /run/vm1.sock create vm.json
  vmm ctl --api-socket /run/vm1.sock boot")]
struct ServeArgs {
    /// The unix socket, which is made with mode 0600.
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// Which hypervisor runs machines whose config does not say it, and those that move in [default: mshv where
    /// /dev/mshv exists, else kvm]
    #[arg(long, value_name = "NAME")]
    hypervisor: Option<HypervisorName>,
}

/// Wait for one machine, then run it until it ends.
///
/// Prints `listening on URL` to standard error once a sender can connect. The process ends with status
/// 1 if the move fails; afterwards it is like `vmm run`.
///
/// Whoever connects does not choose which files, interfaces and terminals of this host are used: a guest whose serial port, console, disks,
/// TAPs or vsock lead to some is refused unless an option says where they lead here, or --trust-source is given. Without --kernel (and
/// --initramfs, if it has one) or --trust-source a guest arrives all the same, but if it resets itself later it is not booted again: the
/// process ends with status 1 (that of `vmm serve` stays, with the machine powered off). `vmm ctl payload` can say it later.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vmm receive tcp:0.0.0.0:4600
  vmm receive tcp:[::1]:0 --serial file=/var/log/vm1.log
  vmm receive unix:/run/move.sock --api-socket /run/vm1.sock
  vmm receive tcp:0.0.0.0:4600 --hypervisor mshv
  vmm receive tcp:0.0.0.0:4600 --disk root=/srv/vm1.img --tap _net0=vmtap3 --serial tty --kernel /boot/vmlinuz")]
struct ReceiveArgs {
    /// Where to listen: `tcp:HOST:PORT` (port 0 picks one) or `unix:PATH`.
    url: String,
    /// Offer the HTTP API on a unix socket that is made here.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    #[command(flatten)]
    arrival: ArrivalArgs,
    /// What is not given is named here as at the source: images, TAPs, sockets, kernel. The source may then choose any file of this host.
    #[arg(long)]
    trust_source: bool,
}

/// Where a guest that comes from elsewhere leads here, and what it runs on.
#[derive(Debug, Args)]
struct ArrivalArgs {
    /// Where the guest's serial port leads here, instead of where it led: off, null, pty, tty, file=PATH
    /// or socket=PATH.
    #[arg(long, value_name = "WHERE")]
    serial: Option<SerialConfig>,
    /// Which hypervisor runs the machine here [default: mshv where /dev/mshv exists, else kvm]
    #[arg(long, value_name = "NAME")]
    hypervisor: Option<HypervisorName>,
    /// Where the guest's console leads here: as for --serial.
    #[arg(long, value_name = "WHERE")]
    console: Option<SerialConfig>,
    /// The unix socket of the guest's vsock here.
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// The image of one of the guest's disks here; may be given for each.
    #[arg(long = "disk", value_name = "ID=PATH", value_parser = pair)]
    disks: Vec<(String, String)>,
    /// The TAP of one of the guest's network interfaces here, by name, or as `fd:N,…`: descriptors passed to this process, one a pair of
    /// queues; may be given for each.
    #[arg(long = "tap", value_name = "ID=NAME|ID=fd:N", value_parser = pair)]
    taps: Vec<(String, String)>,
    /// The socket of the vhost-user back end of one of the guest's devices here; may be given for each.
    #[arg(long = "vhost", value_name = "ID=SOCKET", value_parser = pair)]
    vhost: Vec<(String, String)>,
    /// The kernel that the guest boots when it resets itself here.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// The initial RAM file system for that.
    #[arg(long, value_name = "PATH")]
    initramfs: Option<PathBuf>,
    /// Take the guest even if its TSC runs at another frequency here, which it is not told of: for guests that do not tell
    /// the time by it.
    #[arg(long)]
    allow_tsc_change: bool,
}

impl ArrivalArgs {
    fn disks(&self) -> BTreeMap<String, PathBuf> {
        let disks = self.disks.iter();
        disks.map(|(id, path)| (id.clone(), path.into())).collect()
    }

    fn vhost(&self) -> BTreeMap<String, PathBuf> {
        let sockets = self.vhost.iter();
        sockets
            .map(|(id, socket)| (id.clone(), socket.into()))
            .collect()
    }

    fn taps(&self) -> BTreeMap<String, String> {
        self.taps.iter().cloned().collect()
    }
}

/// Run the machine of a snapshot until it ends.
///
/// The guest runs at once, whatever its size: its memory is mapped, copy on write, and read page by page as the guest uses it. The
/// snapshot is not changed and can be restored again. Until the guest has ended its `memory` file must not be changed.
///
/// A snapshot does not hold the images of disks: they are used where they are, or where --disk says, and must hold what they held
/// when it was taken. Serial port, sockets and TAPs lead where they led, or where the options say.
///
/// The process ends with status 1 if the snapshot cannot be restored; afterwards it is like `vmm run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vmm restore /srv/vm1.snapshot
  vmm restore /srv/vm1.snapshot --verify --serial file=/var/log/vm1.log
  vmm restore /srv/vm1.snapshot --paused --api-socket /run/vm1.sock
  vmm restore /srv/vm1.snapshot --disk root=/srv/copy.img

To write one: pause the machine, then `vmm ctl --api-socket /run/vm1.sock snapshot /srv/vm1.snapshot`.")]
struct RestoreArgs {
    /// The snapshot's directory.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Read all memory first and compare it with its checksums: slower, finds any damage, and the files are not needed afterwards.
    #[arg(long, visible_alias = "prefault")]
    verify: bool,
    /// Leave the guest paused until it is resumed through the API.
    #[arg(long, requires = "api_socket")]
    paused: bool,
    /// Offer the HTTP API on a unix socket that is made here.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    #[command(flatten)]
    arrival: ArrivalArgs,
}

/// A directory as a URL for the API of a process that may be in another one.
fn directory_url(directory: &std::path::Path) -> anyhow::Result<String> {
    let path = std::path::absolute(directory)
        .with_context(|| format!("snapshot {}", directory.display()))?;
    let path = path
        .to_str()
        .with_context(|| format!("snapshot {}: the path is not UTF-8", path.display()))?;
    Ok(format!("file://{path}"))
}

/// `ID=WHERE`.
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((id, place)) if !id.is_empty() && !place.is_empty() => {
            Ok((id.to_owned(), place.to_owned()))
        }
        _ => Err("give the device's id, `=`, and where it leads".to_owned()),
    }
}

/// Move the machine of a running vmm to another one that waits with `vmm receive`.
///
/// Shows the progress until the move is over. Ctrl-C cancels the move: the guest stays.
///
/// Exit status: 0 the guest runs there, 1 the move failed or was cancelled and the guest stays here, 3 it
/// is unknown whether the guest runs there.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vmm send tcp:host-b:4600 --api-socket /run/vm1.sock
  vmm send unix:/run/move.sock --api-socket /run/vm1.sock --downtime-ms 50 --json")]
struct SendArgs {
    /// Where the other vmm listens: `tcp:HOST:PORT` or `unix:PATH`.
    url: String,
    /// The API socket of the vmm that runs the machine.
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// The longest acceptable downtime, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = SendMigration::to("").downtime_ms)]
    downtime_ms: u64,
    /// How long to try to get below that, in seconds.
    #[arg(long, value_name = "N", default_value_t = SendMigration::to("").timeout_s)]
    timeout_s: u64,
    /// What to do after that time.
    #[arg(long, value_name = "WHAT", default_value = "cancel")]
    timeout_strategy: StrategyName,
    /// How many connections memory travels over [default: one for each processor here, at most 4]
    #[arg(long, value_name = "N")]
    connections: Option<NonZeroU16>,
    /// Print the job as one JSON object on standard output when it is over.
    #[arg(long)]
    json: bool,
}

/// What to do when a move cannot get below its downtime in time.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum StrategyName {
    /// The guest stays.
    Cancel,
    /// The guest moves, however long it is down.
    Ignore,
}

impl From<StrategyName> for TimeoutStrategy {
    fn from(name: StrategyName) -> Self {
        match name {
            StrategyName::Cancel => Self::Cancel,
            StrategyName::Ignore => Self::Ignore,
        }
    }
}

/// The exit status of a failure.
const FAILED: u8 = 1;

/// The exit status of the demo on a host that cannot run guests, and of wrong usage.
const UNUSABLE: u8 = 2;

/// The exit status of a move whose outcome is unknown.
const IN_DOUBT: u8 = 3;

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::start(cli.log_level)
        .and_then(|()| cli.command.run())
        .unwrap_or_else(|error| {
            eprintln!("vmm: {error:#}");
            ExitCode::from(FAILED)
        })
}

impl Command {
    fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Run(args) => host::run(&args),
            Self::Serve(args) => host::serve(&args),
            Self::Receive(args) => host::receive(args),
            Self::Restore(args) => host::restore(args),
            Self::Send(args) => send::send(args),
            Self::Ctl(args) => ctl::ctl(&args),
            Self::Cpu(args) => cpu::cpu(args),
            Self::Demo(args) => demo::demo(&args),
        }
    }
}

#[cfg(test)]
mod tests;
