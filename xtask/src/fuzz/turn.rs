//! One target under libFuzzer until it has had so much of the processors.
//!
//! Not by the clock, as libFuzzer's `-max_total_time` goes: on a machine that has other work, or sleeps, that says little of how much was tried.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::{Target, corpus, fuzzer, seeds, work};
use crate::ending;

/// How often a running target is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Ticks of a second in /proc, on the machines that Poolskip is made for (`USER_HZ`).
const TICKS: u64 = 100;

/// What a turn came to.
#[derive(Debug, Default)]
pub struct Turn {
    /// Time of the processors, of all its threads.
    pub had: Duration,
    /// Inputs that were tried.
    pub runs: u64,
    /// Edges of the program that they reached.
    pub edges: u64,
    /// Inputs of the corpus at the end.
    pub inputs: u64,
    /// Where the input lies that made something fail, and the last lines that the program wrote.
    pub finding: Option<String>,
}

/// Runs a target until it has had so much of the processors, or finds something.
///
/// # Errors
/// When it cannot be run.
pub fn run(program: &Path, target: &Target, length: Duration) -> Result<Turn> {
    let work = work(target)?;
    let mut prefix = OsString::from("-artifact_prefix=");
    prefix.push(work.join(""));
    let log = work.join("log");
    let mut child = fuzzer(program, target)
        .arg("-print_final_stats=1")
        .arg(prefix)
        // What it makes up goes into the first, and is there when it is run again.
        .args([work.join("corpus"), corpus(target), seeds(target)])
        .stdout(Stdio::null())
        .stderr(File::create(&log).with_context(|| format!("cannot write {}", log.display()))?)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    ending::register_process(child.id())?;
    let ended = wait_for(&mut child, length);
    ending::forget_process(child.id());
    let (status, had) = ended?;
    let words = fs::read(&log)?;
    Ok(told(&String::from_utf8_lossy(&words), status, had))
}

/// Asks it to end when it has had its time, and waits until it has ended.
fn wait_for(child: &mut Child, length: Duration) -> Result<(ExitStatus, Duration)> {
    let pid = Pid::from_raw(i32::try_from(child.id()).context("a process has a number")?);
    let stat = format!("/proc/{pid}/stat");
    let mut asked = false;
    loop {
        let seen = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT)?;
        // What has ended and was not waited for still has its line there, with all that it had.
        let line = fs::read_to_string(&stat).with_context(|| format!("cannot read {stat}"))?;
        let had = processor_time(&line).with_context(|| format!("{stat} has no times: {line:?}"))?;
        if seen != WaitStatus::StillAlive {
            return Ok((child.wait()?, had));
        }
        if had >= length && !asked {
            // libFuzzer ends after the input that it is at.
            kill(pid, Signal::SIGUSR1)?;
            asked = true;
        }
        thread::sleep(LOOK);
    }
}

/// What a process has had of the processors, by its line of /proc/PID/stat (proc(5): utime and stime, the fields 14 and 15).
fn processor_time(line: &str) -> Option<Duration> {
    // The program's name may have blanks and brackets in it.
    let (_, rest) = line.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()?.checked_add(fields.next()?.parse().ok()?)?;
    Some(Duration::from_millis(ticks * 1000 / TICKS))
}

/// What the program's words say.
fn told(words: &str, status: ExitStatus, had: Duration) -> Turn {
    let finding = (!status.success()).then(|| {
        let lines: Vec<&str> = words.lines().collect();
        let said = lines.iter().position(|line| line.contains("panicked at"));
        let said = said.unwrap_or(lines.len().saturating_sub(30));
        format!("{status}\n{}", lines[said..].join("\n"))
    });
    let last = |word: &str| words.lines().rev().find_map(|line| number_after(line, word)).unwrap_or(0);
    Turn {
        had,
        runs: last("stat::number_of_executed_units:"),
        edges: last("cov:"),
        inputs: last("corp:"),
        finding,
    }
}

/// The number that follows a word in a line.
fn number_after(line: &str, word: &str) -> Option<u64> {
    let (_, rest) = line.split_once(word)?;
    let rest = rest.trim_start();
    rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())].parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn libfuzzer_s_numbers_are_read() {
        let line = "#4194304\tpulse  cov: 91 ft: 205 corp: 47/6214b lim: 4096 exec/s: 2097152 rss: 54Mb";
        assert_eq!((number_after(line, "cov:"), number_after(line, "corp:")), (Some(91), Some(47)));
        assert_eq!(number_after("stat::number_of_executed_units: 12", "executed_units:"), Some(12));
        assert_eq!(number_after("cov:", "cov:"), None);
    }

    #[test]
    fn processor_time_is_read_behind_the_name() {
        let line = "7 (a ) name) R 1 7 7 0 -1 4194304 95 0 0 0 250 50 0 0 20 0 1 0 100 2 3\n";
        assert_eq!(processor_time(line), Some(Duration::from_secs(3)));
        assert_eq!(processor_time("7 (name) R 1 7"), None);
        assert_eq!(processor_time(""), None);
    }

    #[test]
    fn a_process_has_its_time_and_is_asked_to_end() {
        // It ends by itself half a minute later than it is asked, were it by the clock; what it sleeps does not count.
        let words = "trap 'exit 3' USR1; sleep 1; while :; do :; done";
        let mut child = Command::new("bash").args(["-c", words]).spawn().unwrap();
        let (status, had) = wait_for(&mut child, Duration::from_millis(300)).unwrap();
        assert_eq!(status.code(), Some(3));
        assert!(had >= Duration::from_millis(300), "{had:?}");
        // One that ends before.
        let mut child = Command::new("bash").args(["-c", "exit 4"]).spawn().unwrap();
        let (status, _) = wait_for(&mut child, Duration::from_secs(1000)).unwrap();
        assert_eq!(status.code(), Some(4));
    }
}
