//! vCPUs that come and go, as far as a guest shows it that knows nothing of it: what is asked of it, what travels, what a reset does.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use native::back_end::Hosts;
use native::process::{Folder, Vmm};
use native::relay::{Point, Relay, kind};
use serde_json::{Value, json};

use crate::boot::{LIMIT, memory_guest};
use crate::matrix::guest_trials;
use crate::moves::{expect_ok, move_guest};

pub(crate) fn trials() -> Vec<Trial> {
    [
        guest_trials(&Hosts::ALL, "devices::vcpus::all_travel", travel),
        guest_trials(
            &Hosts::ALIKE,
            "devices::vcpus::a_reset_has_those_wanted",
            reset,
        ),
        guest_trials(&Hosts::ALIKE, "devices::vcpus::as_many_as_can_be", many),
        guest_trials(
            &Hosts::ALIKE,
            "devices::vcpus::none_while_a_machine_moves",
            during,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The memory guest, with one vCPU now and more to come.
fn guest(folder: &Folder, max_vcpus: u32) -> Result<Value> {
    let mut config = memory_guest(folder, 128, 1, "working_set_mib=32 rate=20000")?;
    config["cpus"]["max_vcpus"] = json!(max_vcpus);
    Ok(config)
}

fn resize(vmm: &Vmm, vcpus: u32) -> Result<()> {
    let body = json!({ "desired_vcpus": vcpus });
    vmm.api().put("vm.resize", &body).map(drop)
}

fn shows(vmm: &Vmm, desired: u32, present: u32, pending: &[u32]) -> Result<()> {
    let info = vmm.api().get("vm.info")?;
    let wanted = json!({"desired": desired, "present": present, "pending": pending, "refused": []});
    ensure!(info["vcpus"] == wanted, "{} is not {wanted}", info["vcpus"]);
    Ok(())
}

/// Running, present without the guest's knowing, asked back, absent: all of them go along, there and back.
fn travel(folder: &Folder) -> Result<()> {
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(guest(folder, 4)?)?;
    source.console()?.line("memory: ready", LIMIT)?;
    shows(&source, 1, 1, &[])?;
    for wrong in [0, 5] {
        let body = json!({ "desired_vcpus": wrong });
        let answer = source.api().request("PUT", "vm.resize", &body)?;
        ensure!(
            answer.status == 400 && answer.message().contains("use 1 to 4"),
            "{}",
            answer.body
        );
    }
    shows(&source, 1, 1, &[])?;
    resize(&source, 3)?;
    shows(&source, 3, 3, &[1, 2])?;
    resize(&source, 2)?;
    shows(&source, 2, 3, &[1, 2])?;
    move_guest(&source, &destination, "tcp:127.0.0.1:0")?;
    shows(&destination, 2, 3, &[1, 2])?;
    expect_ok(&mut destination.console()?)?;
    resize(&destination, 4)?;
    shows(&destination, 4, 4, &[1, 3])?;
    let config = &destination.api().get("vm.info")?["config"]["cpus"];
    ensure!(
        config["boot_vcpus"] == 1 && config["max_vcpus"] == 4 && config["desired_vcpus"] == 4,
        "{config}"
    );
    expect_ok(&mut destination.console()?)
}

fn reset(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(guest(folder, 3)?)?;
    for (now, next) in [(1, 3), (3, 2), (2, 1)] {
        let ready = vmm.console()?.line("memory: ready", LIMIT)?;
        ensure!(ready.contains(&format!("cpus={now} ")), "{ready}");
        shows(&vmm, now, now, &[])?;
        resize(&vmm, next)?;
        match next {
            // While it is off, too.
            2 => {
                vmm.api().put("vm.shutdown", &Value::Null)?;
                ensure!(vmm.api().get("vm.info")?["vcpus"].is_null());
                vmm.api().put("vm.boot", &Value::Null)?;
            }
            _ => drop(vmm.api().put("vm.reboot", &Value::Null)?),
        }
    }
    let ready = vmm.console()?.line("memory: ready", LIMIT)?;
    ensure!(ready.contains("cpus=1 "), "{ready}");
    expect_ok(&mut vmm.console()?)
}

fn many(folder: &Folder) -> Result<()> {
    let vmm = Vmm::serve(folder, "vmm")?;
    vmm.boot(guest(folder, 254)?)?;
    let mut console = vmm.console()?;
    console.line("memory: ready", LIMIT)?;
    resize(&vmm, 254)?;
    let all: Vec<u32> = (1..254).collect();
    shows(&vmm, 254, 254, &all)?;
    // Present and not started, they are no more in the way of a pause than those that are not there.
    for vcpus in [1, 254] {
        vmm.api().put("vm.pause", &Value::Null)?;
        resize(&vmm, vcpus)?;
        vmm.api().put("vm.resume", &Value::Null)?;
    }
    shows(&vmm, 254, 254, &[])?;
    expect_ok(&mut console)
}

fn during(folder: &Folder) -> Result<()> {
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(guest(folder, 2)?)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let (arriving, url) = destination.receive("tcp:127.0.0.1:0")?;
    let relay = Relay::start(&url, Point::Message(kind::READY))?;
    let leaving = source.api().start(
        "vm.send-migration",
        &json!({"destination_url": relay.url(), "downtime_ms": 60_000}),
    )?;
    relay.wait_held(LIMIT)?;
    let body = json!({"desired_vcpus": 2});
    let answer = source.api().request("PUT", "vm.resize", &body)?;
    ensure!(
        answer.status == 409 && answer.message().contains("cancel"),
        "{}",
        answer.body
    );
    relay.cut();
    source.api().wait_job(leaving, LIMIT)?;
    destination.api().wait_job(arriving, LIMIT)?;
    shows(&source, 1, 1, &[])?;
    resize(&source, 2)?;
    shows(&source, 2, 2, &[1])
}
