//! Disks that another process serves by vhost-user: read, written, moved, paused, and their back ends killed.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use guests::Report;
use libtest_mimic::Trial;
use native::back_end::Hosts;
use native::console::Console;
use native::disk_server::{DiskServer, Server};
use native::process::{Folder, Vmm};
use serde_json::{Value, json};

use crate::boot::LIMIT;
use crate::disks::{BLOCKS, expect_image, image};
use crate::matrix::guest_trials_with;
use crate::moves::move_guest_with;

/// Times that a back end is killed at most until it has had requests under way.
const KILLS: usize = 20;

type Body = fn(&Folder, Server) -> Result<()>;

pub(crate) fn trials() -> Vec<Trial> {
    let kvm = &Hosts::ALIKE[..1];
    let both = [Server::Qemu, Server::Ours].as_slice();
    let (qemu, ours) = (&both[..1], &both[1..]);
    let cells: [(&str, &[Server], &[Hosts], Body); 7] = [
        ("read", both, &Hosts::ALIKE, reads),
        ("moved_while_writing", both, &Hosts::ALL, moves),
        ("snapshot", both, kvm, snapshot),
        ("killed_while_idle", both, kvm, killed_while_idle),
        (
            "killed_while_writing",
            ours,
            &Hosts::ALIKE,
            killed_while_writing,
        ),
        ("killed_without_notes", qemu, kvm, killed_without_notes),
        ("refused", qemu, kvm, refused),
    ];
    let mut trials = Vec::new();
    for (name, servers, hosts, body) in cells {
        for &server in servers {
            let name = format!("devices::vhost::{name}::{}", server.name());
            let missing = match server {
                Server::Qemu => || Server::Qemu.missing(),
                Server::Ours => || None,
            };
            trials.extend(guest_trials_with(hosts, missing, name, move |folder| {
                body(folder, server)
            }));
        }
    }
    trials
}

fn config(folder: &Folder, socket: &Path, queues: u32, cmdline: &str) -> Result<Value> {
    let kernel = folder.write("block.elf", guests::BLOCK)?;
    Ok(json!({
        "payload": {"kernel": kernel, "cmdline": cmdline},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 64 << 20, "shared": true},
        "disks": [{"vhost_user": true, "vhost_socket": socket, "num_queues": queues, "id": "disk"}],
    }))
}

const WRITES: &str = "work=write report_ms=100 queues=2";

/// A machine whose guest writes a disk and reads it again all the time.
fn writing(folder: &Folder, vmm: &Vmm, server: Server, socket: &Path) -> Result<DiskServer> {
    let (image, _) = image(folder)?;
    let daemon = DiskServer::start(server, &image, socket, 2)?;
    vmm.boot(config(folder, socket, 2, WRITES)?)?;
    Ok(daemon)
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

fn reads(folder: &Folder, server: Server) -> Result<()> {
    let (image, checksum) = image(folder)?;
    let socket = folder.join("disk.vhost");
    let _daemon = DiskServer::start(server, &image, &socket, 2)?;
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
    for _ in 0..3 {
        vmm.api().put("vm.pause", &Value::Null)?;
        vmm.api().put("vm.resume", &Value::Null)?;
        expect_image(&mut console, checksum)?;
    }
    // A reboot is a new machine with a new connection.
    vmm.api().put("vm.reboot", &Value::Null)?;
    let mut console = vmm.console()?;
    expect_image(&mut console, checksum)?;
    Ok(())
}

fn moves(folder: &Folder, server: Server) -> Result<()> {
    let mut from = Vmm::serve(folder, "source")?;
    let mut to = Vmm::serve(folder, "destination")?;
    let sockets = [folder.join("a.vhost"), folder.join("b.vhost")];
    let mut daemon = writing(folder, &from, server, &sockets[0])?;
    let image = folder.join("disk.raw");
    let mut passes = 0;
    let mut console = from.console()?;
    console.line("block: report", LIMIT)?;
    for number in 1..5 {
        let before = expect_whole(&mut console)?;
        ensure!(before > passes, "{before} passes, {passes} before");
        passes = before;
        let socket = &sockets[number % 2];
        let next = DiskServer::start(server, &image, socket, 2)?;
        move_guest_with(
            &from,
            &to,
            "tcp:127.0.0.1:0",
            json!({"vhost": {"disk": socket}}),
        )?;
        console = to.console()?;
        from.api().put("vm.delete", &Value::Null)?;
        drop(std::mem::replace(&mut daemon, next));
        std::mem::swap(&mut from, &mut to);
    }
    let after = expect_whole(&mut console)?;
    ensure!(after > passes, "{after} passes, {passes} before the move");
    Ok(())
}

fn snapshot(folder: &Folder, server: Server) -> Result<()> {
    let first = Vmm::serve(folder, "first")?;
    let mut daemon = writing(folder, &first, server, &folder.join("a.vhost"))?;
    let mut console = first.console()?;
    let before = expect_whole(&mut console)?;
    first.api().put("vm.pause", &Value::Null)?;
    let url = format!("file://{}", folder.join("snapshot").display());
    first
        .api()
        .put("vm.snapshot", &json!({"destination_url": url}))?;
    let copy = folder.join("copy.raw");
    std::fs::copy(folder.join("disk.raw"), &copy)?;
    // It goes on here, and again from the snapshot on a disk of its own.
    first.api().put("vm.resume", &Value::Null)?;
    ensure!(
        expect_whole(&mut console)? > before,
        "the first does not go on"
    );
    drop(first);
    daemon.kill();
    let second = Vmm::serve(folder, "second")?;
    let socket = folder.join("b.vhost");
    let _daemon = DiskServer::start(server, &copy, &socket, 2)?;
    let request = json!({
        "source_url": url, "resume": true, "vhost": {"disk": socket},
        "serial": {"mode": "Socket", "socket": second.serial()},
    });
    second.api().put("vm.restore", &request)?;
    let after = expect_whole(&mut second.console()?)?;
    ensure!(
        after > before,
        "{after} passes, {before} before the snapshot"
    );
    Ok(())
}

fn killed_while_idle(folder: &Folder, server: Server) -> Result<()> {
    let (image, checksum) = image(folder)?;
    let socket = folder.join("disk.vhost");
    let mut daemon = DiskServer::start(server, &image, &socket, 2)?;
    let vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(config(folder, &socket, 2, "queues=2")?)?;
    let mut console = vmm.console()?;
    for _ in 0..3 {
        expect_image(&mut console, checksum)?;
        daemon.restart()?;
        // While it is paused, too.
        vmm.api().put("vm.pause", &Value::Null)?;
        connected(&vmm, true)?;
        daemon.restart()?;
        vmm.api().put("vm.resume", &Value::Null)?;
        connected(&vmm, true)?;
    }
    expect_image(&mut console, checksum)?;
    ensure!(vmm.log().contains("is back after"), "{}", vmm.log());
    Ok(())
}

/// Waits until the device has its back end, or has none.
fn connected(vmm: &Vmm, wanted: bool) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let counters = vmm.api().get("vm.counters")?;
        if counters["disk"]["connected"] == json!(u8::from(wanted)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{counters}: {}", vmm.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A back end that answers out of order, and notes what it has begun, is killed in the midst of it: no write is lost, none comes twice.
fn killed_while_writing(folder: &Folder, server: Server) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let mut daemon = writing(folder, &vmm, server, &folder.join("disk.vhost"))?;
    let mut console = vmm.console()?;
    console.line("block: report", LIMIT)?;
    let mut passes = expect_whole(&mut console)?;
    for number in 0..KILLS {
        std::thread::sleep(Duration::from_millis(7 * number as u64));
        daemon.restart()?;
        let now = expect_whole(&mut console)?;
        ensure!(now > passes, "{now} passes, {passes} before");
        passes = now;
        if number >= 5 && daemon.log().contains("requests are begun again") {
            break;
        }
    }
    ensure!(
        daemon.log().contains("requests are begun again"),
        "it was always killed while idle: {}",
        daemon.log()
    );
    // Without it the machine pauses and says what cannot be done; what was under way is done when it is back.
    daemon.kill();
    connected(&vmm, false)?;
    vmm.api().put("vm.pause", &Value::Null)?;
    let url = format!("file://{}", folder.join("snapshot").display());
    for (path, body) in [
        (
            "vm.send-migration",
            json!({"destination_url": "tcp:127.0.0.1:1"}),
        ),
        ("vm.snapshot", json!({"destination_url": url})),
    ] {
        let answer = vmm.api().request("PUT", path, &body)?;
        ensure!(
            answer.status == 409
                && answer.message().contains("device disk")
                && answer.message().contains("gone"),
            "{path}: {answer:?}"
        );
    }
    vmm.api().put("vm.resume", &Value::Null)?;
    daemon.restart()?;
    ensure!(
        expect_whole(&mut console)? > passes,
        "the guest does not go on"
    );
    // And paused while it is gone, back while paused.
    daemon.kill();
    vmm.api().put("vm.pause", &Value::Null)?;
    daemon.restart()?;
    connected(&vmm, true)?;
    vmm.api().put("vm.resume", &Value::Null)?;
    expect_whole(&mut console)?;
    Ok(())
}

/// `qemu-storage-daemon` does not note what it has begun: the device needs a reset, and the machine lives.
fn killed_without_notes(folder: &Folder, server: Server) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let mut daemon = writing(folder, &vmm, server, &folder.join("disk.vhost"))?;
    let mut console = vmm.console()?;
    console.line("block: report", LIMIT)?;
    // Now and then it has nothing to do just when it is killed, and serves on.
    for number in 1..=KILLS {
        daemon.restart()?;
        let deadline = Instant::now() + LIMIT;
        while vmm.log().matches("is back after").count() < number {
            ensure!(Instant::now() < deadline, "{}", vmm.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        if vmm.log().contains("the device needs a reset") {
            break;
        }
        std::thread::sleep(Duration::from_millis(7 * number as u64));
    }
    ensure!(
        vmm.log().contains("the device needs a reset"),
        "it was always killed while idle: {}",
        vmm.log()
    );
    vmm.api().put("vm.pause", &Value::Null)?;
    vmm.api().put("vm.resume", &Value::Null)?;
    // A new machine has the disk again.
    vmm.api().put("vm.reboot", &Value::Null)?;
    expect_whole(&mut vmm.console()?)?;
    Ok(())
}

/// No back end, a destination that is not told of one, and a device of one that comes while the guest runs.
fn refused(folder: &Folder, server: Server) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let socket = folder.join("disk.vhost");
    let (image, _) = image(folder)?;
    let mut nowhere = config(folder, &socket, 2, WRITES)?;
    nowhere["serial"] = json!({"mode": "Null"});
    vmm.api().put("vm.create", &nowhere)?;
    let answer = vmm.api().request("PUT", "vm.boot", &Value::Null)?;
    ensure!(
        answer.status == 409
            && answer
                .message()
                .contains("no vhost-user back end answers at"),
        "{answer:?}"
    );
    vmm.api().put("vm.delete", &Value::Null)?;
    let _daemon = DiskServer::start(Server::Ours, &image, &socket, 2)?;
    vmm.boot(config(folder, &socket, 2, WRITES)?)?;
    let mut console = vmm.console()?;
    expect_whole(&mut console)?;
    let other = Vmm::serve(folder, "other")?;
    let (job, url) = other.receive("tcp:127.0.0.1:0")?;
    let answer = vmm
        .api()
        .request("PUT", "vm.send-migration", &json!({"destination_url": url}))?;
    ensure!(
        answer.status == 409 && answer.message().contains("--vhost ID=SOCKET"),
        "{answer:?}"
    );
    other.api().wait_job(job, LIMIT)?;
    // Hot-added and taken away.
    let second = folder.join("second.vhost");
    let disk = json!({"vhost_user": true, "vhost_socket": second, "id": "second"});
    let answer = vmm.api().request("PUT", "vm.add-disk", &disk)?;
    ensure!(
        answer.message().contains("no vhost-user back end"),
        "{answer:?}"
    );
    let fs = json!({"tag": "share", "socket": folder.join("fs.vhost")});
    let answer = vmm.api().request("PUT", "vm.add-fs", &fs)?;
    ensure!(
        answer.message().contains("no vhost-user back end"),
        "{answer:?}"
    );
    let untagged = json!({"tag": "", "socket": "s"});
    let answer = vmm.api().request("PUT", "vm.add-fs", &untagged)?;
    ensure!(
        answer.status == 400 && answer.message().contains("fs.tag"),
        "{answer:?}"
    );
    let _second = DiskServer::start(server, &image, &second, 1)?;
    let added = vmm.api().put("vm.add-disk", &disk)?;
    ensure!(
        added["id"] == "second" && added["bdf"].is_string(),
        "{added}"
    );
    expect_whole(&mut console)?;
    Ok(())
}
