//! The hypervisors that guests run on here.
//!
//! ```text
//!   kvm    /dev/kvm
//!   mshv   /dev/mshv where it exists; elsewhere the double of it, a library preloaded into `vmm`, over /dev/kvm
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A back end of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackEnd {
    /// KVM.
    Kvm,
    /// The Microsoft hypervisor, or its double.
    Mshv,
}

impl BackEnd {
    /// Its name, as `vmm --hypervisor` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Mshv => "mshv",
        }
    }

    /// The device that it needs here.
    fn device(self) -> &'static str {
        match self {
            Self::Mshv if Path::new("/dev/mshv").exists() => "/dev/mshv",
            _ => "/dev/kvm",
        }
    }

    /// Why no guest can run on it here, if so.
    pub fn missing(self) -> Option<String> {
        let device = self.device();
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(device)
            .err()
            .map(|error| format!("{device}: {error}"))
    }

    /// Makes a `vmm` process use it.
    pub(crate) fn prepare(self, command: &mut Command) -> Result<()> {
        command.args(["--hypervisor", self.name()]);
        if self == Self::Mshv && self.device() != "/dev/mshv" {
            command.env("LD_PRELOAD", double()?);
        }
        Ok(())
    }
}

/// The double: `MSHV_DOUBLE`, or the one that cargo builds beside this test.
pub fn double() -> Result<PathBuf> {
    let path = match std::env::var_os("MSHV_DOUBLE") {
        Some(path) => PathBuf::from(path),
        None => {
            let own = std::env::current_exe()?;
            let folder = own.parent().context("this program is in no folder")?;
            match folder.ends_with("deps") {
                true => folder.with_file_name("libmshv_double.so"),
                false => folder.join("libmshv_double.so"),
            }
        }
    };
    ensure!(
        path.is_file(),
        "{} does not exist: run `cargo build --release -p mshv-double`, or set MSHV_DOUBLE",
        path.display()
    );
    Ok(path)
}

/// The back ends of the processes of one test, in the order in which they are started: the first, the second, the
/// first again …
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hosts(pub BackEnd, pub BackEnd);

impl Hosts {
    /// All processes alike, once for each back end.
    pub const ALIKE: [Self; 2] = [
        Self(BackEnd::Kvm, BackEnd::Kvm),
        Self(BackEnd::Mshv, BackEnd::Mshv),
    ];
    /// From one back end to the other, both ways.
    pub const UNLIKE: [Self; 2] = [
        Self(BackEnd::Kvm, BackEnd::Mshv),
        Self(BackEnd::Mshv, BackEnd::Kvm),
    ];
    /// All four.
    pub const ALL: [Self; 4] = [
        Self::ALIKE[0],
        Self::ALIKE[1],
        Self::UNLIKE[0],
        Self::UNLIKE[1],
    ];

    /// Whether guests must do without what only one of the two has.
    pub fn unlike(self) -> bool {
        self.0 != self.1
    }

    /// For the name of a test.
    pub fn name(self) -> String {
        if self.unlike() {
            format!("{}_to_{}", self.0.name(), self.1.name())
        } else {
            self.0.name().to_owned()
        }
    }

    /// Why no guest can run on them here, if so.
    pub fn missing(self) -> Option<String> {
        self.0.missing().or_else(|| self.1.missing())
    }
}
