//! The module's sources as a guest gets them: for DKMS, or for Kbuild by hand. No Rust is needed from here on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{OBJECT, Sources, workspace};
use crate::cache::Key;

/// The module's version, that of the whole project.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Files from `kernel-module/kernel`.
const FILES: &[&str] = &["Kbuild", "dkms.conf", "shim.c", "shim.h", "walk.c"];

/// The core's name there: `_shipped` is Kbuild's word for what is not built from sources.
const SHIPPED: &str = "module_core.o_shipped";

/// `poolskip-VERSION`, the directory's name below `/usr/src`.
pub fn directory_name() -> String {
    format!("poolskip-{VERSION}")
}

/// Writes the layout below `parent`, anew, and returns its directory.
///
/// # Errors
/// When a file cannot be read or written.
pub fn write(parent: &Path) -> Result<PathBuf> {
    let directory = parent.join(directory_name());
    if directory.exists() {
        fs::remove_dir_all(&directory)
            .with_context(|| format!("cannot write {} anew", directory.display()))?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    for (from, name) in files() {
        let to = directory.join(name);
        fs::copy(&from, &to)
            .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    }
    Ok(directory)
}

/// The key with all that is in the layout.
///
/// # Errors
/// When a file cannot be read.
pub(super) fn add_to(mut key: Key) -> Result<Key> {
    for (from, name) in files() {
        key = key.with(name.as_bytes()).with_file(&from)?;
    }
    Ok(key)
}

fn files() -> Vec<(PathBuf, &'static str)> {
    let kernel = Sources::new().kernel;
    let mut files: Vec<_> = FILES.iter().map(|name| (kernel.join(name), *name)).collect();
    files.push((workspace().join(OBJECT), SHIPPED));
    files.push((workspace().join("LICENSE-GPL-2.0"), "LICENSE"));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_has_one_version_everywhere() {
        let parent = tempfile::tempdir().unwrap();
        // Twice: what stood there before goes.
        fs::create_dir_all(parent.path().join(directory_name()).join("old")).unwrap();
        let directory = write(parent.path()).unwrap();
        let mut names: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            ["Kbuild", "LICENSE", "dkms.conf", "module_core.o_shipped", "shim.c", "shim.h", "walk.c"]
        );
        let conf = fs::read_to_string(directory.join("dkms.conf")).unwrap();
        assert!(conf.contains(&format!("PACKAGE_VERSION=\"{VERSION}\"")), "{conf}");
        let shim = fs::read_to_string(directory.join("shim.c")).unwrap();
        assert!(shim.contains(&format!("MODULE_VERSION(\"{VERSION}\")")));
    }
}
