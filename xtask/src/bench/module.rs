//! How fast the kernel module translates and publishes frames, in an emulated machine or in a guest of the lab, beside reading the same
//! PFNs from `/proc/PID/pagemap` there.

use anyhow::{Context, Result, ensure};

use super::figures::{Figure, Report};
use crate::build::Suite;
use crate::deployment::{Deployment, guest};
use crate::lab::{self, Flavour, Lab};
use crate::module_test;

/// Frames a second through the kernel module, against `/proc/PID/pagemap`.
#[derive(clap::Args)]
pub struct Args {
    /// The Debian suite whose newest kernel is booted
    #[arg(long, value_enum, default_value = "bookworm")]
    suite: Suite,
    /// Measure in this guest of the lab, beside its database, and not in a machine of its own
    #[arg(long, value_enum, value_name = "KIND", conflicts_with = "suite")]
    guest: Option<Flavour>,
}

/// Boots the kernel, or raises the lab, and lets the boot test's program measure.
///
/// Each sample is a pool of 8,192 frames of 16 KiB (where a database has the memory, 2,048 frames four times over): begun, added in one call, published; then the same PFNs by pagemap, with one read for
/// all frames that adjoin. `in_order` has the frames by address, as the probe gives them; `scattered` in no order.
///
/// # Errors
/// When the machine does not come to the end of it.
pub fn run(args: &Args) -> Result<Report> {
    let lines = match args.guest {
        None => module_test::measure(args.suite.name())?,
        Some(flavour) => in_guest(flavour)?,
    };
    ensure!(lines.iter().any(|line| line == "bench: done"), "the machine ended before the bench did");
    let figures = ["in_order", "scattered"].map(|name| {
        let (module, pagemap): (Vec<f64>, Vec<f64>) =
            lines.iter().filter_map(|line| parse_sample(line, name)).unzip();
        ensure!(!module.is_empty(), "the machine printed no sample of {name}");
        Ok(Figure::against(format!("frames_{name}"), "1/s", module, &pagemap))
    });
    let figures =
        figures.into_iter().collect::<Result<_>>().context("the bench in the machine is incomplete")?;
    Ok(Report { bench: "module".to_owned(), figures })
}

/// The database has its memory, and nobody asks it anything; the module is loaded by the program.
fn in_guest(flavour: Flavour) -> Result<Vec<String>> {
    let deployment = Deployment::build(flavour)?;
    let lab = Lab::warm(&lab::Options { flavour, ..lab::Options::default() })?;
    deployment.install(&lab)?;
    guest(&lab, "rmmod poolskip")?;
    module_test::measure_in_guest(&lab)
}

/// `sample NAME MODULE PAGEMAP`, both in frames a second.
fn parse_sample(line: &str, name: &str) -> Option<(f64, f64)> {
    let (module, pagemap) = line.strip_prefix("sample ")?.strip_prefix(name)?.trim_start().split_once(' ')?;
    Some((module.parse().ok()?, pagemap.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_told_by_name() {
        assert_eq!(parse_sample("sample in_order 500 250", "in_order"), Some((500.0, 250.0)));
        assert_eq!(parse_sample("sample in_order 500 250", "scattered"), None);
        assert_eq!(parse_sample("sample in_order 500", "in_order"), None);
        assert_eq!(parse_sample("bench: done", "in_order"), None);
    }
}
