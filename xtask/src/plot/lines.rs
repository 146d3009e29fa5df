//! Time lines, one above the other: each with the time of its migration shaded.

use super::Series;
use super::axis::Axis;
use super::bars::heading;
use super::svg::{Anchor, FAINT, GRID, INK, Style, Svg};

/// A stretch of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// In seconds on the axis.
    pub from: f64,
    /// In seconds on the axis.
    pub to: f64,
}

/// One time line, in a panel of its own.
#[derive(Clone, Debug)]
pub struct Line {
    /// Whose.
    pub series: Series,
    /// What is shaded.
    pub span: Span,
    /// Steps: when each began and ended, and the rate in it.
    pub steps: Vec<(Span, f64)>,
}

/// A picture with time lines on one scale.
#[derive(Clone, Debug)]
pub struct Lines {
    /// What it shows.
    pub title: String,
    /// Under what circumstances.
    pub subtitle: String,
    /// Unit of the values.
    pub unit: &'static str,
    /// From top to bottom.
    pub lines: Vec<Line>,
}

const WIDTH: f64 = 760.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 96.0;
const PANEL: f64 = 130.0;
const GAP: f64 = 22.0;
const BOTTOM: f64 = 48.0;

/// What is shaded.
const SHADE: &str = "#f3e9d2";

impl Lines {
    /// Draws it.
    pub fn draw(&self) -> String {
        let panels = self.lines.len() as f64;
        let height = TOP + panels * PANEL + (panels - 1.0).max(0.0) * GAP + BOTTOM;
        let mut svg = Svg::new(WIDTH as u32, height as u32);
        let series: Vec<_> = self.lines.iter().map(|line| line.series).collect();
        heading(&mut svg, &self.title, &self.subtitle, &series);
        let steps = || self.lines.iter().flat_map(|line| &line.steps);
        let rates = Axis::up_to(steps().map(|step| step.1).fold(0.0, f64::max));
        let first = steps().map(|step| step.0.from).fold(0.0, f64::min).floor();
        let time = Axis::up_to(steps().map(|step| step.0.to).fold(0.0, f64::max));
        let x = |at: f64| LEFT + (WIDTH - LEFT - RIGHT) * (at - first) / (time.end - first);
        for (number, line) in self.lines.iter().enumerate() {
            let top = TOP + number as f64 * (PANEL + GAP);
            let y = |rate: f64| top + PANEL * (1.0 - rate / rates.end);
            svg.rectangle((x(line.span.from), top), (x(line.span.to) - x(line.span.from), PANEL), SHADE);
            // Panels are low: every second tick where there are many.
            let every = if rates.ticks().len() > 5 { 2 } else { 1 };
            for tick in rates.ticks().into_iter().step_by(every) {
                let colour = if tick == 0.0 { INK } else { GRID };
                svg.line((LEFT, y(tick)), (WIDTH - RIGHT, y(tick)), colour, 1.0);
                let style = Style { size: 12, colour: FAINT, anchor: Anchor::End };
                svg.text((LEFT - 8.0, y(tick) + 4.0), style, &rates.label(tick));
            }
            // Each step is level: nothing is known of what was within it.
            let points: Vec<_> = line
                .steps
                .iter()
                .flat_map(|(span, rate)| [(x(span.from), y(*rate)), (x(span.to), y(*rate))])
                .collect();
            svg.path(&points, line.series.colour);
        }
        svg.text((LEFT - 8.0, TOP - 14.0), Style { size: 12, colour: FAINT, anchor: Anchor::End }, self.unit);
        let bottom = height - BOTTOM;
        for tick in time.ticks() {
            svg.line((x(tick), bottom), (x(tick), bottom + 4.0), INK, 1.0);
            let style = Style { size: 12, colour: FAINT, anchor: Anchor::Middle };
            svg.text((x(tick), bottom + 18.0), style, &time.label(tick));
        }
        svg.text(
            ((LEFT + WIDTH - RIGHT) / 2.0, bottom + 38.0),
            Style { size: 12, colour: FAINT, anchor: Anchor::Middle },
            "seconds since the migration began (shaded: while it ran)",
        );
        svg.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_its_panel_and_its_shade() {
        let line = |colour, to| Line {
            series: Series { name: "x", colour },
            span: Span { from: 0.0, to },
            steps: (-5..20).map(|n| (Span { from: f64::from(n), to: f64::from(n + 1) }, 3.0)).collect(),
        };
        let lines = Lines {
            title: "t".into(),
            subtitle: "s".into(),
            unit: "1/s",
            lines: vec![line("#111111", 10.0), line("#222222", 5.0)],
        };
        let svg = lines.draw();
        assert_eq!(svg.matches("<polyline ").count(), 2);
        assert_eq!(svg.matches(SHADE).count(), 2);
        assert_eq!(svg, lines.draw());
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
