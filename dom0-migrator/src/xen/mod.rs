//! Xen's own libraries, as far as this program needs them, loaded when it runs.
//!
//! libxenctrl and libxenguest change their ABI with each release of Xen and carry it in their file names. A program linked
//! against one of them starts on one release only; so they are loaded by name here, for the release that is running
//! ([`release`]), and the differences that matter are handled in one place ([`guest`]). libxenforeignmemory has a stable ABI.

pub mod control;
pub mod dirty_log;
pub mod foreign;
pub mod guest;
pub mod library;
pub mod logger;
pub mod release;

/// Number of a domain on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct DomainId(pub u32);

impl std::fmt::Display for DomainId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A failed call into one of Xen's libraries.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed for domain {domain}: {source}")]
pub struct CallError {
    /// The function.
    pub call: &'static str,
    /// The domain that it was called for.
    pub domain: DomainId,
    /// `errno` afterwards.
    pub source: std::io::Error,
}

impl CallError {
    pub(crate) fn last(call: &'static str, domain: DomainId) -> Self {
        Self { call, domain, source: std::io::Error::last_os_error() }
    }
}
