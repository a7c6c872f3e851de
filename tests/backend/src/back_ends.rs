//! The back ends, where each is found, and what each cannot do.

use std::path::{Path, PathBuf};

use hypervisor::HypervisorKind;

/// A back end as this suite finds it.
#[derive(Clone, Copy, Debug)]
pub struct BackEnd {
    /// What [`hypervisor::open`] is asked for.
    pub kind: HypervisorKind,
    /// The device node of the real one.
    pub device: &'static str,
    /// What stands in for it where there is no such node.
    pub double: Option<Double>,
}

/// A library that answers for a device node when it is preloaded.
#[derive(Clone, Copy, Debug)]
pub struct Double {
    /// Its file name.
    pub file: &'static str,
    /// The variable that says where else it lies.
    pub variable: &'static str,
    /// The command that builds it.
    pub build: &'static str,
}

/// Every back end. A new one is a row here, and nothing else.
pub const BACK_ENDS: &[BackEnd] = &[
    BackEnd {
        kind: HypervisorKind::Kvm,
        device: "/dev/kvm",
        double: None,
    },
    BackEnd {
        kind: HypervisorKind::Mshv,
        device: "/dev/mshv",
        double: Some(Double {
            file: "libmshv_double.so",
            variable: "MSHV_DOUBLE",
            build: "cargo build --release -p mshv-double",
        }),
    },
];

/// A program that a back end, whatever the host, cannot pass.
#[derive(Clone, Copy, Debug)]
pub struct Exception {
    /// The program's name.
    pub program: &'static str,
    /// The back end.
    pub kind: HypervisorKind,
    /// Why.
    pub reason: &'static str,
}

/// What is left out, each with its reason.
pub const EXCEPTIONS: &[Exception] = &[Exception {
    program: "debug::single_steps_over_writes",
    kind: HypervisorKind::Kvm,
    reason: "KVM raises no #DB behind a write that user space completes",
}];

/// Why this back end does not run this program, if it does not.
pub fn exception(program: &str, kind: HypervisorKind) -> Option<&'static str> {
    EXCEPTIONS
        .iter()
        .find(|known| known.program == program && known.kind == kind)
        .map(|known| known.reason)
}

impl Double {
    /// Where the library is: where the variable says, or among what this workspace has built.
    pub fn find(&self) -> Result<PathBuf, String> {
        let advice = format!(
            "build it with `{}`, or say where it is with {}",
            self.build, self.variable
        );
        if let Some(given) = std::env::var_os(self.variable) {
            let path = PathBuf::from(given);
            return if path.is_file() {
                Ok(path)
            } else {
                Err(format!("there is no file {}; {advice}", path.display()))
            };
        }
        // The program itself lies in target/release, a test in target/release/deps.
        let built = std::env::current_exe().ok().and_then(|exe| {
            exe.ancestors()
                .skip(1)
                .take(2)
                .map(|folder| folder.join(self.file))
                .find(|file| file.is_file())
        });
        built.ok_or_else(|| format!("there is no {} beside this program; {advice}", self.file))
    }
}

impl BackEnd {
    /// The back end of this kind.
    pub fn of(kind: HypervisorKind) -> Option<&'static Self> {
        BACK_ENDS.iter().find(|back_end| back_end.kind == kind)
    }

    /// Whether this host has the real one.
    pub fn is_here(&self) -> bool {
        Path::new(self.device).exists()
    }
}
