//! What goes into an archive: paths, modes and bytes, and nothing of the machine or the moment that it is made in.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

/// Files and directories, by their path without a leading slash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree(BTreeMap<String, Entry>);

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Directory { mode: u32 },
    File { mode: u32, bytes: Vec<u8> },
}

impl Tree {
    /// Adds a file, and the directories above it.
    pub fn file(&mut self, path: impl Into<String>, mode: u32, bytes: impl Into<Vec<u8>>) {
        let path = path.into();
        self.parents(&path);
        self.0.insert(path, Entry::File { mode, bytes: bytes.into() });
    }

    /// Adds a directory with a mode of its own, and the directories above it.
    pub fn directory(&mut self, path: impl Into<String>, mode: u32) {
        let path = path.into();
        self.parents(&path);
        self.0.insert(path, Entry::Directory { mode });
    }

    fn parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            self.0.entry(path[..at].to_owned()).or_insert(Entry::Directory { mode: 0o755 });
        }
    }

    /// Files, with their bytes, in the order of their paths.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().filter_map(|(path, entry)| match entry {
            Entry::File { bytes, .. } => Some((path.as_str(), bytes.as_slice())),
            Entry::Directory { .. } => None,
        })
    }

    /// Writes all of it below a directory, each with its mode and the same time.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, below: &Path, epoch: u64) -> Result<()> {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(epoch);
        for (path, entry) in &self.0 {
            let to = below.join(path);
            let written = match entry {
                Entry::Directory { .. } => fs::create_dir_all(&to),
                Entry::File { mode, bytes } => OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(*mode)
                    .open(&to)
                    .and_then(|mut file| file.write_all(bytes)),
            };
            written.with_context(|| format!("cannot write {}", to.display()))?;
        }
        // From the inside out: a time is that of the last change.
        for (path, entry) in self.0.iter().rev() {
            let to = below.join(path);
            let (Entry::Directory { mode } | Entry::File { mode, .. }) = entry;
            fs::set_permissions(&to, fs::Permissions::from_mode(*mode))
                .and_then(|()| File::open(&to))
                .and_then(|file| file.set_times(FileTimes::new().set_modified(time).set_accessed(time)))
                .with_context(|| format!("cannot set mode and time of {}", to.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_written_with_its_modes_and_one_time() {
        let mut tree = Tree::default();
        tree.file("usr/sbin/program", 0o755, "x");
        tree.directory("etc/secret", 0o700);
        let at = tempfile::tempdir().unwrap();
        tree.write(at.path(), 1_000_000_000).unwrap();
        for (path, mode) in [("usr", 0o755), ("usr/sbin/program", 0o755), ("etc/secret", 0o700)] {
            let found = fs::metadata(at.path().join(path)).unwrap();
            assert_eq!(found.permissions().mode() & 0o7777, mode, "{path}");
            let since = found.modified().unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap();
            assert_eq!(since.as_secs(), 1_000_000_000, "{path}");
        }
        assert_eq!(tree.files().collect::<Vec<_>>(), [("usr/sbin/program", &b"x"[..])]);
    }
}
