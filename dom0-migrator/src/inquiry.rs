//! What `check` asks of a target, and what it hears.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::engine::xen_stream::PAGE;

/// Disks in an inquiry at most; an engine's references can name no more.
pub const DISKS_MAX: usize = 255;
/// Samples in an inquiry at most, of all disks together.
pub const SAMPLES_MAX: usize = 1024;

/// What a domain needs of a host: without it nothing is begun there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// Memory; 0 where that is not known.
    pub memory_bytes: u64,
    /// Paths of disks that must be there already, since no script of the domain's own makes them.
    pub disks: Vec<PathBuf>,
}

/// What a domain would need, and what could be had by reference.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inquiry {
    /// Its name.
    pub domain: String,
    /// The source's version of what helpers say to each other.
    pub stream_version: u16,
    /// What it needs.
    #[serde(default)]
    pub needs: Needs,
    /// Its disks that can be read by offset.
    pub disks: Vec<DiskInquiry>,
}

/// A disk, as the domain's configuration names it on both hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInquiry {
    /// Number of the virtual device.
    pub vdev: u32,
    /// Its path.
    pub path: PathBuf,
    /// What lies on it where.
    pub samples: Vec<Sample>,
}

/// A page of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Byte offset on the disk.
    pub offset: u64,
    /// Hash of its bytes.
    pub digest: Digest,
}

/// The first 16 octets of a page's BLAKE3 hash. Without a key: nothing is taken from a disk by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(u128);

impl Digest {
    /// Of a page's bytes.
    pub fn of(page: &[u8]) -> Self {
        let mut first = [0; 16];
        first.copy_from_slice(&blake3::hash(page).as_bytes()[..16]);
        Self(u128::from_le_bytes(first))
    }

    /// That of a page of zeros, which tells nothing of a disk.
    pub fn of_zeros() -> Self {
        Self::of(&[0; PAGE])
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        format!("{:032x}", digest.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = std::num::ParseIntError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        u128::from_str_radix(&text, 16).map(Self)
    }
}

/// What a target is and has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// Version of its program.
    pub version: String,
    /// Why it would not receive this domain.
    pub refused_because: Option<String>,
    /// Why both sides would run libxl's own helper.
    pub stock_because: Option<String>,
    /// Memory that no domain has; none where xl does not say.
    pub free_memory_bytes: Option<u64>,
    /// Whether its dom0 has all the rest, and gives memory away for a new domain (xl's autoballoon, unless Xen was started with `dom0_mem`).
    #[serde(default)]
    pub dom0_gives_way: bool,
    /// The disks, in the inquiry's order.
    pub disks: Vec<DiskFindings>,
    /// How fast it reads them.
    pub storage: Option<Measured>,
}

/// What a target found of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFindings {
    /// Why it cannot be read.
    pub problem: Option<String>,
    /// Whether each sample's bytes are the same here.
    pub same: Vec<bool>,
}

/// Bytes in a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// So many.
    pub bytes: u64,
    /// In so many seconds.
    pub seconds: f64,
}

impl Measured {
    /// Bytes per second; 0 when nothing was measured.
    pub fn rate(self) -> f64 {
        if self.seconds > 0.0 { self.bytes as f64 / self.seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_travels_as_it_is() {
        let digest = Digest::of(b"a page");
        let text = serde_json::to_string(&digest).unwrap();
        assert_eq!(serde_json::from_str::<Digest>(&text).unwrap(), digest);
        assert!(serde_json::from_str::<Digest>("\"none\"").is_err());
        assert_ne!(digest, Digest::of_zeros());
    }

    #[test]
    fn the_longest_inquiry_fits_into_a_line() {
        let sample = Sample { offset: u64::MAX, digest: Digest(u128::MAX) };
        let disk = DiskInquiry { vdev: u32::MAX, path: "/".repeat(200).into(), samples: Vec::new() };
        let mut disks = vec![disk; DISKS_MAX];
        disks[0].samples = vec![sample; SAMPLES_MAX];
        let inquiry = Inquiry { domain: "x".repeat(256), stream_version: 1, needs: Needs::default(), disks };
        assert!(serde_json::to_vec(&inquiry).unwrap().len() < crate::control::LINE_MAX);
    }
}
