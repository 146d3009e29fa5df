//! This migration beside another one.

use maud::{Markup, html};

use super::chart::{Chart, Line};
use super::format::{bytes, maybe, seconds, share};
use super::series::Step;
use super::time::figure;
use super::{headline, helper};
use crate::report_file::ReportFile;

/// A row: what, this one's value, the other's, and the ratio when there is one.
type Row = (&'static str, String, String, Option<(f64, f64)>);

/// The section.
pub fn section(report: &ReportFile, other: &ReportFile) -> Markup {
    let number = |name: &'static str, pointer: &str| -> Row {
        let (a, b) = (report.number(pointer), other.number(pointer));
        (name, maybe(a), maybe(b), a.zip(b).map(|(a, b)| (a as f64, b as f64)))
    };
    let still = |report: &ReportFile| report.downtime.as_ref().map(|downtime| downtime.seconds);
    let shown = |time: Option<f64>| time.map_or_else(|| "–".to_owned(), seconds);
    let rows: Vec<Row> = vec![
        (
            "Total time",
            seconds(report.total_seconds),
            seconds(other.total_seconds),
            Some((report.total_seconds, other.total_seconds)),
        ),
        ("Downtime", shown(still(report)), shown(still(other)), still(report).zip(still(other))),
        (
            "On the network",
            bytes(report.wire_bytes),
            bytes(other.wire_bytes),
            Some((report.wire_bytes as f64, other.wire_bytes as f64)),
        ),
        number("Passes", "/rounds"),
        number("Pages sent whole", "/pages_sent"),
        number("Zero pages", "/pages_zero"),
        number("Pages by reference", "/pages_referenced"),
        number("Pages from storage", "/pages_accepted"),
        number("Pages refused", "/pages_refused"),
    ];
    html! {
        section aria-labelledby="compare" {
            h2 id="compare" { "Beside " (headline::name(other)) }
            p.lead { "The other migration: " (other.domain) " → " (other.target) ", " (other.began.to_string().replace('T', " ").replace('Z', " UTC")) "." }
            (lines(report, other))
            div.scroll { table {
                caption { "The two migrations in numbers." }
                thead { tr {
                    th scope="col" { "What" } th.n scope="col" { (helper(report.helper)) " (this)" }
                    th.n scope="col" { (helper(other.helper)) } th.n scope="col" { "This to that" }
                } }
                tbody { @for (name, mine, theirs, ratio) in &rows {
                    tr {
                        th scope="row" { (name) } td.n { (mine) } td.n { (theirs) }
                        td.n { (ratio.map_or_else(|| "–".to_owned(), |(a, b)| share(a, b))) }
                    }
                } }
            } }
        }
    }
}

/// Bytes on the network up to each moment, of both.
fn lines(report: &ReportFile, other: &ReportFile) -> Markup {
    if report.timeline.wire.is_empty() || other.timeline.wire.is_empty() {
        return html! {};
    }
    let end = report.total_seconds.max(other.total_seconds);
    let description = format!(
        "Bytes on the network up to each moment: {} in {} here, {} in {} with {}.",
        bytes(report.wire_bytes),
        seconds(report.total_seconds),
        bytes(other.wire_bytes),
        seconds(other.total_seconds),
        headline::name(other)
    );
    let chart = Chart {
        description,
        id: "chart-compare",
        height: 190.0,
        end,
        most: 0.0,
        unit: ("MB", 1e6),
        bands: Vec::new(),
        names_bands: false,
        layers: Vec::new(),
        lines: vec![
            Line { class: "theirs", name: headline::name(other).into(), steps: total(other) },
            Line { class: "mine", name: "this one".into(), steps: total(report) },
        ],
    };
    let legend = [
        ("accepted", "this one", bytes(report.wire_bytes)),
        ("raw", headline::name(other), bytes(other.wire_bytes)),
    ];
    figure("Bytes on the network so far", &chart, &legend)
}

/// Bytes so far, a point for each sample.
fn total(report: &ReportFile) -> Vec<Step> {
    let point = |seconds, value| Step { from: seconds, to: seconds, value };
    let samples = report.timeline.wire.iter().map(|sample| point(sample.seconds, sample.bytes as f64));
    std::iter::once(point(0.0, 0.0)).chain(samples).collect()
}
