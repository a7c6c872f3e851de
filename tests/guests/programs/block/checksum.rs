//! The checksum of a disk, the same for the guest that reads it and for who wrote the image: a sum over blocks, so that blocks may come in
//! any order, of a hash of each block's place and contents.

/// Bytes of a block.
pub(crate) const BLOCK: usize = 4096;

/// What block number `index` adds (wrapping) to the checksum of its disk. Bytes beyond whole words count for nothing.
pub(crate) fn of_block(index: u64, bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = index.wrapping_add(1).wrapping_mul(PRIME);
    for word in bytes.as_chunks::<8>().0 {
        hash = (hash ^ u64::from_le_bytes(*word))
            .wrapping_mul(PRIME)
            .rotate_left(29);
    }
    hash ^ hash >> 32
}
