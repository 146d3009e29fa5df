//! Tables by PFN: a hash that costs a multiplication.
//!
//! PFNs are not chosen freely by anybody: each names a page of the guest. The random factor keeps a guest from knowing which of them
//! would share a bucket all the same.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

/// A table by PFN.
pub type PfnMap<T> = HashMap<u64, T, PfnHash>;

/// Makes hashers with one random factor.
#[derive(Clone, Copy, Debug)]
pub struct PfnHash(u64);

impl Default for PfnHash {
    fn default() -> Self {
        // Odd, so that no bit of a PFN is lost.
        Self(RandomState::new().hash_one(0_u64) | 1)
    }
}

impl BuildHasher for PfnHash {
    type Hasher = PfnHasher;

    fn build_hasher(&self) -> PfnHasher {
        PfnHasher { factor: self.0, hash: 0 }
    }
}

/// Hashes one PFN.
#[derive(Debug)]
pub struct PfnHasher {
    factor: u64,
    hash: u64,
}

impl Hasher for PfnHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, pfn: u64) {
        // Both halves of the product: the table looks at the highest and at the lowest bits.
        let product = u128::from(self.hash ^ pfn) * u128::from(self.factor);
        self.hash = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_fall_apart() {
        let hash = PfnHash::default();
        for shift in [0, 9, 20] {
            let mut buckets = [0_u32; 256];
            for i in 0..65_536_u64 {
                buckets[(hash.hash_one(i << shift) % 256) as usize] += 1;
            }
            assert!(buckets.iter().all(|&count| count < 2048), "{shift}: {buckets:?}");
        }
    }
}
