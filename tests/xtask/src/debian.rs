//! What the lab and the fuzz targets need from Debian: programs installed by `apt-get`, kernels unpacked into a cache.
//!
//! Nothing is installed that is already there, and everything that is done is said first. A kernel is
//! never installed: its package is downloaded and unpacked into `LAB_CACHE/6.1` or `LAB_CACHE/6.12`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::run;

/// A program the lab starts, the package it is in, and what it is for.
const PROGRAMS: [(&str, &str, &str); 7] = [
    (
        "qemu-system-x86_64",
        "qemu-system-x86",
        "the emulator that lab hosts run in",
    ),
    (
        "qemu-storage-daemon",
        "qemu-system-common",
        "vhost-user back ends of disks; virtiofsd is in the same package",
    ),
    (
        "busybox",
        "busybox-static",
        "the user space of lab hosts and guests",
    ),
    ("lz4", "lz4", "unpacks the 6.1 kernel for its PVH entry"),
    ("zstd", "zstd", "unpacks the 6.12 kernel for its PVH entry"),
    ("xz", "xz-utils", "unpacks kernel modules"),
    ("mke2fs", "e2fsprogs", "makes the guests' file systems"),
];

/// A kernel series, and the package whose dependency is its newest cloud kernel.
const KERNELS: [(&str, &str); 2] = [
    ("6.1", "linux-image-cloud-amd64"),
    ("6.12", "linux-image-6.12-cloud-amd64"),
];

/// The folder of unpacked kernels: `LAB_CACHE`, or `target/lab-cache` in the repository.
pub(crate) fn cache() -> PathBuf {
    let root = run::root();
    match std::env::var_os("LAB_CACHE") {
        Some(path) => root.join(path),
        None => root.join("target/lab-cache"),
    }
}

/// Installs and downloads whatever is missing. What cannot be had is said; the tests that need it then skip.
pub(crate) fn prepare_lab() {
    let programs: Vec<_> = PROGRAMS
        .iter()
        .filter(|(program, package, _)| !is_there(program, package))
        .collect();
    let kernels: Vec<_> = KERNELS
        .iter()
        .filter(|(series, _)| !cache().join(series).join("boot").is_dir())
        .collect();
    if programs.is_empty() && kernels.is_empty() {
        return;
    }
    for (_, package, why) in &programs {
        println!("the lab needs {package}: {why}");
    }
    for (series, package) in &kernels {
        println!(
            "the lab needs a {series} kernel: {package} will be unpacked into {}",
            cache().display()
        );
    }
    if run::find("apt-get").is_none() {
        println!("this system has no apt-get; install the above by hand");
        return;
    }
    update();
    if !programs.is_empty() {
        let packages: Vec<&str> = programs.iter().map(|(_, package, _)| *package).collect();
        install(&packages);
    }
    for (series, package) in kernels {
        if let Err(error) = unpack_kernel(series, package) {
            println!("no {series} kernel for the lab: {error:#}");
        }
    }
}

/// Installs the compiler of libFuzzer, if it is missing.
pub(crate) fn prepare_fuzz() {
    if run::find("c++").is_none() {
        println!("the fuzz targets need g++: libFuzzer is in C++");
        if run::find("apt-get").is_some() {
            install(&["g++"]);
        }
    }
}

/// Installs what native tests start besides our own programs, if it is missing. Tests that need it skip without it.
pub(crate) fn prepare_native() {
    const NEEDED: &str = "qemu-storage-daemon";
    for (program, package, why) in PROGRAMS {
        if program == NEEDED && !is_there(program, package) {
            println!("native tests need {package}: {why}");
            update();
            install(&[package]);
        }
    }
}

/// Brings the package lists up to date, if that is ours to do.
fn update() {
    if is_root() {
        let status = run::shown(run::command("apt-get", &["update", "-q"]), "apt-get update");
        if !status.is_ok_and(|status| status.success()) {
            println!("apt-get update failed; going on with the package lists that are there");
        }
    }
}

fn install(packages: &[&str]) {
    let what = format!(
        "apt-get install --no-install-recommends {}",
        packages.join(" ")
    );
    if !is_root() {
        println!("not root, so not installing; run as root: {what}");
        return;
    }
    let mut args = vec!["install", "-q", "-y", "--no-install-recommends"];
    args.extend(packages);
    let mut command = run::command("apt-get", &args);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    match run::shown(command, &what) {
        Ok(status) if status.success() => {}
        Ok(status) => println!("apt-get install ended with {status}"),
        Err(error) => println!("{error:#}"),
    }
}

/// Downloads the package that `meta` depends on and unpacks it; the cache holds a whole kernel or none.
fn unpack_kernel(series: &str, meta: &str) -> Result<()> {
    let depends = run::output("apt-cache", &["depends", meta])?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{meta} names no kernel package"))?;
    let partial = cache().join(format!("{series}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .with_context(|| format!("cannot empty {}", partial.display()))?;
    }
    let deb = partial.join("deb");
    fs::create_dir_all(&deb).with_context(|| format!("cannot create {}", deb.display()))?;
    // As root apt would drop privileges to a user who cannot write here, and warn.
    let mut download = run::command(
        "apt-get",
        &["-q", "-o", "APT::Sandbox::User=root", "download", package],
    );
    download.current_dir(&deb);
    if !run::shown(download, &format!("apt-get download {package}"))?.success() {
        bail!("apt-get download {package} failed");
    }
    let file = fs::read_dir(&deb)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download left no {package} package"))?;
    unpack(&file, &partial)?;
    fs::remove_dir_all(&deb)?;
    let kernel = cache().join(series);
    fs::rename(&partial, &kernel)
        .with_context(|| format!("cannot move the kernel to {}", kernel.display()))
}

fn unpack(deb: &Path, into: &Path) -> Result<()> {
    let (deb, into) = (deb.to_string_lossy(), into.to_string_lossy());
    if !run::shown(
        run::command("dpkg-deb", &["-x", &deb, &into]),
        &format!("dpkg-deb -x {deb}"),
    )?
    .success()
    {
        bail!("cannot unpack {deb}");
    }
    Ok(())
}

/// Whether a program is there. busybox must be the static one, which only its package tells.
fn is_there(program: &str, package: &str) -> bool {
    if run::find(program).is_none() {
        return false;
    }
    program != "busybox"
        || run::output("dpkg-query", &["-W", "-f", "${db:Status-Status}", package])
            .is_ok_and(|s| s == "installed")
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}
