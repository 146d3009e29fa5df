//! `test --deploy`: a newcomer's path through the quick start, in the lab of whole Debian systems, over real sshd, while a client writes in
//! the guest; and that nothing is left afterwards.
//!
//! Nothing of Poolskip is put there by other means than the page's own commands, which `tests/quick-start.sh` reads from the page.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::footprint::{self, Footprint};
use super::guest_cases::{PATIENCE, ask_for_lists, most_were_accepted, wait_for};
use crate::deployment::{guest, host, root};
use crate::ending::status_of_group;
use crate::lab::{self, Flavour, Host, Lab};
use crate::migration::Report;
use crate::package::Programs;
use crate::proof::{self, Server, Writer};
use crate::step::step;

/// A case: its name, and what it does.
pub(super) type Case = (&'static str, fn(&mut Bed) -> Result<()>);

/// All cases, in their order: each finds the machines as the one before has left them.
pub(super) const CASES: [Case; 7] = [
    ("by_one_command_mysqld_stays_the_same_process", by_one_command),
    ("units_run_and_do_their_work_within_their_bounds", units),
    ("a_domain_goes_by_xl_migrate_and_comes_back_compared", first_migration),
    ("a_deployment_that_is_there_is_not_done_again", again),
    ("removed_by_one_command_nothing_is_left", removed),
    ("by_hand_all_is_well", by_hand),
    ("removed_by_hand_nothing_is_left", removed_by_hand),
];

/// How long one look at a machine, or dpkg's at all of its files, may take under emulation.
const LOOK: std::time::Duration = PATIENCE;

/// A raised lab, and what its machines were before anything was done to them.
pub(super) struct Bed {
    lab: Lab,
    work: tempfile::TempDir,
    before: Vec<Footprint>,
    server: Server,
    writer: Option<Writer>,
}

/// Runs all cases, or those that have one of `only` in their names; stops at the first that fails.
///
/// # Errors
/// That of the first case that fails.
pub(super) fn run(only: &[String]) -> Result<()> {
    let wanted = |name: &str| only.is_empty() || only.iter().any(|only| name.contains(only));
    let cases: Vec<Case> = CASES.into_iter().filter(|(name, _)| wanted(name)).collect();
    if cases.is_empty() {
        return Ok(());
    }
    // Before the lab is there: what the page's commands build is built then.
    Programs::build()?;
    let options = lab::Options { flavour: Flavour::Debian, ..lab::Options::default() };
    let lab = step("the lab of whole Debian systems", || Lab::warm(&options))?;
    let mut bed = Bed::new(lab)?;
    let are_all = cases.len() == CASES.len();
    for (name, work) in cases {
        let start = Instant::now();
        let result = work(&mut bed).with_context(|| format!("case {name}"));
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        println!("deploy case {name} ... {verdict} ({:.0} s)", start.elapsed().as_secs_f64());
        result?;
    }
    if are_all { bed.end() } else { Ok(()) }
}

impl Bed {
    fn new(lab: Lab) -> Result<Self> {
        let work = tempfile::tempdir()?;
        fs::write(work.path().join("ssh_config"), lab.ssh_configuration()?)?;
        let server = proof::server(&lab)?;
        let mut bed = Self { lab, work, before: Vec::new(), server, writer: None };
        bed.before = step("looking at all machines, before", || bed.look())?;
        // Slow enough to leave the guest's one processor to what is installed there.
        bed.writer = Some(step("starting a client that writes", || Writer::start_slowly(&bed.lab))?);
        Ok(bed)
    }

    /// Looks at the guest and both hosts.
    fn look(&self) -> Result<Vec<Footprint>> {
        let machines = [self.lab.guest(), self.lab.host(Host::Source), self.lab.host(Host::Target)];
        std::thread::scope(|scope| {
            let looking: Vec<_> = machines
                .iter()
                .map(|machine| scope.spawn(|| Footprint::parse(&machine.must(footprint::SCRIPT, LOOK)?)))
                .collect();
            looking
                .into_iter()
                .map(|look| {
                    look.join().unwrap_or_else(|_| bail!("the thread that looks at a machine panicked"))
                })
                .collect()
        })
    }

    /// Runs parts of the quick start as a newcomer would, who has these machines in his ssh's configuration; all that was said.
    fn quick_start(&self, parts: &[&str]) -> Result<String> {
        let configuration = self.work.path().join("ssh_config");
        step(&format!("the quick start: {}", parts.join(", ")), || {
            let (reader, writer) = std::io::pipe()?;
            // ssh's system-wide file in a mount namespace: so that the page's commands need no options.
            let mut command = Command::new("unshare");
            command
                .args(["--mount", "--propagation", "private", "/bin/sh", "-ec"])
                .arg("mount --bind \"$0\" /etc/ssh/ssh_config; exec tests/quick-start.sh \"$@\" 2>&1")
                .arg(&configuration)
                .args(parts)
                .current_dir(root())
                .stdout(writer);
            let reading = std::thread::spawn(move || -> Result<String> {
                let mut said = String::new();
                for line in BufReader::new(reader).lines() {
                    let line = line?;
                    eprintln!("    {line}");
                    said += &line;
                    said.push('\n');
                }
                Ok(said)
            });
            let status = status_of_group(&mut command);
            // Our own end of its output.
            drop(command);
            let said = reading.join().unwrap_or_else(|_| bail!("the thread that listens panicked"))?;
            ensure!(status?.success(), "the quick start failed; what it said is above");
            Ok(said)
        })
    }

    /// mysqld is the process that it was, and answers; the client that writes has gone on.
    fn server_is_the_same(&self) -> Result<()> {
        let now = proof::server(&self.lab)?;
        ensure!(now == self.server, "mysqld was {:?} and is {now:?}", self.server);
        ensure!(proof::query(&self.lab, "SELECT 1")?.trim() == "1", "the server does not answer");
        Ok(())
    }

    /// That every machine is what it was.
    fn nothing_is_left(&self) -> Result<()> {
        let now = step("looking at all machines, after", || self.look())?;
        let mut left = Vec::new();
        for ((name, before), now) in ["guest", "host-a", "host-b"].iter().zip(&self.before).zip(&now) {
            left.extend(now.since(before).into_iter().map(|difference| format!("{name}: {difference}")));
        }
        ensure!(left.is_empty(), "something is left, or gone:\n{}", left.join("\n"));
        Ok(())
    }

    /// Compares what the client was told, and looks at the tables.
    fn end(mut self) -> Result<()> {
        self.server_is_the_same()?;
        let writer = self.writer.take().context("nobody writes")?;
        let committed = step("comparing what the client was told", || writer.finish(&self.lab))?;
        let tables = proof::tables(&self.lab)?;
        step("CHECK TABLE", || proof::check_tables(&self.lab, &tables))?;
        println!("{committed} transactions were acknowledged meanwhile, and are there");
        // On this machine, of their disks: under emulation each would read for minutes.
        let found = step("dpkg --verify of all machines' disks", || self.lab.end_and_verify())?;
        ensure!(found.is_empty(), "dpkg does not find its files as they were:\n{}", found.join("\n"));
        Ok(())
    }
}

fn by_one_command(bed: &mut Bed) -> Result<()> {
    let said = bed.quick_start(&["By one command"])?;
    ensure!(said.contains("This was the plan; nothing was changed."), "no plan was shown");
    ensure!(said.contains("root@db1: mysqld is the same process as before"), "mysqld was not looked at");
    bed.server_is_the_same()?;
    // What is looked for in the end can be seen at all.
    let now = step("looking at all machines, deployed", || bed.look())?;
    let came = |at: usize, words: &[&str]| -> Result<()> {
        let found = now[at].since(&bed.before[at]);
        let is_it =
            |line: &String| line.starts_with(words[0]) && words.iter().all(|word| line.contains(word));
        ensure!(found.iter().any(is_it), "no {words:?} in:\n{}", found.join("\n"));
        Ok(())
    };
    came(0, &["+ module poolskip"])?;
    came(0, &["+ package poolskip-guest "])?;
    came(0, &["+ unit guest-probe.service active"])?;
    came(0, &["+ file l ", "/etc/systemd/system/multi-user.target.wants/guest-probe.service"])?;
    came(0, &["+ process guest-probe"])?;
    came(0, &["+ named /dev/poolskip"])?;
    came(0, &["+ file f ", "/usr/sbin/guest-probe"])?;
    for at in [1, 2] {
        came(at, &["+ package poolskip-dom0 "])?;
        came(at, &["+ unit poolskip-receive.socket active"])?;
        came(at, &["+ listening 1F42"])?;
        came(at, &["+ file f ", "/usr/local/sbin/xl"])?;
    }
    // The module's nodes in the store of the host that has the guest.
    came(1, &["+ node /local/domain/N/data/poolskip"])
}

/// A unit's properties.
fn show(lab: &Lab, at: Option<Host>, unit: &str, property: &str) -> Result<String> {
    let command = format!("systemctl show -P {property} {unit}");
    let words = match at {
        Some(which) => host(lab, which, &command)?,
        None => guest(lab, &command)?,
    };
    Ok(words.trim().to_owned())
}

fn units(bed: &mut Bed) -> Result<()> {
    let lab = &bed.lab;
    // The probe: it ran as a service when `doctor` asked, and does once it was stopped and started.
    ensure!(show(lab, None, "guest-probe.service", "NRestarts")? == "0", "the probe was started again");
    guest(lab, "systemctl stop guest-probe.service; ! pgrep -x guest-probe")?;
    guest(lab, "systemctl start guest-probe.service")?;
    wait_for("the probe to answer", || Ok(guest(lab, "guest-probe status --json").is_ok()))?;
    // Lists, as dom0 asks for them: all that the unit's bounds must let through.
    ask_for_lists(lab, Host::Source)?;
    ensure!(show(lab, None, "guest-probe.service", "NRestarts")? == "0", "the probe died of a request");
    // Hosts: the socket listens, the service comes with the first who knocks, and again after it was stopped.
    for which in Host::BOTH {
        let at = Some(which);
        host(lab, which, "systemctl stop poolskip-receive.service")?;
        ensure!(show(lab, at, "poolskip-receive.service", "ActiveState")? == "inactive", "it goes on");
        ensure!(show(lab, at, "poolskip-receive.socket", "ActiveState")? == "active", "nobody listens");
        let other = which.other();
        host(lab, other, &format!("dom0-migrator doctor --no-link {}", which.alias()))?;
        ensure!(show(lab, at, "poolskip-receive.service", "ActiveState")? == "active", "nobody came");
        ensure!(
            show(lab, at, "poolskip-receive.service", "TriggeredBy")? == "poolskip-receive.socket",
            "by what?"
        );
        ensure!(show(lab, at, "poolskip-receive.service", "NRestarts")? == "0", "it was started again");
    }
    bed.server_is_the_same()
}

fn first_migration(bed: &mut Bed) -> Result<()> {
    let writer = bed.writer.as_ref().context("nobody writes")?;
    let before = writer.acknowledged(&bed.lab)?;
    bed.quick_start(&["The first migration"])?;
    ensure!(bed.lab.guest_host()? == Host::Source, "the guest has not come back");
    ensure!(writer.acknowledged(&bed.lab)? > before, "no transaction was committed meanwhile");
    bed.server_is_the_same()?;
    // Both went by our helper with references, the one that xl was asked for too.
    for which in Host::BOTH {
        let newest = host(&bed.lab, which, "cat $(ls -t /var/lib/poolskip/reports/db1-*.json | head -n 1)")?;
        let file: Value = serde_json::from_str(&newest).context("a report is no JSON")?;
        let report: Report =
            serde_json::from_value(file["summary"].clone()).context("the report's summary")?;
        ensure!(file["error"].is_null(), "{}: {}", which.name(), file["error"]);
        most_were_accepted(&report).with_context(|| format!("the migration from {}", which.name()))?;
        if which == Host::Target {
            ensure!(report.verify_mismatches == Some(0), "not compared, or not the same: {report:?}");
        }
    }
    let page = host(&bed.lab, Host::Source, "cat report.html; rm report.html")?;
    ensure!(page.contains("<svg") && page.contains("db1"), "report.html is no page: {page:.400}");
    // What xl leaves for a domain outlives the service that received it.
    host(&bed.lab, Host::Source, "systemctl stop poolskip-receive.service; xl domid db1").map(drop)?;
    bed.server_is_the_same()
}

fn again(bed: &mut Bed) -> Result<()> {
    let packages = || -> Result<[String; 3]> {
        let log = "grep -c ' status ' /var/log/dpkg.log || true";
        Ok([guest(&bed.lab, log)?, host(&bed.lab, Host::Source, log)?, host(&bed.lab, Host::Target, log)?])
    };
    let before = packages()?;
    bed.quick_start(&["By one command"])?;
    ensure!(packages()? == before, "dpkg was called for nothing");
    bed.server_is_the_same()
}

fn removed(bed: &mut Bed) -> Result<()> {
    bed.quick_start(&["And back to nothing"])?;
    bed.server_is_the_same()?;
    bed.nothing_is_left()
}

fn by_hand(bed: &mut Bed) -> Result<()> {
    let said = bed.quick_start(&["By hand"])?;
    ensure!(said.contains("Ready."), "doctor does not say that all is well");
    bed.server_is_the_same()
}

fn removed_by_hand(bed: &mut Bed) -> Result<()> {
    bed.quick_start(&["Back to nothing by hand"])?;
    // The newcomer's own copies.
    guest(&bed.lab, "rm /root/poolskip-*.deb")?;
    Host::BOTH.iter().try_for_each(|which| host(&bed.lab, *which, "rm /root/poolskip-*.deb").map(drop))?;
    bed.server_is_the_same()?;
    bed.nothing_is_left()
}
