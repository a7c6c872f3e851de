//! The host's ends of devices: images that are missing or in use, and who says where they lead after a move.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use native::back_end::Hosts;
use native::process::{Folder, Vmm};
use native::relay::{Point, Relay, kind};
use serde_json::{Value, json};

use crate::boot::{LIMIT, memory_guest};
use crate::matrix::guest_trials;
use crate::moves::{expect_ok, move_guest_with};

pub(crate) fn trials() -> Vec<Trial> {
    [
        guest_trials(&Hosts::ALIKE, "devices::images_that_cannot_be_had", images),
        guest_trials(
            &Hosts::ALIKE,
            "devices::a_source_chooses_no_file_of_the_destination",
            untold,
        ),
        guest_trials(
            &Hosts::ALIKE,
            "devices::a_source_chooses_no_kernel_of_the_destination",
            resets,
        ),
        guest_trials(
            &Hosts::ALIKE,
            "devices::a_source_takes_no_terminal_of_the_destination",
            terminals,
        ),
        guest_trials(
            &Hosts::ALIKE,
            "devices::a_failed_move_leaves_images_with_their_guest",
            failed_move,
        ),
        guest_trials(&Hosts::ALIKE, "devices::sizes_and_names", sizes),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn image(folder: &Folder, name: &str) -> Result<String> {
    let path = folder.write(name, b"")?;
    let file = std::fs::OpenOptions::new().write(true).open(&path)?;
    file.set_len(1 << 20)?;
    Ok(path.to_str().context("UTF-8")?.to_owned())
}

/// Boots, and expects a refusal with these words.
fn refused(vmm: &Vmm, config: &Value, words: &[&str]) -> Result<()> {
    vmm.api().put("vm.create", config)?;
    let answer = vmm.api().request("PUT", "vm.boot", &Value::Null)?;
    ensure!(answer.status >= 400, "{config}: booted");
    for word in words {
        ensure!(
            answer.message().contains(word),
            "{:?} does not say {word:?}",
            answer.message()
        );
    }
    vmm.api().put("vm.delete", &Value::Null)?;
    Ok(())
}

fn images(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let disk = image(folder, "disk.img")?;
    let small = folder.write("small.img", b"short")?;
    let mut config = memory_guest(folder, 64, 1, "")?;
    let mut with = |path: &str| {
        config["disks"] = json!([{"path": path, "id": "data"}]);
        config.clone()
    };
    refused(
        &vmm,
        &with("/nowhere/at.all"),
        &["data", "/nowhere/at.all", "does not exist"],
    )?;
    refused(
        &vmm,
        &with(small.to_str().context("UTF-8")?),
        &["data", "small.img"],
    )?;
    refused(&vmm, &with("/"), &["data"])?;
    refused(&vmm, &with("/dev/null"), &["data", "/dev/null"])?;
    // One image, one machine.
    let other = Vmm::serve(folder, "other")?;
    other.boot(with(&disk))?;
    refused(&vmm, &with(&disk), &["data", "disk.img", "in use"])?;
    other.api().put("vm.shutdown", &Value::Null)?;
    vmm.boot(with(&disk))?;
    vmm.console()?.line("memory: ready", LIMIT)?;
    Ok(())
}

/// Sends, and returns the job once it has ended.
fn send(source: &Vmm, url: &str) -> Result<Value> {
    let leaving = source
        .api()
        .start("vm.send-migration", &json!({"destination_url": url}))?;
    source.api().wait_job(leaving, LIMIT)
}

fn untold(folder: &Folder) -> Result<()> {
    let (disk, vsock) = (image(folder, "disk.img")?, folder.join("vsock.sock"));
    let mut config = memory_guest(folder, 128, 1, "working_set_mib=32 rate=20000")?;
    config["disks"] = json!([{"path": disk, "id": "data"}]);
    config["vsock"] = json!({"cid": 7, "socket": vsock});
    config["rng"] = json!({"src": "/dev/zero"});
    let source = Vmm::serve(folder, "source")?;
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let destination = Vmm::serve(folder, "destination")?;
    let here = folder.join("vsock-here.sock");
    for (told, word) in [
        (json!({}), "disk data"),
        (json!({"disks": {"data": disk}}), "vsock"),
        (
            json!({"disks": {"data": disk}, "vsock": here}),
            "random numbers",
        ),
        (
            json!({"disks": {"data": "/nowhere"}, "vsock": here, "trust_source": true}),
            "/nowhere",
        ),
    ] {
        let (arriving, url) = destination.receive_with("tcp:127.0.0.1:0", told)?;
        let job = send(&source, &url)?;
        let message = job["error"]["message"].as_str().unwrap_or_default();
        ensure!(
            job["status"] == "failed" && job["phase"] == "reserve",
            "{job}"
        );
        ensure!(message.contains(word), "{message:?} does not say {word:?}");
        destination.api().wait_job(arriving, LIMIT)?;
        ensure!(source.api().state()? == "Running");
    }
    let told = json!({"disks": {"data": disk}, "vsock": here, "trust_source": true});
    let (arriving, url) = destination.receive_with("tcp:127.0.0.1:0", told)?;
    let job = send(&source, &url)?;
    ensure!(job["status"] == "succeeded", "{job}");
    destination.api().wait_job(arriving, LIMIT)?;
    let info = destination.api().get("vm.info")?;
    ensure!(info["config"]["vsock"]["socket"] == json!(here), "{info}");
    expect_ok(&mut destination.console()?)
}

/// Moves a guest and has it reset itself there.
fn moved_and_reset(source: &Vmm, destination: &Vmm, config: Value, told: Value) -> Result<()> {
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    move_guest_with(source, destination, "tcp:127.0.0.1:0", told)?;
    source.api().put("vm.delete", &Value::Null)?;
    let mut console = destination.console()?;
    expect_ok(&mut console)?;
    console.send(&[guests::ASK_RESET])?;
    while console.line("memory:", LIMIT).is_ok() {}
    Ok(())
}

/// A guest that resets itself after a move is booted from what was named here, or stays off.
fn resets(folder: &Folder) -> Result<()> {
    let config = memory_guest(folder, 64, 1, "working_set_mib=16 rate=20000")?;
    let there = folder.write("there.elf", guests::MEMORY)?;
    let (source, destination) = (
        Vmm::serve(folder, "source")?,
        Vmm::serve(folder, "destination")?,
    );
    let bootable =
        || -> Result<Value> { Ok(destination.api().get("vm.info")?["bootable"].clone()) };
    // Nothing is said.
    moved_and_reset(&source, &destination, config.clone(), json!({}))?;
    destination.api().wait_state("Shutdown", LIMIT)?;
    ensure!(bootable()? == json!(false));
    for word in ["cannot be booted again", "kernel", "vm.payload"] {
        ensure!(destination.log().contains(word), "{}", destination.log());
    }
    let refused = destination.api().request("PUT", "vm.boot", &Value::Null)?;
    ensure!(
        refused.status == 409 && refused.message().contains("vm.payload"),
        "{}",
        refused.body
    );
    for bad in [
        json!({}),
        json!({"initramfs": there}),
        json!({"kernel": there, "trust_source": true}),
    ] {
        let answer = destination.api().request("PUT", "vm.payload", &bad)?;
        ensure!(answer.status == 400, "{bad}: {}", answer.body);
    }
    destination
        .api()
        .put("vm.payload", &json!({"kernel": there}))?;
    ensure!(bootable()? == json!(true));
    destination.api().put("vm.boot", &Value::Null)?;
    destination.console()?.line("memory: ready", LIMIT)?;
    destination.api().put("vm.delete", &Value::Null)?;
    // An operator's reboot is refused too, and the guest runs on.
    source.boot(config.clone())?;
    source.console()?.line("memory: ready", LIMIT)?;
    move_guest_with(&source, &destination, "tcp:127.0.0.1:0", json!({}))?;
    source.api().put("vm.delete", &Value::Null)?;
    let refused = destination
        .api()
        .request("PUT", "vm.reboot", &Value::Null)?;
    ensure!(refused.status == 409, "{}", refused.body);
    expect_ok(&mut destination.console()?)?;
    destination.api().put("vm.delete", &Value::Null)?;
    // Another file is named, and the source may name one.
    for told in [json!({"kernel": there}), json!({"trust_source": true})] {
        moved_and_reset(&source, &destination, config.clone(), told)?;
        let verdict = destination.console()?.verdict()?;
        ensure!(verdict.ends_with("ok"), "{verdict}");
        ensure!(bootable()? == json!(true));
        destination.api().put("vm.delete", &Value::Null)?;
    }
    // What is named must be there.
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let (arriving, url) =
        destination.receive_with("tcp:127.0.0.1:0", json!({"kernel": "/nowhere/vmlinuz"}))?;
    let job = send(&source, &url)?;
    ensure!(
        job["status"] == "failed"
            && job["phase"] == "reserve"
            && job["error"]["message"]
                .as_str()
                .is_some_and(|message| message.contains("/nowhere/vmlinuz")),
        "{job}"
    );
    destination.api().wait_job(arriving, LIMIT)?;
    expect_ok(&mut source.console()?)
}

/// A guest whose console leads to the terminal of its process.
fn terminals(folder: &Folder) -> Result<()> {
    let mut config = memory_guest(folder, 64, 1, "working_set_mib=16 rate=20000")?;
    config["console"] = json!({"mode": "Tty"});
    let (source, destination) = (
        Vmm::serve(folder, "source")?,
        Vmm::serve(folder, "destination")?,
    );
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let (arriving, url) = destination.receive("tcp:127.0.0.1:0")?;
    let job = send(&source, &url)?;
    let message = job["error"]["message"].as_str().unwrap_or_default();
    ensure!(
        job["phase"] == "reserve" && message.contains("--console"),
        "{job}"
    );
    destination.api().wait_job(arriving, LIMIT)?;
    expect_ok(&mut source.console()?)?;
    let told = json!({"console": {"mode": "Null"}});
    move_guest_with(&source, &destination, "tcp:127.0.0.1:0", told)?;
    expect_ok(&mut destination.console()?)
}

/// A move that fails after the handover has begun: the image is the source's again, and nobody else's.
fn failed_move(folder: &Folder) -> Result<()> {
    let disk = image(folder, "disk.img")?;
    let mut config = memory_guest(folder, 128, 1, "working_set_mib=32 rate=20000")?;
    config["disks"] = json!([{"path": disk, "id": "data"}]);
    let source = Vmm::serve(folder, "source")?;
    source.boot(config.clone())?;
    source.console()?.line("memory: ready", LIMIT)?;
    let destination = Vmm::serve(folder, "destination")?;
    let told = json!({"trust_source": true});
    let (arriving, url) = destination.receive_with("tcp:127.0.0.1:0", told.clone())?;
    let relay = Relay::start(&url, Point::Message(kind::READY))?;
    let leaving = source.api().start(
        "vm.send-migration",
        &json!({"destination_url": relay.url(), "downtime_ms": 60_000}),
    )?;
    // The destination has restored the machine, and so has the lock.
    relay.wait_held(LIMIT)?;
    let third = Vmm::serve(folder, "third")?;
    refused(&third, &config, &["in use"])?;
    relay.cut();
    let job = source.api().wait_job(leaving, LIMIT)?;
    ensure!(job["status"] == "failed", "{job}");
    destination.api().wait_job(arriving, LIMIT)?;
    ensure!(source.api().state()? == "Running");
    refused(&third, &config, &["in use"])?;
    let (arriving, url) = destination.receive_with("tcp:127.0.0.1:0", told)?;
    let job = send(&source, &url)?;
    ensure!(job["status"] == "succeeded", "{job}");
    destination.api().wait_job(arriving, LIMIT)?;
    expect_ok(&mut destination.console()?)
}

/// What a machine without a guest's help shows: addresses that are given, names that are refused, sizes that cannot be.
fn sizes(folder: &Folder) -> Result<()> {
    let disk = image(folder, "disk.img")?;
    let mut config = memory_guest(folder, 64, 1, "")?;
    config["disks"] = json!([{"path": disk}, {"path": image(folder, "far.img")?, "pci_slot": 20}]);
    config["balloon"] = json!({"size": 0});
    let vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(config)?;
    vmm.console()?.line("memory: ready", LIMIT)?;
    let info = vmm.api().get("vm.info")?;
    let disks = &info["config"]["disks"];
    // Slot 1 has the source of random numbers, slot 2 the balloon.
    ensure!(
        disks[0]["id"] == "_disk0" && disks[0]["pci_slot"] == 3,
        "{info}"
    );
    ensure!(
        disks[1]["id"] == "_disk1" && disks[1]["pci_slot"] == 20,
        "{info}"
    );
    let third = image(folder, "third.img")?;
    let added = vmm
        .api()
        .request("PUT", "vm.add-disk", &json!({"path": third, "id": "third"}))?;
    ensure!(
        added.status == 200 && added.body["bdf"] == "0000:00:04.0",
        "{}",
        added.body
    );
    for (endpoint, body, status, word) in [
        (
            "vm.add-disk",
            json!({"path": third, "id": "third"}),
            400,
            "twice",
        ),
        ("vm.add-disk", json!({"path": third}), 409, "in use"),
        (
            "vm.add-disk",
            json!({"path": third, "size": 1}),
            400,
            "size",
        ),
        ("vm.remove-device", json!({"id": "nobody"}), 404, "nobody"),
        ("vm.resize", json!({"desired_balloon": 5}), 400, "4096"),
        (
            "vm.resize",
            json!({"desired_vcpus": 2}),
            400,
            "desired_vcpus",
        ),
        (
            "vm.resize-disk",
            json!({"id": "nobody", "desired_size": 512}),
            404,
            "nobody",
        ),
        (
            "vm.resize-disk",
            json!({"id": "third", "desired_size": 100}),
            409,
            "512",
        ),
        (
            "vm.resize-disk",
            json!({"id": "third", "desired_size": 512}),
            409,
            "third",
        ),
    ] {
        let answer = vmm.api().request("PUT", endpoint, &body)?;
        ensure!(
            answer.status == status,
            "{endpoint} {body}: {} {}",
            answer.status,
            answer.body
        );
        ensure!(
            answer.message().contains(word),
            "{endpoint} {body}: {:?}",
            answer.message()
        );
    }
    vmm.api().put(
        "vm.resize-disk",
        &json!({"id": "third", "desired_size": 2 << 20}),
    )?;
    ensure!(std::fs::metadata(&third)?.len() == 2 << 20);
    vmm.api().put(
        "vm.resize",
        &json!({"desired_balloon": 4096, "desired_vcpus": 1}),
    )?;
    let counters = vmm.api().get("vm.counters")?;
    ensure!(counters["balloon"]["target_bytes"] == 4096, "{counters}");
    ensure!(counters["third"]["read_ops"] == 0, "{counters}");
    expect_ok(&mut vmm.console()?)
}
