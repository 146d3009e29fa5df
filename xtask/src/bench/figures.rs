//! The one shape in which every bench gives its figures.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// One thing that was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Its name, `snake_case`.
    pub name: String,
    /// Unit of `value` and `baseline`: `bytes/s`, `s`, `bytes`, `1/s`.
    pub unit: String,
    /// Median of the samples.
    pub value: f64,
    /// Median of the baseline's samples, taken in turn with ours; none where there is nothing to compare with.
    pub baseline: Option<f64>,
    /// `value` to `baseline`; of samples that were taken in pairs, the median of the pairs' ratios.
    pub ratio: Option<f64>,
    /// Of samples in pairs: the bounds between which the ratio lies at 95 % confidence, whatever the ratios' distribution; the extremes of
    /// fewer than six pairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_bounds: Option<(f64, f64)>,
    /// What the median is of, in the order in which it was taken.
    pub samples: Vec<f64>,
}

impl Figure {
    /// A figure without a baseline.
    pub fn alone(name: impl Into<String>, unit: impl Into<String>, samples: Vec<f64>) -> Self {
        let value = median(&samples);
        Self {
            name: name.into(),
            unit: unit.into(),
            value,
            baseline: None,
            ratio: None,
            ratio_bounds: None,
            samples,
        }
    }

    /// A figure beside its baseline: the ratio is that of the two medians.
    pub fn against(
        name: impl Into<String>,
        unit: impl Into<String>,
        samples: Vec<f64>,
        baseline: &[f64],
    ) -> Self {
        let mut figure = Self::alone(name, unit, samples);
        let baseline = median(baseline);
        figure.baseline = Some(baseline);
        figure.ratio = (baseline != 0.0).then(|| figure.value / baseline);
        figure
    }

    /// A figure beside its baseline, each sample with its neighbour in time: what changes slowly is in both and falls out of their ratio.
    pub fn paired(
        name: impl Into<String>,
        unit: impl Into<String>,
        samples: Vec<f64>,
        baseline: &[f64],
    ) -> Self {
        let ratios = samples.iter().zip(baseline).filter(|(_, baseline)| **baseline != 0.0);
        let ratios: Vec<f64> = ratios.map(|(ours, baseline)| ours / baseline).collect();
        let mut figure = Self::against(name, unit, samples, baseline);
        figure.ratio = (!ratios.is_empty()).then(|| median(&ratios));
        figure.ratio_bounds = bounds(&ratios);
        figure
    }
}

/// Bounds of the median at 95 % confidence, by the sign test: it lies below the k-th smallest sample with the probability that of so many
/// tosses of a coin fewer than k show heads, and above the k-th largest with the same.
fn bounds(samples: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let tosses = sorted.len();
    let mut exactly = 0.5_f64.powi(i32::try_from(tosses).ok()?);
    let (mut at_most, mut skipped) = (0.0, 0);
    for heads in 0..tosses / 2 {
        at_most += exactly;
        if at_most > 0.025 {
            break;
        }
        skipped = heads;
        exactly *= (tosses - heads) as f64 / (heads + 1) as f64;
    }
    Some((*sorted.get(skipped)?, *sorted.get(tosses.checked_sub(1 + skipped)?)?))
}

/// The middle of the samples; of an even number, the mean of the two in the middle; 0 of none.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle), sorted.len() % 2) {
        (Some(&value), 1) => value,
        (Some(&value), _) => {
            f64::midpoint(value, sorted.get(middle.saturating_sub(1)).copied().unwrap_or(value))
        }
        (None, _) => 0.0,
    }
}

/// What a bench found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Name of the bench.
    pub bench: String,
    /// Its figures.
    pub figures: Vec<Figure>,
}

impl Report {
    /// Writes it as JSON.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.bench)?;
        let width = self.figures.iter().map(|figure| figure.name.len()).max().unwrap_or(0);
        for figure in &self.figures {
            write!(f, "  {:<width$}  {:>12} {}", figure.name, short(figure.value), figure.unit)?;
            if let (Some(baseline), Some(ratio)) = (figure.baseline, figure.ratio) {
                write!(f, "  baseline {}  ratio {ratio:.3}", short(baseline))?;
            }
            if let Some((low, high)) = figure.ratio_bounds {
                write!(f, " ({low:.3} to {high:.3})")?;
            }
            writeln!(f, "  ({} samples)", figure.samples.len())?;
        }
        Ok(())
    }
}

/// Four digits that matter.
fn short(value: f64) -> String {
    match value.abs() {
        1e9.. => format!("{:.3} G", value / 1e9),
        1e6.. => format!("{:.3} M", value / 1e6),
        100.0.. => format!("{value:.0}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_that_of_the_medians() {
        let figure = Figure::against("stream", "s", vec![3.0, 1.0, 2.0], &[4.0, 8.0]);
        assert_eq!((figure.value, figure.baseline, figure.ratio), (2.0, Some(6.0), Some(1.0 / 3.0)));
        assert_eq!(figure.samples, [3.0, 1.0, 2.0]);
    }

    #[test]
    fn what_drifts_falls_out_of_pairs() {
        let baseline: Vec<f64> = (1..=10).map(f64::from).collect();
        let ours: Vec<f64> = baseline.iter().map(|value| value * 0.5).collect();
        let figure = Figure::paired("x", "s", ours, &baseline);
        assert_eq!((figure.ratio, figure.ratio_bounds), (Some(0.5), Some((0.5, 0.5))));
        assert_eq!(Figure::paired("x", "s", Vec::new(), &[]).ratio, None);
    }

    #[test]
    fn bounds_are_those_of_the_sign_test() {
        // From a table of it: the 2nd of ten to the 9th holds the median with 97.9 %, the 6th of twenty to the 15th with 95.9 %.
        let samples = |count: u32| (1..=count).rev().map(f64::from).collect::<Vec<_>>();
        assert_eq!(bounds(&samples(10)), Some((2.0, 9.0)));
        assert_eq!(bounds(&samples(20)), Some((6.0, 15.0)));
        assert_eq!(bounds(&samples(5)), Some((1.0, 5.0)));
        assert_eq!(bounds(&samples(1)), Some((1.0, 1.0)));
        assert_eq!(bounds(&[]), None);
    }

    #[test]
    fn the_json_has_the_one_shape() {
        let report = Report { bench: "x".into(), figures: vec![Figure::alone("y", "s", vec![1.5])] };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"bench": "x", "figures": [
                {"name": "y", "unit": "s", "value": 1.5, "baseline": null, "ratio": null, "samples": [1.5]}
            ]})
        );
    }
}
