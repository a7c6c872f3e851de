# What a test's script has at hand on a lab host. Scripts run with -e and -u, in /tmp.

# Every limit in seconds is stretched by this factor on slow machines.
limit() { echo $(($1 * PATIENCE)); }

# Shows the end of what every program said.
diagnose() {
    for file in /tmp/*.out /tmp/*.err; do
        [ -s "$file" ] || continue
        echo "--- $file"
        tail -c 3000 "$file"
        echo
    done
}

# fail WHY: an explicit failure, never retried.
fail() {
    echo "FAIL: $*"
    diagnose
    exit 1
}

# hang WHY: no result. The emulator can lose a guest, so the lab boots again, and counts it.
hang() {
    echo "HANG: $*"
    diagnose
    echo "LAB-HANG-$NONCE $*"
    poweroff -f
}

# start NAME PROGRAM ARGS…: in the background; input from /tmp/NAME.in, output to NAME.out and NAME.err.
start() {
    name=$1
    shift
    [ -p "/tmp/$name.in" ] || mkfifo "/tmp/$name.in"
    # Opened for both ways, the pipe neither blocks here nor ends between two writers.
    "$@" 0<>"/tmp/$name.in" >"/tmp/$name.out" 2>"/tmp/$name.err" &
    echo $! >"/tmp/$name.pid"
}

# tell NAME LINE: types a line.
tell() { printf '%s\n' "$2" >"/tmp/$1.in"; }

# alive NAME: whether a started program still runs.
alive() { kill -0 "$(cat "/tmp/$1.pid")" 2>/dev/null; }

# expect NAME PATTERN [TIMES]: waits until NAME has printed PATTERN (a basic regular expression) on so many lines.
expect() {
    times=${3:-1}
    tries=$(limit 600)
    while :; do
        lives=0
        alive "$1" && lives=1
        seen=$(tr -d '\r' <"/tmp/$1.out" | grep -a -c -e "$2" || :)
        [ "${seen:-0}" -ge "$times" ] && return 0
        [ "$lives" = 1 ] || fail "$1 ended while \`$2\` was awaited"
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || hang "$1 did not print \`$2\` ($times)"
        usleep 100000
    done
}

# ends NAME STATUS: waits until NAME ends and compares its exit status.
ends() {
    tries=$(limit 600)
    while alive "$1"; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || hang "$1 did not end"
        usleep 100000
    done
    status=0
    wait "$(cat "/tmp/$1.pid")" || status=$?
    [ "$status" = "$2" ] || fail "$1 ended with $status, not $2"
}

# until_ok SECONDS COMMAND…: repeats a command until it succeeds.
until_ok() {
    tries=$(limit "$1")
    shift
    until "$@" >/tmp/until_ok.log 2>&1; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || fail "never succeeded: $*: $(cat /tmp/until_ok.log)"
        sleep 1
    done
}

# share FILE AS: offers a file to the other host, whole at once.
share() {
    cp "$1" "/tmp/shared/$2.partial"
    mv "/tmp/shared/$2.partial" "/tmp/shared/$2"
}

# signal NAME: what the other host's `await NAME` waits for.
signal() { : >"/tmp/shared/$1"; }

# await NAME [FILE]: waits until the other host has signalled or shared NAME; keeps it in FILE.
await() {
    tries=$(limit 300)
    # Not wget's own -T: with it Debian's static busybox crashes.
    until timeout 5 wget -q -O "${2:-/dev/null}" "http://$PEER/$1" 2>/dev/null; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || hang "the other host never came to $1"
        usleep 200000
    done
}
