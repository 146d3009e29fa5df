//! dom0-migrator's own benches: a program beside its filters, built with what an operator's build has.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::deployment::{cargo, target_directory};
use crate::step::{run, step};

/// The program.
pub struct Program(PathBuf);

impl Program {
    /// Builds it.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn build() -> Result<Self> {
        step("building dom0-migrator's benches (release)", || {
            let build = ["build", "--locked", "--release", "--package=dom0-migrator", "--example=bench"];
            run(cargo().args(build))?;
            Ok(Self(target_directory()?.join("release/examples/bench")))
        })
    }

    /// Runs one of its commands on a disk; what it measured.
    ///
    /// # Errors
    /// When it fails.
    pub fn measure(&self, command: &str, disk: &Path, args: &[String]) -> Result<serde_json::Value> {
        let words = run(Command::new(&self.0).arg(command).arg("--disk").arg(disk).args(args))?;
        serde_json::from_slice(&words).with_context(|| format!("`bench {command}` printed no JSON"))
    }
}

/// The numbers of a list.
///
/// # Errors
/// When it is none.
pub fn numbers(measured: &serde_json::Value, name: &str) -> Result<Vec<f64>> {
    let list = measured[name].as_array().with_context(|| format!("no list {name} was measured"))?;
    list.iter().map(|one| one.as_f64().with_context(|| format!("{one} in {name} is no number"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_are_numbers() {
        let measured = serde_json::json!({"a": [1, 2.5], "b": ["x"]});
        assert_eq!(numbers(&measured, "a").unwrap(), [1.0, 2.5]);
        assert!(numbers(&measured, "b").is_err() && numbers(&measured, "c").is_err());
    }
}
