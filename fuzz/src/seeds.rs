//! Inputs to begin with: well-formed sessions, and the states of earlier builds.
//!
//! `VMM_FIXTURES=1 cargo test --release --manifest-path fuzz/Cargo.toml` writes those that are not there yet; without it, the test runs all
//! inputs of the corpus.

use std::collections::BTreeMap;
use std::path::PathBuf;

use devices::SavedState;
use migration::protocol::batch::{BatchHeader, ENCODING_RAW, ENCODING_ZERO, RunDescriptor};
use migration::protocol::hello::{self, HelloBody};
use migration::protocol::message::{Abort, Message, State};
use migration::{Manifest, protocol};
use zerocopy::IntoBytes;

use crate::Target;
use crate::input::{Op, Part, encode};
use crate::states::KINDS;

const ALL: [(Target, &str); 13] = [
    (Target::Pci, "pci"),
    (Target::Transport, "transport"),
    (Target::Block, "block"),
    (Target::Net, "net"),
    (Target::Console, "console"),
    (Target::Rng, "rng"),
    (Target::Balloon, "balloon"),
    (Target::Vsock, "vsock"),
    (Target::Serial, "serial"),
    (Target::Ioapic, "ioapic"),
    (Target::Legacy, "legacy"),
    (Target::States, "states"),
    (Target::Wire, "wire"),
];

const SLOT: u8 = 0;
/// All that there is, and all but event indices.
const FEATURES: [u64; 2] = [u64::MAX, !(1 << 29)];

fn readable(bytes: &[u8]) -> Part {
    Part::Readable(bytes.to_vec())
}

fn chain(queue: u8, parts: &[Part]) -> Op {
    Op::Chain {
        slot: SLOT,
        queue,
        how: 0,
        parts: parts.to_vec(),
    }
}

fn indirect(queue: u8, parts: &[Part]) -> Op {
    Op::Chain {
        slot: SLOT,
        queue,
        how: 1,
        parts: parts.to_vec(),
    }
}

fn host(kind: u8, data: &[u8]) -> Op {
    Op::Host {
        slot: SLOT,
        kind,
        data: data.to_vec(),
    }
}

const STEP: Op = Op::Step { how: 2 };

/// A session with these operations after the setup, then paused, saved, restored and gone on with, then reset.
fn sessions(middle: &[Op]) -> Vec<Vec<Op>> {
    let session = |features| {
        let mut ops = vec![Op::SetUp {
            slot: SLOT,
            features,
        }];
        ops.extend_from_slice(middle);
        ops.push(STEP);
        ops
    };
    let mut life = session(FEATURES[0]);
    life.extend([
        Op::Pause { slot: SLOT, on: 1 },
        Op::Restore {
            slot: SLOT,
            flips: Vec::new(),
        },
        Op::Pause { slot: SLOT, on: 0 },
    ]);
    life.extend_from_slice(middle);
    life.extend([STEP, Op::Reset { slot: SLOT }]);
    life.extend(session(FEATURES[1]));
    life.push(Op::ResetQueue {
        slot: SLOT,
        queue: 0,
    });
    vec![session(FEATURES[0]), session(FEATURES[1]), life]
}

fn bar_write(at: u16, data: &[u8]) -> Op {
    Op::BarWrite {
        slot: SLOT,
        at,
        data: data.to_vec(),
    }
}

fn transport() -> Vec<Vec<Op>> {
    let parts = [
        readable(b"to be copied"),
        Part::Writable(8),
        Part::Writable(300),
    ];
    let mut all = sessions(&[chain(0, &parts), indirect(1, &parts), chain(0, &parts[..1])]);
    // By hand: a ring in the upper memory, a loop, the BAR's parts, a queue without DRIVER_OK.
    let mut by_hand: Vec<_> = [1u8, 3]
        .iter()
        .map(|status| bar_write(0x14, &[*status]))
        .collect();
    for (at, value) in [(8u16, 1u32), (12, 1), (8, 0), (12, 1 << 28 | 1 << 29)] {
        by_hand.push(bar_write(at, &value.to_le_bytes()));
    }
    by_hand.push(bar_write(0x14, &[11]));
    for (at, value) in [
        (0x20u16, 0x1000u32),
        (0x24, 1),
        (0x28, 0x2000),
        (0x2c, 1),
        (0x30, 0x3000),
        (0x34, 1),
    ] {
        by_hand.push(bar_write(at, &value.to_le_bytes()));
    }
    by_hand.extend([
        bar_write(0x18, &[8, 0]),
        bar_write(0x1c, &[1, 0]),
        bar_write(0x14, &[15]),
    ]);
    let mut descriptor = 0x4000u64.to_le_bytes().to_vec();
    descriptor.extend(16u32.to_le_bytes());
    descriptor.extend([2, 0, 0, 0]);
    by_hand.extend([
        Op::Ram {
            at: 0x8000_1000,
            data: descriptor,
        },
        Op::Ram {
            at: 0x8000_2000,
            data: vec![0, 0, 1, 0, 0, 0],
        },
        Op::Notify {
            slot: SLOT,
            queue: 0,
        },
        STEP,
    ]);
    all.push(by_hand);
    let looping = Op::Descriptor {
        slot: SLOT,
        queue: 0,
        index: 0,
        gpa: 0x6_0000,
        len: 4,
        flags: 1,
        next: 0,
    };
    all.push(vec![
        Op::SetUp {
            slot: SLOT,
            features: 0,
        },
        looping,
        Op::Available {
            slot: SLOT,
            queue: 0,
            head: 0,
        },
        Op::Notify {
            slot: SLOT,
            queue: 0,
        },
        STEP,
        Op::BarRead {
            slot: SLOT,
            at: 0x14,
            len: 1,
        },
        Op::BarRead {
            slot: SLOT,
            at: 0x1000,
            len: 1,
        },
    ]);
    all
}

fn pci() -> Vec<Vec<Op>> {
    let config = |slot: u32, at: u32, data: &[u8]| Op::ConfigWrite {
        at: slot * 0x8000 + at,
        data: data.to_vec(),
    };
    let parts = [readable(b"abc"), Part::Writable(3)];
    vec![
        // Sizes a BAR, moves it, lays it over another function's.
        vec![
            config(1, 0x10, &[0xff; 4]),
            Op::ConfigRead { at: 0x8010, len: 4 },
            config(1, 0x10, &[0, 0, 8, 0xc0]),
            config(1, 4, &[6, 0]),
            Op::SetUp {
                slot: 0,
                features: 0,
            },
            chain(0, &parts),
            STEP,
            config(2, 0x10, &[0, 0, 8, 0xc0]),
            config(2, 4, &[6, 0]),
            config(1, 4, &[0, 0]),
            Op::MmioRead {
                gpa: 0xc008_0014,
                len: 1,
            },
        ],
        // A function goes and comes back.
        vec![
            Op::SetUp {
                slot: 1,
                features: 0,
            },
            Op::Slot {
                slot: 1,
                present: 0,
            },
            Op::ConfigRead {
                at: 0x1_0000,
                len: 4,
            },
            Op::Slot {
                slot: 1,
                present: 1,
            },
            Op::SetUp {
                slot: 1,
                features: 0,
            },
            Op::PowerOn { slot: 1 },
        ],
        // Masks a vector while a request is finished, and unmasks it; the window in configuration space.
        vec![
            Op::SetUp {
                slot: 0,
                features: 0,
            },
            bar_write(0x401c, &[1, 0, 0, 0]),
            chain(0, &parts),
            STEP,
            Op::BarRead {
                slot: 0,
                at: 0x5000,
                len: 8,
            },
            bar_write(0x401c, &[0, 0, 0, 0]),
            config(1, 0x84, &[0]),
            config(1, 0x88, &[0x14, 0, 0, 0]),
            config(1, 0x8c, &[1, 0, 0, 0]),
            Op::ConfigRead { at: 0x8090, len: 1 },
        ],
    ]
}

fn block() -> Vec<Vec<Op>> {
    let header = |kind: u32, sector: u64| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        readable(&bytes)
    };
    let range = |sector: u64, sectors: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        readable(&bytes)
    };
    let status = Part::Writable(1);
    let half = readable(&[7; 128]);
    sessions(&[
        chain(0, &[header(0, 1), Part::Writable(1024), status.clone()]),
        chain(
            1,
            &[
                header(1, 2),
                half.clone(),
                half.clone(),
                half.clone(),
                half,
                status.clone(),
            ],
        ),
        indirect(0, &[header(4, 0), status.clone()]),
        chain(0, &[header(8, 0), Part::Writable(20), status.clone()]),
        chain(1, &[header(11, 0), range(8, 8, 0), status.clone()]),
        indirect(1, &[header(13, 0), range(16, 8, 1), status.clone()]),
        STEP,
        host(0, &[0, 4]),
        chain(0, &[header(0, 600), Part::Writable(512), status]),
        host(1, &[2, 0]),
    ])
    .into_iter()
    .collect()
}

fn net() -> Vec<Vec<Op>> {
    let mut packet = vec![0; 12];
    packet.extend([0xff; 60]);
    sessions(&[
        chain(0, &[Part::Writable(2000)]),
        chain(0, &[Part::Writable(12), Part::Writable(1500)]),
        indirect(2, &[Part::Writable(70_000)]),
        chain(1, &[readable(&packet[..12]), readable(&packet[12..])]),
        indirect(3, &[readable(&packet)]),
        chain(4, &[readable(&[4, 0, 2, 0]), Part::Writable(1)]),
        chain(
            4,
            &[readable(&[1, 1, 0x52, 0x54, 0, 9, 9, 9]), Part::Writable(1)],
        ),
        chain(
            4,
            &[readable(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), Part::Writable(1)],
        ),
        chain(4, &[readable(&[0, 1, 1]), Part::Writable(1)]),
        STEP,
        host(0, &packet),
        host(1, &packet),
        host(2, &3000u16.to_le_bytes()),
        host(6, &[]),
        chain(4, &[readable(&[3, 0]), Part::Writable(1)]),
    ])
}

fn vsock() -> Vec<Vec<Op>> {
    let packet = |op: u16, ports: (u32, u32), data: &[u8]| {
        let mut bytes = 7u64.to_le_bytes().to_vec();
        bytes.extend(2u64.to_le_bytes());
        bytes.extend(ports.0.to_le_bytes());
        bytes.extend(ports.1.to_le_bytes());
        bytes.extend((data.len() as u32).to_le_bytes());
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(op.to_le_bytes());
        bytes.extend(if op == 4 { [3, 0, 0, 0] } else { [0; 4] });
        bytes.extend(4096u32.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(data);
        readable(&bytes)
    };
    let room = || chain(0, &[Part::Writable(44), Part::Writable(4096)]);
    let out = (1000, 52);
    // The first port of a connection from the host.
    let inwards = (77, 1 << 30);
    sessions(&[
        room(),
        room(),
        room(),
        chain(2, &[Part::Writable(8)]),
        chain(1, &[packet(1, out, &[])]),
        STEP,
        chain(1, &[packet(5, out, b"data")]),
        host(2, b"answer"),
        STEP,
        host(0, b"CONNECT 77\n"),
        STEP,
        chain(1, &[packet(2, inwards, &[])]),
        host(3, b"hello"),
        room(),
        STEP,
        chain(1, &[packet(6, inwards, &[])]),
        chain(1, &[packet(4, out, &[])]),
        room(),
        host(5, &[]),
        STEP,
        chain(1, &[packet(3, inwards, &[])]),
    ])
}

fn registers(ops: &[(u8, u8, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (op, number, data) in ops {
        bytes.extend([*op, *number]);
        bytes.extend(*data);
    }
    bytes
}

/// The inputs of a target.
fn seeds(target: Target) -> Vec<Vec<u8>> {
    let encoded = |sessions: Vec<Vec<Op>>| sessions.iter().map(|ops| encode(ops)).collect();
    match target {
        Target::Pci => encoded(pci()),
        Target::Transport => encoded(transport()),
        Target::Block => {
            // The first byte: can be written, cannot.
            let all = block().into_iter().zip([0, 1, 0]);
            all.map(|(ops, first)| [vec![first], encode(&ops)].concat())
                .collect()
        }
        Target::Net => encoded(net()),
        Target::Console => encoded(sessions(&[
            chain(1, &[readable(b"hello, "), readable(b"world\n")]),
            chain(0, &[Part::Writable(100)]),
            host(0, b"input"),
            STEP,
            host(1, &[5, 0]),
            host(3, &[100, 0, 40, 0]),
        ])),
        Target::Rng => encoded(sessions(&[
            chain(0, &[Part::Writable(16)]),
            STEP,
            host(0, b"random"),
            indirect(0, &[Part::Writable(8), Part::Writable(8)]),
        ])),
        Target::Balloon => {
            let pages = [0x80u32, 0x81, 0x82, 0x7fff_ffff]
                .map(u32::to_le_bytes)
                .concat();
            encoded(sessions(&[
                host(0, &[16, 0]),
                chain(0, &[readable(&pages)]),
                chain(1, &[readable(&pages)]),
                chain(2, &[readable(&[4, 0, 1, 0, 0, 0, 0, 0, 0, 0])]),
                chain(3, &[Part::Writable(0x4000)]),
                bar_write(0x2004, &[3, 0, 0, 0]),
                STEP,
                host(1, &[]),
            ]))
        }
        Target::Vsock => encoded(vsock()),
        Target::Serial => vec![registers(&[
            // Line control with divisor, then 8N1, interrupts, modem, output, loopback, input.
            (1, 0, &[3, 1, 0x83]),
            (1, 0, &[0, 1, 1]),
            (1, 0, &[3, 1, 3]),
            (1, 0, &[1, 1, 3]),
            (1, 0, &[4, 1, 0xb]),
            (1, 0, &[0, 2, b'h', b'i']),
            (4, 0, &[3, b'a', b'b', b'c']),
            (0, 0, &[5, 1]),
            (0, 0, &[0, 1]),
            (6, 0, &[0, 0, 0]),
            (1, 0, &[4, 1, 0x1b]),
            (1, 0, &[0, 1, b'x']),
            (0, 0, &[0, 1]),
            (7, 0, &[]),
        ])],
        Target::Ioapic => vec![registers(&[
            (1, 0, &[0, 1, 0x18]),
            (1, 0, &[0x10, 4, 0x41, 0, 0, 0]),
            (4, 0, &[1, 4]),
            (1, 0, &[0, 1, 0x22]),
            (1, 0, &[0x10, 4, 0x42, 0x80, 0, 0]),
            (4, 1, &[1, 9]),
            (6, 0, &[0, 0, 0]),
            (4, 3, &[1, 0x42]),
            (4, 2, &[1, 9]),
            (0, 0, &[0x10, 4]),
            (7, 0, &[]),
        ])],
        Target::Legacy => vec![registers(&[
            (1, 0, &[0, 1, 0x0b]),
            (1, 0, &[1, 1, 0x82]),
            (1, 0, &[0, 1, 0x00]),
            (1, 0, &[1, 1, 0x30]),
            (1, 0, &[0, 1, 0x0b]),
            (1, 0, &[1, 1, 0x02]),
            (4, 0, &[8, 0, 0xf1, 0x53, 0x65, 0, 0, 0, 0]),
            (0, 0, &[1, 1]),
            (6, 0, &[0, 0, 0]),
            (1, 1, &[4, 1, 0xd1]),
            (1, 1, &[0, 1, 0xfe]),
            (4, 1, &[0]),
            (0, 2, &[4, 1]),
            (4, 2, &[1, 5]),
            (4, 3, &[1, 6]),
            (0, 3, &[0, 4]),
            (1, 3, &[8, 4, 0x20, 0, 0, 0]),
            (1, 4, &[0, 1, 1]),
            (1, 2, &[0, 1, 0x34]),
            (7, 0, &[]),
        ])],
        Target::States => {
            let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../devices/fixtures"));
            let mut all = Vec::new();
            for (number, kind) in (0u8..).zip(KINDS) {
                let bytes = std::fs::read(folder.join(format!("{kind}-1"))).expect("a fixture");
                let state: SavedState = rmp_serde::from_slice(&bytes).expect("a state");
                all.push([vec![number], state.data].concat());
            }
            all
        }
        Target::Wire => wire(),
    }
}

fn wire() -> Vec<Vec<u8>> {
    let hello = HelloBody {
        features: vec!["something".into()],
        vmm_version: "1.0".into(),
    };
    let hello = hello::encode(protocol::VERSIONS, &hello).expect("short");
    let manifest = Manifest {
        vcpus: 2,
        memory: vec![memory::RamRange {
            gpa: 0,
            len: 64 << 10,
        }],
        ..Manifest::default()
    };
    let messages = [
        Message::Manifest(Box::new(manifest)),
        Message::State(Box::new(State {
            last_round: 3,
            machine: Default::default(),
            sent_ns: Some(1),
        })),
        Message::Abort(Abort {
            reason: "no more".into(),
        }),
    ];
    let mut all = vec![[vec![0], hello].concat()];
    for message in messages {
        all.push([vec![1], message.encode().expect("short")].concat());
    }
    let mut batch = vec![2];
    batch.extend(BatchHeader::pages(1, 2, 8192).as_bytes());
    batch.extend(RunDescriptor::new(0x1000, 2, ENCODING_RAW).as_bytes());
    batch.extend(RunDescriptor::new(0x5000, 7, ENCODING_ZERO).as_bytes());
    all.push(batch);
    all.push(snapshot());
    all
}

/// The manifest file of a snapshot; sums and lengths in its header are put right by the target.
fn snapshot() -> Vec<u8> {
    use arch::x86_64::state::Bytes;

    #[derive(serde::Serialize)]
    struct Memory {
        id: Bytes,
        bytes: u64,
        chunk_bytes: u32,
        sums: Bytes,
    }
    #[derive(serde::Serialize)]
    struct Body {
        manifest: Manifest,
        state: migration::MachineState,
        memory: Memory,
        saved_ns: u64,
    }
    let body = Body {
        manifest: Manifest {
            vcpus: 1,
            memory: vec![memory::RamRange {
                gpa: 0,
                len: 60 << 10,
            }],
            ..Manifest::default()
        },
        state: migration::MachineState::default(),
        memory: Memory {
            id: Bytes(vec![0; 16]),
            bytes: 60 << 10,
            chunk_bytes: 2 << 20,
            sums: Bytes(vec![0; 4]),
        },
        saved_ns: 1,
    };
    let mut bytes = vec![3];
    bytes.extend(b"VMMSNAP\n");
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend([0; 20]);
    bytes.extend(rmp_serde::to_vec_named(&body).expect("short"));
    bytes
}

/// What is in a target's folder, by name.
fn corpus(name: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus")).join(name);
    let write = std::env::var_os("VMM_FIXTURES").is_some();
    if write {
        std::fs::create_dir_all(&folder).expect("a folder");
        let (_, target) = (
            name,
            ALL.iter().find(|it| it.1 == name).expect("a target").0,
        );
        for (number, seed) in seeds(target).into_iter().enumerate() {
            let path = folder.join(format!("seed-{number}"));
            if !path.exists() {
                std::fs::write(path, seed).expect("a file");
            }
        }
    }
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(&folder).expect("a corpus").flatten() {
        let bytes = std::fs::read(entry.path()).expect("an input");
        all.insert(entry.file_name().to_string_lossy().into_owned(), bytes);
    }
    all
}

#[test]
fn every_target_has_seeds_and_all_inputs_run() {
    for (target, name) in ALL {
        let corpus = corpus(name);
        for (file, input) in &corpus {
            println!("{name}/{file}");
            target.run(input);
        }
        let seeds = corpus.keys().filter(|file| file.starts_with("seed-"));
        assert!(seeds.count() > 0, "{name}");
    }
}

#[test]
fn devices_finish_requests_of_the_seeds() {
    for (target, name) in &ALL[1..8] {
        for (number, seed) in seeds(*target).iter().enumerate().take(2) {
            assert!(target.run(seed) > 0, "{name} {number}");
        }
    }
}
