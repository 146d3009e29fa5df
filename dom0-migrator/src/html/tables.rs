//! Tables: the guest's lists, what was refused and why, versions and settings, all counters.

use std::collections::BTreeMap;

use maud::{Markup, html};
use serde_json::Value;

use super::format::{bytes, count, maybe, seconds};
use crate::report_file::ReportFile;

/// Rows of the table of counters at most.
const COUNTERS_MAX: usize = 400;
/// Disks in the table at most.
const DISKS_MAX: usize = 64;
/// Longest text shown of one value.
const TEXT_MAX: usize = 300;

/// What the guest listed, and what became of it.
pub fn lists(report: &ReportFile) -> Markup {
    let number = |name, pointer: &str| (name, report.number(pointer));
    let listed = [
        number("Frames of the buffer pool", "/lists/pool_frames"),
        number("of these clean", "/lists/pool_frames_clean"),
        number("Frames listed: loaded by a read", "/lists/frames_read"),
        number("Frames listed: flushed since they were written", "/lists/frames_written"),
        number("Pages listed, of frames and of cached files", "/lists/pages_listed"),
        number("Runs of pages", "/lists/runs"),
        number("Runs that cannot be right, left out", "/lists/runs_refused"),
        number("Pages of the lists that could not be read", "/lists/list_pages_unreadable"),
    ];
    let fate = [
        number("Pages by reference", "/pages_referenced"),
        number("loaded from storage", "/pages_accepted"),
        number("refused: other bytes on the disk", "/source/refused/hash"),
        number("refused: the disk could not be read", "/source/refused/io_error"),
        number("refused: behind the disk's end", "/source/refused/out_of_bounds"),
        number("refused: no such disk", "/source/refused/unknown_disk"),
        number("overtaken by a newer copy", "/pages_superseded"),
        number("not settled in time", "/pages_replaced"),
        number("Left for a later pass, written to again", "/source/pages_left_out"),
        number("Listed, but sent: the window was full", "/source/pages_window_full"),
        number("Listed, but sent: the target has not that disk", "/source/pages_disk_missing"),
    ];
    let has_lists = report.summary.get("lists").is_some_and(|lists| !lists.is_null());
    html! {
        section aria-labelledby="lists" {
            h2 id="lists" { "Lists and refusals" }
            @if let Some(problem) = report.text("/lists_problem") {
                p.note { "The guest gave no lists: " (cut(problem)) }
            }
            div.columns {
                @if has_lists { (numbers("What the guest listed", &listed)) }
                (numbers("What became of it, in pages of 4 KiB", &fate))
            }
            (disks(report))
        }
    }
}

fn numbers(caption: &str, rows: &[(&str, Option<u64>)]) -> Markup {
    html! {
        div.scroll { table {
            caption { (caption) }
            tbody { @for (name, number) in rows {
                tr { th scope="row" { (name) } td.n { (maybe(*number)) } }
            } }
        } }
    }
}

fn disks(report: &ReportFile) -> Markup {
    let disks = report.summary.pointer("/source/disks").and_then(Value::as_array);
    let Some(disks) = disks.filter(|disks| !disks.is_empty()) else { return html! {} };
    html! {
        div.scroll { table {
            caption { "The domain's disks, as the target found them." }
            thead { tr { th scope="col" { "Virtual device" } th.n scope="col" { "Size" } th scope="col" { "Used for references" } } }
            tbody { @for disk in disks.iter().take(DISKS_MAX) {
                tr {
                    th scope="row" { (disk.get("vdev").and_then(Value::as_u64).map_or_else(|| "–".into(), |vdev| vdev.to_string())) }
                    td.n { (disk.get("size_bytes").and_then(Value::as_u64).map_or_else(|| "–".into(), bytes)) }
                    td.wide { (disk.get("problem").and_then(Value::as_str).map_or("yes", cut)) }
                }
            } }
        } }
    }
}

/// What ran, and what was asked of it.
pub fn setup(report: &ReportFile) -> Markup {
    let table = |caption: &str, entries: &BTreeMap<String, String>| {
        html! {
            div.scroll { table {
                caption { (caption) }
                tbody { @for (name, value) in entries {
                    tr { th scope="row" { (cut(name)) } td.wide { (cut(value)) } }
                } }
            } }
        }
    };
    html! {
        section aria-labelledby="setup" {
            h2 id="setup" { "Versions and settings" }
            div.columns {
                (table("Versions", &report.versions))
                (table("Settings", &report.settings))
                (blocks(report))
            }
        }
    }
}

/// The stream in blocks, over several connections or compressed.
fn blocks(report: &ReportFile) -> Markup {
    let Some(connections) = report.number("/stream/connections") else { return html! {} };
    let amount = |pointer: &str| report.number(pointer).map_or_else(|| "–".into(), bytes);
    html! {
        div.scroll { table {
            caption { "The stream" }
            tbody {
                tr { th scope="row" { "Connections" } td.wide { (connections) } }
                tr { th scope="row" { "Compression" } td.wide { (report.text("/stream/compression").map_or("–", cut)) } }
                @if let Some(chosen) = report.text("/stream/chosen") {
                    tr { th scope="row" { "chosen" } td.wide { (cut(chosen)) } }
                }
                tr { th scope="row" { "Bytes before" } td.wide { (amount("/stream/bytes_before")) } }
                tr { th scope="row" { "Bytes after" } td.wide { (amount("/stream/bytes_after")) } }
            }
        } }
    }
}

/// Everything that was counted.
pub fn counters(report: &ReportFile) -> Markup {
    let mut rows = Vec::new();
    flatten(&report.summary, &mut String::new(), &mut rows);
    html! {
        section aria-labelledby="counters" {
            h2 id="counters" { "All counters" }
            details { summary { "The summary, as " code { "migrate --json" } " writes it" }
                div.scroll { table {
                    caption { "Names as in the file." }
                    tbody { @for (name, value) in &rows {
                        tr { th scope="row" { code { (name) } } td.n { (value) } }
                    } }
                } }
            }
        }
    }
}

/// Every number and text of a JSON value with its path.
fn flatten(value: &Value, path: &mut String, rows: &mut Vec<(String, String)>) {
    if rows.len() >= COUNTERS_MAX {
        return;
    }
    let shown = match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let length = path.len();
                if length > 0 {
                    path.push('.');
                }
                path.push_str(cut(name));
                flatten(value, path, rows);
                path.truncate(length);
            }
            return;
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate().take(COUNTERS_MAX) {
                let length = path.len();
                *path += &format!("[{index}]");
                flatten(value, path, rows);
                path.truncate(length);
            }
            return;
        }
        Value::Null => return,
        Value::Bool(yes) => (if *yes { "yes" } else { "no" }).to_owned(),
        Value::String(text) => cut(text).to_owned(),
        Value::Number(number) => match (number.as_u64(), number.as_f64()) {
            (Some(number), _) => count(number),
            (None, Some(number)) if path.ends_with("seconds") && number >= 0.0 => seconds(number),
            _ => number.to_string(),
        },
    };
    rows.push((path.clone(), shown));
}

/// The beginning of a text.
fn cut(text: &str) -> &str {
    text.char_indices().nth(TEXT_MAX).map_or(text, |(end, _)| text.get(..end).unwrap_or(text))
}
