//! What bad input gets: a clear answer that names the cause, and a process that goes on.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use native::back_end::Hosts;
use native::process::{Folder, Vmm, binary};
use serde_json::{Value, json};

use crate::boot::{LIMIT, memory_guest};
use crate::matrix::guest_trials;
use crate::moves::{expect_ok, move_guest};

pub(crate) fn trials() -> Vec<Trial> {
    [
        guest_trials(&Hosts::ALIKE, "refusals::configs", configs),
        guest_trials(&Hosts::ALIKE, "refusals::requests", requests),
        guest_trials(&Hosts::ALIKE, "refusals::states", states),
        guest_trials(
            &Hosts::ALIKE,
            "refusals::existing_sockets",
            existing_sockets,
        ),
        guest_trials(&Hosts::ALIKE, "refusals::hostile_sources", hostile_sources),
        guest_trials(
            &Hosts::ALIKE,
            "refusals::hostile_destinations",
            hostile_destinations,
        ),
        guest_trials(&Hosts::ALIKE, "refusals::sigterm_leaves_nothing", sigterm),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn configs(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let good = memory_guest(folder, 64, 1, "")?;
    let text = folder.write("text", b"this is no kernel at all, just some text")?;
    let empty = folder.write("empty", b"")?;
    let memory_total: u64 = std::fs::read_to_string("/proc/meminfo")?
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .context("no MemTotal")?;
    // What to change, and the words that the answer must have.
    let cases: Vec<(&str, Value, &[&str])> = vec![
        (
            "/payload/kernel",
            json!("/does/not/exist"),
            &["payload.kernel", "/does/not/exist"],
        ),
        ("/payload/kernel", json!(text), &["kernel"]),
        ("/payload/kernel", json!(empty), &["kernel"]),
        ("/payload", json!({}), &["payload.kernel"]),
        ("/memory/size", json!(0), &["memory.size"]),
        ("/memory/size", json!(1000), &["memory.size", "4096"]),
        (
            "/memory/size",
            json!(memory_total * 1024 * 64 / 4096 * 4096),
            &["memory"],
        ),
        ("/memory/size", json!(u64::MAX - 4095), &["memory"]),
        ("/memory/sise", json!(1), &["sise"]),
        ("/cpus/boot_vcpus", json!(0), &["cpus.boot_vcpus"]),
        ("/cpus/boot_vcpus", json!(100_000), &["cpus.boot_vcpus"]),
        (
            "/disks",
            json!([{"path": "a", "vhost_user": true, "vhost_socket": "s"}]),
            &["disks.path", "leave it out"],
        ),
        (
            "/disks",
            json!([{"vhost_user": true, "vhost_socket": "s"}]),
            &["memory.shared", "set"],
        ),
        (
            "/disks",
            json!([{"path": "a", "queue_size": 3}]),
            &["disks.queue_size"],
        ),
        (
            "/net",
            json!([{"mac": "01:00:00:00:00:00"}]),
            &["net", "group"],
        ),
        ("/balloon", json!({"size": 5}), &["balloon.size"]),
        ("/nonsense", json!(1), &["nonsense"]),
    ];
    for (pointer, value, words) in cases {
        let mut config = good.clone();
        let (parent, key) = pointer.rsplit_once('/').context("a pointer")?;
        config
            .pointer_mut(parent)
            .with_context(|| format!("no {parent}"))?[key] = value.clone();
        let mut answer = vmm.api().request("PUT", "vm.create", &config)?;
        if answer.status == 204 {
            answer = vmm.api().request("PUT", "vm.boot", &Value::Null)?;
            vmm.api().put("vm.delete", &Value::Null)?;
        }
        ensure!(
            answer.status == 400,
            "{pointer} = {value}: {} {}",
            answer.status,
            answer.body
        );
        for word in words {
            ensure!(
                answer.message().contains(word),
                "{pointer} = {value}: {:?} does not say {word:?}",
                answer.message()
            );
        }
    }
    vmm.boot(good)?;
    vmm.console()?.line("memory: ready", LIMIT)?;
    Ok(())
}

fn requests(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let cases: &[(&str, &str, &[u8], u16)] = &[
        ("PUT", "vm.create", b"{", 400),
        ("PUT", "vm.create", b"", 400),
        ("PUT", "vm.create", b"[]", 400),
        ("PUT", "vm.create", b"\xff\xfe", 400),
        (
            "PUT",
            "vm.send-migration",
            b"{\"destination_url\":\"ftp:x\"}",
            400,
        ),
        (
            "PUT",
            "vm.send-migration",
            b"{\"destination\":\"tcp:x:1\"}",
            400,
        ),
        (
            "PUT",
            "vm.receive-migration",
            b"{\"receiver_url\":\"tcp:nowhere\"}",
            400,
        ),
        ("GET", "vm.nothing", b"", 404),
        ("GET", "jobs/7", b"", 404),
        ("PUT", "jobs/7/cancel", b"", 404),
        ("GET", "jobs/x", b"", 400),
        ("GET", "vm.boot", b"", 405),
        ("PUT", "vm.info", b"", 405),
        ("GET", "vm.info", b"", 404),
        ("PUT", "vm.boot", b"", 404),
    ];
    for (method, path, body, status) in cases {
        let answer = vmm.api().raw(method, path, body)?;
        ensure!(
            answer.status == *status,
            "{method} {path}: {} {}",
            answer.status,
            answer.body
        );
        ensure!(
            !answer.kind().is_empty() && !answer.message().is_empty(),
            "{method} {path}: {}",
            answer.body
        );
    }
    let huge = vec![b' '; 64 << 20];
    let refused = vmm.api().raw("PUT", "vm.create", &huge);
    ensure!(refused.map_or(true, |answer| matches!(answer.status, 400 | 413)));
    vmm.api().get("vmm.ping")?;
    Ok(())
}

fn states(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let conflict = |path: &str, body: &Value| -> Result<()> {
        let answer = vmm.api().request("PUT", path, body)?;
        ensure!(
            answer.status == 409,
            "{path}: {} {}",
            answer.status,
            answer.body
        );
        Ok(())
    };
    let config = memory_guest(folder, 64, 1, "working_set_mib=16")?;
    vmm.api().put("vm.create", &config)?;
    conflict("vm.create", &config)?;
    for path in [
        "vm.pause",
        "vm.resume",
        "vm.reboot",
        "vm.shutdown",
        "vm.power-button",
    ] {
        conflict(path, &Value::Null)?;
    }
    conflict(
        "vm.send-migration",
        &json!({"destination_url": "tcp:127.0.0.1:1"}),
    )?;
    conflict(
        "vm.receive-migration",
        &json!({"receiver_url": "tcp:127.0.0.1:0"}),
    )?;
    vmm.api().put("vm.boot", &Value::Null)?;
    conflict("vm.boot", &Value::Null)?;
    conflict("vm.resume", &Value::Null)?;
    vmm.api().put("vm.pause", &Value::Null)?;
    conflict("vm.pause", &Value::Null)?;
    conflict("vm.power-button", &Value::Null)?;
    vmm.api().put("vm.resume", &Value::Null)?;
    vmm.api().put("vm.reboot", &Value::Null)?;
    ensure!(vmm.api().state()? == "Running");
    vmm.api().put("vm.delete", &Value::Null)?;
    ensure!(vmm.api().state()?.is_empty());
    Ok(())
}

fn existing_sockets(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let taken = folder.join("vmm.api");
    let mode = std::fs::metadata(&taken)?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "the API socket has mode {mode:o}");
    let output = Command::new(binary()?)
        .arg("serve")
        .arg("--api-socket")
        .arg(&taken)
        .stdin(Stdio::null())
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && stderr.contains("vmm.api"),
        "{stderr}"
    );
    vmm.api()
        .get("vmm.ping")
        .context("the first process lost its socket")?;

    let occupied = folder.join("occupied");
    let _listener = UnixListener::bind(&occupied)?;
    let answer = vmm.api().request(
        "PUT",
        "vm.receive-migration?wait=false",
        &json!({"receiver_url": format!("unix:{}", occupied.display())}),
    )?;
    ensure!(
        answer.status == 409 && answer.message().contains("occupied"),
        "{}",
        answer.body
    );
    let mut config = memory_guest(folder, 64, 1, "")?;
    config["serial"] = json!({"mode": "Socket", "socket": occupied});
    vmm.api().put("vm.create", &config)?;
    let answer = vmm.api().request("PUT", "vm.boot", &Value::Null)?;
    ensure!(
        answer.status >= 400 && answer.message().contains("occupied"),
        "{}",
        answer.body
    );
    ensure!(occupied.exists(), "somebody else's socket was removed");
    Ok(())
}

/// Peers that are no sources: each is dropped, and the guest that comes afterwards still arrives.
fn hostile_sources(folder: &Folder) -> Result<()> {
    let source = Vmm::serve(folder, "source")?;
    source.boot(memory_guest(
        folder,
        128,
        1,
        "working_set_mib=32 rate=5000",
    )?)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let destination = Vmm::serve(folder, "destination")?;
    let (job, url) = destination.receive("tcp:127.0.0.1:0")?;
    let address = url.strip_prefix("tcp:").context("not tcp")?.to_owned();
    let mut noise = vec![0u8; 65536];
    noise
        .iter_mut()
        .enumerate()
        .for_each(|(i, byte)| *byte = (i * 7 + i / 251) as u8);
    for bytes in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 64], &noise] {
        let mut stream = TcpStream::connect(&address)?;
        // The other side may close first.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
    }
    ensure!(
        destination.api().job(job)?["status"] == "running",
        "a stray connection ended the wait: {}",
        destination.api().job(job)?
    );
    let leaving = source
        .api()
        .start("vm.send-migration", &json!({"destination_url": url}))?;
    let sent = source.api().wait_job(leaving, LIMIT)?;
    ensure!(sent["status"] == "succeeded", "{sent}");
    expect_ok(&mut destination.console()?)
}

/// Peers that are no destinations: the move fails, says why, and the guest runs on.
fn hostile_destinations(folder: &Folder) -> Result<()> {
    let source = Vmm::serve(folder, "source")?;
    source.boot(memory_guest(
        folder,
        128,
        1,
        "working_set_mib=32 rate=5000",
    )?)?;
    let mut console = source.console()?;
    console.line("memory: ready", LIMIT)?;
    for answer in [&b""[..], b"HTTP/1.1 400 Bad Request\r\n\r\n", &[0xff; 4096]] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let url = format!("tcp:{}", listener.local_addr()?);
        let leaving = source
            .api()
            .start("vm.send-migration", &json!({"destination_url": url}))?;
        let (mut stream, _) = listener.accept()?;
        let _ = stream.write_all(answer);
        drop(stream);
        let job = source.api().wait_job(leaving, LIMIT)?;
        ensure!(job["status"] == "failed", "{job}");
        ensure!(
            job["error"]["message"]
                .as_str()
                .is_some_and(|m| !m.is_empty()),
            "{job}"
        );
        ensure!(source.api().state()? == "Running");
        expect_ok(&mut console)?;
    }
    let nobody = source.api().request(
        "PUT",
        "vm.send-migration",
        &json!({"destination_url": "tcp:127.0.0.1:1"}),
    )?;
    ensure!(
        nobody.status == 409 && nobody.message().contains("127.0.0.1:1"),
        "{}",
        nobody.body
    );
    drop(console);
    let destination = Vmm::serve(folder, "destination")?;
    move_guest(&source, &destination, "tcp:127.0.0.1:0")?;
    expect_ok(&mut destination.console()?)
}

fn sigterm(folder: &Folder) -> Result<()> {
    let mut vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(memory_guest(
        folder,
        128,
        2,
        "working_set_mib=32 rate=5000",
    )?)?;
    vmm.console()?.line("memory: ready", LIMIT)?;
    let killed = Command::new("kill")
        .arg("-TERM")
        .arg(vmm.pid().to_string())
        .status()?;
    ensure!(killed.success());
    let status = vmm.wait(LIMIT)?;
    ensure!(status.success(), "{status}: {}", vmm.log());
    for left in ["vmm.api", "vmm.serial"] {
        ensure!(!folder.join(left).exists(), "{left} was left behind");
    }
    Ok(())
}
