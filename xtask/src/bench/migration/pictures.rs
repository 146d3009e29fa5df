//! Runs made into pictures.

use std::collections::BTreeMap;

use super::plan::{Planned, Variant};
use super::record::Record;
use super::summary::{runs, workloads};
use crate::plot::{Bars, Group, Line, Lines, Series, Span};
use crate::workload::{Second, Workload};

/// All variants, in the order in which they stand beside each other.
const VARIANTS: [Variant; 5] =
    [Variant::Stock, Variant::StockZstd, Variant::NoReferences, Variant::Poolskip, Variant::Compressed];

/// A number of a run.
type Number = fn(&Record) -> f64;

/// What is drawn as bars: file, title, unit, number.
const BARS: [(&str, &str, &str, Number); 4] = [
    ("wire-bytes.svg", "Bytes on the wire", "MB", |run| run.wire_bytes as f64 / 1e6),
    ("total-seconds.svg", "Total time of a migration", "s", |run| run.total_seconds),
    ("downtime-seconds.svg", "Downtime, as seen inside the guest", "s", |run| run.downtime_seconds),
    ("dom0-cpu-seconds.svg", "Processor time of both dom0s", "s", |run| run.dom0_cpu_seconds),
];

/// File names and their contents: bars for each number, and a time line for each workload that has one.
pub fn all(
    records: &[(Planned, Record)],
    rate_mbit: u32,
    (memory, pool): (u64, u64),
) -> Vec<(String, String)> {
    let lab = format!("Lab: guest {} MiB, pool {} MiB, link {rate_mbit} Mbit/s", memory >> 20, pool >> 20);
    let mut pictures: Vec<(String, String)> = BARS
        .iter()
        .map(|(file, title, unit, number)| {
            let there = |variant: &Variant| records.iter().any(|(run, _)| run.variant == *variant);
            let variants: Vec<Variant> = VARIANTS.into_iter().filter(there).collect();
            let groups = workloads(records).into_iter().map(|workload| Group {
                name: words(workload).to_owned(),
                samples: variants
                    .iter()
                    .map(|variant| runs(records, workload, *variant).into_iter().map(number).collect())
                    .collect(),
            });
            let bars = Bars {
                title: (*title).to_owned(),
                subtitle: format!("{lab}. Bars: median; whiskers: least and most; dots: runs"),
                unit,
                series: variants.iter().map(|variant| series(*variant)).collect(),
                groups: groups.collect(),
            };
            ((*file).to_owned(), bars.draw())
        })
        .collect();
    for workload in workloads(records) {
        let lines: Vec<Line> = [Variant::Stock, Variant::Poolskip]
            .into_iter()
            .filter_map(|variant| line(variant, runs(records, workload, variant).first()?))
            .collect();
        if !lines.is_empty() {
            let picture = Lines {
                title: format!("Throughput of the database: {}", words(workload)),
                subtitle: format!("{lab}. Transactions committed a second, first pair"),
                unit: "1/s",
                lines,
            };
            pictures.push((format!("{}-timeline.svg", workload.name()), picture.draw()));
        }
    }
    pictures
}

/// What was committed in each whole second of the wall clock since `began`: what was not done while the guest stood still counts. A step's
/// transactions are spread evenly over it, for a step that had to wait is followed by one that is over in no time.
fn by_second(timeline: &[Second], began: f64) -> Vec<(Span, f64)> {
    let (Some(first), Some(last)) = (timeline.first(), timeline.last()) else { return Vec::new() };
    let mut seconds: BTreeMap<i64, f64> = BTreeMap::new();
    for pair in timeline.windows(2).filter(|pair| pair[1].wall > pair[0].wall) {
        let (mut at, end) = (pair[0].wall - began, pair[1].wall - began);
        let rate = pair[1].committed / (end - at);
        while at < end {
            let next = (at.floor() + 1.0).min(end);
            *seconds.entry(at.floor() as i64).or_default() += rate * (next - at);
            at = next;
        }
    }
    // The first and the last one are not whole.
    let whole = (first.wall - began).ceil() as i64..(last.wall - began).floor() as i64;
    let whole = seconds.into_iter().filter(|(second, _)| whole.contains(second));
    whole.map(|(second, count)| (Span { from: second as f64, to: (second + 1) as f64 }, count)).collect()
}

/// The time line of a run, from the beginning of its migration on; none of an idle guest.
fn line(variant: Variant, run: &Record) -> Option<Line> {
    let steps = by_second(&run.timeline, run.began);
    let span = Span { from: 0.0, to: run.ended - run.began };
    (!steps.is_empty()).then(|| Line { series: series(variant), span, steps })
}

/// Colours that people with any sight tell apart.
const fn series(variant: Variant) -> Series {
    match variant {
        Variant::Stock => Series { name: "stock Xen", colour: "#7b8794" },
        Variant::StockZstd => Series { name: "stock Xen, zstd", colour: "#b8c2cc" },
        Variant::NoReferences => Series { name: "Poolskip without references", colour: "#e69f00" },
        Variant::Poolskip => Series { name: "Poolskip", colour: "#0072b2" },
        Variant::Compressed => Series { name: "Poolskip, compressed", colour: "#56b4e9" },
    }
}

const fn words(workload: Workload) -> &'static str {
    match workload {
        Workload::Idle => "idle",
        Workload::Ro => "read-only",
        Workload::Rw => "read-write",
        Workload::Tpcc => "TPC-C",
        Workload::Spill => "spill",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::migration::plan::plan;
    use crate::bench::migration::record::tests::record;

    fn records() -> Vec<(Planned, Record)> {
        let workloads = [Workload::Idle, Workload::Ro, Workload::Rw, Workload::Tpcc, Workload::Spill];
        plan(&workloads, 3, &[Variant::NoReferences, Variant::StockZstd, Variant::Compressed], 1)
            .into_iter()
            .enumerate()
            .map(|(number, planned)| {
                let wobble = 1.0 + f64::from(u32::try_from(number % 5).unwrap()) * 0.02;
                let (total, bytes) = match planned.variant {
                    Variant::Stock => (198.0, 746e6),
                    Variant::StockZstd => (150.0, 420e6),
                    Variant::NoReferences => (140.0, 508e6),
                    Variant::Poolskip => (60.0, 171e6),
                    Variant::Compressed => (40.0, 80e6),
                };
                let mut run = record(total * wobble, (bytes * wobble) as u64);
                if planned.workload != Workload::Idle {
                    run.timeline = (85..=u32::try_from(120 + run.total_seconds as u64).unwrap())
                        .map(|wall| Second {
                            wall: f64::from(wall),
                            seconds: 1.0,
                            committed: f64::from(10 + wall * 7 % 5),
                        })
                        .collect();
                }
                (planned, run)
            })
            .collect()
    }

    #[test]
    fn a_step_that_waited_and_the_next_one_share_their_seconds() {
        let at = |wall| Second { wall, seconds: 1.0, committed: 4.0 };
        // One step had to wait until 103.95, and the next one was over by 104.
        let timeline = [99.5, 100.0, 101.0, 103.95, 104.0, 105.0, 105.5].map(at);
        let found = by_second(&timeline, 100.0);
        let counts: Vec<f64> = found.iter().map(|(_, count)| (count * 100.0).round() / 100.0).collect();
        assert_eq!(counts, [4.0, 1.36, 1.36, 5.29, 4.0]);
        assert_eq!(found[3].0, Span { from: 3.0, to: 4.0 });
        assert!(by_second(&[], 0.0).is_empty() && by_second(&timeline[..1], 0.0).is_empty());
    }

    #[test]
    fn there_are_bars_for_every_number_and_a_time_line_for_every_load() {
        let pictures = all(&records(), 32, (704 << 20, 256 << 20));
        let names: Vec<_> = pictures.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "wire-bytes.svg",
                "total-seconds.svg",
                "downtime-seconds.svg",
                "dom0-cpu-seconds.svg",
                "ro-timeline.svg",
                "rw-timeline.svg",
                "tpcc-timeline.svg",
                "spill-timeline.svg"
            ]
        );
        let (_, wire) = &pictures[0];
        assert!(wire.contains("stock Xen, zstd") && wire.contains("TPC-C") && wire.contains("32 Mbit/s"));
    }
}
