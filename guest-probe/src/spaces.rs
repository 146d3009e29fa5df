//! Which file holds which tablespace: page 0 of every data file says.
//!
//! Looked at are all files that mysqld has open, wherever they are, and the data files under its data directory, for it keeps only so
//! many open at a time.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::bytes::{u16_be, u32_be};
use crate::disk::DeviceNumber;
use crate::frame_table::PAGE_BYTES;
use crate::process::MysqldProcess;

/// Bytes of page 0 that are read: the page header of 38 and the tablespace header behind it.
const HEADER_BYTES: usize = 128;
/// FIL_PAGE_TYPE_FSP_HDR: the first page of a tablespace.
const TYPE_SPACE_HEADER: u16 = 8;
/// How deep data files lie under the data directory: `SCHEMA/TABLE.ibd`, `#innodb_temp/temp_1.ibt`.
const DEEPEST: usize = 3;
/// No more entries are looked at.
const MOST_ENTRIES: usize = 1 << 20;

/// The flags of a tablespace, in page 0 and in memory alike (fsp0types.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceFlags(pub u32);

impl SpaceFlags {
    /// Pages are compressed (`ROW_FORMAT=COMPRESSED`): frames hold them unpacked.
    pub const fn is_compressed(self) -> bool {
        self.0 >> 1 & 0xf != 0
    }

    /// Pages are not of 16 KiB (0 stands for them in old files, 5 is theirs).
    pub const fn has_other_page_size(self) -> bool {
        !matches!(self.0 >> 6 & 0xf, 0 | 5)
    }

    /// It ends with the server.
    pub const fn is_temporary(self) -> bool {
        self.0 >> 12 & 1 != 0
    }

    /// Pages are encrypted on disk.
    pub const fn is_encrypted(self) -> bool {
        self.0 >> 13 & 1 != 0
    }
}

/// What page 0 of a data file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceHeader {
    /// The tablespace.
    pub space: u32,
    /// Its flags.
    pub flags: SpaceFlags,
}

impl SpaceHeader {
    /// Parses the first bytes of a file; `None` when they are no tablespace's.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let page = u32_be(bytes, 4)?;
        let kind = u16_be(bytes, 24)?;
        let in_page_header = u32_be(bytes, 34)?;
        let space = u32_be(bytes, 38)?;
        let flags = SpaceFlags(u32_be(bytes, 38 + 16)?);
        (page == 0 && kind == TYPE_SPACE_HEADER && in_page_header == space).then_some(Self { space, flags })
    }
}

/// A data file. Of a tablespace of several files (more than one `ibdata`), the first alone is known; pages beyond its end are
/// not listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceFile {
    /// A path through which it can be opened, under `/proc/PID`.
    pub path: PathBuf,
    /// Its name, as far as it is known, for people.
    pub name: PathBuf,
    /// What its page 0 says.
    pub header: SpaceHeader,
    /// The device of its file system.
    pub device: DeviceNumber,
    /// Its inode there.
    pub inode: u64,
}

impl SpaceFile {
    /// Opens it, if it is still the same.
    ///
    /// # Errors
    /// When it is not.
    pub fn open(&self) -> io::Result<File> {
        let file = open(&self.path)?;
        let meta = file.metadata()?;
        if (DeviceNumber::from_st_dev(meta.dev()), meta.ino()) == (self.device, self.inode) {
            Ok(file)
        } else {
            Err(io::Error::new(io::ErrorKind::NotFound, "another file has taken its name"))
        }
    }
}

/// The files of all tablespaces.
#[derive(Debug, Default)]
pub struct Spaces {
    /// `None` where two files claim the same tablespace, as a copied data directory inside the data directory does.
    by_id: HashMap<u32, Option<SpaceFile>>,
}

impl Spaces {
    /// Looks at all data files of a server.
    ///
    /// # Errors
    /// When the list of its open files cannot be read: the process is gone, or this one is not root.
    pub fn scan(process: &MysqldProcess) -> io::Result<Self> {
        let mut spaces = Self::default();
        let mut seen = HashSet::new();
        for entry in fs::read_dir(process.fd_dir())? {
            // Files close while they are looked at.
            let Ok(path) = entry.map(|entry| entry.path()) else { continue };
            let Ok(name) = fs::read_link(&path) else { continue };
            if let Some(file) = look(path, name, &mut seen) {
                // Open files are the server's own, so two of one space cannot be.
                spaces.by_id.insert(file.header.space, Some(file));
            }
        }
        let open: HashSet<u32> = spaces.by_id.keys().copied().collect();
        let mut entries_left = MOST_ENTRIES;
        spaces.walk(&process.data_dir(), DEEPEST, &mut entries_left, &mut seen, &open);
        Ok(spaces)
    }

    /// The file of a tablespace; `None` when there is none, or more than one.
    pub fn get(&self, space: u32) -> Option<&SpaceFile> {
        self.by_id.get(&space)?.as_ref()
    }

    /// Whether two files claim a tablespace.
    pub fn is_claimed_twice(&self, space: u32) -> bool {
        matches!(self.by_id.get(&space), Some(None))
    }

    /// All files that are known, by tablespace.
    pub fn iter(&self) -> impl Iterator<Item = &SpaceFile> {
        self.by_id.values().flatten()
    }

    fn walk(
        &mut self,
        dir: &Path,
        deep: usize,
        entries_left: &mut usize,
        seen: &mut HashSet<(u64, u64)>,
        open: &HashSet<u32>,
    ) {
        // What cannot be read is not listed.
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let Some(left) = entries_left.checked_sub(1) else { return };
            *entries_left = left;
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() && deep > 1 {
                self.walk(&entry.path(), deep - 1, entries_left, seen, open);
            } else if kind.is_file() && is_data_file(&entry.file_name().to_string_lossy()) {
                let Some(file) = look(entry.path(), entry.path(), seen) else { continue };
                let space = file.header.space;
                if !open.contains(&space) {
                    self.by_id.entry(space).and_modify(|claimed| *claimed = None).or_insert(Some(file));
                }
            }
        }
    }
}

/// Whether a file of the data directory may hold a tablespace, by its name; page 0 decides.
fn is_data_file(name: &str) -> bool {
    [".ibd", ".ibu", ".ibt"].iter().any(|end| name.ends_with(end))
        || ["ibdata", "ibtmp", "undo"].iter().any(|start| name.starts_with(start))
}

/// The tablespace's first file at this path, if it is one that was not seen yet.
fn look(path: PathBuf, name: PathBuf, seen: &mut HashSet<(u64, u64)>) -> Option<SpaceFile> {
    if !fs::metadata(&path).ok()?.is_file() {
        return None;
    }
    let file = open(&path).ok()?;
    let meta = file.metadata().ok()?;
    if !meta.is_file() || meta.len() < PAGE_BYTES || !seen.insert((meta.dev(), meta.ino())) {
        return None;
    }
    // Without this the kernel reads ahead, for a file whose pages mysqld keeps itself.
    // SAFETY: a plain system call on a descriptor that is open.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
    let mut bytes = [0; HEADER_BYTES];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let header = SpaceHeader::parse(&bytes)?;
    Some(SpaceFile { path, name, header, device: DeviceNumber::from_st_dev(meta.dev()), inode: meta.ino() })
}

/// Opens for reading; a FIFO that somebody put there does not block.
fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page0(space: u32, flags: u32) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_BYTES as usize];
        bytes[24..26].copy_from_slice(&TYPE_SPACE_HEADER.to_be_bytes());
        bytes[34..38].copy_from_slice(&space.to_be_bytes());
        bytes[38..42].copy_from_slice(&space.to_be_bytes());
        bytes[54..58].copy_from_slice(&flags.to_be_bytes());
        bytes
    }

    #[test]
    fn flags_are_told_apart() {
        let plain = SpaceFlags(0x4021);
        assert!(!plain.is_compressed() && !plain.is_encrypted() && !plain.is_temporary());
        assert!(!plain.has_other_page_size());
        assert!(SpaceFlags(0x4029).is_compressed());
        assert!(SpaceFlags(0x2000).is_encrypted());
        assert!(SpaceFlags(0x1000).is_temporary());
        assert!(SpaceFlags(4 << 6).has_other_page_size());
        assert!(!SpaceFlags(5 << 6).has_other_page_size());
    }

    #[test]
    fn two_files_of_one_space_are_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("db")).unwrap();
        fs::create_dir_all(dir.path().join("copy/db")).unwrap();
        fs::write(dir.path().join("db/t.ibd"), page0(7, 0)).unwrap();
        fs::write(dir.path().join("copy/db/t.ibd"), page0(7, 0)).unwrap();
        fs::write(dir.path().join("db/u.ibd"), page0(8, 0x2000)).unwrap();
        fs::write(dir.path().join("db/short.ibd"), [0; 100]).unwrap();
        let mut spaces = Spaces::default();
        spaces.walk(dir.path(), DEEPEST, &mut 100, &mut HashSet::new(), &HashSet::new());
        assert!(spaces.get(7).is_none());
        let file = spaces.get(8).unwrap();
        assert!(file.header.flags.is_encrypted());
        file.open().unwrap();
        fs::rename(dir.path().join("db/t.ibd"), dir.path().join("db/u.ibd")).unwrap();
        assert!(file.open().is_err(), "another file has taken its name");
    }

    proptest! {
        #[test]
        fn any_page_0_is_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = SpaceHeader::parse(&bytes);
        }

        #[test]
        fn a_page_0_says_what_was_written(space in any::<u32>(), flags in any::<u32>()) {
            let header = SpaceHeader::parse(&page0(space, flags)).unwrap();
            prop_assert_eq!(header, SpaceHeader { space, flags: SpaceFlags(flags) });
        }
    }
}
