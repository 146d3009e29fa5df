//! Runs made into figures.

use super::plan::{Planned, Variant};
use super::record::Record;
use crate::bench::figures::{Figure, Report, median};
use crate::bench::model::Model;
use crate::workload::Workload;

/// What the model's bounds depend on beside the runs.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The guest's memory.
    pub memory_bytes: u64,
    /// The link.
    pub link_bits_per_second: u64,
}

/// A number of a run, if it has it.
type Number = fn(&Record) -> Option<f64>;

/// What stock and Poolskip are compared by: name, unit, number.
const COMPARED: [(&str, &str, Number); 12] = [
    ("wire_bytes", "bytes", |run| Some(run.wire_bytes as f64)),
    ("total_seconds", "s", |run| Some(run.total_seconds)),
    ("downtime_seconds", "s", |run| Some(run.downtime_seconds)),
    ("link_bytes", "bytes", |run| Some(run.link_bytes as f64)),
    ("rounds", "rounds", |run| run.rounds.map(|rounds| rounds as f64)),
    ("pages_sent", "pages", |run| run.pages_sent.map(|pages| pages as f64)),
    ("dom0_cpu_seconds", "s", |run| Some(run.dom0_cpu_seconds)),
    ("throughput_before", "1/s", |run| Some(run.throughput()?.before)),
    ("throughput_during", "1/s", |run| Some(run.throughput()?.during)),
    ("transactions_missed", "transactions", Record::transactions_missed),
    ("throughput_after", "1/s", |run| Some(run.throughput()?.after)),
    ("throughput_first_second_after", "1/s", |run| Some(run.throughput()?.first_second)),
];

/// What only Poolskip has.
const OURS: [(&str, &str, Number); 10] = [
    ("page_data_bytes", "bytes", |run| Some(run.classes?.page_data as f64)),
    ("reference_bytes", "bytes", |run| Some(run.classes?.references as f64)),
    ("marker_bytes", "bytes", |run| Some(run.classes?.markers as f64)),
    ("other_bytes", "bytes", |run| Some(run.classes?.other as f64)),
    ("pages_zero", "pages", |run| run.pages_zero.map(|pages| pages as f64)),
    ("pages_referenced", "pages", |run| run.pages_referenced.map(|pages| pages as f64)),
    ("pages_accepted", "pages", |run| run.pages_accepted.map(|pages| pages as f64)),
    ("pages_refused", "pages", |run| run.pages_refused.map(|pages| pages as f64)),
    ("frames_listed_read", "frames", |run| run.lists.as_ref().map(|lists| lists.frames_read as f64)),
    ("frames_listed_written", "frames", |run| run.lists.as_ref().map(|lists| lists.frames_written as f64)),
];

/// What the other baselines are compared by.
const BASELINES: [(&str, &str, Number); 3] = [COMPARED[0], COMPARED[1], COMPARED[2]];

/// The figures of all workloads that were run: ours, with stock as the baseline; ours with other baselines, named after them; ours with
/// compression, against stock without and with it; and ours with what the model says it could be at best.
pub fn report(records: &[(Planned, Record)], bounds: Bounds) -> Report {
    let mut figures = Vec::new();
    for workload in workloads(records) {
        let name = workload.name();
        let of = |variant| runs(records, workload, variant);
        let (stock, ours) = (of(Variant::Stock), of(Variant::Poolskip));
        if ours.is_empty() {
            continue;
        }
        for (what, unit, number) in COMPARED {
            push(&mut figures, format!("{name}_{what}"), unit, &ours, &stock, number);
        }
        for (what, unit, number) in OURS {
            let samples: Vec<f64> = ours.iter().filter_map(|run| number(run)).collect();
            if !samples.is_empty() {
                figures.push(Figure::alone(format!("{name}_{what}"), unit, samples));
            }
        }
        for (what, unit, number) in BASELINES {
            for baseline in [Variant::NoReferences, Variant::StockZstd] {
                let figure = format!("{name}_{what}_to_{}", baseline.name());
                push(&mut figures, figure, unit, &ours, &of(baseline), number);
            }
            let (compressed, by_stock) = (of(Variant::Compressed), of(Variant::StockZstd));
            let figure = format!("{name}_compressed_{what}");
            push(&mut figures, format!("{figure}_to_stock_zstd"), unit, &compressed, &by_stock, number);
            push(&mut figures, figure, unit, &compressed, &stock, number);
        }
        let totals = |runs: &[&Record]| runs.iter().map(|run| run.total_seconds).collect::<Vec<_>>();
        if let Some(model) = model(&stock, &ours, bounds) {
            for (which, runs, bound) in
                [("stock", &stock, model.stock()), ("poolskip", &ours, model.poolskip())]
            {
                if bound.total_seconds.is_finite() {
                    let figure = format!("{name}_{which}_total_seconds_to_bound");
                    figures.push(Figure::against(figure, "s", totals(runs), &[bound.total_seconds]));
                }
            }
        }
    }
    Report { bench: "migration".into(), figures }
}

fn push(
    figures: &mut Vec<Figure>,
    name: String,
    unit: &str,
    ours: &[&Record],
    theirs: &[&Record],
    number: Number,
) {
    let numbers = |runs: &[&Record]| runs.iter().filter_map(|run| number(run)).collect::<Vec<_>>();
    let (ours, theirs) = (numbers(ours), numbers(theirs));
    if !ours.is_empty() && !theirs.is_empty() {
        figures.push(Figure::against(name, unit, ours, &theirs));
    }
}

/// The model of these runs. Storage is taken to be as fast as it need be: what it costs is in the difference to the bound.
fn model(stock: &[&Record], ours: &[&Record], bounds: Bounds) -> Option<Model> {
    let of = |runs: &[&Record], number: Number| {
        let numbers: Vec<f64> = runs.iter().filter_map(|run| number(run)).collect();
        (!numbers.is_empty()).then(|| median(&numbers))
    };
    let memory = bounds.memory_bytes as f64;
    let pages = |runs, number| of(runs, number).map(|pages| pages * 4096.0);
    let sent = pages(stock, |run| run.pages_sent.map(|pages| pages as f64))?;
    Some(Model {
        memory_bytes: memory,
        zero_bytes: pages(ours, |run| run.pages_zero.map(|pages| pages as f64))?,
        cached_bytes: pages(ours, |run| run.pages_accepted.map(|pages| pages as f64))?,
        // What the stock migration sent more than once, over its time.
        dirty_bytes_per_second: (sent - memory).max(0.0) / of(stock, |run| Some(run.total_seconds))?,
        link_bytes_per_second: bounds.link_bits_per_second as f64 / 8.0,
        storage_bytes_per_second: f64::INFINITY,
    })
}

/// The workloads, in the order of the runs.
pub fn workloads(records: &[(Planned, Record)]) -> Vec<Workload> {
    let mut found = Vec::new();
    for (run, _) in records {
        if !found.contains(&run.workload) {
            found.push(run.workload);
        }
    }
    found
}

/// The runs of one workload and variant.
pub fn runs(records: &[(Planned, Record)], workload: Workload, variant: Variant) -> Vec<&Record> {
    let wanted = |run: &Planned| run.workload == workload && run.variant == variant;
    records.iter().filter(|(run, _)| wanted(run)).map(|(_, record)| record).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::migration::record::tests::record;

    fn run(variant: Variant, pair: u32, total: f64, wire: u64) -> (Planned, Record) {
        (Planned { workload: Workload::Rw, variant, pair }, record(total, wire))
    }

    fn figure(report: &Report, name: &str) -> Figure {
        report.figures.iter().find(|figure| figure.name == name).unwrap_or_else(|| panic!("{name}")).clone()
    }

    fn records() -> Vec<(Planned, Record)> {
        let mut records = vec![
            run(Variant::Stock, 0, 100.0, 1000),
            run(Variant::Poolskip, 0, 40.0, 200),
            run(Variant::Poolskip, 1, 44.0, 300),
            run(Variant::Stock, 1, 104.0, 1000),
            run(Variant::Stock, 2, 90.0, 1000),
            run(Variant::Poolskip, 2, 42.0, 250),
            run(Variant::StockZstd, 0, 60.0, 500),
            run(Variant::Compressed, 0, 30.0, 100),
        ];
        for (planned, record) in &mut records {
            if planned.variant == Variant::Poolskip {
                record.pages_zero = Some(10_000);
                record.pages_accepted = Some(60_000);
            }
            record.pages_sent = Some(180_224);
        }
        records
    }

    const BOUNDS: Bounds = Bounds { memory_bytes: 704 << 20, link_bits_per_second: 64_000_000 };

    #[test]
    fn figures_are_named_by_workload_and_ratios_are_ours_to_theirs() {
        let report = report(&records(), BOUNDS);
        let total = figure(&report, "rw_total_seconds");
        assert_eq!((total.value, total.baseline, total.ratio), (42.0, Some(100.0), Some(0.42)));
        assert_eq!(figure(&report, "rw_wire_bytes").ratio, Some(0.25));
        assert_eq!(figure(&report, "rw_wire_bytes_to_stock_zstd").ratio, Some(0.5));
        assert_eq!(figure(&report, "rw_compressed_wire_bytes").ratio, Some(0.1));
        assert_eq!(figure(&report, "rw_compressed_total_seconds_to_stock_zstd").ratio, Some(0.5));
        assert!(!report.figures.iter().any(|figure| figure.name.contains("no_references")));
        assert!(!report.figures.iter().any(|figure| figure.name.contains("throughput")));
    }

    #[test]
    fn bounds_are_below_what_was_measured_at_the_link_s_pace() {
        let report = report(&records(), BOUNDS);
        let stock = figure(&report, "rw_stock_total_seconds_to_bound");
        assert!((stock.baseline.unwrap() - 92.46).abs() < 0.1, "{stock:?}");
        let ours = figure(&report, "rw_poolskip_total_seconds_to_bound");
        assert!(ours.baseline.unwrap() > 55.0 && ours.baseline.unwrap() < 60.0, "{ours:?}");
    }
}
