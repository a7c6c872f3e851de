//! Disks, network interfaces and the other devices of stock guests: at work while the guest moves, coming and going, growing.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::{Cpu, Entry, Host, Kernel, Lab};
use libtest_mimic::Trial;

use crate::hangs;
use crate::stock::{BackEnd, Guest, bare_host, built};
use crate::trial;

/// What a guest's kernel needs for its devices, where it is not built in.
pub(crate) const MODULES: [&str; 16] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "rng-core",
    "virtio-rng",
    "virtio_balloon",
    "virtio_console",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];

/// A bridge with the cable to the other host and a TAP interface for the guest.
const BRIDGE: &str = r"
            brctl addbr br0
            ip link set br0 up
            ip addr flush dev eth0
            brctl addif br0 eth0
            ip addr add $ADDRESS/24 dev br0
            tunctl -t tap0
            brctl addif br0 tap0
            ip link set tap0 up
            ";

type Body = (&'static str, fn(Guest) -> Result<()>);

const BODIES: [Body; 8] = [
    ("writes_go_on_over_moves", writes_go_on_over_moves),
    ("devices_come_and_go", devices_come_and_go),
    ("a_vsock_comes_and_goes", vsock_comes_and_goes),
    ("passed_descriptors", passed_descriptors),
    ("a_watchdog_resets_a_guest_that_has_hung", hangs::watchdog),
    ("a_panic_is_heard_of", hangs::panic),
    ("a_stream_survives_a_move_to_another_host", stream),
    ("two_guests_on_a_bridge", two_guests),
];

/// Every test of devices.
pub(crate) fn trials() -> Vec<Trial> {
    let guest = |back_end, kernel, entry, vcpus| Guest {
        back_end,
        kernel,
        entry,
        vcpus,
        model: "host",
    };
    let mut trials = Vec::new();
    for (name, body) in BODIES {
        for guest in [
            guest(BackEnd::Kvm, Kernel::Debian61, Entry::BzImage, 1),
            guest(BackEnd::Kvm, Kernel::Debian612, Entry::Pvh, 2),
        ] {
            trials.push(trial(
                format!("devices::{name}::{}", guest.name()),
                move || body(guest),
            ));
        }
    }
    trials.push(trial(
        "devices::offloads_that_a_destination_lacks".to_owned(),
        offloads_that_a_destination_lacks,
    ));
    let cells = [
        guest(BackEnd::Kvm, Kernel::Debian61, Entry::Pvh, 1),
        guest(BackEnd::Kvm, Kernel::Debian612, Entry::BzImage, 4),
        guest(BackEnd::Mshv, Kernel::Debian612, Entry::Pvh, 2),
    ];
    for guest in cells {
        trials.push(trial(
            format!("devices::root_on_a_disk::{}", guest.name()),
            move || root_on_a_disk(guest),
        ));
    }
    for (guest, partitioned) in [
        (
            guest(BackEnd::Kvm, Kernel::Debian61, Entry::BzImage, 1),
            false,
        ),
        (
            guest(BackEnd::Kvm, Kernel::Debian612, Entry::BzImage, 1),
            true,
        ),
    ] {
        trials.push(trial(
            format!("devices::a_kernel_on_a_disk::{}", guest.name()),
            move || kernel_on_a_disk(guest, partitioned),
        ));
    }
    trials
}

/// A host with a guest that has these devices (JSON, with a comma before), and the programs that watch them.
pub(crate) fn host(guest: Guest, devices: &str) -> Result<Host> {
    let writes = built("writes", "WRITES_BIN", "probes")?;
    Ok(guest
        .host(Cpu::Max)?
        .data("vm.json", guest.config_with(devices, ""))
        .guest_modules(&MODULES)
        .guest_program(&writes, "bin/writes")
        .program(&writes, "bin/writes"))
}

/// A guest writes a disk, and a file on another one, while it moves, is written to files and restored; afterwards everything is there.
fn writes_go_on_over_moves(guest: Guest) -> Result<()> {
    let devices = r#", "disks": [
        {"path": "/tmp/raw.img", "id": "raw", "direct": false},
        {"path": "/tmp/fs.img", "id": "fs", "num_queues": 2, "serial": "LAB-FS"}
    ], "balloon": {"size": 0}"#;
    let host = host(guest, devices)?.data("image.ext4", ext4(None)?);
    let script = guest.back_end.prelude(guest.vcpus)
        + r"truncate -s 16M /tmp/raw.img
            cp /image.ext4 /tmp/fs.img
            boot src
            tell src 'cat /sys/block/vdb/serial; mount -t ext4 /dev/vdb /root && echo mounted-ok'
            expect src '^LAB-FS'
            expect src 'mounted-ok$'
            tell src 'dd if=/dev/zero of=/root/file bs=1M count=4 2>/dev/null; sync; echo filled-$?-'
            expect src 'filled-0-'
            tell src 'writes run /dev/vda /tmp/raw & writes run /root/file /tmp/file &'
            expect src 'writes: [0-9]* blocks' 2
            counts src
            from=src
            for i in 1 2 3; do
                receive dst$i unix:/tmp/move$i.sock --trust-source
                move_away $from unix:/tmp/move$i.sock
                arrived dst$i
                from=dst$i
            done
            sleep 1
            vmm ctl --api-socket /tmp/$from.sock pause
            vmm ctl --api-socket /tmp/$from.sock snapshot /tmp/saved
            vmm ctl --api-socket /tmp/$from.sock vmm-shutdown
            ends $from 0
            start restored $preload vmm restore /tmp/saved --serial tty --api-socket /tmp/restored.sock --hypervisor $hypervisor
            # What is typed before the guest is there is lost.
            until_ok 60 grep -q 'is restored' /tmp/restored.err
            from=restored
            tell $from 'rm /tmp/raw /tmp/file; sleep 3; cat /tmp/raw /tmp/file'
            expect $from 'writes-ok [0-9]* writes' 2
            ! grep -a WRITES-BAD /tmp/*.out || fail 'a disk has lost a write'
            tell $from 'killall writes; sleep 1; umount /root; sync; echo unmounted-$?-'
            expect $from 'unmounted-0-'
            tell $from 'poweroff -f'
            ends $from 0
            writes check /tmp/raw.img
            grep -a writes-ok /tmp/$from.out
            e2fsck -fn /tmp/fs.img || fail 'the file system is damaged'";
    host.program(Path::new("/usr/sbin/e2fsck"), "bin/e2fsck")
        .run(&script)?
        .success()
}

/// A disk and an interface are added, used, and taken away, before and after a move; the balloon takes memory and gives it back; a disk
/// grows; bad requests are refused by name.
fn devices_come_and_go(guest: Guest) -> Result<()> {
    let devices = r#", "balloon": {"size": 0, "free_page_reporting": true}, "vsock": {"cid": 7, "socket": "/tmp/vsock"},
        "console": {"mode": "File", "file": "/tmp/hvc"}"#;
    let vsock = built("vsock", "VSOCK_BIN", "probes")?;
    let host = host(guest, devices)?
        .guest_program(&vsock, "bin/vsock")
        .program(&vsock, "bin/vsock");
    let script = guest.back_end.prelude(guest.vcpus)
        + r#"api() { vmm ctl --api-socket /tmp/$vm.sock "$@"; }
            refused() {
                word=$1
                shift
                api "$@" >/tmp/api.out 2>/tmp/api.err && fail "accepted: $*"
                grep -q "$word" /tmp/api.err || fail "not for $word: $(cat /tmp/api.err)"
            }
            # round N: with the machine $vm.
            round() {
                truncate -s 8M /tmp/hot.img
                api add-disk /tmp/hot.img --id hot | tee /tmp/added
                grep -q '"bdf": "0000:00:' /tmp/added || fail 'no address'
                refused 'in use' add-disk /tmp/hot.img --id again
                refused 'hot. is there twice' add-disk /tmp/other.img --id hot
                refused 'does not exist' add-disk /tmp/nowhere.img
                tell $vm "until [ -b /dev/vda ]; do sleep 1; done; echo disk-$1-\$(cat /sys/block/vda/size)"
                expect $vm "disk-$1-16384"
                tell $vm "dd if=/dev/urandom of=/dev/vda bs=64k count=16 oflag=direct 2>/dev/null; md5sum /dev/vda | sed 's/ .*/-sum-$1/'"
                expect $vm "^[0-9a-f]\{32\}-sum-$1"
                sum=$(tr -d '\r' </tmp/$vm.out | sed -n "s/.*\([0-9a-f]\{32\}\)-sum-$1.*/\1/p" | tail -1)
                [ "$(md5sum </tmp/hot.img | cut -c1-32)" = "$sum" ] || fail 'the disk holds something else'
                api resize-disk hot 16777216
                tell $vm "until [ \$(cat /sys/block/vda/size) = 32768 ]; do sleep 1; done; echo grown-$1-ok"
                expect $vm "grown-$1-ok\$"
                api remove-device hot
                tell $vm "while [ -e /sys/block/vda ]; do sleep 1; done; echo gone-$1-ok"
                expect $vm "gone-$1-ok\$"
                until_ok 20 sh -c "! vmm ctl --api-socket /tmp/$vm.sock info | grep -q hot.img"
                refused 'no device .hot.' remove-device hot
                api add-net --id nic --mac 52:54:00:00:00:0$1
                tell $vm "until [ -e /sys/class/net/eth0 ]; do sleep 1; done; cat /sys/class/net/eth0/address"
                expect $vm "^52:54:00:00:00:0$1"
                api remove-device nic
                tell $vm "while [ -e /sys/class/net/eth0 ]; do sleep 1; done; echo no-nic-$1-ok"
                expect $vm "no-nic-$1-ok\$"
                before=$(awk '/^VmRSS/ { print $2 }' /proc/$(cat /tmp/$vm.pid)/status)
                api resize --balloon 67108864
                until_ok 60 sh -c "vmm ctl --api-socket /tmp/$vm.sock counters | grep -q '\"actual_bytes\": 67108864'"
                after=$(awk '/^VmRSS/ { print $2 }' /proc/$(cat /tmp/$vm.pid)/status)
                echo "resident: $before kB, with the balloon $after kB"
                api resize --balloon 0
                until_ok 60 sh -c "vmm ctl --api-socket /tmp/$vm.sock counters | grep -q '\"actual_bytes\": 0'"
                tell $vm "echo console-$1-works >/dev/hvc0"
                until_ok 20 grep -q console-$1-works /tmp/hvc
                tell $vm "dd if=/dev/zero of=/big bs=1M count=48 2>/dev/null; rm /big"
                until_ok 60 sh -c "vmm ctl --api-socket /tmp/$vm.sock counters | grep -q '\"reported_pages\": [1-9]'"
                until_ok 20 sh -c "vsock ask $vsock_at 1000 hello-$1 | grep -q 'vsock: hello-$1'"
                vsock answer ${vsock_at}_1001 >/tmp/heard &
                answering=$!
                until_ok 10 [ -S ${vsock_at}_1001 ]
                tell $vm "vsock tell 1001 from-the-guest-$1"
                expect $vm "vsock: heard: from-the-guest-$1"
                wait $answering
                grep -q from-the-guest-$1 /tmp/heard || fail 'the host heard something else'
                rm ${vsock_at}_1001
                shell_works $vm
            }
            boot src
            vm=src
            vsock_at=/tmp/vsock
            refused 'balloon.size' resize --balloon 999
            tell src 'vsock echo 1000 &'
            expect src 'vsock: listening'
            tell src 'dd if=/dev/hwrng bs=16 count=1 2>/dev/null | md5sum; cat /sys/class/misc/hw_random/rng_current'
            expect src '^virtio_rng'
            round 1
            receive dst unix:/tmp/move.sock --trust-source --vsock /tmp/vsock-there
            vsock_at=/tmp/vsock-there
            move_away src unix:/tmp/move.sock
            arrived dst
            vm=dst
            round 2
            tell dst 'poweroff -f'
            ends dst 0"#;
    host.run(&script)?.success()
}

/// A vsock is added to a guest that runs, moves with it, goes, and another one comes; there is one at most.
fn vsock_comes_and_goes(guest: Guest) -> Result<()> {
    let vsock = built("vsock", "VSOCK_BIN", "probes")?;
    let host = host(guest, "")?
        .guest_program(&vsock, "bin/vsock")
        .program(&vsock, "bin/vsock");
    let script = guest.back_end.prelude(guest.vcpus)
        + r#"api() { vmm ctl --api-socket /tmp/$vm.sock "$@"; }
            refused() {
                word=$1
                shift
                api "$@" >/tmp/api.out 2>/tmp/api.err && fail "accepted: $*"
                grep -q "$word" /tmp/api.err || fail "not for $word: $(cat /tmp/api.err)"
            }
            # works N SOCKET COUNT: the host reaches the guest by SOCKET, and the guest the host; it listens here for the COUNT-th time.
            works() {
                tell $vm "vsock echo 100$1 &"
                expect $vm 'vsock: listening' $3
                until_ok 20 sh -c "vsock ask $2 100$1 hello-$1 | grep -q 'vsock: hello-$1'"
                vsock answer $2_200$1 >/tmp/heard &
                answering=$!
                until_ok 10 [ -S $2_200$1 ]
                tell $vm "vsock tell 200$1 from-the-guest-$1"
                expect $vm "vsock: heard: from-the-guest-$1"
                wait $answering
                grep -q from-the-guest-$1 /tmp/heard || fail 'the host heard something else'
            }
            boot src
            vm=src
            refused 'vsock.cid' add-vsock --cid 2 --socket /tmp/one
            refused 'no device .vsock.' remove-device vsock
            api add-vsock --cid 7 --socket /tmp/one --id talk | tee /tmp/added
            grep -q '"id": "talk"' /tmp/added && grep -q '"bdf": "0000:00:' /tmp/added || fail 'no address'
            refused 'has a vsock already, .talk.' add-vsock --cid 8 --socket /tmp/other
            works 1 /tmp/one 1
            receive dst unix:/tmp/move.sock --trust-source --vsock /tmp/there
            move_away src unix:/tmp/move.sock
            arrived dst
            vm=dst
            api info | grep -q '"pci_slot"' || fail 'its slot did not move'
            # What listened has gone with its connections, or has not heard of the move: a new port will do.
            works 2 /tmp/there 1
            tell dst 'killall vsock'
            api remove-device talk
            until_ok 30 sh -c "! vmm ctl --api-socket /tmp/dst.sock info | grep -q talk"
            [ ! -e /tmp/there ] || fail 'its socket is left'
            api add-vsock --cid 9 --socket /tmp/again
            works 3 /tmp/again 2
            tell dst 'killall vsock; poweroff -f'
            ends dst 0"#;
    host.run(&script)?.success()
}

/// Linux's TAPs take UDP to be segmented since 6.2: a guest that leaves that to its host is refused by an older one before a page moves, and
/// goes on; one that was told not to is let in.
fn offloads_that_a_destination_lacks() -> Result<()> {
    let guest = Guest {
        back_end: BackEnd::Kvm,
        kernel: Kernel::Debian612,
        entry: Entry::Pvh,
        vcpus: 1,
        // The same on both hosts, whatever their kernels' KVM adds.
        model: "x86-64-v2",
    };
    let with = |more: &str| {
        format!(r#", "net": [{{"tap": "tap0", "mac": "52:54:00:12:34:56", "id": "nic"{more}}}]"#)
    };
    let source = host(guest, &with(""))?
        .kernel(Kernel::Debian612)
        .data(
            "without.json",
            guest.config_with(&with(r#", "offload_ufo": false"#), ""),
        )
        .name("newer");
    let destination = bare_host(Cpu::Max)?.name("older");
    let prelude = guest.back_end.prelude(guest.vcpus);
    let [source, destination] = Lab::pair(source, destination).run(
        &(prelude.clone()
            + r#"boot src
            tell src 'ip link set eth0 up && echo up-$((1 + 1))-ok'
            expect src 'up-2-ok'
            await listening
            vmm send tcp:$PEER:4600 --api-socket /tmp/src.sock >/tmp/send.out 2>/tmp/send.err && fail 'it has moved'
            for word in 'phase reserve' 'device nic' VIRTIO_NET_F_GUEST_USO4 VIRTIO_NET_F_HOST_USO 'tap7 does not offer'; do
                grep -q "$word" /tmp/send.err || fail "no word of $word"
            done
            ! grep -q UFO /tmp/send.err || fail 'it names more than is missing'
            shell_works src
            tell src 'poweroff -f'
            ends src 0
            cp /without.json /vm.json
            boot second
            tell second 'ip link set eth0 up && echo up-$((1 + 1))-ok'
            expect second 'up-2-ok'
            await listening-again
            move_away second tcp:$PEER:4600"#),
        &(prelude
            + r"receive refused tcp:0.0.0.0:4600 --tap nic=tap7
            signal listening
            ends refused 1
            receive dst tcp:0.0.0.0:4600 --tap nic=tap7
            signal listening-again
            arrived dst
            shell_works dst
            tell dst 'poweroff -f'
            ends dst 0"),
    )?;
    source.success()?;
    destination.success()
}

/// A guest on a TAP that was opened for its process: it reboots, moves to one that was opened for that process, and is on the network.
fn passed_descriptors(guest: Guest) -> Result<()> {
    let passed = built("passed", "PASSED_BIN", "probes")?;
    let devices = r#", "net": [{"fds": [7, 9], "num_queues": 4, "mac": "52:54:00:12:34:56", "id": "nic", "offload_tso": false,
        "rate_limiter_config": {"bandwidth": {"size": 1000000, "refill_time": 100}}}]"#;
    let host = host(guest, devices)?.program(&passed, "bin/passed");
    let script = guest.back_end.prelude(guest.vcpus)
        + r"on_network() {
                tell $1 'ip addr add 10.0.9.2/24 dev eth0; ip link set eth0 up; echo net-$((20 + 1))-ok'
                expect $1 'net-21-ok$' $3
                until_ok 20 ping -c 1 -W 1 -I $2 10.0.9.2
            }
            # up NAME: once the process has it.
            up() {
                until_ok 20 [ -e /sys/class/net/$1 ]
                ip addr add 10.0.9.1/24 dev $1
                ip link set $1 up
            }
            vmm run --config /vm.json --hypervisor $hypervisor >/tmp/none.out 2>&1 && fail 'descriptors that nobody passed were taken'
            # Whatever has that number then is the process's own, or nothing.
            grep -q 'not one that was passed\|not open' /tmp/none.out || fail 'not for that'
            start src passed tapa 7,9 $preload vmm run --config /vm.json --api-socket /tmp/src.sock --hypervisor $hypervisor
            up tapa
            expect src GUEST-UP
            on_network src tapa 1
            tell src 'reboot -f'
            expect src GUEST-UP 2
            on_network src tapa 2
            hypervisor_args=$preload
            preload='passed tapb 11,12 '$hypervisor_args
            receive dst unix:/tmp/move.sock --tap nic=fd:11,12
            preload=$hypervisor_args
            ip addr flush dev tapa
            up tapb
            move_away src unix:/tmp/move.sock
            arrived dst
            until_ok 20 ping -c 1 -W 1 -I tapb 10.0.9.2
            shell_works dst
            tell dst 'poweroff -f'
            ends dst 0";
    host.run(&script)?.success()
}

/// A guest with an address on a bridge of its host answers pings and receives a stream; it moves to another host on the same network, and
/// the stream goes on.
fn stream(guest: Guest) -> Result<()> {
    let devices = r#", "net": [{"tap": "tap0", "mac": "52:54:00:12:34:56", "id": "nic"}]"#;
    let source = host(guest, devices)?.name("source");
    let destination = bare_host(Cpu::Max)?.name("destination");
    let prelude = guest.back_end.prelude(guest.vcpus);
    let [source, destination] = Lab::pair(source, destination).run(
        &(prelude.clone()
            + BRIDGE
            + r#"boot src
            tell src 'ip addr add 10.0.0.77/24 dev eth0 && ip link set eth0 up && echo net-ok'
            expect src 'net-ok$'
            until_ok 20 ping -c 1 -W 1 10.0.0.77
            counts src
            tell src 'nc -l -p 7000 -e /bin/cat &'
            sleep 1
            # A line every 20 ms through the guest and back: each number once and in order.
            (i=0; while [ ! -e /tmp/enough ]; do i=$((i + 1)); echo $i; usleep 20000; done; sleep 3) | nc 10.0.0.77 7000 >/tmp/echo.txt &
            ping -i 0.05 10.0.0.77 >/tmp/ping.txt 2>&1 &
            ping=$!
            until_ok 20 grep -q '^20$' /tmp/echo.txt
            await listening
            move_away src tcp:$PEER:4600
            share /tmp/src.out src.out
            last=$(tail -1 /tmp/echo.txt)
            want=$((last + 50))
            until_ok 40 sh -c "[ \$(tail -1 /tmp/echo.txt) -gt $want ]"
            : >/tmp/enough
            kill -INT $ping
            wait $ping || :
            sleep 4
            awk '$1 != NR { print; exit 1 }' /tmp/echo.txt || fail 'the stream has a gap'
            tail -3 /tmp/ping.txt
            echo streamed $(tail -1 /tmp/echo.txt) lines
            signal streamed
            await fetched"#),
        &(prelude
            + BRIDGE
            + r"receive dst tcp:0.0.0.0:4600 --tap nic=tap0
            signal listening
            await src.out /tmp/src.log
            await streamed
            goes_on src.log dst
            signal fetched
            tell dst 'poweroff -f'
            ends dst 0"),
    )?;
    source.success()?;
    destination.success()
}

/// Two guests on one bridge: one sends the other pings and a stream, and goes on while that one moves to another host. The stream has no gap,
/// and at most one ping is lost beyond those of the downtime.
fn two_guests(guest: Guest) -> Result<()> {
    let devices = |tap: u32| {
        format!(r#", "net": [{{"tap": "tap{tap}", "mac": "52:54:00:12:34:5{tap}", "id": "nic"}}]"#)
    };
    let source = host(guest, &devices(0))?
        .data("peer.json", guest.config_with(&devices(1), ""))
        .name("source");
    let destination = bare_host(Cpu::Max)?.name("destination");
    let prelude = guest.back_end.prelude(guest.vcpus);
    let [source, destination] = Lab::pair(source, destination).run(
        &(prelude.clone()
            + BRIDGE
            + r#"tunctl -t tap1
            brctl addif br0 tap1
            ip link set tap1 up
            boot peer /peer.json
            boot src
            for each in 'src 77' 'peer 78'; do
                set -- $each
                tell $1 "ip addr add 10.0.0.$2/24 dev eth0 && ip link set eth0 up && echo net-ok"
                expect $1 'net-ok$'
            done
            tell src 'nc -l -p 7000 -e /bin/cat &'
            tell peer 'until ping -c 1 -W 1 10.0.0.77 >/dev/null; do :; done; echo sees-$((1+1))-'
            expect peer 'sees-2-'
            tell peer '(i=0; while [ ! -e /enough ]; do i=$((i + 1)); echo $i; usleep 50000; done; sleep 5) | nc 10.0.0.77 7000 >/echo &'
            tell peer '(until [ $(cat /echo | wc -l) -ge 20 ]; do sleep 1; done; echo streams-$((1+1))-) &'
            expect peer 'streams-2-'
            tell peer 'ping -i 0.2 10.0.0.77 >/pings 2>&1 & sleep 2; echo pings-$((1+1))-'
            expect peer 'pings-2-'
            await listening
            move_away src tcp:$PEER:4600 --json
            tell peer 'want=$(($(tail -1 /echo) + 40)); until [ $(tail -1 /echo) -ge $want ]; do sleep 1; done; echo goes-$((1+1))-'
            expect peer 'goes-2-'
            tell peer ': >/enough; killall -INT ping; sleep 6; echo stopped-$((1+1))-'
            expect peer 'stopped-2-'
            tell peer "awk '\$1 != NR { exit 1 }' /echo && echo no-gap in \$((\$(wc -l </echo))) lines; grep transmitted /pings"
            expect peer 'no-gap in [0-9]'
            expect peer 'packets received'
            downtime=$(sed -n 's/.*"downtime_ms": *\([0-9]*\).*/\1/p' /tmp/send.out | tail -1)
            [ -n "$downtime" ] || fail "no downtime in $(cat /tmp/send.out)"
            set -- $(tr -d '\r' </tmp/peer.out | sed -n 's/^\([0-9]*\) packets transmitted, \([0-9]*\) packets received.*/\1 \2/p')
            lost=$(($1 - $2))
            echo "of $1 pings $2 came back, downtime $downtime ms"
            # Those sent while the guest stood still, one more, and the very last, which nobody waits for.
            [ $lost -le $((downtime / 200 + 1 + 1 + 1)) ] || fail "$lost pings are lost, in a downtime of $downtime ms"
            signal done
            tell peer 'poweroff -f'
            ends peer 0
            await fetched"#),
        &(prelude
            + BRIDGE
            + r"receive dst tcp:0.0.0.0:4600 --tap nic=tap0
            signal listening
            arrived dst
            await done
            tell dst 'poweroff -f'
            ends dst 0
            signal fetched
            sleep 3"),
    )?;
    source.success()?;
    destination.success()
}

/// The guest's whole user space is on a disk; it reboots, and powers off cleanly.
fn root_on_a_disk(guest: Guest) -> Result<()> {
    let devices = r#", "disks": [{"path": "/tmp/root.img", "id": "root"}]"#;
    let root = guest_tree(guest)?;
    let host = guest
        .host(Cpu::Max)?
        .data("vm.json", guest.config_with(devices, " labroot=/dev/vda"))
        .guest_modules(&MODULES)
        .data("root.ext4", ext4(Some(root.path()))?)
        .program(Path::new("/usr/sbin/e2fsck"), "bin/e2fsck")
        // The emulator loses guests with several vCPUs now and then: no need to wait long to see it.
        .limit(std::time::Duration::from_secs(120));
    let script = guest.back_end.prelude(guest.vcpus)
        + r"cp /root.ext4 /tmp/root.img
            boot vm
            expect vm '^ROOT-ON-DISK /dev/vda'
            shell_works vm
            tell vm 'echo kept >/kept; sync; reboot -f'
            expect vm '^ROOT-ON-DISK /dev/vda' 2
            shell_works vm
            tell vm 'cat /kept; mount -o remount,ro / && echo read-only-ok'
            expect vm '^kept'
            expect vm 'read-only-ok$'
            tell vm 'poweroff -f'
            ends vm 0
            e2fsck -fn /tmp/root.img || fail 'the file system is damaged'";
    host.run(&script)?.success()
}

/// No kernel is named: the one on the disk is booted, and another entry once the guest has changed it and reboots.
fn kernel_on_a_disk(guest: Guest, partitioned: bool) -> Result<()> {
    let tree = tempfile::tempdir()?;
    let entries = tree.path().join("boot/loader/entries");
    std::fs::create_dir_all(&entries)?;
    let boot = tree.path().join("boot");
    std::fs::copy(guest.kernel.file(guest.entry)?, boot.join("vmlinuz-1"))?;
    let initramfs = lab::Image::guest(guest.kernel, &MODULES)?.finish();
    std::fs::write(boot.join("initrd.img-1"), initramfs)?;
    std::fs::write(
        entries.join("lab.conf"),
        "version 1\nlinux /boot/vmlinuz-1\ninitrd /boot/initrd.img-1\n\
         options console=ttyS0 quiet noxsave panic=-1 labentry=first\n",
    )?;
    let mut disk = ext4_of(Some(tree.path()), 64)?;
    let (device, partition) = match partitioned {
        true => {
            disk = with_gpt(&disk);
            ("/dev/vda1", "\"partition\": *1")
        }
        false => ("/dev/vda", "\"disk\""),
    };
    let config = r#"{
        "disks": [{"path": "/tmp/root.img", "id": "root"}],
        "memory": {"size": 268435456}, "serial": {"mode": "Tty"}
    }"#;
    let host = bare_host(Cpu::Max)?
        .name(&guest.name())
        .data("vm.json", config)
        .data("root.img", disk);
    let script = guest.back_end.prelude(guest.vcpus)
        + &format!(
            r"mv /root.img /tmp/root.img
            boot vm
            shell_works vm
            tell vm 'cat /proc/cmdline'
            expect vm 'panic=-1 labentry=first$'
            vmm ctl --api-socket /tmp/vm.sock info >/tmp/info
            grep -q '{partition}' /tmp/info || fail 'vm.info does not say where the kernel was'
            grep -q '/boot/loader/entries/lab.conf' /tmp/info || fail 'vm.info does not say what named it'
            tell vm 'mkdir -p /mnt && mount -t ext4 {device} /mnt && sed -i s/first/second/ /mnt/boot/loader/entries/lab.conf && umount /mnt && reboot -f'
            expect vm GUEST-UP 2
            shell_works vm
            tell vm 'cat /proc/cmdline'
            expect vm 'panic=-1 labentry=second$'
            # Nothing is written and synced before the reset: the journal has it.
            tell vm 'mkdir -p /mnt && mount -t ext4 {device} /mnt && sed -i s/second/third/ /mnt/boot/loader/entries/lab.conf && sync && reboot -f'
            expect vm GUEST-UP 3
            shell_works vm
            tell vm 'cat /proc/cmdline'
            expect vm 'panic=-1 labentry=third$'
            tell vm 'poweroff -f'
            ends vm 0"
        );
    host.run(&script)?.success()
}

/// A disk with one partition, by a GPT.
fn with_gpt(file_system: &[u8]) -> Vec<u8> {
    let first = 2048_u64;
    let last = first + file_system.len() as u64 / 512 - 1;
    // Room for the table's copy at the end.
    let sectors = last + 1 + 34;
    let mut disk = vec![0; sectors as usize * 512];
    // The protective MBR's entry.
    disk[446 + 4] = 0xee;
    disk[446 + 8..446 + 12].copy_from_slice(&1_u32.to_le_bytes());
    disk[446 + 12..446 + 16].copy_from_slice(&(sectors as u32 - 1).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut entries = vec![0; 128 * 128];
    // Linux file system data, by GUID.
    entries[..16].copy_from_slice(&[
        0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d,
        0xe4,
    ]);
    entries[16..32].fill(1);
    entries[32..40].copy_from_slice(&first.to_le_bytes());
    entries[40..48].copy_from_slice(&last.to_le_bytes());
    let header = |here: u64, other: u64, table: u64| {
        let mut header = vec![0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&0x1_0000_u32.to_le_bytes());
        header[12..16].copy_from_slice(&92_u32.to_le_bytes());
        for (at, value) in [
            (24, here),
            (32, other),
            (40, 34),
            (48, sectors - 34),
            (72, table),
        ] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        header[56..72].fill(2);
        for (at, value) in [(80, 128), (84, 128), (88, crc32(&entries))] {
            header[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        }
        let sum = crc32(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header
    };
    let mut put = |sector: u64, bytes: &[u8]| {
        let at = sector as usize * 512;
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(1, &header(1, sectors - 1, 2));
    put(2, &entries);
    put(first, file_system);
    put(sectors - 33, &entries);
    put(sectors - 1, &header(sectors - 1, 1, sectors - 33));
    disk
}

/// CRC-32 as a GPT has it.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            sum >> 1 ^ if sum & 1 != 0 { 0xedb8_8320 } else { 0 }
        })
    })
}

/// A file system of 16 MiB, with what is in a folder.
fn ext4(tree: Option<&Path>) -> Result<Vec<u8>> {
    ext4_of(tree, 16)
}

/// One of so many MiB.
fn ext4_of(tree: Option<&Path>, mib: u64) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("image");
    std::fs::File::create(&image)?.set_len(mib << 20)?;
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs.args(["-q", "-t", "ext4", "-b", "4096"]);
    if let Some(tree) = tree {
        mke2fs.arg("-d").arg(tree);
    }
    let made = mke2fs
        .arg(&image)
        .status()
        .context("no mke2fs: apt-get install e2fsprogs")?;
    ensure!(made.success(), "mke2fs ended with {made}");
    Ok(std::fs::read(&image)?)
}

/// The user space of a guest as files, with a mark that it is on a disk.
fn guest_tree(guest: Guest) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let archive = lab::Image::guest(guest.kernel, &[])?.finish();
    let mut cpio = Command::new("busybox")
        .args(["cpio", "-idm", "--quiet"])
        .current_dir(folder.path())
        .stdin(std::process::Stdio::piped())
        .spawn()
        .context("no busybox: apt-get install busybox-static")?;
    std::io::Write::write_all(&mut cpio.stdin.take().context("no pipe")?, &archive)?;
    let unpacked = cpio.wait()?;
    ensure!(unpacked.success(), "cpio ended with {unpacked}");
    std::fs::write(folder.path().join("on-disk"), "")?;
    Ok(folder)
}
