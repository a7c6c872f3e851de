//! Disks that another process serves by vhost-user.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use guests::Report;
use libtest_mimic::Trial;
use native::back_end::Hosts;
use native::console::Console;
use native::process::{Folder, Vmm};
use native::storage_daemon::StorageDaemon;
use serde_json::{Value, json};

use crate::boot::LIMIT;
use crate::disks::{BLOCKS, expect_image, image};
use crate::matrix::guest_trials;
use crate::moves::move_guest_with;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(guest_trials(&Hosts::ALIKE, "vhost::read", reads));
    trials.extend(guest_trials(
        &Hosts::ALL,
        "vhost::moved_while_writing",
        moves,
    ));
    trials
}

fn config(folder: &Folder, socket: &std::path::Path, queues: u32, cmdline: &str) -> Result<Value> {
    let kernel = folder.write("block.elf", guests::BLOCK)?;
    Ok(json!({
        "payload": {"kernel": kernel, "cmdline": cmdline},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 64 << 20, "shared": true},
        "disks": [{"vhost_user": true, "vhost_socket": socket, "num_queues": queues, "id": "disk"}],
    }))
}

/// The guest has found everything as it has written it; how often it has written the disk.
fn expect_whole(console: &mut Console) -> Result<u64> {
    let line = console.verdict()?;
    let Report::BlockVerdict { counts, ok, .. } = Report::parse(&line)? else {
        bail!("not a verdict on a disk: {line}");
    };
    ensure!(ok, "{line}");
    Ok(counts.passes)
}

fn reads(folder: &Folder) -> Result<()> {
    let (image, checksum) = image(folder)?;
    let socket = folder.join("disk.vhost");
    let _daemon = StorageDaemon::start(&image, &socket, 2)?;
    let vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(config(folder, &socket, 2, "run_ms=50 queues=2")?)?;
    let mut console = vmm.console()?;
    let line = console.line("block: ready", LIMIT)?;
    ensure!(
        matches!(Report::parse(&line)?, Report::BlockReady { blocks, queues: 2, .. } if blocks == BLOCKS as u64),
        "{line}"
    );
    expect_image(&mut console, checksum)?;
    console.send(&[guests::ASK_MEASUREMENT])?;
    console.line("block: result", LIMIT)?;
    vmm.api().put("vm.pause", &Value::Null)?;
    std::thread::sleep(Duration::from_millis(20));
    vmm.api().put("vm.resume", &Value::Null)?;
    expect_image(&mut console, checksum)?;
    Ok(())
}

fn moves(folder: &Folder) -> Result<()> {
    let (image, _) = image(folder)?;
    let mut from = Vmm::serve(folder, "source")?;
    let mut to = Vmm::serve(folder, "destination")?;
    let sockets = [folder.join("a.vhost"), folder.join("b.vhost")];
    let mut daemon = StorageDaemon::start(&image, &sockets[0], 2)?;
    from.boot(config(
        folder,
        &sockets[0],
        2,
        "work=write report_ms=100 queues=2",
    )?)?;
    let mut passes = 0;
    let mut console = from.console()?;
    console.line("block: report", LIMIT)?;
    for number in 1..5 {
        let before = expect_whole(&mut console)?;
        ensure!(before > passes, "{before} passes, {passes} before");
        passes = before;
        let socket = &sockets[number % 2];
        let next = StorageDaemon::start(&image, socket, 2)?;
        move_guest_with(
            &from,
            &to,
            "tcp:127.0.0.1:0",
            json!({"vhost": {"disk": socket}}),
        )?;
        console = to.console()?;
        from.api().put("vm.delete", &Value::Null)?;
        daemon = next;
        std::mem::swap(&mut from, &mut to);
    }
    drop(console);
    console = from.console()?;
    let after = expect_whole(&mut console)?;
    ensure!(after > passes, "{after} passes, {passes} before the move");
    drop(daemon);
    Ok(())
}
