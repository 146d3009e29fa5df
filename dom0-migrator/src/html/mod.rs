//! A report file as one page for a browser.
//!
//! The page needs nothing else: no script, no font, no connection (its own policy forbids them). Pictures are SVG, drawn here; beside
//! each stands a table with the same numbers, for those who cannot see it. Every text of the file goes through `maud`, which
//! escapes it.

mod chart;
mod compare;
mod format;
mod headline;
mod map;
mod palette;
mod series;
mod tables;
mod time;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::command::Outcome;
use crate::control::HelperKind;
use crate::report_file::ReportFile;

/// What the page may load: nothing.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// The page for a migration, compared with another one if there is one.
pub fn page(report: &ReportFile, other: Option<&ReportFile>) -> String {
    let title = format!("Migration of {} to {}", report.domain, report.target);
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                title { (title) }
                style { (PreEscaped(palette::css())) (PreEscaped(include_str!("style.css"))) }
            }
            body {
                main {
                    (head(report))
                    (headline::cards(report, other))
                    @if let Some(other) = other { (compare::section(report, other)) }
                    (time::section(report))
                    (map::section(report))
                    (tables::lists(report))
                    (tables::setup(report))
                    (tables::counters(report))
                }
                footer {
                    p { "Made by " code { "dom0-migrator report" } " " (env!("CARGO_PKG_VERSION"))
                        ". MB are 10⁶ bytes, MiB are 2²⁰; a page is 4 KiB." }
                }
            }
        }
    };
    markup.into_string()
}

fn head(report: &ReportFile) -> Markup {
    let (class, outcome) = match report.outcome {
        Outcome::Migrated => ("good", "migrated"),
        Outcome::Failed => ("bad", "failed: the domain runs on at the source"),
        Outcome::Interrupted => ("bad", "interrupted: the domain runs on at the source"),
        Outcome::Undefined => ("bad", "in doubt: look at both hosts which of them runs the domain"),
    };
    let date = report.began.to_string().replace('T', " ").replace('Z', " UTC");
    html! {
        header {
            p.eyebrow { "Poolskip · live migration" }
            h1 { (report.domain) " → " (report.target) }
            p.meta {
                span class={ "badge " (class) } { (outcome) }
                " " (date) " · " (helper(report.helper)) " helper"
            }
            @if let Some(error) = &report.error { p.error role="note" { (error) } }
        }
    }
}

/// The helper's name.
fn helper(kind: HelperKind) -> &'static str {
    match kind {
        HelperKind::Poolskip => "Poolskip",
        HelperKind::Stock => "stock",
    }
}
