//! A tarball with both roles and `install.sh`, for systems without dpkg.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::contents::{Places, Role, contents};
use super::tree::Tree;
use super::{Programs, VERSION, gzip};
use crate::deployment::root;
use crate::step::run;

/// Name of the directory in it.
fn directory() -> String {
    format!("poolskip-{VERSION}-amd64")
}

/// Its name.
pub fn file_name() -> String {
    format!("{}.tar.gz", directory())
}

/// Builds it into a directory; its file.
///
/// # Errors
/// When a file is missing, or tar fails.
pub fn build(programs: &Programs, out: &Path, epoch: u64) -> Result<PathBuf> {
    let name = directory();
    let mut tree = Tree::default();
    for role in Role::ALL {
        let held = contents(role, Places::Tarball, programs.of(role))?;
        for (path, bytes) in held.files() {
            let mode = if path.starts_with("prefix/sbin/") { 0o755 } else { 0o644 };
            tree.file(format!("{name}/{}/{path}", role.name()), mode, bytes);
        }
    }
    let script = include_str!("files/install.sh").replace("@VERSION@", VERSION);
    tree.file(format!("{name}/install.sh"), 0o755, script);
    for licence in ["LICENSE.md", "LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL-2.0", "LICENSE-GPL-3.0"] {
        let bytes = fs::read(root().join(licence)).with_context(|| format!("cannot read {licence}"))?;
        tree.file(format!("{name}/{licence}"), 0o644, bytes);
    }
    let work = tempfile::tempdir()?;
    tree.write(work.path(), epoch)?;
    let archive = run(Command::new("tar")
        .args(["--create", "--format=gnu", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg(format!("--mtime=@{epoch}"))
        .arg("--directory")
        .arg(work.path())
        .arg(&name))?;
    let file = out.join(file_name());
    fs::write(&file, gzip(&archive)?).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}
