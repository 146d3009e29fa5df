//! `cargo xtask fuzz`: runs the fuzz targets of `tests/fuzz` under libFuzzer.
//!
//! The engine and the flags are those of cargo-fuzz, without its need of a nightly compiler: what counts coverage is LLVM's own pass, which the
//! stable compiler runs when `-C passes` names it. What only nightly has is the address sanitizer; it finds little in code that has no `unsafe` in
//! its parsers, and overflows are checked in this build as in any debug build.

mod code;
mod had;
mod turn;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::code::Code;
use self::had::{Had, Record};
use self::turn::Turn;
use crate::deployment::{cargo, root};
use crate::setup;
use crate::step::step;

/// What the compiler is told, as cargo-fuzz tells it.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];

/// The only machines that Poolskip is made for. Named, so that build scripts and macros are not built with those flags.
const MACHINE: &str = "x86_64-unknown-linux-gnu";
/// Inputs of one target in the tree at most, without findings, and bytes of each.
const KEPT_MOST: usize = 16;
const KEPT_BYTES: u64 = 3 << 10;
/// A target that takes more memory in all is a finding, in MiB.
const MOST_MEMORY: u32 = 2048;

/// Run the fuzz targets.
#[derive(clap::Args)]
pub struct Args {
    /// Only these targets; all when none is named
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each runs, in time of the processors
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Go on, in turns of `--seconds`, until each has had so much in all runs since it last found something and the code that it runs
    /// last changed; what it has had is kept in target/fuzz, so that a long run may be cut into parts, and goes on from what tests/fuzz/had.toml
    /// tells of other checkouts
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    total_seconds: Option<u64>,
    /// Targets that run at once [default: as many as there are processors]
    #[arg(long, value_name = "NUMBER")]
    jobs: Option<usize>,
    /// Afterwards take what was found into the corpus in the tree: some of the fewest inputs that cover the same as all
    #[arg(long)]
    keep: bool,
    /// Afterwards write into tests/fuzz/had.toml, in the tree, what each has had
    #[arg(long)]
    record: bool,
    /// Say which targets there are
    #[arg(long)]
    list: bool,
}

/// A target, as the program tells of it.
struct Target {
    name: String,
    longest: usize,
    about: String,
    /// A hash of the code that it runs.
    code: String,
}

/// What all turns of a target came to.
struct Outcome {
    name: String,
    /// Of this run: time and inputs are sums, the others what they were at the end.
    turn: Turn,
    /// Of all runs.
    had: Had,
}

/// How long each runs.
#[derive(Clone, Copy)]
struct Lengths {
    turn: Duration,
    /// In all runs; none for one turn.
    total: Option<Duration>,
}

/// Builds, runs, and says what came of it.
///
/// # Errors
/// When a target has a finding; after all have run.
pub fn run(args: &Args) -> Result<()> {
    setup::ensure()?;
    let (program, targets) = build()?;
    if args.list {
        targets.iter().for_each(|target| println!("{:<22}{}", target.name, target.about));
        return Ok(());
    }
    if let Some(unknown) = args.targets.iter().find(|name| targets.iter().all(|target| target.name != **name))
    {
        bail!("there is no target {unknown:?}; `cargo xtask fuzz --list` says which there are");
    }
    let mut record = Record::read(&record_path())?;
    let names: Vec<String> = targets.iter().map(|target| target.name.clone()).collect();
    let mut chosen = targets;
    chosen.retain(|target| args.targets.is_empty() || args.targets.contains(&target.name));
    chosen.iter().try_for_each(|target| record.begin(&target.name, &work(target)?, &target.code))?;
    let jobs = args.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let lengths = Lengths {
        turn: Duration::from_secs(args.seconds),
        total: args.total_seconds.map(Duration::from_secs),
    };
    let outcomes = step("fuzz", || run_all(&program, &chosen, lengths, jobs))?;
    let reported = report(&outcomes);
    if args.record {
        for Outcome { name, turn, had } in &outcomes {
            match turn.finding {
                Some(_) => record.forget(name),
                None => record.enter(name, had),
            }
        }
        record.write(&record_path(), &names.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    reported?;
    if args.keep {
        chosen.iter().try_for_each(|target| keep(&program, target))?;
    }
    Ok(())
}

/// Runs every target for so long: a part of `cargo xtask test`.
///
/// # Errors
/// When a target has a finding.
pub fn smoke(seconds: u64) -> Result<()> {
    let (program, targets) = build()?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let lengths = Lengths { turn: Duration::from_secs(seconds), total: None };
    report(&step("fuzz", || run_all(&program, &targets, lengths, jobs))?)
}

fn build() -> Result<(PathBuf, Vec<Target>)> {
    let directory = root().join("target/fuzz");
    // Before the compiler reads it: what changes meanwhile is other code than what was tried.
    let code = Code::read(root())?;
    step("build the fuzz targets", || {
        let mut command = cargo();
        command
            .args([
                "build",
                "--locked",
                "--package=fuzz",
                "--bin=fuzz",
                "--features=libfuzzer",
                "--profile=fuzz",
            ])
            .arg(format!("--target={MACHINE}"))
            .arg("--target-dir")
            .arg(&directory)
            .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\u{1f}"));
        crate::step::run(&mut command).map(drop)
    })?;
    let program = directory.join(MACHINE).join("fuzz/fuzz");
    let targets = targets(&program, &code)?;
    Ok((program, targets))
}

fn targets(program: &Path, code: &Code) -> Result<Vec<Target>> {
    let mut command = Command::new(program);
    command.env("POOLSKIP_FUZZ_TARGET", "seeds").env("POOLSKIP_FUZZ_SEEDS", root().join("target/fuzz/seeds"));
    let lines = crate::step::run(&mut command)?;
    let lines = String::from_utf8(lines).context("the fuzz program's list of targets is no text")?;
    lines
        .lines()
        .map(|line| {
            let mut fields = line.splitn(4, '\t').map(str::to_owned);
            let mut field = || fields.next().unwrap_or_default();
            let (name, longest, rooms, about) = (field(), field(), field(), field());
            Ok(Target {
                code: code.of(&name, rooms.split(','))?,
                name,
                longest: longest.parse().with_context(|| format!("{line:?}"))?,
                about,
            })
        })
        .collect()
}

fn run_all(program: &Path, targets: &[Target], lengths: Lengths, jobs: usize) -> Result<Vec<Outcome>> {
    let mut waiting = Vec::new();
    let mut done = Vec::new();
    for target in targets {
        let had = Had::read(&work(target)?, &target.code)?;
        let left = lengths.total.map_or(lengths.turn, |total| had.left(total));
        let outcome = Outcome { name: target.name.clone(), turn: Turn::default(), had };
        if left.is_zero() { done.push(outcome) } else { waiting.push((left, target, outcome)) }
    }
    let waiting = Mutex::new(waiting);
    let work_off = || {
        let mut outcomes = Vec::new();
        while let Some((left, target, outcome)) = take_most(&waiting) {
            let (left, outcome) = one_turn(program, target, outcome, left, lengths)?;
            if left.is_zero() || outcome.turn.finding.is_some() {
                outcomes.push(outcome);
            } else {
                waiting.lock().unwrap_or_else(PoisonError::into_inner).push((left, target, outcome));
            }
        }
        Ok::<_, anyhow::Error>(outcomes)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work_off)).collect();
        for worker in workers {
            done.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok::<_, anyhow::Error>(())
    })?;
    done.sort_by_key(|outcome| targets.iter().position(|target| target.name == outcome.name));
    Ok(done)
}

/// The one to which most is left; the first of several.
fn take_most<T, U>(waiting: &Mutex<Vec<(Duration, T, U)>>) -> Option<(Duration, T, U)> {
    let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
    let most = waiting.iter().map(|(left, ..)| *left).max()?;
    let at = waiting.iter().position(|(left, ..)| *left == most)?;
    Some(waiting.remove(at))
}

/// Runs a target for a turn, and says what is left to it then.
fn one_turn(
    program: &Path,
    target: &Target,
    before: Outcome,
    left: Duration,
    lengths: Lengths,
) -> Result<(Duration, Outcome)> {
    let turn = turn::run(program, target, lengths.turn.min(left))?;
    let had = Had::add(&work(target)?, &target.code, &turn)?;
    if let Some(total) = lengths.total {
        eprintln!("  {}: {:.0} of {} s, {} inputs", target.name, had.seconds, total.as_secs(), had.inputs);
    }
    // What it had beyond a turn's length is no longer due.
    let left = left.saturating_sub(turn.had);
    let turn = Turn { had: before.turn.had + turn.had, runs: before.turn.runs + turn.runs, ..turn };
    Ok((left, Outcome { turn, had, ..before }))
}

/// Where a target's run keeps what it makes up.
fn work(target: &Target) -> Result<PathBuf> {
    let work = root().join("target/fuzz/work").join(&target.name);
    fs::create_dir_all(work.join("corpus"))?;
    fs::create_dir_all(corpus(target))?;
    Ok(work)
}

/// What is known in the tree.
fn record_path() -> PathBuf {
    root().join("tests/fuzz/had.toml")
}

/// Inputs that are right.
fn seeds(target: &Target) -> PathBuf {
    root().join("target/fuzz/seeds").join(&target.name)
}

fn corpus(target: &Target) -> PathBuf {
    root().join("tests/fuzz/corpus").join(&target.name)
}

fn fuzzer(program: &Path, target: &Target) -> Command {
    let mut command = Command::new(program);
    command
        .env("POOLSKIP_FUZZ_TARGET", &target.name)
        .arg(format!("-max_len={}", target.longest))
        // They go by the clock; the program has a watchdog of its own.
        .args(["-timeout=0", "-report_slow_units=1000000"])
        .arg(format!("-rss_limit_mb={MOST_MEMORY}"))
        .stdin(Stdio::null());
    command
}

fn report(outcomes: &[Outcome]) -> Result<()> {
    let (head, long, earlier) = ("seconds", "of all runs", "earlier code");
    println!(
        "{:<22}{head:>9}{:>14}{long:>13}{:>14}{earlier:>14}{:>8}{:>8}",
        "target", "inputs", "inputs", "edges", "corpus"
    );
    for Outcome { name, turn, had } in outcomes {
        let Turn { runs, edges, inputs, finding, .. } = turn;
        let (now, all, earlier) = (turn.had.as_secs_f64(), had.seconds, had.earlier_seconds);
        let verdict = if finding.is_some() { "  FOUND SOMETHING" } else { "" };
        println!(
            "{name:<22}{now:>9.1}{runs:>14}{all:>13.1}{:>14}{earlier:>14.1}{edges:>8}{inputs:>8}{verdict}",
            had.inputs
        );
    }
    let found: Vec<_> =
        outcomes.iter().filter_map(|it| Some((&it.name, it.turn.finding.as_ref()?))).collect();
    for (name, finding) in &found {
        eprintln!("{name}: {finding}");
    }
    if !found.is_empty() {
        bail!(
            "{} of {} targets found something; the inputs lie in target/fuzz/work/TARGET (mend it, and keep the input as \
             tests/fuzz/corpus/TARGET/found-WHAT)",
            found.len(),
            outcomes.len()
        );
    }
    Ok(())
}

/// Takes into the tree, of what is there and what was made up, the fewest inputs that reach every edge, and of these some of all lengths: the
/// tree keeps enough to begin with, and no more. What once was a finding stays.
fn keep(program: &Path, target: &Target) -> Result<()> {
    let (work, corpus) = (work(target)?, corpus(target));
    let merged = work.join("merged");
    let _ = fs::remove_dir_all(&merged);
    fs::create_dir_all(&merged)?;
    step(&format!("keep the corpus of {}", target.name), || {
        let mut command = fuzzer(program, target);
        command.arg("-set_cover_merge=1").args([&merged, &corpus, &seeds(target), &work.join("corpus")]);
        crate::step::run(&mut command).map(drop)
    })?;
    for entry in fs::read_dir(&corpus)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with("found-") {
            fs::remove_file(entry.path())?;
        }
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(&merged)? {
        let entry = entry?;
        found.push((entry.metadata()?.len(), entry.file_name()));
    }
    found.retain(|(bytes, _)| *bytes <= KEPT_BYTES);
    found.sort();
    for name in spread(&found, KEPT_MOST).map(|(_, name)| name) {
        fs::copy(merged.join(name), corpus.join(name))?;
    }
    Ok(())
}

/// So many of them at most, as far from each other as can be.
fn spread<T>(all: &[T], most: usize) -> impl Iterator<Item = &T> {
    let count = all.len().min(most);
    (0..count).filter_map(move |i| all.get(i * all.len() / count.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_of_all_lengths_are_kept() {
        let all: Vec<u32> = (0..100).collect();
        assert_eq!(spread(&all, 4).copied().collect::<Vec<_>>(), [0, 25, 50, 75]);
        assert_eq!(spread(&all[..3], 4).count(), 3);
        assert_eq!(spread(&all[..0], 4).count(), 0);
    }

    #[test]
    fn whoever_has_had_least_is_next() {
        let seconds = Duration::from_secs;
        let waiting = Mutex::new(vec![(seconds(1), "a", ()), (seconds(3), "b", ()), (seconds(3), "c", ())]);
        let order: Vec<_> = std::iter::from_fn(|| take_most(&waiting)).map(|(_, name, ())| name).collect();
        assert_eq!(order, ["b", "c", "a"]);
    }
}
