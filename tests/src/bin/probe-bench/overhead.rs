//! sysbench against a mysqld with and without probes, in turn.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use guest_probe::config::Mode;
use guest_probe::process::Choice;
use guest_probe::service::ServiceOptions;
use guest_probe::statistics;
use tests::kernel::{Held, runs};
use tests::running::{Running, options};
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
    let hits = vec![idle_hits(&server, args)?];
    found.push(Samples { name: "on_demand_idle_hits".into(), unit: "hits", samples: hits, baseline: None });
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

/// Does something while a resident service, as `guest-probe run` is one, follows the server.
fn with_probes(server: &Server, work: impl FnOnce() -> Result<Run>) -> Result<(Run, Hits)> {
    let running = Running::start(service(server, Mode::Resident))?;
    let start = Instant::now();
    let before = programs(&running)?;
    let run = work()?;
    let seconds = start.elapsed().as_secs_f64();
    let after = programs(&running)?;
    let status = running.status()?;
    ensure!(status.servers.iter().all(|server| server.events_lost == 0), "events were lost: {status}");
    let hits = (after.0 - before.0) as f64 / seconds;
    let kernel_seconds = (after.1 - before.1) as f64 / 1e9 / seconds;
    running.end()?;
    Ok((run, Hits { hits, kernel_seconds }))
}

/// A service for this server alone. The kernel's counting costs some 20 ns a hit, which is thus in the figures with probes.
fn service(server: &Server, mode: Mode) -> ServiceOptions {
    ServiceOptions { choice: Choice::One(server.pid()), ..options(mode, "".into()) }
}

/// Runs of all programs and nanoseconds in them.
fn programs(running: &Running) -> Result<(u64, u64)> {
    let status = running.status()?;
    let programs = &status.servers.first().context("no server is probed")?.programs;
    ensure!(!programs.is_empty(), "no program is counted");
    Ok((
        programs.iter().map(|program| program.runs).sum(),
        programs.iter().map(|program| program.nanoseconds).sum(),
    ))
}

/// Hits while a service on demand waits for a request and the server works: counted by the kernel in all programs that this
/// process holds, and none may be in mysqld's code either.
fn idle_hits(server: &Server, args: &Args) -> Result<f64> {
    let _counting = statistics::count()?;
    let running = Running::start(service(server, Mode::OnDemand))?;
    once(server, "oltp_read_write", args)?;
    let held = Held::by(std::process::id())?;
    let mut hits = 0;
    for program in &held.programs {
        hits += runs(*program)?;
    }
    ensure!(held.links.is_empty(), "something is attached: {held:?}");
    running.end()?;
    Ok(hits as f64)
}

/// Processor time of a process so far, in seconds.
fn cpu_seconds(pid: i32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15, counted from behind the name, which may hold spaces (proc_pid_stat(5)); in hundredths.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("a short stat")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}
