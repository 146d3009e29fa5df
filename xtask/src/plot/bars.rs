//! Groups of bars: the height is the median, the whisker goes from the least to the most, each dot is a run.

use super::Series;
use super::axis::{Axis, short};
use super::svg::{Anchor, FAINT, GRID, INK, Style, Svg, width_of};
use crate::bench::median;

/// Bars that stand together.
#[derive(Clone, Debug)]
pub struct Group {
    /// What is written below them.
    pub name: String,
    /// What was measured, for each series; a series that has nothing here has no bar.
    pub samples: Vec<Vec<f64>>,
}

/// A picture with bars.
#[derive(Clone, Debug)]
pub struct Bars {
    /// What it shows.
    pub title: String,
    /// Under what circumstances.
    pub subtitle: String,
    /// Unit of the values.
    pub unit: &'static str,
    /// What is compared.
    pub series: Vec<Series>,
    /// Where.
    pub groups: Vec<Group>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 96.0;
const BOTTOM: f64 = 40.0;

impl Bars {
    /// Draws it.
    pub fn draw(&self) -> String {
        let mut svg = Svg::new(WIDTH as u32, HEIGHT as u32);
        heading(&mut svg, &self.title, &self.subtitle, &self.series);
        let most =
            self.groups.iter().flat_map(|group| group.samples.iter().flatten()).copied().fold(0.0, f64::max);
        // Room for the number above the highest bar.
        let axis = Axis::up_to(most * 1.06);
        let height = HEIGHT - TOP - BOTTOM;
        let y = |value: f64| TOP + height * (1.0 - value / axis.end);
        for tick in axis.ticks() {
            svg.line((LEFT, y(tick)), (WIDTH - RIGHT, y(tick)), if tick == 0.0 { INK } else { GRID }, 1.0);
            let style = Style { size: 12, colour: FAINT, anchor: Anchor::End };
            svg.text((LEFT - 8.0, y(tick) + 4.0), style, &axis.label(tick));
        }
        svg.text((LEFT - 8.0, TOP - 14.0), Style { size: 12, colour: FAINT, anchor: Anchor::End }, self.unit);
        let slot = (WIDTH - LEFT - RIGHT) / self.groups.len().max(1) as f64;
        for (number, group) in self.groups.iter().enumerate() {
            let middle = LEFT + slot * (number as f64 + 0.5);
            let style = Style { size: 14, colour: INK, anchor: Anchor::Middle };
            svg.text((middle, HEIGHT - BOTTOM + 22.0), style, &group.name);
            let present: Vec<(Series, &Vec<f64>)> = self
                .series
                .iter()
                .copied()
                .zip(&group.samples)
                .filter(|(_, samples)| !samples.is_empty())
                .collect();
            let pitch = (slot * 0.84 / present.len().max(1) as f64).min(64.0);
            let left = middle - pitch * present.len() as f64 / 2.0;
            for (place, (series, samples)) in present.into_iter().enumerate() {
                let centre = left + pitch * (place as f64 + 0.5);
                bar(&mut svg, centre, pitch * 0.84, series, samples, y);
            }
        }
        svg.finish()
    }
}

/// Title, circumstances and legend, above a plot.
pub(super) fn heading(svg: &mut Svg, title: &str, subtitle: &str, series: &[Series]) {
    svg.text((20.0, 26.0), Style { size: 17, colour: INK, anchor: Anchor::Start }, title);
    svg.text((20.0, 45.0), Style { size: 12, colour: FAINT, anchor: Anchor::Start }, subtitle);
    let mut x = 20.0;
    for series in series {
        svg.rectangle((x, 55.0), (11.0, 11.0), series.colour);
        svg.text((x + 16.0, 65.0), Style { size: 13, colour: INK, anchor: Anchor::Start }, series.name);
        x += 16.0 + width_of(series.name, 13) + 18.0;
    }
}

fn bar(svg: &mut Svg, centre: f64, width: f64, series: Series, samples: &[f64], y: impl Fn(f64) -> f64) {
    let value = median(samples);
    svg.rectangle((centre - width / 2.0, y(value)), (width, (y(0.0) - y(value)).max(0.0)), series.colour);
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let most = samples.iter().copied().fold(0.0, f64::max);
    if samples.len() > 1 {
        svg.line((centre, y(least)), (centre, y(most)), INK, 1.2);
        for end in [least, most] {
            svg.line((centre - 4.0, y(end)), (centre + 4.0, y(end)), INK, 1.2);
        }
        for sample in samples {
            svg.dot((centre, y(*sample)), INK);
        }
    }
    // Narrow bars have small numbers, so that neighbours do not touch.
    let size = if width < 34.0 { 10 } else { 12 };
    let style = Style { size, colour: INK, anchor: Anchor::Middle };
    svg.text((centre, y(most) - 7.0), style, &short(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bars() -> Bars {
        Bars {
            title: "Bytes on the wire".into(),
            subtitle: "3 pairs < 4".into(),
            unit: "MB",
            series: vec![
                Series { name: "stock", colour: "#7b8794" },
                Series { name: "Poolskip", colour: "#0072b2" },
            ],
            groups: vec![
                Group { name: "idle".into(), samples: vec![vec![746.0, 747.0, 740.0], vec![150.0]] },
                Group { name: "rw".into(), samples: vec![vec![900.0], vec![]] },
            ],
        }
    }

    #[test]
    fn the_same_figures_give_the_same_bytes() {
        assert_eq!(bars().draw(), bars().draw());
    }

    #[test]
    fn a_series_without_samples_has_no_bar_and_one_sample_no_whisker() {
        let svg = bars().draw();
        // Background, two in the legend, three bars.
        assert_eq!(svg.matches("<rect ").count(), 6);
        assert_eq!(svg.matches("<circle ").count(), 3);
        assert!(svg.contains(">746<") && svg.contains(">150<") && svg.contains("3 pairs &lt; 4"));
    }

    #[test]
    fn nothing_draws_too() {
        let empty = Bars { groups: Vec::new(), ..bars() };
        assert!(empty.draw().ends_with("</svg>\n"));
    }
}
