//! Random damage and random bytes.

use proptest::prelude::*;

use super::*;

/// A change at a random place of a good file: a small number, a large one, or anything.
fn change() -> impl Strategy<Value = (usize, Vec<u8>)> {
    let bytes = prop_oneof![
        Just(vec![0xff; 8]),
        Just(vec![0; 8]),
        any::<u64>().prop_map(|word| word.to_le_bytes().to_vec()),
        any::<u8>().prop_map(|byte| vec![byte]),
    ];
    (0usize..0x600, bytes)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done to a good file: an error, or a plan that stays inside RAM and off the boot structures.
    #[test]
    fn damaged_kernels_never_escape(
        use_elf: bool,
        changes in prop::collection::vec(change(), 1..8),
        cut in 0usize..0x2000,
    ) {
        let mut kernel = if use_elf { elf() } else { bzimage() };
        for (at, bytes) in changes {
            let end = (at + bytes.len()).min(kernel.len());
            if at < end {
                kernel[at..end].copy_from_slice(&bytes[..end - at]);
            }
        }
        if cut % 4 == 0 {
            kernel.truncate(cut);
        }
        let map = MemoryMap::new(&[(0, 32 * MIB)]).expect("valid RAM");
        if let Ok(Kernel { limits, .. }) = kernel::identify(&mut Cursor::new(&kernel), &map) {
            prop_assert!(limits.start >= HIGH_RAM);
            prop_assert!(limits.start < limits.end && limits.end <= 32 * MIB);
        }
    }

    #[test]
    fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), magic in 0..3) {
        match magic {
            0 if bytes.len() >= 20 => patch(&mut bytes, 0, b"\x7fELF\x02\x01"),
            1 if bytes.len() >= 0x212 => patch(&mut bytes, 0x202, b"HdrS\x0f\x02"),
            _ => {}
        }
        let map = MemoryMap::new(&[(0, 32 * MIB)]).expect("valid RAM");
        let _ = kernel::identify(&mut Cursor::new(&bytes), &map);
    }
}
