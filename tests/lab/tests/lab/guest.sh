# What scripts do with a stock guest under the product. VCPUS is how many the guest has.

# boot NAME [CONFIG]: runs the guest of CONFIG, or /vm.json, to its shell; its API is at /tmp/NAME.sock.
export VMM_LOG=${VMM_LOG:-info}

# on kvm | on mshv: which hypervisor the next boot or receive uses. There is no /dev/mshv here: its double answers.
on() {
    hypervisor=$1
    case $1 in
    kvm) preload= ;;
    mshv) preload="env LD_PRELOAD=/lib/libmshv_double.so" ;;
    *) fail "no hypervisor $1" ;;
    esac
}
on "${BACK_END:-kvm}"

boot() {
    start "$1" $preload vmm run --config "${2:-/vm.json}" --api-socket "/tmp/$1.sock" --hypervisor "$hypervisor"
    expect "$1" GUEST-UP
}

# shell_works NAME: the shell computes, which no echo of what was typed can fake, and sees all vCPUs.
shell_works() {
    number=$((${number:-40} + 1))
    tell "$1" "echo sum-\$(($number * 2))-cpus-\$(nproc)"
    expect "$1" "sum-$((number * 2))-cpus-$VCPUS"
}

# counts NAME: a counter runs in the guest, from its shell.
counts() {
    shell_works "$1"
    tell "$1" 'counter &'
    expect "$1" 'count 10$'
}

# receive NAME URL [ARGS…]: waits for a guest, and listens when this returns.
receive() {
    receiver=$1
    url=$2
    shift 2
    start "$receiver" $preload vmm receive "$url" --serial tty --api-socket "/tmp/$receiver.sock" --hypervisor "$hypervisor" "$@"
    tries=$(limit 300)
    until grep -q '^listening on' "/tmp/$receiver.err"; do
        alive "$receiver" || fail "$receiver ended before it listened"
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || fail "$receiver never listened"
        usleep 100000
    done
}

# move_away NAME URL [ARGS…]: moves the guest there; the source ends with success.
move_away() {
    mover=$1
    url=$2
    shift 2
    vmm send "$url" --api-socket "/tmp/$mover.sock" "$@" >/tmp/send.out 2>/tmp/send.err || fail "send ended with $?"
    cat /tmp/send.out
    ends "$mover" 0
}

# goes_on OUTPUT NAME: what was printed at the source, and then here by NAME, counts without gap or repeat, and goes on.
goes_on() {
    # The move may have cut the last line in two.
    last=$(tr -d '\r' <"/tmp/$1" | sed '$d' | sed -n 's/.*count \([0-9]*\)$/\1/p' | tail -1)
    [ -n "$last" ] || fail "the guest never counted at the source"
    expect "$2" "count $((last + 20))\$"
    # The last line may be one that is being printed.
    cat "/tmp/$1" "/tmp/$2.out" | tr -d '\r' | sed '$d' | sed -n 's/.*count \([0-9]*\)$/\1/p' >/tmp/counts
    awk '$1 != NR { print "line " NR " counts " $1; exit 1 }' /tmp/counts || fail 'the count has a gap or a repeat'
    echo "counted to $last at the source, to $(tail -1 /tmp/counts) in all"
    shell_works "$2"
}

# arrived NAME: the guest that NAME has waited for runs there.
arrived() {
    tries=$(limit 1800)
    until grep -q 'has arrived' "/tmp/$1.err"; do
        alive "$1" || fail "$1 ended before a guest arrived"
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || hang "nothing arrived at $1"
        usleep 100000
    done
}

# cpu_identity NAME: what the guest's kernel says of its processor, kept in /tmp/identities.
cpu_identity() {
    number=$((${number:-40} + 1))
    tell "$1" "echo identity-$number-\$(grep -v MHz /proc/cpuinfo | md5sum | cut -c1-32)"
    expect "$1" "identity-$number-[0-9a-f]\{32\}"
    tr -d '\r' <"/tmp/$1.out" | sed -n "s/.*identity-$number-\([0-9a-f]\{32\}\).*/\1/p" | tail -1 >>/tmp/identities
}

# now_ms: the time since the boot of this host, in milliseconds.
now_ms() { awk '{ printf "%d", $1 * 1000 }' /proc/uptime; }

# clock_behind NAME: how far the guest's clock is behind the host's, in milliseconds, in $behind. The guest looks at its clock some time
# after it was asked: the sample with the least of that counts.
clock_behind() {
    behind=-1000000000
    for sample in 1 2 3 4 5; do
        asked=$(now_ms)
        number=$((${number:-40} + 1))
        tell "$1" "awk '{ printf \"uptime-$number-%d-\\n\", \$1 * 1000 }' /proc/uptime"
        expect "$1" "uptime-$number-[0-9][0-9]*-"
        there=$(tr -d '\r' <"/tmp/$1.out" | sed -n "s/.*uptime-$number-\([0-9][0-9]*\)-.*/\1/p" | tail -1)
        [ $((asked - there)) -le "$behind" ] || behind=$((asked - there))
    done
}

# rounds NAME: how many rounds the guest's `features` had made when its file was last shown.
rounds() { tr -d '\r' <"/tmp/$1.out" | sed -n 's/.*features-ok [0-9]* of \([0-9]*\) rounds.*/\1/p' | tail -1; }
