//! vCPUs of stock guests come and go: at run time, after a move, over a reset.

use std::time::Duration;

use anyhow::Result;
use lab::{Cpu, Entry, Host, Kernel, Lab};
use libtest_mimic::Trial;

use crate::stock::{BackEnd, Guest, bare_host};
use crate::trial;

/// Every test of vCPUs that come and go.
pub(crate) fn trials() -> Vec<Trial> {
    let guest = |back_end, kernel, entry| Guest {
        back_end,
        kernel,
        entry,
        vcpus: 1,
        model: "host",
    };
    let first = guest(BackEnd::Kvm, Kernel::Debian61, Entry::BzImage);
    let second = guest(BackEnd::Kvm, Kernel::Debian612, Entry::Pvh);
    let mshv = guest(BackEnd::Mshv, Kernel::Debian612, Entry::Pvh);
    let mut trials = Vec::new();
    let mut add = |name: &str, guest: Guest, body: fn(Guest) -> Result<()>| {
        trials.push(trial(
            format!("devices::vcpus::{name}::{}", guest.name()),
            move || body(guest),
        ));
    };
    for guest in [first, second] {
        add("come_and_go", guest, come_and_go);
    }
    add("come_and_go", mshv, come_and_go_by_one);
    add("stay_where_the_guest_wants_it", second, refusal);
    add("come_and_go_between_hosts", first, between_hosts);
    add("come_back_from_a_snapshot", second, snapshot);
    trials
}

/// A machine with one vCPU that may have four.
fn host(guest: Guest) -> Result<Host> {
    Ok(guest
        .host(Cpu::Max)?
        .data("vm.json", guest.config_growing(4))
        .limit(Duration::from_secs(240)))
}

/// What scripts do with the machine `$vm`. Debian's kernels do not bring a vCPU online by themselves.
const FUNCTIONS: &str = r#"
    api() { timeout 60 vmm ctl --api-socket /tmp/$vm.sock "$@"; }
    # refused WORD ARGS…: the request is refused for this.
    refused() {
        word=$1
        shift
        api "$@" >/tmp/api.out 2>/tmp/api.err && fail "accepted: $*"
        grep -q "$word" /tmp/api.err || fail "not for $word: $(cat /tmp/api.err)"
    }
    # shows PATTERN: what vm.info comes to show, in one line.
    shows() {
        until_ok 30 sh -c "timeout 60 vmm ctl --api-socket /tmp/$vm.sock info | tr -d ' \n' | grep -q '$1'"
    }
    # settled N: the guest has done what it was to do.
    settled() {
        VCPUS=$1
        shows "\"desired\":$1,\"pending\":\[\],\"present\":$1,\"refused\":\[\]"
        shell_works $vm
    }
    # works N: the guest computes on its vCPU N, and says that it was there (proc(5): the 39th of stat).
    works() {
        turn=$((${turn:-0} + 1))
        tell $vm "taskset -c $1 sh -c 'i=0; while [ \$i -lt 3000 ]; do i=\$((i + 1)); done; cut -d\" \" -f39 /proc/self/stat' | sed 's/^/on-$turn-/; s/\$/-done/'"
        expect $vm "on-$turn-$1-done"
    }
    # grow N: there are N; the last is at work.
    grow() {
        turn=$((${turn:-0} + 1))
        api resize --cpus $1
        tell $vm "until [ -e /sys/devices/system/cpu/cpu$(($1 - 1)) ]; do sleep 1; done; for c in /sys/devices/system/cpu/cpu[1-9]*; do echo 1 >\$c/online; done; echo grown-$turn-\$(cat /sys/devices/system/cpu/online)-now"
        expect $vm "grown-$turn-0-$(($1 - 1))-now"
        settled $1
        works $(($1 - 1))
    }
    # shrink N: the guest lets all but N go.
    shrink() {
        turn=$((${turn:-0} + 1))
        api resize --cpus $1
        tell $vm "while [ -e /sys/devices/system/cpu/cpu$1 ]; do sleep 1; done; echo shrunk-$turn-\$(nproc)-now"
        expect $vm "shrunk-$turn-$1-now"
        settled $1
    }
    # clocks: the TSC of none that came was found to differ from the others'. (A kernel that mistrusts the TSC anyway does not look.)
    clocks() {
        turn=$((${turn:-0} + 1))
        tell $vm "dmesg | grep -i 'tsc warp\|check_tsc_sync' | sed 's/^/CLOCK-BAD /'; echo clocks-$turn-\$((turn + 0))-looked"
        expect $vm "clocks-$turn-0-looked"
        ! grep -a '^CLOCK-BAD' /tmp/$vm.out || fail 'the clocks differ'
    }
    vm=src
"#;

fn script(guest: Guest, script: &str) -> String {
    guest.back_end.prelude(guest.vcpus) + FUNCTIONS + script
}

fn come_and_go(guest: Guest) -> Result<()> {
    let script = script(
        guest,
        r"boot src
            refused '1 to 4' resize --cpus 0
            refused '1 to 4' resize --cpus 5
            settled 1
            grow 4
            works 1
            works 2
            clocks
            shrink 2
            works 1
            grow 3
            counts src
            receive dst unix:/tmp/move.sock --trust-source
            move_away src unix:/tmp/move.sock
            arrived dst
            goes_on src.out dst
            vm=dst
            settled 3
            works 2
            shrink 1
            grow 4
            clocks
            shrink 3
            tell dst 'reboot -f'
            expect dst GUEST-UP
            settled 3
            works 2
            shrink 2
            grow 4
            works 2
            tell dst 'reboot -f'
            expect dst GUEST-UP 2
            settled 4
            shrink 1
            tell dst 'poweroff -f'
            ends dst 0",
    );
    host(guest)?.run(&script)?.success()
}

fn come_and_go_by_one(guest: Guest) -> Result<()> {
    let script = script(
        guest,
        r"boot src
            settled 1
            grow 2
            works 0
            counts src
            receive dst unix:/tmp/move.sock --trust-source
            move_away src unix:/tmp/move.sock
            arrived dst
            goes_on src.out dst
            vm=dst
            settled 2
            shrink 1
            grow 2
            tell dst 'reboot -f'
            expect dst GUEST-UP
            settled 2
            works 1
            shrink 1
            tell dst 'poweroff -f'
            ends dst 0",
    );
    host(guest)?.run(&script)?.success()
}

/// A guest that lets nothing go is asked in vain, which shows; asked again, once it wants to, it does.
fn refusal(guest: Guest) -> Result<()> {
    let script = script(
        guest,
        r#"boot src
            grow 3
            tell src 'echo 0 >/sys/firmware/acpi/hotplug/processor/enabled; echo closed-$?-'
            expect src 'closed-0-'
            api resize --cpus 1
            # "Not supported by OSPM" (ACPI 6.5, table 6.18).
            shows '"present":3,"refused":\[{"id":1,"status":128},{"id":2,"status":128}\]'
            works 2
            receive dst unix:/tmp/move.sock --trust-source
            move_away src unix:/tmp/move.sock
            arrived dst
            vm=dst
            shows '"desired":1,"pending":\[\],"present":3,"refused":\[{"id":1,"status":128},{"id":2,"status":128}\]'
            works 2
            tell dst 'echo 1 >/sys/firmware/acpi/hotplug/processor/enabled; echo opened-$?-'
            expect dst 'opened-0-'
            shrink 1
            # What the guest ejects by itself is gone, and comes back.
            grow 2
            tell dst 'echo 1 >/sys/devices/system/cpu/cpu1/firmware_node/eject; while [ -e /sys/devices/system/cpu/cpu1 ]; do sleep 1; done; echo ejected-$(nproc)-'
            expect dst 'ejected-1-'
            shows '"desired":2,"pending":\[\],"present":1,'
            grow 2
            tell dst 'poweroff -f'
            ends dst 0"#,
    );
    host(guest)?.run(&script)?.success()
}

fn between_hosts(guest: Guest) -> Result<()> {
    let destination = bare_host(Cpu::Max)?.name("destination");
    let [source, destination] = Lab::pair(host(guest)?.name("source"), destination).run(
        &script(
            guest,
            r"boot src
            grow 3
            shrink 2
            counts src
            await listening
            move_away src tcp:$PEER:4600
            share /tmp/src.out src.out
            await fetched",
        ),
        &script(
            guest,
            r"vm=dst
            VCPUS=2
            receive dst tcp:0.0.0.0:4600
            signal listening
            await src.out /tmp/src.log
            signal fetched
            goes_on src.log dst
            settled 2
            grow 4
            shrink 1
            grow 3
            tell dst 'poweroff -f'
            ends dst 0",
        ),
    )?;
    source.success()?;
    destination.success()
}

fn snapshot(guest: Guest) -> Result<()> {
    let script = script(
        guest,
        r"boot src
            grow 3
            api pause
            # Grown while it stands still: the guest sees it when it goes on.
            api resize --cpus 4
            api snapshot /tmp/snapshot
            api resume
            grow 4
            tell src 'poweroff -f'
            ends src 0
            start dst $preload vmm restore /tmp/snapshot --serial tty --api-socket /tmp/dst.sock --hypervisor $hypervisor
            until_ok 30 sh -c 'vmm ctl --api-socket /tmp/dst.sock info | grep -q Running'
            vm=dst
            turn=50
            grow 4
            shrink 1
            grow 2
            tell dst 'poweroff -f'
            ends dst 0",
    );
    host(guest)?.run(&script)?.success()
}
