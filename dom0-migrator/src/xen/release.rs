//! The release of Xen that is running, and what its libraries look like.

use std::fmt;
use std::path::Path;

/// A release of Xen, as in 4.17.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// The 4 of 4.17.
    pub major: u32,
    /// The 17 of 4.17.
    pub minor: u32,
}

/// Number of arguments of `xc_domain_restore`, the one difference between the releases that this program calls into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreAbi {
    /// Twelve arguments, up to 4.21.
    Plain,
    /// A thirteenth, `memflags`, from 4.22 on.
    Memflags,
}

/// Releases whose `xenguest.h` and helper protocol were compared with what is written here: `struct save_callbacks`, `struct
/// restore_callbacks`, `struct precopy_stats`, `struct xc_domain_meminfo` and libxl's message table are the same in all of them.
const KNOWN: [(Release, RestoreAbi); 6] = [
    (Release::new(4, 17), RestoreAbi::Plain),
    (Release::new(4, 18), RestoreAbi::Plain),
    (Release::new(4, 19), RestoreAbi::Plain),
    (Release::new(4, 20), RestoreAbi::Plain),
    (Release::new(4, 21), RestoreAbi::Plain),
    (Release::new(4, 22), RestoreAbi::Memflags),
];

/// Why the running release cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The kernel does not say which Xen it runs on.
    #[error(
        "cannot read Xen's release from {path}: {source}; is this dom0 of a Xen host, with sysfs mounted?"
    )]
    Unreadable {
        /// The file.
        path: String,
        /// What reading it gave.
        source: std::io::Error,
    },
    /// Not a number.
    #[error("{path} says {value:?}, which is no release number")]
    NotANumber {
        /// The file.
        path: String,
        /// Its content.
        value: String,
    },
    /// A release whose headers nobody compared with this program.
    #[error(
        "Xen {0} is not known to this program (it knows 4.17 to 4.22); its libxenguest may have another ABI, so it is not loaded"
    )]
    Unknown(Release),
}

impl Release {
    /// A release by its two numbers.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// The release that is running, as the kernel tells below `/sys/hypervisor`.
    ///
    /// # Errors
    /// [`ReleaseError`] when it does not tell, or tells of one that this program does not know.
    pub fn running() -> Result<Self, ReleaseError> {
        Self::read(Path::new("/sys/hypervisor/version"))
    }

    fn read(directory: &Path) -> Result<Self, ReleaseError> {
        let number = |name: &str| {
            let path = directory.join(name);
            let shown = path.display().to_string();
            let text = std::fs::read_to_string(&path)
                .map_err(|source| ReleaseError::Unreadable { path: shown.clone(), source })?;
            text.trim()
                .parse()
                .map_err(|_| ReleaseError::NotANumber { path: shown, value: text.trim().to_owned() })
        };
        let release = Self::new(number("major")?, number("minor")?);
        release.restore_abi().map(|_| release)
    }

    /// How `xc_domain_restore` is to be called.
    ///
    /// # Errors
    /// [`ReleaseError::Unknown`] for a release that is not in the list.
    pub fn restore_abi(self) -> Result<RestoreAbi, ReleaseError> {
        KNOWN
            .iter()
            .find(|(release, _)| *release == self)
            .map(|(_, abi)| *abi)
            .ok_or(ReleaseError::Unknown(self))
    }

    /// File name of a library that carries the release in its name.
    pub fn library(self, stem: &str) -> String {
        format!("{stem}.so.{self}")
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(major: &str, minor: &str) -> Result<Release, ReleaseError> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("major"), major).unwrap();
        std::fs::write(directory.path().join("minor"), minor).unwrap();
        Release::read(directory.path())
    }

    #[test]
    fn a_known_release_names_its_library() {
        let release = told("4\n", "17\n").unwrap();
        assert_eq!(release.library("libxenguest"), "libxenguest.so.4.17");
        assert_eq!(release.restore_abi().unwrap(), RestoreAbi::Plain);
        assert_eq!(told("4", "22").unwrap().restore_abi().unwrap(), RestoreAbi::Memflags);
    }

    #[test]
    fn an_unknown_release_is_refused_by_name() {
        assert!(told("4", "16").unwrap_err().to_string().starts_with("Xen 4.16 is not known"));
        assert!(told("5", "0").unwrap_err().to_string().starts_with("Xen 5.0 is not known"));
        assert!(matches!(told("four", "17"), Err(ReleaseError::NotANumber { .. })));
    }

    #[test]
    fn a_machine_without_xen_says_so() {
        let error = Release::read(Path::new("/nonexistent")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/major"), "{error}");
    }
}
