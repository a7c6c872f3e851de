//! Guests go to files and come back from them, and find every write of theirs.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use native::api::Answer;
use native::back_end::Hosts;
use native::console::Console;
use native::process::{Folder, Vmm, binary};
use serde_json::{Value, json};

use crate::boot::{LIMIT, memory_guest};
use crate::matrix::guest_trials;
use crate::moves::{behind, expect_ok, field, move_guest};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, prefault) in [("lazily", false), ("eagerly", true)] {
        for (backing, memory) in [
            ("thp", json!({})),
            ("small_pages", json!({"thp": false})),
            ("memfd", json!({"shared": true})),
        ] {
            trials.extend(guest_trials(
                &Hosts::ALL,
                format!("devices::snapshots::{name}::{backing}"),
                move |folder| comes_back(folder, prefault, &memory),
            ));
        }
    }
    type Body = fn(&Folder) -> Result<()>;
    let everywhere: [(&str, Body); 3] = [
        ("a_lazily_restored_guest_is_saved_again", saved_again),
        ("a_lazily_restored_guest_moves", moves_on),
        ("registers_and_time_go_on", time_goes_on),
    ];
    for (name, body) in everywhere {
        trials.extend(guest_trials(
            &Hosts::ALL,
            format!("devices::snapshots::{name}"),
            body,
        ));
    }
    let alike: [(&str, Body); 6] = [
        ("one_is_restored_twice", twice),
        ("places_and_states_that_are_refused", refused),
        ("damaged_ones_are_refused_and_leave_nothing", damaged),
        ("disks_are_not_in_it_but_must_be_there", disks),
        ("cancelled", cancelled),
        ("a_crash_leaves_nothing_that_looks_whole", crashed),
    ];
    for (name, body) in alike {
        trials.extend(guest_trials(
            &Hosts::ALIKE,
            format!("devices::snapshots::{name}"),
            body,
        ));
    }
    trials.extend(guest_trials(
        &Hosts::UNLIKE,
        "devices::snapshots::a_guest_of_one_hypervisor_is_refused",
        of_one_hypervisor,
    ));
    trials.extend(guest_trials(
        &[Hosts::ALIKE[0]],
        "devices::snapshots::by_the_command_line",
        command_line,
    ));
    trials
}

/// A guest of 256 MiB that writes to half of them, as fast as tests go.
fn writing_guest(folder: &Folder) -> Result<Value> {
    memory_guest(
        folder,
        256,
        2,
        "working_set_mib=128 hot_mib=16 rate=20000 pattern=random zero_fraction=0.1",
    )
}

/// Boots the guest and pauses it once it writes.
fn paused(vmm: &Vmm, config: Value) -> Result<()> {
    vmm.boot(config)?;
    vmm.console()?.line("memory: ready", LIMIT)?;
    vmm.api().put("vm.pause", &Value::Null)?;
    Ok(())
}

fn url(directory: &Path) -> Value {
    json!(format!("file://{}", directory.display()))
}

fn snapshot(vmm: &Vmm, directory: &Path) -> Result<()> {
    vmm.api()
        .put("vm.snapshot", &json!({"destination_url": url(directory)}))?;
    ensure!(vmm.api().state()? == "Paused");
    Ok(())
}

fn try_restore(vmm: &Vmm, directory: &Path, prefault: bool) -> Result<Answer> {
    let serial = json!({"mode": "Socket", "socket": vmm.serial()});
    let body = json!({"source_url": url(directory), "prefault": prefault, "serial": serial});
    vmm.api().request("PUT", "vm.restore", &body)
}

/// Restores it, paused.
fn restore(vmm: &Vmm, directory: &Path, prefault: bool) -> Result<()> {
    let answer = try_restore(vmm, directory, prefault)?;
    ensure!(answer.status == 204, "{}\n{}", answer.body, vmm.log());
    ensure!(vmm.api().state()? == "Paused");
    Ok(())
}

fn resume(vmm: &Vmm) -> Result<()> {
    vmm.api().put("vm.resume", &Value::Null).map(drop)
}

/// The guest has all its memory and goes on to write.
fn expect_alive(vmm: &Vmm) -> Result<()> {
    let mut console = vmm.console()?;
    expect_ok(&mut console)?;
    let writes = |console: &mut Console| -> Result<u64> {
        field(&console.line("memory: report", LIMIT)?, "writes")
    };
    let before = writes(&mut console)?;
    ensure!(
        writes(&mut console)? > before,
        "the guest has stopped writing"
    );
    expect_ok(&mut console)
}

/// The directory has no entries but these.
fn expect_entries(directory: &Path, expected: &[&str]) -> Result<()> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    ensure!(names == expected, "{names:?}");
    Ok(())
}

fn comes_back(folder: &Folder, prefault: bool, memory: &Value) -> Result<()> {
    let mut config = writing_guest(folder)?;
    for (key, value) in memory.as_object().into_iter().flatten() {
        config["memory"][key] = value.clone();
    }
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    paused(&source, config)?;
    let directory = folder.join("snapshot");
    snapshot(&source, &directory)?;
    expect_entries(&directory, &["manifest", "memory"])?;
    // The first one goes on as if nothing had been.
    resume(&source)?;
    expect_alive(&source)?;
    source.api().put("vm.delete", &Value::Null)?;

    restore(&destination, &directory, prefault)?;
    let mut console = destination.console()?;
    console.send(b"v")?;
    ensure!(
        console.line("memory:", Duration::from_millis(200)).is_err(),
        "a paused guest has run"
    );
    drop(console);
    resume(&destination)?;
    let mut console = destination.console()?;
    let verdict = console.line("memory: verdict", LIMIT)?;
    ensure!(verdict.ends_with("ok"), "{verdict}");
    drop(console);
    expect_alive(&destination)
}

/// What nobody has touched since the restore is in the second snapshot too.
fn saved_again(folder: &Folder) -> Result<()> {
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    paused(&source, writing_guest(folder)?)?;
    let (first, second, third) = (
        folder.join("first"),
        folder.join("second"),
        folder.join("third"),
    );
    snapshot(&source, &first)?;
    drop(source);
    restore(&destination, &first, false)?;
    snapshot(&destination, &second)?;
    resume(&destination)?;
    expect_alive(&destination)?;
    destination.api().put("vm.pause", &Value::Null)?;
    snapshot(&destination, &third)?;
    drop(destination);
    std::fs::remove_dir_all(&first)?;
    for directory in [second, third] {
        let vmm = Vmm::serve(folder, "again")?;
        restore(&vmm, &directory, true)?;
        resume(&vmm)?;
        expect_alive(&vmm)?;
    }
    Ok(())
}

fn moves_on(folder: &Folder) -> Result<()> {
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    paused(&source, writing_guest(folder)?)?;
    let directory = folder.join("snapshot");
    snapshot(&source, &directory)?;
    source.api().put("vm.delete", &Value::Null)?;
    restore(&source, &directory, false)?;
    resume(&source)?;
    std::fs::remove_dir_all(&directory)?;
    move_guest(&source, &destination, "tcp:127.0.0.1:0")?;
    expect_alive(&destination)
}

/// The guest's clocks go on by the time for which there were only files of it.
fn time_goes_on(folder: &Folder) -> Result<()> {
    const STANDS: Duration = Duration::from_secs(2);
    let since = Instant::now();
    let kernel = folder.write("cpu.elf", guests::CPU)?;
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(json!({
        "payload": {"kernel": kernel, "cmdline": ""},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 128 << 20},
    }))?;
    let before = behind(&mut source.console()?, since)?;
    source.api().put("vm.pause", &Value::Null)?;
    let directory = folder.join("snapshot");
    snapshot(&source, &directory)?;
    drop(source);
    std::thread::sleep(STANDS);
    restore(&destination, &directory, false)?;
    resume(&destination)?;
    let mut console = destination.console()?;
    let after = behind(&mut console, since)?;
    let (lost, gained) = (after.saturating_sub(before), before.saturating_sub(after));
    ensure!(
        lost < STANDS / 4 && gained < STANDS / 4,
        "the guest's clock was {before:?} behind before there were only files of it for {STANDS:?}, and is {after:?} behind now"
    );
    let verdict = console.verdict()?;
    ensure!(
        verdict.contains("errors=0") && verdict.ends_with("ok"),
        "{verdict}"
    );
    Ok(())
}

/// Also at once, and the snapshot stays as it was.
fn twice(folder: &Folder) -> Result<()> {
    let source = Vmm::serve(folder, "source")?;
    paused(&source, writing_guest(folder)?)?;
    let directory = folder.join("snapshot");
    snapshot(&source, &directory)?;
    let contents = || -> Result<_> {
        let read = |name| std::fs::read(directory.join(name));
        Ok((read("manifest")?, read("memory")?))
    };
    let before = contents()?;
    let (one, other) = (Vmm::serve(folder, "one")?, Vmm::serve(folder, "other")?);
    for vmm in [&one, &other] {
        restore(vmm, &directory, false)?;
        resume(vmm)?;
    }
    for vmm in [&one, &other] {
        expect_alive(vmm)?;
    }
    ensure!(contents()? == before, "the snapshot was changed");
    Ok(())
}

fn refused(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let directory = folder.join("snapshot");
    let ask = |endpoint: &str, body: Value, status: u16, words: &[&str]| -> Result<()> {
        let answer = vmm.api().request("PUT", endpoint, &body)?;
        ensure!(
            answer.status == status,
            "{body}: {} {}",
            answer.status,
            answer.body
        );
        for word in words {
            ensure!(answer.message().contains(word), "{body}: {}", answer.body);
        }
        Ok(())
    };
    let to = |directory: &Path| json!({"destination_url": url(directory)});
    ask("vm.snapshot", to(&directory), 404, &["vm.create"])?;
    for bad in [
        "",
        "snapshot",
        "/srv/x",
        "file://relative",
        "http://host/x",
        "file://",
    ] {
        ask(
            "vm.snapshot",
            json!({"destination_url": bad}),
            400,
            &["destination_url", "file:///"],
        )?;
        ask(
            "vm.restore",
            json!({"source_url": bad}),
            400,
            &["source_url", "file:///"],
        )?;
    }
    let nothing = json!({"source_url": url(&folder.join("nothing"))});
    ask("vm.restore", nothing, 409, &["holds no snapshot"])?;

    vmm.boot(memory_guest(
        folder,
        128,
        1,
        "working_set_mib=32 rate=20000",
    )?)?;
    vmm.console()?.line("memory: ready", LIMIT)?;
    ask("vm.snapshot", to(&directory), 409, &["Running", "pause it"])?;
    vmm.api().put("vm.pause", &Value::Null)?;
    let taken = folder.join("taken");
    std::fs::create_dir(&taken)?;
    std::fs::write(taken.join("mine"), "mine")?;
    ask(
        "vm.snapshot",
        to(&taken),
        409,
        &["exists already", "another name"],
    )?;
    expect_entries(&taken, &["mine"])?;
    ask("vm.snapshot", to(&folder.join("no/such")), 409, &["no/"])?;
    let empty = folder.join("empty");
    std::fs::create_dir(&empty)?;
    ask("vm.snapshot", to(&empty), 204, &[])?;
    let from = json!({"source_url": url(&empty)});
    ask("vm.restore", from, 409, &["already is a VM", "delete it"])?;
    resume(&vmm)?;
    expect_alive(&vmm)
}

fn damaged(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    paused(
        &vmm,
        memory_guest(folder, 128, 1, "working_set_mib=32 rate=20000")?,
    )?;
    let directory = folder.join("snapshot");
    snapshot(&vmm, &directory)?;
    vmm.api().put("vm.delete", &Value::Null)?;
    let flip = |name: &str, at: u64| -> Result<()> {
        let path = directory.join(name);
        let file = std::fs::File::options().read(true).write(true).open(path)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 1], at)?;
        Ok(())
    };
    for (name, at, prefault, words) in [
        ("manifest", 0, false, "not of a snapshot"),
        ("manifest", 8, false, "version 0"),
        ("manifest", 16, false, "damaged"),
        ("manifest", 1000, false, "checksum"),
        ("memory", 20 << 20, true, "checksum"),
        ("memory", 128 << 20, false, "last page"),
    ] {
        flip(name, at)?;
        let answer = try_restore(&vmm, &directory, prefault)?;
        ensure!(
            answer.status == 409 && answer.message().contains(words),
            "{name}, byte {at}: {} {}",
            answer.status,
            answer.body
        );
        ensure!(vmm.api().state()?.is_empty(), "a machine is left");
        flip(name, at)?;
    }
    restore(&vmm, &directory, true)?;
    resume(&vmm)?;
    expect_alive(&vmm)
}

fn disks(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let image = folder.join("disk.img");
    std::fs::File::create_new(&image)?.set_len(1 << 20)?;
    let mut config = memory_guest(folder, 128, 1, "working_set_mib=32 rate=20000")?;
    config["disks"] = json!([{"path": image, "id": "data"}]);
    paused(&vmm, config)?;
    let directory = folder.join("snapshot");
    snapshot(&vmm, &directory)?;
    let other = Vmm::serve(folder, "other")?;
    let answer = try_restore(&other, &directory, false)?;
    ensure!(
        answer.status == 409 && answer.message().contains("data"),
        "the image of a guest that lives was given to another: {}",
        answer.body
    );
    vmm.api().put("vm.delete", &Value::Null)?;
    let elsewhere = folder.join("elsewhere.img");
    std::fs::rename(&image, &elsewhere)?;
    let answer = try_restore(&other, &directory, false)?;
    ensure!(
        answer.status == 409 && answer.message().contains("disk.img"),
        "{}",
        answer.body
    );
    let serial = json!({"mode": "Socket", "socket": other.serial()});
    other.api().put(
        "vm.restore",
        &json!({"source_url": url(&directory), "serial": serial, "disks": {"data": elsewhere}, "resume": true}),
    )?;
    ensure!(other.api().state()? == "Running");
    expect_alive(&other)
}

/// A guest with enough memory that writing it takes a while.
fn large(folder: &Folder, vmm: &Vmm) -> Result<()> {
    paused(
        vmm,
        memory_guest(folder, 640, 1, "working_set_mib=512 rate=20000")?,
    )
}

fn cancelled(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    large(folder, &vmm)?;
    let place = folder.join("place");
    std::fs::create_dir(&place)?;
    let body = json!({"destination_url": url(&place.join("snapshot"))});
    let job = vmm.api().start("vm.snapshot", &body)?;
    for endpoint in ["vm.resume", "vm.delete", "vm.shutdown"] {
        let answer = vmm.api().request("PUT", endpoint, &Value::Null)?;
        ensure!(
            answer.status == 409 && answer.message().contains("snapshot"),
            "{endpoint}: {}",
            answer.body
        );
    }
    vmm.api().put(&format!("jobs/{job}/cancel"), &Value::Null)?;
    let ended = vmm.api().wait_job(job, LIMIT)?;
    ensure!(
        ended["status"] == "cancelled" && ended["kind"] == "snapshot",
        "{ended}"
    );
    expect_entries(&place, &[])?;
    resume(&vmm)?;
    expect_alive(&vmm)
}

fn crashed(folder: &Folder) -> Result<()> {
    let mut vmm = Vmm::serve(folder, "vmm")?;
    large(folder, &vmm)?;
    let directory = folder.join("snapshot");
    let body = json!({"destination_url": url(&directory)});
    let job = vmm.api().start("vm.snapshot", &body)?;
    vmm.api()
        .wait_job_until(job, LIMIT, |job| job["phase"] == "memory")?;
    vmm.kill();
    ensure!(
        !directory.exists(),
        "half a snapshot has the name of a whole one"
    );
    Ok(())
}

fn of_one_hypervisor(folder: &Folder) -> Result<()> {
    let mut config = memory_guest(folder, 128, 1, "working_set_mib=32 rate=20000")?;
    config["cpus"]["model"] = json!("host");
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    paused(&source, config)?;
    let directory = folder.join("snapshot");
    snapshot(&source, &directory)?;
    let answer = try_restore(&destination, &directory, false)?;
    ensure!(
        answer.status == 409 && answer.message().contains("hypervisor interface"),
        "{}",
        answer.body
    );
    ensure!(destination.api().state()?.is_empty(), "a machine is left");
    Ok(())
}

fn command_line(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    let api = folder.join("vmm.api");
    let ctl = |words: &[&str]| -> Result<PathBuf> {
        let directory = folder.join("snapshot");
        let output = Command::new(binary()?)
            .args(["ctl", "--api-socket"])
            .arg(&api)
            .args(words)
            .arg(&directory)
            .output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(directory)
    };
    paused(
        &vmm,
        memory_guest(folder, 128, 1, "working_set_mib=32 rate=20000")?,
    )?;
    let directory = ctl(&["snapshot"])?;
    drop(vmm);
    for verify in [&[][..], &["--verify"][..]] {
        let serial = folder.join("restored.serial");
        let mut child = Command::new(binary()?)
            .arg("restore")
            .arg(&directory)
            .args(["--hypervisor", "kvm", "--serial"])
            .arg(format!("socket={}", serial.display()))
            .args(verify)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let result = Console::connect(&serial).and_then(|mut console| {
            expect_ok(&mut console)?;
            console.send(&[guests::ASK_POWER_OFF])
        });
        if result.is_err() {
            let _ = child.kill();
        }
        let output = child.wait_with_output()?;
        result.with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        ensure!(output.status.success(), "{output:?}");
    }
    let output = Command::new(binary()?)
        .arg("restore")
        .arg(folder.join("nothing"))
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("holds no snapshot"),
        "{output:?}"
    );
    Ok(())
}
