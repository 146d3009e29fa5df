//! Named points at which a test has something fail. They are compiled in for tests only.
//!
//! A fault belongs to a disk, by its path, so that tests which run at once do not strike each other.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
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
    /// Not, but whoever comes there stays until it is lifted.
    Held,
}

/// What was struck, and who waits where something is held.
#[derive(Default)]
struct Struck {
    strikes: BTreeMap<(PathBuf, Point), Strike>,
    waiting: BTreeMap<(PathBuf, Point), usize>,
}

static STRUCK: Mutex<Struck> = Mutex::new(Struck { strikes: BTreeMap::new(), waiting: BTreeMap::new() });
static CHANGED: Condvar = Condvar::new();

fn lock() -> MutexGuard<'static, Struck> {
    STRUCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on that point fails for that disk.
pub fn strike(disk: &Path, point: Point, strike: Strike) {
    lock().strikes.insert((disk.to_owned(), point), strike);
    CHANGED.notify_all();
}

/// From now on that point does not fail any more.
pub fn lift(disk: &Path, point: Point) {
    lock().strikes.remove(&(disk.to_owned(), point));
    CHANGED.notify_all();
}

/// Waits until so many threads are held at a point.
pub fn wait_for_held(disk: &Path, point: Point, count: usize) {
    let at = (disk.to_owned(), point);
    let few = |struck: &mut Struck| struck.waiting.get(&at).copied().unwrap_or(0) < count;
    let waited = CHANGED.wait_timeout_while(lock(), Duration::from_secs(300), few);
    let (_struck, result) = waited.unwrap_or_else(PoisonError::into_inner);
    assert!(!result.timed_out(), "nobody came to {point:?}");
}

/// What happens at a point.
pub fn point(disk: &Path, point: Point) -> io::Result<()> {
    let at = (disk.to_owned(), point);
    let mut struck = lock();
    if struck.strikes.get(&at) == Some(&Strike::Held) {
        *struck.waiting.entry(at.clone()).or_default() += 1;
        CHANGED.notify_all();
        while struck.strikes.get(&at) == Some(&Strike::Held) {
            struck = CHANGED.wait(struck).unwrap_or_else(PoisonError::into_inner);
        }
    }
    let strike = struck.strikes.get(&at).copied();
    drop(struck);
    match strike {
        None | Some(Strike::Held) => Ok(()),
        Some(Strike::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
        Some(Strike::Slow(time)) => {
            std::thread::sleep(time);
            Ok(())
        }
    }
}
