//! What each target has had so far, in all turns: a long run may be cut into parts. It is kept beside what a run makes up, and, when that
//! is asked for ([`Record`]), in the tree, from where a run in another checkout goes on.

use std::collections::BTreeMap;
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

/// What targets have had, by their names, as it is kept in the tree.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record(BTreeMap<String, Had>);

impl Record {
    /// Reads a record; an empty one when there is no such file.
    ///
    /// # Errors
    /// When it cannot be read, or is no record.
    pub fn read(path: &Path) -> Result<Self> {
        match fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).with_context(|| format!("{} is no record", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Enters what a target has had, unless it has been had more of the same code.
    pub fn enter(&mut self, target: &str, had: &Had) {
        let known = self.0.get(target);
        if known.is_none_or(|known| known.code != had.code || known.seconds < had.seconds) {
            let seconds = had.seconds.floor();
            self.0.insert(target.to_owned(), Had { seconds, earlier_seconds: 0.0, ..had.clone() });
        }
    }

    /// Strikes out what a target has had that then found something.
    pub fn forget(&mut self, target: &str) {
        self.0.remove(target);
    }

    /// Writes it, for these targets alone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, path: &Path, targets: &[&str]) -> Result<()> {
        self.0.retain(|name, _| targets.contains(&name.as_str()));
        let text = format!("{HEAD}\n{}", toml::to_string(self)?);
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Lets a target whose directory this is begin with what it has had of this code, unless it has run there.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn begin(&self, target: &str, work: &Path, code: &str) -> Result<()> {
        let here = Had::read(work, code)?;
        match self.0.get(target).filter(|had| had.code == code) {
            Some(had) if !Had::has_run(work, code)? => {
                Had { earlier_seconds: here.earlier_seconds, ..had.clone() }.write(work)
            }
            _ => Ok(()),
        }
    }
}

/// What stands above a record.
const HEAD: &str = "# What each fuzz target has had without a finding, in seconds of a processor, of the code with this hash. \
                    Written by `cargo xtask fuzz --record`.\n";

impl Had {
    /// Whether what is kept in a target's directory is of this code.
    fn has_run(work: &Path, code: &str) -> Result<bool> {
        Ok(work.join("had.json").exists() && {
            let bytes = fs::read(work.join("had.json"))?;
            serde_json::from_slice::<Self>(&bytes)?.code == code
        })
    }

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
        had.write(work)?;
        Ok(had)
    }

    fn write(&self, work: &Path) -> Result<()> {
        let (path, new) = (work.join("had.json"), work.join("had.json.new"));
        fs::write(&new, serde_json::to_vec(self)?)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))
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

    #[test]
    fn another_checkout_goes_on_from_the_record_and_a_finding_there_stays_one() {
        let (tree, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = tree.path().join("had.toml");
        let mut record = Record::read(&path).unwrap();
        record.enter("elf", &had("a", 60.9, 10, 4.0));
        record.enter("gone", &had("a", 1.0, 1, 0.0));
        record.write(&path, &["elf", "other"]).unwrap();
        let read = Record::read(&path).unwrap();
        assert_eq!(read, record);
        assert!(!fs::read_to_string(&path).unwrap().contains("gone"));
        read.begin("elf", work.path(), "b").unwrap();
        read.begin("other", work.path(), "a").unwrap();
        assert_eq!(Had::read(work.path(), "a").unwrap(), had("a", 0.0, 0, 0.0));
        read.begin("elf", work.path(), "a").unwrap();
        assert_eq!(Had::read(work.path(), "a").unwrap(), had("a", 60.0, 10, 0.0));
        let found = Turn { finding: Some("x".into()), ..Turn::default() };
        Had::add(work.path(), "a", &found).unwrap();
        read.begin("elf", work.path(), "a").unwrap();
        assert_eq!(
            Had::read(work.path(), "a").unwrap(),
            had("a", 0.0, 0, 0.0),
            "found, and counted all the same"
        );
        fs::write(&path, "elf = 3").unwrap();
        assert!(Record::read(&path).is_err());
    }

    #[test]
    fn a_record_keeps_the_longer_run_of_one_code_and_the_newer_code() {
        let mut record = Record::default();
        for (now, kept) in
            [(had("a", 600.0, 9, 0.0), "a"), (had("a", 5.0, 1, 0.0), "a"), (had("b", 5.0, 1, 0.0), "b")]
        {
            record.enter("elf", &now);
            assert_eq!(record.0["elf"].code, kept);
        }
        assert_eq!(record.0["elf"], had("b", 5.0, 1, 0.0));
        record.forget("elf");
        assert_eq!(record, Record::default());
    }
}
