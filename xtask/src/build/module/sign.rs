//! A signature on a module that is built already, as Secure Boot wants it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::lab::Kernel;

/// The hash that the kernels of all three suites sign their own modules with (`CONFIG_MODULE_SIG_HASH`).
const HASH: &str = "sha256";

/// Key and certificate of a signature, as files.
#[derive(Clone, Debug)]
pub struct Signer<'a> {
    /// Private key, PEM.
    pub key: &'a Path,
    /// Its certificate, PEM or DER; the guest's kernel must trust it (`mokutil --import`, with DER).
    pub certificate: &'a Path,
}

/// Appends a signature to the module's bytes with the kernel's own `scripts/sign-file`.
///
/// # Errors
/// When key or certificate cannot be read, or do not belong together.
pub fn sign(kernel: &Kernel, module: &Path, signer: &Signer<'_>) -> Result<Vec<u8>> {
    let work = tempfile::tempdir().context("cannot make a temporary directory")?;
    for (from, name) in [(module, "poolskip.ko"), (signer.key, "key"), (signer.certificate, "certificate")] {
        fs::copy(from, work.path().join(name)).with_context(|| format!("cannot read {}", from.display()))?;
    }
    let tool = format!("{}/scripts/sign-file", kernel.build_directory());
    kernel
        .run_inside(work.path(), &[&tool, HASH, "/mnt/key", "/mnt/certificate", "/mnt/poolskip.ko"])
        .with_context(|| format!("cannot sign with {}", signer.key.display()))?;
    Ok(fs::read(work.path().join("poolskip.ko"))?)
}
