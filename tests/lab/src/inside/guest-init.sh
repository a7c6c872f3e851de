#!/bin/sh
# The init of a guest: a shell on the first serial port, a counter, and a power button that turns it off.
export PATH=/bin PS1='guest# '
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /lib/m/order); do
    insmod "/lib/m/$module.ko" || echo "cannot load $module"
done

# A root on a disk: its own init takes over, which is this one again.
root=$(sed -n 's/.*labroot=\([^ ]*\).*/\1/p' /proc/cmdline)
if [ -n "$root" ] && [ ! -e /on-disk ]; then
    mount -t ext4 "$root" /root && umount /proc /sys && exec switch_root /root /init
    echo "cannot boot from $root"
fi
[ ! -e /on-disk ] || echo "ROOT-ON-DISK $(sed -n 's/^\([^ ]*\) \/ ext4.*/\1/p' /proc/mounts)" >/dev/ttyS0

# Counts on the console for ever: each number once and in order, or something was lost.
cat >/bin/counter <<'END'
#!/bin/sh
i=0
while :; do
    i=$((i + 1))
    echo "count $i"
    usleep 50000
done
END
chmod 755 /bin/counter

# One struct input_event is 24 bytes: two 8-byte times, then type, code and value. EV_KEY is 1, KEY_POWER is 116.
watch_button() {
    for device in /sys/class/input/event*; do
        [ "$(cat "$device/device/name" 2>/dev/null)" = "Power Button" ] || continue
        echo "POWER-BUTTON-READY"
        while :; do
            set -- $(dd if="/dev/input/${device##*/}" bs=24 count=1 2>/dev/null | od -An -v -tu2)
            [ "$#" -ge 12 ] || return
            if [ "$9" = 1 ] && [ "${10}" = 116 ]; then
                echo "POWER-BUTTON-PRESSED"
                poweroff -f
            fi
        done
    done
}
watch_button </dev/null >/dev/ttyS0 2>&1 &

echo "GUEST-UP $(uname -r) cpus=$(nproc) uptime=$(cut -d' ' -f1 /proc/uptime)" >/dev/ttyS0
while :; do
    setsid sh -c 'exec sh -i </dev/ttyS0 >/dev/ttyS0 2>&1'
done
