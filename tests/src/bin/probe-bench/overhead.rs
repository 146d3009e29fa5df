//! sysbench against a mysqld with and without probes, in turn.
//!
//! All runs of a workload make the same number of transactions with the same seed in both runs of a pair, so the work is equal and time and
//! processor time are what differs. Which of a pair comes first takes turns (A B, B A, A B, ...): what changes steadily, as a machine that slows
//! down or undo logs that grow, is in both alike. Before the first pair the pool is filled, and the workload has run with and without probes.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest_probe::config::Mode;
use guest_probe::process::Choice;
use guest_probe::service::ServiceOptions;
use guest_probe::statistics;
use nix::sys::resource::{UsageWho, getrusage};
use tests::kernel::{Held, runs};
use tests::running::{Running, options};
use tests::server::{Length, Server, Workload, wait_for};

use crate::Samples;

/// Workloads of sysbench, and how their figures are called.
const WORKLOADS: [(&str, &str); 2] = [("oltp_read_only", "read_only"), ("oltp_read_write", "read_write")];

/// What to measure.
#[derive(clap::Args)]
pub struct Args {
    /// Pairs of runs for each workload
    #[arg(long, default_value_t = 10)]
    pairs: u32,
    /// Seconds that a run without probes takes about
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Clients
    #[arg(long, default_value_t = 4)]
    threads: u32,
    /// Pool in MiB; the tables take about 190
    #[arg(long, default_value_t = 512)]
    pool: u64,
    /// A service on demand that is asked nothing, in place of a resident one
    #[arg(long)]
    idle: bool,
}

/// What one run came to.
struct Run {
    transactions_per_second: f64,
    /// Seconds of processor time that mysqld took for a thousand transactions.
    cpu: f64,
}

/// What our side took in one run, a second.
struct Cost {
    /// Runs of our programs, as the kernel counts them.
    hits: f64,
    /// Seconds in them, as the kernel counts them.
    kernel_seconds: f64,
    /// Seconds of processor time of the service.
    service_seconds: f64,
}

/// Measures both workloads.
pub fn run(args: &Args) -> Result<Vec<Samples>> {
    let pool = format!("--innodb-buffer-pool-size={}M", args.pool);
    // Flushing as a server of this size would: nothing waits for the disk at each commit, in both runs alike.
    let server = Server::start(&[&pool, "--innodb-flush-log-at-trx-commit=2"])?;
    let mode = if args.idle { Mode::OnDemand } else { Mode::Resident };
    let mut found = Vec::new();
    for (workload, name) in WORKLOADS {
        let (mut with, mut without, mut costs) = (Vec::new(), Vec::new(), Vec::new());
        let mut workload = Workload {
            name: workload,
            threads: args.threads,
            seed: 1,
            length: Length::Seconds(args.seconds),
        };
        for table in 1..=4 {
            server.sql(&format!("SELECT COUNT(*) FROM sbtest.sbtest{table} WHERE pad != ''"))?;
        }
        let rate = server.transactions_per_second(&workload)?;
        let transactions = (rate * f64::from(args.seconds)) as u64;
        ensure!(transactions > 0, "{name} made no transaction");
        workload.length = Length::Transactions(transactions);
        with_service(&server, mode, || once(&server, &workload, transactions))?;
        for pair in 0..args.pairs {
            workload.seed = 2 + pair;
            for probed in [pair % 2 == 0, pair % 2 != 0] {
                if probed {
                    let (run, cost) = with_service(&server, mode, || once(&server, &workload, transactions))?;
                    with.push(run);
                    costs.push(cost);
                } else {
                    without.push(once(&server, &workload, transactions)?);
                }
            }
            if let (Some(with), Some(without)) = (with.last(), without.last()) {
                eprintln!(
                    "  {name}: pair {} of {}, {transactions} transactions: throughput {:.4}, processor time {:.4}",
                    pair + 1,
                    args.pairs,
                    with.transactions_per_second / without.transactions_per_second,
                    with.cpu / without.cpu
                );
            }
        }
        let rate = |runs: &[Run]| runs.iter().map(|run| run.transactions_per_second).collect();
        let cpu = |runs: &[Run]| runs.iter().map(|run| run.cpu).collect();
        let samples = |what: &str, unit, samples, baseline: Option<Vec<f64>>| Samples {
            name: format!("{name}_{what}"),
            unit,
            samples,
            paired: baseline.is_some(),
            baseline,
        };
        let cost = |of: fn(&Cost) -> f64| costs.iter().map(of).collect();
        found.extend([
            samples("throughput", "1/s", rate(&with), Some(rate(&without))),
            samples("cpu_per_1000_transactions", "s", cpu(&with), Some(cpu(&without))),
            samples("hits_per_second", "1/s", cost(|cost| cost.hits), None),
            samples("kernel_time_per_second", "s/s", cost(|cost| cost.kernel_seconds), None),
            samples("probe_cpu_per_second", "s/s", cost(|cost| cost.service_seconds), None),
        ]);
    }
    let hits = vec![idle_hits(&server, args)?];
    found.push(Samples {
        name: "on_demand_idle_hits".into(),
        unit: "hits",
        samples: hits,
        baseline: None,
        paired: false,
    });
    Ok(found)
}

fn once(server: &Server, workload: &Workload<'_>, transactions: u64) -> Result<Run> {
    let before = cpu_seconds(server.pid())?;
    let transactions_per_second = server.transactions_per_second(workload)?;
    let cpu = (cpu_seconds(server.pid())? - before) * 1000.0 / transactions as f64;
    Ok(Run { transactions_per_second, cpu })
}

/// Does something while a service, as `guest-probe run` is one, runs in this process; when this returns, no probe is left.
fn with_service(server: &Server, mode: Mode, work: impl FnOnce() -> Result<Run>) -> Result<(Run, Cost)> {
    let running = Running::start(service(server, mode))?;
    let held = Held::by(std::process::id())?;
    let before = programs(&running)?;
    let (start, busy) = (Instant::now(), own_cpu()?);
    let run = work()?;
    let (seconds, busy) = (start.elapsed().as_secs_f64(), own_cpu()? - busy);
    let after = programs(&running)?;
    let status = running.status()?;
    ensure!(status.servers.iter().all(|server| server.events_lost == 0), "events were lost: {status}");
    ensure!((mode == Mode::Resident) == (status.servers.len() == 1), "{status}");
    let hits = (after.0 - before.0) as f64 / seconds;
    let kernel_seconds = (after.1 - before.1) as f64 / 1e9 / seconds;
    running.end()?;
    // The kernel takes programs away some time after their last user has gone.
    wait_for("the kernel to forget the probes", || Ok(held.still_there().is_empty()))?;
    Ok((run, Cost { hits, kernel_seconds, service_seconds: busy.as_secs_f64() / seconds }))
}

/// A service for this server alone. The kernel's counting costs some 20 ns a hit, which is thus in the figures with probes.
fn service(server: &Server, mode: Mode) -> ServiceOptions {
    ServiceOptions { choice: Choice::One(server.pid()), ..options(mode, "".into()) }
}

/// Runs of all programs and nanoseconds in them.
fn programs(running: &Running) -> Result<(u64, u64)> {
    let status = running.status()?;
    let programs = || status.servers.iter().flat_map(|server| &server.programs);
    ensure!(status.servers.is_empty() || programs().count() > 0, "no program is counted");
    Ok((programs().map(|program| program.runs).sum(), programs().map(|program| program.nanoseconds).sum()))
}

/// Hits while a service on demand waits for a request and the server works: counted by the kernel in all programs that this
/// process holds, and none may be in mysqld's code either.
fn idle_hits(server: &Server, args: &Args) -> Result<f64> {
    let _counting = statistics::count()?;
    let running = Running::start(service(server, Mode::OnDemand))?;
    let length = Length::Seconds(args.seconds);
    let workload = Workload { name: "oltp_read_write", threads: args.threads, seed: 1, length };
    server.transactions_per_second(&workload)?;
    let held = Held::by(std::process::id())?;
    let mut hits = 0;
    for program in &held.programs {
        hits += runs(*program)?;
    }
    ensure!(held.links.is_empty(), "something is attached: {held:?}");
    running.end()?;
    Ok(hits as f64)
}

/// Processor time of this process so far: that of the service, since nothing else here does anything while sysbench runs.
fn own_cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let duration = |time: nix::sys::time::TimeVal| {
        Duration::from_micros(time.tv_sec() as u64 * 1_000_000 + time.tv_usec() as u64)
    };
    Ok(duration(usage.user_time()) + duration(usage.system_time()))
}

/// Processor time of a process so far, in seconds.
fn cpu_seconds(pid: i32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15, counted from behind the name, which may hold spaces (proc_pid_stat(5)); in hundredths.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("a short stat")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}
