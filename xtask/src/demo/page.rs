//! The demo's two migrations as report files, and the page that has them side by side.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::step::{run, step};

/// Where reports and page go.
pub struct Pages {
    directory: PathBuf,
}

/// Name of the report of one of the two helpers.
fn name(is_stock: bool) -> &'static str {
    if is_stock { "stock.json" } else { "poolskip.json" }
}

impl Pages {
    /// Makes the directory.
    ///
    /// # Errors
    /// When it cannot be written to.
    pub fn new(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Keeps the report of one migration, with the downtime that the ticker in the guest saw: it knows better than the source.
    ///
    /// # Errors
    /// When it is no report, or cannot be written.
    pub fn keep(&self, is_stock: bool, report: &[u8], downtime_seconds: f64) -> Result<()> {
        let report = with_downtime(report, downtime_seconds)?;
        let path = self.directory.join(name(is_stock));
        fs::write(&path, report).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Makes the page, by the program that was built for the lab; where it is.
    ///
    /// # Errors
    /// When the program refuses a report.
    pub fn write(&self, migrator: &Path) -> Result<PathBuf> {
        let page = self.directory.join("report.html");
        step("the page of both migrations", || {
            run(Command::new(migrator)
                .arg("report")
                .arg(self.directory.join(name(false)))
                .arg("--compare")
                .arg(self.directory.join(name(true)))
                .arg("-o")
                .arg(&page))
        })?;
        Ok(page)
    }
}

/// A report with the downtime that was seen in the guest.
fn with_downtime(report: &[u8], seconds: f64) -> Result<String> {
    let mut report: Value = serde_json::from_slice(report).context("the migration's report is no JSON")?;
    let Some(fields) = report.as_object_mut().filter(|fields| fields.contains_key("downtime")) else {
        bail!("the migration's report has no field for the downtime");
    };
    fields.insert("downtime".into(), json!({"seconds": seconds, "seen": "guest"}));
    Ok(report.to_string() + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_s_own_downtime_takes_the_place_of_the_source_s() {
        let report = with_downtime(br#"{"domain":"db1","downtime":null}"#, 1.25).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&report).unwrap(),
            json!({"domain": "db1", "downtime": {"seconds": 1.25, "seen": "guest"}})
        );
        assert!(with_downtime(b"{}", 1.0).is_err());
        assert!(with_downtime(b"x", 1.0).is_err());
    }
}
