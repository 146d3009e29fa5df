//! Old labs in the cache: each is over two gigabytes, and a new version of any package makes a new one.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::cache;

/// Kinds of directories that only the lab makes.
const KINDS: [&str; 3] = ["lab-host-", "lab-disk-", "lab-warm-"];

/// How long one that nobody uses is kept: another checkout may come back to it.
const KEPT: Duration = Duration::from_secs(14 * 24 * 3600);

/// Notes that directories of the cache are in use now, and removes those of their kinds that have not been for two weeks.
///
/// # Errors
/// When the cache cannot be read or written.
pub(super) fn prune(in_use: &[&Path]) -> Result<()> {
    for dir in in_use {
        File::open(dir)
            .and_then(|dir| dir.set_modified(SystemTime::now()))
            .with_context(|| format!("cannot note the use of {}", dir.display()))?;
    }
    for entry in fs::read_dir(cache::dir()?)? {
        let entry = entry?;
        let name = entry.file_name();
        let ours = KINDS.iter().any(|kind| name.to_string_lossy().starts_with(kind));
        if ours && entry.file_type()?.is_dir() && unused_for(entry.metadata()?.modified()?) > KEPT {
            fs::remove_dir_all(entry.path())
                .with_context(|| format!("cannot remove the old lab {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn unused_for(since: SystemTime) -> Duration {
    // One from the future is new.
    SystemTime::now().duration_since(since).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_what_was_not_for_long_goes() {
        let base = cache::dir().unwrap();
        let [old, used, other] = ["lab-disk-test-old", "lab-disk-test-used", "other-test-old"]
            .map(|name| base.join(format!("{name}-{}", std::process::id())));
        let long_ago = SystemTime::now() - KEPT - Duration::from_secs(60);
        for dir in [&old, &used, &other] {
            fs::create_dir_all(dir).unwrap();
            File::open(dir).unwrap().set_modified(long_ago).unwrap();
        }
        prune(&[&used]).unwrap();
        assert!(!old.exists() && used.exists() && other.exists());
        fs::remove_dir_all(used).unwrap();
        fs::remove_dir_all(other).unwrap();
    }
}
