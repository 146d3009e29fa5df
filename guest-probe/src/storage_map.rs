//! From a page of a tablespace to its place on the whole disk: file, extents, file system's device, partition.
//!
//! Made anew for each answer, because files move and holes fill up; each file is asked once, when a page of it comes by.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use enlightenment::{PAGE_SIZE, Vdev};

use crate::disk::Disks;
use crate::fiemap::ExtentMap;
use crate::frame_table::{PAGE_BYTES, PageId};
use crate::left_out::LeftOut;
use crate::spaces::{SpaceFlags, Spaces};

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

/// A file with its extents.
struct MappedFile {
    extents: ExtentMap,
    /// Pages of InnoDB in the file.
    pages: u64,
    vdev: Vdev,
    start: u64,
    disk_bytes: u64,
}

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
        let mut outside = false;
        let whole = file.extents.pieces(in_file, PAGE_BYTES, |extent| {
            let disk_offset = file.start.checked_add(extent.physical);
            let end = disk_offset.and_then(|offset| offset.checked_add(extent.length));
            outside |= end.is_none_or(|end| end > file.disk_bytes);
            // Cut to whole guest pages of the file.
            let into = extent.logical - in_file;
            let offset = into.next_multiple_of(PAGE_SIZE as u64);
            let pages = (into + extent.length).saturating_sub(offset) / PAGE_SIZE as u64;
            let disk_offset = disk_offset.unwrap_or_default().saturating_add(offset - into);
            if pages > 0 && disk_offset.is_multiple_of(512) {
                pieces.push(DiskPiece { offset, vdev: file.vdev, disk_offset, pages: pages as u16 });
            }
        });
        let reason = if !whole {
            LeftOut::Hole
        } else if outside {
            LeftOut::BeyondDisk
        } else if pieces.is_empty() {
            LeftOut::Misaligned
        } else {
            return Ok(());
        };
        pieces.clear();
        Err(reason)
    }

    /// Whether a file that is known could not be opened: its name has changed since the last scan.
    pub fn found_moved_file(&self) -> bool {
        self.files.values().any(|file| matches!(file, Err(LeftOut::FileGone)))
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
    let place = disks.get(known.device).ok_or(LeftOut::NoDisk)?;
    let vdev = match (place.vdev, rule) {
        (Some(vdev), _) => vdev,
        (None, DiskRule::Any) => Vdev(place.device.major << 20 | place.device.minor),
        (None, DiskRule::Xen) => return Err(LeftOut::NotXen),
    };
    let file = known.open().map_err(|error| {
        tracing::debug!(%error, name = %known.name.display(), "a data file cannot be opened");
        LeftOut::FileGone
    })?;
    let bytes = file.metadata().map_err(|_| LeftOut::FileGone)?.len();
    let extents = ExtentMap::of(&file).map_err(|error| {
        tracing::warn!(%error, name = %known.name.display(), "pages of a data file are not listed");
        LeftOut::Unmappable
    })?;
    Ok(MappedFile { extents, pages: bytes / PAGE_BYTES, vdev, start: place.start, disk_bytes: place.bytes })
}
