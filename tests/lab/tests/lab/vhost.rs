//! Stock guests with devices of vhost-user back ends: a file system of `virtiofsd`, a network, a disk.

use std::path::Path;

use anyhow::Result;
use lab::{Cpu, Entry, Kernel};
use libtest_mimic::Trial;

use crate::devices::MODULES;
use crate::stock::{BackEnd, Guest, built};
use crate::trial;

/// Of the package `qemu-system-common`.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

pub(crate) fn trials() -> Vec<Trial> {
    let guest = |kernel, entry, vcpus| Guest {
        back_end: BackEnd::Kvm,
        kernel,
        entry,
        vcpus,
        model: "host",
    };
    [
        guest(Kernel::Debian61, Entry::BzImage, 1),
        guest(Kernel::Debian612, Entry::Pvh, 2),
    ]
    .into_iter()
    .map(|guest| {
        let name = format!(
            "devices::vhost::file_systems_network_and_disk::{}",
            guest.name()
        );
        trial(name, move || all(guest))
    })
    .collect()
}

/// Files go both ways, through a file system that was there at the start and one that was added; while they are there the guest stays where it
/// is, and runs on. Without them it moves, and its network and its disk, which is written all the time, are served by other back ends.
fn all(guest: Guest) -> Result<()> {
    let devices = r#", "fs": [{"tag": "share", "socket": "/tmp/share.sock", "id": "share"}],
        "net": [{"vhost_user": true, "vhost_socket": "/tmp/net1.sock", "mac": "52:54:00:12:34:56", "id": "nic"}],
        "disks": [{"vhost_user": true, "vhost_socket": "/tmp/disk1.sock", "num_queues": 2, "id": "disk"}]"#;
    let config = guest
        .config_with(devices, "")
        .replace("268435456", "268435456, \"shared\": true");
    let writes = built("writes", "WRITES_BIN", "probes")?;
    let back_end = built("vhost-back-end", "VHOST_BACK_END", "vhost-back-end")?;
    let modules: Vec<&str> = MODULES
        .iter()
        .copied()
        .chain(["fuse", "virtiofs"])
        .collect();
    let host = guest
        .host(Cpu::Max)?
        .data("vm.json", config)
        .guest_modules(&modules)
        .guest_program(&writes, "bin/writes")
        .program(&writes, "bin/writes")
        .program(&back_end, "bin/vhost-back-end")
        .program(Path::new(VIRTIOFSD), "bin/virtiofsd");
    let script = guest.back_end.prelude(guest.vcpus)
        + r#"serve() {
                name=$1
                shift
                "$@" >/tmp/$name.out 2>/tmp/$name.err &
                until_ok 20 [ -S /tmp/$name.sock ]
            }
            files() { serve $1 virtiofsd -f --socket-path=/tmp/$1.sock -o source=/tmp/$1 -o sandbox=chroot; }
            network() { serve $1 vhost-back-end net /tmp/$1.sock; }
            disk() { serve $1 vhost-back-end disk /tmp/$1.sock /tmp/disk.img 2; }
            api() { vmm ctl --api-socket /tmp/$vm.sock "$@"; }
            # round TAG: a file system is mounted and used.
            round() {
                tell src "mkdir /$1; until mount -t virtiofs $1 /$1; do sleep 1; done; cat /$1/here; echo from-the-guest >/$1/there; echo $1-\$?-ok"
                expect src "^$1-from-the-host"
                expect src "$1-0-ok\$"
                grep -q from-the-guest /tmp/$1/there || fail 'the host sees no file'
                tell src "dd if=/dev/urandom of=/$1/big bs=64k count=32 2>/dev/null; md5sum /$1/big | sed 's/ .*/-sum-$1/'"
                expect src "^[0-9a-f]\{32\}-sum-$1"
                sum=$(tr -d '\r' </tmp/src.out | sed -n "s/.*\([0-9a-f]\{32\}\)-sum-$1.*/\1/p" | tail -1)
                [ "$(md5sum </tmp/$1/big | cut -c1-32)" = "$sum" ] || fail 'the host sees another file'
                echo changed >/tmp/$1/here
                tell src "cat /$1/here | sed 's/^/seen-$1-/'"
                expect src "^seen-$1-changed"
            }
            pings() {
                tell $vm "ping -c 5 -i 0.2 10.9.0.77 >/tmp/ping; grep -c 'ttl=' /tmp/ping | sed 's/^/answers-$vm-/'"
                expect $vm "^answers-$vm-5"
            }
            mkdir /tmp/share /tmp/hot
            echo share-from-the-host >/tmp/share/here
            echo hot-from-the-host >/tmp/hot/here
            truncate -s 16M /tmp/disk.img
            files share
            network net1
            disk disk1
            boot src
            vm=src
            round share
            tell src 'ip addr add 10.9.0.1/24 dev eth0 && ip link set eth0 up && echo net-ok'
            expect src 'net-ok$'
            pings
            tell src 'writes run /dev/vda /tmp/raw &'
            expect src 'writes: [0-9]* blocks'
            files hot
            api add-fs hot /tmp/hot.sock --id hot | tee /tmp/added
            grep -q '"bdf": "0000:00:' /tmp/added || fail 'no address'
            round hot
            for what in 'send unix:/tmp/nobody.sock --api-socket /tmp/src.sock' 'ctl --api-socket /tmp/src.sock snapshot /tmp/snapshot'; do
                if [ "${what#ctl}" != "$what" ]; then api pause; fi
                vmm $what >/tmp/refused.out 2>/tmp/refused.err && fail "accepted: $what"
                grep -q 'device share: .*cannot hand them over' /tmp/refused.err || fail "no reason: $(cat /tmp/refused.err)"
            done
            api resume
            shell_works src
            tell src 'umount /share && umount /hot && echo unmounted-ok'
            expect src 'unmounted-ok$'
            api remove-device share
            api remove-device hot
            until_ok 20 sh -c '! vmm ctl --api-socket /tmp/src.sock info | grep -q \"tag\"'
            network net2
            disk disk2
            receive dst unix:/tmp/move.sock --vhost nic=/tmp/net2.sock --vhost disk=/tmp/disk2.sock
            move_away src unix:/tmp/move.sock
            arrived dst
            vm=dst
            pings
            tell dst 'cat /tmp/raw'
            expect dst 'writes-ok [0-9]* writes'
            # A back end that is killed comes back, with what it had begun.
            kill -9 $(pidof vhost-back-end | tr ' ' '\n' | while read pid; do grep -q disk2 /proc/$pid/cmdline && echo $pid; done)
            rm /tmp/disk2.sock
            shell_works dst
            disk disk2
            before=$(tr -d '\r' </tmp/dst.out | grep -a -c 'writes-ok' || :)
            tell dst 'sleep 2; cat /tmp/raw'
            expect dst 'writes-ok [0-9]* writes' $((before + 1))
            ! grep -a WRITES-BAD /tmp/*.out || fail 'a disk has lost a write'
            tell dst 'killall writes; sleep 1; sync; echo synced-$?-'
            expect dst 'synced-0-'
            tell dst 'poweroff -f'
            ends dst 0
            writes check /tmp/disk.img"#;
    host.run(&script)?.success()
}
