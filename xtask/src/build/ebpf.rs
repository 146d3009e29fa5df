//! `cargo xtask build ebpf`: the eBPF programs, built by the nightly toolchain into guest-probe's tree.
//!
//! The object is kept in the tree, so that everything else builds without the nightly; beside it stands the hash of the sources it
//! was built from. [`check`] compares that hash and needs no toolchain.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::rust_src;
use crate::cache::{self, Key};
use crate::step::{run, step};

/// bpf-linker that loads rustc's own LLVM; from 0.11 on it wants an LLVM development install.
const LINKER_VERSION: &str = "0.10.4";

/// The target that eBPF programs are built for.
const TARGET: &str = "bpfel-unknown-none";

/// Where the object is kept, from the workspace's root.
const OBJECT: &str = "guest-probe/ebpf/guest-probe-ebpf.o";

/// Where the hash of its sources is kept.
const SOURCES_HASH: &str = "guest-probe/ebpf/guest-probe-ebpf.o.sources";

/// Builds the object and records its sources, in place.
///
/// # Errors
/// When a tool cannot be had, or the programs do not compile.
pub fn build() -> Result<()> {
    let workspace = workspace();
    let object = step("eBPF programs", || compile(&workspace))?;
    let kept = workspace.join(OBJECT);
    if let Some(dir) = kept.parent() {
        fs::create_dir_all(dir)?;
    }
    let same = fs::read(&kept).is_ok_and(|kept| kept == object);
    eprintln!("  {OBJECT}: {} bytes, {}", object.len(), if same { "as it was" } else { "changed" });
    fs::write(&kept, object).with_context(|| format!("cannot write {}", kept.display()))?;
    let record = format!("{}\n", hash_sources(&workspace.join("guest-probe-ebpf"))?);
    fs::write(workspace.join(SOURCES_HASH), record)?;
    Ok(())
}

/// Whether the object in the tree was built from the sources in the tree.
///
/// # Errors
/// When it was not.
pub fn check() -> Result<()> {
    let workspace = workspace();
    let recorded = fs::read_to_string(workspace.join(SOURCES_HASH))
        .with_context(|| format!("{SOURCES_HASH} is missing: run `cargo xtask build ebpf`"))?;
    if !workspace.join(OBJECT).exists() {
        bail!("{OBJECT} is missing: run `cargo xtask build ebpf`");
    }
    if recorded.trim() != hash_sources(&workspace.join("guest-probe-ebpf"))? {
        bail!(
            "guest-probe-ebpf has changed since {OBJECT} was built: run `cargo xtask build ebpf` and commit both"
        );
    }
    Ok(())
}

fn compile(workspace: &Path) -> Result<Vec<u8>> {
    let toolchain = rust_src::toolchain();
    let library = rust_src::library_dir()?;
    let linker = linker(&toolchain)?;
    let sysroot = run(Command::new("rustc").arg(format!("+{toolchain}")).args(["--print", "sysroot"]))?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&sysroot).trim());
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let cargo_home = cargo_home.context("neither CARGO_HOME nor HOME is set")?;
    let crate_dir = workspace.join("guest-probe-ebpf");
    let target_dir = workspace.join("target/ebpf");
    // Fetched first, so that all source directories are there to be renamed.
    run(Command::new("cargo")
        .current_dir(&crate_dir)
        .arg(format!("+{toolchain}"))
        .args(["fetch", "--locked"])
        .env_remove("RUSTUP_TOOLCHAIN"))?;
    // The same object wherever it is built: no path of this machine in it.
    let mut flags = vec![
        "-Clinker=bpf-linker".to_owned(),
        "-Cdebuginfo=1".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
        format!("--remap-path-prefix={}=/guest-probe-ebpf", crate_dir.display()),
        format!("--remap-path-prefix={}=/cargo", cargo_home.display()),
        format!("--remap-path-prefix={}=/rust/library", library.display()),
        format!("--remap-path-prefix={}=/rust", sysroot.display()),
    ];
    for registry in fs::read_dir(cargo_home.join("registry/src")).into_iter().flatten() {
        flags.push(format!("--remap-path-prefix={}=/cargo", registry?.path().display()));
    }
    let mut path = linker.into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(&crate_dir)
        .arg(format!("+{toolchain}"))
        .args(["build", "--locked", "--release", "-Zbuild-std=core", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .env("PATH", path)
        // bpf-linker finds rustc's libLLVM there.
        .env("LD_LIBRARY_PATH", sysroot.join("lib"))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // Set by the cargo that runs this program; they would choose its toolchain for the inner one.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .env_remove("RUSTC");
    if !library.starts_with(&sysroot) {
        // Cargo's own tests use this to build std from a directory elsewhere.
        cargo.env("__CARGO_TESTS_ONLY_SRC_ROOT", &library);
    }
    run(&mut cargo).with_context(|| {
        format!(
            "building for {TARGET} needs {toolchain} and Rust sources of the same release (used: {}); \
             `rustup component add rust-src --toolchain {toolchain}` gets them where rustup has a network, \
             and POOLSKIP_NIGHTLY names another toolchain",
            library.display()
        )
    })?;
    let built = target_dir.join(TARGET).join("release/guest-probe-ebpf");
    fs::read(&built).with_context(|| format!("cargo left no {}", built.display()))
}

/// The directory of a bpf-linker, compiled at the first call.
fn linker(toolchain: &str) -> Result<PathBuf> {
    let version = run(Command::new("rustc").arg(format!("+{toolchain}")).arg("--version"))?;
    let key = Key::new("bpf-linker 1").with(LINKER_VERSION.as_bytes()).with(&version);
    let made = cache::get_or_make("bpf-linker", key, |dir| {
        run(Command::new("cargo")
            .arg(format!("+{toolchain}"))
            .args(["install", "bpf-linker", "--locked", "--version", LINKER_VERSION, "--root"])
            .arg(dir)
            .env("CARGO_TARGET_DIR", dir.join("target"))
            .env_remove("RUSTUP_TOOLCHAIN"))?;
        fs::remove_dir_all(dir.join("target")).context("cannot remove bpf-linker's build directory")
    })?;
    Ok(made.join("bin"))
}

/// The hash of everything that the object is made of, by path in the crate.
fn hash_sources(crate_dir: &Path) -> Result<String> {
    let mut files = vec![crate_dir.join("Cargo.toml"), crate_dir.join("Cargo.lock")];
    let src = crate_dir.join("src");
    for entry in fs::read_dir(&src).with_context(|| format!("cannot read {}", src.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let name = file.strip_prefix(crate_dir)?.to_string_lossy().into_owned();
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for part in [name.as_bytes(), &bytes] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn workspace() -> PathBuf {
    let mut dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    dir.pop();
    dir
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_in_the_tree_was_built_from_these_sources() {
        check().unwrap();
    }

    #[test]
    fn a_changed_source_changes_the_hash() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("src")).unwrap();
        for name in ["Cargo.toml", "Cargo.lock", "src/main.rs"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let before = hash_sources(dir.path()).unwrap();
        assert_eq!(before, hash_sources(dir.path()).unwrap());
        fs::write(dir.path().join("src/main.rs"), "changed").unwrap();
        let changed = hash_sources(dir.path()).unwrap();
        assert_ne!(before, changed);
        fs::rename(dir.path().join("src/main.rs"), dir.path().join("src/other.rs")).unwrap();
        assert_ne!(changed, hash_sources(dir.path()).unwrap());
    }
}
