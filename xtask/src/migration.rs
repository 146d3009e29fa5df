//! One migration in the lab, by `dom0-migrator` as an operator would call it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::deployment::MIGRATOR;
use crate::lab::{Host, Lab, Spawned};

/// The guest of the lab.
pub const DOMAIN: &str = "db1";

/// Where the sender writes its summary.
const REPORT: &str = "/run/migration.json";
/// Where it writes its report file, of which a page can be made.
const REPORT_FILE: &str = "/run/migration-report.json";

/// Limit for one migration; one takes one to three minutes, more when the machine is loaded.
const LIMIT: Duration = Duration::from_secs(1500);

/// Limit for one command that moves no memory.
const SOON: Duration = Duration::from_secs(120);

/// What the guest had listed, as dom0 read it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Lists {
    /// Frames loaded and untouched.
    pub frames_read: u64,
    /// Frames flushed since they were written.
    pub frames_written: u64,
    /// Pages of 4 KiB in both lists.
    pub pages_listed: u64,
    /// Frames of the pool.
    pub pool_frames: u64,
    /// Frames of the pool whose bytes are those on disk.
    pub pool_frames_clean: u64,
}

/// Bytes of the stream by what they were; only Poolskip's helper knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Classes {
    /// Contents of pages.
    pub page_data: u64,
    /// References: places and hashes.
    pub references: u64,
    /// Markers of zero pages, and of pages without content.
    pub markers: u64,
    /// Headers, frame numbers, and records that are not memory.
    pub other: u64,
}

/// The source's counters, as far as the lab reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Source {
    /// Refused references by reason.
    pub refused: Refused,
}

/// Refused references by reason, as far as the lab reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Refused {
    /// The disk could not be read.
    pub io_error: u64,
}

/// What `dom0-migrator migrate --json` writes, as far as the lab reads it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Report {
    /// From the command's start to its end.
    pub total_seconds: f64,
    /// All bytes on all connections, both directions.
    pub wire_bytes: u64,
    /// Passes over memory, the last included.
    pub rounds: Option<u64>,
    /// Pages that travelled whole.
    pub pages_sent: Option<u64>,
    /// Zero pages that travelled as markers.
    pub pages_zero: Option<u64>,
    /// Pages that travelled as references.
    pub pages_referenced: Option<u64>,
    /// References that the target took from storage.
    #[serde(default)]
    pub pages_accepted: Option<u64>,
    /// References that the target refused.
    pub pages_refused: Option<u64>,
    /// The source's counters, of our helper alone.
    #[serde(default)]
    pub source: Option<Source>,
    /// The stream by class.
    #[serde(default)]
    pub bytes: Option<Classes>,
    /// The lists that were used.
    pub lists: Option<Lists>,
    /// Pages that differed when all were sent again and compared; none when it was not a debug migration.
    pub verify_mismatches: Option<u64>,
    /// Pages that differed since a backend wrote to them after the suspension.
    #[serde(default)]
    pub verify_late_writes: Option<u64>,
    /// Pages compared.
    #[serde(default)]
    pub pages_verified: Option<u64>,
}

/// How to migrate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// With the stock save helper, over the same connections.
    pub stock: bool,
    /// Send all memory again at the end, and compare.
    pub verify: bool,
}

impl Options {
    fn flags(self) -> Vec<&'static str> {
        let flags = [(self.stock, "--stock"), (self.verify, "--debug")];
        flags.iter().filter(|(wanted, _)| *wanted).map(|(_, flag)| *flag).collect()
    }
}

/// What the receiver says when it can be reached.
const READY: &str = "ready to receive domains";

/// A migration that has been started: both sides' commands, each ended when this is dropped.
pub struct Started {
    /// `dom0-migrator migrate` on the host that has the guest.
    pub sender: Spawned,
    /// `dom0-migrator receive --once` on the other.
    pub receiver: Spawned,
    from: Host,
}

/// Starts to migrate the guest.
///
/// # Errors
/// When the receiving side does not come up.
pub fn start(lab: &Lab, from: Host, options: Options) -> Result<Started> {
    start_with(lab, from, &options.flags())
}

/// What says that connections are neither encrypted nor authenticated. The lab's figures are of the stream, and TLS under emulation
/// would cost more than the link does.
pub const PLAIN: &str = "--plain";

/// Migrates the guest with certificates on both sides, as between hosts of an operator; the report.
///
/// # Errors
/// When either side fails: with what both said.
pub fn migrate_encrypted(lab: &Lab, from: Host) -> Result<Report> {
    start_as(lab, from, "", &[])?.finish(lab)
}

/// Makes certificates as an operator does, on one host, and copies to each its own.
///
/// # Errors
/// When they cannot be made.
pub fn certify(lab: &Lab) -> Result<()> {
    let hosts = Host::BOTH.map(Host::address);
    let (made, at) = ("/run/certificates", "/etc/poolskip/certificates");
    let maker = lab.host(Host::Source);
    let names = hosts.join(" ");
    maker.must(&format!("rm -rf {made}; {MIGRATOR} certificates make --out {made} {names}"), SOON)?;
    for host in Host::BOTH {
        lab.host(host).must(&format!("mkdir -p {at}"), SOON)?;
        for file in ["certificate.pem", "key.pem", "authority.pem"] {
            let content = maker.pull(&format!("{made}/{}/{file}", host.address()))?;
            lab.host(host).write(&content, &format!("{at}/{file}"), 0o600)?;
        }
    }
    Ok(())
}

/// What `dom0-migrator check` says, as far as the lab reads it.
#[derive(Clone, Debug, Deserialize)]
pub struct Check {
    /// Listed pages that were looked at.
    pub samples: u64,
    /// Of these: the same on the target's disk.
    pub samples_same: u64,
    /// What would go by reference.
    pub reference_bytes: f64,
    /// Zero pages.
    pub zero_bytes: Option<f64>,
    /// What is in the way.
    pub obstacles: Vec<serde_json::Value>,
    /// What it would take.
    pub estimate: Option<Estimate>,
}

/// Without and with Poolskip.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Estimate {
    /// Without.
    pub stock: Estimated,
    /// With.
    pub poolskip: Estimated,
}

/// An estimate.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Estimated {
    /// Total time; none when it would not end.
    pub seconds: Option<f64>,
    /// Bytes over the link.
    pub wire_bytes: Option<f64>,
}

/// Asks what a migration would be; its exit code, and what it says.
///
/// # Errors
/// When the receiving side does not come up, or nothing is said.
pub fn check(lab: &Lab, from: Host) -> Result<(i32, Check)> {
    check_after(lab, from, "")
}

/// Asks what a migration would be, from a shell that has done something before.
///
/// # Errors
/// When the receiving side does not come up, or nothing is said.
pub fn check_after(lab: &Lab, from: Host, before: &str) -> Result<(i32, Check)> {
    let to = from.other();
    let address = format!("{}:8002", to.address());
    let receiver = lab.host(to).spawn(&format!("exec {MIGRATOR} receive --listen {address} {PLAIN}"))?;
    receiver.wait_for(READY, LIMIT).context("the receiving side does not start")?;
    let output =
        lab.host(from).run(&format!("{before}{MIGRATOR} check {DOMAIN} {address} {PLAIN} --json"), LIMIT)?;
    receiver.signal("TERM")?;
    receiver.wait(LIMIT)?;
    let said = serde_json::from_str(&output.stdout)
        .with_context(|| format!("cannot read what check says: {} {}", output.stdout, output.stderr))?;
    Ok((output.status, said))
}

/// Starts to migrate the guest with options of `dom0-migrator migrate` as they stand.
///
/// # Errors
/// When the receiving side does not come up.
pub fn start_with(lab: &Lab, from: Host, flags: &[&str]) -> Result<Started> {
    start_after(lab, from, Before::default(), flags)
}

/// What a shell on each side does before it becomes our command: whole commands, each with its separator.
#[derive(Clone, Copy, Debug, Default)]
pub struct Before<'a> {
    /// At the source.
    pub source: &'a str,
    /// At the target.
    pub target: &'a str,
}

/// Starts to migrate the guest, after each side's shell has done something.
///
/// # Errors
/// When the receiving side does not come up.
pub fn start_after(lab: &Lab, from: Host, before: Before<'_>, flags: &[&str]) -> Result<Started> {
    start_in(lab, from, before, PLAIN, flags)
}

fn start_as(lab: &Lab, from: Host, connecting: &str, flags: &[&str]) -> Result<Started> {
    start_in(lab, from, Before::default(), connecting, flags)
}

fn start_in(lab: &Lab, from: Host, before: Before<'_>, connecting: &str, flags: &[&str]) -> Result<Started> {
    let to = from.other();
    let address = format!("{}:8002", to.address());
    let receive = format!("exec {MIGRATOR} receive --listen {address} --once {connecting}");
    let receiver = lab.host(to).spawn(&format!("{}{receive}", before.target))?;
    receiver.wait_for(READY, LIMIT).context("the receiving side does not start")?;
    let command = format!("{}{}", before.source, sending(&address, connecting, flags));
    Ok(Started { sender: lab.host(from).spawn(&command)?, receiver, from })
}

/// The sender's command.
fn sending(address: &str, connecting: &str, flags: &[&str]) -> String {
    let mut command = format!(
        "rm -f {REPORT} {REPORT_FILE}; \
         exec {MIGRATOR} migrate {DOMAIN} {address} {connecting} --json {REPORT} --report {REPORT_FILE}"
    );
    for flag in flags {
        command += " ";
        command += flag;
    }
    command
}

/// Migrates the guest to a receiver that runs already; the report.
///
/// # Errors
/// When the sender fails: with what it said.
pub fn send(lab: &Lab, from: Host, flags: &[&str]) -> Result<Report> {
    let address = format!("{}:8002", from.other().address());
    let output = lab.host(from).run(&sending(&address, PLAIN, flags), LIMIT)?;
    if output.status != 0 {
        bail!(
            "the migration from {} ended with {}: {}{}",
            from.name(),
            output.status,
            output.stdout,
            output.stderr
        );
    }
    report(lab, from)
}

/// The report that the last sender has left.
fn report(lab: &Lab, from: Host) -> Result<Report> {
    let json = lab.host(from).pull(REPORT)?;
    serde_json::from_slice(&json).with_context(|| {
        format!("cannot read the report of the migration: {}", String::from_utf8_lossy(&json))
    })
}

impl Started {
    /// Waits until it is over, and shows what the sender says meanwhile; its report.
    ///
    /// # Errors
    /// When either side fails: with what both said.
    pub fn finish(self, lab: &Lab) -> Result<Report> {
        self.finish_watched(lab, &mut Plain)
    }

    fn finish_watched(self, lab: &Lab, onlooker: &mut dyn Onlooker) -> Result<Report> {
        let start = Instant::now();
        let mut shown = 0;
        while !self.sender.has_ended() && start.elapsed() < LIMIT {
            shown = show_from(&self.sender.output(), shown, onlooker);
            onlooker.tick();
            thread::sleep(Duration::from_millis(500));
        }
        show_from(&self.sender.output(), shown, onlooker);
        onlooker.tick();
        let ended = self.sender.wait(Duration::from_secs(1));
        let status = ended.as_ref().map_or(-1, |output| output.status);
        if status != 0 {
            bail!("{}", self.failure(lab, status));
        }
        let received = self.receiver.wait(LIMIT)?;
        if received.status != 0 {
            bail!("the sender ended with 0, the receiver with {}: {}", received.status, received.stdout);
        }
        report(lab, self.from)
    }

    fn failure(&self, lab: &Lab, status: i32) -> String {
        let hypervisor = lab.xl_dmesg(self.from).unwrap_or_default();
        let lines: Vec<_> = hypervisor.lines().collect();
        format!(
            "the migration from {} ended with {status}\nsender:\n{}\nreceiver:\n{}\nhypervisor of the sender:\n{}",
            self.from.name(),
            self.sender.output(),
            self.receiver.output(),
            lines[lines.len().saturating_sub(12)..].join("\n")
        )
    }
}

/// Whoever looks on while a migration runs.
pub trait Onlooker {
    /// Whether the sender is to tell its progress for programs (`--progress json`).
    fn wants_events(&self) -> bool;

    /// The sender has said a line.
    fn line(&mut self, line: &str);

    /// Time has passed: about half a second.
    fn tick(&mut self);
}

/// One who wants to read the sender's own lines.
pub struct Plain;

impl Onlooker for Plain {
    fn wants_events(&self) -> bool {
        false
    }

    fn line(&mut self, line: &str) {
        eprintln!("    {line}");
    }

    fn tick(&mut self) {}
}

/// Shows the whole lines of `text` from byte `from` on; where to go on.
fn show_from(text: &str, from: usize, onlooker: &mut dyn Onlooker) -> usize {
    let Some(new) = text.get(from..) else { return from };
    let Some(end) = new.rfind('\n') else { return from };
    new[..end].lines().for_each(|line| onlooker.line(line));
    from + end + 1
}

/// The report file of the last migration from a host.
///
/// # Errors
/// When there is none, as after a full disk.
pub fn report_file(lab: &Lab, from: Host) -> Result<Vec<u8>> {
    lab.host(from).pull(REPORT_FILE).context("the sender has left no report file")
}

/// Migrates the guest from one host to the other; the report.
///
/// # Errors
/// When either side fails: with what both said.
pub fn migrate(lab: &Lab, from: Host, options: Options) -> Result<Report> {
    start(lab, from, options)?.finish(lab)
}

/// The same, and somebody looks on.
///
/// # Errors
/// Those of [`migrate`].
pub fn migrate_watched(
    lab: &Lab,
    from: Host,
    options: Options,
    onlooker: &mut dyn Onlooker,
) -> Result<Report> {
    let events: &[&str] = if onlooker.wants_events() { &["--progress", "json"] } else { &[] };
    start_with(lab, from, &[&options.flags(), events].concat())?.finish_watched(lab, onlooker)
}
