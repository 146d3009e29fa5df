//! Many migrations to and fro in one lab, under load: the proof after each, and that nothing grows. `cargo xtask test --soak MIGRATIONS`.
//!
//! It takes minutes a migration, so it may end at any time and be begun again: what was done is kept in the user's cache directory, under
//! the hash of the programs, and the next run goes on from there, in a lab of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::bed::Bed;
use super::guest_cases::{is_log_dirty, kernel_is_content, only_here, wait_for};
use crate::cache::{self, Key};
use crate::deployment::{Deployment, MIGRATOR, host};
use crate::lab::{Flavour, Host, Lab, Spawned};
use crate::migration::{DOMAIN, PLAIN, Report, send};
use crate::proof::{self, Writer};
use crate::step::step;

/// Migrations in each direction after which nothing may grow any more: what is made once has been made.
const WARM_UP: usize = 1;

/// What was done of a soak.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Progress {
    /// Migrations that were asked for.
    goal: u32,
    /// Those that were done.
    done: Vec<Done>,
}

/// One migration.
#[derive(Debug, Serialize, Deserialize)]
struct Done {
    /// Which lab it was in, counted from 1.
    lab: u32,
    /// Where the guest was.
    from: String,
    /// From the command's start to its end.
    seconds: f64,
    /// Pages compared; none of them differed.
    pages_verified: u64,
    /// References that the target took from storage.
    pages_accepted: u64,
    /// Those that it refused.
    pages_refused: u64,
    /// Transactions that the client was told were committed, since the lab was raised.
    transactions: u64,
    /// What each host has afterwards.
    left: BTreeMap<String, Left>,
}

/// What there is on a host once a migration is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Left {
    /// Resident memory of the receiver that runs all the while.
    receiver_kib: u64,
    /// Files that it has open, sockets too.
    receiver_files: u64,
    receiver_threads: u64,
    /// Our processes, and `xl`'s.
    processes: u64,
    /// Nodes of xenstore.
    nodes: u64,
    /// Files in all file systems that are written to, but for records, each with its lock, and Xen's logs.
    files: u64,
    /// Xen's logs, of which libxl keeps the last ten of each name.
    logs: u64,
    /// Records of migrations, of the side that has more of them; the newest hundred of each are kept.
    records: u64,
    /// Memory that the hypervisor has to give.
    free_mib: u64,
}

/// Records of a side that are kept, and the one of the last migration.
const RECORDS_MOST: u64 = 101;
/// Names of logs: two of the guest's, each with and without `--incoming`; and Xen's own few.
const LOGS_MOST: u64 = 50;
/// What a process's allocator may keep for itself.
const RECEIVER_SLACK_KIB: u64 = 4096;

impl Left {
    fn read(lab: &Lab, at: Host) -> Result<Self> {
        // Each process that starts is slow under emulation: one shell, few programs.
        let words = host(
            lab,
            at,
            "p=$(cat /run/receiver.pid); grep -e ^VmRSS -e ^Threads /proc/$p/status; set -- /proc/$p/fd/*; echo Files: $#; \
             echo Processes: $(pgrep -c -f '[d]om0-migrator|[x]l migrate'); echo Nodes: $(xenstore-ls -f | wc -l); \
             echo All: $(find / /run /tmp -xdev -path /var/log/xen -prune -o -type f -print | wc -l); \
             echo Logs: $(find /var/log/xen -type f | wc -l); \
             for side in source target; do echo Records of $side: $(find /var/lib/poolskip/migrations -name \"*-$side.json\" | wc -l); done; \
             xl info | grep ^free_memory",
        )?;
        Self::parse(&words).with_context(|| format!("on {at:?}: {words:?}"))
    }

    fn parse(words: &str) -> Result<Self> {
        let number = |name: &str| -> Result<u64> {
            let line = words.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
            let line = line.with_context(|| format!("nothing is said of {name}"))?;
            let number = line.split_whitespace().next().and_then(|field| field.parse().ok());
            number.with_context(|| format!("{name} is no number: {line:?}"))
        };
        let [sources, targets] = [number("Records of source")?, number("Records of target")?];
        // What else lies beside them is counted as any other file.
        let with_locks = 2 * (sources + targets);
        Ok(Self {
            receiver_kib: number("VmRSS")?,
            receiver_files: number("Files")?,
            receiver_threads: number("Threads")?,
            processes: number("Processes")?,
            nodes: number("Nodes")?,
            files: number("All")?
                .checked_sub(with_locks)
                .context("fewer files than records and their locks")?,
            logs: number("Logs")?,
            records: sources.max(targets),
            free_mib: number("free_memory")?,
        })
    }

    /// What has grown since, when the guest was at the same place.
    fn grown_since(&self, before: &Self) -> Vec<String> {
        let counts = [
            ("files that the receiver has open", before.receiver_files, self.receiver_files),
            ("the receiver's threads", before.receiver_threads, self.receiver_threads),
            ("processes", before.processes, self.processes),
            ("nodes of xenstore", before.nodes, self.nodes),
            ("files", before.files, self.files),
            ("the receiver's memory in KiB", before.receiver_kib + RECEIVER_SLACK_KIB, self.receiver_kib),
            ("records", RECORDS_MOST, self.records),
            ("Xen's logs", LOGS_MOST, self.logs),
            // What the hypervisor has less was not given back.
            ("memory in MiB that the hypervisor misses", self.free_mib, before.free_mib),
        ];
        let grown = counts.into_iter().filter(|(_, most, now)| now > most);
        grown.map(|(what, most, now)| format!("{what}: {now}, {most} at most")).collect()
    }
}

/// Migrates so many times in all, as many of them now as fit into the time.
///
/// # Errors
/// When a migration fails, a page differs, a transaction is lost, or something grows.
pub(super) fn run(goal: u32, most: Option<Duration>) -> Result<()> {
    let began = Instant::now();
    let deployment = Deployment::build(Flavour::Pv)?;
    let key = Key::new("soak-1").with(deployment.identity()?.as_bytes());
    let path = cache::dir()?.join(format!("soak-{}", key.hex())).join("migrations.json");
    println!("what is done is kept in {}", path.display());
    let mut progress = Progress::read(&path, goal)?;
    if let done @ 1.. = progress.done.len() {
        println!("{done} of {goal} migrations were done before");
    }
    let bed = Bed::raise(&deployment, Flavour::Pv)?;
    let lab = &bed.lab;
    let number = progress.done.last().map_or(1, |last| last.lab + 1);
    let _receivers = Host::BOTH.map(|at| receiver(lab, at)).into_iter().collect::<Result<Vec<_>>>()?;
    let writer = step("starting a client that writes", || Writer::start(lab))?;
    let mut longest = Duration::ZERO;
    let mut grown = Ok(());
    while progress.done.len() < goal as usize {
        if most.is_some_and(|most| began.elapsed() + longest > most) {
            println!("the time is over; the next run goes on");
            break;
        }
        let start = Instant::now();
        let done = once(&bed, &writer, number)
            .with_context(|| format!("migration {} of {goal}, in lab {number}", progress.done.len() + 1))?;
        longest = longest.max(start.elapsed());
        println!("{}", done.line(progress.done.len() + 1, goal));
        progress.done.push(done);
        // One after which something had grown is not done, and the next run does not go on behind it; the client's word is compared still.
        grown = progress.look_for_growth(number);
        if let Err(what) = &grown {
            println!("{what:#}");
            break;
        }
        progress.write(&path)?;
    }
    let transactions = step("comparing what the client was told", || writer.finish(lab))?;
    let tables = proof::tables(lab)?;
    step("CHECK TABLE", || proof::check_tables(lab, &tables))?;
    kernel_is_content(lab)?;
    println!("{transactions} transactions in this lab, none of them lost");
    grown?;
    println!("{} of {goal} migrations; nothing has grown", progress.done.len());
    Ok(())
}

/// A receiver that stays, as a service does.
fn receiver(lab: &Lab, at: Host) -> Result<Spawned> {
    let address = at.address();
    let receiver = lab.host(at).spawn(&format!(
        "echo $BASHPID >/run/receiver.pid; exec {MIGRATOR} receive --listen {address}:8002 {PLAIN}"
    ))?;
    receiver.wait_for("ready to receive", Duration::from_secs(120))?;
    Ok(receiver)
}

fn once(bed: &Bed<'_>, writer: &Writer, lab_number: u32) -> Result<Done> {
    let lab = &bed.lab;
    let from = lab.guest_host()?;
    let before = writer.acknowledged(lab)?;
    let report: Report = send(lab, from, &["--debug"])?;
    ensure!(
        report.verify_mismatches == Some(0) && report.pages_verified.unwrap_or(0) > 0,
        "pages differ at the target, or none was compared: {report:?}"
    );
    let pages_accepted = report.pages_accepted.unwrap_or(0);
    ensure!(pages_accepted > 0, "nothing was taken from storage: {report:?}");
    ensure!(lab.guest_host()? == from.other(), "the guest is not where it should be");
    only_here(lab, from.other())?;
    for at in Host::BOTH {
        wait_for("dirty logging to be off", || Ok(!is_log_dirty(lab, at)?))?;
    }
    ensure!(proof::server(lab)? == bed.server, "mysqld is another process");
    let mut transactions = 0;
    wait_for("a transaction at the target", || {
        transactions = writer.acknowledged(lab)?;
        Ok(transactions > before)
    })?;
    let left = Host::BOTH.iter().map(|&at| Ok((at.name().to_owned(), Left::read(lab, at)?)));
    Ok(Done {
        lab: lab_number,
        from: from.name().to_owned(),
        seconds: report.total_seconds,
        pages_verified: report.pages_verified.unwrap_or(0),
        pages_accepted,
        pages_refused: report.pages_refused.unwrap_or(0),
        transactions,
        left: left.collect::<Result<_>>()?,
    })
}

impl Done {
    fn line(&self, number: usize, goal: u32) -> String {
        let mut line = format!(
            "migration {number} of {goal} from {}: {:.0} s, {} pages compared, {} from storage, {} refused, {} transactions;",
            self.from,
            self.seconds,
            self.pages_verified,
            self.pages_accepted,
            self.pages_refused,
            self.transactions
        );
        for (host, left) in &self.left {
            line.push_str(&format!(
                " {host}: receiver {} KiB, {} files, {} threads; {} nodes, {} files, {} records, {} MiB free;",
                left.receiver_kib,
                left.receiver_files,
                left.receiver_threads,
                left.nodes,
                left.files,
                left.records,
                left.free_mib
            ));
        }
        line
    }
}

impl Progress {
    /// What was done of the same soak; an empty one when there is none, or it was done.
    fn read(path: &Path, goal: u32) -> Result<Self> {
        let kept = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is not what was written: remove it", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        Ok(kept.resumed(goal))
    }

    fn resumed(self, goal: u32) -> Self {
        if self.done.len() < self.goal as usize && self.goal == goal {
            return self;
        }
        Self { goal, done: Vec::new() }
    }

    fn write(&self, path: &Path) -> Result<()> {
        let new = path.with_extension("new");
        fs::create_dir_all(path.parent().context("the file lies in no directory")?)?;
        fs::write(&new, serde_json::to_vec_pretty(self)?)
            .and_then(|()| fs::rename(&new, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Compares what the hosts have with what they had when the guest was at the same place first, after a while.
    fn look_for_growth(&self, lab: u32) -> Result<()> {
        let Some(last) = self.done.last() else { return Ok(()) };
        let same: Vec<_> =
            self.done.iter().filter(|done| done.lab == lab && done.from == last.from).skip(WARM_UP).collect();
        let Some(first) = same.first() else { return Ok(()) };
        let mut grown = Vec::new();
        for (host, left) in &last.left {
            let before = first.left.get(host).context("a host is missing")?;
            grown.extend(left.grown_since(before).into_iter().map(|what| format!("{host}: {what}")));
        }
        if !grown.is_empty() {
            bail!(
                "after {} migrations of {DOMAIN} in this lab something has grown: {}",
                self.done.len(),
                grown.join("; ")
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: &str = "VmRSS:\t    5120 kB\nThreads:\t3\nFiles: 12\nProcesses: 1\nNodes: 340\nAll: 870\nLogs: 9\n\
                         Records of source: 3\nRecords of target: 8\n\
                         free_memory            : 2048\n";

    fn left() -> Left {
        Left::parse(WORDS).unwrap()
    }

    fn done(lab: u32, from: &str, left: Left) -> Done {
        Done {
            lab,
            from: from.into(),
            seconds: 60.0,
            pages_verified: 1,
            pages_accepted: 1,
            pages_refused: 0,
            transactions: 1,
            left: [("target".to_owned(), left)].into(),
        }
    }

    #[test]
    fn what_is_left_is_read() {
        let left = left();
        assert_eq!((left.receiver_kib, left.receiver_threads, left.receiver_files), (5120, 3, 12));
        assert_eq!((left.nodes, left.files, left.records, left.free_mib), (340, 848, 8, 2048));
        assert!(Left::parse(&WORDS.replace("Nodes: 340", "Nodes: ")).is_err());
        assert!(Left::parse(&WORDS.replace("Nodes: 340\n", "")).is_err());
    }

    #[test]
    fn growth_is_seen_after_the_warm_up_and_only_where_the_guest_is_at_the_same_place() {
        let mut progress = Progress { goal: 100, done: Vec::new() };
        for nodes in [300, 340, 340, 340] {
            for (from, more) in [("source", 0), ("target", 50)] {
                progress.done.push(done(2, from, Left { nodes: nodes + more, ..left() }));
                progress.look_for_growth(2).unwrap();
            }
        }
        progress.done.push(done(2, "source", Left { nodes: 341, ..left() }));
        let problem = progress.look_for_growth(2).unwrap_err().to_string();
        assert!(problem.contains("target: nodes of xenstore: 341, 340 at most"), "{problem}");
        // Another lab begins anew.
        progress.done.push(done(3, "source", Left { nodes: 500, ..left() }));
        progress.look_for_growth(3).unwrap();
    }

    #[test]
    fn each_thing_may_grow_and_is_seen() {
        let before = left();
        assert!(before.grown_since(&before).is_empty());
        let grown = Left {
            receiver_kib: before.receiver_kib + RECEIVER_SLACK_KIB + 1,
            receiver_files: 13,
            receiver_threads: 4,
            processes: 2,
            nodes: 341,
            files: before.files + 1,
            records: 102,
            logs: 51,
            free_mib: 2047,
        };
        assert_eq!(grown.grown_since(&before).len(), 9);
        assert!(before.grown_since(&grown).is_empty());
    }

    #[test]
    fn a_soak_is_gone_on_with_until_it_is_done() {
        let begun = || Progress { goal: 2, done: vec![done(1, "source", left())] };
        assert_eq!(begun().resumed(2).done.len(), 1);
        assert!(begun().resumed(3).done.is_empty());
        let mut whole = begun();
        whole.done.push(done(1, "target", left()));
        assert!(whole.resumed(2).done.is_empty());
    }

    #[test]
    fn what_was_done_is_kept_in_its_file_and_another_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("soak/migrations.json");
        assert!(Progress::read(&path, 2).unwrap().done.is_empty());
        Progress { goal: 2, done: vec![done(1, "source", left())] }.write(&path).unwrap();
        assert_eq!(Progress::read(&path, 2).unwrap().done.len(), 1);
        fs::write(&path, "{").unwrap();
        let problem = Progress::read(&path, 2).unwrap_err().to_string();
        assert!(problem.contains("migrations.json is not what was written: remove it"), "{problem}");
    }
}
