//! `bench scale`: what lists, window and filter cost for guests of 8 GiB to 1 TiB. The guests are made up (`tests::scale`): lists are
//! generated as they are read, and a sample of pages of the same number passes the filters, so that memory that is not there is not
//! touched. Cost per GiB, and per page, must not grow with the guest.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::figures::{Figure, Report};
use crate::deployment::{cargo, target_directory};
use crate::step::{run as run_program, step};

/// What lists, window and filter cost for guests of any size.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Sizes of guests, in GiB; the first is what the others are compared with
    #[arg(long, value_name = "GIB", value_delimiter = ',', default_value = "8,64,256,1024")]
    gib: Vec<u64>,
    /// How often each is measured, in turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    samples: u32,
}

/// What `scale-sim` says.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Cost {
    gib: u64,
    list_seconds: f64,
    list_bytes: u64,
    list_peak_bytes: u64,
    pages: u64,
    filter_seconds: f64,
    filter_peak_bytes: u64,
}

/// A number of a size that is to be flat.
type Flat = fn(&Cost) -> f64;

/// Name, unit, number.
const FLAT: [(&str, &str, Flat); 5] = [
    ("list_seconds_per_gib", "s/GiB", |cost| cost.list_seconds / cost.gib as f64),
    ("list_bytes_per_gib", "bytes/GiB", |cost| cost.list_bytes as f64 / cost.gib as f64),
    ("list_peak_bytes_per_gib", "bytes/GiB", |cost| cost.list_peak_bytes as f64 / cost.gib as f64),
    ("filter_seconds_per_page", "s/page", |cost| cost.filter_seconds / cost.pages as f64),
    ("filter_peak_bytes", "bytes", |cost| cost.filter_peak_bytes as f64),
];

/// Measures all sizes in turn.
///
/// # Errors
/// When the simulation does not build, or fails.
pub fn run(args: &Args) -> Result<Report> {
    let program = step("building the simulation (release)", || {
        run_program(cargo().args(["build", "--locked", "--release", "--package=tests", "--bin=scale-sim"]))?;
        Ok(target_directory()?.join("release/scale-sim"))
    })?;
    let dir = tempfile::tempdir()?;
    let mut costs = Vec::new();
    for _ in 0..args.samples {
        for &gib in &args.gib {
            costs.push(step(&format!("a guest of {gib} GiB"), || simulate(&program, gib, dir.path()))?);
        }
    }
    Ok(report(&args.gib, &costs))
}

fn simulate(program: &PathBuf, gib: u64, dir: &Path) -> Result<Cost> {
    let words = run_program(Command::new(program).arg(gib.to_string()).arg(dir))?;
    serde_json::from_slice(&words)
        .with_context(|| format!("the simulation says {:?}", String::from_utf8_lossy(&words)))
}

fn report(sizes: &[u64], costs: &[Cost]) -> Report {
    let samples = |gib: u64, number: Flat| -> Vec<f64> {
        costs.iter().filter(|cost| cost.gib == gib).map(number).collect()
    };
    let mut figures = Vec::new();
    for (name, unit, number) in FLAT {
        let Some((&first, rest)) = sizes.split_first() else { continue };
        let baseline = samples(first, number);
        for &gib in rest {
            let name = format!("scale_{name}_{gib}_gib");
            figures.push(Figure::against(name, unit, samples(gib, number), &baseline));
        }
        figures.push(Figure::alone(format!("scale_{name}_{first}_gib"), unit, baseline));
    }
    Report { bench: "scale".into(), figures }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_that_grow_with_the_guest_have_a_ratio_of_one() {
        let cost = |gib: u64| Cost {
            gib,
            list_seconds: gib as f64 * 0.01,
            list_bytes: gib << 20,
            list_peak_bytes: gib << 21,
            pages: 100,
            filter_seconds: 0.5,
            filter_peak_bytes: 300 << 20,
        };
        let report = report(&[8, 1024], &[cost(8), cost(1024)]);
        let ratios: Vec<_> = report.figures.iter().filter_map(|figure| figure.ratio).collect();
        assert_eq!(ratios.len(), FLAT.len());
        assert!(ratios.iter().all(|ratio| (ratio - 1.0).abs() < 1e-9), "{ratios:?}");
        assert!(report.figures.iter().any(|figure| figure.name == "scale_list_seconds_per_gib_1024_gib"));
    }
}
