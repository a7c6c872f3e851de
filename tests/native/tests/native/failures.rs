//! A move that fails, or is cancelled, in each phase: generated from the list of phases, so that a new one cannot go
//! untested.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use migration::Phase;
use native::back_end::Hosts;
use native::process::{Folder, Vmm};
use native::relay::{Point, Relay, kind};
use serde_json::{Value, json};

use crate::boot::{LIMIT, memory_guest};
use crate::matrix::guest_trials;
use crate::moves::{expect_ok, move_guest};

/// How the other side is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// The connections break.
    Cut,
    /// The destination process dies.
    DestinationDies,
}

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for phase in Phase::ALL {
        for (name, loss) in [
            ("cut", Loss::Cut),
            ("destination_dies", Loss::DestinationDies),
        ] {
            trials.extend(guest_trials(
                &Hosts::ALIKE,
                format!("failures::{phase}::{name}"),
                move |folder| match phase {
                    Phase::Complete => fails_after_commit(folder, Point::in_phase(phase), loss),
                    _ => fails(folder, phase, loss),
                },
            ));
        }
        trials.extend(guest_trials(
            &Hosts::ALIKE,
            format!("failures::{phase}::cancel"),
            move |folder| match phase {
                Phase::Complete => cancel_too_late(folder),
                _ => cancelled(folder, phase),
            },
        ));
    }
    trials.extend(guest_trials(
        &Hosts::ALIKE,
        "failures::commit_is_lost",
        |folder| fails_after_commit(folder, Point::Message(kind::COMMIT), Loss::Cut),
    ));
    trials
}

/// A running guest, a destination, and a move between them that stands still at `point`.
struct Held {
    source: Vmm,
    destination: Vmm,
    relay: Relay,
    leaving: u64,
    arriving: u64,
}

fn hold(folder: &Folder, point: Point) -> Result<Held> {
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(memory_guest(
        folder,
        256,
        2,
        "working_set_mib=96 hot_mib=16 rate=20000",
    )?)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let (arriving, url) = destination.receive("tcp:127.0.0.1:0")?;
    let relay = Relay::start(&url, point)?;
    let leaving = source.api().start(
        "vm.send-migration",
        &json!({"destination_url": relay.url()}),
    )?;
    relay.wait_held(LIMIT)?;
    Ok(Held {
        source,
        destination,
        relay,
        leaving,
        arriving,
    })
}

impl Held {
    /// The guest runs at the source and has all its writes, nothing is left at the destination, and it can move after all.
    fn expect_at_home(self, folder: &Folder, destination_lives: bool) -> Result<()> {
        ensure!(
            self.source.api().state()? == "Running",
            "{}",
            self.source.api().state()?
        );
        let mut console = self.source.console()?;
        expect_ok(&mut console)?;
        drop(console);
        if destination_lives {
            let job = self.destination.api().wait_job(self.arriving, LIMIT)?;
            ensure!(job["status"] == "failed", "{job}");
            expect_freed(&self.destination)?;
        }
        drop(self.relay);
        drop(self.destination);
        let second = Vmm::serve(folder, "second")?;
        move_guest(&self.source, &second, "tcp:127.0.0.1:0")?;
        expect_ok(&mut second.console()?)
    }
}

/// The process holds no guest memory (any more).
fn expect_freed(vmm: &Vmm) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while vmm.resident_bytes()? > 64 << 20 {
        ensure!(
            Instant::now() < deadline,
            "the guest's memory is still there"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    ensure!(
        vmm.api().state()?.is_empty(),
        "there is a VM: {}",
        vmm.api().state()?
    );
    Ok(())
}

fn fails(folder: &Folder, phase: Phase, loss: Loss) -> Result<()> {
    let mut held = hold(folder, Point::in_phase(phase))?;
    if loss == Loss::DestinationDies {
        held.destination.kill();
    }
    held.relay.cut();
    let job = held.source.api().wait_job(held.leaving, LIMIT)?;
    ensure!(job["status"] == "failed", "{job}");
    ensure!(
        job["error"]["message"]
            .as_str()
            .is_some_and(|text| !text.is_empty()),
        "{job}"
    );
    // A destination that never saw the source waits on.
    if phase == Phase::Connect && loss == Loss::Cut {
        held.destination
            .api()
            .put(&format!("jobs/{}/cancel", held.arriving), &Value::Null)?;
        let job = held.destination.api().wait_job(held.arriving, LIMIT)?;
        ensure!(job["status"] == "cancelled", "{job}");
        expect_freed(&held.destination)?;
        return held.expect_at_home(folder, false);
    }
    // A connection that broke before the hello is a stray one to the destination, which waits on as well.
    if phase == Phase::Negotiate && loss == Loss::Cut {
        held.destination
            .api()
            .put(&format!("jobs/{}/cancel", held.arriving), &Value::Null)?;
        held.destination.api().wait_job(held.arriving, LIMIT)?;
        expect_freed(&held.destination)?;
        return held.expect_at_home(folder, false);
    }
    held.expect_at_home(folder, loss == Loss::Cut)
}

fn cancelled(folder: &Folder, phase: Phase) -> Result<()> {
    let held = hold(folder, Point::in_phase(phase))?;
    held.source
        .api()
        .put(&format!("jobs/{}/cancel", held.leaving), &Value::Null)?;
    let job = held.source.api().wait_job(held.leaving, LIMIT)?;
    ensure!(job["status"] == "cancelled", "{job}");
    held.relay.cut();
    let _ = held.destination.api().request(
        "PUT",
        &format!("jobs/{}/cancel", held.arriving),
        &Value::Null,
    )?;
    held.destination.api().wait_job(held.arriving, LIMIT)?;
    expect_freed(&held.destination)?;
    held.expect_at_home(folder, false)
}

/// After the commit has left: the source stays paused and says so, and an operator settles it, rightly.
fn fails_after_commit(folder: &Folder, point: Point, loss: Loss) -> Result<()> {
    let mut held = hold(folder, point)?;
    let arrived = point == Point::in_phase(Phase::Complete) && loss == Loss::Cut;
    if loss == Loss::DestinationDies {
        held.destination.kill();
    }
    held.relay.cut();
    let job = held.source.api().wait_job(held.leaving, LIMIT)?;
    ensure!(job["status"] == "in_doubt", "{job}");
    ensure!(
        job["error"]["message"]
            .as_str()
            .is_some_and(|text| text.contains("settle")),
        "{job}"
    );
    ensure!(
        held.source.api().state()? == "InDoubt",
        "{}",
        held.source.api().state()?
    );
    for path in [
        "vm.resume",
        "vm.delete",
        "vm.reboot",
        "vm.shutdown",
        "vmm.shutdown",
    ] {
        let answer = held.source.api().request("PUT", path, &Value::Null)?;
        ensure!(
            answer.status == 409,
            "{path} in doubt: {} {}",
            answer.status,
            answer.body
        );
    }
    let settle = format!("jobs/{}/settle", held.leaving);
    if arrived {
        held.destination.api().wait_job(held.arriving, LIMIT)?;
        ensure!(held.destination.api().state()? == "Running");
        held.source
            .api()
            .put(&settle, &json!({"outcome": "runs_there"}))?;
        ensure!(held.source.api().state()? == "MovedAway");
        return expect_ok(&mut held.destination.console()?);
    }
    if loss == Loss::Cut {
        held.destination.api().wait_job(held.arriving, LIMIT)?;
        expect_freed(&held.destination)?;
    }
    held.source
        .api()
        .put(&settle, &json!({"outcome": "resume_here"}))?;
    held.expect_at_home(folder, false)
}

/// After the commit a cancel comes too late: it says so, and the move ends well.
fn cancel_too_late(folder: &Folder) -> Result<()> {
    let held = hold(folder, Point::in_phase(Phase::Complete))?;
    let answer = held.source.api().request(
        "PUT",
        &format!("jobs/{}/cancel", held.leaving),
        &Value::Null,
    )?;
    ensure!(answer.status == 409, "{} {}", answer.status, answer.body);
    held.relay.release();
    let job = held.source.api().wait_job(held.leaving, LIMIT)?;
    ensure!(job["status"] == "succeeded", "{job}");
    expect_ok(&mut held.destination.console()?)
}
