//! `cargo xtask build module`: the kernel module's Rust core, as one object that Kbuild links on any x86-64 guest.
//!
//! The object is kept in the tree, so that a guest needs gcc, make and its kernel's headers, and no Rust. Beside it stands the hash
//! of what it was made from. [`check`] compares that hash, for which no toolchain is needed; [`link()`] makes `poolskip.ko` of it.

mod inspect;
pub mod layout;
mod link;
mod sign;
mod size;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::rust_src;
use crate::cache::{self, Key};
use crate::step::{run, step};

pub use link::link;
pub use sign::{Signer, sign};

/// Where the object is kept, from the workspace's root.
const OBJECT: &str = "kernel-module/prebuilt/module_core.o";

/// Where the hash of its sources is kept.
const SOURCES_HASH: &str = "kernel-module/prebuilt/module_core.o.sources";

/// Functions of `kernel/entry.rs` that the shim calls; all others are local to the object.
const ENTRIES: &[&str] = &[
    "poolskip_start",
    "poolskip_stop",
    "poolskip_is_announced",
    "poolskip_watch_fired",
    "poolskip_read",
    "poolskip_close",
    "poolskip_ioctl",
];

/// How every crate of the object is compiled: as the kernel's own objects are, or objtool complains (return thunks, IBT, no jump
/// tables, call padding). No panic message is kept: the handler has no use for it.
const FLAGS: &[&str] = &[
    "-Zunstable-options",
    "-Cpanic=abort",
    "-Copt-level=2",
    "-Ccodegen-units=1",
    "-Cembed-bitcode=y",
    "-Cforce-unwind-tables=n",
    "-Csymbol-mangling-version=v0",
    "-Crelocation-model=static",
    "-Ccode-model=kernel",
    "-Cno-redzone=y",
    "-Cdebug-assertions=n",
    "-Zfunction-return=thunk-extern",
    "-Zcf-protection=branch",
    "-Cjump-tables=n",
    "-Zpatchable-function-entry=16,16",
    "-Zdirect-access-external-data=yes",
    "-Zlocation-detail=none",
    "--sysroot=/dev/null",
];

/// Builds the object and records its sources, in place.
///
/// # Errors
/// When a tool cannot be had, the core does not compile, or the object is not fit for a kernel.
pub fn build() -> Result<()> {
    let workspace = workspace();
    let object = step("kernel module's core", compile)?;
    let kept = workspace.join(OBJECT);
    if let Some(dir) = kept.parent() {
        fs::create_dir_all(dir)?;
    }
    let same = fs::read(&kept).is_ok_and(|kept| kept == object);
    eprintln!("  {OBJECT}: {} bytes, {}", object.len(), if same { "as it was" } else { "changed" });
    fs::write(&kept, object).with_context(|| format!("cannot write {}", kept.display()))?;
    fs::write(workspace.join(SOURCES_HASH), format!("{}\n{}\n", hash_sources()?, tools()?))?;
    size::check()
}

/// Whether the object in the tree was built from the sources in the tree, and is fit for a kernel. Where the tools that built it are
/// installed, it is built again, and must be the same byte for byte.
///
/// # Errors
/// When it was not, or is not.
pub fn check() -> Result<()> {
    let workspace = workspace();
    let recorded = fs::read_to_string(workspace.join(SOURCES_HASH))
        .with_context(|| format!("{SOURCES_HASH} is missing: run `cargo xtask build module`"))?;
    let (hash, built_by) = recorded.trim().split_once('\n').unwrap_or((recorded.trim(), ""));
    if hash != hash_sources()? {
        bail!(
            "kernel-module or enlightenment has changed since {OBJECT} was built: run `cargo xtask build module` and commit both"
        );
    }
    let object = workspace.join(OBJECT);
    inspect::inspect(&object)?;
    size::check()?;
    match tools() {
        Ok(here) if here == built_by => {
            let built = step("kernel module's core, built again", compile)?;
            if fs::read(&object)? != built {
                bail!("{OBJECT} is not what building it again gives, with the same tools ({built_by})");
            }
        }
        Ok(here) => eprintln!("  {OBJECT} is not built again: {built_by} built it, here is {here}"),
        Err(error) => eprintln!("  {OBJECT} is not built again: {error:#}"),
    }
    Ok(())
}

/// What the object's bytes depend on beside its sources.
fn tools() -> Result<String> {
    let first_line = |output: Vec<u8>| {
        String::from_utf8_lossy(&output).lines().next().unwrap_or_default().trim().to_owned()
    };
    let rustc = run(Command::new("rustc").arg(format!("+{}", rust_src::toolchain())).arg("--version"))
        .map(first_line)?;
    let linker = run(Command::new("ld").arg("--version")).map(first_line)?;
    Ok(format!("{rustc}, {linker}"))
}

/// Compiles everything into one relocatable object and returns its bytes.
fn compile() -> Result<Vec<u8>> {
    let sources = Sources::new();
    let core = core_dir()?;
    let out = tempfile::tempdir().context("cannot make a temporary directory")?;
    let out = out.path();
    let library = |name: &str, dir: &Path| {
        let mut flag = std::ffi::OsString::from(format!("{name}="));
        flag.push(dir.join(format!("lib{name}.rlib")));
        flag
    };
    let compiler = |name: &str, kind: &str, edition: &str| {
        let mut rustc = rustc(out);
        rustc
            .args(["--crate-name", name, "--crate-type", kind, "--edition", edition])
            .arg("-L")
            .arg(&core)
            .arg("--extern")
            .arg(library("core", &core))
            .arg("--extern")
            .arg(library("compiler_builtins", &core));
        rustc
    };
    run(compiler("enlightenment", "rlib", "2024").arg(sources.enlightenment.join("lib.rs")))?;
    run(compiler("kernel_module", "rlib", "2024")
        .arg("--extern")
        .arg(library("enlightenment", out))
        .arg(sources.core.join("lib.rs")))?;
    run(compiler("module_core", "staticlib", "2024")
        .arg("-Clto=fat")
        .arg("-L")
        .arg(out)
        .arg("--extern")
        .arg(library("enlightenment", out))
        .arg("--extern")
        .arg(library("kernel_module", out))
        .arg(sources.kernel.join("entry.rs")))?;
    let object = out.join("module_core.o");
    let mut linker = Command::new("ld");
    linker.arg("-r").arg("-T").arg(sources.kernel.join("merge.lds")).args([
        "--gc-sections",
        "-e",
        ENTRIES[0],
    ]);
    for entry in ENTRIES {
        linker.args(["-u", entry]);
    }
    run(linker.arg("-o").arg(&object).arg(out.join("libmodule_core.a")))?;
    let mut objcopy = Command::new("objcopy");
    objcopy.args(["--strip-debug", "-R", ".comment", "-R", ".note.gnu.property"]);
    for entry in ENTRIES {
        objcopy.arg(format!("--keep-global-symbol={entry}"));
    }
    run(objcopy.arg(&object))?;
    inspect::inspect(&object)?;
    fs::read(&object).with_context(|| format!("cannot read {}", object.display()))
}

/// `core`, and the empty `compiler_builtins` that rustc wants beside it (the kernel has `memcpy` and its like); kept in the cache.
fn core_dir() -> Result<PathBuf> {
    let library = rust_src::library_dir()?;
    let version = run(Command::new("rustc").arg(format!("+{}", rust_src::toolchain())).arg("-vV"))?;
    let key = Key::new("module-core-libraries 1")
        .with(FLAGS.join(" ").as_bytes())
        .with(&version)
        .with(library.as_os_str().as_encoded_bytes())
        .with_file(&Sources::new().kernel.join("target.json"))?;
    cache::get_or_make("module-core-libraries", key, |dir| {
        run(rustc(dir)
            .args(["--crate-name", "core", "--crate-type", "rlib", "--edition=2024", "--cap-lints=allow"])
            .args(["--cfg", "no_fp_fmt_parse"])
            .arg(format!("--remap-path-prefix={}=/rust", library.display()))
            .arg(library.join("core/src/lib.rs")))?;
        let builtins = dir.join("compiler_builtins.rs");
        fs::write(
            &builtins,
            "#![no_std]\n#![feature(compiler_builtins)]\n#![allow(internal_features)]\n#![compiler_builtins]\nextern crate core;\n",
        )?;
        run(rustc(dir)
            .args(["--crate-name", "compiler_builtins", "--crate-type", "rlib", "--edition=2021"])
            .arg("--cap-lints=allow")
            .arg(format!("--remap-path-prefix={}=/rust", dir.display()))
            .arg("--extern")
            .arg(format!("core={}", dir.join("libcore.rlib").display()))
            .arg(&builtins))?;
        Ok(())
    })
}

fn rustc(out: &Path) -> Command {
    let mut rustc = Command::new("rustc");
    rustc
        .arg(format!("+{}", rust_src::toolchain()))
        .env("RUSTC_BOOTSTRAP", "1")
        .args(FLAGS)
        .arg(format!("--remap-path-prefix={}=.", workspace().display()))
        .arg("--target")
        .arg(Sources::new().kernel.join("target.json"))
        .arg("--out-dir")
        .arg(out);
    rustc
}

/// Where the sources lie.
struct Sources {
    enlightenment: PathBuf,
    core: PathBuf,
    kernel: PathBuf,
}

impl Sources {
    fn new() -> Self {
        let workspace = workspace();
        Self {
            enlightenment: workspace.join("enlightenment/src"),
            core: workspace.join("kernel-module/src"),
            kernel: workspace.join("kernel-module/kernel"),
        }
    }

    /// All files that go into the object, in a fixed order.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = vec![
            self.kernel.join("entry.rs"),
            self.kernel.join("target.json"),
            self.kernel.join("merge.lds"),
        ];
        for dir in [&self.enlightenment, &self.core] {
            let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
            for entry in entries {
                files.push(entry?.path());
            }
        }
        files.sort();
        Ok(files)
    }
}

fn hash_sources() -> Result<String> {
    let workspace = workspace();
    let mut key = Key::new("module-core").with(FLAGS.join(" ").as_bytes());
    for file in Sources::new().files()? {
        let name = file.strip_prefix(&workspace).unwrap_or(&file);
        key = key.with(name.as_os_str().as_encoded_bytes()).with_file(&file)?;
    }
    Ok(key.digest())
}

fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}
