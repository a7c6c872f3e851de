//! Lab hosts as tests use them: describe one or two, run a script on each, get its status and log.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::machine::{End, Machine};
use crate::workdir::Workdir;
use crate::{Entry, Image, Kernel};

/// Boots after a first one that gave no result.
const RETRIES: u32 = 2;

/// How long a host goes on after the other one of its pair failed.
const GRACE: Duration = Duration::from_secs(3);

/// The retries of this process, each with its reason.
static RETRIED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Every retry so far, as `NAME: why`.
pub fn retries() -> Vec<String> {
    RETRIED.lock().map_or_else(
        |poisoned| poisoned.into_inner().clone(),
        |list| list.clone(),
    )
}

/// The CPU of a lab host, QEMU's `-cpu`. It always offers nested SVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// Everything the emulator has.
    Max,
    /// AMD Zen 1, as far as the emulator has it.
    Epyc,
    /// AMD Zen 2, as far as the emulator has it.
    EpycRome,
    /// Any other `-cpu` argument, which must offer `svm` and `npt`.
    Custom(String),
}

impl Cpu {
    fn arg(&self) -> &str {
        match self {
            Cpu::Max => "max",
            Cpu::Epyc => "EPYC,+svm,+npt",
            Cpu::EpycRome => "EPYC-Rome,+svm,+npt",
            Cpu::Custom(arg) => arg,
        }
    }
}

/// The entrance: [`Lab::host`] for one host, [`Lab::pair`] for two.
#[derive(Debug)]
pub struct Lab;

impl Lab {
    /// A lab host with this CPU: 2 GiB, kernel 6.1, no link.
    pub fn host(cpu: Cpu) -> Host {
        Host {
            name: "host".to_owned(),
            cpu,
            memory_mib: 2048,
            kernel: Kernel::Debian61,
            additions: Vec::new(),
            qemu_args: Vec::new(),
            kernel_args: String::new(),
            limit: Duration::from_secs(240),
        }
    }

    /// Two lab hosts joined back to back: the first is 10.0.0.1, the second 10.0.0.2.
    pub fn pair(first: Host, second: Host) -> Pair {
        Pair { first, second }
    }
}

/// A file to put into a lab host.
#[derive(Clone, Debug)]
enum Addition {
    File {
        host: std::path::PathBuf,
        inside: String,
    },
    Program {
        host: std::path::PathBuf,
        inside: String,
    },
    Data {
        inside: String,
        data: Vec<u8>,
    },
    Guest {
        kernel: Kernel,
        entry: Entry,
    },
    GuestData {
        inside: String,
        data: Vec<u8>,
    },
    GuestModules(Vec<String>),
    GuestProgram {
        host: std::path::PathBuf,
        inside: String,
    },
}

/// A lab host that can be booted, any number of times.
#[derive(Clone, Debug)]
pub struct Host {
    name: String,
    cpu: Cpu,
    memory_mib: u32,
    kernel: Kernel,
    additions: Vec<Addition>,
    qemu_args: Vec<String>,
    kernel_args: String,
    limit: Duration,
}

/// What a script left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The script's exit status; `None` for the host of a pair that was stopped because the other one failed.
    pub exit: Option<i32>,
    /// The host's console, without carriage returns.
    pub log: String,
    /// Boots that gave no result before this one.
    pub retries: u32,
}

impl Outcome {
    /// Nothing if the script succeeded, or else an error that ends with the log.
    pub fn success(&self) -> Result<()> {
        match self.exit {
            Some(0) => Ok(()),
            Some(status) => bail!("the script ended with {status}:\n{}", tail(&self.log)),
            None => bail!(
                "the host was stopped, as the other one failed:\n{}",
                tail(&self.log)
            ),
        }
    }
}

impl Host {
    /// A name for messages.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The host's memory.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// The host's own kernel.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// Puts a file of this machine into the host.
    #[must_use]
    pub fn file(mut self, host: &Path, inside: &str) -> Self {
        self.additions.push(Addition::File {
            host: host.to_owned(),
            inside: inside.to_owned(),
        });
        self
    }

    /// Puts a program of this machine, and the shared libraries it needs, into the host.
    #[must_use]
    pub fn program(mut self, host: &Path, inside: &str) -> Self {
        self.additions.push(Addition::Program {
            host: host.to_owned(),
            inside: inside.to_owned(),
        });
        self
    }

    /// Puts a file with this content into the host.
    #[must_use]
    pub fn data(mut self, inside: &str, data: impl Into<Vec<u8>>) -> Self {
        self.additions.push(Addition::Data {
            inside: inside.to_owned(),
            data: data.into(),
        });
        self
    }

    /// Puts a stock guest into the host: `/guest/kernel` and `/guest/initramfs`.
    #[must_use]
    pub fn guest(mut self, kernel: Kernel, entry: Entry) -> Self {
        self.additions.push(Addition::Guest { kernel, entry });
        self
    }

    /// Puts a program of this machine, and the shared libraries it needs, into the guest.
    #[must_use]
    pub fn guest_program(mut self, host: &Path, inside: &str) -> Self {
        self.additions.push(Addition::GuestProgram {
            host: host.to_owned(),
            inside: inside.to_owned(),
        });
        self
    }

    /// Puts a file with this content into the guest.
    #[must_use]
    pub fn guest_data(mut self, inside: &str, data: impl Into<Vec<u8>>) -> Self {
        self.additions.push(Addition::GuestData {
            inside: inside.to_owned(),
            data: data.into(),
        });
        self
    }

    /// Lets the guest load these modules besides its own, in this order. What its kernel has built in is passed over.
    #[must_use]
    pub fn guest_modules(mut self, names: &[&str]) -> Self {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        self.additions.push(Addition::GuestModules(names));
        self
    }

    /// Adds arguments for QEMU.
    #[must_use]
    pub fn qemu_args(mut self, args: &[&str]) -> Self {
        self.qemu_args
            .extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// Adds parameters for the host's kernel; of two that say the same, the last counts.
    #[must_use]
    pub fn kernel_args(mut self, args: &str) -> Self {
        args.clone_into(&mut self.kernel_args);
        self
    }

    /// The limit for one boot with its script, 240 s unless told; `LAB_PATIENCE` (a whole factor) stretches it.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Boots the host and runs a shell script on it, with the functions of `inside/lib.sh` at hand.
    ///
    /// # Errors
    /// When the host cannot be built or started, or gives no result in any of three boots.
    pub fn run(&self, script: &str) -> Result<Outcome> {
        let base = self.image()?;
        for attempt in 0.. {
            let workdir = Workdir::new()?;
            let mut machine = self.boot(&base, &workdir, script, attempt, None)?;
            let end = loop {
                if let Some(end) = machine.listen(Duration::from_millis(500)) {
                    break end.clone();
                }
            };
            let log = machine.into_log();
            match end {
                End::Exit(status) => {
                    return Ok(Outcome {
                        exit: Some(status),
                        log,
                        retries: attempt,
                    });
                }
                End::Refused => bail!("{}: the emulator did not start:\n{}", self.name, tail(&log)),
                End::NoResult(why) => note_retry(&self.name, &why, attempt, &log)?,
            }
        }
        unreachable!("the last retry ends in an error")
    }

    /// Everything that is the same in every boot.
    fn image(&self) -> Result<Vec<u8>> {
        let mut image = Image::host(self.kernel)?;
        for addition in &self.additions {
            match addition {
                Addition::File { host, inside } => image.file(host, inside)?,
                Addition::Program { host, inside } => image.program(host, inside)?,
                Addition::Data { inside, data } => image.data(inside, data),
                // Goes with the guest.
                Addition::GuestProgram { .. }
                | Addition::GuestData { .. }
                | Addition::GuestModules(_) => {}
                Addition::Guest { kernel, entry } => {
                    image.file(&kernel.file(*entry)?, "guest/kernel")?;
                    let modules = self.additions.iter().filter_map(|addition| match addition {
                        Addition::GuestModules(names) => Some(names.iter().map(String::as_str)),
                        _ => None,
                    });
                    let modules: Vec<&str> = modules.flatten().collect();
                    let mut guest = Image::guest(*kernel, &modules)?;
                    for addition in &self.additions {
                        match addition {
                            Addition::GuestProgram { host, inside } => {
                                guest.program(host, inside)?;
                            }
                            Addition::GuestData { inside, data } => guest.data(inside, data),
                            _ => {}
                        }
                    }
                    image.data("guest/initramfs", &guest.finish());
                }
            }
        }
        Ok(image.finish())
    }

    fn boot(
        &self,
        base: &[u8],
        workdir: &Workdir,
        script: &str,
        attempt: u32,
        link: Option<&Link>,
    ) -> Result<Machine> {
        let patience = patience();
        let nonce = nonce();
        let (address, peer) = link.map_or(("", ""), |link| (link.address, link.peer));
        let env = format!(
            "NONCE={nonce}\nADDRESS={address}\nPEER={peer}\nPATIENCE={patience}\nATTEMPT={attempt}\n"
        );
        // An initramfs may be several archives in a row: what changes from boot to boot comes second.
        let mut extra = crate::cpio::Archive::new();
        extra.file("lab/env", 0o644, env.as_bytes());
        extra.file("lab/script.sh", 0o644, script.as_bytes());
        let initramfs = workdir.join(&format!("{}.cpio", address.replace('.', "-")));
        std::fs::write(&initramfs, [base, &extra.finish()].concat())
            .with_context(|| format!("cannot write {}", initramfs.display()))?;

        let mut args: Vec<String> = [
            "-accel",
            "tcg,thread=multi",
            "-smp",
            "1",
            "-nodefaults",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
        ]
        .map(str::to_owned)
        .to_vec();
        args.extend([
            "-append".to_owned(),
            format!(
                "console=ttyS0 quiet nokaslr mitigations=off cryptomgr.notests panic=-1 tsc=reliable {} {}",
                known_tsc(),
                self.kernel_args
            ),
        ]);
        args.extend(["-cpu".to_owned(), self.cpu.arg().to_owned()]);
        args.extend(["-m".to_owned(), format!("{}M", self.memory_mib)]);
        args.extend([
            "-kernel".to_owned(),
            self.kernel.bz_image()?.display().to_string(),
        ]);
        args.extend(["-initrd".to_owned(), initramfs.display().to_string()]);
        if let Some(link) = link {
            args.extend(link.qemu_args(workdir));
        }
        args.extend(self.qemu_args.iter().cloned());
        Machine::start(&args, &nonce, self.limit, patience)
    }
}

/// Kernel parameters that tell every host of a run the same TSC frequency, and leave it nothing to measure it with.
///
/// The emulator hands this machine's TSC through. A host that measures it while others keep the processors busy can be wrong by more than a
/// guest is allowed to move with.
fn known_tsc() -> &'static str {
    static PARAMETERS: OnceLock<String> = OnceLock::new();
    PARAMETERS.get_or_init(|| format!("tsc_early_khz={} hpet=disable pmtmr=0", tsc_khz()))
}

/// Frequency of this machine's TSC.
fn tsc_khz() -> u64 {
    // SAFETY: every x86_64 processor has the instruction, and Linux lets user space use it.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let (since, first) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(100));
    let (microseconds, last) = (since.elapsed().as_micros(), ticks());
    let per_millisecond = u128::from(last - first) * 1000 / microseconds.max(1);
    u64::try_from(per_millisecond).unwrap_or(u64::MAX)
}

/// One end of the cable between two hosts.
struct Link {
    address: &'static str,
    peer: &'static str,
    mac: &'static str,
    server: bool,
}

const LINKS: [Link; 2] = [
    Link {
        address: "10.0.0.1",
        peer: "10.0.0.2",
        mac: "52:54:00:00:00:01",
        server: true,
    },
    Link {
        address: "10.0.0.2",
        peer: "10.0.0.1",
        mac: "52:54:00:00:00:02",
        server: false,
    },
];

/// The name of the cable's socket in the working folder.
const CABLE: &str = "cable.sock";

impl Link {
    fn qemu_args(&self, workdir: &Workdir) -> [String; 4] {
        let server = if self.server { "on" } else { "off" };
        let path = workdir.join(CABLE);
        [
            "-device".to_owned(),
            format!("virtio-net-pci,netdev=cable,mac={}", self.mac),
            "-netdev".to_owned(),
            format!(
                "stream,id=cable,server={server},addr.type=unix,addr.path={}",
                path.display()
            ),
        ]
    }
}

/// Two lab hosts that are booted together.
#[derive(Clone, Debug)]
pub struct Pair {
    first: Host,
    second: Host,
}

impl Pair {
    /// Boots both hosts and runs a script on each. Both boot again when either gives no result.
    ///
    /// # Errors
    /// As [`Host::run`].
    pub fn run(&self, first: &str, second: &str) -> Result<[Outcome; 2]> {
        let hosts = [(&self.first, first), (&self.second, second)];
        let bases = [self.first.image()?, self.second.image()?];
        for attempt in 0.. {
            let workdir = Workdir::new()?;
            let mut machines = Vec::new();
            for ((host, script), (base, link)) in hosts.iter().zip(bases.iter().zip(&LINKS)) {
                if !link.server {
                    wait_for(&workdir.join(CABLE))?;
                }
                machines.push(host.boot(base, &workdir, script, attempt, Some(link))?);
            }
            let ends = listen_to_both(&mut machines);
            let mut outcomes = Vec::new();
            let mut retry = None;
            for ((host, _), (machine, end)) in hosts.iter().zip(machines.into_iter().zip(ends)) {
                let log = machine.into_log();
                match end {
                    Some(End::Refused) => {
                        bail!("{}: the emulator did not start:\n{}", host.name, tail(&log))
                    }
                    Some(End::NoResult(why)) => retry = Some((host, why, log)),
                    Some(End::Exit(status)) => outcomes.push(Outcome {
                        exit: Some(status),
                        log,
                        retries: attempt,
                    }),
                    None => outcomes.push(Outcome {
                        exit: None,
                        log,
                        retries: attempt,
                    }),
                }
            }
            // An explicit failure on either side stands; only without one is a missing result worth another try.
            let failed = outcomes
                .iter()
                .find(|outcome| outcome.exit.is_some_and(|status| status != 0));
            match (retry, failed) {
                (None, _) => {
                    return outcomes
                        .try_into()
                        .map_err(|_| anyhow::anyhow!("a host of the pair has no outcome"));
                }
                (Some((host, why, log)), Some(failed)) => bail!(
                    "the script ended with {:?}:\n{}\nand {} gave no result ({why}):\n{}",
                    failed.exit,
                    tail(&failed.log),
                    host.name,
                    tail(&log)
                ),
                (Some((host, why, log)), None) => note_retry(&host.name, &why, attempt, &log)?,
            }
        }
        unreachable!("the last retry ends in an error")
    }
}

/// Listens until both have ended, or until the grace of the one whose peer did not succeed is over.
fn listen_to_both(machines: &mut [Machine]) -> Vec<Option<End>> {
    let mut alone_since = None;
    loop {
        let ends: Vec<Option<End>> = machines
            .iter_mut()
            .map(|machine| machine.listen(Duration::from_millis(100)).cloned())
            .collect();
        if ends.iter().all(Option::is_some) {
            return ends;
        }
        if ends.iter().flatten().any(|end| *end != End::Exit(0)) {
            let since = *alone_since.get_or_insert_with(Instant::now);
            if since.elapsed() > GRACE {
                return ends;
            }
        }
    }
}

/// Waits until the first host's emulator has created the cable's socket.
fn wait_for(socket: &Path) -> Result<()> {
    for _ in 0..1000 * patience() {
        if socket.exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!(
        "the first host's emulator did not create {}",
        socket.display()
    )
}

/// Counts a boot without result, or gives up with its log after the last one.
fn note_retry(name: &str, why: &str, attempt: u32, log: &str) -> Result<()> {
    if attempt >= RETRIES {
        bail!(
            "{name}: no result in {} boots; at last {why}:\n{}",
            attempt + 1,
            tail(log)
        );
    }
    eprintln!("lab: {name}: {why}; booting again\n{}", tail(log));
    let note = format!("{name}: {why}");
    match RETRIED.lock() {
        Ok(mut list) => list.push(note),
        Err(poisoned) => poisoned.into_inner().push(note),
    }
    Ok(())
}

/// A word that no script prints by chance.
fn nonce() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let time = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |time| time.subsec_nanos());
    format!(
        "{:x}-{time:x}-{:x}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// How much longer than usual everything may take: `LAB_PATIENCE`, a whole number from 1 to 100.
fn patience() -> u32 {
    std::env::var("LAB_PATIENCE")
        .ok()
        .and_then(|factor| factor.parse().ok())
        .map_or(1, |factor: u32| factor.clamp(1, 100))
}

/// The end of a log, for a message.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(120)..]
        .iter()
        .fold(String::new(), |text, line| text + "  | " + line + "\n")
}
