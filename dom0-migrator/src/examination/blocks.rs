//! Whether a disk is the same on two hosts, by what lies on it. Both read some blocks, past their caches, and only keyed hashes go over
//! the network.
//!
//! A disk that a guest writes to changes between the two readings. So a block counts as different only when this host read the same
//! before and after the other one read something else. And a block of one value all over (an empty disk's zeros) proves nothing.

use std::path::Path;

use crate::engine::disk::{ALIGNMENT, AlignedBuffer, Disk, DiskError};

/// Bytes of a block.
pub const BLOCK: u64 = ALIGNMENT as u64;
/// Blocks at the beginning, where partition tables and file systems have their names and times.
const FIRST: u64 = 16;
/// Where the first partition begins on most disks, and blocks from there on.
const PARTITION: u64 = 1 << 20;
/// Blocks anywhere.
const SCATTERED: usize = 48;

/// A key for one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(pub [u8; 32]);

impl Key {
    /// A random one.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 32];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
        Ok(Self(bytes))
    }

    /// As it travels.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// From how it travels.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

/// Where to look on a disk of this size: the beginning, the first partition's, the end, and anywhere, in ascending order.
pub fn offsets(size: u64, key: Key) -> Vec<u64> {
    let blocks = size / BLOCK;
    let mut all: Vec<u64> = (0..FIRST).chain((0..FIRST).map(|block| PARTITION / BLOCK + block)).collect();
    all.extend(blocks.checked_sub(1));
    let mut random = blake3::Hasher::new_keyed(&key.0).finalize_xof();
    for _ in 0..SCATTERED {
        let mut bytes = [0; 8];
        random.fill(&mut bytes);
        all.extend(u64::from_le_bytes(bytes).checked_rem(blocks));
    }
    all.retain(|block| *block < blocks);
    all.sort_unstable();
    all.dedup();
    all.iter().map(|block| block * BLOCK).collect()
}

/// A block as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its keyed hash, in hexadecimal.
    pub hash: String,
    /// Whether all its bytes are the same.
    pub blank: bool,
}

/// A disk, open to be looked at.
#[derive(Debug)]
pub struct Looked {
    disk: Disk,
    buffer: AlignedBuffer,
}

impl Looked {
    /// Opens it, read-only.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        Ok(Self { disk: Disk::open(path)?, buffer: AlignedBuffer::default() })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// Reads one block past the cache.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&mut self, offset: u64, key: Key) -> std::io::Result<Block> {
        let length = ALIGNMENT;
        let inside = offset.is_multiple_of(BLOCK)
            && offset.checked_add(BLOCK).is_some_and(|end| end <= self.disk.size());
        if !inside {
            return Err(std::io::Error::other(format!("no block lies at {offset}")));
        }
        let buffer = self.buffer.get(length);
        if self.disk.read(buffer, offset)? < length {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let blank = buffer.iter().all(|byte| Some(byte) == buffer.first());
        Ok(Block { hash: blake3::keyed_hash(&key.0, buffer).to_hex().to_string(), blank })
    }
}

/// What came of comparing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// So many blocks that are not blank are the same, and none differs.
    Same(usize),
    /// Nothing differs, and nothing is there that could.
    Blank,
    /// At this offset there is something else.
    Differs(u64),
    /// The sizes differ: here, there.
    Sizes(u64, u64),
}

/// Compares: `ask` has the other host read the same offsets with the same key, and gives its size and hashes.
///
/// # Errors
/// Why it could not be compared, in words.
pub fn compare(
    path: &Path,
    ask: &mut impl FnMut(&[u64], Key) -> Result<(u64, Vec<String>), String>,
) -> Result<Comparison, String> {
    let mut here = Looked::open(path).map_err(|error| error.to_string())?;
    let key = Key::random().map_err(|error| error.to_string())?;
    let mut open = offsets(here.size(), key);
    let mut same = 0;
    // A guest that writes is given three chances to leave a block alone while both look at it.
    for _ in 0..3 {
        let mut read = |offsets: &[u64]| -> Result<Vec<Block>, String> {
            offsets
                .iter()
                .map(|offset| {
                    here.read(*offset, key)
                        .map_err(|error| format!("{} at {offset}: {error}", path.display()))
                })
                .collect()
        };
        let before = read(&open)?;
        let (size, there) = ask(&open, key)?;
        if there.len() != open.len() {
            return Err(format!("{} hashes for {} blocks", there.len(), open.len()));
        }
        let after = read(&open)?;
        let mut again = Vec::new();
        for (((offset, before), after), there) in open.iter().zip(&before).zip(&after).zip(&there) {
            if *there == before.hash || *there == after.hash {
                same += usize::from(!before.blank);
            } else if before == after {
                return Ok(if size == here.size() {
                    Comparison::Differs(*offset)
                } else {
                    Comparison::Sizes(here.size(), size)
                });
            } else {
                again.push(*offset);
            }
        }
        if size != here.size() {
            return Ok(Comparison::Sizes(here.size(), size));
        }
        open = again;
        if open.is_empty() {
            break;
        }
    }
    Ok(if same > 0 { Comparison::Same(same) } else { Comparison::Blank })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek as _, SeekFrom, Write as _};

    const SIZE: u64 = 8 << 20;

    fn disk(fill: impl Fn(u64) -> u8) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..SIZE).map(fill).collect();
        file.write_all(&bytes).unwrap();
        file.as_file().sync_all().unwrap();
        file
    }

    fn answer(path: &Path, offsets: &[u64], key: Key) -> Result<(u64, Vec<String>), String> {
        let mut disk = Looked::open(path).map_err(|error| error.to_string())?;
        let hashes = offsets.iter().map(|offset| disk.read(*offset, key).unwrap().hash).collect();
        Ok((disk.size(), hashes))
    }

    fn mixed(at: u64) -> u8 {
        (at / 7 + at / 4096) as u8
    }

    #[test]
    fn places_to_look_at_lie_within_the_disk() {
        let key = Key([7; 32]);
        for size in [0, 4095, 4096, 1 << 20, 5 << 20, 1 << 40] {
            let offsets = offsets(size, key);
            assert!(offsets.iter().all(|offset| offset % BLOCK == 0 && offset + BLOCK <= size), "{size}");
            assert!(offsets.is_sorted() && offsets.len() <= super::super::OFFSETS_MAX);
        }
        assert!(offsets(1 << 40, key).contains(&((1 << 40) - BLOCK)));
        assert_eq!(Key::parse(&key.hex()), Some(key));
        assert_eq!((Key::parse("7"), Key::parse(&"é".repeat(32))), (None, None));
    }

    #[test]
    fn the_same_disk_is_the_same_and_a_copy_that_went_its_own_way_is_not() {
        let (one, mut copy) = (disk(mixed), disk(mixed));
        let found = compare(one.path(), &mut |offsets, key| answer(one.path(), offsets, key)).unwrap();
        assert!(matches!(found, Comparison::Same(60..)), "{found:?}");
        // A clone of a template that was mounted once: its superblock's times differ.
        copy.seek(SeekFrom::Start(PARTITION + 1024)).unwrap();
        copy.write_all(b"mounted").unwrap();
        copy.as_file().sync_all().unwrap();
        let found = compare(one.path(), &mut |offsets, key| answer(copy.path(), offsets, key)).unwrap();
        assert_eq!(found, Comparison::Differs(PARTITION));
    }

    #[test]
    fn another_size_and_an_empty_disk_are_told() {
        let (one, empty) = (disk(mixed), disk(|_| 0));
        let shorter = disk(mixed);
        shorter.as_file().set_len(SIZE - BLOCK).unwrap();
        let short = shorter.path().to_owned();
        let found = compare(one.path(), &mut |offsets, key| {
            let offsets: Vec<u64> = offsets.iter().map(|offset| (*offset).min(SIZE - 2 * BLOCK)).collect();
            answer(&short, &offsets, key)
        });
        assert_eq!(found, Ok(Comparison::Sizes(SIZE, SIZE - BLOCK)));
        let found = compare(empty.path(), &mut |offsets, key| answer(empty.path(), offsets, key));
        assert_eq!(found, Ok(Comparison::Blank));
    }

    #[test]
    fn a_block_that_is_being_written_to_counts_neither_way() {
        let one = disk(mixed);
        let path = one.path().to_owned();
        let mut times = 0;
        let found = compare(&path, &mut |offsets, key| {
            // The guest writes before the other host reads, and again after it.
            let write = |text: &[u8]| {
                let mut file = std::fs::File::options().write(true).open(&path).unwrap();
                file.write_all(text).unwrap();
                file.sync_all().unwrap();
            };
            times += 1;
            write(format!("first {times}").as_bytes());
            let answered = answer(&path, offsets, key);
            write(format!("second {times}").as_bytes());
            answered
        });
        assert!(matches!(found, Ok(Comparison::Same(60..))), "{found:?}");
        assert_eq!(times, 3);
    }
}
