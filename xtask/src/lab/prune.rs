//! Old labs in the cache: each is over two gigabytes, and a new version of any package makes a new one. Those that nobody used for two
//! weeks go, and, where the file system of the cache has little room left, those that nobody uses now.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use nix::sys::statvfs::statvfs;

use crate::cache;

/// Kinds of directories that only the lab makes.
const KINDS: [&str; 3] = ["lab-host-", "lab-disk-", "lab-warm-"];

/// How long one that nobody uses is kept: another checkout may come back to it.
const KEPT: Duration = Duration::from_secs(14 * 24 * 3600);

/// What a raised lab's disks lie over for as long as it is up; the other kinds it copies in its first minutes.
const LIES_BELOW: &str = "lab-host-";

/// How long one that is copied is kept where room is short.
const KEPT_IF_SHORT: Duration = Duration::from_secs(1800);

/// What making a lab writes, or a raised one: disks that are copied (up to 3 GB) and then written to, and the states of two hosts.
const ROOM: u64 = 8 << 30;

/// Notes that directories of the cache are in use now, and removes those of their kinds that have not been for two weeks; then, from the
/// one longest unused on, until there is room for one more lab. Says so if there is none even then.
///
/// # Errors
/// When the cache cannot be read or written.
pub(super) fn prune(in_use: &[&Path]) -> Result<()> {
    prune_for(&cache::dir()?, in_use, ROOM, free)
}

fn prune_for(cache: &Path, in_use: &[&Path], room: u64, free: impl Fn(&Path) -> Result<u64>) -> Result<()> {
    for dir in in_use {
        File::open(dir)
            .and_then(|dir| dir.set_modified(SystemTime::now()))
            .with_context(|| format!("cannot note the use of {}", dir.display()))?;
    }
    let mut labs = labs(cache)?;
    labs.sort();
    for (last_use, dir) in labs {
        // Making one may take longer than one that is copied is kept where room is short.
        let is_partial = dir.extension().is_some();
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let may_go_sooner = !is_partial && !name.starts_with(LIES_BELOW);
        let kept = if may_go_sooner && free(cache)? < room { KEPT_IF_SHORT } else { KEPT };
        if unused_for(last_use) > kept {
            // Another process may just have done the same.
            if let Err(error) = fs::remove_dir_all(&dir)
                && error.kind() != ErrorKind::NotFound
            {
                return Err(error).with_context(|| format!("cannot remove the old lab {}", dir.display()));
            }
            eprintln!("  removed {}, unused and made anew when it is wanted", dir.display());
        }
    }
    let left = free(cache)?;
    if left < room {
        eprintln!(
            "  a lab may write up to {} GiB, and only {:.1} GiB are free where {} lies: should it fail, make room there, or name another \
             directory in POOLSKIP_CACHE",
            room >> 30,
            left as f64 / f64::from(1 << 30),
            cache.display()
        );
    }
    Ok(())
}

/// The labs in the cache, and when each was last used.
fn labs(cache: &Path) -> Result<Vec<(SystemTime, PathBuf)>> {
    let mut labs = Vec::new();
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ours = KINDS.iter().any(|kind| name.starts_with(kind));
        if ours && entry.file_type()?.is_dir() {
            labs.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    Ok(labs)
}

/// Bytes that may still be written where a directory lies.
fn free(dir: &Path) -> Result<u64> {
    let room = statvfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    Ok(room.blocks_available().saturating_mul(room.fragment_size()))
}

fn unused_for(since: SystemTime) -> Duration {
    // One from the future is new.
    SystemTime::now().duration_since(since).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of its own that stands for the cache, with labs that were last used so long ago.
    struct Cache(tempfile::TempDir);

    impl Cache {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn lab(&self, name: &str, unused_for: Duration) -> PathBuf {
            let dir = self.0.path().join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("disk"), "full").unwrap();
            File::open(&dir).unwrap().set_modified(SystemTime::now() - unused_for).unwrap();
            dir
        }
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_used_stays_and_what_was_not_for_long_goes() {
        let cache = Cache::new();
        let long = KEPT + MINUTE;
        let [old, used, other, younger] = [
            cache.lab("lab-disk-1", long),
            cache.lab("lab-disk-2", long),
            cache.lab("other-1", long),
            cache.lab("lab-warm-1", KEPT - MINUTE),
        ];
        prune_for(cache.0.path(), &[&used], ROOM, |_| Ok(ROOM)).unwrap();
        assert!(!old.exists() && used.exists() && other.exists() && younger.exists());
    }

    #[test]
    fn where_room_is_short_the_longest_unused_go_until_it_is_not() {
        let cache = Cache::new();
        let hours = |hours: u32| 60 * hours * MINUTE;
        let [second, first, third, below, busy, partial, used] = [
            cache.lab("lab-warm-1", hours(5)),
            cache.lab("lab-warm-2", hours(9)),
            cache.lab("lab-disk-3", hours(2)),
            cache.lab("lab-host-1", hours(30)),
            cache.lab("lab-disk-1", MINUTE),
            cache.lab("lab-disk-2.partial", hours(7)),
            cache.lab("lab-warm-3", hours(20)),
        ];
        // Each lab that goes makes a quarter of the room; so much is free at first.
        let free = |at_first: u64| {
            let all = fs::read_dir(cache.0.path()).unwrap().count() as u64;
            let path = cache.0.path().to_owned();
            move |_: &Path| {
                let gone = all - fs::read_dir(&path).unwrap().count() as u64;
                Ok(at_first + gone * (ROOM / 4))
            }
        };
        prune_for(cache.0.path(), &[&used], ROOM, free(ROOM / 2)).unwrap();
        assert!(!first.exists() && !second.exists(), "two make the room");
        assert!(third.exists() && busy.exists() && partial.exists() && used.exists());
        prune_for(cache.0.path(), &[&used], ROOM, free(0)).unwrap();
        assert!(!third.exists());
        assert!(
            busy.exists() && below.exists() && partial.exists() && used.exists(),
            "in use, and no room is worth that"
        );
    }
}
