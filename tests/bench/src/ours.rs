//! This project's side.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use native::process::{Folder, Vmm};
use serde_json::{Value, json};

/// Longest a guest may take to fill its memory, or a move to end.
const LIMIT: Duration = Duration::from_secs(120);

/// Moves a guest once and returns `total_ms`, `downtime_ms`, `bytes_per_s`, `bytes_sent`, `rounds`.
pub(crate) fn moved(
    folder: &Folder,
    kernel: &std::path::Path,
    mib: u64,
    cmdline: &str,
) -> Result<Value> {
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(json!({
        "payload": {"kernel": kernel, "cmdline": cmdline},
        "memory": {"size": mib << 20},
    }))?;
    let mut console = source.console()?;
    console.line("memory: ready", LIMIT)?;
    std::thread::sleep(Duration::from_millis(300));
    let (arriving, url) = destination.receive("tcp:127.0.0.1:0")?;
    crate::limit::warm(mib)?;
    let leaving = source
        .api()
        .start("vm.send-migration", &json!({"destination_url": url}))?;
    let job = source.api().wait_job(leaving, LIMIT)?;
    ensure!(job["status"] == "succeeded", "the move failed: {job}");
    destination.api().wait_job(arriving, LIMIT)?;
    let total_ms = job["elapsed_ms"]
        .as_f64()
        .context("the job has no elapsed_ms")?;
    Ok(json!({
        "total_ms": total_ms,
        "downtime_ms": job["downtime_ms"],
        "bytes_per_s": job["bytes_sent"].as_f64().map(|bytes| bytes / total_ms * 1000.0),
        "bytes_sent": job["bytes_sent"],
        "rounds": job["rounds"].as_array().map(Vec::len),
    }))
}

/// Measures a disk of ours, with the host's page cache and io_uring.
pub(crate) fn reads(folder: &Folder, load: &crate::blk::Load<'_>) -> Result<Value> {
    let vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(json!({
        "payload": {"kernel": load.kernel, "cmdline": load.cmdline()},
        "memory": {"size": crate::blk::MEMORY_MIB << 20},
        "disks": [{
            "path": load.image,
            "num_queues": load.case.queues,
            "queue_size": crate::blk::QUEUE_SIZE,
        }],
    }))?;
    load.measured(&mut vmm.console()?)
}
