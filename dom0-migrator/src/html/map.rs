//! The map of guest memory.

use std::fmt::Write;

use maud::{Markup, html};

use super::format::{at, count, memory, share};
use super::palette::{self, words};
use super::time::swatch;
use crate::engine::Way;
use crate::memory_map::MemoryMap;
use crate::report_file::ReportFile;

/// Width of the picture in its own units.
const WIDTH: f64 = 940.0;
/// Room for addresses at the left.
const LEFT: f64 = 58.0;
/// Between two regions.
const GAP: f64 = 8.0;
/// More regions than these are drawn without gaps.
const REGIONS_MAX: usize = 12;
/// Ways that are shown by a dot even where most pages of the cell went otherwise: they are few, and what one looks for.
const RARE: [Way; 3] = [Way::Resent, Way::Refused, Way::Replaced];
/// Ways in the table, in order.
const ORDER: [Way; 9] = [
    Way::Accepted,
    Way::Zero,
    Way::Raw,
    Way::PageTable,
    Way::Resent,
    Way::Refused,
    Way::Replaced,
    Way::Referenced,
    Way::NoData,
];

/// The section.
pub fn section(report: &ReportFile) -> Markup {
    html! {
        section aria-labelledby="map" {
            h2 id="map" { "Guest memory" }
            @match &report.memory {
                Some(map) => {
                    p.lead {
                        "How each page travelled the last time. A cell is " (memory(map.pages_per_cell)) " of guest memory, in the colour of most of its pages; "
                        "a dot stands for a few that went another way. Addresses go from left to right, and down."
                    }
                    div.scroll { (picture(map)) }
                    (table(map))
                }
                None => p { "There is no map: libxl's own helper does not tell how pages travel, or the migration ended before any did." },
            }
        }
    }
}

fn table(map: &MemoryMap) -> Markup {
    let pages = |way| map.pages.get(way);
    let whole: f64 = ORDER.iter().filter(|way| **way != Way::NoData).map(|way| pages(*way) as f64).sum();
    html! {
        div.scroll { table {
            caption { "Pages by the way that they went last: what the colours mean." }
            thead { tr {
                th scope="col" { "Way" } th.n scope="col" { "Pages" } th.n scope="col" { "Memory" } th.n scope="col" { "Share" }
                th scope="col" { "What it means" }
            } }
            tbody {
                @for way in ORDER {
                    @if pages(way) > 0 {
                        tr {
                            th scope="row" { (swatch(palette::name(way))) (words(way).0) }
                            td.n { (count(pages(way))) }
                            td.n { (memory(pages(way))) }
                            td.n { (if way == Way::NoData { "–".to_owned() } else { share(pages(way) as f64, whole) }) }
                            td.wide { (words(way).1) }
                        }
                    }
                }
            }
        } }
    }
}

/// Paths of one colour: whole cells, and dots.
#[derive(Default)]
struct Paths {
    cells: String,
    dots: String,
}

fn picture(map: &MemoryMap) -> Markup {
    let number = map.cells().count();
    let columns = [32_u32, 64, 128]
        .into_iter()
        .find(|columns| number <= (columns * columns) as usize / 2)
        .unwrap_or(128);
    let (width, height) = ((WIDTH - LEFT) / f64::from(columns), (WIDTH - LEFT) / f64::from(columns) * 0.72);
    let has_gaps = map.regions.len() <= REGIONS_MAX;
    let mut paths: [Paths; Way::ALL.len()] = Default::default();
    let mut labels = Vec::new();
    // A run of cells of one colour in a row: its way, first column and last.
    let mut run: Option<(Way, u32, u32)> = None;
    let (mut region, mut column, mut row_top, mut label_top) = (0, 0, 0.0, f64::MIN);
    let mut cell_in_region = 0;
    for (of_region, ways) in map.cells() {
        let is_next = of_region != region;
        if is_next {
            (region, cell_in_region) = (of_region, 0);
        }
        if column == columns || (is_next && has_gaps && column > 0) {
            end_run(&mut paths, &mut run, row_top, width, height);
            row_top += height + if is_next && has_gaps { GAP } else { 0.0 };
            column = 0;
        }
        if column == 0 && row_top - label_top >= 14.0 {
            let first = map.regions.get(region).map_or(0, |region| region.first_pfn);
            labels.push((row_top, memory(first.saturating_add(cell_in_region * map.pages_per_cell))));
            label_top = row_top;
        }
        let most = ways.iter().max_by_key(|(_, pages)| *pages).map_or(Way::Unseen, |(way, _)| *way);
        match &mut run {
            Some((way, _, last)) if *way == most => *last = column,
            _ => {
                end_run(&mut paths, &mut run, row_top, width, height);
                run = Some((most, column, column));
            }
        }
        for way in RARE {
            if way != most
                && ways.iter().any(|(other, pages)| *other == way && *pages > 0)
                && let Some(path) = paths.get_mut(way as usize)
            {
                let (x, y) = (LEFT + (f64::from(column) + 0.5) * width, row_top + height / 2.0);
                let side = (height * 0.55).clamp(2.0, 8.0);
                let (x, y) = (x - side / 2.0, y - side / 2.0);
                // Writing into a String cannot fail.
                let _ = write!(path.dots, "M{} {}h{s}v{s}h-{s}z", at(x), at(y), s = at(side));
            }
        }
        column += 1;
        cell_in_region += 1;
    }
    end_run(&mut paths, &mut run, row_top, width, height);
    let bottom = row_top + height;
    let parts: Vec<String> = ORDER
        .into_iter()
        .filter(|way| map.pages.get(*way) > 0 && *way != Way::NoData)
        .map(|way| format!("{} {}", words(way).0, memory(map.pages.get(way))))
        .collect();
    html! {
        svg id="memory-map" viewBox={ "0 -4 " (at(WIDTH)) " " (at(bottom + 8.0)) } role="img" aria-labelledby="memory-map-title" {
            title id="memory-map-title" { "Map of guest memory by how its pages went: " (parts.join(", ")) ". The table below has the numbers." }
            g shape-rendering="crispEdges" {
                @for (way, path) in Way::ALL.into_iter().zip(&paths) {
                    @if !path.cells.is_empty() {
                        path class=(palette::name(way)) d=(path.cells) { title { (words(way).0) } }
                    }
                }
                @for (way, path) in Way::ALL.into_iter().zip(&paths) {
                    @if !path.dots.is_empty() {
                        path class={ "dot " (palette::name(way)) } d=(path.dots) { title { "some pages: " (words(way).0) } }
                    }
                }
            }
            @for (top, address) in &labels {
                text.label x=(at(LEFT - 6.0)) y=(at(top + 5.0)) dy="0.35em" text-anchor="end" { (address) }
            }
        }
    }
}

/// Ends a run: one rectangle.
fn end_run(paths: &mut [Paths], run: &mut Option<(Way, u32, u32)>, top: f64, width: f64, height: f64) {
    if let Some((way, first, last)) = run.take()
        && let Some(path) = paths.get_mut(way as usize)
    {
        let (x, wide) = (LEFT + f64::from(first) * width, f64::from(last - first + 1) * width);
        let _ = write!(path.cells, "M{} {}h{}v{}h-{}z", at(x), at(top), at(wide), at(height), at(wide));
    }
}
