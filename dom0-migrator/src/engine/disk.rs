//! A disk of the domain, as the target reads it: read-only, past the page cache, within its bounds.
//!
//! Both hosts have the disk open, and it is written to from the other one: what this host's page cache holds of it may be
//! older than what lies on it. So a disk that cannot be read with O_DIRECT is refused rather than read through the cache.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Offsets, lengths and memory of O_DIRECT reads are multiples of this: enough for every block size up to a page.
pub const ALIGNMENT: usize = 4096;

/// Why a disk was not opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A system call failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Neither a block device nor a regular file.
    #[error("{path} is neither a block device nor a regular file")]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// A relative path means nothing to another process.
    #[error("{path} is not an absolute path")]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// The target does not know the virtual device.
    #[error("the domain has no virtual device {vdev} here")]
    Unknown {
        /// Its number.
        vdev: u32,
    },
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    size: u64,
    #[cfg(test)]
    pub(super) path: PathBuf,
}

impl Disk {
    /// Opens a block device or an image file.
    ///
    /// # Errors
    /// [`DiskError`]; EINVAL in it means that the file system has no O_DIRECT.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let failed = |what| move |source| DiskError::Io { what, path: path.to_owned(), source };
        if !path.is_absolute() {
            return Err(DiskError::Relative { path: path.to_owned() });
        }
        let is_disk = |kind: std::fs::FileType| kind.is_block_device() || kind.is_file();
        // Looked at before it is opened, since opening some devices does something.
        if !is_disk(std::fs::metadata(path).map_err(failed("looking at"))?.file_type()) {
            return Err(DiskError::Kind { path: path.to_owned() });
        }
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(failed("opening"))?;
        if !is_disk(file.metadata().map_err(failed("looking at"))?.file_type()) {
            return Err(DiskError::Kind { path: path.to_owned() });
        }
        let size = file.seek(SeekFrom::End(0)).map_err(failed("taking the size of"))?;
        Ok(Self {
            file,
            size,
            #[cfg(test)]
            path: path.to_owned(),
        })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether a page can lie there.
    pub fn holds_page(&self, offset: u64) -> bool {
        offset.is_multiple_of(512) && offset.checked_add(4096).is_some_and(|end| end <= self.size)
    }

    /// Reads from an aligned offset into aligned memory; fewer bytes than asked for only at the end of the disk.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => {
                    filled += n;
                    if n % 512 != 0 {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }
}

impl AsRawFd for Disk {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Memory that O_DIRECT can read into; taken from the system when it is first used.
#[derive(Debug, Default)]
pub struct AlignedBuffer(Vec<u8>);

impl AlignedBuffer {
    /// One that will take slices of up to this length without being moved.
    pub fn with_room(length: usize) -> Self {
        Self(vec![0; length + ALIGNMENT])
    }

    /// An aligned slice of this length.
    pub fn get(&mut self, length: usize) -> &mut [u8] {
        if self.0.len() < length + ALIGNMENT {
            self.0 = vec![0; length + ALIGNMENT];
        }
        let start = self.0.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        self.0.get_mut(start..start + length).unwrap_or_default()
    }

    /// The same bytes, to read.
    pub fn bytes(&self) -> &[u8] {
        let start = self.0.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        self.0.get(start..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_to_its_end_and_not_beyond() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..10_000_u32).map(|i| (i % 251) as u8).collect();
        io::Write::write_all(&mut file, &content).unwrap();
        let disk = Disk::open(file.path()).unwrap();
        assert_eq!(disk.size(), 10_000);
        assert!(disk.holds_page(5632) && !disk.holds_page(6144) && !disk.holds_page(1));
        assert!(!disk.holds_page(u64::MAX - 511));
        let mut buffer = AlignedBuffer::default();
        let read = disk.read(buffer.get(16_384), 0).unwrap();
        assert_eq!(&buffer.bytes()[..read], content);
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        assert!(matches!(Disk::open(Path::new("/dev/zero")), Err(DiskError::Kind { .. })));
        assert!(matches!(Disk::open(Path::new("/")), Err(DiskError::Kind { .. })));
        assert!(matches!(Disk::open(Path::new("image")), Err(DiskError::Relative { .. })));
        assert!(matches!(Disk::open(Path::new("/no/such/disk")), Err(DiskError::Io { .. })));
    }
}
