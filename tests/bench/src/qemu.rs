//! The peer: QEMU of Debian's package `qemu-system-x86`, driven over QMP.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use native::console::Console;
use native::process::Folder;
use serde_json::{Value, json};

/// The program.
const PROGRAM: &str = "qemu-system-x86_64";
const LIMIT: Duration = Duration::from_secs(120);

/// QEMU's version line, if it is installed; otherwise says how to get it.
pub(crate) fn version() -> Option<String> {
    let output = Command::new(PROGRAM).arg("--version").output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
            .lines()
            .next()
            .map(str::to_owned),
        _ => {
            eprintln!(
                "bench: the peer {PROGRAM} is not installed: `apt-get install --no-install-recommends qemu-system-x86`; \
                 its figures are left out"
            );
            None
        }
    }
}

/// A QEMU process, killed when dropped.
pub(crate) struct Qemu {
    child: Child,
}

impl Qemu {
    /// Starts a microvm of this size; `extra` is appended. Standard output is piped when `serial` is `stdio`.
    pub(crate) fn start(
        kernel: &Path,
        mib: u64,
        cmdline: &str,
        serial: &str,
        extra: &[&str],
    ) -> Result<Self> {
        let mut command = Command::new(PROGRAM);
        command
            .args([
                "-accel",
                "kvm",
                "-M",
                "microvm",
                "-nodefaults",
                "-display",
                "none",
                "-no-user-config",
            ])
            .args([
                "-m",
                &format!("{mib}M"),
                "-serial",
                serial,
                "-append",
                cmdline,
            ])
            .arg("-kernel")
            .arg(kernel)
            .args(extra)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .stdout(if serial == "stdio" {
                Stdio::piped()
            } else {
                Stdio::null()
            });
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {PROGRAM}"))?;
        Ok(Self { child })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the first byte of output.
    pub(crate) fn first_byte(&mut self) -> Result<()> {
        let stdout = self.child.stdout.as_mut().context("no output to read")?;
        stdout
            .read_exact(&mut [0])
            .context("QEMU ended without output")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Measures a disk of QEMU's: virtio-blk on PCI with a thread of its own (which polls for a while before it
/// sleeps, by default), io_uring, and the host's page cache.
pub(crate) fn reads(folder: &Folder, load: &crate::blk::Load<'_>) -> Result<Value> {
    let serial = folder.join("qemu.serial");
    let serial_arg = format!("unix:{},server=on,wait=off", serial.display());
    let image = load.image.display().to_string().replace(',', ",,");
    let drive = format!("if=none,id=disk,file={image},format=raw,aio=io_uring,cache.direct=off");
    let device = format!(
        "virtio-blk-pci,drive=disk,iothread=io,num-queues={},queue-size={},disable-legacy=on",
        load.case.queues,
        crate::blk::QUEUE_SIZE,
    );
    let extra = [
        "-M",
        "pcie=on",
        "-object",
        "iothread,id=io",
        "-drive",
        &drive,
        "-device",
        &device,
    ];
    let _qemu = Qemu::start(
        load.kernel,
        crate::blk::MEMORY_MIB,
        &load.cmdline(),
        &serial_arg,
        &extra,
    )?;
    load.measured(&mut Console::connect(&serial)?)
}

/// A connection to QEMU's monitor.
struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("QEMU's monitor does not answer");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
        };
        qmp.read()?; // greeting
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(
            self.reader.read_line(&mut line)? > 0,
            "QEMU closed its monitor"
        );
        Ok(serde_json::from_str(&line)?)
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.reader.get_mut(), "{request}")?;
        loop {
            let answer = self.read()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(result) = answer.get("return") {
                return Ok(result.clone());
            }
        }
    }
}

impl Qmp {
    /// Waits until a migration out has ended; returns what QEMU says of it.
    fn migrated(&mut self) -> Result<Value> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let info = self.call("query-migrate", json!({}))?;
            match info["status"].as_str() {
                Some("completed") => return Ok(info),
                Some("failed" | "cancelled") => bail!("QEMU's migration failed: {info}"),
                _ => ensure!(
                    Instant::now() < deadline,
                    "QEMU's migration does not end: {info}"
                ),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A guest of QEMU's.
pub(crate) struct Machine<'a> {
    pub(crate) folder: &'a Folder,
    pub(crate) kernel: &'a Path,
    pub(crate) mib: u64,
    pub(crate) cmdline: &'a str,
}

impl Machine<'_> {
    fn start(&self, extra: &[&str]) -> Result<(Qemu, Qmp)> {
        let (serial, monitor) = (self.serial(), self.folder.join("qemu.monitor"));
        for path in [&serial, &monitor] {
            // Of the process before.
            let _ = std::fs::remove_file(path);
        }
        let socket = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        let (serial, monitor_arg) = (socket(&serial), socket(&monitor));
        let extra = [&["-qmp", &monitor_arg], extra].concat();
        let qemu = Qemu::start(self.kernel, self.mib, self.cmdline, &serial, &extra)?;
        Ok((qemu, Qmp::connect(&monitor)?))
    }

    fn serial(&self) -> std::path::PathBuf {
        self.folder.join("qemu.serial")
    }
}

/// Fills a guest, stops it and writes it to a file.
pub(crate) fn saved(machine: &Machine<'_>, file: &Path) -> Result<()> {
    let (_qemu, mut qmp) = machine.start(&[])?;
    Console::connect(&machine.serial())?.line("memory: ready", LIMIT)?;
    qmp.call("stop", json!({}))?;
    qmp.call(
        "migrate-set-parameters",
        json!({"max-bandwidth": 1_000_000_000_000u64}),
    )?;
    let uri = format!("exec:cat >'{}'", file.display());
    qmp.call("migrate", json!({"uri": uri}))?;
    qmp.migrated().map(|_| ())
}

/// Milliseconds from asking a fresh process for the guest of such a file to the guest's first output.
pub(crate) fn restored(machine: &Machine<'_>, file: &Path) -> Result<f64> {
    let (_qemu, mut qmp) = machine.start(&["-incoming", "defer"])?;
    let mut serial = UnixStream::connect(machine.serial())?;
    serial.set_read_timeout(Some(LIMIT))?;
    let begin = Instant::now();
    let uri = format!("exec:cat '{}'", file.display());
    qmp.call("migrate-incoming", json!({"uri": uri}))?;
    // It was saved stopped, and is so when it has arrived.
    while qmp.call("query-status", json!({}))?["status"] != "paused" {
        ensure!(begin.elapsed() < LIMIT, "QEMU does not restore");
        std::thread::sleep(Duration::from_millis(1));
    }
    qmp.call("cont", json!({}))?;
    serial.read_exact(&mut [0])?;
    Ok(begin.elapsed().as_secs_f64() * 1000.0)
}

/// Moves a guest once with QEMU's default downtime limit and no bandwidth limit; figures as [`crate::ours::moved`].
pub(crate) fn moved(folder: &Folder, kernel: &Path, mib: u64, cmdline: &str) -> Result<Value> {
    let (serial, monitor) = (folder.join("qemu.serial"), folder.join("qemu.monitor"));
    let (monitor2, incoming) = (folder.join("qemu2.monitor"), "tcp:127.0.0.1:0");
    let monitor_arg = format!("unix:{},server=on,wait=off", monitor.display());
    let monitor2_arg = format!("unix:{},server=on,wait=off", monitor2.display());
    let serial_arg = format!("unix:{},server=on,wait=off", serial.display());
    let _source = Qemu::start(kernel, mib, cmdline, &serial_arg, &["-qmp", &monitor_arg])?;
    let mut console = Console::connect(&serial)?;
    let _destination = Qemu::start(
        kernel,
        mib,
        cmdline,
        "null",
        &["-qmp", &monitor2_arg, "-incoming", "defer"],
    )?;
    console.line("memory: ready", LIMIT)?;
    std::thread::sleep(Duration::from_millis(300));

    let mut destination = Qmp::connect(&monitor2)?;
    destination.call("migrate-incoming", json!({"uri": incoming}))?;
    let info = destination.call("query-migrate", json!({}))?;
    let port = info["socket-address"][0]["port"]
        .as_str()
        .with_context(|| format!("QEMU does not say where it listens: {info}"))?
        .to_owned();
    let mut source = Qmp::connect(&monitor)?;
    // Without this QEMU holds itself to 128 MiB/s.
    source.call(
        "migrate-set-parameters",
        json!({"max-bandwidth": 1_000_000_000_000u64}),
    )?;
    crate::limit::warm(mib)?;
    source.call("migrate", json!({"uri": format!("tcp:127.0.0.1:{port}")}))?;
    let info = source.migrated()?;
    let total_ms = info["total-time"]
        .as_f64()
        .context("QEMU reports no total time")?;
    Ok(json!({
        "total_ms": total_ms,
        "downtime_ms": info["downtime"],
        "bytes_per_s": info["ram"]["transferred"].as_f64().map(|bytes| bytes / total_ms * 1000.0),
        "bytes_sent": info["ram"]["transferred"],
        "rounds": info["ram"]["dirty-sync-count"],
    }))
}
