//! `poolskip.ko` for one kernel.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::layout;
use crate::cache::{self, Key};
use crate::lab::Kernel;

/// Builds `poolskip.ko` for a kernel as a guest does: by DKMS, in a root with that kernel's headers and compiler, and no Rust. The
/// file has no debug information and no signature. Kept in the cache under all that goes into it.
///
/// # Errors
/// When DKMS or Kbuild fails, or prints a warning, of the compiler, of modpost or of objtool.
pub fn link(kernel: &Kernel) -> Result<PathBuf> {
    let key = layout::add_to(Key::new("poolskip-ko 2"))?.with(kernel.identity().as_bytes());
    let made = cache::get_or_make("poolskip-ko", key, |dir| {
        let work = tempfile::tempdir().context("cannot make a temporary directory")?;
        let words = dkms(kernel, work.path())?;
        let built = work.path().join("dkms/poolskip").join(layout::VERSION).join(&kernel.release);
        // DKMS keeps its log beside the module; one that fails prints it.
        let log = find(&built, "make.log")?.context("DKMS left no make.log")?;
        let log = fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?;
        check_log(&log)?;
        // Compressed where the suite's own modules are.
        let module = match (find(&built, "poolskip.ko")?, find(&built, "poolskip.ko.xz")?) {
            (Some(module), _) => module,
            (None, Some(compressed)) => {
                let inside =
                    Path::new("/").join(crate::lab::WORK).join(compressed.strip_prefix(work.path())?);
                kernel.run_inside(work.path(), &["xz", "--decompress", &inside.to_string_lossy()])?;
                compressed.with_extension("")
            }
            (None, None) => bail!("DKMS left no poolskip.ko below {}:\n{words}", built.display()),
        };
        fs::copy(&module, dir.join("poolskip.ko"))?;
        Ok(fs::write(dir.join("make.log"), log)?)
    })?;
    Ok(made.join("poolskip.ko"))
}

/// Runs DKMS on the layout, with all that it writes below `work`.
fn dkms(kernel: &Kernel, work: &Path) -> Result<String> {
    layout::write(&work.join("src"))?;
    fs::create_dir_all(work.join("dkms"))?;
    kernel.run_inside(
        work,
        &[
            "dkms",
            "build",
            "-m",
            "poolskip",
            "-v",
            layout::VERSION,
            "-k",
            &kernel.release,
            "--dkmstree",
            "/mnt/dkms",
            "--sourcetree",
            "/mnt/src",
        ],
    )
}

/// Whether Kbuild had nothing to say: objtool's complaints come as warnings too.
fn check_log(log: &str) -> Result<()> {
    if !log.lines().any(|line| line.trim_start().starts_with("CORE ")) {
        bail!("Kbuild did not take the core in:\n{log}");
    }
    match log.lines().find(|line| line.to_ascii_lowercase().contains("warning")) {
        Some(warning) => bail!("Kbuild warns: {warning}\n{log}"),
        None => Ok(()),
    }
}

/// The file of this name somewhere below `directory`.
fn find(directory: &Path, name: &str) -> Result<Option<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("DKMS made no {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find(&entry.path(), name)? {
                return Ok(Some(found));
            }
        } else if entry.file_name() == name {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_of_objtool_or_a_core_left_out_fails_the_build() {
        let good = "  CC [M]  shim.o\n  CORE    module_core.o\n  LD [M]  poolskip.ko\n";
        check_log(good).unwrap();
        for line in [
            "module_core.o: warning: objtool: poolskip_read+0x1: 'naked' return found in MITIGATION_RETHUNK build",
            "WARNING: modpost: missing MODULE_DESCRIPTION()",
            "shim.c:1:2: warning: unused variable",
        ] {
            let error = check_log(&format!("{good}{line}\n")).unwrap_err().to_string();
            assert!(error.contains(line), "{error}");
        }
        assert!(check_log("  CC [M]  shim.o\n").is_err());
    }
}
