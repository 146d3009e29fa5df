//! From a page of a tablespace to its place on the whole disk: file, extents, file system's device, partition or volume, disk.
//!
//! Made anew for each answer, because files grow, move and are replaced, holes fill up and volumes are extended; each file is asked
//! once, when a page of it comes by, and each device too. What the answer before knew is never used. Files that are new, renamed or gone
//! are the matter of [`Spaces`]; [`StorageMap::found_moved_file`] says when they should be looked for again.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use enlightenment::{PAGE_SIZE, Vdev};
use nix::sys::statfs::fstatfs;

use crate::disk::{DeviceNumber, DevicePiece, DiskPlace, Disks};
use crate::fiemap::{Extent, ExtentMap};
use crate::frame_table::{PAGE_BYTES, PageId};
use crate::left_out::LeftOut;
use crate::spaces::{SpaceFile, SpaceFlags, Spaces};

/// Which disks count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskRule {
    /// Only Xen's: what is published names disks by their number there.
    Xen,
    /// All, named by device number (`major << 20 | minor`) where they have none of Xen's. For looking only: never published.
    Any,
}

/// A piece of a page on the whole disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskPiece {
    /// Offset in the page, a multiple of [`PAGE_SIZE`].
    pub offset: u64,
    /// The disk.
    pub vdev: Vdev,
    /// Offset on the disk in bytes, a multiple of 512.
    pub disk_offset: u64,
    /// Guest pages of [`PAGE_SIZE`] bytes.
    pub pages: u16,
}

/// A file with its extents, on disks that may be named.
pub struct PlacedFile {
    extents: ExtentMap,
    device: DeviceNumber,
}

impl PlacedFile {
    /// Asks for the places of an open file on this device; `name` is for the log.
    ///
    /// # Errors
    /// [`LeftOut`] with the reason that holds for all its bytes.
    pub fn of(
        file: &File,
        name: &Path,
        device: DeviceNumber,
        disks: &mut Disks,
        rule: DiskRule,
    ) -> Result<Self, LeftOut> {
        is_nameable(device, disks, rule)?;
        if let Some(reason) = unfit_file_system(file) {
            return Err(reason);
        }
        let extents = ExtentMap::of(file).map_err(|error| {
            tracing::warn!(%error, name = %name.display(), "pages of a file are not listed");
            LeftOut::Unmappable
        })?;
        Ok(Self { extents, device })
    }

    /// Where the next byte at or behind `in_file` is whose place may be named.
    pub fn next_fit(&self, in_file: u64) -> Option<u64> {
        self.extents.next_fit(in_file)
    }

    /// Hands out the whole guest pages of a range of the file (at most 256 MiB, that [`DiskPiece::pages`] can count them) whose places may be named.
    pub fn fit_pieces(
        &self,
        disks: &mut Disks,
        rule: DiskRule,
        in_file: u64,
        length: u64,
        mut each: impl FnMut(DiskPiece),
    ) {
        let Ok(device) = disks.map(self.device) else { return };
        self.extents.fit_pieces(in_file, length, |extent| {
            // Of what the device cannot name as a whole, the pieces before that are still right.
            let _ = device.pieces(extent.physical, extent.length, |piece| {
                if let Ok(vdev) = name_of(piece.place, rule) {
                    each_whole(&extent, &piece, in_file, vdev, &mut each);
                }
            });
        });
    }
}

/// Whether any byte of a device may be named: asked before its files are.
fn is_nameable(device: DeviceNumber, disks: &mut Disks, rule: DiskRule) -> Result<(), LeftOut> {
    disks.map(device)?.first().map_or(Ok(()), |place| name_of(place, rule).map(|_| ()))
}

/// What of a piece of an extent is whole guest pages, counted from `in_file`; nothing when none is, or when they begin at an odd place.
fn each_whole(
    extent: &Extent,
    piece: &DevicePiece<'_>,
    in_file: u64,
    vdev: Vdev,
    mut each: impl FnMut(DiskPiece),
) {
    let into = extent.logical - in_file + piece.into;
    let offset = into.next_multiple_of(PAGE_SIZE as u64);
    let pages = (into + piece.length).saturating_sub(offset) / PAGE_SIZE as u64;
    let disk_offset = piece.disk_offset.saturating_add(offset - into);
    if let (1.., Ok(pages), true) = (pages, u16::try_from(pages), disk_offset.is_multiple_of(512)) {
        each(DiskPiece { offset, vdev, disk_offset, pages });
    }
}

/// A data file.
struct MappedFile {
    place: PlacedFile,
    /// Pages of InnoDB in the file.
    pages: u64,
}

/// `FS_IOC_FSGETXATTR`: `_IOR('X', 31, struct fsxattr)`, from linux/fs.h.
const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801C_581F;
/// `FS_XFLAG_REALTIME`: the bytes are on another device than the one that `st_dev` names.
const XFLAG_REALTIME: u32 = 1;
/// Words of a `struct fsxattr`; the flags are the first.
const FSXATTR_WORDS: usize = 7;
/// Magic numbers of linux/magic.h: ext2, ext3 and ext4 share theirs.
const EXT_MAGIC: i64 = 0xEF53;
const XFS_MAGIC: i64 = 0x5846_5342;

/// Places of pages, for one answer.
pub struct StorageMap<'a> {
    spaces: &'a Spaces,
    disks: &'a mut Disks,
    rule: DiskRule,
    files: HashMap<u32, Result<MappedFile, LeftOut>>,
}

impl<'a> StorageMap<'a> {
    /// No file was asked yet.
    pub fn new(spaces: &'a Spaces, disks: &'a mut Disks, rule: DiskRule) -> Self {
        disks.forget();
        Self { spaces, disks, rule, files: HashMap::new() }
    }

    /// The pieces that a page lies in, at most four. A page that does not lie on disk as a whole is left out: it may be one that
    /// mysqld compressed with a hole behind it. Of a page whose pieces begin at odd places, only whole guest pages are named.
    ///
    /// # Errors
    /// [`LeftOut`] with the reason.
    pub fn pieces(&mut self, page: PageId, pieces: &mut Vec<DiskPiece>) -> Result<(), LeftOut> {
        pieces.clear();
        let mapped = match self.files.entry(page.space) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(map_file(self.spaces, self.disks, self.rule, page.space)),
        };
        let file = mapped.as_ref().map_err(|reason| *reason)?;
        if u64::from(page.page) >= file.pages {
            return Err(LeftOut::BeyondFile);
        }
        let in_file = u64::from(page.page) * PAGE_BYTES;
        let device = self.disks.map(file.place.device)?;
        let mut outcome = Ok(());
        file.place
            .extents
            .pieces(in_file, PAGE_BYTES, |extent| {
                let found = device.pieces(extent.physical, extent.length, |piece| {
                    let place = match name_of(piece.place, self.rule) {
                        Ok(vdev) => vdev,
                        Err(reason) => return outcome = Err(reason),
                    };
                    each_whole(&extent, &piece, in_file, place, |piece| pieces.push(piece));
                });
                if outcome.is_ok() {
                    outcome = found;
                }
            })
            .and(outcome)
            .and(if pieces.is_empty() { Err(LeftOut::Misaligned) } else { Ok(()) })
            .inspect_err(|_| pieces.clear())
    }

    /// Whether files should be looked for again, since the last scan is behind: one has another name now or is another file (renamed,
    /// dropped, made anew by `ALTER` or `TRUNCATE`), or a page is of a tablespace that no file was seen of. This is how a caller
    /// learns of it where no event told; a file that grew or shrank needs no scan, its size and extents are asked for each answer.
    pub fn found_moved_file(&self) -> bool {
        self.files.iter().any(|(space, file)| match file {
            Err(LeftOut::FileGone) => true,
            // Of one that two files claim another scan would find no more.
            Err(LeftOut::NoFile) => !self.spaces.is_claimed_twice(*space),
            _ => false,
        })
    }

    /// How a file lies on disk: bytes that may be named, and bytes that may not, by reason. What its pages are like is not asked.
    ///
    /// # Errors
    /// [`LeftOut`] where nothing of it may.
    pub fn bytes_of(&mut self, file: &SpaceFile) -> Result<(u64, BTreeMap<LeftOut, u64>), LeftOut> {
        Ok(map_known_file(file, self.disks, self.rule)?.place.extents.bytes())
    }
}

/// Why no page of a tablespace with these flags can be read from disk as it is in memory.
pub fn unfit(flags: SpaceFlags) -> Option<LeftOut> {
    if flags.is_temporary() {
        Some(LeftOut::Temporary)
    } else if flags.is_encrypted() {
        Some(LeftOut::Encrypted)
    } else if flags.is_compressed() || flags.has_other_page_size() {
        Some(LeftOut::Compressed)
    } else {
        None
    }
}

fn map_file(spaces: &Spaces, disks: &mut Disks, rule: DiskRule, space: u32) -> Result<MappedFile, LeftOut> {
    let known = spaces.get(space).ok_or(LeftOut::NoFile)?;
    if let Some(reason) = unfit(known.header.flags) {
        return Err(reason);
    }
    map_known_file(known, disks, rule)
}

fn map_known_file(known: &SpaceFile, disks: &mut Disks, rule: DiskRule) -> Result<MappedFile, LeftOut> {
    // Asked here for the reason that holds for all its pages, before the file is opened.
    is_nameable(known.device, disks, rule)?;
    let file = known.open().map_err(|error| {
        tracing::debug!(%error, name = %known.name.display(), "a data file cannot be opened");
        LeftOut::FileGone
    })?;
    let bytes = file.metadata().map_err(|_| LeftOut::FileGone)?.len();
    let place = PlacedFile::of(&file, &known.name, known.device, disks, rule)?;
    Ok(MappedFile { place, pages: bytes / PAGE_BYTES })
}

/// What a disk is called in the lists.
fn name_of(place: &DiskPlace, rule: DiskRule) -> Result<Vdev, LeftOut> {
    match (place.vdev, rule) {
        (Some(vdev), _) => Ok(vdev),
        (None, DiskRule::Any) => Ok(Vdev(place.device.major << 20 | place.device.minor)),
        (None, DiskRule::Xen) => Err(LeftOut::NotXen),
    }
}

/// Why what FIEMAP says of a file is no place on its file system's device. Only file systems that were tried are believed: others
/// answer with places in an address space of their own (btrfs), or spread over several devices (f2fs).
fn unfit_file_system(file: &File) -> Option<LeftOut> {
    let Ok(stat) = fstatfs(file) else { return Some(LeftOut::Unmappable) };
    match stat.filesystem_type().0 {
        EXT_MAGIC => None,
        XFS_MAGIC => {
            let mut attributes = [0_u32; FSXATTR_WORDS];
            // SAFETY: the buffer has the 28 bytes of a struct fsxattr and lives through the call.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, attributes.as_mut_ptr()) };
            (result < 0 || attributes[0] & XFLAG_REALTIME != 0).then_some(LeftOut::Realtime)
        }
        _ => Some(LeftOut::OtherFileSystem),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_that_are_on_disk_as_in_memory_are_fit() {
        for (flags, reason) in [
            // 0 and 5 stand for pages of 16 KiB; the other bits say where the file is and what it has beside pages.
            (0x4021, None),
            (0x4021 | 5 << 6, None),
            (0x4021 | 3 << 6, Some(LeftOut::Compressed)),
            (0x4021 | 6 << 6, Some(LeftOut::Compressed)),
            (0x4029, Some(LeftOut::Compressed)),
            (0x1000, Some(LeftOut::Temporary)),
            (0x2000, Some(LeftOut::Encrypted)),
        ] {
            assert_eq!(unfit(SpaceFlags(flags)), reason, "{flags:#x}");
        }
    }
}
