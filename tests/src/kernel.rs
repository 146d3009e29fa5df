//! What the kernel itself says of the eBPF programs and probes of a process.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use libbpf_rs::query::{LinkInfoIter, ProgInfoIter};

/// What the kernel writes over the first byte of a probed instruction.
pub const INT3: u8 = 0xcc;

/// Programs and links that a process holds, by the kernel's numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Programs.
    pub programs: BTreeSet<u32>,
    /// Links: what ties a program to a place.
    pub links: BTreeSet<u32>,
}

impl Held {
    /// Those of a process, as its descriptors name them (`/proc/PID/fdinfo`).
    ///
    /// # Errors
    /// When the process is gone.
    pub fn by(pid: u32) -> Result<Self> {
        let mut held = Self::default();
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            // Descriptors close while they are looked at.
            let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
            let number = |key: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(key))?;
                line.trim().parse::<u32>().ok()
            };
            if let Some(link) = number("link_id:") {
                held.links.insert(link);
            } else {
                held.programs.extend(number("prog_id:"));
            }
        }
        Ok(held)
    }

    /// Those of them that the kernel still has, in its own lists of all.
    pub fn still_there(&self) -> Self {
        Self {
            programs: ProgInfoIter::default()
                .map(|it| it.id)
                .filter(|id| self.programs.contains(id))
                .collect(),
            links: LinkInfoIter::default().map(|it| it.id).filter(|id| self.links.contains(id)).collect(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.programs.is_empty() && self.links.is_empty()
    }
}

/// How often the kernel has run a program since it counts.
///
/// # Errors
/// When there is no such program.
pub fn runs(program: u32) -> Result<u64> {
    let info = ProgInfoIter::default().find(|info| info.id == program);
    info.map(|info| info.run_cnt).with_context(|| format!("the kernel has no program {program}"))
}
