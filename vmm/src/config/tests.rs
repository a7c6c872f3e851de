//! What a config may say, and what it is told if it says something else.

use std::path::Path;

use serde_json::{Value, json};

use ::memory::Backing;

use super::*;

/// The smallest config, with these keys over it.
fn config(over: Value) -> Value {
    let mut config = json!({"payload": {"kernel": "vmlinux"}});
    merge(&mut config, over);
    config
}

fn merge(into: &mut Value, over: Value) {
    match (into, over) {
        (Value::Object(into), Value::Object(over)) => {
            for (key, value) in over {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, over) => *into = over,
    }
}

fn parse(config: &Value) -> Result<VmConfig, ConfigError> {
    VmConfig::from_json(config.to_string().as_bytes())
}

fn accepted(over: Value) -> VmConfig {
    parse(&config(over.clone())).unwrap_or_else(|e| panic!("{over}: {e}"))
}

#[test]
fn defaults_are_those_of_cloud_hypervisor() {
    let config = accepted(json!({}));
    assert_eq!((config.cpus.boot_vcpus, config.cpus.max_vcpus), (1, 1));
    assert_eq!(config.cpus.topology, None);
    assert_eq!(config.memory.size, 512 << 20);
    assert_eq!(config.memory.backing(), Backing::Anonymous { thp: true });
    assert_eq!(config.serial.mode, SerialMode::Null);
    assert_eq!(config.console.mode, SerialMode::Off);
    assert_eq!(config.hypervisor, None);
    assert_eq!(config.payload.kernel.as_deref(), Some(Path::new("vmlinux")));
}

#[test]
fn every_field_is_read() {
    let config = accepted(json!({
        "cpus": {
            "boot_vcpus": 4, "max_vcpus": 4,
            "topology": {"threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 1},
        },
        "memory": {"size": 4u64 << 30, "hugepages": true, "hugepage_size": 1 << 30, "thp": false},
        "payload": {"cmdline": "console=ttyS0", "initramfs": "initrd"},
        "serial": {"mode": "File", "file": "log"},
        "console": {"mode": "Null"},
        "hypervisor": "kvm",
    }));
    assert_eq!(config.cpus.boot_vcpus, 4);
    assert_eq!(config.cpus.topology.map(|t| t.threads_per_core), Some(2));
    assert_eq!(config.memory.size, 4 << 30);
    assert_eq!(
        config.memory.backing(),
        Backing::Hugetlbfs { page_size: 1 << 30 }
    );
    assert_eq!(config.payload.cmdline.as_deref(), Some("console=ttyS0"));
    assert_eq!(
        config.payload.initramfs.as_deref(),
        Some(Path::new("initrd"))
    );
    assert_eq!(config.serial.file.as_deref(), Some(Path::new("log")));
    assert_eq!(config.hypervisor, Some(HypervisorKind::Kvm));
}

#[test]
fn max_vcpus_follows_boot_vcpus() {
    for over in [
        json!({"cpus": {"boot_vcpus": 3}}),
        json!({"cpus": {"boot_vcpus": 3, "max_vcpus": 3}}),
    ] {
        let cpus = accepted(over).cpus;
        assert_eq!(
            (cpus.max_vcpus, cpus.hotplug(), cpus.desired()),
            (3, false, 3)
        );
    }
}

#[test]
fn vcpus_come_and_go_where_there_may_be_more() {
    let cpus = accepted(json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 4}})).cpus;
    assert_eq!((cpus.hotplug(), cpus.desired()), (true, 2));
    // Also when there are as many as there may be, or fewer than at boot.
    for desired in [1, 4] {
        let over = json!({"boot_vcpus": 2, "max_vcpus": 4, "desired_vcpus": desired});
        let cpus = accepted(json!({ "cpus": over })).cpus;
        assert_eq!((cpus.hotplug(), cpus.desired()), (true, desired));
    }
}

#[test]
fn backings() {
    let memory = |over| accepted(json!({ "memory": over })).memory.backing();
    let size = 1u64 << 30;
    assert_eq!(
        memory(json!({"size": size, "thp": false})),
        Backing::Anonymous { thp: false }
    );
    assert_eq!(
        memory(json!({"size": size, "shared": true})),
        Backing::Memfd { thp: true }
    );
    assert_eq!(
        memory(json!({"size": size, "hugepages": true})),
        Backing::Hugetlbfs { page_size: 2 << 20 }
    );
    let both = memory(json!({"size": size, "hugepages": true, "shared": true}));
    assert_eq!(both, Backing::Hugetlbfs { page_size: 2 << 20 });
}

#[test]
fn round_trip() {
    let configs = [
        json!({}),
        json!({"cpus": {"boot_vcpus": 2}, "memory": {"size": 1 << 30, "shared": true}}),
        json!({"serial": {"mode": "Socket", "socket": "/tmp/s"}, "hypervisor": "kvm"}),
    ];
    for over in configs {
        let config = accepted(over);
        let text = serde_json::to_vec(&config).expect("serialises");
        assert_eq!(VmConfig::from_json(&text).expect("its own output"), config);
    }
}

/// A config as a client that knows all of Cloud Hypervisor's fields sends it.
#[test]
fn a_full_config_that_asks_for_nothing_special_is_accepted() {
    let config = accepted(json!({
        "cpus": {
            "boot_vcpus": 2, "max_vcpus": 2, "topology": null, "kvm_hyperv": false, "max_phys_bits": 0,
            "affinity": null, "features": {"amx": false},
        },
        "memory": {
            "size": 1 << 30, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": null,
            "hotplugged_size": 0, "shared": false, "hugepages": false, "hugepage_size": null,
            "prefault": false, "zones": null, "thp": true,
        },
        "payload": {"firmware": null, "cmdline": "quiet", "initramfs": null, "igvm": null},
        "rate_limit_groups": null, "disks": [{"path": "a", "iommu": false, "vhost_user": false, "vhost_socket": null, "pci_segment": 0}],
        "net": null, "rng": {"src": "/dev/urandom", "iommu": false}, "balloon": null, "fs": [],
        "pmem": null, "serial": {"file": null, "mode": "Null", "iommu": false, "socket": null},
        "console": {"file": null, "mode": "Off", "iommu": false, "socket": null},
        "debug_console": null, "devices": [], "user_devices": null, "vdpa": null, "vsock": null,
        "pvpanic": false, "iommu": false, "sgx_epc": null, "numa": null, "watchdog": false,
        "pci_segments": null, "platform": {}, "tpm": null, "landlock_enable": false, "landlock_rules": null,
    }));
    assert_eq!(config.cpus.boot_vcpus, 2);
    assert_eq!(config.payload.cmdline.as_deref(), Some("quiet"));
}

#[test]
fn features_that_do_not_exist_are_refused_by_name() {
    let wanted = [
        (
            "fs.pci_segment",
            json!({"fs": [{"tag": "t", "socket": "s", "pci_segment": 1}]}),
        ),
        (
            "vsock.iommu",
            json!({"vsock": {"cid": 3, "socket": "s", "iommu": true}}),
        ),
        ("pvmemcontrol", json!({"pvmemcontrol": true})),
        ("platform", json!({"platform": {"num_pci_segments": 2}})),
        (
            "memory.prefault",
            json!({"memory": {"size": 1 << 30, "prefault": true}}),
        ),
        (
            "memory.zones",
            json!({"memory": {"size": 1 << 30, "zones": [{"id": "a"}]}}),
        ),
        (
            "cpus.kvm_hyperv",
            json!({"cpus": {"boot_vcpus": 1, "kvm_hyperv": true}}),
        ),
        (
            "payload.firmware",
            json!({"payload": {"firmware": "hypervisor-fw"}}),
        ),
    ];
    for (name, over) in wanted {
        let error = parse(&config(over.clone())).expect_err(name).to_string();
        assert!(error.starts_with(&format!("{name}: ")), "{over}: {error}");
        assert!(error.contains("leave it out"), "{over}: {error}");
    }
}

/// Each value that cannot work: the message begins with the field and contains the way out.
#[test]
fn bad_values_name_the_field_and_the_fix() {
    let gib = 1u64 << 30;
    let wrong = [
        (
            "cpus.boot_vcpus",
            "use 1 to 254",
            json!({"cpus": {"boot_vcpus": 0}}),
        ),
        (
            "cpus.boot_vcpus",
            "use 1 to 254",
            json!({"cpus": {"boot_vcpus": 255}}),
        ),
        (
            "cpus.boot_vcpus",
            "use 1 to 254",
            json!({"cpus": {"boot_vcpus": u32::MAX}}),
        ),
        (
            "cpus.max_vcpus",
            "at least as much",
            json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 1}}),
        ),
        (
            "cpus.max_vcpus",
            "use at most 254",
            json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 255}}),
        ),
        (
            "cpus.desired_vcpus",
            "use 1 to 4",
            json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 4, "desired_vcpus": 0}}),
        ),
        (
            "cpus.desired_vcpus",
            "use 1 to 4",
            json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 4, "desired_vcpus": 5}}),
        ),
        (
            "cpus.desired_vcpus",
            "give it a cpus.max_vcpus",
            json!({"cpus": {"boot_vcpus": 2, "desired_vcpus": 2}}),
        ),
        (
            "cpus.topology",
            "equal to max_vcpus",
            json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 4, "topology":
            {"threads_per_core": 1, "cores_per_die": 2, "dies_per_package": 1, "packages": 1}}}),
        ),
        (
            "cpus.topology",
            "equal to max_vcpus",
            json!({"cpus": {"boot_vcpus": 2, "topology":
            {"threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 1}}}),
        ),
        (
            "cpus.topology",
            "equal to max_vcpus",
            json!({"cpus": {"boot_vcpus": 1, "topology":
            {"threads_per_core": 0, "cores_per_die": 1, "dies_per_package": 1, "packages": 1}}}),
        ),
        (
            "cpus.topology",
            "equal to max_vcpus",
            json!({"cpus": {"boot_vcpus": 1, "topology":
            {"threads_per_core": 65535, "cores_per_die": 65535, "dies_per_package": 65535, "packages": 65535}}}),
        ),
        (
            "cpus.model",
            "x86-64-v3",
            json!({"cpus": {"boot_vcpus": 1, "model": "x86-64-v9"}}),
        ),
        (
            "cpus.model",
            "base of a model",
            json!({"cpus": {"boot_vcpus": 1, "model": "none"}}),
        ),
        (
            "cpus.features",
            "did you mean `avx512f`",
            json!({"cpus": {"boot_vcpus": 1, "features": {"avx51f": true}}}),
        ),
        (
            "cpus.features",
            "needs xsave (leaf 0x1, subleaf 0, ecx bit 26)",
            json!({"cpus": {"boot_vcpus": 1, "model": "x86-64-v2", "features": {"avx": true}}}),
        ),
        (
            "cpus.features",
            "on and off",
            json!({"cpus": {"boot_vcpus": 1, "features": {"sse3": true, "pni": false}}}),
        ),
        (
            "memory.size",
            "size in bytes",
            json!({"memory": {"size": 0}}),
        ),
        (
            "memory.size",
            "whole pages",
            json!({"memory": {"size": gib + 1}}),
        ),
        (
            "memory.size",
            "the unit is bytes",
            json!({"memory": {"size": 8192}}),
        ),
        (
            "memory.hugepage_size",
            "set hugepages",
            json!({"memory": {"size": gib, "hugepage_size": 2 << 20}}),
        ),
        (
            "memory.hugepage_size",
            "2097152",
            json!({"memory": {"size": gib, "hugepages": true, "hugepage_size": 4096}}),
        ),
        (
            "memory.size",
            "whole huge pages",
            json!({"memory": {"size": gib + 4096, "hugepages": true}}),
        ),
        (
            "memory.size",
            "whole huge pages",
            json!({"memory": {"size": gib + (2 << 20), "hugepages": true, "hugepage_size": gib}}),
        ),
        (
            "payload.kernel",
            "a disk to boot from",
            json!({"payload": {"kernel": null}}),
        ),
        (
            "payload.initramfs",
            "name the kernel, too",
            json!({"payload": {"kernel": null, "initramfs": "i"}, "disks": [{"path": "d"}]}),
        ),
        (
            "serial.file",
            "name the file",
            json!({"serial": {"mode": "File"}}),
        ),
        (
            "serial.socket",
            "name the unix socket",
            json!({"serial": {"mode": "Socket"}}),
        ),
        (
            "serial.iommu",
            "leave it out",
            json!({"serial": {"mode": "Null", "iommu": true}}),
        ),
        (
            "console.mode",
            "lead elsewhere",
            json!({"console": {"mode": "Tty"}, "serial": {"mode": "Tty"}}),
        ),
        (
            "console.socket",
            "name the unix socket",
            json!({"console": {"mode": "Socket"}}),
        ),
        (
            "disks.queue_size",
            "power of two",
            json!({"disks": [{"path": "a", "queue_size": 100}]}),
        ),
        (
            "disks.num_queues",
            "use 1 to 64",
            json!({"disks": [{"path": "a", "num_queues": 65}]}),
        ),
        (
            "disks.serial",
            "shorten it",
            json!({"disks": [{"path": "a", "serial": "123456789012345678901"}]}),
        ),
        (
            "net.rate_limiter_config",
            "greater than zero",
            json!({"net": [{"rate_limiter_config": {"bandwidth": {"size": 1, "refill_time": 0}}}]}),
        ),
        (
            "disks.rate_limiter_config",
            "greater than zero",
            json!({"disks": [{"path": "a", "rate_limiter_config": {"ops": {"size": 0, "refill_time": 1}}}]}),
        ),
        (
            "id",
            "each device its own",
            json!({"disks": [{"path": "a", "id": "x"}], "net": [{"id": "x"}]}),
        ),
        (
            "id",
            "letters",
            json!({"disks": [{"path": "a", "id": "../x"}]}),
        ),
        (
            "pci_slot",
            "use 1 to 31",
            json!({"disks": [{"path": "a", "pci_slot": 32}]}),
        ),
        (
            "pci_slot",
            "each once",
            json!({"disks": [{"path": "a", "pci_slot": 7}], "net": [{"pci_slot": 7}]}),
        ),
        (
            "net.num_queues",
            "an even number",
            json!({"net": [{"num_queues": 3}]}),
        ),
        (
            "net.mac",
            "give each interface its own",
            json!({"net": [{"mac": "52:54:00:00:00:01"}, {"mac": "52:54:00:00:00:01"}]}),
        ),
        (
            "balloon.size",
            "multiple of 4096",
            json!({"balloon": {"size": 1}}),
        ),
        (
            "vsock.cid",
            "use 3",
            json!({"vsock": {"cid": 2, "socket": "s"}}),
        ),
        (
            "id",
            "its own",
            json!({"vsock": {"cid": 3, "socket": "s", "id": "a"}, "disks": [{"path": "d", "id": "a"}]}),
        ),
    ];
    for (name, fix, over) in wrong {
        let error = parse(&config(over.clone())).expect_err(name).to_string();
        assert!(error.starts_with(&format!("{name}: ")), "{over}: {error}");
        assert!(error.contains(fix), "{over}: {error}");
    }
}

#[test]
fn wrong_shapes_name_the_field() {
    let wrong = [
        ("colour", json!({"colour": "red"})),
        ("cpu", json!({"cpu": {"boot_vcpus": 1}})),
        ("sockets", json!({"cpus": {"boot_vcpus": 1, "sockets": 1}})),
        ("boot_vcpus", json!({"cpus": {}})),
        ("cpus.boot_vcpus", json!({"cpus": {"boot_vcpus": "2"}})),
        ("cpus.boot_vcpus", json!({"cpus": {"boot_vcpus": -1}})),
        ("cpus.boot_vcpus", json!({"cpus": {"boot_vcpus": 1.5}})),
        (
            "cpus.boot_vcpus",
            json!({"cpus": {"boot_vcpus": 4294967296u64}}),
        ),
        (
            "cpus.topology",
            json!({"cpus": {"boot_vcpus": 1, "topology": {"packages": 1}}}),
        ),
        ("size", json!({"memory": {}})),
        ("memory.size", json!({"memory": {"size": "1G"}})),
        ("memory.size", json!({"memory": {"size": -1}})),
        (
            "megabytes",
            json!({"memory": {"size": 1 << 30, "megabytes": 1}}),
        ),
        (
            "memory.shared",
            json!({"memory": {"size": 1 << 30, "shared": "yes"}}),
        ),
        ("memory", json!({"memory": []})),
        ("payload.kernel", json!({"payload": {"kernel": 7}})),
        (
            "payload.cmdline",
            json!({"payload": {"cmdline": ["a", "b"]}}),
        ),
        ("initrd", json!({"payload": {"initrd": "x"}})),
        ("serial.mode", json!({"serial": {"mode": "Fax"}})),
        ("mode", json!({"serial": {"file": "log"}})),
        ("baud", json!({"serial": {"mode": "Tty", "baud": 9600}})),
        ("console.mode", json!({"console": {"mode": 1}})),
        ("hypervisor", json!({"hypervisor": "xen"})),
    ];
    for (name, over) in wrong {
        let error = parse(&config(over.clone())).expect_err(name);
        assert!(matches!(error, ConfigError::Json(_)), "{over}: {error:?}");
        assert!(error.to_string().contains(name), "{over}: {error}");
    }
}

#[test]
fn texts_that_are_no_config() {
    let deep = "[".repeat(100_000);
    let twice = r#"{"payload": {"kernel": "a"}} {}"#;
    for text in [
        "", " ", "{", "[]", "null", "7", "\"x\"", "\u{0}", twice, &deep,
    ] {
        let error = VmConfig::from_json(text.as_bytes()).expect_err("no config");
        assert!(matches!(error, ConfigError::Json(_)), "{error:?}");
    }
    assert!(VmConfig::from_json(&[0xff, 0xfe]).is_err());
}

#[test]
fn serial_ports_on_the_command_line() {
    let good = [
        ("off", SerialMode::Off, None, None),
        ("null", SerialMode::Null, None, None),
        ("pty", SerialMode::Pty, None, None),
        ("tty", SerialMode::Tty, None, None),
        ("file=/tmp/a=b", SerialMode::File, Some("/tmp/a=b"), None),
        ("socket=/tmp/s", SerialMode::Socket, None, Some("/tmp/s")),
    ];
    for (text, mode, file, socket) in good {
        let config: SerialConfig = text.parse().expect(text);
        assert_eq!(config.mode, mode, "{text}");
        assert_eq!(config.file.as_deref(), file.map(Path::new), "{text}");
        assert_eq!(config.socket.as_deref(), socket.map(Path::new), "{text}");
    }
    for text in [
        "",
        "TTY",
        "file",
        "file=",
        "socket",
        "socket=",
        "tty=/dev/x",
        "off=1",
        "fax",
    ] {
        let error = text.parse::<SerialConfig>().expect_err(text).to_string();
        assert!(error.contains("use off, null, pty, tty"), "{text}: {error}");
    }
}

#[test]
fn models_and_features_are_taken() {
    for cpus in [
        json!({"boot_vcpus": 1, "model": "EPYC-Rome"}),
        json!({"boot_vcpus": 1, "model": "epyc-rome-v1", "features": {"sha_ni": false}}),
        json!({"boot_vcpus": 1, "model": "./not/there/yet.json"}),
        json!({"boot_vcpus": 1, "features": null}),
        json!({"boot_vcpus": 1, "features": {"amx": false}}),
    ] {
        let config = accepted(json!({ "cpus": cpus }));
        let text = serde_json::to_vec(&config).expect("JSON");
        assert_eq!(VmConfig::from_json(&text).expect("its own output"), config);
    }
    // The machine of a peer brings its contract: which model that was made from need not be known here.
    let unknown =
        json!({"payload": {"kernel": "k"}, "cpus": {"boot_vcpus": 1, "model": "of-next-year"}});
    let text = unknown.to_string();
    assert!(VmConfig::from_json(text.as_bytes()).is_err());
    assert!(VmConfig::from_peer(text.as_bytes()).is_ok());
}

/// Removing the disk `rng` asked the guest to let go of the random number generator, and took the disk out of the config.
#[test]
fn a_disk_has_no_name_of_another_device() {
    for id in ["rng", "serial", "ioapic"] {
        for kind in [
            json!({"disks": [{"path": "p", "id": id}]}),
            json!({"net": [{"id": id}]}),
        ] {
            assert!(parse(&config(kind)).is_err(), "{id}");
        }
    }
    accepted(json!({"disks": [{"path": "p", "id": "rng0"}]}));
}

#[test]
fn devices_of_vhost_user_back_ends() {
    let shared = json!({"size": 1 << 30, "shared": true});
    let parsed = accepted(json!({
        "memory": shared.clone(),
        "disks": [{"vhost_user": true, "vhost_socket": "d", "path": null, "readonly": true}],
        "net": [{"vhost_user": true, "vhost_socket": "n", "vhost_mode": "Client", "mtu": 1400, "num_queues": 4}],
        "fs": [{"tag": "share", "socket": "f", "pci_segment": 0}],
    }));
    assert_eq!(parsed.disks[0].back_end(), Some("d".as_ref()));
    assert_eq!(parsed.disks[0].num_queues, 1);
    assert_eq!(parsed.net[0].back_end(), Some("n".as_ref()));
    assert_eq!(parsed.fs[0].id.as_deref(), Some("_fs0"));
    assert_eq!(parsed.fs[0].queue_size, 1024);
    // What is written for a destination reads back.
    let json = serde_json::to_vec(&parsed).expect("encodes");
    assert_eq!(VmConfig::from_peer(&json), Ok(parsed));

    let disk =
        |more: &str| format!(r#"{{"disks": [{{"vhost_user": true, "vhost_socket": "s"{more}}}]}}"#);
    let net =
        |more: &str| format!(r#"{{"net": [{{"vhost_user": true, "vhost_socket": "s"{more}}}]}}"#);
    let plain = |json: &str| json.to_owned();
    for (named, json) in [
        (
            "disks.vhost_socket",
            plain(r#"{"disks": [{"vhost_user": true}]}"#),
        ),
        (
            "disks.vhost_user",
            plain(r#"{"disks": [{"path": "a", "vhost_socket": "s"}]}"#),
        ),
        ("disks.path", plain(r#"{"disks": [{}]}"#)),
        ("disks.path", disk(r#", "path": "a""#)),
        ("disks.direct", disk(r#", "direct": true"#)),
        ("disks.serial", disk(r#", "serial": "a""#)),
        (
            "disks.rate_limiter_config",
            disk(r#", "rate_limiter_config": {}"#),
        ),
        (
            "net.vhost_socket",
            plain(r#"{"net": [{"vhost_user": true}]}"#),
        ),
        (
            "net.vhost_user",
            plain(r#"{"net": [{"vhost_socket": "s"}]}"#),
        ),
        ("net.tap", net(r#", "tap": "t""#)),
        ("net.ip", net(r#", "ip": "10.0.0.1""#)),
        ("net.vhost_mode", net(r#", "vhost_mode": "Server""#)),
        ("net.num_queues", net(r#", "num_queues": 3"#)),
        ("fs.tag", plain(r#"{"fs": [{"tag": "", "socket": "s"}]}"#)),
        (
            "fs.tag",
            plain(r#"{"fs": [{"tag": "t", "socket": "s"}, {"tag": "t", "socket": "u"}]}"#),
        ),
        (
            "fs.queue_size",
            plain(r#"{"fs": [{"tag": "t", "socket": "s", "queue_size": 3}]}"#),
        ),
        (
            "id",
            plain(r#"{"fs": [{"tag": "t", "socket": "s", "id": "rng"}]}"#),
        ),
    ] {
        let mut over: Value = serde_json::from_str(&json).expect("JSON");
        over["memory"] = shared.clone();
        let error = parse(&config(over)).expect_err(named).to_string();
        assert!(error.starts_with(&format!("{named}: ")), "{json}: {error}");
    }
    let private = json!({"fs": [{"tag": "t", "socket": "s"}]});
    let error = parse(&config(private)).expect_err("private").to_string();
    assert!(error.starts_with("memory.shared: "), "{error}");
}
