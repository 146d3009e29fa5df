//! Which code a target runs: what it has had counts only for as long as that is the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::Key;

/// What all targets run, and what the rooms are built with.
const SHARED: [&str; 3] = ["tests/fuzz/Cargo.toml", "tests/fuzz/src", "Cargo.lock"];
/// Of that, the targets' own files, of which each runs one.
const TARGETS: &str = "tests/fuzz/src/targets";
/// The file among them that says which target is in which.
const LIST: &str = "mod.rs";
/// Rooms that targets may run.
const ROOMS: [&str; 3] = ["dom0-migrator", "enlightenment", "guest-probe"];
/// Of a room, what no target is built from.
const OTHER: [&str; 2] = ["tests", "examples"];

/// The sources of a checkout, as hashes.
pub struct Code {
    shared: String,
    rooms: BTreeMap<String, String>,
    /// Of each target's own file.
    targets: BTreeMap<String, String>,
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
        let (own, shared): (Vec<_>, _) =
            files.into_iter().partition(|file| file.starts_with(root.join(TARGETS)) && !file.ends_with(LIST));
        let shared = hash(root, shared)?;
        let targets = own_files(root, &own)?;
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
        Ok(Self { shared, rooms, targets })
    }

    /// The hash of what a target of these rooms runs.
    ///
    /// # Errors
    /// When there is no such room, or no such target in the list of them.
    pub fn of<'a>(&self, target: &str, rooms: impl Iterator<Item = &'a str>) -> Result<String> {
        let own = self.targets.get(target).with_context(|| {
            format!("{TARGETS}/{LIST} does not say, as the others do, which file {target:?} is in")
        })?;
        let mut key = Key::new("fuzzed-2").with(self.shared.as_bytes()).with(own.as_bytes());
        for room in rooms {
            let hash =
                self.rooms.get(room).with_context(|| format!("a target is of {room:?}, which is no room"))?;
            key = key.with(room.as_bytes()).with(hash.as_bytes());
        }
        Ok(key.hex())
    }
}

/// The hash of each target's own file, by the target's name; of all of them where one goes by another.
fn own_files(root: &Path, files: &[PathBuf]) -> Result<BTreeMap<String, String>> {
    let read =
        |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let mut alone = true;
    for file in files {
        let text = read(file)?;
        alone &= !text.contains("super::") && !text.contains("targets::");
    }
    let list = read(&root.join(TARGETS).join(LIST))?;
    let mut hashes = BTreeMap::new();
    for (target, file) in files_of_targets(&list) {
        let own = root.join(TARGETS).join(format!("{file}.rs"));
        let of = if alone { vec![own] } else { files.to_vec() };
        hashes.insert(target.to_owned(), hash(root, of)?);
    }
    Ok(hashes)
}

/// Each target's name, and the name of the file that it is in: `target("name", …, of!(file::function))`.
fn files_of_targets(list: &str) -> impl Iterator<Item = (&str, &str)> {
    list.split("target(").skip(1).filter_map(|rest| {
        let name = rest.trim_start().strip_prefix('"')?.split('"').next()?;
        let file = rest.split_once("of!(")?.1.split("::").next()?;
        Some((name, file.trim()))
    })
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
        write("tests/fuzz/Cargo.toml", "features");
        write("Cargo.lock", "versions");
        write("tests/fuzz/src/lib.rs", "limits");
        let list = r#"
            const fn target(name: &str) {}
            [target("elf", "files", 4, of!(guest::elf)), target(
                "wire",
                "records",
                of!(stream::wire),
            )]"#;
        write("tests/fuzz/src/targets/mod.rs", list);
        write("tests/fuzz/src/targets/guest.rs", "pub fn elf() {}");
        write("tests/fuzz/src/targets/stream.rs", "pub fn wire() {}");
        let keys = || {
            let code = Code::read(root.path()).unwrap();
            assert!(code.of("elf", ["xtask"].into_iter()).is_err());
            assert!(code.of("name", ["enlightenment"].into_iter()).is_err());
            let of = |target, rooms: &[&str]| code.of(target, rooms.iter().copied()).unwrap();
            (of("elf", &["enlightenment", "guest-probe"]), of("wire", &["dom0-migrator", "enlightenment"]))
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
        write("tests/fuzz/src/targets/stream.rs", "changed");
        let own = keys();
        assert!(own.0 == added.0 && own.1 != added.1);
        let mut last = own;
        for (path, text) in [
            ("Cargo.lock", "changed"),
            ("tests/fuzz/src/lib.rs", "changed"),
            ("tests/fuzz/src/targets/mod.rs", &format!("{list} changed")),
            // From here on a file of one is one of all.
            ("tests/fuzz/src/targets/guest.rs", "use super::stream;"),
            ("tests/fuzz/src/targets/stream.rs", "changed again"),
        ] {
            write(path, text);
            let other = keys();
            assert!(other.0 != last.0 && other.1 != last.1, "{path}");
            last = other;
        }
    }
}
