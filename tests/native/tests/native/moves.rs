//! Guests move live and find every write of theirs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use native::back_end::Hosts;
use native::console::Console;
use native::process::{Folder, Vmm};
use native::relay::{Point, Relay, kind};
use serde_json::{Value, json};

use crate::boot::{LIMIT, memory_guest};
use crate::matrix::guest_trials;

/// How many moves in a row the long test makes: `NATIVE_MOVES`, or a short run.
fn chain_length() -> u64 {
    std::env::var("NATIVE_MOVES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(20)
}

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for transport in ["tcp", "unix"] {
        for vcpus in [1, 2] {
            for pattern in ["sequential", "random"] {
                trials.extend(guest_trials(
                    &Hosts::ALL,
                    format!("moves::{transport}::{vcpus}_vcpus::{pattern}"),
                    move |folder| moves(folder, transport, vcpus, pattern),
                ));
            }
        }
    }
    trials.extend(guest_trials(
        &Hosts::ALL,
        "moves::shared_memory",
        moves_shared,
    ));
    trials.extend(guest_trials(
        &Hosts::ALL,
        "moves::paused_stays_paused",
        paused,
    ));
    trials.extend(guest_trials(
        &Hosts::ALL,
        "moves::untouched_memory_stays_untouched",
        sparse,
    ));
    trials.extend(guest_trials(
        &Hosts::ALL,
        "moves::registers_clocks_and_timers",
        registers,
    ));
    for (name, model) in [
        ("moves::time_goes_on_while_a_guest_stands_still", None),
        ("moves::time_goes_on_by_the_tsc", Some("bare")),
    ] {
        trials.extend(guest_trials(&Hosts::ALL, name, move |folder| {
            stands_still(folder, model)
        }));
    }
    trials.extend(guest_trials(&Hosts::ALL, "moves::many_in_a_row", chain));
    trials.extend(guest_trials(
        &Hosts::UNLIKE,
        "moves::a_guest_of_one_hypervisor_stays",
        stays,
    ));
    trials.extend(guest_trials(
        &[Hosts::ALIKE[1]],
        "moves::a_destination_told_which_hypervisor",
        told,
    ));
    trials
}

/// Where `destination` listens.
pub(crate) fn url(folder: &Folder, transport: &str) -> String {
    match transport {
        "tcp" => "tcp:127.0.0.1:0".to_owned(),
        _ => format!("unix:{}", folder.join("move.sock").display()),
    }
}

/// Moves the guest of `source` to `destination` and returns the job at the source.
pub(crate) fn move_guest(source: &Vmm, destination: &Vmm, url: &str) -> Result<Value> {
    move_guest_with(source, destination, url, json!({}))
}

/// The same with further fields in the request at the destination.
pub(crate) fn move_guest_with(
    source: &Vmm,
    destination: &Vmm,
    url: &str,
    request: Value,
) -> Result<Value> {
    let (arriving, url) = destination.receive_with(url, request)?;
    let leaving = source
        .api()
        .start("vm.send-migration", &json!({"destination_url": url}))?;
    let job = source.api().wait_job(leaving, LIMIT)?;
    ensure!(
        job["status"] == "succeeded",
        "the move failed: {job}\nsource: {}\ndestination: {}",
        source.log(),
        destination.log()
    );
    let arrived = destination.api().wait_job(arriving, LIMIT)?;
    ensure!(
        arrived["status"] == "succeeded",
        "nothing arrived: {arrived}"
    );
    Ok(job)
}

/// The guest has found all its memory as it must be.
pub(crate) fn expect_ok(console: &mut Console) -> Result<()> {
    let verdict = console.verdict()?;
    ensure!(
        verdict.contains("lost=0 torn=0 stale=0") && verdict.ends_with("ok"),
        "{verdict}"
    );
    Ok(())
}

fn moves(folder: &Folder, transport: &str, vcpus: u32, pattern: &str) -> Result<()> {
    let config = memory_guest(
        folder,
        256,
        vcpus,
        &format!("working_set_mib=128 hot_mib=16 rate=20000 pattern={pattern} zero_fraction=0.1"),
    )?;
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let job = move_guest(&source, &destination, &url(folder, transport))?;
    ensure!(job["phase"] == "complete", "{job}");
    ensure!(
        job["rounds"]
            .as_array()
            .is_some_and(|rounds| rounds.len() >= 2),
        "{job}"
    );
    ensure!(
        job["downtime_ms"].as_f64().is_some_and(|ms| ms > 0.0),
        "{job}"
    );

    ensure!(source.api().state()? == "MovedAway");
    ensure!(
        source.resident_bytes()? < 64 << 20,
        "the source's memory was not freed"
    );
    ensure!(destination.api().state()? == "Running");
    let mut console = destination.console()?;
    expect_ok(&mut console)?;
    // It goes on working, not only looking.
    let writes = |console: &mut Console| -> Result<u64> {
        let line = console.line("memory: report", LIMIT)?;
        field(&line, "writes")
    };
    let before = writes(&mut console)?;
    ensure!(
        writes(&mut console)? > before,
        "the guest has stopped writing"
    );
    Ok(())
}

/// `key=NUMBER` in a report.
pub(crate) fn field(line: &str, key: &str) -> Result<u64> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("no {key} in {line:?}"))
}

fn moves_shared(folder: &Folder) -> Result<()> {
    let mut config = memory_guest(folder, 192, 1, "working_set_mib=96 rate=20000")?;
    config["memory"]["shared"] = json!(true);
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    move_guest(&source, &destination, "tcp:127.0.0.1:0")?;
    expect_ok(&mut destination.console()?)
}

fn paused(folder: &Folder) -> Result<()> {
    let config = memory_guest(folder, 192, 2, "working_set_mib=64 rate=20000")?;
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    source.api().put("vm.pause", &Value::Null)?;
    move_guest(&source, &destination, "tcp:127.0.0.1:0")?;
    ensure!(
        destination.api().state()? == "Paused",
        "{}",
        destination.api().state()?
    );
    let mut console = destination.console()?;
    console.send(b"v")?;
    ensure!(
        console.line("memory:", Duration::from_millis(500)).is_err(),
        "a paused guest has run at the destination"
    );
    destination.api().put("vm.resume", &Value::Null)?;
    let verdict = console.line("memory: verdict", LIMIT)?;
    ensure!(verdict.ends_with("ok"), "{verdict}");
    Ok(())
}

fn sparse(folder: &Folder) -> Result<()> {
    let config = memory_guest(folder, 2048, 1, "working_set_mib=32 rate=1000")?;
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let before = source.resident_bytes()?;
    let job = move_guest(&source, &destination, "tcp:127.0.0.1:0")?;
    let after = destination.resident_bytes()?;
    ensure!(
        after < before + (32 << 20),
        "{} MiB were resident before the move, {} MiB after it",
        before >> 20,
        after >> 20
    );
    let sent = job["bytes_sent"].as_u64().context("no bytes_sent")?;
    ensure!(
        sent < 256 << 20,
        "{sent} bytes were sent for a guest that uses 32 MiB"
    );
    expect_ok(&mut destination.console()?)
}

/// A guest that was shown what only its own hypervisor has is refused by name before anything is sent, and runs on.
fn stays(folder: &Folder) -> Result<()> {
    let mut config = memory_guest(folder, 128, 1, "working_set_mib=32 rate=20000")?;
    config["cpus"]["model"] = json!("host");
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let (arriving, url) = destination.receive("tcp:127.0.0.1:0")?;
    let leaving = source
        .api()
        .start("vm.send-migration", &json!({"destination_url": url}))?;
    let job = source.api().wait_job(leaving, LIMIT)?;
    let message = job["error"]["message"].as_str().unwrap_or_default();
    ensure!(
        job["status"] == "failed" && job["phase"] == "reserve",
        "{job}"
    );
    ensure!(message.contains("hypervisor interface"), "{message}");
    ensure!(job["bytes_sent"] == 0, "{job}");
    let arrived = destination.api().wait_job(arriving, LIMIT)?;
    ensure!(arrived["status"] == "failed", "{arrived}");
    ensure!(source.api().state()? == "Running");
    expect_ok(&mut source.console()?)
}

/// `hypervisor` of a receive outweighs that of the process.
fn told(folder: &Folder) -> Result<()> {
    let mut config = memory_guest(folder, 128, 1, "working_set_mib=32 rate=20000")?;
    config["cpus"]["model"] = json!("bare");
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(config)?;
    source.console()?.line("memory: ready", LIMIT)?;
    let (_, url) = destination.receive_with("tcp:127.0.0.1:0", json!({"hypervisor": "kvm"}))?;
    let leaving = source
        .api()
        .start("vm.send-migration", &json!({"destination_url": url}))?;
    let job = source.api().wait_job(leaving, LIMIT)?;
    ensure!(job["status"] == "succeeded", "{job}");
    ensure!(destination.api().get("vm.info")?["hypervisor"] == "kvm");
    expect_ok(&mut destination.console()?)
}

fn registers(folder: &Folder) -> Result<()> {
    let kernel = folder.write("cpu.elf", guests::CPU)?;
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    source.boot(json!({
        "payload": {"kernel": kernel, "cmdline": ""},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 128 << 20},
    }))?;
    source.console()?.line("cpu: report", LIMIT)?;
    let (mut from, mut to) = (source, destination);
    for _ in 0..4 {
        move_guest(&from, &to, "tcp:127.0.0.1:0")?;
        let mut console = to.console()?;
        let verdict = console.verdict()?;
        ensure!(
            verdict.contains("errors=0") && verdict.ends_with("ok"),
            "{verdict}"
        );
        let ticks = |console: &mut Console| -> Result<u64> {
            field(&console.line("cpu: report", LIMIT)?, "ticks")
        };
        let before = ticks(&mut console)?;
        ensure!(ticks(&mut console)? > before, "the timer has stopped");
        from.api().put("vm.delete", &Value::Null)?;
        std::mem::swap(&mut from, &mut to);
    }
    Ok(())
}

/// How far the guest's clock is behind this process's: the least of some lines, since a line comes late but never early.
pub(crate) fn behind(console: &mut Console, since: Instant) -> Result<Duration> {
    let mut least = Duration::MAX;
    for _ in 0..3 {
        let guest = Duration::from_millis(field(&console.line("cpu: report", LIMIT)?, "t_ms")?);
        least = least.min(since.elapsed().saturating_sub(guest));
    }
    Ok(least)
}

/// The guest's clock, KVM's or the TSC, goes on by the time that the guest stood still, and by no more.
///
/// A KVM without hardware virtualisation shows a guest the host's own TSC, which goes on in any case: there this says little of the TSC, and
/// the lab says it (`cpu::time_goes_on_over_ten_moves`).
fn stands_still(folder: &Folder, model: Option<&str>) -> Result<()> {
    const STANDS: Duration = Duration::from_secs(2);
    let since = Instant::now();
    let kernel = folder.write("cpu.elf", guests::CPU)?;
    let source = Vmm::serve(folder, "source")?;
    let destination = Vmm::serve(folder, "destination")?;
    let mut config = json!({
        "payload": {"kernel": kernel, "cmdline": ""},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 128 << 20},
    });
    if let Some(model) = model {
        config["cpus"]["model"] = json!(model);
    }
    source.boot(config)?;
    let before = behind(&mut source.console()?, since)?;
    let (arriving, url) = destination.receive("tcp:127.0.0.1:0")?;
    let relay = Relay::start(&url, Point::Message(kind::STATE))?;
    let leaving = source.api().start(
        "vm.send-migration",
        &json!({"destination_url": relay.url(), "downtime_ms": 60_000}),
    )?;
    relay.wait_held(LIMIT)?;
    std::thread::sleep(STANDS);
    relay.release();
    let job = source.api().wait_job(leaving, LIMIT)?;
    ensure!(job["status"] == "succeeded", "the move failed: {job}");
    destination.api().wait_job(arriving, LIMIT)?;
    let mut console = destination.console()?;
    let after = behind(&mut console, since)?;
    let (lost, gained) = (after.saturating_sub(before), before.saturating_sub(after));
    ensure!(
        lost < STANDS / 4 && gained < STANDS / 4,
        "the guest's clock was {before:?} behind before it stood still for {STANDS:?}, and is {after:?} behind now"
    );
    let verdict = console.verdict()?;
    ensure!(
        verdict.contains("errors=0") && verdict.ends_with("ok"),
        "{verdict}"
    );
    Ok(())
}

/// A small generator of test parameters (xorshift64*): reproducible from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below
    }
}

fn chain(folder: &Folder) -> Result<()> {
    let seed = std::env::var("NATIVE_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(20_261_123);
    let mut random = Random(seed);
    let moves = chain_length();
    let mut done = 0;
    while done < moves {
        let (vcpus, hot, rate) = (1 + random.next(2), 1 + random.next(48), random.next(60_000));
        let pattern = ["sequential", "random", "strided"][random.next(3) as usize];
        let cmdline = format!(
            "working_set_mib=96 hot_mib={hot} rate={rate} pattern={pattern} seed={}",
            random.next(1 << 30)
        );
        let context = |done| format!("after {done} moves, seed {seed}: {vcpus} vCPUs, {cmdline}");
        let mut from = Vmm::serve(folder, &format!("a{done}"))?;
        let mut to = Vmm::serve(folder, &format!("b{done}"))?;
        from.boot(memory_guest(folder, 192, vcpus as u32, &cmdline)?)?;
        from.console()?.line("memory: ready", LIMIT)?;
        for _ in 0..10.min(moves - done) {
            move_guest(&from, &to, "tcp:127.0.0.1:0").with_context(|| context(done))?;
            expect_ok(&mut to.console()?).with_context(|| context(done))?;
            from.api().put("vm.delete", &Value::Null)?;
            std::mem::swap(&mut from, &mut to);
            done += 1;
        }
    }
    println!("{done} moves in a row, lost_writes 0");
    Ok(())
}
