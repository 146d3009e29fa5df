//! The cache: downloads and built images outlive a checkout in `$XDG_CACHE_HOME/poolskip`, each under the hash of all that went
//! into it, so that two checkouts share what is equal and never see what is not.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// The cache's directory, made if it is not there: `$POOLSKIP_CACHE`, else `$XDG_CACHE_HOME/poolskip`, else `~/.cache/poolskip`.
///
/// # Errors
/// When there is no home, or it cannot be written.
pub fn dir() -> Result<PathBuf> {
    let dir = if let Some(dir) = env::var_os("POOLSKIP_CACHE") {
        PathBuf::from(dir)
    } else if let Some(dir) = env::var_os("XDG_CACHE_HOME").filter(|d| !d.is_empty()) {
        Path::new(&dir).join("poolskip")
    } else {
        let home = env::var_os("HOME")
            .context("neither XDG_CACHE_HOME nor HOME is set: where may downloads be kept?")?;
        Path::new(&home).join(".cache/poolskip")
    };
    fs::create_dir_all(&dir).with_context(|| format!("cannot make the cache directory {}", dir.display()))?;
    Ok(dir)
}

/// A key from everything that goes into a cached thing.
pub struct Key(Sha256);

impl Key {
    /// Starts a key for a kind of thing; raise the number in the name when the way of making it changes in code only.
    pub fn new(kind: &str) -> Self {
        Self(Sha256::new()).with(kind.as_bytes())
    }

    /// Adds bytes, with their length.
    #[must_use]
    pub fn with(mut self, bytes: &[u8]) -> Self {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// Adds a file's content.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn with_file(self, path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(self.with(&bytes))
    }

    /// All 64 hexadecimal digits.
    pub fn digest(self) -> String {
        hex(&self.0.finalize())
    }

    /// The first 16 hexadecimal digits.
    pub fn hex(self) -> String {
        self.0.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The SHA-256 of bytes, as `sha256sum` writes it.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `NAME-KEY` in the cache: made by `make` in a directory of its own that is moved into place only when it is complete. A lock lets
/// two checkouts ask at once; one makes, the other waits.
///
/// # Errors
/// Those of `make`, and of the file system.
pub fn get_or_make(name: &str, key: Key, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let base = dir()?;
    let full = base.join(format!("{name}-{}", key.hex()));
    if full.exists() {
        return Ok(full);
    }
    let lock_path = full.with_extension("lock");
    let lock_file =
        fs::File::create(&lock_path).with_context(|| format!("cannot write {}", lock_path.display()))?;
    let _lock = Flock::lock(lock_file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("cannot lock {}", lock_path.display()))?;
    if full.exists() {
        return Ok(full);
    }
    let partial = full.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial)?;
    crate::step::step(&format!("making {name} (kept in {})", full.display()), || make(&partial))?;
    fs::rename(&partial, &full)
        .with_context(|| format!("cannot move {} to {}", partial.display(), full.display()))?;
    Ok(full)
}
