//! The lab as the place of measurement. The guest goes there and back between the two hosts, and its pool stays warm all the while.

use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::Bed;
use super::plan::{Planned, Variant};
use super::record::Record;
use crate::deployment::{Deployment, LIMIT, ZSTD_PIPE, host};
use crate::lab::{self, GuestSize, Host, Lab};
use crate::migration::{DOMAIN, Report, start_with};
use crate::proof;
use crate::step::step;
use crate::workload::{self, Settings, Workload};

/// Limit for one command in the guest: loading TPC-C is the longest.
const IN_GUEST: Duration = Duration::from_secs(1800);

/// Limit for one migration.
const MIGRATION: Duration = Duration::from_secs(1500);

/// Before and after the migration of an idle guest, where nothing but the downtime is to be seen.
const IDLE_MARGIN: Duration = Duration::from_secs(3);

/// Port of the compressing transport.
const ZSTD_PORT: u16 = 8003;

/// Where it says what it carried.
const ZSTD_REPORT: &str = "/run/zstd.json";

/// The lab, raised anew for each workload.
pub struct LabBed {
    deployment: Deployment,
    size: GuestSize,
    load: Settings,
    rate: u64,
    margin: Duration,
    lab: Option<Lab>,
}

impl LabBed {
    /// Nothing is raised before it is needed.
    pub fn new(deployment: Deployment, size: GuestSize, load: Settings, rate: u64, margin: Duration) -> Self {
        Self { deployment, size, load, rate, margin, lab: None }
    }
}

impl workload::Guest for &Lab {
    fn shell(&self, command: &str) -> Result<String> {
        self.guest().must(command, IN_GUEST)
    }
}

impl Bed for LabBed {
    fn prepare(&mut self, workload: Workload) -> Result<()> {
        // Two labs at once would be too many for most machines: the old one ends first.
        self.lab = None;
        let options = lab::Options { guest: self.size, ..lab::Options::default() };
        let lab = step("the lab", || Lab::warm(&options))?;
        self.deployment.install(&lab)?;
        self.deployment.install_for_benches(&lab)?;
        self.deployment.start_probe(&lab, "")?;
        step(&format!("making the guest ready for {}", workload.name()), || {
            workload.prepare(&&lab, &self.load)
        })?;
        self.lab = Some(lab);
        Ok(())
    }

    fn measure(&mut self, run: Planned) -> Result<Record> {
        let lab = self.lab.as_ref().context("no lab is up")?;
        let guest = &lab;
        let from = lab.guest_host()?;
        let server = proof::server(lab)?;
        lab.set_link_rate(Some(self.rate))?;
        lab.set_clocks()?;
        run.workload.start(guest, &self.load)?;
        Deployment::start_ticker(lab)?;
        let margin = if run.workload == Workload::Idle { self.margin.min(IDLE_MARGIN) } else { self.margin };
        sleep(margin);

        let (cpu, link) = (dom0_seconds(lab)?, lab.link_bytes()?);
        let began = now()?;
        let report = match run.variant {
            Variant::Stock => start_with(lab, from, &["--stock"])?.finish(lab)?,
            Variant::Poolskip => start_with(lab, from, &[])?.finish(lab)?,
            Variant::NoReferences => start_with(lab, from, &["--no-references"])?.finish(lab)?,
            Variant::Compressed => start_with(lab, from, &["--compress", "auto"])?.finish(lab)?,
            Variant::StockZstd => stock_with_zstd(lab, from)?,
        };
        let ended = now()?;
        let (cpu_after, link_after) = (dom0_seconds(lab)?, lab.link_bytes()?);

        sleep(margin);
        let downtime = Deployment::stop_ticker(lab)?;
        let timeline = run.workload.finish(guest, &self.load)?;
        lab.set_link_rate(None)?;
        ensure!(
            lab.guest_host()? == from.other(),
            "the migration ended well, but the guest is still on {}",
            from.name()
        );
        let after = proof::server(lab)?;
        ensure!(after == server, "mysqld was {server:?} and is {after:?}");
        if matches!(run.variant, Variant::Poolskip | Variant::Compressed) {
            ensure!(report.lists.is_some(), "the migration used no lists: probe or module did not answer");
        }
        Ok(Record {
            total_seconds: report.total_seconds,
            downtime_seconds: downtime.as_secs_f64(),
            wire_bytes: report.wire_bytes,
            link_bytes: (link_after.source_tx + link_after.source_rx)
                .saturating_sub(link.source_tx + link.source_rx),
            classes: report.bytes,
            rounds: report.rounds,
            pages_sent: report.pages_sent,
            pages_zero: report.pages_zero,
            pages_referenced: report.pages_referenced,
            pages_accepted: report.pages_accepted,
            pages_refused: report.pages_refused,
            lists: report.lists,
            dom0_cpu_seconds: cpu_after - cpu,
            from: from.name().to_owned(),
            began,
            ended,
            timeline,
        })
    }
}

fn now() -> Result<f64> {
    let since =
        SystemTime::now().duration_since(UNIX_EPOCH).context("this machine's clock is before 1970")?;
    Ok(since.as_secs_f64())
}

/// Processor time of both dom0s since they were started, in seconds.
fn dom0_seconds(lab: &Lab) -> Result<f64> {
    Host::BOTH.iter().map(|which| parse_dom0(&host(lab, *which, "xl list 0")?)).sum()
}

/// The last column of `xl list 0`.
fn parse_dom0(words: &str) -> Result<f64> {
    let line = words.lines().find(|line| line.starts_with("Domain-0 "));
    let seconds = line.and_then(|line| line.split_whitespace().last()?.parse().ok());
    seconds.with_context(|| format!("xl list says nothing of dom0's time: {words:?}"))
}

/// What the compressing transport says it carried.
#[derive(Deserialize)]
struct Carried {
    wire_sent: u64,
    wire_received: u64,
}

/// Stock `xl` on both sides, with zstd between them.
fn stock_with_zstd(lab: &Lab, from: Host) -> Result<Report> {
    let to = from.other();
    let address = format!("{}:{ZSTD_PORT}", to.address());
    let receiver = lab.host(to).spawn(&format!("exec {ZSTD_PIPE} receive {address} xl migrate-receive"))?;
    receiver.wait_for("ready on", LIMIT)?;
    // Timed on the host itself, as dom0-migrator does.
    let transport = format!("exec {ZSTD_PIPE} send {address} --json {ZSTD_REPORT}");
    let sender = lab.host(from).spawn(&format!(
        "rm -f {ZSTD_REPORT}; begin=$EPOCHREALTIME; xl migrate -s \"\" {DOMAIN} \"{transport}\" && \
         echo \"TOOK $begin $EPOCHREALTIME\""
    ))?;
    let sent = sender.wait(MIGRATION)?;
    ensure!(
        sent.status == 0,
        "xl migrate ended with {}: {}\nreceiver: {}",
        sent.status,
        sent.stdout,
        receiver.output()
    );
    receiver.wait(LIMIT)?;
    let carried = lab.host(from).pull(ZSTD_REPORT)?;
    let carried: Carried =
        serde_json::from_slice(&carried).context("cannot read what the transport carried")?;
    Ok(Report {
        total_seconds: took(&sent.stdout)?,
        wire_bytes: carried.wire_sent + carried.wire_received,
        rounds: None,
        pages_sent: None,
        pages_zero: None,
        pages_referenced: None,
        pages_accepted: None,
        pages_refused: None,
        source: None,
        bytes: None,
        lists: None,
        verify_mismatches: None,
        verify_late_writes: None,
        pages_verified: None,
    })
}

/// The length between two moments in a line `TOOK begin end`.
fn took(words: &str) -> Result<f64> {
    let line = words.lines().find_map(|line| line.strip_prefix("TOOK "));
    line.and_then(|line| {
        let (begin, end) = line.split_once(' ')?;
        Some(end.trim().parse::<f64>().ok()? - begin.parse::<f64>().ok()?)
    })
    .with_context(|| format!("the migration did not say how long it took: {words:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dom0_s_time_is_the_last_column() {
        let words = "Name          ID   Mem VCPUs\tState\tTime(s)\nDomain-0      0  1024     2     r-----     123.4\n";
        assert_eq!(parse_dom0(words).unwrap(), 123.4);
        assert!(parse_dom0("").is_err());
    }

    #[test]
    fn the_time_of_a_compressed_migration_is_between_its_two_moments() {
        assert_eq!(took("Saving...\nTOOK 10.5 20.75\n").unwrap(), 10.25);
        assert!(took("TOOK 1\n").is_err());
    }
}
