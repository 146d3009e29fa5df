//! What one run gave, and the directory in which runs are kept so that a bench can go on where it was interrupted.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::plan::Planned;
use crate::migration::{Classes, Lists};
use crate::workload::{Second, mean_between};

/// One measured migration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// From the command's start to its end.
    pub total_seconds: f64,
    /// The longest gap that the ticker in the guest saw.
    pub downtime_seconds: f64,
    /// Payload of all connections, both directions.
    pub wire_bytes: u64,
    /// What the source's interface counted on the link, both directions, headers and all.
    pub link_bytes: u64,
    /// The stream by class; only Poolskip's helper knows.
    pub classes: Option<Classes>,
    /// Passes over memory.
    pub rounds: Option<u64>,
    /// Pages that travelled whole.
    pub pages_sent: Option<u64>,
    /// Zero pages as markers.
    pub pages_zero: Option<u64>,
    /// References.
    pub pages_referenced: Option<u64>,
    /// References taken from storage.
    pub pages_accepted: Option<u64>,
    /// References refused.
    pub pages_refused: Option<u64>,
    /// What the guest had listed.
    pub lists: Option<Lists>,
    /// Processor time of both hosts' dom0 from start to end.
    pub dom0_cpu_seconds: f64,
    /// Where the guest came from.
    pub from: String,
    /// When the migration began and ended, in seconds since 1970 by this machine's clock, which the guest's was set to.
    pub began: f64,
    /// Its end.
    pub ended: f64,
    /// What the load did.
    pub timeline: Vec<Second>,
}

/// Transactions a second before, during and after.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Throughput {
    /// In the steps that ended before it began.
    pub before: f64,
    /// In those from its beginning to its end, the suspension included.
    pub during: f64,
    /// In those after its end.
    pub after: f64,
    /// In the first whole second after its end.
    pub first_second: f64,
}

impl Record {
    /// Of the load; none of an idle guest, or when steps are missing.
    pub fn throughput(&self) -> Option<Throughput> {
        let steps = &self.timeline;
        let end = steps.last()?.wall;
        let first = steps.windows(2).find(|pair| pair[0].wall >= self.ended)?;
        Some(Throughput {
            before: mean_between(steps, 0.0, self.began)?,
            during: mean_between(steps, self.began, self.ended)?,
            after: mean_between(steps, self.ended, end)?,
            first_second: mean_between(steps, first[0].wall, first[1].wall)?,
        })
    }

    /// Transactions that the migration kept the load from, by what it did before: a long migration may cost more than a short one that leaves the
    /// guest less. Where the throughput is there.
    pub fn transactions_missed(&self) -> Option<f64> {
        let throughput = self.throughput()?;
        Some((throughput.before - throughput.during) * (self.ended - self.began))
    }
}

/// Runs that are kept, under the hash of all that they depend on.
#[derive(Debug)]
pub struct Kept {
    dir: PathBuf,
}

impl Kept {
    /// The directory, made if it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A run, if it was done.
    ///
    /// # Errors
    /// When its file is there and is none.
    pub fn read(&self, run: Planned) -> Result<Option<Record>> {
        let path = self.dir.join(run.file());
        match fs::read(&path) {
            Ok(bytes) => {
                let record = serde_json::from_slice(&bytes).with_context(|| {
                    format!("{} is no run: remove it, and it is measured again", path.display())
                })?;
                Ok(Some(record))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Keeps a run: whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, run: Planned, record: &Record) -> Result<()> {
        let path = self.dir.join(run.file());
        let partial = path.with_extension("partial");
        fs::write(&partial, serde_json::to_vec_pretty(record)?)
            .and_then(|()| fs::rename(&partial, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A run of an idle guest.
    pub fn record(total_seconds: f64, wire_bytes: u64) -> Record {
        Record {
            total_seconds,
            downtime_seconds: 0.5,
            wire_bytes,
            link_bytes: wire_bytes,
            classes: None,
            rounds: Some(5),
            pages_sent: Some(100),
            pages_zero: None,
            pages_referenced: None,
            pages_accepted: None,
            pages_refused: None,
            lists: None,
            dom0_cpu_seconds: 3.0,
            from: "source".into(),
            began: 100.0,
            ended: 100.0 + total_seconds,
            timeline: Vec::new(),
        }
    }

    #[test]
    fn throughput_is_by_the_phase_in_which_a_step_ended() {
        let steps = (91..=125).map(|wall| {
            let rate = if (100..=110).contains(&wall) { 4.0 } else { 10.0 };
            Second { wall: f64::from(wall), seconds: 1.0, committed: rate }
        });
        let busy = Record { timeline: steps.collect(), ..record(10.0, 1) };
        let throughput = busy.throughput().unwrap();
        assert_eq!((throughput.during, throughput.after, throughput.first_second), (4.0, 10.0, 10.0));
        assert!(throughput.before > 9.0);
        // Ten seconds with six less in each.
        let missed = busy.transactions_missed().unwrap();
        assert!((missed - 10.0 * (throughput.before - 4.0)).abs() < 1e-6, "{missed}");
    }

    #[test]
    fn an_idle_guest_has_no_throughput() {
        assert_eq!(record(1.0, 1).throughput(), None);
    }
}
