//! FIEMAP: where a file's bytes lie in its file system's device.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use thiserror::Error;

use crate::bytes::{u32_le, u64_le};
use crate::left_out::LeftOut;

const HEADER_BYTES: usize = 32;
const EXTENT_BYTES: usize = 56;
/// Extents that one call returns at most.
const EXTENTS_AT_ONCE: usize = 512;
/// Extents that one file may have at most: 12 MiB of them.
const MOST_EXTENTS: usize = 524_288;

/// `_IOWR('f', 11, struct fiemap)`, from linux/fs.h.
const FS_IOC_FIEMAP: libc::c_ulong = 0xC020_660B;

const LAST: u32 = 0x1;
/// Flags of linux/fiemap.h after which no reference may name the place, and why: the bytes are not there, not yet, not as they are,
/// or not for long. The first that is set is the reason. A shared extent (SHARED) has the right bytes now; but a page that is flushed
/// after the lists were made goes elsewhere, where one that shares nothing is written in place and a reference to it stays right.
const FORBIDDEN: [(u32, LeftOut); 6] = [
    // DELALLOC, UNKNOWN
    (0x4 | 0x2, LeftOut::NotPlaced),
    // DATA_ENCRYPTED, ENCODED
    (0x80 | 0x8, LeftOut::Encoded),
    // DATA_INLINE, DATA_TAIL
    (0x200 | 0x400, LeftOut::Inline),
    // NOT_ALIGNED
    (0x100, LeftOut::Inline),
    // UNWRITTEN
    (0x800, LeftOut::Unwritten),
    // SHARED
    (0x2000, LeftOut::Shared),
];

/// A piece of a file that lies in one piece on its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file, in bytes.
    pub logical: u64,
    /// Offset in the device, in bytes.
    pub physical: u64,
    /// Bytes.
    pub length: u64,
}

impl Extent {
    /// Offset in the file behind it. No extent of a map overflows: its answer was checked.
    const fn end(&self) -> u64 {
        self.logical.saturating_add(self.length)
    }
}

/// The extents of a file by offset, none overlapping another. What is in none of them is a hole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentMap {
    extents: Vec<Placed>,
}

/// An extent, and whether its place may be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placed {
    extent: Extent,
    unfit: Option<LeftOut>,
}

/// Why a file cannot be mapped.
#[derive(Debug, Error)]
pub enum FiemapError {
    /// The file system refuses.
    #[error("the file system does not tell where the file lies (FIEMAP): {0}")]
    Ioctl(#[from] io::Error),
    /// The answer contradicts itself.
    #[error("the file system's answer contradicts itself at {logical:#x}")]
    Answer {
        /// Where in the file.
        logical: u64,
    },
    /// Too many pieces.
    #[error("the file lies in more than {MOST_EXTENTS} pieces")]
    TooMany,
}

/// One extent of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answered {
    extent: Extent,
    flags: u32,
}

impl ExtentMap {
    /// Asks the file system.
    ///
    /// # Errors
    /// [`FiemapError`].
    pub fn of(file: &File) -> Result<Self, FiemapError> {
        let mut map = Self::default();
        let mut start = 0;
        // Each call returns one extent at least, or it was the last.
        while let Some(next) = map.add_answer(&ask(file, start)?, start)? {
            start = next;
        }
        Ok(map)
    }

    /// Adds one answer, a `struct fiemap` with its extents, to a question that began at `start`; returns where the next begins, `None` when
    /// it was the last.
    ///
    /// # Errors
    /// [`FiemapError`] when the answer contradicts itself or the file lies in too many pieces.
    pub fn add_answer(&mut self, answer: &[u8], start: u64) -> Result<Option<u64>, FiemapError> {
        let mut end = start;
        let mut last = true;
        for answered in parse(answer).ok_or(FiemapError::Answer { logical: start })? {
            let Answered { extent, flags } = answered;
            let wrong = FiemapError::Answer { logical: extent.logical };
            let extent_end = extent.logical.checked_add(extent.length);
            let physical_end = extent.physical.checked_add(extent.length);
            // The first may begin before the question, when that lies inside it.
            let (Some(extent_end), Some(_)) = (extent_end, physical_end) else { return Err(wrong) };
            if extent.length == 0 || extent_end <= end || (extent.logical < end && end != start) {
                return Err(wrong);
            }
            end = extent_end;
            last = flags & LAST != 0;
            if self.extents.last().is_some_and(|before| before.extent.end() > extent.logical) {
                return Err(wrong);
            }
            let unfit = FORBIDDEN.iter().find(|(flag, _)| flags & flag != 0).map(|(_, reason)| *reason);
            self.push(Placed { extent, unfit })?;
        }
        Ok((!last).then_some(end))
    }

    fn push(&mut self, placed: Placed) -> Result<(), FiemapError> {
        if let Some(before) = self.extents.last_mut()
            && before.unfit == placed.unfit
            && before.extent.end() == placed.extent.logical
            && before.extent.physical + before.extent.length == placed.extent.physical
        {
            before.extent.length += placed.extent.length;
            return Ok(());
        }
        if self.extents.len() == MOST_EXTENTS {
            return Err(FiemapError::TooMany);
        }
        self.extents.push(placed);
        Ok(())
    }

    /// Hands out the pieces that a range of the file lies in.
    ///
    /// # Errors
    /// [`LeftOut`] with the reason when the range does not lie on the device as a whole; some pieces may have been handed out.
    pub fn pieces(&self, logical: u64, length: u64, mut each: impl FnMut(Extent)) -> Result<(), LeftOut> {
        let end = logical.checked_add(length).ok_or(LeftOut::BeyondFile)?;
        let mut at = logical;
        let first = self.extents.partition_point(|placed| placed.extent.end() <= logical);
        for Placed { extent, unfit } in self.extents.get(first..).unwrap_or_default() {
            if extent.logical > at || at >= end {
                break;
            }
            if let Some(reason) = unfit {
                return Err(*reason);
            }
            let piece_end = end.min(extent.logical + extent.length);
            each(Extent {
                logical: at,
                physical: extent.physical + (at - extent.logical),
                length: piece_end - at,
            });
            at = piece_end;
        }
        if at >= end { Ok(()) } else { Err(LeftOut::Hole) }
    }

    /// Hands out the pieces of a range of the file that may be named, and passes over holes and what may not.
    pub fn fit_pieces(&self, logical: u64, length: u64, mut each: impl FnMut(Extent)) {
        let end = logical.saturating_add(length);
        let first = self.extents.partition_point(|placed| placed.extent.end() <= logical);
        let rest = self.extents.get(first..).unwrap_or_default();
        for Placed { extent, unfit } in rest.iter().take_while(|placed| placed.extent.logical < end) {
            let (begin, piece_end) = (extent.logical.max(logical), extent.end().min(end));
            if unfit.is_none() && begin < piece_end {
                let physical = extent.physical + (begin - extent.logical);
                each(Extent { logical: begin, physical, length: piece_end - begin });
            }
        }
    }

    /// Where the next byte at or behind `logical` is that may be named.
    pub fn next_fit(&self, logical: u64) -> Option<u64> {
        let first = self.extents.partition_point(|placed| placed.extent.end() <= logical);
        let placed = self.extents.get(first..)?.iter().find(|placed| placed.unfit.is_none())?;
        Some(placed.extent.logical.max(logical))
    }

    /// Pieces in all.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Whether the file has none.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Bytes of the file that may be named, and bytes that may not, by reason.
    pub fn bytes(&self) -> (u64, BTreeMap<LeftOut, u64>) {
        let (mut fit, mut unfit) = (0_u64, BTreeMap::new());
        for placed in &self.extents {
            let sum = match placed.unfit {
                None => &mut fit,
                Some(reason) => unfit.entry(reason).or_default(),
            };
            *sum = sum.saturating_add(placed.extent.length);
        }
        (fit, unfit)
    }
}

/// The extents of an answer; `None` when it is cut short.
fn parse(answer: &[u8]) -> Option<impl Iterator<Item = Answered> + '_> {
    let mapped = u32_le(answer, 20)? as usize;
    let extents = answer.get(HEADER_BYTES..HEADER_BYTES.checked_add(mapped.checked_mul(EXTENT_BYTES)?)?)?;
    Some(extents.chunks_exact(EXTENT_BYTES).filter_map(|bytes| {
        let extent =
            Extent { logical: u64_le(bytes, 0)?, physical: u64_le(bytes, 8)?, length: u64_le(bytes, 16)? };
        Some(Answered { extent, flags: u32_le(bytes, 40)? })
    }))
}

fn ask(file: &File, start: u64) -> io::Result<Vec<u8>> {
    // struct fiemap: start, length, flags, mapped, room, reserved; then the extents. u64s, so that it is aligned.
    let mut words = vec![0_u64; (HEADER_BYTES + EXTENTS_AT_ONCE * EXTENT_BYTES) / 8];
    words[0] = start;
    words[1] = u64::MAX - start;
    words[3] = EXTENTS_AT_ONCE as u64;
    // SAFETY: the buffer is as large as the room it names, aligned for u64, and lives through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, words.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(words.into_iter().flat_map(u64::to_le_bytes).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(extents: &[(u64, u64, u64, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[20..24].copy_from_slice(&(extents.len() as u32).to_le_bytes());
        for (logical, physical, length, flags) in extents {
            let mut extent = [0; EXTENT_BYTES];
            extent[0..8].copy_from_slice(&logical.to_le_bytes());
            extent[8..16].copy_from_slice(&physical.to_le_bytes());
            extent[16..24].copy_from_slice(&length.to_le_bytes());
            extent[40..44].copy_from_slice(&flags.to_le_bytes());
            bytes.extend(extent);
        }
        bytes
    }

    type Pieces = (Vec<(u64, u64)>, Result<(), LeftOut>);

    fn pieces(map: &ExtentMap, logical: u64, length: u64) -> Pieces {
        let mut pieces = Vec::new();
        let whole = map.pieces(logical, length, |piece| pieces.push((piece.physical, piece.length)));
        (pieces, whole)
    }

    #[test]
    fn a_page_in_two_places_comes_in_two_pieces() {
        let mut map = ExtentMap::default();
        let extents =
            [(0, 0x10_0000, 0x5000, 0), (0x5000, 0x40_0000, 0x3000, 0), (0x9000, 0x80_0000, 0x4000, LAST)];
        assert_eq!(map.add_answer(&answer(&extents), 0).unwrap(), None);
        assert_eq!(pieces(&map, 0, 0x4000), (vec![(0x10_0000, 0x4000)], Ok(())));
        assert_eq!(pieces(&map, 0x4000, 0x4000), (vec![(0x10_4000, 0x1000), (0x40_0000, 0x3000)], Ok(())));
        // A hole from 0x8000 to 0x9000.
        assert_eq!(pieces(&map, 0x8000, 0x4000).1, Err(LeftOut::Hole));
        assert_eq!(pieces(&map, 0xc000, 0x4000).1, Err(LeftOut::Hole));
    }

    #[test]
    fn extents_whose_bytes_are_elsewhere_are_left_out_with_the_reason() {
        for (flag, reason) in [
            (0x2, LeftOut::NotPlaced),
            (0x4 | 0x2, LeftOut::NotPlaced),
            (0x8, LeftOut::Encoded),
            (0x80 | 0x8, LeftOut::Encoded),
            (0x100, LeftOut::Inline),
            (0x200 | 0x100, LeftOut::Inline),
            (0x400 | 0x100, LeftOut::Inline),
            (0x800, LeftOut::Unwritten),
            (0x2000, LeftOut::Shared),
        ] {
            let mut map = ExtentMap::default();
            let extents = [(0, 0x10_0000, 0x4000, flag), (0x4000, 0x10_4000, 0x4000, LAST | 0x1000)];
            map.add_answer(&answer(&extents), 0).unwrap();
            assert_eq!(pieces(&map, 0, 0x4000).1, Err(reason), "flag {flag:#x}");
            assert_eq!(pieces(&map, 0x2000, 0x4000).1, Err(reason), "flag {flag:#x}");
            assert_eq!(pieces(&map, 0x4000, 0x4000).1, Ok(()), "MERGED forbids nothing");
            assert_eq!(map.bytes(), (0x4000, [(reason, 0x4000)].into()));
        }
    }

    #[test]
    fn adjoining_answers_are_one_extent() {
        let mut map = ExtentMap::default();
        assert_eq!(map.add_answer(&answer(&[(0, 0x1000, 0x1000, 0)]), 0).unwrap(), Some(0x1000));
        assert_eq!(map.add_answer(&answer(&[(0x1000, 0x2000, 0x1000, LAST)]), 0x1000).unwrap(), None);
        assert_eq!(map.len(), 1);
        assert_eq!(pieces(&map, 0, 0x2000), (vec![(0x1000, 0x2000)], Ok(())));
    }

    #[test]
    fn a_file_is_mapped_or_the_file_system_says_no() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &[7; 20_000]).unwrap();
        file.sync_all().unwrap();
        match ExtentMap::of(&file) {
            Ok(map) => assert_eq!(map.pieces(0, 20_000, |_| {}), Ok(()), "{map:?}"),
            Err(error) => assert!(matches!(error, FiemapError::Ioctl(_)), "{error}"),
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), start in any::<u64>()) {
            let _ = ExtentMap::default().add_answer(&bytes, start);
        }

        #[test]
        fn any_extents_are_taken_or_refused(
            extents in prop::collection::vec((0_u64..1 << 20, any::<u64>(), 0_u64..1 << 16, 0_u32..0x1000), 0..6),
            logical in 0_u64..1 << 21,
            length in 0_u64..1 << 17,
        ) {
            let mut map = ExtentMap::default();
            if map.add_answer(&answer(&extents), 0).is_ok() {
                let mut sum = 0;
                let whole = map.pieces(logical, length, |piece| sum += piece.length);
                prop_assert!(sum <= length);
                prop_assert_eq!(whole.is_ok(), sum == length);
            }
        }
    }
}
