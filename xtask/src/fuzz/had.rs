//! What each target has had so far, in all turns: a long run may be cut into parts.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::turn::Turn;

/// What a target has had since it last found something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Had {
    /// Time of the processors, in seconds.
    pub seconds: f64,
    /// Inputs that were tried.
    pub inputs: u64,
}

impl Had {
    /// Reads it from a target's directory; nothing when it has not run yet.
    ///
    /// # Errors
    /// When the file cannot be read, or is another's.
    pub fn read(work: &Path) -> Result<Self> {
        let path = work.join("had.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is not what was written: remove it", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Adds a turn, and keeps it. What was tried before a finding counts no more: what mends it is other code.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(work: &Path, turn: &Turn) -> Result<Self> {
        let before = Self::read(work)?;
        let had = if turn.finding.is_some() {
            Self::default()
        } else {
            Self { seconds: before.seconds + turn.had.as_secs_f64(), inputs: before.inputs + turn.runs }
        };
        let (path, new) = (work.join("had.json"), work.join("had.json.new"));
        fs::write(&new, serde_json::to_vec(&had)?)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(had)
    }

    /// What is left to a total.
    pub fn left(self, total: Duration) -> Duration {
        total.saturating_sub(Duration::try_from_secs_f64(self.seconds).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_add_up_until_something_is_found() {
        let work = tempfile::tempdir().unwrap();
        let turn = Turn { had: Duration::from_millis(1500), runs: 10, ..Turn::default() };
        assert_eq!(Had::read(work.path()).unwrap(), Had::default());
        Had::add(work.path(), &turn).unwrap();
        let had = Had::add(work.path(), &turn).unwrap();
        assert_eq!(had, Had { seconds: 3.0, inputs: 20 });
        assert_eq!(Had::read(work.path()).unwrap(), had);
        assert_eq!(had.left(Duration::from_secs(10)), Duration::from_secs(7));
        assert_eq!(had.left(Duration::from_secs(2)), Duration::ZERO);
        let found = Turn { finding: Some("x".into()), ..turn };
        assert_eq!(Had::add(work.path(), &found).unwrap(), Had::default());
        fs::write(work.path().join("had.json"), "{").unwrap();
        assert!(Had::read(work.path()).is_err());
    }
}
