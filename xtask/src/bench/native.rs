//! Benches that measure on a real mysqld on this machine: a program of `tests` runs them, built with all optimisations.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::figures::{Figure, Report};
use crate::build::ebpf;
use crate::deployment::{cargo, target_directory};
use crate::mysql;
use crate::step::{line_of, run as run_program, step};

/// The program.
const PROGRAM: &str = "probe-bench";

/// Samples of one thing as the program prints them.
#[derive(Deserialize)]
struct Samples {
    name: String,
    unit: String,
    samples: Vec<f64>,
    baseline: Option<Vec<f64>>,
    /// Whether each sample was taken beside the baseline's of the same number.
    #[serde(default)]
    paired: bool,
}

/// Builds the program, runs one of its benches, and makes figures of its samples. The server's disk is a file in `data`, where that is said,
/// and else where temporary files are.
///
/// # Errors
/// When it does not compile, ends with an error, or prints something else.
pub fn measure<S: AsRef<OsStr>>(
    bench: &str,
    arguments: impl IntoIterator<Item = S>,
    data: Option<&Path>,
) -> Result<Report> {
    ebpf::check()?;
    let root = mysql::root()?;
    step("building the bench (release)", || {
        let bin = format!("--bin={PROGRAM}");
        run_program(cargo().args(["build", "--locked", "--release", "--package=tests", &bin])).map(drop)
    })?;
    let mut command = Command::new(target_directory()?.join("release").join(PROGRAM));
    command.arg(bench).args(arguments).env("POOLSKIP_MYSQL_ROOT", root);
    if let Some(data) = data {
        command.env("TMPDIR", data);
    }
    // It says on stderr how far it is.
    let output = step(bench, || {
        let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
        output.with_context(|| format!("cannot start `{}`", line_of(&command)))
    })?;
    if !output.status.success() {
        bail!("`{}` ended with {}", line_of(&command), output.status);
    }
    figures(bench, &output.stdout)
}

fn figures(bench: &str, printed: &[u8]) -> Result<Report> {
    let samples: Vec<Samples> =
        serde_json::from_slice(printed).context("the bench printed something else")?;
    let figures = samples.into_iter().map(|it| match it.baseline {
        Some(baseline) if it.paired => Figure::paired(it.name, it.unit, it.samples, &baseline),
        Some(baseline) => Figure::against(it.name, it.unit, it.samples, &baseline),
        None => Figure::alone(it.name, it.unit, it.samples),
    });
    Ok(Report { bench: bench.to_owned(), figures: figures.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_become_figures() {
        let printed = br#"[{"name": "a", "unit": "s", "samples": [1.0, 3.0], "baseline": [4.0]},
                           {"name": "c", "unit": "s", "samples": [1.0, 3.0], "baseline": [4.0, 4.0], "paired": true},
                           {"name": "b", "unit": "1/s", "samples": [5.0], "baseline": null}]"#;
        let report = figures("x", printed).unwrap();
        let ratios: Vec<_> = report.figures.iter().map(|figure| (figure.value, figure.ratio)).collect();
        assert_eq!(ratios, [(2.0, Some(0.5)), (2.0, Some(0.5)), (5.0, None)]);
        assert!(figures("x", b"{}").is_err());
    }
}
