//! `poolskip.ko` for one kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{OBJECT, Sources, workspace};
use crate::cache::{self, Key};
use crate::step::{line_of, run};

/// What Kbuild needs beside the object, from `kernel-module/kernel`.
const FILES: &[&str] = &["Kbuild", "shim.c", "shim.h"];

/// Links shim and core for the kernel `release`, whose headers lie in `headers/usr/src/linux-headers-RELEASE`, as Debian's package
/// has them; returns `poolskip.ko`, without debug information. Kept in the cache under all that goes into it.
///
/// # Errors
/// When Kbuild fails or prints a warning, of the compiler or of objtool.
pub fn link(headers: &Path, release: &str) -> Result<PathBuf> {
    let kbuild = headers.join("usr/src").join(format!("linux-headers-{release}"));
    let object = workspace().join(OBJECT);
    let kernel = Sources::new().kernel;
    // Module.symvers has the checksum of each exported symbol, .config all that shapes its structures.
    let mut key = Key::new("poolskip-ko 1").with(release.as_bytes()).with_file(&object)?;
    for file in ["Module.symvers", ".config", "include/generated/compile.h"] {
        if kbuild.join(file).exists() {
            key = key.with_file(&kbuild.join(file))?;
        }
    }
    for file in FILES {
        key = key.with_file(&kernel.join(file))?;
    }
    let made = cache::get_or_make("poolskip-ko", key, |dir| {
        for file in FILES {
            fs::copy(kernel.join(file), dir.join(file))?;
        }
        fs::copy(&object, dir.join("module_core.o_shipped"))?;
        make(&kbuild, dir)?;
        run(Command::new("strip").arg("--strip-debug").arg(dir.join("poolskip.ko")))?;
        Ok(())
    })?;
    Ok(made.join("poolskip.ko"))
}

fn make(kbuild: &Path, dir: &Path) -> Result<()> {
    let mut make = Command::new("make");
    make.arg("-C").arg(kbuild).arg(format!("M={}", dir.display())).arg("modules");
    let line = line_of(&make);
    let output = make
        .output()
        .with_context(|| format!("cannot start `{line}`: is make installed? `cargo xtask setup` does it"))?;
    let words = [output.stdout, output.stderr].concat();
    let words = String::from_utf8_lossy(&words);
    if !output.status.success() {
        bail!("`{line}` ended with {}:\n{words}", output.status);
    }
    if let Some(warning) = words.lines().find(|line| line.to_ascii_lowercase().contains("warning")) {
        bail!("`{line}` warns: {warning}\n{words}");
    }
    Ok(())
}
