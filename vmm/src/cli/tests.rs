//! What the command line accepts.

use clap::CommandFactory;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("vmm").chain(line.split_whitespace()))
}

#[test]
fn command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn accepted() {
    let lines = [
        "run --config vm.json",
        "run --config vm.json --api-socket a.sock --hypervisor kvm",
        "--log-level debug run --config vm.json",
        "run --config vm.json --log-level warn,migration=trace",
        "serve --api-socket a.sock",
        "receive tcp:127.0.0.1:0",
        "receive unix:/tmp/x --api-socket a.sock --serial socket=/tmp/s",
        "send tcp:h:1 --api-socket a.sock",
        "send tcp:h:1 --api-socket a.sock --downtime-ms 5 --timeout-s 9 --timeout-strategy ignore --json",
        "ctl --api-socket a.sock ping",
        "ctl --api-socket a.sock info",
        "ctl --api-socket a.sock counters",
        "ctl --api-socket a.sock create vm.json",
        "ctl --api-socket a.sock boot",
        "ctl --api-socket a.sock pause",
        "ctl --api-socket a.sock resume",
        "ctl --api-socket a.sock reboot",
        "ctl --api-socket a.sock shutdown",
        "ctl --api-socket a.sock power-button",
        "ctl --api-socket a.sock delete",
        "ctl --api-socket a.sock jobs",
        "ctl --api-socket a.sock job 1",
        "ctl --api-socket a.sock cancel 1",
        "ctl --api-socket a.sock settle 1 resume_here",
        "ctl --api-socket a.sock settle 1 runs_there",
        "ctl --api-socket a.sock vmm-shutdown",
        "receive tcp:127.0.0.1:0 --allow-tsc-change",
        "receive tcp:127.0.0.1:0 --kernel k --initramfs i",
        "ctl --api-socket a.sock payload --kernel k --initramfs i",
        "ctl --api-socket a.sock payload --trust-source",
        "ctl --api-socket a.sock add-vsock --cid 3 --socket s --id v",
        "ctl --api-socket a.sock add-fs share fs.sock --id fs",
        "ctl --api-socket a.sock snapshot /srv/s",
        "restore /srv/s",
        "restore s --verify --serial off --disk a=b --tap c=d --vhost e=f",
        "restore s --prefault",
        "restore s --paused --api-socket a.sock",
        "cpu models",
        "cpu dump --hypervisor kvm",
        "cpu compare a.json host --json",
        "cpu baseline a.json b.json host --name both --cross-vendor",
        "cpu explain x86-64-v3 --json",
        "cpu verify EPYC-Rome --hypervisor mshv --json",
        "demo",
        "demo --json",
    ];
    for line in lines {
        if let Err(e) = parse(line) {
            panic!("`{line}`: {e}");
        }
    }
}

#[test]
fn refused() {
    let lines = [
        ("", "Usage"),
        ("run", "--config"),
        ("run --config a --hypervisor xen", "kvm"),
        ("cpu compare a.json", "<B>"),
        ("cpu baseline", "<HOST>"),
        ("serve", "--api-socket"),
        ("receive", "<URL>"),
        (
            "receive tcp:h:1 --serial fax",
            "use off, null, pty, tty, file=PATH or socket=PATH",
        ),
        ("send tcp:h:1", "--api-socket"),
        (
            "send tcp:h:1 --api-socket a --downtime-ms soon",
            "--downtime-ms",
        ),
        (
            "send tcp:h:1 --api-socket a --timeout-strategy wait",
            "cancel, ignore",
        ),
        (
            "ctl --api-socket a settle 1 maybe",
            "resume_here, runs_there",
        ),
        ("ctl --api-socket a job first", "<ID>"),
        ("ctl --api-socket a resize", "--memory"),
        (
            "ctl --api-socket a resize --memory 1.5G",
            "write bytes, or a number with K, M, G or T",
        ),
        (
            "--log-level loud serve --api-socket a",
            "use off, error, warn, info, debug or trace",
        ),
        ("ctl --api-socket a payload --initramfs i", "--kernel"),
        (
            "ctl --api-socket a payload --kernel k --trust-source",
            "cannot be used",
        ),
        ("fly", "fly"),
    ];
    for (line, reason) in lines {
        let error = parse(line).expect_err(line);
        let text = error.to_string();
        assert!(text.contains(reason), "`{line}`: {text}");
    }
}

#[test]
fn a_move_has_the_default_limits_of_the_api() {
    let cli = parse("send tcp:h:1 --api-socket a").expect("parses");
    let Command::Send(args) = cli.command else {
        panic!("not a send");
    };
    let default = SendMigration::to("tcp:h:1");
    assert_eq!(args.downtime_ms, default.downtime_ms);
    assert_eq!(args.timeout_s, default.timeout_s);
    assert_eq!(
        TimeoutStrategy::from(args.timeout_strategy),
        default.timeout_strategy
    );
}

#[test]
fn every_command_has_help() {
    for command in Cli::command().get_subcommands() {
        assert!(command.get_about().is_some(), "{}", command.get_name());
        for argument in command.get_arguments() {
            assert!(
                argument.get_help().is_some(),
                "{} {}",
                command.get_name(),
                argument.get_id()
            );
        }
    }
}
