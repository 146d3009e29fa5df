//! Which code a target runs: what it has had counts only for as long as that is the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::Key;

/// What all targets run: the targets themselves, and what the rooms are built with.
const SHARED: [&str; 3] = ["tests/fuzz/Cargo.toml", "tests/fuzz/src", "Cargo.lock"];
/// Rooms that targets may run.
const ROOMS: [&str; 3] = ["dom0-migrator", "enlightenment", "guest-probe"];
/// Of a room, what no target is built from.
const OTHER: [&str; 2] = ["tests", "examples"];

/// The sources of a checkout, as hashes.
pub struct Code {
    shared: String,
    rooms: BTreeMap<String, String>,
}

impl Code {
    /// Reads them.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn read(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for path in SHARED {
            files_under(&root.join(path), &mut files)?;
        }
        let shared = hash(root, files)?;
        let mut rooms = BTreeMap::new();
        for room in ROOMS {
            let mut files = Vec::new();
            for entry in entries(&root.join(room))? {
                if !OTHER.iter().any(|other| entry.ends_with(other)) {
                    files_under(&entry, &mut files)?;
                }
            }
            rooms.insert(room.to_owned(), hash(root, files)?);
        }
        Ok(Self { shared, rooms })
    }

    /// The hash of what a target of these rooms runs.
    ///
    /// # Errors
    /// When there is no such room.
    pub fn of<'a>(&self, rooms: impl Iterator<Item = &'a str>) -> Result<String> {
        let mut key = Key::new("fuzzed-1").with(self.shared.as_bytes());
        for room in rooms {
            let hash =
                self.rooms.get(room).with_context(|| format!("a target is of {room:?}, which is no room"))?;
            key = key.with(room.as_bytes()).with(hash.as_bytes());
        }
        Ok(key.hex())
    }
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = || format!("cannot read {}", directory.display());
    let entries = fs::read_dir(directory).with_context(failed)?;
    entries.map(|entry| Ok(entry.with_context(failed)?.path())).collect()
}

fn files_under(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    entries(path)?.iter().try_for_each(|entry| files_under(entry, files))
}

fn hash(root: &Path, mut files: Vec<PathBuf>) -> Result<String> {
    files.sort();
    let mut key = Key::new("sources");
    for file in files {
        key = key.with(file.strip_prefix(root)?.as_os_str().as_encoded_bytes()).with_file(&file)?;
    }
    Ok(key.digest())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_one_of_the_targets_that_run_it() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for room in ROOMS {
            write(&format!("{room}/src/engine/lib.rs"), room);
            write(&format!("{room}/tests/main.rs"), room);
        }
        SHARED.iter().for_each(|path| write(path, path));
        let keys = || {
            let code = Code::read(root.path()).unwrap();
            assert!(code.of(["xtask"].into_iter()).is_err());
            let of = |rooms: &[&str]| code.of(rooms.iter().copied()).unwrap();
            (of(&["enlightenment", "guest-probe"]), of(&["dom0-migrator", "enlightenment"]))
        };
        let before = keys();
        assert_eq!(keys(), before);
        write("dom0-migrator/tests/main.rs", "changed");
        assert_eq!(keys(), before);
        write("dom0-migrator/src/engine/lib.rs", "changed");
        let changed = keys();
        assert!(changed.0 == before.0 && changed.1 != before.1);
        write("enlightenment/src/more.rs", "new");
        let added = keys();
        assert!(added.0 != changed.0 && added.1 != changed.1);
        write("Cargo.lock", "changed");
        let other = keys();
        assert!(other.0 != added.0 && other.1 != added.1);
    }
}
