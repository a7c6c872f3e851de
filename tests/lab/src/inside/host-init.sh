#!/bin/sh
# The init of a lab host: modules, link, then the test's script; its exit status leaves on a marker line.
export PATH=/bin:/sbin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
for module in $(cat /lib/m/order); do
    insmod "/lib/m/$module.ko" || echo "cannot load $module"
done
. /lab/env
export NONCE ADDRESS PEER PATIENCE ATTEMPT
ip link set lo up
mkdir -p /tmp/shared
if [ -n "$ADDRESS" ]; then
    ip addr add "$ADDRESS/24" dev eth0
    ip link set eth0 up
    httpd -p 80 -h /tmp/shared
fi
echo "LAB-UP-$NONCE $(cut -d' ' -f1 /proc/uptime)"
cd /tmp
sh -euc '. /lab/lib.sh; . /lab/script.sh' </dev/null
echo "LAB-RESULT-$NONCE $?"
poweroff -f
