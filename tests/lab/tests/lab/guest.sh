# What scripts do with a stock guest under the product. VCPUS is how many the guest has.

# boot NAME: runs the guest of /vm.json to its shell; its API is at /tmp/NAME.sock.
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
    start "$1" $preload vmm run --config /vm.json --api-socket "/tmp/$1.sock" --hypervisor "$hypervisor"
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

# receive NAME URL: waits for a guest, and listens when this returns.
receive() {
    start "$1" $preload vmm receive "$2" --serial tty --api-socket "/tmp/$1.sock" --hypervisor "$hypervisor"
    tries=$(limit 300)
    until grep -q '^listening on' "/tmp/$1.err"; do
        alive "$1" || fail "$1 ended before it listened"
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || fail "$1 never listened"
        usleep 100000
    done
}

# move_away NAME URL: moves the guest there; the source ends with success.
move_away() {
    vmm send "$2" --api-socket "/tmp/$1.sock" >/tmp/send.out 2>/tmp/send.err || fail "send ended with $?"
    cat /tmp/send.out
    ends "$1" 0
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
