//! Named points at which a test has something fail. They are compiled in for tests only.
//!
//! A fault belongs to a disk, by its path, so that tests which run at once do not strike each other.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Where something may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// A read of the disk has come back.
    DiskRead,
    /// The source's filter asks for threads and memory.
    SourceStart,
    /// The target's reading asks for threads and memory.
    RestorerStart,
    /// A record of a migration is written; the "disk" is the directory of the records.
    RecordWrite,
}

/// How it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// With this error number.
    Errno(i32),
    /// Not, but it takes so long.
    Slow(Duration),
}

static STRUCK: Mutex<BTreeMap<(PathBuf, Point), Strike>> = Mutex::new(BTreeMap::new());

/// From now on that point fails for that disk.
pub fn strike(disk: &Path, point: Point, strike: Strike) {
    STRUCK.lock().unwrap_or_else(PoisonError::into_inner).insert((disk.to_owned(), point), strike);
}

/// What happens at a point.
pub fn point(disk: &Path, point: Point) -> io::Result<()> {
    let struck =
        STRUCK.lock().unwrap_or_else(PoisonError::into_inner).get(&(disk.to_owned(), point)).copied();
    match struck {
        None => Ok(()),
        Some(Strike::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
        Some(Strike::Slow(time)) => {
            std::thread::sleep(time);
            Ok(())
        }
    }
}
