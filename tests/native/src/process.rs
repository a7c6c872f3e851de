//! Real `vmm` processes: started, watched, and gone at the end of the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::api::Api;
use crate::back_end::{BackEnd, Hosts};
use crate::console::Console;

/// The binary under test: `VMM_BIN`, or the one that cargo builds beside this test.
pub fn binary() -> Result<PathBuf> {
    let path = match std::env::var_os("VMM_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            // A test is in `target/release/deps`, the product and the benchmarks are in `target/release`.
            let own = std::env::current_exe()?;
            let folder = own.parent().context("this program is in no folder")?;
            match folder.ends_with("deps") {
                true => folder.with_file_name("vmm"),
                false => folder.join("vmm"),
            }
        }
    };
    ensure!(
        path.is_file(),
        "{} does not exist: run `cargo build --release -p vmm`, or set VMM_BIN",
        path.display()
    );
    Ok(path)
}

/// A folder of one test, removed at its end, and the back ends of the processes that it starts.
pub struct Folder {
    path: PathBuf,
    hosts: Hosts,
    started: AtomicUsize,
}

impl Folder {
    /// A new folder, whose processes use KVM.
    pub fn new() -> Result<Self> {
        Self::on(Hosts::ALIKE[0])
    }

    /// A new folder, whose processes use these back ends.
    pub fn on(hosts: Hosts) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!(
            "vmm-native-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        std::fs::create_dir_all(&path)?;
        Ok(Self {
            path,
            hosts,
            started: AtomicUsize::new(0),
        })
    }

    /// The back end of the process that is started next.
    fn next_back_end(&self) -> BackEnd {
        let started = self.started.fetch_add(1, Ordering::Relaxed);
        if started.is_multiple_of(2) {
            self.hosts.0
        } else {
            self.hosts.1
        }
    }

    /// A path in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a file into it.
    pub fn write(&self, name: &str, contents: &[u8]) -> Result<PathBuf> {
        let path = self.join(name);
        std::fs::write(&path, contents)?;
        Ok(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// A `vmm serve` process.
pub struct Vmm {
    child: Child,
    api: Api,
    name: String,
    socket: PathBuf,
    stderr: PathBuf,
    serial: PathBuf,
    /// Its guests do without what only one back end has.
    bare: bool,
}

impl Vmm {
    /// Starts `vmm serve` with sockets named `name` in the folder, and waits until its API answers.
    pub fn serve(folder: &Folder, name: &str) -> Result<Self> {
        let socket = folder.join(format!("{name}.api"));
        let stderr = folder.join(format!("{name}.log"));
        let mut command = Command::new(binary()?);
        command
            .arg("serve")
            .arg("--api-socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&stderr)?);
        folder.next_back_end().prepare(&mut command)?;
        let mut vmm = Self {
            child: command.spawn()?,
            api: Api::at(&socket),
            name: name.to_owned(),
            socket,
            stderr,
            serial: folder.join(format!("{name}.serial")),
            bare: folder.hosts.unlike(),
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while vmm.api.get("vmm.ping").is_err() {
            if let Some(status) = vmm.child.try_wait()? {
                bail!("vmm {name} ended with {status}: {}", vmm.log());
            }
            ensure!(
                Instant::now() < deadline,
                "vmm {name} does not answer: {}",
                vmm.log()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(vmm)
    }

    /// Its API.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// What it has written to standard error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Where its guest's serial port is, or will be.
    pub fn serial(&self) -> &Path {
        &self.serial
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it as a host failure would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "vmm {} still runs: {}",
                self.name,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Creates a guest from a config whose serial port leads to [`Vmm::serial`], and boots it.
    pub fn boot(&self, mut config: Value) -> Result<()> {
        config["serial"] = json!({"mode": "Socket", "socket": self.serial});
        if self.bare && config["cpus"]["model"].is_null() {
            config["cpus"]["model"] = json!("bare");
        }
        self.api.put("vm.create", &config)?;
        self.api.put("vm.boot", &Value::Null)?;
        Ok(())
    }

    /// Connects to the guest's serial port.
    pub fn console(&self) -> Result<Console> {
        Console::connect(&self.serial)
    }

    /// Starts to receive on `url`; returns the job and the URL with its port resolved.
    pub fn receive(&self, url: &str) -> Result<(u64, String)> {
        self.receive_with(url, json!({}))
    }

    /// The same with further fields in the request.
    pub fn receive_with(&self, url: &str, mut request: Value) -> Result<(u64, String)> {
        request["receiver_url"] = json!(url);
        request["serial"] = json!({"mode": "Socket", "socket": self.serial});
        let job = self.api.start("vm.receive-migration", &request)?;
        let url = self.api.job(job)?["url"]
            .as_str()
            .context("the job has no url")?
            .to_owned();
        Ok((job, url))
    }

    /// Resident memory of the process in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let kib: u64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.split_whitespace().next())
            .context("no VmRSS")?
            .parse()?;
        Ok(kib * 1024)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
        // What a killed process leaves behind, so that the name can be used again.
        for socket in [&self.socket, &self.serial] {
            let _ = std::fs::remove_file(socket);
        }
        if std::thread::panicking() || std::env::var_os("NATIVE_LOGS").is_some() {
            eprintln!("--- vmm {}:\n{}", self.name, self.log());
        }
    }
}
