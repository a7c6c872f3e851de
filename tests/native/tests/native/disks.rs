//! Guests read virtio disks by a driver of their own and find what is in the image, before and after a move.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use guests::Report;
use libtest_mimic::Trial;
use native::back_end::Hosts;
use native::console::Console;
use native::process::{Folder, Vmm};
use serde_json::{Value, json};

use crate::boot::LIMIT;
use crate::matrix::guest_trials;
use crate::moves::move_guest_with;

/// 4 KiB blocks of an image.
pub(crate) const BLOCKS: usize = 2000;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, queues, cmdline, disk) in [
        ("one_queue", 1, "", json!({})),
        ("four_queues", 4, "queues=4", json!({})),
        ("no_event_idx", 2, "queues=2 event_idx=off", json!({})),
        ("system_calls", 1, "", json!({"disable_io_uring": true})),
    ] {
        trials.extend(guest_trials(
            &Hosts::ALIKE,
            format!("devices::disks::read::{name}"),
            move |folder| reads(folder, queues, cmdline, &disk),
        ));
    }
    for (name, queues) in [("one_queue", 1), ("four_queues", 4)] {
        trials.extend(guest_trials(
            &Hosts::ALL,
            format!("devices::disks::moved_while_reading::{name}"),
            move |folder| moves(folder, queues),
        ));
    }
    trials
}

/// An image whose blocks all differ, and its checksum.
pub(crate) fn image(folder: &Folder) -> Result<(std::path::PathBuf, u64)> {
    let mut contents = Vec::with_capacity(BLOCKS * 4096);
    let mut word = 0x0123_4567_89ab_cdef_u64;
    while contents.len() < BLOCKS * 4096 {
        word = word
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        contents.extend(word.to_le_bytes());
    }
    let path = folder.write("disk.raw", &contents)?;
    Ok((path, guests::disk_checksum(&contents)))
}

fn config(
    folder: &Folder,
    image: &Path,
    queues: u32,
    cmdline: &str,
    disk: &Value,
) -> Result<Value> {
    let kernel = folder.write("block.elf", guests::BLOCK)?;
    let mut disk = disk.clone();
    disk["path"] = json!(image);
    disk["num_queues"] = json!(queues);
    Ok(json!({
        "payload": {"kernel": kernel, "cmdline": cmdline},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 64 << 20},
        "disks": [disk],
    }))
}

/// The guest has read the whole disk and found the image.
pub(crate) fn expect_image(console: &mut Console, expected: u64) -> Result<u64> {
    let line = console.verdict()?;
    let Report::BlockVerdict {
        counts,
        checksum,
        ok,
    } = Report::parse(&line)?
    else {
        bail!("not a verdict on a disk: {line}");
    };
    ensure!(ok, "{line}");
    ensure!(
        checksum == expected,
        "the image's checksum is {expected}, the guest's: {line}"
    );
    Ok(counts.passes)
}

fn reads(folder: &Folder, queues: u32, cmdline: &str, disk: &Value) -> Result<()> {
    let (image, checksum) = image(folder)?;
    let vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(config(
        folder,
        &image,
        queues,
        &format!("run_ms=50 {cmdline}"),
        disk,
    )?)?;
    let mut console = vmm.console()?;
    let line = console.line("block: ready", LIMIT)?;
    ensure!(
        matches!(
            Report::parse(&line)?,
            Report::BlockReady { blocks, queues: used, event_idx, .. }
                if blocks == BLOCKS as u64 && u32::from(used) == queues && event_idx != cmdline.contains("event_idx=off")
        ),
        "{line}"
    );
    expect_image(&mut console, checksum)?;
    console.send(&[guests::ASK_MEASUREMENT])?;
    let line = console.line("block: result", LIMIT)?;
    ensure!(
        matches!(
            Report::parse(&line)?,
            Report::BlockResult { requests, errors: 0, .. } if requests > 0
        ),
        "{line}"
    );
    expect_image(&mut console, checksum)?;
    Ok(())
}

fn moves(folder: &Folder, queues: u32) -> Result<()> {
    let (image, checksum) = image(folder)?;
    let mut from = Vmm::serve(folder, "source")?;
    let mut to = Vmm::serve(folder, "destination")?;
    let cmdline = format!("work=read report_ms=100 queues={queues}");
    from.boot(config(folder, &image, queues, &cmdline, &json!({}))?)?;
    let mut passes = 0;
    let mut console = from.console()?;
    console.line("block: report", LIMIT)?;
    for _ in 0..4 {
        let before = expect_image(&mut console, checksum)?;
        ensure!(before > passes, "{before} passes, {passes} before");
        passes = before;
        move_guest_with(&from, &to, "tcp:127.0.0.1:0", json!({"trust_source": true}))?;
        console = to.console()?;
        from.api().put("vm.delete", &Value::Null)?;
        std::mem::swap(&mut from, &mut to);
    }
    let after = expect_image(&mut console, checksum)?;
    ensure!(after > passes, "{after} passes, {passes} before the move");
    Ok(())
}
