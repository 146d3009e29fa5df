//! The report's page, looked at in a real browser: `dom0-migrator report` makes it of a report file, Chromium shows it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

mod browser;
mod made_up;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dom0_migrator::report_file::{self, ReportFile};

/// Runs `dom0-migrator report`.
fn report(arguments: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dom0-migrator")).arg("report").args(arguments).output().unwrap()
}

/// Writes reports and makes the page of the first, compared with the second if there is one.
fn page(directory: &Path, reports: &[ReportFile]) -> PathBuf {
    let files: Vec<PathBuf> = reports
        .iter()
        .enumerate()
        .map(|(index, report)| {
            let file = directory.join(format!("{index}.json"));
            report_file::write(report, &file).unwrap();
            file
        })
        .collect();
    let page = directory.join("report.html");
    let mut arguments = vec![files[0].as_path(), Path::new("-o"), &page];
    if let Some(other) = files.get(1) {
        arguments.extend([Path::new("--compare"), other]);
    }
    let output = report(&arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    page
}

/// The text between two marks.
fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let start = text.find(from).unwrap_or_else(|| panic!("there is no {from}")) + from.len();
    &text[start..start + text[start..].find(to).unwrap_or_else(|| panic!("there is no {to} after {from}"))]
}

/// Where pictures are kept, if they are to be looked at.
fn pictures(directory: &Path) -> PathBuf {
    std::env::var_os("POOLSKIP_PICTURES").map_or_else(|| directory.to_owned(), PathBuf::from)
}

#[test]
fn a_domain_s_name_stands_for_its_newest_report() {
    let directory = tempfile::tempdir().unwrap();
    let run = |name: &str, page: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dom0-migrator"));
        command.args(["report", name, "-o"]).arg(page).env("POOLSKIP_REPORTS", directory.path());
        command.output().unwrap()
    };
    let mine = made_up::poolskip();
    report_file::write(&mine, &directory.path().join("db1-20261126T100000Z.json")).unwrap();
    let page = directory.path().join("page.html");
    assert!(run("db1", &page).status.success());
    assert!(std::fs::read_to_string(&page).unwrap().contains(&mine.domain));
    let none = run("db2", &directory.path().join("none.html"));
    assert!(!none.status.success());
    assert!(String::from_utf8_lossy(&none.stderr).contains("cannot read db2"));
}

#[test]
fn a_browser_shows_the_numbers_of_the_report() {
    let directory = tempfile::tempdir().unwrap();
    let (mine, other) = (made_up::poolskip(), made_up::stock());
    let page = page(directory.path(), &[mine.clone(), other]);
    let said = browser::dom(&page);
    assert_eq!(said.console, Vec::<String>::new(), "the console has nothing to say");
    let dom = &said.stdout;
    for id in ["chart-compare", "chart-memory", "chart-wire", "chart-window", "chart-reload", "memory-map"] {
        let picture = between(dom, &format!("<svg id=\"{id}\""), "</svg>");
        assert!(picture.contains("role=\"img\"") && picture.contains("<title id="), "{id} has words");
        assert!(picture.contains("<path "), "{id} has something in it");
        assert!(!picture.contains("NaN") && !picture.contains("inf"), "{id} has numbers only");
    }
    let map = mine.memory.as_ref().unwrap();
    let shown = |number: u64| {
        let mut text = number.to_string();
        for at in (1..text.len()).rev().filter(|at| (text.len() - at).is_multiple_of(3)).collect::<Vec<_>>() {
            text.insert(at, '\u{202f}');
        }
        text
    };
    // The table beside the map has each way with its pages.
    let table = between(dom, "<svg id=\"memory-map\"", "<h2 id=\"lists\">");
    for pages in [
        map.pages.accepted,
        map.pages.zero,
        map.pages.raw,
        map.pages.resent,
        map.pages.refused,
        map.pages.page_table,
    ] {
        assert!(pages > 0 && table.contains(&format!(">{}<", shown(pages))), "{pages} of the map");
    }
    // The map's colours cover as much as there is of each: all cells are drawn, none twice.
    let area = map_area(between(dom, "<svg id=\"memory-map\"", "</svg>"));
    let cells = map.cells().count() as f64;
    let whole: f64 = area.values().sum();
    for (class, part) in &area {
        let expected = map.cells().filter(|(_, ways)| dominant(ways) == *class).count() as f64 / cells;
        assert!(
            (part / whole - expected).abs() < 0.01,
            "{class}: {} of the picture, {expected} of the cells",
            part / whole
        );
    }
    // The headline has the bytes against what the other one sent.
    let cards = between(dom, "<dl class=\"cards\">", "</dl>");
    assert!(cards.contains("with the stock helper"), "{cards}");
    let memory = between(dom, "<svg id=\"chart-memory\"", "</svg>");
    for name in ["pass 1", "pass 2", "drain", "suspended", "zero", "refused"] {
        assert!(memory.contains(&format!("<title>{name}</title>")), "{name} in the time line");
    }
}

/// The class in whose colour a cell is to be.
fn dominant(ways: &[(dom0_migrator::engine::Way, u64)]) -> String {
    let way = ways.iter().max_by_key(|(_, pages)| *pages).unwrap().0;
    let name = serde_json::to_value(way).unwrap().as_str().unwrap().replace('_', "-");
    if name == "unseen" { "no-data".into() } else { name }
}

/// Area of the rectangles of each class in the map.
fn map_area(svg: &str) -> BTreeMap<String, f64> {
    let mut areas = BTreeMap::new();
    for path in svg.split("<path class=\"").skip(1).filter(|path| !path.starts_with("dot ")) {
        let class = path.split('"').next().unwrap().to_owned();
        let area: f64 = between(path, "d=\"", "\"")
            .split('M')
            .skip(1)
            .map(|shape| {
                let number = |letter: char| {
                    let rest = shape.split_once(letter).unwrap().1;
                    rest[..rest.find(|c: char| c.is_ascii_alphabetic()).unwrap()].parse::<f64>().unwrap()
                };
                number('h') * number('v')
            })
            .sum();
        *areas.entry(class).or_insert(0.0) += area;
    }
    areas
}

#[test]
fn it_is_not_blank_in_light_and_dark_wide_and_narrow() {
    let directory = tempfile::tempdir().unwrap();
    let page = page(directory.path(), &[made_up::poolskip(), made_up::stock()]);
    let kept = pictures(directory.path());
    let mut grounds = BTreeSet::new();
    for (name, size, dark) in [
        ("wide-light", (1280, 2900), false),
        ("wide-dark", (1280, 2900), true),
        ("narrow-light", (500, 3900), false),
    ] {
        let picture = browser::screenshot(&page, size, dark, &kept.join(format!("{name}.png")));
        assert_eq!((picture.width, picture.height), size);
        let mut colours = BTreeMap::new();
        picture.points.iter().for_each(|point| *colours.entry(*point).or_insert(0_u32) += 1);
        assert!(colours.len() > 60, "{name} has {} colours", colours.len());
        let (ground, points) = colours.iter().max_by_key(|(_, count)| **count).unwrap();
        assert!(*points < picture.width * picture.height * 95 / 100, "{name} is blank");
        let bright = ground.iter().map(|part| u32::from(*part)).sum::<u32>() > 3 * 128;
        assert_eq!(bright, !dark, "{name}: most of it is {ground:?}");
        grounds.insert(*ground);
        // The colours of the pages' ways are there, in quantity.
        let accepted = if dark { [0x2f, 0x86, 0xd6] } else { [0x00, 0x66, 0xb3] };
        assert!(colours.get(&accepted).copied().unwrap_or(0) > 5000, "{name} shows pages from storage");
    }
    assert_eq!(grounds.len(), 2);
}

#[test]
fn what_a_file_says_stays_text() {
    let directory = tempfile::tempdir().unwrap();
    let page = page(directory.path(), &[made_up::hostile(), made_up::hostile()]);
    let source = fs::read_to_string(&page).unwrap();
    for bad in ["<script", "<img", "onerror=alert(1)>&amp;<"] {
        assert!(!source.contains(bad), "{bad}");
    }
    for address in ["http://", "https://", "url(", "@import", "src=", "<link"] {
        assert!(!source.replace("src=x", "").contains(address), "the page needs nothing else: {address}");
    }
    let said = browser::dom(&page);
    assert_eq!(said.console, Vec::<String>::new());
    assert!(!between(&said.stdout, "<title>", "</title>").starts_with("owned"));
    assert!(!said.stdout.contains("<script") && !said.stdout.contains("<img"));
}

#[test]
fn what_is_no_report_is_refused_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let (file, page) = (directory.path().join("x.json"), directory.path().join("x.html"));
    for (content, reason) in
        [("{}", "not a report"), ("{\"poolskip_report\":99}", "version 99"), ("\0\0", "not a report")]
    {
        fs::write(&file, content).unwrap();
        let output = report(&[&file, Path::new("-o"), &page]);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr.contains("x.json") && stderr.contains(reason), "{stderr}");
        assert!(!page.exists());
    }
    let output = report(&[Path::new("/dev/zero"), Path::new("-o"), &page]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("bytes, and a report has at most"));
}
