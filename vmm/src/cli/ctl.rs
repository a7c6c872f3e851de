//! `vmm ctl`: one request to the API of a running `vmm`, its answer as JSON.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::{FAILED, directory_url};
use crate::client::{Client, ClientError};
use crate::job::JobId;
use crate::service::Settlement;

/// Talk to a running vmm through its API socket and print its answer as JSON.
///
/// A refusal is printed as JSON too, with its kind and message, on standard error.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vmm ctl --api-socket /run/vm1.sock info
  vmm ctl --api-socket /run/vm1.sock create vm.json
  vmm ctl --api-socket /run/vm1.sock settle 1 resume_here")]
pub(super) struct CtlArgs {
    /// The API socket of the vmm.
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    #[command(subcommand)]
    request: CtlRequest,
}

#[derive(Debug, Subcommand)]
enum CtlRequest {
    /// Ask whether it is there, its version and process id.
    Ping,
    /// Config and state of the machine.
    Info,
    /// Counters by device.
    Counters,
    /// Give it a config.
    Create {
        /// The config, a JSON file.
        file: PathBuf,
    },
    /// Build the machine and start it.
    Boot,
    /// Stop its vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Stop it and boot it anew.
    Reboot,
    /// Power it off without asking the guest.
    Shutdown,
    /// Press its power button.
    PowerButton,
    /// Add a disk; prints its id and where the guest finds it.
    AddDisk {
        /// A raw image or a block device.
        path: PathBuf,
        /// Its name in the machine.
        #[arg(long)]
        id: Option<String>,
        /// The guest cannot write it.
        #[arg(long)]
        readonly: bool,
        /// Past the host's page cache.
        #[arg(long)]
        direct: bool,
    },
    /// Add a network interface; prints its id and where the guest finds it.
    AddNet {
        /// The host's TAP, made if it is not there.
        #[arg(long)]
        tap: Option<String>,
        /// Its name in the machine.
        #[arg(long)]
        id: Option<String>,
        /// The guest's MAC address.
        #[arg(long)]
        mac: Option<String>,
    },
    /// Add a file system that a vhost-user back end shares; prints its id and where the guest finds it.
    AddFs {
        /// What the guest mounts it by.
        tag: String,
        /// The unix socket on which the back end (`virtiofsd`) listens.
        socket: PathBuf,
        /// Its name in the machine.
        #[arg(long)]
        id: Option<String>,
    },
    /// Add a vsock; prints its id and where the guest finds it. A machine has one at most.
    AddVsock {
        /// The guest's address: 3 to 4294967294.
        #[arg(long)]
        cid: u64,
        /// The unix socket, made there, on which the host connects to the guest.
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// Its name in the machine.
        #[arg(long)]
        id: Option<String>,
    },
    /// Take a disk, network interface, file system or vsock away: asks the guest, which lets it go or does not.
    RemoveDevice {
        /// Its name in the machine.
        id: String,
    },
    /// Say what the machine boots from, from its next boot or reset on.
    Payload {
        /// A kernel image.
        #[arg(long, required_unless_present = "trust_source")]
        kernel: Option<PathBuf>,
        /// An initial RAM file system; none if it is not given.
        #[arg(long, requires = "kernel")]
        initramfs: Option<PathBuf>,
        /// What the host named that the machine came from.
        #[arg(long, conflicts_with = "kernel")]
        trust_source: bool,
    },
    /// Change how many vCPUs there are, how much memory the guest has, or gives back by its balloon. The guest does it: `info` and `counters` show
    /// how far it is.
    #[command(group = clap::ArgGroup::new("sizes").required(true).multiple(true))]
    Resize {
        /// vCPUs. Those that come, the guest has to bring online; those that are to go, it lets go or does not: `info` shows it.
        #[arg(long, group = "sizes")]
        cpus: Option<u32>,
        /// All of its memory, in bytes or as 512M, 4G: from what it boots with to that and `memory.hotplug_size`, in steps of 2 MiB.
        #[arg(long, value_name = "SIZE", value_parser = size, group = "sizes")]
        memory: Option<u64>,
        /// Bytes that the guest gives back, a multiple of 4096; also as 512M, 4G.
        #[arg(long, value_name = "SIZE", value_parser = size, group = "sizes")]
        balloon: Option<u64>,
    },
    /// Grow the image of a disk, and tell the guest.
    ResizeDisk {
        /// Its name in the machine.
        id: String,
        /// Bytes, a multiple of 512.
        size: u64,
    },
    /// Write the paused machine to files, from which `vmm restore` makes it again. The images of its disks are not in them.
    ///
    /// Answers once they are on the disk; `jobs` shows how far they are, and `cancel` gives it up. Pause the machine first; it stays
    /// paused.
    Snapshot {
        /// A directory that does not exist or is empty.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Forget the config, so that another can be given.
    Delete,
    /// All jobs.
    Jobs,
    /// One job: phase, rounds, bytes, rates, downtime.
    Job {
        /// Its number.
        id: JobId,
    },
    /// Cancel a job: a guest that was to move stays.
    Cancel {
        /// Its number.
        id: JobId,
    },
    /// Settle a move whose outcome is unknown. First make sure where the guest runs.
    Settle {
        /// The number of its job.
        id: JobId,
        /// What you have found out.
        outcome: Outcome,
    },
    /// End the vmm; a running guest is powered off.
    VmmShutdown,
}

/// Where the guest of an unsettled move is.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Outcome {
    /// It does not run at the destination, for certain: resume it here.
    ResumeHere,
    /// It runs at the destination: give it up here.
    RunsThere,
}

impl From<Outcome> for Settlement {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::ResumeHere => Self::ResumeHere,
            Outcome::RunsThere => Self::RunsThere,
        }
    }
}

/// A number of bytes, or of units of 1024, 1024², 1024³ or 1024⁴ of them.
fn size(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    number
        .parse()
        .ok()
        .and_then(|number: u64| number.checked_mul(1 << shift))
        .ok_or_else(|| "write bytes, or a number with K, M, G or T".to_owned())
}

/// `vmm ctl`.
pub(super) fn ctl(args: &CtlArgs) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.api_socket).context("cannot start a client")?;
    match ask(&client, &args.request)? {
        Ok(Value::Null) => Ok(ExitCode::SUCCESS),
        Ok(answer) => {
            println!("{answer:#}");
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            eprintln!("{:#}", error.to_json());
            Ok(ExitCode::from(FAILED))
        }
    }
}

fn ask(client: &Client, request: &CtlRequest) -> anyhow::Result<Result<Value, ClientError>> {
    Ok(match request {
        CtlRequest::Ping => client.get("vmm.ping"),
        CtlRequest::Info => client.get("vm.info"),
        CtlRequest::Counters => client.get("vm.counters"),
        CtlRequest::Create { file } => {
            let config =
                std::fs::read(file).with_context(|| format!("config {}", file.display()))?;
            client.put_json("vm.create", config)
        }
        CtlRequest::Boot => client.put("vm.boot"),
        CtlRequest::Pause => client.put("vm.pause"),
        CtlRequest::Resume => client.put("vm.resume"),
        CtlRequest::Reboot => client.put("vm.reboot"),
        CtlRequest::Shutdown => client.put("vm.shutdown"),
        CtlRequest::PowerButton => client.put("vm.power-button"),
        CtlRequest::AddDisk {
            path,
            id,
            readonly,
            direct,
        } => {
            // Seen from there, a relative path would be another one.
            let path =
                std::path::absolute(path).with_context(|| format!("disk {}", path.display()))?;
            let body = json!({"path": path, "id": id, "readonly": readonly, "direct": direct});
            client.put_json("vm.add-disk", body.to_string().into_bytes())
        }
        CtlRequest::AddNet { tap, id, mac } => {
            let body = json!({"tap": tap, "id": id, "mac": mac});
            client.put_json("vm.add-net", body.to_string().into_bytes())
        }
        CtlRequest::AddFs { tag, socket, id } => {
            let socket = std::path::absolute(socket)
                .with_context(|| format!("socket {}", socket.display()))?;
            let body = json!({"tag": tag, "socket": socket, "id": id});
            client.put_json("vm.add-fs", body.to_string().into_bytes())
        }
        CtlRequest::AddVsock { cid, socket, id } => {
            let socket = std::path::absolute(socket)
                .with_context(|| format!("socket {}", socket.display()))?;
            let body = json!({"cid": cid, "socket": socket, "id": id});
            client.put_json("vm.add-vsock", body.to_string().into_bytes())
        }
        CtlRequest::RemoveDevice { id } => client.put_json(
            "vm.remove-device",
            json!({ "id": id }).to_string().into_bytes(),
        ),
        CtlRequest::Payload {
            kernel,
            initramfs,
            trust_source,
        } => {
            let here = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
            let body = json!({
                "kernel": here(kernel).context("kernel")?,
                "initramfs": here(initramfs).context("initramfs")?,
                "trust_source": trust_source,
            });
            client.put_json("vm.payload", body.to_string().into_bytes())
        }
        CtlRequest::Resize {
            cpus,
            memory,
            balloon,
        } => {
            let body = json!({
                "desired_vcpus": cpus, "desired_ram": memory, "desired_balloon": balloon,
            });
            client.put_json("vm.resize", body.to_string().into_bytes())
        }
        CtlRequest::ResizeDisk { id, size } => {
            let body = json!({"id": id, "desired_size": size});
            client.put_json("vm.resize-disk", body.to_string().into_bytes())
        }
        CtlRequest::Snapshot { directory } => {
            let body = json!({ "destination_url": directory_url(directory)? });
            client.put_json("vm.snapshot", body.to_string().into_bytes())
        }
        CtlRequest::Delete => client.put("vm.delete"),
        CtlRequest::Jobs => client.get("jobs"),
        CtlRequest::Job { id } => client.get(&format!("jobs/{id}")),
        CtlRequest::Cancel { id } => client.put(&format!("jobs/{id}/cancel")),
        CtlRequest::Settle { id, outcome } => {
            let body = json!({ "outcome": Settlement::from(*outcome) }).to_string();
            client.put_json(&format!("jobs/{id}/settle"), body.into_bytes())
        }
        CtlRequest::VmmShutdown => client.put("vmm.shutdown"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("3k", 3072),
            ("512M", 512 << 20),
            ("4G", 4 << 30),
            ("16T", 16 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "4X", "-1", "1.5G", "16777216T", "4 G", "4Gé"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
