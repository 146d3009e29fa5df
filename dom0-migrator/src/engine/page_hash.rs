//! Hashes of guest pages: the first 16 octets of BLAKE3, keyed with the migration's random key.
//!
//! A page of 4 KiB is four of BLAKE3's chunks, so hashing one page by itself fills a quarter of a 512-bit processor's lanes, and half of a
//! 256-bit one's. [`hash_all`] therefore hashes the same chunk of up to 16 pages at once. It uses the crate's own kernels through an
//! interface that is not part of the crate's promise: the version is pinned in the workspace's table, and a test holds every
//! result against the plain function's.

use blake3::IncrementCounter;
use blake3::platform::{MAX_SIMD_DEGREE, Platform};

use super::memory_record::{self, HASH, Hash};
use super::xen_stream::PAGE;

/// Bytes of a chunk, of a block and of a chaining value (BLAKE3 specification, section 2.1).
const CHUNK: usize = 1024;
const BLOCK: usize = 64;
const CHAINING: usize = 32;
/// Chunks of a page.
const CHUNKS: usize = PAGE / CHUNK;
/// Domain flags (the same section, table 3).
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;
/// Pages that are hashed at once.
const TOGETHER: usize = 16;

/// Hashes pages under one key.
#[derive(Clone, Copy, Debug)]
pub struct PageHasher {
    key: [u8; 32],
    words: [u32; 8],
    platform: Platform,
}

impl PageHasher {
    /// With this key.
    pub fn new(key: [u8; 32]) -> Self {
        let mut words = [0; 8];
        for (word, bytes) in words.iter_mut().zip(key.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self { key, words, platform: Platform::detect() }
    }

    /// Appends the hashes of all pages, each of [`PAGE`] bytes.
    pub fn hash_all(&self, pages: &[&[u8]], out: &mut Vec<Hash>) {
        for some in pages.chunks(TOGETHER) {
            if some.len() * CHUNKS < MAX_SIMD_DEGREE.min(8) || !self.hash_some(some, out) {
                out.extend(some.iter().map(|page| memory_record::hash(&self.key, page)));
            }
        }
    }

    /// Hashes up to [`TOGETHER`] pages at once. False, and nothing done: one of them is no page.
    fn hash_some(&self, pages: &[&[u8]], out: &mut Vec<Hash>) -> bool {
        let count = pages.len();
        let mut chunks: [[&[u8; CHUNK]; TOGETHER]; CHUNKS] = [[&[0; CHUNK]; TOGETHER]; CHUNKS];
        for (index, page) in pages.iter().enumerate() {
            let (parts, rest) = page.as_chunks::<CHUNK>();
            if parts.len() != CHUNKS || !rest.is_empty() {
                return false;
            }
            for (row, part) in chunks.iter_mut().zip(parts) {
                row[index] = part;
            }
        }
        // Chaining values in the tree's order: page by page, four to each.
        let mut level = [[0_u8; CHAINING]; TOGETHER * CHUNKS];
        let mut lane = [0_u8; CHAINING * TOGETHER];
        for (number, row) in chunks.iter().enumerate() {
            self.platform.hash_many(
                &row[..count],
                &self.words,
                number as u64,
                IncrementCounter::No,
                KEYED_HASH,
                CHUNK_START,
                CHUNK_END,
                &mut lane[..count * CHAINING],
            );
            for (page, value) in lane.as_chunks::<CHAINING>().0.iter().take(count).enumerate() {
                level[page * CHUNKS + number] = *value;
            }
        }
        // Twice as many nodes as pages, then as many: the roots.
        let mut above = [[0_u8; CHAINING]; TOGETHER * CHUNKS / 2];
        self.parents(&level[..count * CHUNKS], KEYED_HASH | PARENT, &mut above[..count * 2]);
        let mut roots = [[0_u8; CHAINING]; TOGETHER];
        self.parents(&above[..count * 2], KEYED_HASH | PARENT | ROOT, &mut roots[..count]);
        out.extend(roots.iter().take(count).map(|root| {
            let mut hash = [0; HASH];
            hash.copy_from_slice(&root[..HASH]);
            hash
        }));
        true
    }

    fn parents(&self, children: &[[u8; CHAINING]], flags: u8, out: &mut [[u8; CHAINING]]) {
        let (blocks, _) = children.as_flattened().as_chunks::<BLOCK>();
        let mut inputs: [&[u8; BLOCK]; TOGETHER * 2] = [&[0; BLOCK]; TOGETHER * 2];
        for (input, block) in inputs.iter_mut().zip(blocks) {
            *input = block;
        }
        let inputs = inputs.get(..blocks.len()).unwrap_or_default();
        self.platform.hash_many(
            inputs,
            &self.words,
            0,
            IncrementCounter::No,
            flags,
            0,
            0,
            out.as_flattened_mut(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn many_at_once_are_what_each_is_alone(key in any::<[u8; 32]>(), seeds in proptest::collection::vec(any::<u64>(), 0..40)) {
            let contents: Vec<Vec<u8>> = seeds
                .iter()
                .map(|seed| (0..PAGE as u64 / 8).flat_map(|i| (seed ^ (i * i)).to_le_bytes()).collect())
                .collect();
            let pages: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
            let mut hashes = Vec::new();
            PageHasher::new(key).hash_all(&pages, &mut hashes);
            let alone: Vec<Hash> = pages.iter().map(|page| memory_record::hash(&key, page)).collect();
            prop_assert_eq!(hashes, alone);
        }
    }

    #[test]
    fn what_is_no_page_is_hashed_all_the_same() {
        let pages: [&[u8]; 3] = [&[1; PAGE], &[2; 100], &[3; PAGE]];
        let mut hashes = Vec::new();
        PageHasher::new([9; 32]).hash_all(&pages, &mut hashes);
        assert_eq!(hashes, pages.map(|page| memory_record::hash(&[9; 32], page)));
    }
}
