//! `bench migration`: the research's four workloads and one more, migrated in the lab by the stock helper and by Poolskip in turn.
//!
//! Each run is kept as soon as it is done, under the hash of all that it depends on: a bench that was interrupted, or that has used up
//! its time, goes on where it was.

mod bed;
mod pictures;
mod plan;
mod record;
mod summary;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::figures::Report;
use crate::cache::{self, Key};
use crate::deployment::Deployment;
use crate::lab::{Flavour, GuestSize};
use crate::workload::{Settings, Workload};
use bed::LabBed;
use plan::{Planned, Variant, plan};
use record::{Kept, Record};

/// Migrate under each workload, stock and Poolskip in turn.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the database does meanwhile
    #[arg(long, value_enum, value_delimiter = ',', default_value = "idle,ro,rw,tpcc,spill")]
    workload: Vec<Workload>,
    /// Pairs of a stock and a Poolskip migration, for each workload; a third as many of `spill`, which the research has not
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Rate of the link between the hosts, in Mbit/s; up to 40 or so the link sets stock's pace, above that the emulated processor does
    #[arg(long, value_name = "MBIT", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
    /// What else to compare with
    #[arg(long, value_enum, value_delimiter = ',', default_value = "no-references,stock-zstd")]
    baselines: Vec<Variant>,
    /// Runs of each of these, for each workload; each takes as long as one of stock's
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    baseline_runs: u32,
    /// Memory of the guest, in MiB; with another one than the lab's own, 704, a lab is built and kept for it
    #[arg(long, value_name = "MIB", default_value_t = 1120)]
    guest_memory: u32,
    /// Buffer pool of the guest, in MiB; 768 of 1120 is the proportion of the research, 256 of 704 the lab's own
    #[arg(long, value_name = "MIB", default_value_t = 768)]
    guest_pool: u32,
    /// Warehouses of TPC-C
    #[arg(long, default_value_t = 1)]
    warehouses: u32,
    /// Percent of the standard's items, customers and orders of each: the emulated guest takes minutes to load a whole one
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    tpcc_scale: u32,
    /// Seconds of load before and after each migration; of an idle guest three at most
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    margin: u64,
    /// Begin no run after this many minutes: the next call goes on there
    #[arg(long, default_value_t = 75)]
    minutes: u64,
    /// Write pictures into this directory, as SVG
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
}

/// Where migrations are measured: the lab, or a fake one in tests.
pub trait Bed {
    /// Makes everything ready for a workload. Called before its first run, and before the next after one that failed.
    ///
    /// # Errors
    /// When something does not come up.
    fn prepare(&mut self, workload: Workload) -> Result<()>;

    /// Migrates the guest to the other host, under load, and measures.
    ///
    /// # Errors
    /// When the migration fails, or what was measured cannot be believed.
    fn measure(&mut self, run: Planned) -> Result<Record>;
}

/// Measures what is not kept yet, and makes figures of all that is.
///
/// # Errors
/// When a run fails twice. Those that were done before are kept.
pub fn run(args: &Args) -> Result<Report> {
    let start = Instant::now();
    let size = GuestSize::new(args.guest_memory, args.guest_pool)?;
    let deployment = Deployment::build(Flavour::Pv)?;
    let load = Settings {
        warehouses: args.warehouses,
        tpcc_percent: args.tpcc_scale,
        pool_bytes: size.pool_bytes(),
        tables: size.tables(),
        rows: size.rows(),
    };
    let key = Key::new("bench-migration-2")
        .with(deployment.identity()?.as_bytes())
        .with(format!("{size:?} {load:?} {} {}", args.rate, args.margin).as_bytes());
    let kept = Kept::open(cache::dir()?.join(format!("bench-migration-{}", key.hex())))?;
    eprintln!("  runs are kept in {}", kept.dir().display());
    let runs = plan(&args.workload, args.pairs, &args.baselines, args.baseline_runs);
    let rate = u64::from(args.rate) * 1_000_000;
    let mut bed = LabBed::new(deployment, size, load, rate, Duration::from_secs(args.margin));
    let deadline = start + Duration::from_secs(60 * args.minutes);
    drive(&mut bed, &kept, &runs, &mut || Instant::now() < deadline)?;
    let records = read_all(&kept, &runs)?;
    let left = runs.len() - records.len();
    if left > 0 {
        eprintln!("  {left} of {} runs are left: the same command goes on with them", runs.len());
    }
    ensure!(!records.is_empty(), "no run was done within {} minutes", args.minutes);
    let size = (size.memory_bytes(), size.pool_bytes());
    if let Some(dir) = &args.plot {
        draw(dir, &records, args.rate, size)?;
    }
    let bounds = summary::Bounds { memory_bytes: size.0, link_bits_per_second: rate };
    Ok(summary::report(&records, bounds))
}

/// Measures those runs that are not kept. A run that fails is tried once more on a bed that is made anew: an emulated host may fail
/// for reasons of its own, and that is said.
fn drive(
    bed: &mut impl Bed,
    kept: &Kept,
    runs: &[Planned],
    may_begin: &mut dyn FnMut() -> bool,
) -> Result<()> {
    let mut ready = None;
    for (number, &run) in runs.iter().enumerate() {
        if kept.read(run)?.is_some() {
            continue;
        }
        let mut failed_before = false;
        loop {
            if !may_begin() {
                return Ok(());
            }
            eprintln!(
                "· run {} of {}: {}, {}, pair {}",
                number + 1,
                runs.len(),
                run.workload.name(),
                run.variant.name(),
                run.pair + 1
            );
            let measured = if ready == Some(run.workload) { Ok(()) } else { bed.prepare(run.workload) }
                .and_then(|()| bed.measure(run));
            match measured {
                Ok(record) => {
                    ready = Some(run.workload);
                    eprintln!(
                        "  {:.1} s, {:.1} MB, downtime {:.2} s",
                        record.total_seconds,
                        record.wire_bytes as f64 / 1e6,
                        record.downtime_seconds
                    );
                    kept.write(run, &record)?;
                    break;
                }
                Err(error) if failed_before => {
                    return Err(error.context(format!("run {} failed twice", run.file())));
                }
                Err(error) => {
                    eprintln!("  FAILED, once more on a new bed: {error:?}");
                    (ready, failed_before) = (None, true);
                }
            }
        }
    }
    Ok(())
}

fn read_all(kept: &Kept, runs: &[Planned]) -> Result<Vec<(Planned, Record)>> {
    let mut records = Vec::new();
    for &run in runs {
        if let Some(record) = kept.read(run)? {
            records.push((run, record));
        }
    }
    Ok(records)
}

fn draw(dir: &Path, records: &[(Planned, Record)], rate: u32, size: (u64, u64)) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for (name, svg) in pictures::all(records, rate, size) {
        let path = dir.join(name);
        std::fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::record::tests::record;
    use super::*;

    #[derive(Default)]
    struct Fake {
        done: Vec<String>,
        failing: Vec<usize>,
    }

    impl Bed for Fake {
        fn prepare(&mut self, workload: Workload) -> Result<()> {
            self.done.push(format!("prepare {}", workload.name()));
            Ok(())
        }

        fn measure(&mut self, run: Planned) -> Result<Record> {
            self.done.push(run.file());
            if self.failing.contains(&self.done.len()) {
                bail!("planted");
            }
            Ok(record(1.0, 2))
        }
    }

    fn kept() -> (tempfile::TempDir, Kept) {
        let dir = tempfile::tempdir().unwrap();
        let kept = Kept::open(dir.path().join("state")).unwrap();
        (dir, kept)
    }

    fn runs() -> Vec<Planned> {
        plan(&[Workload::Idle, Workload::Rw], 1, &[], 0)
    }

    #[test]
    fn a_bed_is_made_ready_once_for_each_workload() {
        let (_dir, kept) = kept();
        let mut bed = Fake::default();
        drive(&mut bed, &kept, &runs(), &mut || true).unwrap();
        assert_eq!(
            bed.done,
            [
                "prepare idle",
                "idle-0-stock.json",
                "idle-0-poolskip.json",
                "prepare rw",
                "rw-0-stock.json",
                "rw-0-poolskip.json"
            ]
        );
        assert_eq!(read_all(&kept, &runs()).unwrap().len(), 4);
    }

    #[test]
    fn an_interrupted_bench_goes_on_where_it_was() {
        let (_dir, kept) = kept();
        let mut left = 3;
        let mut may_begin = || {
            left -= 1;
            left >= 0
        };
        drive(&mut Fake::default(), &kept, &runs(), &mut may_begin).unwrap();
        assert_eq!(read_all(&kept, &runs()).unwrap().len(), 3);
        let mut again = Fake::default();
        drive(&mut again, &kept, &runs(), &mut || true).unwrap();
        assert_eq!(again.done, ["prepare rw", "rw-0-poolskip.json"]);
        let mut done = Fake::default();
        drive(&mut done, &kept, &runs(), &mut || true).unwrap();
        assert!(done.done.is_empty());
    }

    #[test]
    fn a_failed_run_is_tried_once_more_on_a_new_bed_and_then_given_up() {
        let (_dir, state) = kept();
        let mut bed = Fake { failing: vec![3], ..Fake::default() };
        drive(&mut bed, &state, &runs()[..2], &mut || true).unwrap();
        assert_eq!(
            bed.done,
            [
                "prepare idle",
                "idle-0-stock.json",
                "idle-0-poolskip.json",
                "prepare idle",
                "idle-0-poolskip.json"
            ]
        );
        let (_dir, state) = kept();
        let mut bed = Fake { failing: vec![3, 5], ..Fake::default() };
        let error = drive(&mut bed, &state, &runs(), &mut || true).unwrap_err();
        assert!(format!("{error:#}").contains("idle-0-poolskip.json failed twice: planted"));
        assert_eq!(read_all(&state, &runs()).unwrap().len(), 1);
    }

    #[test]
    fn a_broken_file_is_named_and_not_taken_for_a_run() {
        let (_dir, kept) = kept();
        std::fs::write(kept.dir().join("idle-0-stock.json"), "{").unwrap();
        let error = drive(&mut Fake::default(), &kept, &runs(), &mut || true).unwrap_err();
        assert!(error.to_string().contains("idle-0-stock.json is no run"), "{error:#}");
    }
}
