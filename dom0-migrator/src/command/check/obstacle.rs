//! What stands in a migration's way, each by a name that programs can rely on, with the way out.

use std::fmt;

use serde::Serialize;

use super::ask::AskError;
use crate::disks::RefusedDisk;
use crate::lists::{ListsError, RequestError};

/// How much an obstacle is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Weight {
    /// It goes, but less of it by reference, or not as fast.
    Some,
    /// It goes, but nothing of it by reference.
    Plain,
    /// It would not begin.
    Blocks,
}

/// Something that is in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Obstacle {
    /// Its name.
    pub name: &'static str,
    /// How much it is in the way.
    pub weight: Weight,
    /// What it is.
    pub what: String,
    /// The way out.
    pub way_out: String,
}

impl Obstacle {
    /// One.
    pub fn new(
        name: &'static str,
        weight: Weight,
        what: impl fmt::Display,
        way_out: impl fmt::Display,
    ) -> Self {
        Self { name, weight, what: what.to_string(), way_out: way_out.to_string() }
    }

    /// A target that does not answer.
    pub fn of_target(error: &AskError) -> Self {
        match error {
            AskError::Unreachable { .. } => Self::new(
                "target-unreachable",
                Weight::Blocks,
                error,
                "start `dom0-migrator receive` there, let its port through, and look whether both hosts' certificates are of one authority",
            ),
            AskError::Silent { .. } => Self::new(
                "target-silent",
                Weight::Blocks,
                error,
                "use the same release of Poolskip on both hosts: an older one does not know this question",
            ),
            AskError::Refused { .. } => {
                Self::new("target-refuses", Weight::Blocks, error, "what it says; its own log has more")
            }
        }
    }

    /// A guest that has no lists.
    pub fn of_lists(error: &ListsError) -> Self {
        let (name, way_out) = match error {
            ListsError::Request(RequestError::NoModule(_)) => {
                ("no-module", "load poolskip.ko in the guest (`modprobe poolskip`)")
            }
            ListsError::Request(RequestError::Version { .. }) => {
                ("module-version", "use the same release of Poolskip in the guest and on the hosts")
            }
            ListsError::Request(RequestError::NoAnswer { .. }) => (
                "no-answer",
                "start guest-probe in the guest (`systemctl start guest-probe`); `guest-probe doctor` there says what it lacks; \
                 --wait-lists gives it more time",
            ),
            ListsError::Request(RequestError::Nothing(_)) => (
                "no-lists",
                "`guest-probe status` in the guest says which servers it found, and `guest-probe doctor` what it lacks",
            ),
            ListsError::Request(_) | ListsError::Walk(_) => {
                ("lists-unreadable", "load the module anew in the guest; its kernel log may say more")
            }
            ListsError::Memory(_) => ("memory-unreadable", "run it as root in dom0"),
        };
        Self::new(name, Weight::Plain, error, way_out)
    }

    /// A disk whose bytes no offset names.
    pub fn of_disk(refused: &RefusedDisk) -> Self {
        Self::new(
            "disk-without-references",
            Weight::Some,
            format!("{}: {}", refused.disk, refused.reason),
            "a block device or a raw file, by the same path on both hosts; other disks go over the network",
        )
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}\n      way out: {}", self.name, self.what, self.way_out)
    }
}
