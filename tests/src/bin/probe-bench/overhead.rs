//! sysbench against a mysqld with and without probes, in turn.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use guest_probe::event::EventKind;
use guest_probe::session::{Options, Session};
use guest_probe::statistics;
use guest_probe::storage_map::DiskRule;
use tests::server::Server;

use crate::Samples;

/// Workloads of sysbench, and how their figures are called.
const WORKLOADS: [(&str, &str); 2] = [("oltp_read_only", "read_only"), ("oltp_read_write", "read_write")];

/// What to measure.
#[derive(clap::Args)]
pub struct Args {
    /// Pairs of runs for each workload
    #[arg(long, default_value_t = 10)]
    pairs: u32,
    /// Seconds of each run
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Clients
    #[arg(long, default_value_t = 4)]
    threads: u32,
    /// Pool in MiB; the tables take about 190
    #[arg(long, default_value_t = 512)]
    pool: u64,
}

/// What one run came to.
struct Run {
    transactions_per_second: f64,
    /// Seconds of processor time that mysqld took for a thousand transactions.
    cpu: f64,
}

/// What the kernel counted of our programs in one run, a second.
struct Hits {
    hits: f64,
    kernel_seconds: f64,
}

/// Measures both workloads.
pub fn run(args: &Args) -> Result<Vec<Samples>> {
    let pool = format!("--innodb-buffer-pool-size={}M", args.pool);
    // Flushing as a server of this size would: nothing waits for the disk at each commit, in both runs alike.
    let server = Server::start(&[&pool, "--innodb-flush-log-at-trx-commit=2"])?;
    let mut found = Vec::new();
    for (workload, name) in WORKLOADS {
        // Warms the pool; not counted.
        once(&server, workload, args)?;
        let (mut with, mut without, mut hits) = (Vec::new(), Vec::new(), Vec::new());
        for pair in 0..args.pairs {
            // What comes first in a pair takes turns: a machine that slows down favours none.
            for probed in [pair % 2 == 0, pair % 2 != 0] {
                if probed {
                    let (run, hit) = with_probes(&server, || once(&server, workload, args))?;
                    with.push(run);
                    hits.push(hit);
                } else {
                    without.push(once(&server, workload, args)?);
                }
            }
            eprintln!("  {name}: pair {} of {}", pair + 1, args.pairs);
        }
        let rate = |runs: &[Run]| runs.iter().map(|run| run.transactions_per_second).collect();
        let cpu = |runs: &[Run]| runs.iter().map(|run| run.cpu).collect();
        let samples = |what: &str, unit, samples, baseline| Samples {
            name: format!("{name}_{what}"),
            unit,
            samples,
            baseline,
        };
        found.extend([
            samples("throughput", "1/s", rate(&with), Some(rate(&without))),
            samples("cpu_per_1000_transactions", "s", cpu(&with), Some(cpu(&without))),
            samples("hits_per_second", "1/s", hits.iter().map(|hit| hit.hits).collect(), None),
            samples(
                "kernel_time_per_second",
                "s/s",
                hits.iter().map(|hit| hit.kernel_seconds).collect(),
                None,
            ),
        ]);
    }
    Ok(found)
}

fn once(server: &Server, workload: &str, args: &Args) -> Result<Run> {
    let before = cpu_seconds(server.pid())?;
    let start = Instant::now();
    let rate = server.transactions_per_second(workload, args.threads, args.seconds)?;
    let transactions = rate * start.elapsed().as_secs_f64();
    ensure!(transactions > 0.0, "{workload} made no transaction");
    let cpu = (cpu_seconds(server.pid())? - before) * 1000.0 / transactions;
    Ok(Run { transactions_per_second: rate, cpu })
}

/// Does something while a resident probe follows the server, its events taken as the service takes them: once a second, and when
/// the ring buffer is half full.
fn with_probes(server: &Server, work: impl FnOnce() -> Result<Run>) -> Result<(Run, Hits)> {
    // The kernel's own counting costs some 20 ns a hit, which is thus in the figures with probes.
    let _counting = statistics::count()?;
    let options = Options { pid: Some(server.pid()), rule: DiskRule::Any, ..Options::default() };
    let mut session = Session::start(&options)?;
    let programs = session.probes().program_ids();
    let over = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let (run, hits) = thread::scope(|scope| -> Result<(Run, Hits)> {
        let follower = scope.spawn({
            let over = Arc::clone(&over);
            move || -> Result<Session> {
                while !over.load(Ordering::Relaxed) {
                    session.wait_for_events(Duration::from_secs(1))?;
                    session.update()?;
                }
                Ok(session)
            }
        });
        let run = work();
        let seconds = start.elapsed().as_secs_f64();
        let counted = statistics::of_programs(&programs);
        over.store(true, Ordering::Relaxed);
        let session = follower.join().map_err(|_| anyhow!("the follower panicked"))??;
        ensure!(session.probes().missed()?.total() == 0, "events were lost");
        let hits = counted.iter().map(|program| program.runs).sum::<u64>() as f64 / seconds;
        let nanoseconds = counted.iter().map(|program| program.nanoseconds).sum::<u64>() as f64;
        let dirtied = session.events().get(&EventKind::Dirty).copied().unwrap_or_default();
        eprintln!("    {dirtied} frames dirtied; {counted:?}");
        Ok((run?, Hits { hits, kernel_seconds: nanoseconds / 1e9 / seconds }))
    })?;
    Ok((run, hits))
}

/// Processor time of a process so far, in seconds.
fn cpu_seconds(pid: i32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15, counted from behind the name, which may hold spaces (proc_pid_stat(5)); in hundredths.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("a short stat")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}
