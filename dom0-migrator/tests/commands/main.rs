//! The two commands against each other, on this machine, with a stand-in for xl and for xenstore: who is told what in which
//! order, what is cleaned up, and with which exit code it ends. The migration itself is tested in the lab, under real Xen.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

mod between;
mod check;
mod connections;
mod faults;
mod operate;
mod upgrade;
mod xenstored;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dom0_migrator::command::{EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MIGRATED, EXIT_NOT_BEGUN, EXIT_UNDEFINED};
use dom0_migrator::control::{STREAM_VERSION, Token, VERSION};
use dom0_migrator::report_file;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A host: an xl and a xenstore of its own.
struct Host {
    directory: tempfile::TempDir,
    /// How it connects.
    connecting: Vec<String>,
    /// What it runs: ours, or another release's.
    program: PathBuf,
    /// What its commands have at /sys, if not this machine's.
    sysfs: Option<PathBuf>,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let xl = directory.path().join("xl");
        fs::write(&xl, include_str!("xl.sh")).unwrap();
        fs::set_permissions(&xl, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir_all(directory.path().join("xs/local/domain/0")).unwrap();
        fs::write(directory.path().join("xs/local/domain/0/name"), "Domain-0").unwrap();
        xenstored::serve(&directory.path().join("xenstored"), &directory.path().join("xs"));
        let program = env!("CARGO_BIN_EXE_dom0-migrator").into();
        Self { directory, connecting: vec!["--plain".into()], program, sysfs: None }
    }

    /// The same, but that the kernel says there that a Xen runs below it, of a release that is known; no library of that is here.
    fn on_xen(self) -> Self {
        let sysfs = self.directory.path().join("sys");
        let version = sysfs.join("hypervisor/version");
        fs::create_dir_all(&version).unwrap();
        fs::write(version.join("major"), "4\n").unwrap();
        fs::write(version.join("minor"), "17\n").unwrap();
        Self { sysfs: Some(sysfs), ..self }
    }

    fn with_certificates(self, directory: &Path) -> Self {
        Self { connecting: vec!["--certificates".into(), directory.display().to_string()], ..self }
    }

    fn with_domain(self, id: u32, name: &str) -> Self {
        let node = self.node(id);
        fs::create_dir_all(&node).unwrap();
        fs::write(node.join("name"), name).unwrap();
        fs::write(node.join("state"), "running").unwrap();
        self
    }

    fn node(&self, id: u32) -> PathBuf {
        self.directory.path().join(format!("xs/local/domain/{id}"))
    }

    /// Where `migrate` leaves its reports.
    fn reports(&self) -> PathBuf {
        self.directory.path().join("reports")
    }

    /// Names of all domains but dom0.
    fn domains(&self) -> Vec<String> {
        let all = fs::read_dir(self.directory.path().join("xs/local/domain")).unwrap();
        let mut names: Vec<String> =
            all.filter_map(|entry| fs::read_to_string(entry.unwrap().path().join("name")).ok()).collect();
        names.retain(|name| name != "Domain-0");
        names
    }

    fn command(&self, fault: &str) -> Command {
        let directory = self.directory.path();
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = match &self.sysfs {
            None => Command::new(&self.program),
            Some(sysfs) => {
                let mut command = Command::new("unshare");
                let words = r#"mount --bind "$1" /sys && shift && exec "$@""#;
                command.args(["--mount", "sh", "-c", words, "sh"]).arg(sysfs).arg(&self.program);
                command
            }
        };
        command
            .env("PATH", format!("{}:{path}", directory.display()))
            .env("XENSTORED_PATH", directory.join("xenstored"))
            .env("XS", directory.join("xs"))
            .env("POOLSKIP_MIGRATIONS", directory.join("migrations"))
            .env("FAULT", fault)
            .env("POOLSKIP_REPORTS", self.reports())
            .stderr(Stdio::piped());
        command
    }

    /// The domain's state, by its name.
    fn state(&self, name: &str) -> String {
        let all = fs::read_dir(self.directory.path().join("xs/local/domain")).unwrap();
        let found = all
            .flatten()
            .find(|entry| fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found == name));
        found.map_or("absent".into(), |entry| fs::read_to_string(entry.path().join("state")).unwrap())
    }

    /// Runs a command that ends by itself: its exit code and what it printed.
    fn run(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = self.command("");
        command.args(arguments);
        if arguments[0] == "resolve" {
            command.args(&self.connecting);
        }
        let output = command.output().unwrap();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// States of all records, `status` and `list` told.
    fn records(&self, what: &str) -> Vec<(String, bool)> {
        let (_, json) = self.run(&[what, "--json"]);
        let shown: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
        shown.iter().map(|one| (one["state"].as_str().unwrap().into(), one["active"] == true)).collect()
    }

    fn receive(&self, fault: &str, options: &[&str]) -> Receiver {
        self.receive_at(free_address(), fault, options)
    }

    fn receive_at(&self, address: String, fault: &str, options: &[&str]) -> Receiver {
        let mut child = self
            .command(fault)
            .args(["receive", "--listen", &address])
            .args(&self.connecting)
            .args(options)
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("ready to receive") {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "receive has ended");
        }
        // The rest is read, so that the pipe never fills.
        let said = Arc::new(Mutex::new(String::new()));
        let hearing = said.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let mut said = hearing.lock().unwrap();
                said.push_str(&line);
                said.push('\n');
            }
        });
        Receiver { child, address, said }
    }

    fn migrate(&self, fault: &str, domain: &str, address: &str) -> Ended {
        self.start_migrate(fault, domain, address).wait()
    }

    fn start_migrate(&self, fault: &str, domain: &str, address: &str) -> Migrating {
        let json = self.directory.path().join("summary.json");
        let _ = fs::remove_file(&json);
        let mut command = self.command(fault);
        command.args(["migrate", domain, address, "--stock"]).args(&self.connecting).arg("--json").arg(&json);
        Migrating { child: command.spawn().unwrap(), json }
    }
}

fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

struct Receiver {
    child: Child,
    address: String,
    said: Arc<Mutex<String>>,
}

impl Receiver {
    fn exit(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(120);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("receive did not end");
    }

    /// As SIGKILL does: nothing is cleaned up.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Migrating {
    child: Child,
    json: PathBuf,
}

impl Migrating {
    /// As SIGKILL does: nothing is cleaned up.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn wait(self) -> Ended {
        // A migration that hangs is ended, and then fails the test by its exit code.
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let (ended, watched) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            if watched.recv_timeout(Duration::from_secs(300)).is_err_and(|e| e == RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        let output = self.child.wait_with_output().unwrap();
        drop(ended);
        let summary = fs::read(&self.json).ok().map(|json| serde_json::from_slice(&json).unwrap());
        Ended {
            code: output.status.code().unwrap_or(-1),
            summary: summary.unwrap_or_default(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

struct Ended {
    code: i32,
    summary: serde_json::Value,
    stderr: String,
}

impl Ended {
    fn expect(self, code: u8, outcome: &str) -> Self {
        assert_eq!(self.code, i32::from(code), "{}\n{:#}", self.stderr, self.summary);
        assert_eq!(self.summary["outcome"], outcome, "{:#}", self.summary);
        self
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_domain_goes_and_the_bytes_are_counted() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new());
    let mut receiver = target.receive("", &["--once"]);
    // A number names a domain too. The stand-in needs no configuration of it.
    let ended = source.migrate("", "3", &receiver.address).expect(EXIT_MIGRATED, "migrated");
    assert_eq!(ended.summary["domain"], "db1");
    assert!((1_000_000..1_010_000).contains(&ended.summary["wire_bytes"].as_u64().unwrap()));
    assert_eq!(ended.summary["target"]["started"], true);
    assert_eq!(ended.summary["pages_referenced"], serde_json::Value::Null);
    assert_eq!(receiver.exit(), Some(i32::from(EXIT_MIGRATED)));
    assert_eq!((source.domains(), target.domains()), (vec![], vec!["db1".to_owned()]));
}

#[test]
fn every_migration_leaves_a_report() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new());
    let receiver = target.receive("", &[]);
    source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
    let reports: Vec<PathBuf> =
        fs::read_dir(source.reports()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let name = reports[0].file_name().unwrap().to_str().unwrap();
    assert!(reports.len() == 1 && name.starts_with("db1-2") && name.ends_with("Z.json"), "{reports:?}");
    let report = report_file::parse(&fs::read(&reports[0]).unwrap()).unwrap();
    assert_eq!((report.domain.as_str(), report.target.as_str()), ("db1", receiver.address.as_str()));
    assert!((1_000_000..1_010_000).contains(&report.wire_bytes));
    assert_eq!(report.timeline.wire.last().unwrap().bytes, report.number("/wire_bytes").unwrap());
}

#[test]
fn a_report_that_cannot_be_written_is_a_warning() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new());
    let receiver = target.receive("", &[]);
    let mut command = source.command("");
    command.args([
        "migrate",
        "db1",
        &receiver.address,
        "--stock",
        "--plain",
        "--report",
        "/dev/full",
        "--progress",
        "json",
    ]);
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(i32::from(EXIT_MIGRATED)), "{stderr}");
    assert!(stderr.contains("warning") && stderr.contains("/dev/full"), "{stderr}");
    // Every line on stdout is an object; the summary is the last.
    let lines = String::from_utf8(output.stdout).unwrap();
    let events: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events[0]["event"], "begun");
    assert_eq!(events.last().unwrap()["event"], "summary");
    assert_eq!(events.last().unwrap()["summary"]["outcome"], "migrated");
    assert!(!source.reports().exists());
}

#[test]
fn a_killed_receiver_of_xl_leaves_nothing_and_the_daemon_goes_on() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new());
    let receiver = target.receive("target-dies", &[]);
    for _ in 0..2 {
        let ended = source.migrate("", "db1", &receiver.address).expect(EXIT_FAILED, "failed");
        assert_eq!(ended.summary["target"]["incoming_destroyed"], true, "{:#}", ended.summary);
        assert_eq!((source.domains(), target.domains()), (vec!["db1".to_owned()], vec![]));
    }
}

#[test]
fn a_killed_xl_at_the_source_leaves_nothing_at_the_target() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new());
    let mut receiver = target.receive("", &["--once"]);
    source.migrate("source-dies", "db1", &receiver.address).expect(EXIT_FAILED, "failed");
    assert_eq!(receiver.exit(), Some(i32::from(EXIT_FAILED)));
    assert_eq!((source.domains(), target.domains()), (vec!["db1".to_owned()], vec![]));
}

#[test]
fn what_an_earlier_migration_left_is_named_and_not_touched() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new().with_domain(5, "db1--incoming"));
    let receiver = target.receive("", &[]);
    let ended = source.migrate("", "db1", &receiver.address);
    assert_eq!(ended.code, i32::from(EXIT_NOT_BEGUN));
    assert!(ended.stderr.contains("xl destroy 5"), "{}", ended.stderr);
    assert_eq!(target.domains(), ["db1--incoming"]);
}

#[test]
fn nobody_listening_is_said_before_anything_is_begun() {
    let source = Host::new().with_domain(3, "db1");
    let ended = source.migrate("", "db1", &free_address());
    assert_eq!(ended.code, i32::from(EXIT_NOT_BEGUN));
    assert!(ended.stderr.contains("dom0-migrator receive"), "{}", ended.stderr);
    assert_eq!(ended.summary["outcome"], "not_begun");
    assert_eq!(source.migrate("", "db2", &free_address()).code, i32::from(EXIT_NOT_BEGUN));
}

#[test]
fn a_summary_that_cannot_be_written_is_said_before_anything_is_begun() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new());
    let receiver = target.receive("", &[]);
    let mut command = source.command("");
    command.args(["migrate", "db1", &receiver.address, "--stock", "--plain"]);
    command.args(["--json", "/nowhere/summary.json"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(EXIT_NOT_BEGUN)));
    assert_eq!((source.domains(), target.domains()), (vec!["db1".to_owned()], vec![]));
}

#[test]
fn a_signal_before_the_memory_goes_ends_it_on_both_sides() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new());
    // The target never answers, so the source waits until it is told to stop.
    let mut receiver = target.receive("target-mute", &["--once"]);
    let migrating = source.start_migrate("", "db1", &receiver.address);
    wait_until("the connection", || has_children(receiver.child.id()));
    std::thread::sleep(Duration::from_millis(300));
    kill(Pid::from_raw(migrating.child.id().cast_signed()), Signal::SIGTERM).unwrap();
    migrating.wait().expect(EXIT_INTERRUPTED, "interrupted");
    receiver.signal(Signal::SIGTERM);
    receiver.exit();
    assert_eq!((source.domains(), target.domains()), (vec!["db1".to_owned()], vec![]));
}

#[test]
fn a_receiver_that_is_told_to_end_gives_up_what_has_not_come() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new());
    let mut receiver = target.receive("target-waits", &[]);
    let migrating = source.start_migrate("", "db1", &receiver.address);
    wait_until("the incoming domain", || target.domains() == ["db1--incoming"]);
    receiver.signal(Signal::SIGINT);
    migrating.wait().expect(EXIT_FAILED, "failed");
    assert_eq!(receiver.exit(), Some(i32::from(EXIT_MIGRATED)));
    assert_eq!((source.domains(), target.domains()), (vec!["db1".to_owned()], vec![]));
}

fn has_children(pid: u32) -> bool {
    fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")).is_ok_and(|tasks| {
        tasks.flatten().any(|task| {
            fs::read_to_string(task.path().join("children")).is_ok_and(|children| !children.trim().is_empty())
        })
    })
}

/// A pair of hosts with db1 running on the first.
fn pair() -> (Host, Host) {
    (Host::new().with_domain(3, "db1"), Host::new())
}

/// db1 runs on one of them alone, and nothing else is anywhere.
fn runs_only_at(there: &Host, not_there: &Host) {
    assert_eq!((there.domains(), not_there.domains()), (vec!["db1".to_owned()], vec![]));
    assert_eq!(there.state("db1"), "running");
}

#[test]
fn an_xl_that_dies_before_the_hand_over_leaves_the_domain_running_here() {
    for fault in ["source-dies", "source-dies-suspended", "source-dies-before-go"] {
        let (source, target) = pair();
        let receiver = target.receive("", &[]);
        source.migrate(fault, "db1", &receiver.address).expect(EXIT_FAILED, "failed");
        runs_only_at(&source, &target);
        source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
        runs_only_at(&target, &source);
    }
}

#[test]
fn an_xl_that_dies_after_permission_is_done_without() {
    let (source, target) = pair();
    let receiver = target.receive("", &[]);
    source.migrate("source-dies-after-go", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
    runs_only_at(&target, &source);
}

#[test]
fn a_target_that_does_not_start_it_gives_it_back_and_the_next_attempt_works() {
    for fault in ["target-dies", "target-cannot-start", "target-says-nonsense"] {
        let (source, target) = pair();
        let mut receiver = target.receive(fault, &["--once"]);
        source.migrate("", "db1", &receiver.address).expect(EXIT_FAILED, "failed");
        assert_eq!(receiver.exit(), Some(i32::from(EXIT_FAILED)), "{fault}");
        runs_only_at(&source, &target);
        let receiver = target.receive("", &[]);
        source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
        runs_only_at(&target, &source);
    }
}

/// The permission and the news of xl's end may arrive in either order; both ends are right, and the exit code tells which it is.
#[test]
fn an_xl_that_dies_when_all_has_come_loses_nothing() {
    let (source, target) = pair();
    let receiver = target.receive("target-dies-ready", &[]);
    let ended = source.migrate("", "db1", &receiver.address);
    match ended.code.try_into() {
        Ok(EXIT_MIGRATED) => runs_only_at(&target, &source),
        Ok(EXIT_FAILED) => runs_only_at(&source, &target),
        _ => panic!("{}\n{:#}", ended.stderr, ended.summary),
    }
}

#[test]
fn an_xl_that_dies_at_the_target_with_permission_is_done_without() {
    for fault in ["target-dies-go", "target-dies-started"] {
        let (source, target) = pair();
        let receiver = target.receive(fault, &[]);
        source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
        runs_only_at(&target, &source);
    }
}

#[test]
fn a_receiver_killed_in_the_hand_over_and_begun_again_finishes_it() {
    let (source, target) = pair();
    let mut receiver = target.receive("target-holds-go", &[]);
    let migrating = source.start_migrate("", "db1", &receiver.address);
    wait_until("the hand-over", || target.records("status") == [("accepted".into(), true)]);
    receiver.kill();
    assert_eq!(source.state("db1--migratedaway"), "suspended");
    // The source asks again until somebody answers.
    let _again = target.receive_at(receiver.address.clone(), "", &[]);
    migrating.wait().expect(EXIT_MIGRATED, "migrated");
    runs_only_at(&target, &source);
}

#[test]
fn a_receiver_killed_before_the_hand_over_leaves_nothing_that_the_next_does_not_remove() {
    let (source, target) = pair();
    let mut receiver = target.receive("target-holds-ready", &[]);
    let migrating = source.start_migrate("", "db1", &receiver.address);
    wait_until("all memory", || {
        source.state("db1") == "suspended" && target.state("db1--incoming") == "paused"
    });
    receiver.kill();
    migrating.wait().expect(EXIT_FAILED, "failed");
    assert_eq!(source.state("db1"), "running");
    let receiver = target.receive("", &[]);
    runs_only_at(&source, &target);
    source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
    runs_only_at(&target, &source);
}

#[test]
fn a_sender_killed_in_the_hand_over_is_in_doubt_until_the_target_is_asked() {
    let (source, target) = pair();
    let mut receiver = target.receive("target-holds-go", &[]);
    let mut migrating = source.start_migrate("", "db1", &receiver.address);
    wait_until("the hand-over", || target.records("status") == [("accepted".into(), true)]);
    migrating.kill();
    receiver.kill();
    assert_eq!(source.records("status"), [("given".into(), false)]);
    // The target cannot be reached: it stays where it is, and says where.
    let (code, said) = source.run(&["resolve"]);
    assert_eq!(code, i32::from(EXIT_UNDEFINED), "{said}");
    assert!(said.contains("db1--migratedaway stands suspended on this host"), "{said}");
    assert_eq!(source.state("db1--migratedaway"), "suspended");
    // A new migration would have to resolve it first, and cannot either.
    assert_eq!(source.migrate("", "db1", &receiver.address).code, i32::from(EXIT_NOT_BEGUN));
    // It has moved to another port meanwhile.
    let again = target.receive("", &[]);
    assert_eq!(target.state("db1"), "running");
    let (code, said) = source.run(&["resolve", "db1", "--peer", &again.address]);
    assert_eq!((code, said.contains("runs at the target")), (0, true), "{said}");
    runs_only_at(&target, &source);
    assert_eq!(source.records("list"), [("removed".into(), false)]);
    assert!(source.records("status").is_empty());
}

#[test]
fn a_sender_killed_before_the_hand_over_is_taken_back() {
    let (source, target) = pair();
    let receiver = target.receive("target-holds-ready", &[]);
    let mut migrating = source.start_migrate("", "db1", &receiver.address);
    wait_until("all memory", || {
        source.state("db1") == "suspended" && target.state("db1--incoming") == "paused"
    });
    migrating.kill();
    let (code, said) = source.run(&["resolve", "db1"]);
    assert_eq!((code, said.contains("runs on this host")), (0, true), "{said}");
    wait_until("the target's end", || target.domains().is_empty());
    runs_only_at(&source, &target);
    // The domain is gone before the record says so.
    wait_until("the target's record", || target.records("list") == [("removed".into(), false)]);
    assert_eq!(source.run(&["resolve"]).1.trim(), "nothing to resolve here");
}

#[test]
fn the_target_decides_against_what_it_was_not_given() {
    let (source, target) = pair();
    let mut receiver = target.receive("target-holds-ready", &[]);
    let mut migrating = source.start_migrate("", "db1", &receiver.address);
    wait_until("all memory", || target.state("db1--incoming") == "paused");
    migrating.kill();
    receiver.kill();
    let (code, said) = target.run(&["resolve"]);
    assert_eq!((code, said.contains("does not run on this host")), (0, true), "{said}");
    assert_eq!(source.run(&["resolve"]).0, 0);
    runs_only_at(&source, &target);
}

#[test]
fn a_migration_is_cancelled_from_either_side() {
    for from_source in [true, false] {
        let (source, target) = pair();
        let receiver = target.receive("target-mute", &[]);
        let migrating = source.start_migrate("", "db1", &receiver.address);
        wait_until("the migration", || {
            source.records("status") == [("sending".into(), true)] && has_children(receiver.child.id())
        });
        let (code, outcome) =
            if from_source { (EXIT_INTERRUPTED, "interrupted") } else { (EXIT_FAILED, "failed") };
        let host = if from_source { &source } else { &target };
        assert_eq!(host.run(&["cancel", "db1"]).0, 0);
        migrating.wait().expect(code, outcome);
        wait_until("the target's end", || target.records("status").is_empty());
        runs_only_at(&source, &target);
        assert_eq!(host.run(&["cancel", "db1"]).0, i32::from(EXIT_FAILED));
    }
}

/// Directories of certificates for this machine's address, signed by an authority of their own.
fn certificates() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().to_str().unwrap().to_owned();
    let (code, said) = Host::new().run(&["certificates", "make", "--out", &out, "127.0.0.1", "host-b"]);
    assert_eq!(code, 0, "{said}");
    let own = directory.path().join("127.0.0.1");
    (directory, own)
}

#[test]
fn hosts_with_certificates_of_one_authority_know_each_other() {
    let (all, own) = certificates();
    let source = Host::new().with_domain(3, "db1").with_certificates(&all.path().join("host-b"));
    let target = Host::new().with_certificates(&own);
    let mut receiver = target.receive("", &["--once"]);
    let ended = source.migrate("", "db1", &receiver.address);
    assert_eq!(ended.code, 0, "{}\nreceiver:\n{}", ended.stderr, receiver.said.lock().unwrap());
    // Some more bytes than without: records have headers, and a handshake has certificates.
    assert!(
        (1_001_000..1_100_000).contains(&ended.summary["wire_bytes"].as_u64().unwrap()),
        "{:#}",
        ended.summary
    );
    assert_eq!(receiver.exit(), Some(i32::from(EXIT_MIGRATED)));
    runs_only_at(&target, &source);
    let key = fs::metadata(all.path().join("authority-key.pem")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
}

#[test]
fn strangers_are_refused_and_named_in_one_line() {
    let (all, own) = certificates();
    let (_other, foreign) = certificates();
    let target = Host::new().with_certificates(&own);
    let receiver = target.receive("", &[]);
    // Another authority's certificate; none at all; a target whose certificate has another name.
    for source in [Host::new().with_certificates(&foreign), Host::new()] {
        let source = source.with_domain(3, "db1");
        let before = receiver.said.lock().unwrap().lines().count();
        let ended = source.migrate("", "db1", &receiver.address);
        assert_eq!(ended.code, i32::from(EXIT_NOT_BEGUN), "{}", ended.stderr);
        wait_until("the line", || receiver.said.lock().unwrap().lines().count() > before);
        let said = receiver.said.lock().unwrap().clone();
        let lines: Vec<&str> = said.lines().skip(before).collect();
        assert!(lines.len() == 1 && lines[0].contains("refused"), "{lines:?}");
        assert_eq!(source.domains(), ["db1"]);
    }
    let misnamed = Host::new().with_certificates(&all.path().join("host-b"));
    let receiver = misnamed.receive("", &[]);
    let source = Host::new().with_domain(3, "db1").with_certificates(&own);
    let ended = source.migrate("", "db1", &receiver.address);
    assert_eq!(ended.code, i32::from(EXIT_NOT_BEGUN));
    assert!(ended.stderr.contains("not valid for name"), "{}", ended.stderr);
    // And without certificates nothing begins that was not told to be plain.
    let bare = Host::new().with_domain(3, "db1").with_certificates(Path::new("/nowhere"));
    let ended = bare.migrate("", "db1", &receiver.address);
    assert!(ended.code == i32::from(EXIT_NOT_BEGUN) && ended.stderr.contains("--plain"), "{}", ended.stderr);
}

#[test]
fn a_peer_that_says_nothing_or_nonsense_holds_nobody_up() {
    let (source, target) = pair();
    let receiver = target.receive("", &[]);
    let silent: Vec<_> = (0..8).map(|_| std::net::TcpStream::connect(&receiver.address).unwrap()).collect();
    let mut garbage = std::net::TcpStream::connect(&receiver.address).unwrap();
    std::io::Write::write_all(&mut garbage, &[0x16; 4096]).unwrap();
    source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
    runs_only_at(&target, &source);
    drop(silent);
}

/// Connections that say nothing, more of them than there are places, before and after a handshake would be.
#[test]
fn silent_strangers_give_way_however_many_they_are() {
    let (_all, own) = certificates();
    for secure in [false, true] {
        let (mut source, mut target) = pair();
        if secure {
            (source, target) = (source.with_certificates(&own), target.with_certificates(&own));
        }
        let receiver = target.receive("", &[]);
        let connect = || std::net::TcpStream::connect(&receiver.address).unwrap();
        let silent: Vec<_> = (0..200).map(|_| connect()).collect();
        source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
        runs_only_at(&target, &source);
        drop(silent);
    }
}

/// A connection of its own that says these lines; what it is answered, up to its end.
fn say(address: &str, lines: &[serde_json::Value]) -> String {
    let mut connection = std::net::TcpStream::connect(address).unwrap();
    for line in lines {
        std::io::Write::write_all(&mut connection, format!("{line}\n").as_bytes()).unwrap();
    }
    let mut said = String::new();
    // One that is closed while something is unread ends with an error.
    let _ = std::io::Read::read_to_string(&mut connection, &mut said);
    said
}

/// What somebody who has listened may say again on a plain network: it is refused, and what it was said of first is not disturbed.
#[test]
fn what_is_said_again_is_refused_and_disturbs_nothing() {
    let (source, target) = pair();
    let receiver = target.receive("target-waits-for-word", &[]);
    let migrating = source.start_migrate("", "db1", &receiver.address);
    let records = target.directory.path().join("migrations");
    let token = || {
        let names = fs::read_dir(&records).into_iter().flatten().flatten();
        let mut names = names.filter_map(|entry| entry.file_name().into_string().ok());
        names.find_map(|name| name.strip_suffix("-target.json").map(str::to_owned))
    };
    wait_until("the record", || token().is_some());
    let token = token().unwrap();
    let greeting = serde_json::json!({"poolskip": VERSION, "connection": "control", "token": token});
    let start = serde_json::json!({"start": {"domain": "db2", "helper": "stock", "stream_version": 1, "debug": false}});
    let again = [greeting, start];
    // While it runs, and after.
    let said = say(&receiver.address, &again);
    assert!(said.contains("refused") && said.contains(&token), "{said}");
    fs::write(target.directory.path().join("go-on"), "").unwrap();
    migrating.wait().expect(EXIT_MIGRATED, "migrated");
    let said = say(&receiver.address, &again);
    assert!(said.contains("refused") && said.contains(&token), "{said}");
    runs_only_at(&target, &source);
    // Its other connections lead nowhere either.
    for connection in ["stream", "side"] {
        let greeting = serde_json::json!({"poolskip": VERSION, "connection": connection, "token": token});
        assert_eq!(say(&receiver.address, &[greeting]), "");
    }
    assert_eq!(target.records("list"), [("running".to_owned(), false)]);
}

/// A peer of another version, or one that would have it without a certificate, is told so and goes.
#[test]
fn nothing_is_agreed_on_that_is_less_than_what_was_asked_for() {
    let (_all, own) = certificates();
    let (plain, secure) = (Host::new(), Host::new().with_certificates(&own));
    let (plain, secure) = (plain.receive("", &[]), secure.receive("", &[]));
    let greeting = |version: u32| serde_json::json!({"poolskip": version, "connection": "control", "token": "0".repeat(32)});
    for version in [0, VERSION - 1, VERSION + 1, u32::MAX] {
        let said = say(&plain.address, &[greeting(version)]);
        assert!(said.contains("refused") && said.contains("use the same release"), "{version}: {said:?}");
    }
    // No greeting is heard where there was no handshake, and none is answered in the clear but by TLS's own alert.
    let said = say(&secure.address, &[greeting(VERSION)]);
    assert!(!said.contains("refused"), "{said:?}");
    wait_until("the line", || secure.said.lock().unwrap().contains("refused"));
    // TLS 1.2 is not spoken: a ClientHello of it is answered by the alert protocol_version (70).
    let mut old = std::net::TcpStream::connect(&secure.address).unwrap();
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    // No session; one cipher suite of 1.2 (ECDHE-ECDSA-AES128-GCM-SHA256); no compression; no extensions.
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    let length = hello.len() as u8;
    let mut record = vec![0x16, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    std::io::Write::write_all(&mut old, &record).unwrap();
    let mut answer = Vec::new();
    let _ = std::io::Read::read_to_end(&mut old, &mut answer);
    assert_eq!(answer.first(), Some(&0x15), "an alert: {answer:?}");
    assert_eq!(answer.get(5), Some(&2), "a fatal one: {answer:?}");
}

#[test]
fn a_limited_migration_comes_as_it_is() {
    for secure in [false, true] {
        let (_all, own) = certificates();
        let (mut source, mut target) = pair();
        if secure {
            (source, target) = (source.with_certificates(&own), target.with_certificates(&own));
        }
        let receiver = target.receive("", &[]);
        source.connecting.extend(["--bandwidth".into(), "2M".into()]);
        source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
        runs_only_at(&target, &source);
    }
}

/// This machine has no Xen whose libraries could be loaded, so no host here can run the helper.
#[test]
fn where_the_helper_cannot_run_libxls_own_does_and_it_is_said() {
    let (source, target) = pair();
    let receiver = target.receive("", &[]);
    let mut command = source.command("");
    let output = command.args(["migrate", "db1", &receiver.address, "--plain"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("a plain migration with libxl's own helper follows: "), "{said}");
    runs_only_at(&target, &source);
}

/// The source could run the helper; the target, which cannot, is believed.
#[test]
fn where_the_target_cannot_run_the_helper_libxls_own_does_and_it_is_said() {
    let (source, target) = (Host::new().on_xen().with_domain(3, "db1"), Host::new());
    let receiver = target.receive("", &[]);
    let mut command = source.command("");
    let output = command.args(["migrate", "db1", &receiver.address, "--plain"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(
        said.contains(
            "a plain migration with libxl's own helper follows: at the target: cannot read Xen's release"
        ),
        "{said}"
    );
    runs_only_at(&target, &source);
}

/// Memory of a process that is its own: what is not a file's, in KiB.
fn own_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_receiver_that_has_taken_many_has_no_more_memory_than_one_that_has_taken_some() {
    let hosts = [Host::new().with_domain(3, "db1"), Host::new()];
    let receivers = [hosts[0].receive("", &[]), hosts[1].receive("", &[])];
    let at_first = receivers.each_ref().map(|receiver| own_memory(receiver.child.id()));
    // Each migration has threads of its own, and the allocator keeps a little for them: 1 MiB in all, from the fifth on. What a migration
    // would leave there each time is more with each.
    let mut most = [0; 2];
    let mut after = |migrations: u32| {
        for _ in 0..migrations {
            for from in [0, 1] {
                let receiver = &receivers[1 - from];
                hosts[from].migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
                most[1 - from] = most[1 - from].max(own_memory(receiver.child.id()));
            }
        }
        most
    };
    let before = after(20);
    let now = after(40);
    for ((first, before), now) in at_first.into_iter().zip(before).zip(now) {
        assert!(now <= before + 1024, "{now} KiB after 60 migrations, {before} KiB after 20");
        assert!(now <= first + 3072, "{now} KiB after 60 migrations, {first} KiB before the first");
    }
}
