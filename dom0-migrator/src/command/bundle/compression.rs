//! Compression of blocks, one by one: none needs another to be read.

use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::block::{BLOCK_MAX, Codec};

/// zstd's fastest ordinary level: what is slower than a link gains nothing on it.
const ZSTD_LEVEL: i32 = 1;

/// What is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Bytes as they are: right on fast links.
    #[default]
    Off,
    /// LZ4: fast, and little gained.
    Lz4,
    /// zstd: slower, and more gained.
    Zstd,
    /// What is fastest on this link, by measurement at the stream's beginning.
    Auto,
}

impl FromStr for Compression {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        clap::ValueEnum::from_str(text, false)
    }
}

/// Compresses and decompresses, with the memory that this takes.
pub struct Coder {
    compressor: Option<zstd::bulk::Compressor<'static>>,
    decompressor: Option<zstd::bulk::Decompressor<'static>>,
    out: Vec<u8>,
}

impl Coder {
    /// One; it takes its memory when it is first used.
    pub fn new() -> Self {
        Self { compressor: None, decompressor: None, out: Vec::new() }
    }

    /// The block, written so; none where that makes it no shorter.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn compress(&mut self, codec: Codec, block: &[u8]) -> io::Result<Option<&[u8]>> {
        if codec == Codec::Raw {
            return Ok(None);
        }
        self.out.resize(lz4_flex::block::get_maximum_output_size(BLOCK_MAX), 0);
        // What is no shorter need not be written to the end.
        let room = block.len().saturating_sub(1);
        let length = match codec {
            Codec::Raw => return Ok(None),
            Codec::Lz4 => lz4_flex::block::compress_into(block, &mut self.out).map_err(io::Error::other)?,
            Codec::Zstd => {
                let compressor = match &mut self.compressor {
                    Some(compressor) => compressor,
                    none => none.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL)?),
                };
                let out = self.out.get_mut(..room).unwrap_or_default();
                match compressor.compress_to_buffer(block, out) {
                    Ok(length) => length,
                    Err(_) => return Ok(None),
                }
            }
        };
        Ok(if length <= room { self.out.get(..length) } else { None })
    }

    /// What was written so, which has as many bytes as `into`: not one more is written, whatever it says of itself.
    ///
    /// # Errors
    /// When it is nothing of the kind, or has another length.
    pub fn decompress(&mut self, codec: Codec, stored: &[u8], into: &mut [u8]) -> io::Result<()> {
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let length = match codec {
            Codec::Raw => {
                if stored.len() == into.len() {
                    into.copy_from_slice(stored);
                }
                stored.len()
            }
            Codec::Lz4 => {
                lz4_flex::block::decompress_into(stored, into).map_err(|error| bad(error.to_string()))?
            }
            Codec::Zstd => {
                let decompressor = match &mut self.decompressor {
                    Some(decompressor) => decompressor,
                    none => none.insert(zstd::bulk::Decompressor::new()?),
                };
                decompressor.decompress_to_buffer(stored, into).map_err(|error| bad(error.to_string()))?
            }
        };
        if length == into.len() {
            Ok(())
        } else {
            Err(bad(format!("a block of {length} bytes and not {}", into.len())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOTH: [Codec; 2] = [Codec::Lz4, Codec::Zstd];

    #[test]
    fn blocks_come_back_as_they_went() {
        let text: Vec<u8> = (0..BLOCK_MAX as u32).map(|i| (i / 64) as u8).collect();
        let mut coder = Coder::new();
        for codec in BOTH {
            let stored = coder.compress(codec, &text).unwrap().unwrap().to_vec();
            assert!(stored.len() < text.len() / 4, "{codec:?} {}", stored.len());
            let mut back = vec![0; text.len()];
            coder.decompress(codec, &stored, &mut back).unwrap();
            assert!(back == text);
            // Another length than the header said, both ways.
            assert!(coder.decompress(codec, &stored, &mut back[1..]).is_err());
            assert!(coder.decompress(codec, &stored, &mut vec![0; text.len() + 1]).is_err());
        }
    }

    #[test]
    fn what_gets_no_shorter_stays_as_it_is() {
        let mut noise = vec![0; BLOCK_MAX];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let mut coder = Coder::new();
        for codec in BOTH {
            assert!(coder.compress(codec, &noise).unwrap().is_none());
            assert!(coder.compress(codec, &[1]).unwrap().is_none());
            assert!(coder.compress(codec, &[]).unwrap().is_none());
        }
    }

    /// A gigabyte in a few bytes is an error after one block.
    #[test]
    fn a_bomb_fills_no_more_than_a_block() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
        assert!(bomb.len() < BLOCK_MAX);
        let mut block = vec![0; BLOCK_MAX];
        assert!(Coder::new().decompress(Codec::Zstd, &bomb, &mut block).is_err());
        let bomb = lz4_flex::block::compress(&vec![0; 16 << 20]);
        assert!(bomb.len() < BLOCK_MAX);
        assert!(Coder::new().decompress(Codec::Lz4, &bomb, &mut block).is_err());
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_or_a_block(bytes in proptest::collection::vec(any::<u8>(), 0..2000), length in 0_usize..5000) {
            let mut coder = Coder::new();
            let mut into = vec![0; length];
            for codec in BOTH {
                let _ = coder.decompress(codec, &bytes, &mut into);
            }
        }

        #[test]
        fn a_flipped_bit_does_no_harm(at in 0_usize..10_000, bit in 0_u8..8) {
            let text: Vec<u8> = (0..20_000_u32).map(|i| (i * i / 977) as u8).collect();
            let mut coder = Coder::new();
            for codec in BOTH {
                let Some(stored) = coder.compress(codec, &text).unwrap() else { continue };
                let mut stored = stored.to_vec();
                let at = at % stored.len();
                stored[at] ^= 1 << bit;
                let _ = coder.decompress(codec, &stored, &mut vec![0; text.len()]);
            }
        }
    }
}
