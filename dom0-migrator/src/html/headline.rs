//! The figures that one looks for first.

use maud::{Markup, html};

use super::format::{bytes, memory, seconds, share};
use crate::control::HelperKind;
use crate::engine::Way;
use crate::report_file::{ReportFile, SeenBy};

/// A figure.
struct Card {
    name: &'static str,
    value: String,
    note: String,
    /// A bar: this share of another.
    bar: Option<(f64, String)>,
}

/// The figures.
pub fn cards(report: &ReportFile, other: Option<&ReportFile>) -> Markup {
    let cards = [time(report, other), downtime(report, other), network(report, other), storage(report)];
    html! {
        section aria-label="Headline figures" {
            dl.cards {
                @for card in cards {
                    div.card {
                        dt { (card.name) }
                        dd.value { (card.value) }
                        @if let Some((share, words)) = &card.bar {
                            dd.bar {
                                svg viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label=(words) {
                                    rect.rail width="100" height="6" {}
                                    rect.accepted width=(format!("{:.1}", share.clamp(0.0, 1.0) * 100.0)) height="6" {}
                                }
                            }
                        }
                        dd.note { (card.note) }
                    }
                }
            }
        }
    }
}

/// "x % of the other's", with its value.
fn against(mine: f64, other: f64, value: String) -> (f64, String) {
    (if other > 0.0 { mine / other } else { 0.0 }, format!("{} of {value}", share(mine, other)))
}

fn time(report: &ReportFile, other: Option<&ReportFile>) -> Card {
    let bar = other.map(|other| {
        let (share, words) = against(report.total_seconds, other.total_seconds, seconds(other.total_seconds));
        (share, format!("{words} with {}", name(other)))
    });
    Card {
        name: "Total time",
        value: seconds(report.total_seconds),
        note: bar
            .as_ref()
            .map_or_else(|| "from the command to the end of xl".into(), |(_, words)| words.clone()),
        bar,
    }
}

fn downtime(report: &ReportFile, other: Option<&ReportFile>) -> Card {
    let Some(mine) = &report.downtime else {
        return Card { name: "Downtime", value: "–".into(), note: "was not seen".into(), bar: None };
    };
    let seen = match mine.seen {
        SeenBy::Source => "from the suspension until the target said that it runs",
        SeenBy::Guest => "as a clock in the guest saw it",
    };
    let bar = other.and_then(|other| Some((other, other.downtime.as_ref()?))).map(|(other, theirs)| {
        let (share, words) = against(mine.seconds, theirs.seconds, seconds(theirs.seconds));
        (share, format!("{words} with {}", name(other)))
    });
    Card {
        name: "Downtime",
        value: seconds(mine.seconds),
        note: bar.as_ref().map_or_else(|| seen.into(), |(_, words)| format!("{words}; {seen}")),
        bar,
    }
}

fn network(report: &ReportFile, other: Option<&ReportFile>) -> Card {
    let mine = report.wire_bytes as f64;
    let bar = match (other, report.stock_bytes, report.helper) {
        (Some(other), _, _) => {
            let (share, words) = against(mine, other.wire_bytes as f64, bytes(other.wire_bytes));
            Some((share, format!("{words} with {}", name(other))))
        }
        (None, Some(stock), HelperKind::Poolskip) => {
            let (share, words) = against(mine, stock as f64, bytes(stock));
            Some((share, format!("{words} that the stock helper would have sent")))
        }
        _ => None,
    };
    Card {
        name: "On the network",
        value: bytes(report.wire_bytes),
        note: bar
            .as_ref()
            .map_or_else(|| "all connections, both directions".into(), |(_, words)| words.clone()),
        bar,
    }
}

fn storage(report: &ReportFile) -> Card {
    let Some(map) = &report.memory else {
        return Card {
            name: "From storage",
            value: "–".into(),
            note: "nothing went by reference".into(),
            bar: None,
        };
    };
    let contents = [
        Way::Raw,
        Way::Resent,
        Way::PageTable,
        Way::Referenced,
        Way::Accepted,
        Way::Refused,
        Way::Replaced,
        Way::Zero,
    ];
    let all: f64 = contents.iter().map(|way| map.pages.get(*way) as f64).sum();
    let accepted = map.pages.accepted;
    let words = format!("{} of the guest's memory", share(accepted as f64, all));
    Card {
        name: "From storage",
        value: memory(accepted),
        note: format!("{words} was read from the shared disk"),
        bar: Some((if all > 0.0 { accepted as f64 / all } else { 0.0 }, words)),
    }
}

/// What another migration is called here.
pub fn name(report: &ReportFile) -> &'static str {
    match report.helper {
        HelperKind::Stock => "the stock helper",
        HelperKind::Poolskip => "the other run",
    }
}
