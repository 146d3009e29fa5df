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
    /// `value` to `baseline`.
    pub ratio: Option<f64>,
    /// What the median is of, in the order in which it was taken.
    pub samples: Vec<f64>,
}

impl Figure {
    /// A figure without a baseline.
    pub fn alone(name: impl Into<String>, unit: impl Into<String>, samples: Vec<f64>) -> Self {
        let value = median(&samples);
        Self { name: name.into(), unit: unit.into(), value, baseline: None, ratio: None, samples }
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
