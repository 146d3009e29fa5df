//! `cargo xtask fuzz`: runs the fuzz targets of `tests/fuzz` under libFuzzer.
//!
//! The engine and the flags are those of cargo-fuzz, without its need of a nightly compiler: what counts coverage is LLVM's own pass, which the
//! stable compiler runs when `-C passes` names it. What only nightly has is the address sanitizer; it finds little in code that has no `unsafe` in
//! its parsers, and overflows are checked in this build as in any debug build.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

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
/// An input that takes longer is a finding; a slow machine is given time.
const SLOWEST: Duration = Duration::from_secs(30);
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
    /// How long each runs
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Targets that run at once [default: as many as there are processors]
    #[arg(long, value_name = "NUMBER")]
    jobs: Option<usize>,
    /// Afterwards take what was found into the corpus in the tree: some of the fewest inputs that cover the same as all
    #[arg(long)]
    keep: bool,
    /// Say which targets there are
    #[arg(long)]
    list: bool,
}

/// A target, as the program tells of it.
struct Target {
    name: String,
    longest: usize,
    about: String,
}

/// What a run came to.
struct Outcome {
    name: String,
    /// Inputs that were tried.
    runs: u64,
    /// Edges of the program that they reached.
    edges: u64,
    /// Inputs of the corpus at the end.
    inputs: u64,
    /// Where the input lies that made something fail, and the last lines that the program wrote.
    finding: Option<String>,
}

/// Builds, runs, and says what came of it.
///
/// # Errors
/// When a target has a finding; after all have run.
pub fn run(args: &Args) -> Result<()> {
    setup::ensure()?;
    let program = build()?;
    let targets = targets(&program)?;
    if args.list {
        targets.iter().for_each(|target| println!("{:<22}{}", target.name, target.about));
        return Ok(());
    }
    if let Some(unknown) = args.targets.iter().find(|name| targets.iter().all(|target| target.name != **name))
    {
        bail!("there is no target {unknown:?}; `cargo xtask fuzz --list` says which there are");
    }
    let mut chosen = targets;
    chosen.retain(|target| args.targets.is_empty() || args.targets.contains(&target.name));
    let jobs = args.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let outcomes = step("fuzz", || run_all(&program, &chosen, args.seconds, jobs))?;
    report(&outcomes)?;
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
    let program = build()?;
    let targets = targets(&program)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    report(&step("fuzz", || run_all(&program, &targets, seconds, jobs))?)
}

fn build() -> Result<PathBuf> {
    let directory = root().join("target/fuzz");
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
    Ok(directory.join(MACHINE).join("fuzz/fuzz"))
}

fn targets(program: &Path) -> Result<Vec<Target>> {
    let mut command = Command::new(program);
    command.env("POOLSKIP_FUZZ_TARGET", "seeds").env("POOLSKIP_FUZZ_SEEDS", root().join("target/fuzz/seeds"));
    let lines = crate::step::run(&mut command)?;
    let lines = String::from_utf8(lines).context("the fuzz program's list of targets is no text")?;
    lines
        .lines()
        .map(|line| {
            let mut fields = line.splitn(3, '\t');
            let (name, longest, about) = (fields.next(), fields.next(), fields.next());
            Ok(Target {
                name: name.unwrap_or_default().to_owned(),
                longest: longest.unwrap_or_default().parse().with_context(|| format!("{line:?}"))?,
                about: about.unwrap_or_default().to_owned(),
            })
        })
        .collect()
}

fn run_all(program: &Path, targets: &[Target], seconds: u64, jobs: usize) -> Result<Vec<Outcome>> {
    let waiting = Mutex::new(targets.iter());
    let mut outcomes = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1))
            .map(|_| {
                scope.spawn(|| {
                    let mut outcomes = Vec::new();
                    loop {
                        let next = waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
                        let Some(target) = next else { return outcomes };
                        outcomes.push(run_one(program, target, seconds));
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<Result<Vec<_>>>()
    })?;
    outcomes.sort_by_key(|outcome| targets.iter().position(|target| target.name == outcome.name));
    Ok(outcomes)
}

/// Where a target's run keeps what it makes up.
fn work(target: &Target) -> Result<PathBuf> {
    let work = root().join("target/fuzz/work").join(&target.name);
    fs::create_dir_all(work.join("corpus"))?;
    fs::create_dir_all(corpus(target))?;
    Ok(work)
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
        .arg(format!("-timeout={}", SLOWEST.as_secs()))
        .arg(format!("-rss_limit_mb={MOST_MEMORY}"))
        .stdin(Stdio::null());
    command
}

fn run_one(program: &Path, target: &Target, seconds: u64) -> Result<Outcome> {
    let work = work(target)?;
    let mut prefix = OsString::from("-artifact_prefix=");
    prefix.push(work.join(""));
    let output = fuzzer(program, target)
        .arg(format!("-max_total_time={seconds}"))
        .arg("-print_final_stats=1")
        .arg(prefix)
        // What it makes up goes into the first, and is there when it is run again.
        .args([work.join("corpus"), corpus(target), seeds(target)])
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let words = String::from_utf8_lossy(&output.stderr);
    let finding = (!output.status.success()).then(|| {
        let lines: Vec<&str> = words.lines().collect();
        let said = lines
            .iter()
            .position(|line| line.contains("panicked at"))
            .unwrap_or(lines.len().saturating_sub(30));
        format!("{}\n{}", output.status, lines[said..].join("\n"))
    });
    let last = |word: &str| words.lines().rev().find_map(|line| number_after(line, word));
    Ok(Outcome {
        name: target.name.clone(),
        runs: last("stat::number_of_executed_units:").unwrap_or(0),
        edges: last("cov:").unwrap_or(0),
        inputs: last("corp:").unwrap_or(0),
        finding,
    })
}

/// The number that follows a word in a line.
fn number_after(line: &str, word: &str) -> Option<u64> {
    let (_, rest) = line.split_once(word)?;
    let rest = rest.trim_start();
    rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())].parse().ok()
}

fn report(outcomes: &[Outcome]) -> Result<()> {
    println!("{:<22}{:>12}{:>8}{:>8}", "target", "inputs tried", "edges", "corpus");
    for Outcome { name, runs, edges, inputs, finding } in outcomes {
        let verdict = if finding.is_some() { "  FOUND SOMETHING" } else { "" };
        println!("{name:<22}{runs:>12}{edges:>8}{inputs:>8}{verdict}");
    }
    let found: Vec<_> = outcomes.iter().filter_map(|it| Some((&it.name, it.finding.as_ref()?))).collect();
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
    fn libfuzzer_s_numbers_are_read() {
        let line = "#4194304\tpulse  cov: 91 ft: 205 corp: 47/6214b lim: 4096 exec/s: 2097152 rss: 54Mb";
        assert_eq!((number_after(line, "cov:"), number_after(line, "corp:")), (Some(91), Some(47)));
        assert_eq!(number_after("stat::number_of_executed_units: 12", "executed_units:"), Some(12));
        assert_eq!(number_after("cov:", "cov:"), None);
    }
}
