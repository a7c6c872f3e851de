//! CPU models and clocks on lab hosts, where KVM intercepts CPUID and offsets the TSC.

use anyhow::Result;
use lab::{Cpu, Entry, Kernel, Lab};
use libtest_mimic::Trial;

use crate::stock::{BackEnd, Guest, bare_host, built};
use crate::trial;

/// Every test of CPU models and clocks.
pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![trial(
        "cpu::a_baseline_guest_moves_both_ways_and_a_host_guest_is_refused",
        unlike_hosts,
    )];
    trials.push(trial(
        "cpu::a_tsc_of_another_frequency_is_refused_unless_it_may_change",
        another_frequency,
    ));
    for (source, clock) in [("kvm-clock", ""), ("tsc", "clocksource=tsc tsc=reliable")] {
        for vcpus in [1, 2] {
            trials.push(trial(
                format!("cpu::time_goes_on_over_ten_moves::{source}-{vcpus}vcpu"),
                move || ten_moves(source, clock, vcpus),
            ));
        }
    }
    trials
}

fn guest(vcpus: u32) -> Guest {
    Guest {
        back_end: BackEnd::Kvm,
        kernel: Kernel::Debian61,
        entry: Entry::Pvh,
        vcpus,
        model: "host",
    }
}

/// Between a Zen 2 and a Zen 1 host, as far as the emulator has them: what one says of the other, the guest of the baseline of both, ten
/// times, and the guest of the richer one's own model, which stays.
fn unlike_hosts() -> Result<()> {
    let guest = guest(1);
    let features = built("features", "FEATURES_BIN", "probes")?;
    let rich = guest
        .host(Cpu::EpycRome)?
        .guest_program(&features, "bin/features")
        .name("rich");
    let poor = bare_host(Cpu::Epyc)?.name("poor");
    let [rich, poor] = Lab::pair(rich, poor).run(
        &(guest.back_end.prelude(guest.vcpus)
            + "vmm cpu dump >/tmp/rich.json
               share /tmp/rich.json rich.json
               await poor.json /tmp/poor.json
               vmm cpu compare /tmp/rich.json /tmp/poor.json | tee /tmp/compare.out
               grep -q '^superset' /tmp/compare.out || fail 'the richer host is no superset'
               grep -q clwb /tmp/compare.out || fail 'clwb is not among the reasons'
               boot own
               counts own
               await listening-0
               vmm send tcp:$PEER:4600 --api-socket /tmp/own.sock >/tmp/send.out 2>/tmp/send.err && fail 'a guest with clwb has moved'
               for name in clwb umip; do
                   grep -q $name /tmp/send.err || fail \"$name is not among the reasons\"
               done
               shell_works own
               tell own 'poweroff -f'
               ends own 0
               vmm cpu baseline /tmp/rich.json /tmp/poor.json >/tmp/both.json
               vmm cpu verify /tmp/both.json >/tmp/verify.out || fail \"the baseline: $(cat /tmp/verify.out)\"
               sed 's|\"model\": \"host\"|\"model\": \"/tmp/both.json\"|' /vm.json >/both.json
               start here vmm run --config /both.json --api-socket /tmp/here.sock
               expect here GUEST-UP
               counts here
               tell here 'features /tmp/features &'
               expect here 'features: [a-z]'
               cpu_identity here
               here=here
               for i in 1 2 3 4 5; do
                   await listening-$i
                   move_away $here tcp:$PEER:4600
                   receive back$i tcp:0.0.0.0:4600 --trust-source
                   signal back-$i
                   arrived back$i
                   here=back$i
                   cpu_identity $here
               done
               [ $(sort -u /tmp/identities | wc -l) = 1 ] || fail \"the guest's processor has changed: $(cat /tmp/identities)\"
               tr -d '\\r' </tmp/here.out | grep 'features: [a-z]'
               tell $here 'cat /tmp/features'
               expect $here 'features-ok [0-9]* of [0-9]* rounds'
               before=$(rounds $here)
               sleep 2
               tell $here 'cat /tmp/features'
               expect $here 'features-ok [0-9]* of [0-9]* rounds' 2
               [ $(rounds $here) -gt $before ] || fail 'the process that uses the features has stopped'
               shell_works $here
               tell $here 'reboot -f'
               expect $here GUEST-UP
               cpu_identity $here
               [ $(sort -u /tmp/identities | wc -l) = 1 ] || fail \"the processor is another one after a reboot: $(cat /tmp/identities)\"
               tell $here 'poweroff -f'
               ends $here 0"),
        &(guest.back_end.prelude(guest.vcpus)
            + "vmm cpu dump >/tmp/poor.json
               share /tmp/poor.json poor.json
               receive refused tcp:0.0.0.0:4600
               signal listening-0
               ends refused 1
               for i in 1 2 3 4 5; do
                   receive there$i tcp:0.0.0.0:4600 --trust-source
                   signal listening-$i
                   arrived there$i
                   cpu_identity there$i
                   await back-$i
                   move_away there$i tcp:$PEER:4600
               done
               [ $(sort -u /tmp/identities | wc -l) = 1 ] || fail \"the guest's processor has changed: $(cat /tmp/identities)\""),
    )?;
    rich.success()?;
    poor.success()
}

/// To a host whose kernel takes its TSC for slower than it is: refused before a page moves, and let in when the destination says so.
fn another_frequency() -> Result<()> {
    let guest = guest(1);
    let [source, destination] = Lab::pair(
        guest.host(Cpu::Max)?.name("source"),
        bare_host(Cpu::Max)?
            .kernel_args("tsc_early_khz=2000000")
            .name("slower"),
    )
    .run(
        &(guest.back_end.prelude(guest.vcpus)
            + "boot src
               counts src
               await listening
               vmm send tcp:$PEER:4600 --api-socket /tmp/src.sock >/tmp/send.out 2>/tmp/send.err && fail 'the TSC has changed'
               grep -q 'phase reserve.*TSC runs at [0-9]* kHz, this host.s at 2000000 kHz' /tmp/send.err || fail 'not for the TSC'
               shell_works src
               await listening-again
               move_away src tcp:$PEER:4600
               share /tmp/src.out src.out
               await fetched"),
        &(guest.back_end.prelude(guest.vcpus)
            + "receive refused tcp:0.0.0.0:4600
               signal listening
               ends refused 1
               receive dst tcp:0.0.0.0:4600 --allow-tsc-change
               signal listening-again
               await src.out /tmp/src.log
               signal fetched
               goes_on src.log dst
               tell dst 'poweroff -f'
               ends dst 0"),
    )?;
    source.success()?;
    destination.success()
}

/// Over ten moves the guest's clock stays with the host's, though the guest stands still in each; its processors never see a clock go back,
/// and no step that is much longer than the guest stood still.
///
/// In an idle emulator a move loses 11 to 16 ms of about 50: a message's way counts against the guest, and so does the time between reading a
/// TSC and reading the clock. A TSC that does not go on at all while its state travels loses 23. On a busy machine both are longer, so this
/// only finds clocks that are wrong by more than all of the time that the guest stood still.
fn ten_moves(source: &str, clock: &str, vcpus: u32) -> Result<()> {
    let guest = guest(vcpus);
    let clocks = built("clocks", "CLOCKS_BIN", "probes")?;
    let host = guest
        .host(Cpu::Max)?
        .guest_program(&clocks, "bin/clocks")
        .name("host");
    let script = guest.back_end.prelude(vcpus)
        + &format!(
            r#"sed 's|panic=-1|panic=-1 {clock}|' /vm.json >/clock.json
             mv /clock.json /vm.json
             boot src
             counts src
             tell src 'clocks /tmp/clocks &'
             expect src 'clocks: {vcpus} CPUs'
             tell src 'echo source-$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)-'
             expect src 'source-[a-z-]*-'
             grep -q 'source-{source}-' /tmp/src.out || fail 'the guest takes another clock than {source}'
             clock_behind src
             before=$behind
             from=src
             for i in 1 2 3 4 5 6 7 8 9 10; do
                 receive dst$i unix:/tmp/move$i.sock
                 move_away $from unix:/tmp/move$i.sock
                 cat /tmp/send.out >>/tmp/moves.out
                 arrived dst$i
                 from=dst$i
             done
             clock_behind $from
             echo "behind by $before ms, after ten moves by $behind ms"
             drift=$((behind - before))
             stood=$(sed -n 's/.*downtime \([0-9]*\).*ms,.*/\1/p' /tmp/moves.out | awk '{{ all += $1 }} END {{ print all }}')
             echo "the guest stood still for $stood ms in all"
             [ $drift -lt $((stood + 250)) ] && [ $drift -gt $((-stood - 250)) ] ||
                 fail "the guest's clock has drifted by $drift ms, and it stood still for $stood ms"
             still=$(sed -n 's/.*downtime \([0-9]*\).*ms,.*/\1/p' /tmp/moves.out | sort -n | tail -1)
             sleep 1
             tell $from 'cat /tmp/clocks'
             expect $from 'clocks-ok .* kHz'
             grep -h clocks-ok /tmp/$from.out
             step=$(tr -d '\r' </tmp/$from.out | sed -n 's/.*largest step \([0-9]*\) ms.*/\1/p' | tail -1)
             echo "the longest downtime is $still ms, the largest step $step ms"
             [ $step -lt $((still + 1000)) ] || fail 'the clock has jumped'
             grep -h '^CLOCKS-' /tmp/*.out && fail 'a clock went back'
             tell $from 'echo unstable-$(dmesg | grep -ci "clocksource.*unstable\|stall")-times'
             expect $from 'unstable-[0-9]*-times'
             grep -q unstable-0-times /tmp/$from.out || fail 'the guest takes its clock for unstable'
             tell $from 'poweroff -f'
             ends $from 0"#
        );
    host.run(&script)?.success()
}
