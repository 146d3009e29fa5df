//! Charts over time: steps stacked on each other, lines, bands for the passes.

use maud::{Markup, html};

use super::format::at;
use super::series::Step;

/// Width of a chart in its own units; the browser scales it.
pub const WIDTH: f64 = 940.0;
/// Room for the numbers at the left.
const LEFT: f64 = 58.0;
/// Room at the right.
const RIGHT: f64 = 12.0;
/// Room above, for the names of the bands.
const TOP: f64 = 24.0;
/// Room below, for the times.
const BOTTOM: f64 = 22.0;

/// A layer of a stack.
pub struct Layer {
    /// Its colour's class.
    pub class: &'static str,
    /// Its name.
    pub name: &'static str,
    /// Its values; all layers have the same times.
    pub steps: Vec<Step>,
}

/// A line over the stack.
pub struct Line {
    /// Its class.
    pub class: &'static str,
    /// Its name.
    pub name: String,
    /// Its values.
    pub steps: Vec<Step>,
}

/// A span of time with a name.
pub struct Band {
    /// From.
    pub from: f64,
    /// To.
    pub to: f64,
    /// Its name.
    pub name: String,
    /// Its class.
    pub class: &'static str,
}

/// A chart.
pub struct Chart {
    /// What it shows, for those who cannot see it.
    pub description: String,
    /// Names of the element, unique in the page.
    pub id: &'static str,
    /// Its height.
    pub height: f64,
    /// The last time.
    pub end: f64,
    /// The largest value, at least.
    pub most: f64,
    /// What values are in, and how much of it is one.
    pub unit: (&'static str, f64),
    /// Bands behind it.
    pub bands: Vec<Band>,
    /// Whether the bands' names are written.
    pub names_bands: bool,
    /// What is stacked, from the bottom.
    pub layers: Vec<Layer>,
    /// Lines over it.
    pub lines: Vec<Line>,
}

/// A round step that divides a range into three to seven.
pub fn round_step(range: f64) -> f64 {
    if !(range.is_finite() && range > 0.0) {
        return 1.0;
    }
    let rough = range / 5.0;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| step * power >= rough).unwrap_or(10.0);
    step * power
}

/// Marks of an axis: at most 20, whatever the range.
fn marks(range: f64) -> impl Iterator<Item = f64> {
    let step = round_step(range);
    (0..20).map(move |index| f64::from(index) * step).take_while(move |mark| *mark <= range * 1.0001)
}

/// A mark's number, with as many digits as the step needs.
fn number(value: f64, range: f64) -> String {
    let step = round_step(range);
    if step >= 1.0 { format!("{value:.0}") } else { at(value) }
}

impl Chart {
    fn x(&self, seconds: f64) -> f64 {
        let share = if self.end > 0.0 { (seconds / self.end).clamp(0.0, 1.0) } else { 0.0 };
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64, most: f64) -> f64 {
        let share = if most > 0.0 { (value / most).clamp(0.0, 1.0) } else { 0.0 };
        self.height - BOTTOM - share * (self.height - TOP - BOTTOM)
    }

    /// The largest value of all, with a little air.
    fn top(&self) -> f64 {
        let count = self.layers.iter().map(|layer| layer.steps.len()).max().unwrap_or(0);
        let sum = |index| {
            let values = self.layers.iter().filter_map(|layer| layer.steps.get(index));
            values.map(|step: &Step| step.value).sum::<f64>()
        };
        let stacked = (0..count).map(sum).fold(0.0, f64::max);
        let lines = self.lines.iter().flat_map(|line| &line.steps).map(|step| step.value).fold(0.0, f64::max);
        let most = stacked.max(lines).max(self.most);
        let most = if most.is_finite() && most > 0.0 { most } else { self.unit.1 };
        let step = round_step(most / self.unit.1) * self.unit.1;
        (most * 1.04 / step * 2.0).ceil() * step / 2.0
    }

    /// Draws it.
    pub fn draw(&self) -> Markup {
        let most = self.top();
        let title = format!("{}-title", self.id);
        let (bottom, right) = (self.height - BOTTOM, WIDTH - RIGHT);
        html! {
            svg id=(self.id) viewBox={ "0 0 " (at(WIDTH)) " " (at(self.height)) } role="img" aria-labelledby=(title) {
                title id=(title) { (self.description) }
                @for band in &self.bands {
                    rect class=(band.class) x=(at(self.x(band.from))) y=(at(TOP))
                        width=(at((self.x(band.to) - self.x(band.from)).max(1.0))) height=(at(bottom - TOP)) {
                        title { (band.name) }
                    }
                    @if self.names_bands && self.x(band.to) - self.x(band.from) > 7.0 * band.name.chars().count() as f64 {
                        text.label x=(at((self.x(band.from) + self.x(band.to)) / 2.0)) y=(at(TOP - 6.0)) text-anchor="middle" { (band.name) }
                    }
                }
                @for value in marks(most / self.unit.1) {
                    @let y = at(self.y(value * self.unit.1, most));
                    line.grid x1=(at(LEFT)) x2=(at(right)) y1=(y) y2=(y) {}
                    text.label x=(at(LEFT - 6.0)) y=(y) dy="0.35em" text-anchor="end" { (number(value, most / self.unit.1)) }
                }
                text.label x=(at(LEFT - 6.0)) y=(at(TOP - 13.0)) text-anchor="end" { (self.unit.0) }
                (self.layers(most))
                @for line in &self.lines {
                    path class={ "line " (line.class) } d=(self.outline(&line.steps, most)) { title { (line.name) } }
                }
                @for seconds in marks(self.end) {
                    @let x = at(self.x(seconds));
                    line.tick x1=(x) x2=(x) y1=(at(bottom)) y2=(at(bottom + 4.0)) {}
                    text.label x=(x) y=(at(bottom + 16.0)) text-anchor="middle" { (number(seconds, self.end)) " s" }
                }
                line.axis x1=(at(LEFT)) x2=(at(right)) y1=(at(bottom)) y2=(at(bottom)) {}
            }
        }
    }

    /// Each layer from the top of those below it.
    fn layers(&self, most: f64) -> Markup {
        let count = self.layers.iter().map(|layer| layer.steps.len()).max().unwrap_or(0);
        let mut base = vec![0.0; count];
        html! {
            @for layer in &self.layers {
                @let path = self.area(&layer.steps, &mut base, most);
                @if !path.is_empty() {
                    path class=(layer.class) d=(path) { title { (layer.name) } }
                }
            }
        }
    }

    /// The area of a layer: steps that are not empty, on `base`, which grows by them. Steps that follow each other are one shape.
    fn area(&self, steps: &[Step], base: &mut [f64], most: f64) -> String {
        let mut path = String::new();
        let mut run: Vec<(f64, f64, f64, f64)> = Vec::new();
        for (step, base) in steps.iter().zip(base) {
            let (low, high) = (*base, *base + step.value);
            *base = high;
            let (from, to) = (self.x(step.from), self.x(step.to));
            if step.value <= 0.0 || run.last().is_some_and(|last| (last.1 - from).abs() > 0.01) {
                close(&mut run, &mut path);
            }
            if step.value > 0.0 {
                run.push((from, to, self.y(low, most), self.y(high, most)));
            }
        }
        close(&mut run, &mut path);
        path
    }

    /// A line along the tops of steps.
    fn outline(&self, steps: &[Step], most: f64) -> String {
        let mut path = String::new();
        for (index, step) in steps.iter().enumerate() {
            let (y, letter) = (at(self.y(step.value, most)), if index == 0 { "M" } else { "L" });
            path += &format!("{letter}{} {y}H{}", at(self.x(step.from)), at(self.x(step.to)));
        }
        path
    }
}

/// Ends a shape: there along the tops, back along the bottoms.
fn close(run: &mut Vec<(f64, f64, f64, f64)>, path: &mut String) {
    let Some(first) = run.first() else { return };
    *path += &format!("M{} {}", at(first.0), at(first.3));
    for (index, (_, to, _, high)) in run.iter().enumerate() {
        if index > 0 {
            *path += &format!("V{}", at(*high));
        }
        *path += &format!("H{}", at(*to));
    }
    for (from, _, low, _) in run.iter().rev() {
        *path += &format!("V{}H{}", at(*low), at(*from));
    }
    path.push('Z');
    run.clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_few_round_marks_whatever_the_range() {
        for range in [1e-9, 0.3, 1.0, 7.0, 99.0, 1234.0, 5e17, 1e300] {
            assert!((3..=12).contains(&marks(range).count()), "{range}: {}", marks(range).count());
        }
        for range in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(marks(range).count() <= 20);
        }
        assert_eq!(marks(10.0).collect::<Vec<_>>(), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
    }

    #[test]
    fn a_stack_stands_on_what_is_below() {
        let step = |value| vec![Step { from: 0.0, to: 10.0, value }];
        let chart = Chart {
            description: String::new(),
            id: "c",
            height: 146.0,
            end: 10.0,
            most: 0.0,
            unit: ("x", 1.0),
            bands: Vec::new(),
            names_bands: false,
            layers: vec![
                Layer { class: "a", name: "a", steps: step(1.0) },
                Layer { class: "b", name: "b", steps: step(0.0) },
                Layer { class: "c", name: "c", steps: step(3.0) },
            ],
            lines: Vec::new(),
        };
        let svg = chart.draw().into_string();
        assert!(!svg.contains("class=\"b\""), "an empty layer is not drawn");
        // 100 units high, 4.5 the top: 1 is at 124 - 22.22, and the third layer begins there.
        assert!(svg.contains("M58 101.78H928V124H58Z"), "{svg}");
        assert!(svg.contains("V101.78H58Z"), "{svg}");
    }
}
