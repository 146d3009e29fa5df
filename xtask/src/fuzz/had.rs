//! What each target has had so far, in all turns: a long run may be cut into parts.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::turn::Turn;

/// What a target has had since it last found something.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Had {
    /// A hash of the code that it ran ([`super::code::Code`]).
    #[serde(default)]
    pub code: String,
    /// Time of the processors, in seconds, with that code.
    pub seconds: f64,
    /// Inputs that were tried of it.
    pub inputs: u64,
    /// Time of the processors, in seconds, with code that has changed since.
    #[serde(default)]
    pub earlier_seconds: f64,
}

impl Had {
    /// Reads it from a target's directory; nothing when it has not run yet. What it had with other code than this is an earlier time, and
    /// counts no more.
    ///
    /// # Errors
    /// When the file cannot be read, or is another's.
    pub fn read(work: &Path, code: &str) -> Result<Self> {
        let path = work.join("had.json");
        let none = Self { code: code.to_owned(), ..Self::default() };
        let had: Self = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is not what was written: remove it", path.display()))?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(none),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        if had.code == code {
            return Ok(had);
        }
        Ok(Self { earlier_seconds: had.earlier_seconds + had.seconds, ..none })
    }

    /// Adds a turn, and keeps it. What was tried before a finding counts no more: what mends it is other code.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(work: &Path, code: &str, turn: &Turn) -> Result<Self> {
        let before = Self::read(work, code)?;
        let had = if turn.finding.is_some() {
            Self { code: before.code, ..Self::default() }
        } else {
            Self {
                seconds: before.seconds + turn.had.as_secs_f64(),
                inputs: before.inputs + turn.runs,
                ..before
            }
        };
        let (path, new) = (work.join("had.json"), work.join("had.json.new"));
        fs::write(&new, serde_json::to_vec(&had)?)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(had)
    }

    /// What is left to a total.
    pub fn left(&self, total: Duration) -> Duration {
        total.saturating_sub(Duration::try_from_secs_f64(self.seconds).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn had(code: &str, seconds: f64, inputs: u64, earlier_seconds: f64) -> Had {
        Had { code: code.into(), seconds, inputs, earlier_seconds }
    }

    #[test]
    fn turns_add_up_until_something_is_found() {
        let work = tempfile::tempdir().unwrap();
        let turn = Turn { had: Duration::from_millis(1500), runs: 10, ..Turn::default() };
        assert_eq!(Had::read(work.path(), "a").unwrap(), had("a", 0.0, 0, 0.0));
        Had::add(work.path(), "a", &turn).unwrap();
        let twice = Had::add(work.path(), "a", &turn).unwrap();
        assert_eq!(twice, had("a", 3.0, 20, 0.0));
        assert_eq!(Had::read(work.path(), "a").unwrap(), twice);
        assert_eq!(twice.left(Duration::from_secs(10)), Duration::from_secs(7));
        assert_eq!(twice.left(Duration::from_secs(2)), Duration::ZERO);
        let found = Turn { finding: Some("x".into()), ..turn };
        assert_eq!(Had::add(work.path(), "a", &found).unwrap(), had("a", 0.0, 0, 0.0));
        fs::write(work.path().join("had.json"), "{").unwrap();
        assert!(Had::read(work.path(), "a").is_err());
    }

    #[test]
    fn what_was_tried_of_other_code_is_said_and_does_not_count() {
        let work = tempfile::tempdir().unwrap();
        let turn = Turn { had: Duration::from_secs(2), runs: 10, ..Turn::default() };
        // As it was written when nobody asked which code it was.
        fs::write(work.path().join("had.json"), r#"{"seconds": 1.5, "inputs": 7}"#).unwrap();
        assert_eq!(Had::add(work.path(), "a", &turn).unwrap(), had("a", 2.0, 10, 1.5));
        let changed = Had::read(work.path(), "b").unwrap();
        assert_eq!(changed, had("b", 0.0, 0, 3.5));
        assert_eq!(changed.left(Duration::from_secs(10)), Duration::from_secs(10));
        assert_eq!(Had::add(work.path(), "b", &turn).unwrap(), had("b", 2.0, 10, 3.5));
    }
}
