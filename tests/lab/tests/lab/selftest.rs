//! The lab tested by itself: a lab that lies would make every other result worthless.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{Cpu, Entry, Kernel, Lab};
use libtest_mimic::Trial;

use crate::trial;

/// Every test of the lab itself.
pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = [Kernel::Debian61, Kernel::Debian612]
        .into_iter()
        .map(|kernel| {
            trial(
                format!("lab::host_has_kvm::{}", kernel.series()),
                move || host_has_kvm(kernel),
            )
        })
        .collect();
    trials.extend([
        trial("lab::a_scripts_status_and_files_arrive", status_and_files),
        trial("lab::a_failure_is_not_tried_again", failure_stands),
        trial("lab::a_hang_is_tried_again_and_counted", hang_is_retried),
        trial("lab::an_emulator_that_refuses_is_an_error", refusal),
        trial("lab::two_unlike_hosts_reach_each_other", pair),
    ]);
    for (kernel, entry) in [
        (Kernel::Debian61, Entry::BzImage),
        (Kernel::Debian612, Entry::Pvh),
    ] {
        trials.push(trial(
            format!(
                "lab::the_stock_guest_works_under_qemu::{}-{}",
                kernel.series(),
                entry.name()
            ),
            move || guest_under_qemu(kernel, entry),
        ));
    }
    trials
}

/// The control of every test with a stock guest: the same guest and script functions, another hypervisor.
fn guest_under_qemu(kernel: Kernel, entry: Entry) -> Result<()> {
    let mut host = Lab::host(Cpu::Max)
        .name("control")
        .guest(kernel, entry)
        .program(
            Path::new("/usr/bin/qemu-system-x86_64"),
            "bin/qemu-system-x86_64",
        )
        .data("lab/guest.sh", include_bytes!("guest.sh"));
    for (folder, names) in [
        ("/usr/share/seabios", ["bios-256k.bin"].as_slice()),
        (
            "/usr/share/qemu",
            &["kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin"],
        ),
    ] {
        for name in names {
            host = host.file(&Path::new(folder).join(name), &format!("bios/{name}"));
        }
    }
    host.run(
        ". /lab/guest.sh; VCPUS=1
         mkfifo /tmp/monitor.in /tmp/monitor.out
         start vm qemu-system-x86_64 -accel kvm -cpu host -m 256 -nodefaults -display none -L /bios \\
             -chardev stdio,id=serial,signal=off -serial chardev:serial \\
             -chardev pipe,id=monitor,path=/tmp/monitor -mon chardev=monitor \\
             -kernel /guest/kernel -initrd /guest/initramfs -append 'console=ttyS0 quiet noxsave panic=-1'
         expect vm GUEST-UP
         shell_works vm
         tell vm 'counter &'
         expect vm 'count 5$'
         tell vm 'reboot -f'
         expect vm POWER-BUTTON-READY 2
         shell_works vm
         echo system_powerdown >/tmp/monitor.in
         expect vm POWER-BUTTON-PRESSED
         ends vm 0",
    )?
    .success()
}

fn host_has_kvm(kernel: Kernel) -> Result<()> {
    let host = Lab::host(Cpu::Max).name(kernel.series()).kernel(kernel);
    let script =
        "[ -c /dev/kvm ]; [ \"$(cat /sys/module/kvm_amd/parameters/npt)\" != 0 ]; uname -r";
    let outcome = host.run(script)?;
    outcome.success()?;
    ensure!(
        outcome.log.contains(&format!("\n{}.", kernel.series())),
        "another kernel:\n{}",
        outcome.log
    );
    Ok(())
}

fn status_and_files() -> Result<()> {
    let outcome = Lab::host(Cpu::Max)
        .name("status")
        .data("some/where/data", "content of it\n")
        .program(Path::new("/usr/bin/env"), "some/env")
        .run("cat /some/where/data; /some/env printf 'ran %s\\n' well; exit 7")?;
    ensure!(
        outcome.exit == Some(7),
        "exit status {:?}:\n{}",
        outcome.exit,
        outcome.log
    );
    ensure!(
        outcome.log.contains("content of it\nran well\n"),
        "{}",
        outcome.log
    );
    ensure!(
        outcome.success().is_err(),
        "a status of 7 must not be a success"
    );
    Ok(())
}

fn failure_stands() -> Result<()> {
    let outcome = Lab::host(Cpu::Max)
        .name("failure")
        .run("fail 'on purpose'")?;
    ensure!(
        outcome.exit == Some(1) && outcome.retries == 0,
        "{outcome:?}"
    );
    Ok(())
}

/// The first boot calls itself hung, the second stays silent past its limit, the third answers.
fn hang_is_retried() -> Result<()> {
    let name = "hang on purpose";
    let outcome = Lab::host(Cpu::Max)
        .name(name)
        .limit(Duration::from_secs(20))
        .run("case $ATTEMPT in 0) hang 'said so';; 1) sleep 1000;; *) exit 5;; esac")?;
    ensure!(
        outcome.exit == Some(5) && outcome.retries == 2,
        "{outcome:?}"
    );
    let noted: Vec<_> = lab::retries()
        .into_iter()
        .filter(|note| note.starts_with(name))
        .collect();
    ensure!(
        noted.len() == 2 && noted[0].ends_with("said so"),
        "{noted:?}"
    );
    Ok(())
}

fn refusal() -> Result<()> {
    let error = Lab::host(Cpu::Custom("no-such-cpu".to_owned()))
        .name("refused")
        .run("exit 0")
        .map(|_| ());
    let message = error
        .err()
        .map(|error| format!("{error:#}"))
        .unwrap_or_default();
    ensure!(
        message.contains("did not start") && message.contains("no-such-cpu"),
        "{message}"
    );
    Ok(())
}

fn pair() -> Result<()> {
    let first = Lab::host(Cpu::Max).name("first");
    let second = Lab::host(Cpu::EpycRome).name("second");
    let [first, second] = Lab::pair(first, second).run(
        "until_ok 20 ping -c 1 -W 1 $PEER; echo 'from the first' >/tmp/note; share /tmp/note note; await done
         await tsc /tmp/other; dmesg | grep -o 'clocksource: tsc: .*' >/tmp/tsc; cmp /tmp/tsc /tmp/other
         grep -m 1 'model name' /proc/cpuinfo; [ -c /dev/kvm ]",
        "await note /tmp/note; cat /tmp/note; grep -m 1 'model name' /proc/cpuinfo; [ -c /dev/kvm ]
         dmesg | grep -o 'clocksource: tsc: .*' | tee /tmp/tsc; share /tmp/tsc tsc; signal done; sleep 2",
    )?;
    first.success()?;
    second.success()?;
    ensure!(second.log.contains("from the first"), "{}", second.log);
    ensure!(
        first.log.contains("TCG") && second.log.contains("EPYC-Rome"),
        "{}{}",
        first.log,
        second.log
    );
    Ok(())
}
