//! What can be asked of a `vmm` process, and what it answers: the one seam between the machine's
//! thread and everything else (HTTP, command line, signals).

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::mpsc;

use arch::x86_64::cpu_model::CpuDump;
use hypervisor::HypervisorKind;
use migration::snapshot::Loading;
use serde::{Deserialize, Serialize};

use crate::config::{DiskConfig, FsConfig, NetConfig, SerialConfig, VmConfig, VsockConfig};
use crate::job::{JobId, JobInfo};

/// A request to the machine's thread.
#[derive(Debug)]
pub enum Request {
    /// Take a config; nothing runs yet.
    Create(Box<VmConfig>),
    /// Build the machine and start it.
    Boot,
    /// Config and state.
    Info,
    /// Counters by device.
    Counters,
    /// This host, as CPU models are compared with it.
    CpuDump,
    /// Stop all vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Stop, build anew, boot.
    Reboot,
    /// Power off without asking the guest.
    Shutdown,
    /// Press the ACPI power button.
    PowerButton,
    /// Add a disk.
    AddDisk(Box<DiskConfig>),
    /// Add a network interface.
    AddNet(Box<NetConfig>),
    /// Add a file system.
    AddFs(Box<FsConfig>),
    /// Add a vsock.
    AddVsock(Box<VsockConfig>),
    /// Take a device away, once the guest lets it go.
    RemoveDevice(RemoveDevice),
    /// Say what it boots from.
    Payload(Box<SetPayload>),
    /// Change sizes.
    Resize(Resize),
    /// Change the size of a disk.
    ResizeDisk(ResizeDisk),
    /// Forget the config.
    Delete,
    /// Start to move the machine away: answers with the job.
    Send(SendMigration),
    /// Start to wait for a machine: answers with the job.
    Receive(Box<ReceiveMigration>),
    /// Start to write the machine to files: answers with the job.
    Snapshot(SnapshotRequest),
    /// Start to make a machine of such files: answers with the job.
    Restore(Box<RestoreRequest>),
    /// All jobs.
    Jobs,
    /// One job.
    Job(JobId),
    /// Cancel a job.
    CancelJob(JobId),
    /// Settle a move whose outcome is unknown.
    SettleJob(JobId, Settlement),
    /// End the process; a running guest is powered off.
    VmmShutdown,
}

/// An answer.
#[derive(Clone, Debug)]
pub enum Response {
    /// Done, nothing to say.
    Done,
    /// For [`Request::Info`].
    Info(Box<VmInfo>),
    /// For [`Request::Counters`]: device, counter, value.
    Counters(BTreeMap<String, BTreeMap<String, u64>>),
    /// For [`Request::CpuDump`].
    CpuDump(Box<CpuDump>),
    /// A device has been added.
    Device(DeviceInfo),
    /// A job has started.
    JobStarted(JobId),
    /// For [`Request::Jobs`].
    Jobs(Vec<JobInfo>),
    /// For [`Request::Job`].
    Job(Box<JobInfo>),
}

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Configured, not built. Also a machine that was powered off is [`VmState::Shutdown`], not this.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are stopped.
    Paused,
    /// It was powered off; it can be booted again.
    Shutdown,
    /// It runs, or last ran, elsewhere.
    MovedAway,
    /// It is paused here and may be running elsewhere: the job that moved it must be settled.
    InDoubt,
}

/// What `vm.info` answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmInfo {
    /// The config, with what was decided at run time (the terminal of a PTY) filled in.
    pub config: VmConfig,
    /// Where it is in its life.
    pub state: VmState,
    /// Guest RAM in bytes: what it has, which is not what the config says if the guest has not plugged or unplugged all it was asked to.
    pub memory_actual_size: u64,
    /// False for a guest that has arrived with a kernel or initramfs that nobody at this host has named: if it resets, it stays off until
    /// `vm.payload` says what it boots from.
    pub bootable: bool,
    /// The kernel that was found on a disk and booted, if none is named. Unknown after a move, until the guest resets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub booted: Option<crate::boot::Booted>,
    /// The hypervisor that runs it, once it has been built.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
    /// Its vCPUs, where they can come and go and it has been built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<VcpuInfo>,
}

/// vCPUs that come and go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuInfo {
    /// How many there are to be.
    pub desired: u32,
    /// How many there are.
    pub present: u32,
    /// Ids of those whose coming or going the guest has not confirmed.
    pub pending: Vec<u32>,
    /// Those that the guest does not take, or does not let go.
    pub refused: Vec<VcpuRefusal>,
}

/// A vCPU that the guest does not take, or does not let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuRefusal {
    /// Its id.
    pub id: u32,
    /// The guest's reason: a status code of `_OST` (ACPI 6.5, tables 6.18 and 6.19).
    pub status: u8,
}

/// What `vm.add-disk`, `vm.add-net`, `vm.add-fs` and `vm.add-vsock` answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Its name in the machine.
    pub id: String,
    /// Where the guest finds it: segment, bus, device and function. None for a machine that has not been booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bdf: Option<String>,
}

/// The body of `vm.remove-device`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveDevice {
    /// Which.
    pub id: String,
}

/// The body of `vm.payload`: what the machine boots from, from now on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetPayload {
    /// Kernel image at this host.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system at this host; there is none if this is absent and the kernel is not.
    #[serde(default)]
    pub initramfs: Option<PathBuf>,
    /// Those that the host named which the machine came from.
    #[serde(default)]
    pub trust_source: bool,
}

/// The body of `vm.resize`: what is absent stays as it is.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// vCPUs: the first so many are to be there.
    #[serde(default)]
    pub desired_vcpus: Option<u32>,
    /// RAM in bytes: from `memory.size` to that and `memory.hotplug_size`. The guest does it, and may not get there.
    #[serde(default)]
    pub desired_ram: Option<u64>,
    /// Bytes that the guest gives back by its balloon.
    #[serde(default)]
    pub desired_balloon: Option<u64>,
}

/// The body of `vm.resize-disk`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeDisk {
    /// Which.
    pub id: String,
    /// Size in bytes, a multiple of 512. An image only grows.
    pub desired_size: u64,
}

/// The body of `vm.send-migration`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendMigration {
    /// `tcp:HOST:PORT` or `unix:PATH`.
    pub destination_url: String,
    /// Longest acceptable downtime in milliseconds: a ceiling, not a goal.
    #[serde(default = "default_downtime_ms")]
    pub downtime_ms: u64,
    /// How long pre-copy may try to get below that, in seconds.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
    /// What happens then.
    #[serde(default)]
    pub timeout_strategy: TimeoutStrategy,
    /// Connections that memory travels over; by default as many as this host has processors, up to 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<NonZeroU16>,
}

fn default_downtime_ms() -> u64 {
    300
}

fn default_timeout_s() -> u64 {
    3600
}

impl SendMigration {
    /// A move with the default limits.
    pub fn to(destination_url: impl Into<String>) -> Self {
        Self {
            destination_url: destination_url.into(),
            downtime_ms: default_downtime_ms(),
            timeout_s: default_timeout_s(),
            timeout_strategy: TimeoutStrategy::default(),
            connections: None,
        }
    }
}

/// What a move does when its time is over and the downtime would be too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeoutStrategy {
    /// The guest stays.
    #[default]
    Cancel,
    /// The guest moves, however long it is down.
    Ignore,
}

/// The body of `vm.receive-migration`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveMigration {
    /// `tcp:HOST:PORT` or `unix:PATH` to listen on; port 0 picks one (see the job's `url`).
    pub receiver_url: String,
    /// Where the guest's serial port leads here, instead of where it led at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// Which hypervisor runs it here; this host's own by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<HypervisorKind>,
    /// Where its console leads here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<SerialConfig>,
    /// Its vsock's socket here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<PathBuf>,
    /// Images of the guest's disks here, by the disks' ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<String, PathBuf>,
    /// TAPs of its network interfaces here, by their ids: a name, or `fd:N,…`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub taps: BTreeMap<String, String>,
    /// Sockets of the vhost-user back ends of its devices here, by the devices' ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vhost: BTreeMap<String, PathBuf>,
    /// The kernel that it boots when it resets itself here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM file system for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// What none of these says is named here as at the source, which may then choose any file of this host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trust_source: bool,
    /// The guest's TSC may run at another frequency here: for guests that do not tell the time by it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_tsc_change: bool,
}

/// The body of `vm.snapshot`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// `file:///DIR`: a directory that does not exist or is empty. Nothing in it is percent-encoded.
    pub destination_url: String,
}

/// The body of `vm.restore`. What is absent leads where it led when the snapshot was taken.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// `file:///DIR`: where the snapshot is.
    pub source_url: String,
    /// All memory is read and checked before the guest can run. Otherwise it is mapped, and read page by page when the guest
    /// uses it: the guest can run at once, damage of the memory is not found, and the files must stay as they are.
    #[serde(default)]
    pub prefault: bool,
    /// The guest runs at once; otherwise it waits for `vm.resume`.
    #[serde(default)]
    pub resume: bool,
    /// Where the guest's serial port leads now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// Where its console leads now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<SerialConfig>,
    /// Its vsock's socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<PathBuf>,
    /// Which hypervisor runs it; this host's own by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<HypervisorKind>,
    /// Images of its disks, by the disks' ids. They must hold what they held when the snapshot was taken.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<String, PathBuf>,
    /// TAPs of its network interfaces, by their ids: a name, or `fd:N,…`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub taps: BTreeMap<String, String>,
    /// Sockets of the vhost-user back ends of its devices, by the devices' ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vhost: BTreeMap<String, PathBuf>,
    /// The kernel that it boots when it resets itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM file system for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The guest's TSC may run at another frequency here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_tsc_change: bool,
}

impl RestoreRequest {
    /// How its memory comes back.
    pub(crate) fn loading(&self) -> Loading {
        match self.prefault {
            true => Loading::Verified,
            false => Loading::Lazy,
        }
    }
}

/// The directory of a `file://` URL, or what is wrong with it.
pub(crate) fn directory_of(url: &str) -> Result<PathBuf, String> {
    match url.strip_prefix("file://").map(PathBuf::from) {
        Some(path) if path.is_absolute() && !url.contains('\0') => Ok(path),
        _ => Err(format!(
            "`{url}` is not the URL of a directory here; write file:// and an absolute path, for example file:///srv/vm1.snapshot"
        )),
    }
}

/// How a move of unknown outcome is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Settlement {
    /// The operator has made sure that the guest does not run at the destination: it resumes here.
    ResumeHere,
    /// The guest runs at the destination: it is given up here.
    RunsThere,
}

/// The class of a refusal, which decides the HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request makes no sense (400).
    BadRequest,
    /// There is no such thing (404).
    NotFound,
    /// There is such a path, but not with this method (405).
    MethodNotAllowed,
    /// Not in this state (409).
    WrongState,
    /// The host, the guest's files or the peer do not let it happen (409 if it can be retried as it is after a
    /// change elsewhere).
    Failed,
    /// Our own fault (500).
    Internal,
}

/// A refusal: class, sentence, and what to do in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ServiceError {
    /// Its class.
    pub kind: ErrorKind,
    /// One sentence.
    pub message: String,
}

impl ServiceError {
    /// A refusal of this class.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// The request makes no sense in the machine's state.
    pub fn wrong_state(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::WrongState, message)
    }
}

/// Result of a request.
pub type Reply = Result<Response, ServiceError>;

/// Called once with the reply, on the machine's thread: must not block.
pub type ReplyTo = Box<dyn FnOnce(Reply) + Send>;

/// The way to the machine's thread. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    sender: mpsc::Sender<crate::machine::Event>,
    jobs: crate::job::Jobs,
}

impl Service {
    pub(crate) fn new(sender: mpsc::Sender<crate::machine::Event>, jobs: crate::job::Jobs) -> Self {
        Self { sender, jobs }
    }

    /// Sends a request; `reply_to` gets the answer.
    pub fn submit(&self, request: Request, reply_to: ReplyTo) {
        use crate::machine::Event;
        if let Err(mpsc::SendError(Event::Request(_, reply_to))) =
            self.sender.send(Event::Request(request, reply_to))
        {
            reply_to(Err(ServiceError::wrong_state(
                "the vmm process is shutting down",
            )));
        }
    }

    /// Sends a request and waits for the answer.
    pub fn call(&self, request: Request) -> Reply {
        let (sender, receiver) = mpsc::channel();
        self.submit(
            request,
            Box::new(move |reply| {
                // The caller may have gone; then nobody wants the answer.
                let _ = sender.send(reply);
            }),
        );
        receiver.recv().unwrap_or_else(|_| {
            Err(ServiceError::wrong_state(
                "the vmm process is shutting down",
            ))
        })
    }

    /// The jobs, which can be looked at without asking the machine's thread.
    pub fn jobs(&self) -> &crate::job::Jobs {
        &self.jobs
    }
}
