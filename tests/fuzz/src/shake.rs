//! Inputs that are a little other than those that are kept: what can be tried without a fuzzer, anywhere.

use fastrand::Rng;

/// Values at which lengths and counts go wrong.
const EDGES: [u64; 10] =
    [0, 1, 7, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, u64::MAX, 0xffff_ffff_ffff_f000];

/// One of the inputs with some changes.
pub fn shaken(inputs: &[Vec<u8>], longest: usize, random: &mut Rng) -> Vec<u8> {
    let mut bytes = random.choice(inputs).cloned().unwrap_or_default();
    for _ in 0..random.usize(1..=4) {
        let at = random.usize(0..=bytes.len());
        let end = (at + random.usize(1..=16)).min(bytes.len());
        match random.u8(0..7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.u8(0..8),
            1 => bytes[at..end].fill_with(|| random.u8(..)),
            2 => {
                let edge = random.choice(EDGES).unwrap_or_default().to_le_bytes();
                let width = *random.choice(&[1, 2, 4, 8]).unwrap_or(&8);
                let room = (bytes.len() - at).min(width);
                bytes[at..at + room].copy_from_slice(&edge[..room]);
            }
            3 => drop(bytes.drain(at..end)),
            4 => {
                let again = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, again));
            }
            5 => bytes.truncate(at),
            _ => {
                let other = random.choice(inputs).cloned().unwrap_or_default();
                let from = random.usize(0..=other.len());
                drop(bytes.splice(at.., other[from..].iter().copied()));
            }
        }
    }
    bytes.truncate(longest);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shaken_inputs_are_others_and_not_too_long() {
        let mut random = Rng::with_seed(1);
        let inputs = [b"some bytes".to_vec(), vec![7; 90]];
        let made: std::collections::BTreeSet<_> =
            (0..500).map(|_| shaken(&inputs, 64, &mut random)).collect();
        assert!(made.len() > 250 && made.iter().all(|bytes| bytes.len() <= 64));
        let _ = shaken(&[], 64, &mut random);
    }
}
