//! What `check` found, for people and for programs.

use std::fmt;

use serde::Serialize;

use super::model::Model;
use super::obstacle::{Obstacle, Weight};
use super::rounds::downtime;
use crate::command::summary::bytes;
use crate::inquiry::Measured;

/// What a migration would be now.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CheckReport {
    /// Name of the domain.
    pub domain: String,
    /// Where it would go.
    pub target: String,
    /// Version of the target's program.
    pub target_version: Option<String>,
    /// The domain's memory.
    pub memory_bytes: u64,
    /// Of it: zero pages, of those that were looked at.
    pub zero_bytes: Option<f64>,
    /// Pages that the guest lists.
    pub pages_listed: Option<u64>,
    /// What would go by reference, if the samples tell true.
    pub reference_bytes: f64,
    /// Listed pages that were looked at.
    pub samples: u64,
    /// Of these: the target finds the same bytes on its disk.
    pub samples_same: u64,
    /// What the guest writes to in a second, as seen between two looks.
    pub dirty_bytes_per_second: Option<f64>,
    /// TCP connections of the stream.
    pub connections: u16,
    /// The link, as measured.
    pub link: Option<Measured>,
    /// The target's storage, as measured.
    pub storage: Option<Measured>,
    /// What it would take.
    pub estimate: Option<Estimate>,
    /// What is in the way.
    pub obstacles: Vec<Obstacle>,
}

/// With libxl's own helper, and with Poolskip.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Without.
    pub stock: Estimated,
    /// With.
    pub poolskip: Estimated,
}

/// A lower bound: `docs/performance.md`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimated {
    /// Total time; infinite (null) when more is written to than the link carries.
    pub seconds: f64,
    /// Over the network.
    pub wire_bytes: f64,
    /// For how long the last of the memory is sent while the domain stands still.
    pub downtime_seconds: f64,
}

impl Estimate {
    /// Of a model; `max_downtime` in seconds.
    pub fn of(model: &Model, max_downtime: f64) -> Self {
        let estimated = |bound: super::model::Bound, wanted| Estimated {
            seconds: bound.total_seconds,
            wire_bytes: bound.wire_bytes,
            downtime_seconds: downtime(model, bound, wanted).seconds,
        };
        Self {
            stock: estimated(model.stock(), None),
            poolskip: estimated(model.poolskip(), Some(max_downtime)),
        }
    }
}

impl CheckReport {
    /// The worst of what is in the way.
    pub fn worst(&self) -> Option<Weight> {
        self.obstacles.iter().map(|obstacle| obstacle.weight).max()
    }

    /// Estimates, as far as there is something to estimate from. `with_helper`: both sides can run our helper.
    pub fn estimate(&mut self, with_helper: bool, max_downtime: f64) {
        let Some(link) = self.link.map(Measured::rate).filter(|&rate| rate > 0.0) else { return };
        let dirty = self.dirty_bytes_per_second.unwrap_or_default();
        let storage = self.storage.map(Measured::rate).unwrap_or_default();
        let helped = |bytes: f64| if with_helper { bytes } else { 0.0 };
        let model = Model {
            memory_bytes: self.memory_bytes as f64,
            zero_bytes: helped(self.zero_bytes.unwrap_or_default()),
            cached_bytes: if storage > 0.0 { helped(self.reference_bytes) } else { 0.0 },
            dirty_bytes_per_second: dirty,
            link_bytes_per_second: link,
            storage_bytes_per_second: storage.max(1.0),
        };
        let mut estimate = Estimate::of(&model, max_downtime);
        if !with_helper {
            estimate.poolskip = estimate.stock;
        }
        self.estimate = Some(estimate);
        if dirty >= link {
            self.obstacles.push(Obstacle::new(
                "writes-outpace-link",
                Weight::Some,
                format!(
                    "the guest writes to {}/s of memory, the link carries {}/s",
                    bytes(dirty as u64),
                    bytes(link as u64)
                ),
                "a quieter hour, or a faster link; `migrate` ends such rounds by --on-stall",
            ));
        }
    }
}

fn seconds(seconds: f64) -> String {
    if seconds.is_finite() { format!("{seconds:.1} s") } else { "no end".into() }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<22} {value}");
        let rate = |measured: Option<Measured>| {
            measured
                .map_or("not measured".to_owned(), |measured| format!("{}/s", bytes(measured.rate() as u64)))
        };
        row("domain", format!("{}, {} of memory", self.domain, bytes(self.memory_bytes)))?;
        let version =
            self.target_version.as_ref().map_or(String::new(), |version| format!(" (Poolskip {version})"));
        row("target", format!("{}{version}", self.target))?;
        row("link", format!("{}, {} connections", rate(self.link), self.connections))?;
        row("target's storage", rate(self.storage))?;
        if let Some(listed) = self.pages_listed {
            row("pages listed", format!("{listed}, {}", bytes(listed * 4096)))?;
            row(
                "  the same at target",
                format!("{} of {} that were looked at", self.samples_same, self.samples),
            )?;
        }
        row("would go by reference", bytes(self.reference_bytes as u64))?;
        if let Some(zero) = self.zero_bytes {
            row("zero pages", bytes(zero as u64))?;
        }
        if let Some(dirty) = self.dirty_bytes_per_second {
            row("written to", format!("{}/s", bytes(dirty as u64)))?;
        }
        match &self.estimate {
            Some(Estimate { stock, poolskip }) => {
                row("at best", format!("{:>12} {:>12}", "stock", "Poolskip"))?;
                let mut both = |name: &str, of: &dyn Fn(&Estimated) -> String| {
                    row(name, format!("{:>12} {:>12}", of(stock), of(poolskip)))
                };
                both("  total time", &|one| seconds(one.seconds))?;
                both("  bytes", &|one| {
                    if one.wire_bytes.is_finite() { bytes(one.wire_bytes as u64) } else { "no end".into() }
                })?;
                both("  downtime for memory", &|one| format!("{:.2} s", one.downtime_seconds))?;
            }
            None => row("at best", "not known, since the link was not measured".into())?,
        }
        if self.obstacles.is_empty() {
            return writeln!(f, "  nothing is in the way");
        }
        for obstacle in &self.obstacles {
            let weight = match obstacle.weight {
                Weight::Blocks => "it would not begin",
                Weight::Plain => "nothing would go by reference",
                Weight::Some => "less than could be",
            };
            writeln!(f, "  ! {weight}: {obstacle}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> CheckReport {
        CheckReport {
            domain: "db1".into(),
            memory_bytes: 8 << 30,
            zero_bytes: Some(0.5 * (1_u64 << 30) as f64),
            reference_bytes: 5.6 * (1_u64 << 30) as f64,
            link: Some(Measured { bytes: 125_000_000, seconds: 1.0 }),
            storage: Some(Measured { bytes: 1_000_000_000, seconds: 1.0 }),
            ..CheckReport::default()
        }
    }

    #[test]
    fn the_estimate_is_that_of_the_documentation() {
        let mut report = report();
        report.estimate(true, 0.3);
        let Estimate { stock, poolskip } = report.estimate.unwrap();
        assert!((stock.seconds - 68.85).abs() < 0.01 && (poolskip.seconds - 16.58).abs() < 0.01);
        assert_eq!((report.worst(), poolskip.downtime_seconds), (None, 0.0));
        let words = report.to_string();
        assert!(words.contains("68.9 s") && words.contains("nothing is in the way"), "{words}");
    }

    #[test]
    fn without_the_helper_it_is_stock() {
        let mut report = report();
        report.estimate(false, 0.3);
        let Estimate { stock, poolskip } = report.estimate.unwrap();
        assert_eq!(stock, poolskip);
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_is_said() {
        let mut report = CheckReport { dirty_bytes_per_second: Some(2e8), ..report() };
        report.estimate(true, 0.3);
        assert_eq!(report.obstacles[0].name, "writes-outpace-link");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["estimate"]["stock"]["seconds"], serde_json::Value::Null);
        assert!(report.to_string().contains("no end"));
    }
}
