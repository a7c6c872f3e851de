//! Guests that hang or panic: who notices, and what comes of it.

use anyhow::Result;

use crate::devices::host;
use crate::stock::Guest;

/// A guest pets its watchdog, moves and pets on; it is left alone when it stops the watchdog, and is reset when it stops petting it.
pub(crate) fn watchdog(guest: Guest) -> Result<()> {
    let host = host(guest, r#", "watchdog": true"#)?.guest_modules(&["watchdog", "wdat_wdt"]);
    let script = guest.back_end.prelude(guest.vcpus)
        + r#"# status NAME N: what the guest's kernel says of the watchdog, for the N-th time here.
            status() {
                tell $1 'cd /sys/class/watchdog/watchdog0; echo "watchdog-$(cat identity)-$(cat state)-$(cat bootstatus)-"; cd /'
                expect $1 '^watchdog-wdat_wdt-[a-z]*-[0-9]*-' $2
            }
            counter() { vmm ctl --api-socket /tmp/$1.sock counters | grep -A 4 '"watchdog"' | grep -q "$2"; }
            boot src
            status src 1
            expect src '^watchdog-wdat_wdt-inactive-0-'
            tell src 'watchdog -T 6 -t 1 /dev/watchdog0; sleep 1'
            status src 2
            expect src '^watchdog-wdat_wdt-active-0-'
            # Longer than it would live without.
            sleep 9
            shell_works src
            # While it is paused the time stands still.
            vmm ctl --api-socket /tmp/src.sock pause
            sleep 9
            vmm ctl --api-socket /tmp/src.sock resume
            shell_works src
            receive dst unix:/tmp/move.sock --trust-source
            move_away src unix:/tmp/move.sock
            arrived dst
            sleep 9
            shell_works dst
            counter dst '"resets": 0' || fail 'it has bitten a guest that petted it'
            counter dst '"running": 1' || fail 'it does not run'
            # Without the magic close it goes on, and nobody pets it.
            tell dst 'killall -9 watchdog'
            expect dst GUEST-UP
            grep -q 'watchdog was not petted' /tmp/dst.err || fail 'the log does not say why'
            counter dst '"resets": 1' || fail 'it was not counted'
            status dst 1
            expect dst '^watchdog-wdat_wdt-inactive-32-'
            # A guest that stops it is left alone.
            tell dst 'watchdog -T 6 -t 1 /dev/watchdog0; sleep 1; killall watchdog; sleep 9; echo left-$((2 + 2))-alone'
            expect dst 'left-4-alone'
            counter dst '"running": 0' || fail 'it runs'
            # Its own reset stops it, and forgets that it has bitten.
            tell dst 'watchdog -T 6 -t 1 /dev/watchdog0; sleep 1; reboot -f'
            expect dst GUEST-UP 2
            sleep 9
            status dst 2
            expect dst '^watchdog-wdat_wdt-inactive-0-'
            counter dst '"resets": 1' || fail 'a reset of its own was counted'
            tell dst 'poweroff -f'
            ends dst 0
            sed 's|, "watchdog": true||' /vm.json >/tmp/without.json
            start without $preload vmm run --config /tmp/without.json --api-socket /tmp/without.sock --hypervisor $hypervisor
            expect without GUEST-UP
            tell without '[ -e /sys/firmware/acpi/tables/APIC ] && [ ! -e /sys/firmware/acpi/tables/WDAT ] && echo no-$((1 + 1))-table'
            expect without 'no-2-table'
            tell without 'poweroff -f'
            ends without 0"#;
    host.run(&script)?.success()
}

/// A guest's kernel panics, after a move: the log and the counters say so, and it can be started again.
pub(crate) fn panic(guest: Guest) -> Result<()> {
    let host = host(guest, r#", "pvpanic": true"#)?.guest_modules(&["pvpanic", "pvpanic-mmio"]);
    let script = guest.back_end.prelude(guest.vcpus)
        + r#"boot src
            tell src 'ls -d /sys/bus/platform/drivers/pvpanic-mmio/QEMU0001:00 && echo found-$((1 + 1))-ok'
            expect src 'found-2-ok'
            receive dst unix:/tmp/move.sock --trust-source
            move_away src unix:/tmp/move.sock
            arrived dst
            shell_works dst
            vmm ctl --api-socket /tmp/dst.sock counters | grep -q '"panics": 0' || fail 'it was heard of too early'
            # It is to stay as it is, and not to restart by itself.
            tell dst 'echo 0 >/proc/sys/kernel/panic; echo c >/proc/sysrq-trigger'
            until_ok 30 grep -q "the guest's kernel has panicked" /tmp/dst.err
            until_ok 10 sh -c "vmm ctl --api-socket /tmp/dst.sock counters | grep -q 'panics.: 1'"
            vmm ctl --api-socket /tmp/dst.sock info | grep -q '"state": "Running"' || fail 'it does not run'
            vmm ctl --api-socket /tmp/dst.sock reboot
            expect dst GUEST-UP
            tell dst 'poweroff -f'
            ends dst 0"#;
    host.run(&script)?.success()
}
