//! Guests boot, check themselves, reset and power off.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use native::back_end::Hosts;
use native::process::{Folder, Vmm};
use serde_json::{Value, json};

use crate::matrix::guest_trials;

/// Longest a guest may take to do anything here.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// A config of the memory guest.
pub(crate) fn memory_guest(folder: &Folder, mib: u64, vcpus: u32, cmdline: &str) -> Result<Value> {
    let kernel = folder.write("memory.elf", guests::MEMORY)?;
    Ok(json!({
        "payload": {"kernel": kernel, "cmdline": cmdline},
        "cpus": {"boot_vcpus": vcpus, "max_vcpus": vcpus},
        "memory": {"size": mib << 20},
    }))
}

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (backing, memory) in [
        ("thp", json!({})),
        ("small_pages", json!({"thp": false})),
        ("memfd", json!({"shared": true})),
    ] {
        for vcpus in [1, 2] {
            let memory = memory.clone();
            trials.extend(guest_trials(
                &Hosts::ALIKE,
                format!("boot::{backing}::{vcpus}_vcpus"),
                move |folder| boots(folder, vcpus, &memory),
            ));
        }
    }
    trials.extend(guest_trials(
        &Hosts::ALIKE,
        "boot::reset_and_power_off",
        resets,
    ));
    trials
}

fn boots(folder: &Folder, vcpus: u32, memory: &Value) -> Result<()> {
    let mut config = memory_guest(folder, 256, vcpus, "working_set_mib=64 rate=2000")?;
    for (key, value) in memory.as_object().into_iter().flatten() {
        config["memory"][key] = value.clone();
    }
    let vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(config)?;
    let mut console = vmm.console()?;
    let ready = console.line("memory: ready", LIMIT)?;
    ensure!(ready.contains(&format!("cpus={vcpus}")), "{ready}");
    let verdict = console.verdict()?;
    ensure!(verdict.ends_with("ok"), "{verdict}");
    ensure!(vmm.api().state()? == "Running");
    vmm.api().put("vm.shutdown", &Value::Null)?;
    ensure!(vmm.api().state()? == "Shutdown");
    ensure!(
        vmm.resident_bytes()? < 64 << 20,
        "the guest's memory was not freed"
    );
    Ok(())
}

/// By ACPI, as the guest finds it in the tables.
fn resets(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(memory_guest(
        folder,
        128,
        2,
        "working_set_mib=32 rate=2000",
    )?)?;
    for _ in 0..2 {
        let mut console = vmm.console()?;
        console.line("memory: ready", LIMIT)?;
        console.send(&[guests::ASK_RESET])?;
        // The port of the machine that was reset is closed; a new one appears in its place.
        while console.line("memory:", LIMIT).is_ok() {}
    }
    let mut console = vmm.console()?;
    let verdict = console.verdict()?;
    ensure!(verdict.ends_with("ok"), "{verdict}");
    console.send(&[guests::ASK_POWER_OFF])?;
    let deadline = std::time::Instant::now() + LIMIT;
    while vmm.api().state()? != "Shutdown" {
        ensure!(
            std::time::Instant::now() < deadline,
            "the guest is {}",
            vmm.api().state()?
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    ensure!(
        vmm.resident_bytes()? < 64 << 20,
        "the guest's memory was not freed"
    );
    vmm.api().put("vm.boot", &Value::Null)?;
    vmm.console()?.line("memory: ready", LIMIT)?;
    Ok(())
}
