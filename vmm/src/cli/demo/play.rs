//! The demo's story, from the boot to the verdict.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hypervisor::HypervisorKind;
use serde_json::json;

use super::child::Vmm;
use super::guest::{Said, Serial, Verdict};
use super::report::Report;
use crate::cli::{HypervisorName, progress};
use crate::client::{Client, ClientError, Job, Status};
use crate::service::SendMigration;

/// How often a wait looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(10);

/// How long a child may take to answer.
const ANSWER: Duration = Duration::from_secs(20);

/// How long the guest may take to fill or check its memory.
const GUEST: Duration = Duration::from_secs(120);

/// Page writes after the fill before the move starts.
const WARM_UP_WRITES: u64 = 4096;

/// What all scenes need.
pub(super) struct Stage<'a> {
    directory: &'a Path,
    interrupted: &'a AtomicBool,
    hypervisor: Option<HypervisorName>,
}

impl<'a> Stage<'a> {
    /// A stage whose files are in `directory` and that is left when `interrupted` is set.
    pub(super) fn new(
        directory: &'a Path,
        interrupted: &'a AtomicBool,
        hypervisor: Option<HypervisorName>,
    ) -> Self {
        Self {
            directory,
            interrupted,
            hypervisor,
        }
    }

    /// Boots the guest with this much RAM, moves it, and asks it for its verdict.
    pub(super) fn play(&self, memory_mib: u64) -> anyhow::Result<Report> {
        let (mut source, api) = self.start_source()?;
        self.boot(&api, memory_mib)?;
        self.let_it_dirty_memory(&mut source)?;
        let (mut destination, url) = self.start_destination()?;
        eprintln!("moving the guest to process {} at {url}", destination.pid());
        let job = self.send(&api, url)?;
        let verdict = self.ask_for_verdict(&mut destination)?;
        Ok(Report::moved(&job, memory_mib << 20, verdict))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A path that the command line of a child can take.
    fn argument(&self, name: &str) -> anyhow::Result<String> {
        let path = self.path(name).into_os_string().into_string();
        path.map_err(|path| {
            anyhow::anyhow!(
                "the temporary directory {} is not UTF-8; set TMPDIR",
                path.display()
            )
        })
    }

    /// The arguments of a child that runs the guest.
    fn with_hypervisor<'b>(&self, mut arguments: Vec<&'b str>) -> Vec<&'b str> {
        if let Some(name) = self.hypervisor {
            arguments.extend(["--hypervisor", HypervisorKind::from(name).name()]);
        }
        arguments
    }

    fn start_source(&self) -> anyhow::Result<(Vmm, Client)> {
        let socket = self.argument("source.sock")?;
        let mut source = Vmm::start(
            "source",
            self.with_hypervisor(vec!["serve", "--api-socket", &socket]),
        )?;
        let api = Client::new(socket)
            .context("cannot start a client")?
            .with_limit(ANSWER);
        self.until("the source process to answer", ANSWER, || {
            source.check()?;
            match api.get("vmm.ping") {
                Ok(_) => Ok(Some(())),
                Err(ClientError::Missing(_) | ClientError::Refused(_)) => {
                    std::thread::sleep(TICK);
                    Ok(None)
                }
                Err(e) => Err(e.into()),
            }
        })?;
        Ok((source, api))
    }

    fn boot(&self, api: &Client, memory_mib: u64) -> anyhow::Result<()> {
        let kernel = self.path("guest.elf");
        std::fs::write(&kernel, guests::MEMORY).context("cannot write the guest program")?;
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get().min(2));
        let working_set = memory_mib * 3 / 4;
        let hot = (working_set / 8).min(64);
        let config = json!({
            "cpus": { "boot_vcpus": cpus },
            "memory": { "size": memory_mib << 20 },
            "payload": {
                "kernel": kernel,
                "cmdline": format!(
                    "working_set_mib={working_set} hot_mib={hot} rate=10000 pattern=random report_ms=100"
                ),
            },
            "serial": { "mode": "Socket", "socket": self.path("source-serial.sock") },
        });
        eprintln!("booting a guest with {memory_mib} MiB and {cpus} vCPUs");
        let config = serde_json::to_vec(&config).context("cannot write the config")?;
        api.put_json("vm.create", config)
            .context("the config was refused")?;
        api.put("vm.boot").context("the guest does not boot")?;
        Ok(())
    }

    fn let_it_dirty_memory(&self, source: &mut Vmm) -> anyhow::Result<()> {
        let mut serial = self.serial(source, "source-serial.sock")?;
        let mut filled = None;
        self.until("the guest to fill its memory", GUEST, || {
            match self.hear(source, &mut serial)? {
                Some(Said::Ready { pages }) => {
                    eprintln!(
                        "the guest has filled {} and goes on writing",
                        progress::bytes((pages * 4096) as f64)
                    );
                    Ok(None)
                }
                Some(Said::Report { writes }) => {
                    let since = writes - *filled.get_or_insert(writes);
                    Ok((since >= WARM_UP_WRITES).then_some(()))
                }
                _ => Ok(None),
            }
        })
    }

    fn start_destination(&self) -> anyhow::Result<(Vmm, String)> {
        let serial = format!("socket={}", self.argument("destination-serial.sock")?);
        let arguments =
            self.with_hypervisor(vec!["receive", "tcp:127.0.0.1:0", "--serial", &serial]);
        let mut destination = Vmm::start("destination", arguments)?;
        let url = self.until("the destination process to listen", ANSWER, || {
            destination.check()?;
            let line = destination.line(TICK);
            Ok(line.and_then(|line| Some(line.strip_prefix("listening on ")?.to_owned())))
        })?;
        Ok((destination, url))
    }

    fn send(&self, api: &Client, url: String) -> anyhow::Result<Job> {
        let request =
            serde_json::to_vec(&SendMigration::to(url)).context("cannot write the request")?;
        let id = api.start_job("vm.send-migration", request)?;
        let job = progress::follow(api, id, self.interrupted)??;
        match (job.status, &job.error) {
            (Status::Succeeded, _) => Ok(job),
            _ if self.is_interrupted() => bail!("interrupted"),
            (_, Some(error)) => bail!("the move did not succeed: {error}"),
            (status, None) => bail!("the move did not succeed: {status:?}"),
        }
    }

    fn ask_for_verdict(&self, destination: &mut Vmm) -> anyhow::Result<Verdict> {
        let mut serial = self.serial(destination, "destination-serial.sock")?;
        serial.send(b'v').context("cannot ask the guest")?;
        self.until("the guest to check its memory", GUEST, || {
            Ok(match self.hear(destination, &mut serial)? {
                Some(Said::Verdict(verdict)) => Some(verdict),
                _ => None,
            })
        })
    }

    fn serial(&self, vmm: &mut Vmm, name: &str) -> anyhow::Result<Serial> {
        let path = self.path(name);
        self.until("the guest's serial port", ANSWER, || {
            vmm.check()?;
            match Serial::connect(&path, TICK) {
                Ok(serial) => Ok(Some(serial)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    std::thread::sleep(TICK);
                    Ok(None)
                }
                Err(e) => Err(e).context("cannot connect to the guest's serial port"),
            }
        })
    }

    /// The guest's next line that matters. Damage that it reports is shown at once; the verdict counts it.
    fn hear(&self, vmm: &mut Vmm, serial: &mut Serial) -> anyhow::Result<Option<Said>> {
        let line = match serial.line() {
            Ok(line) => line,
            Err(e) => {
                vmm.check()?;
                return Err(e).context("cannot hear the guest");
            }
        };
        let said = line.as_deref().and_then(Said::parse);
        if let Some(Said::Trouble(line)) = &said {
            eprintln!("{line}");
        }
        Ok(said)
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Repeats `attempt`, which itself takes about a tick, until it has a result.
    fn until<T>(
        &self,
        what: &str,
        limit: Duration,
        mut attempt: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let end = Instant::now() + limit;
        loop {
            if self.is_interrupted() {
                bail!("interrupted");
            }
            if let Some(result) = attempt()? {
                return Ok(result);
            }
            if Instant::now() > end {
                bail!("waited {} s in vain for {what}", limit.as_secs());
            }
        }
    }
}
