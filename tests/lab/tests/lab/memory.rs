//! Stock guests that get memory and give it back while they run: before and after a move, over a reboot, over a snapshot.

use anyhow::Result;
use lab::{Cpu, Entry, Host, Kernel};
use libtest_mimic::Trial;

use crate::stock::{BackEnd, Guest, built};
use crate::trial;

/// What a guest's kernel needs for it, where it is not built in.
const MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_mem",
];

/// Every test of memory hotplug.
pub(crate) fn trials() -> Vec<Trial> {
    let guest = |back_end, kernel, entry, vcpus| Guest {
        back_end,
        kernel,
        entry,
        vcpus,
        model: "host",
    };
    let old = guest(BackEnd::Kvm, Kernel::Debian61, Entry::BzImage, 1);
    let new = guest(BackEnd::Kvm, Kernel::Debian612, Entry::Pvh, 2);
    let mshv = guest(BackEnd::Mshv, Kernel::Debian612, Entry::BzImage, 1);
    let mut trials = Vec::new();
    for guest in [old, new, mshv] {
        trials.push(trial(
            format!("devices::memory::grows_moves_and_shrinks::{}", guest.name()),
            move || grows_moves_and_shrinks(guest),
        ));
    }
    for guest in [old, new] {
        trials.push(trial(
            format!(
                "devices::memory::a_grown_guest_is_restored::{}",
                guest.name()
            ),
            move || a_grown_guest_is_restored(guest),
        ));
    }
    trials
}

/// A host with a guest of 256 MiB that can get 512 MiB more, and a program that fills memory and looks at it.
fn host(guest: Guest) -> Result<Host> {
    let config = guest
        .config_with("", " memhp_default_state=online_movable")
        .replace(
            r#""size": 268435456"#,
            r#""size": 268435456, "hotplug_method": "VirtioMem", "hotplug_size": 536870912"#,
        );
    Ok(guest
        .host(Cpu::Max)?
        .memory_mib(3072)
        .data("vm.json", config)
        .guest_modules(&MODULES)
        .guest_program(&built("fill", "FILL_BIN", "probes")?, "bin/fill"))
}

/// What the scripts have at hand; the machine is $vm.
const HELPERS: &str = r#"
    api() { vmm ctl --api-socket /tmp/$vm.sock "$@"; }
    refused() {
        word=$1
        shift
        api "$@" >/tmp/api.out 2>/tmp/api.err && fail "accepted: $*"
        grep -q "$word" /tmp/api.err || fail "not for $word: $(cat /tmp/api.err)"
    }
    # resident: memory of the process, in kB.
    resident() { awk '/^VmRSS/ { print $2 }' /proc/$(cat /tmp/$vm.pid)/status; }
    # plugged MIB: the guest has got so much, or given all but so much back.
    plugged() {
        until_ok 60 sh -c "vmm ctl --api-socket /tmp/$vm.sock counters | grep -q '\"plugged_bytes\": $(($1 << 20)),*\$'"
    }
    # resize MIB: asks for so much memory in all, and waits until the guest has it and its kernel uses it.
    resize() {
        api resize --memory ${1}M
        plugged $(($1 - 256))
        api info | grep -q "\"memory_actual_size\": $(($1 << 20)),*\$" || fail "vm.info does not say $1 MiB: $(api info)"
        total $1
    }
    # total MIB: all of so much memory is the kernel's, but for what it keeps for itself. What is typed is echoed, and must not be the answer.
    total() {
        step=$((${step:-0} + 1))
        low=$((($1 - 80) * 1024))
        high=$(($1 * 1024))
        tell $vm "while :; do set -- \$(grep MemTotal /proc/meminfo); [ \$2 -gt $low ] && [ \$2 -le $high ] && break; sleep 1; done; echo total-$step-is-\$2-"
        expect $vm "total-$step-is-[0-9][0-9]*-"
    }
    # filled: the program that fills memory goes on, and finds what it wrote.
    filled() {
        step=$((${step:-0} + 1))
        tell $vm "rm /tmp/fill; until [ -e /tmp/fill ]; do sleep 1; done; sed s/^/$step-/ /tmp/fill"
        expect $vm "$step-fill-ok"
        ! grep -a FILL-BAD /tmp/*.out || fail 'memory has lost something'
    }
    "#;

/// A guest grows, fills what it got, moves, grows again, shrinks, which the host feels, and keeps its size over a reboot.
fn grows_moves_and_shrinks(guest: Guest) -> Result<()> {
    let script = guest.back_end.prelude(guest.vcpus)
        + HELPERS
        + r"vm=src
            boot src
            total 256
            refused 268435456 resize --memory 200M
            refused 805306368 resize --memory 1G
            refused 'steps of 2097152' resize --memory 268435457
            resize 640
            tell src 'mkdir -p /tmp; fill 360 /tmp/fill &'
            expect src 'fill: 92160 pages'
            filled
            counts src
            echo resident: $(resident) kB
            receive dst unix:/tmp/move.sock --trust-source
            move_away src unix:/tmp/move.sock
            goes_on src.out dst
            vm=dst
            filled
            plugged 384
            total 640
            resize 768
            filled
            tell dst 'killall fill counter; echo killed-$?-'
            expect dst 'killed-0-'
            before=$(resident)
            resize 300
            after=$(resident)
            echo resident: $before kB, after giving back 468 MiB $after kB
            [ $((before - after)) -gt 250000 ] || fail 'the host has not got it back'
            resize 512
            tell dst 'fill 300 /tmp/fill &'
            expect dst 'fill: 76800 pages'
            filled
            tell dst 'reboot -f'
            expect dst GUEST-UP
            plugged 256
            total 512
            resize 256
            shell_works dst
            tell dst 'poweroff -f'
            ends dst 0";
    host(guest)?.run(&script)?.success()
}

/// A guest that has grown is written to files, which are no larger than what it holds, and made again of them.
fn a_grown_guest_is_restored(guest: Guest) -> Result<()> {
    let script = guest.back_end.prelude(guest.vcpus)
        + HELPERS
        + r#"vm=src
            boot src
            resize 512
            tell src 'mkdir -p /tmp; fill 200 /tmp/fill &'
            expect src 'fill: 51200 pages'
            filled
            counts src
            api pause
            api snapshot /tmp/snapshot
            api vmm-shutdown
            ends src 0
            length=$(wc -c </tmp/snapshot/memory)
            kept=$(du -k /tmp/snapshot/memory | cut -f1)
            echo memory file: $length bytes, $kept kB of them kept
            [ $length -gt 805306368 ] && [ $kept -lt 440000 ] || fail 'the file is not sparse'
            start dst $preload vmm restore /tmp/snapshot --serial tty --api-socket /tmp/dst.sock
            vm=dst
            until_ok 20 sh -c 'vmm ctl --api-socket /tmp/dst.sock info | grep -q Running'
            goes_on src.out dst
            filled
            plugged 256
            resize 640
            filled
            tell dst 'killall fill counter; echo killed-$?-'
            expect dst 'killed-0-'
            resize 300
            resize 512
            tell dst 'fill 260 /tmp/fill &'
            expect dst 'fill: 66560 pages'
            filled
            tell dst 'poweroff -f'
            ends dst 0"#;
    host(guest)?.run(&script)?.success()
}
