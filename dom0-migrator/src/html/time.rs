//! The time line: rates by class, passes as bands, the window, the reading at the target.

use maud::{Markup, html};

use super::chart::{Band, Chart, Layer};
use super::format::{bytes, count, memory, seconds};
use super::palette::{self, words};
use super::series::{Step, at_time, levels, most, rates};
use crate::engine::Way;
use crate::report_file::ReportFile;
use crate::timeline::{At, Moment, SourceSample};

/// Ways in the order in which they are stacked.
const STACK: [Way; 7] =
    [Way::Accepted, Way::Zero, Way::Raw, Way::PageTable, Way::Resent, Way::Refused, Way::Replaced];
/// Rows of the table of samples at most.
const ROWS_MAX: usize = 40;
/// Passes in the table at most.
const PASSES_MAX: usize = 40;

/// A counter of a sample.
type Counter = fn(&SourceSample) -> u64;

/// The section.
pub fn section(report: &ReportFile) -> Markup {
    let time = Time::new(report);
    html! {
        section aria-labelledby="time" {
            h2 id="time" { "Time line" }
            @if report.timeline.source.is_empty() && report.timeline.wire.is_empty() {
                p { "It was over before anything was measured." }
            } @else {
                p.lead { (time.lead()) }
                (time.memory())
                (time.wire())
                @if !report.timeline.source.is_empty() { (time.window()) }
                @if report.timeline.target.len() > 1 { (time.reload()) }
                (time.passes())
                (time.samples())
            }
        }
    }
}

/// A report with what all charts share.
struct Time<'a> {
    report: &'a ReportFile,
    source: &'a [SourceSample],
    /// What is added to the helper's seconds.
    shift: f64,
    /// When the source's filter began, by the helper's seconds.
    began: f64,
    end: f64,
}

/// When the counters of samples began to count: a second before the first, as no earlier moment is known.
fn beginning<S: At>(samples: &[S]) -> f64 {
    samples.first().map_or(0.0, |sample| (sample.seconds() - 1.0).max(0.0))
}

impl<'a> Time<'a> {
    fn new(report: &'a ReportFile) -> Self {
        let line = &report.timeline;
        let shift = line.helper_began_seconds;
        let first = line
            .marks
            .first()
            .map(|mark| mark.seconds)
            .filter(|seconds| line.source.first().is_none_or(|sample| *seconds < sample.seconds));
        let ends = [
            report.total_seconds,
            line.source.last().map_or(0.0, |sample| sample.seconds + shift),
            line.wire.last().map_or(0.0, |sample| sample.seconds),
        ];
        Self {
            report,
            source: &line.source,
            shift,
            began: first.unwrap_or_else(|| beginning(&line.source)),
            end: ends.into_iter().fold(0.0, f64::max),
        }
    }

    fn lead(&self) -> String {
        let passes = self.report.number("/rounds");
        let passes =
            passes.map_or_else(String::new, |n| format!(", {n} {}", if n == 1 { "pass" } else { "passes" }));
        format!(
            "{} in all{passes}. Seconds count from the command's start; all charts share the axis.",
            seconds(self.end)
        )
    }

    fn rates(&self, counter: impl Fn(&SourceSample) -> u64) -> Vec<Step> {
        rates(self.source, self.shift, self.began, counter)
    }

    /// Passes, the drain, the suspension: `(from, to, what)` by the helper's seconds.
    fn spans(&self) -> Vec<(f64, f64, String, &'static str)> {
        let marks = &self.report.timeline.marks;
        let last = self.source.last().map_or(self.end - self.shift, |sample| sample.seconds);
        let suspended = marks.iter().find(|mark| mark.what == Moment::Suspended).map(|mark| mark.seconds);
        let mut spans: Vec<(f64, f64, String, &'static str)> = Vec::new();
        for (index, mark) in marks.iter().enumerate() {
            let next = marks.get(index + 1).map_or(last, |next| next.seconds).max(mark.seconds);
            match mark.what {
                Moment::Round { number, .. } if suspended.is_none_or(|at| mark.seconds < at) => {
                    let class = if number % 2 == 1 { "band odd" } else { "band even" };
                    spans.push((mark.seconds, next, format!("pass {number}"), class));
                }
                Moment::Drain => spans.push((mark.seconds, next, "drain".to_owned(), "band drain")),
                Moment::Suspended => {
                    let downtime =
                        self.report.downtime.as_ref().map(|downtime| mark.seconds + downtime.seconds);
                    let until = downtime.unwrap_or(last).max(mark.seconds);
                    spans.push((mark.seconds, until, "suspended".to_owned(), "band still"));
                }
                // The policy may go on after a drain: then the pass that was to begin does.
                Moment::Drained => {
                    let goes_on = marks.get(index + 1).is_some_and(|next| next.what != Moment::Suspended);
                    let pass = spans.iter().rev().find(|span| span.2.starts_with("pass ")).cloned();
                    if let Some((.., name, class)) = pass.filter(|_| goes_on) {
                        spans.push((mark.seconds, next, name, class));
                    }
                }
                Moment::Round { .. } => {}
            }
        }
        spans
    }

    fn bands(&self) -> Vec<Band> {
        let mut bands: Vec<Band> = self
            .spans()
            .into_iter()
            .map(|(from, to, name, class)| Band { from: from + self.shift, to: to + self.shift, name, class })
            .collect();
        if let Some(first) = bands.first().map(|band| band.from) {
            bands.insert(0, Band { from: 0.0, to: first, name: "preparation".into(), class: "band none" });
        }
        bands
    }

    fn chart(&self, id: &'static str, height: f64, unit: (&'static str, f64), description: String) -> Chart {
        Chart {
            description,
            id,
            height,
            end: self.end,
            most: 0.0,
            unit,
            bands: self.bands(),
            names_bands: id == "chart-memory" || id == "chart-wire" && self.source.is_empty(),
            layers: Vec::new(),
            lines: Vec::new(),
        }
    }

    fn memory(&self) -> Markup {
        if self.source.is_empty() {
            return html! {};
        }
        let layers: Vec<Layer> = STACK
            .into_iter()
            .map(|way| Layer {
                class: palette::name(way),
                name: words(way).0,
                // A reference counts when it is sent, not when it is settled.
                steps: self.rates(|sample| match way {
                    Way::Accepted => sample.ways.referenced,
                    way => sample.ways.get(way),
                }),
            })
            .collect();
        let total = |way: Way| {
            self.source.last().map_or(0, |sample| match way {
                Way::Accepted => sample.ways.referenced,
                way => sample.ways.get(way),
            })
        };
        let parts: Vec<String> = STACK
            .into_iter()
            .filter(|way| total(*way) > 0)
            .map(|way| format!("{} {}", name_in_chart(way), memory(total(way))))
            .collect();
        let description =
            format!("Guest memory per second, stacked by how it went. In all: {}.", parts.join(", "));
        let legend: Vec<_> = STACK
            .into_iter()
            .filter(|way| total(*way) > 0)
            .map(|way| (palette::name(way), name_in_chart(way), memory(total(way))))
            .collect();
        let mut chart = self.chart("chart-memory", 210.0, ("MiB/s", 256.0), description);
        chart.layers = layers;
        figure("Guest memory, by how it went", &chart, &legend)
    }

    fn wire(&self) -> Markup {
        let (layers, legend, all): (Vec<Layer>, Vec<_>, u64) = if self.source.is_empty() {
            let steps = rates(&self.report.timeline.wire, 0.0, 0.0, |sample| sample.bytes);
            let all = self.report.wire_bytes;
            (
                vec![Layer { class: "raw", name: "everything", steps }],
                vec![("raw", "everything", bytes(all))],
                all,
            )
        } else {
            let classes: [(&str, &str, Counter); 4] = [
                ("raw", "contents of pages", |sample| sample.bytes_page_data),
                ("accepted", "references", |sample| sample.bytes_references),
                ("zero", "markers", |sample| sample.bytes_markers),
                ("page-table", "everything else", SourceSample::bytes_other),
            ];
            let last = |counter: Counter| self.source.last().map_or(0, counter);
            (
                classes
                    .iter()
                    .map(|&(class, name, counter)| Layer { class, name, steps: self.rates(counter) })
                    .collect(),
                classes.iter().map(|&(class, name, counter)| (class, name, bytes(last(counter)))).collect(),
                last(|sample| sample.bytes_out),
            )
        };
        let parts: Vec<String> = legend.iter().map(|(_, name, total)| format!("{name} {total}")).collect();
        let description =
            format!("Bytes per second on the network, {} in all: {}.", bytes(all), parts.join(", "));
        let mut chart = self.chart("chart-wire", 170.0, ("MB/s", 1e6), description);
        chart.layers = layers;
        figure("On the network", &chart, &legend)
    }

    fn window(&self) -> Markup {
        let steps = levels(self.source, self.shift, |sample| sample.window_pages as f64);
        let fullest = self.source.iter().map(|sample| sample.window_pages).max().unwrap_or(0);
        let description = format!(
            "Pages kept at the source until the target has accepted or refused their references, at most {}.",
            memory(fullest)
        );
        let mut chart = self.chart("chart-window", 120.0, ("MiB", 256.0), description);
        chart.layers = vec![Layer { class: "referenced", name: "in the window", steps }];
        figure(
            "Window: waiting for the target's storage",
            &chart,
            &[("referenced", "in the window at most", memory(fullest))],
        )
    }

    fn reload(&self) -> Markup {
        let target = &self.report.timeline.target;
        let shift = self.shift + self.report.target_offset().unwrap_or(0.0);
        let steps = rates(target, shift, beginning(target), |sample| sample.disk_bytes);
        let all = target.last().map_or(0, |sample| sample.disk_bytes);
        let description = format!(
            "Bytes per second that the target read from the shared disks, at most {}/s, {} in all.",
            bytes(most(&steps) as u64),
            bytes(all)
        );
        let mut chart = self.chart("chart-reload", 120.0, ("MB/s", 1e6), description);
        chart.layers = vec![Layer { class: "accepted", name: "read from storage", steps }];
        figure(
            "Reading from storage, at the target",
            &chart,
            &[("accepted", "read from storage", bytes(all))],
        )
    }

    /// Each pass, with what went in it.
    fn passes(&self) -> Markup {
        let spans = self.spans();
        if spans.is_empty() || self.source.is_empty() {
            return html! {};
        }
        let wanted = |from: f64| {
            let marks = &self.report.timeline.marks;
            marks.iter().find_map(|mark| match mark.what {
                Moment::Round { pages, .. } if mark.seconds.total_cmp(&from).is_eq() => pages,
                _ => None,
            })
        };
        let grown = |from: f64, to: f64, counter: &dyn Fn(&SourceSample) -> u64| {
            let growth = at_time(self.source, to, counter) - at_time(self.source, from, counter);
            growth.max(0.0).round() as u64
        };
        html! {
            div.scroll {
                table {
                    caption { "Passes over memory. What went in each is told from samples a second apart." }
                    thead { tr {
                        th scope="col" { "What" } th.n scope="col" { "From" } th.n scope="col" { "Lasted" }
                        th.n scope="col" { "To be sent" } th.n scope="col" { "By reference" } th.n scope="col" { "Whole" }
                        th.n scope="col" { "Zero" } th.n scope="col" { "On the network" }
                    } }
                    tbody {
                        @for (from, to, name, _) in spans.iter().take(PASSES_MAX) {
                            tr {
                                th scope="row" { (name) }
                                td.n { (seconds(from + self.shift)) }
                                td.n { (seconds(to - from)) }
                                td.n { (wanted(*from).map_or_else(|| "–".to_owned(), memory)) }
                                td.n { (memory(grown(*from, *to, &|s| s.ways.referenced))) }
                                td.n { (memory(grown(*from, *to, &whole))) }
                                td.n { (memory(grown(*from, *to, &|s| s.ways.zero))) }
                                td.n { (bytes(grown(*from, *to, &|s| s.bytes_out))) }
                            }
                        }
                    }
                }
            }
        }
    }

    /// The numbers behind the charts.
    fn samples(&self) -> Markup {
        let step = self.source.len().div_ceil(ROWS_MAX).max(1);
        let last = self.source.len().saturating_sub(1);
        let rows = self.source.iter().enumerate().filter(|(index, _)| (last - index).is_multiple_of(step));
        if self.source.is_empty() {
            let wire = &self.report.timeline.wire;
            let step = wire.len().div_ceil(ROWS_MAX).max(1);
            let last = wire.len().saturating_sub(1);
            let rows = wire.iter().enumerate().filter(|(index, _)| (last - index).is_multiple_of(step));
            return html! {
                details { summary { "The numbers behind the chart" }
                    div.scroll { table {
                        caption { "Up to each moment, in all." }
                        thead { tr { th scope="col" { "Time" } th.n scope="col" { "On the network" } } }
                        tbody { @for (_, sample) in rows {
                            tr { th scope="row" { (seconds(sample.seconds)) } td.n { (bytes(sample.bytes)) } }
                        } }
                    } }
                }
            };
        }
        html! {
            details { summary { "The numbers behind the charts" }
                div.scroll { table {
                    caption { "Up to each moment, in all; of the window, as it was then." }
                    thead { tr {
                        th scope="col" { "Time" } th.n scope="col" { "Pages by reference" } th.n scope="col" { "From storage" }
                        th.n scope="col" { "Refused" } th.n scope="col" { "Whole" } th.n scope="col" { "Zero" }
                        th.n scope="col" { "On the network" } th.n scope="col" { "In the window" }
                    } }
                    tbody { @for (_, sample) in rows {
                        tr {
                            th scope="row" { (seconds(sample.seconds + self.shift)) }
                            td.n { (count(sample.ways.referenced)) }
                            td.n { (count(sample.ways.accepted)) }
                            td.n { (count(sample.ways.refused)) }
                            td.n { (count(whole(sample))) }
                            td.n { (count(sample.ways.zero)) }
                            td.n { (bytes(sample.bytes_out)) }
                            td.n { (memory(sample.window_pages)) }
                        }
                    } }
                } }
            }
        }
    }
}

/// Pages whose content went over the network, whatever for.
fn whole(sample: &SourceSample) -> u64 {
    let ways = &sample.ways;
    [ways.raw, ways.resent, ways.page_table, ways.refused, ways.replaced]
        .into_iter()
        .fold(0, u64::saturating_add)
}

/// In the chart references stand where they were sent; what became of them is another matter.
fn name_in_chart(way: Way) -> &'static str {
    match way {
        Way::Accepted => "by reference",
        Way::Refused => "refused, so sent",
        Way::Replaced => "not in time, so sent",
        way => words(way).0,
    }
}

/// A chart with its title and what its colours mean.
pub fn figure(title: &str, chart: &Chart, legend: &[(&str, &str, String)]) -> Markup {
    html! {
        figure {
            figcaption {
                span.title { (title) }
                ul.legend {
                    @for (class, name, total) in legend {
                        li { (swatch(class)) (name) " " b { (total) } }
                    }
                }
            }
            div.scroll { (chart.draw()) }
        }
    }
}

/// A small square of a class's colour.
pub fn swatch(class: &str) -> Markup {
    html! {
        svg.swatch viewBox="0 0 10 10" aria-hidden="true" { rect class=(class) width="10" height="10" rx="2" {} }
    }
}
