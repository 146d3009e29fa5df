//! The two commands against each other, on this machine, with a stand-in for xl and for xenstore: who is told what in which
//! order, what is cleaned up, and with which exit code it ends. The migration itself is tested in the lab, under real Xen.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

mod xenstored;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use dom0_migrator::command::{EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MIGRATED, EXIT_NOT_BEGUN, EXIT_UNDEFINED};
use dom0_migrator::report_file;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A host: an xl and a xenstore of its own.
struct Host {
    directory: tempfile::TempDir,
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
        Self { directory }
    }

    fn with_domain(self, id: u32, name: &str) -> Self {
        let node = self.node(id);
        fs::create_dir_all(&node).unwrap();
        fs::write(node.join("name"), name).unwrap();
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
        let mut command = Command::new(env!("CARGO_BIN_EXE_dom0-migrator"));
        command
            .env("PATH", format!("{}:{path}", directory.display()))
            .env("XENSTORED_PATH", directory.join("xenstored"))
            .env("XS", directory.join("xs"))
            .env("FAULT", fault)
            .env("POOLSKIP_REPORTS", self.reports())
            .stderr(Stdio::piped());
        command
    }

    fn receive(&self, fault: &str, options: &[&str]) -> Receiver {
        let address = free_address();
        let mut child =
            self.command(fault).args(["receive", "--listen", &address]).args(options).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        assert!(line.contains("ready to receive"), "{line}");
        // The rest is read, so that the pipe never fills.
        std::thread::spawn(move || drain(stderr));
        Receiver { child, address }
    }

    fn migrate(&self, fault: &str, domain: &str, address: &str) -> Ended {
        self.start_migrate(fault, domain, address).wait()
    }

    fn start_migrate(&self, fault: &str, domain: &str, address: &str) -> Migrating {
        let json = self.directory.path().join("summary.json");
        let _ = fs::remove_file(&json);
        let mut command = self.command(fault);
        command.args(["migrate", domain, address, "--stock", "--json"]).arg(&json);
        Migrating { child: command.spawn().unwrap(), json }
    }
}

fn drain(mut stderr: BufReader<ChildStderr>) {
    let _ = std::io::copy(&mut stderr, &mut std::io::sink());
}

fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

struct Receiver {
    child: Child,
    address: String,
}

impl Receiver {
    fn exit(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("receive did not end");
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
    fn wait(self) -> Ended {
        // A migration that hangs is ended, and then fails the test by its exit code.
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let (ended, watched) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            if watched.recv_timeout(Duration::from_secs(60)).is_err_and(|e| e == RecvTimeoutError::Timeout) {
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
    let deadline = Instant::now() + Duration::from_secs(20);
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
fn a_link_that_breaks_in_the_last_handshake_is_told_as_such() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::new());
    let receiver = target.receive("target-dies-late", &[]);
    source.migrate("", "db1", &receiver.address).expect(EXIT_UNDEFINED, "undefined");
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
    command.args(["migrate", "db1", &receiver.address, "--stock", "--json", "/nowhere/summary.json"]);
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
