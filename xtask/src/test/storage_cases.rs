//! Cases in which the target's storage lets the migration down. They hold for both kinds of guest.

use anyhow::{Context, Result, ensure};

use super::bed::Bed;
use super::guest_cases::{only_here, wait_for};
use crate::deployment::{LIMIT, host};
use crate::lab::{Host, Lab};
use crate::migration::{Options, Report, migrate, start_with};
use crate::proof;
use crate::storage::at_a_tenth;

/// Of the link, while a migration is timed, in bits per second: low enough that it sets the pace, and not the emulated processor.
const TIMED_LINK: u64 = 64_000_000;

/// What the failing disk gives before it fails, in bytes per second: so little that it fails half-way, whatever the machine is.
const BEFORE_FAILING: u64 = 4_000_000;

/// Of the link, meanwhile, in bits per second: so little that the first round lasts until the disk fails.
const SLOW_LINK: u64 = 16_000_000;

/// References that are to have been taken from the disk before it fails.
const TAKEN: u64 = 256;

/// Where the sender says how it goes.
const METRICS: &str = "/run/migration.prom";

/// The target's disk gives a tenth of what it gave just before. How long that takes is a figure, beside a stock migration's over the same link in the
/// same lab.
pub(super) fn slow(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    lab.set_link_rate(Some(TIMED_LINK))?;
    let stock = migrate(lab, lab.guest_host()?, Options { stock: true, verify: false })?;
    let from = lab.guest_host()?;
    let (ours, rates) = at_a_tenth(lab, || migrate(lab, from, Options::default()))?;
    lab.set_link_rate(None)?;
    println!(
        "storage at a tenth ({:.0} MB/s of {:.0}): Poolskip {:.1} s, stock {:.1} s, ratio {:.2}",
        rates.slowed as f64 / 1e6,
        rates.usual as f64 / 1e6,
        ours.total_seconds,
        stock.total_seconds,
        ours.total_seconds / stock.total_seconds
    );
    used_references(&ours)?;
    same_and_here(bed, from.other())
}

/// The same disk, and all memory is compared.
pub(super) fn slow_and_compared(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    let from = lab.guest_host()?;
    let (compared, _) = at_a_tenth(lab, || migrate(lab, from, Options { stock: false, verify: true }))?;
    all_equal(&compared)?;
    used_references(&compared)?;
    same_and_here(bed, from.other())
}

/// From some moment in the first round on, every read of the target's disk gives EIO. It is healed before the guest runs there, for the guest
/// has no other: while all memory is sent once more and compared.
pub(super) fn failing(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    let from = lab.guest_host()?;
    let to = from.other();
    lab.set_disk_rate(to, Some(BEFORE_FAILING))?;
    lab.set_link_rate(Some(SLOW_LINK))?;
    let started = start_with(lab, from, &["--debug", "--metrics-file", METRICS])?;
    let goes_on = || -> Result<()> {
        ensure!(!started.sender.has_ended(), "the migration has ended too soon: {}", started.sender.output());
        Ok(())
    };
    wait_for("the target to have taken pages from its disk", || {
        goes_on()?;
        Ok(Seen::now(lab, from)?.accepted >= TAKEN)
    })?;
    let disk = lab.fail_disk(to)?;
    // What is under way at the slow rate would take its time to fail.
    lab.set_disk_rate(to, None)?;
    let at_failure = Seen::now(lab, from)?;
    ensure!(at_failure.round == 1, "the disk fails too late, {at_failure:?}");
    wait_for("the target to refuse what it cannot read", || {
        goes_on()?;
        Ok(Seen::now(lab, from)?.refused > 0)
    })?;
    lab.set_link_rate(None)?;
    wait_for("the first round to be over", || {
        goes_on()?;
        Ok(Seen::now(lab, from)?.round > 1)
    })?;
    // References go in the first round alone; the guest has yet to be suspended, sent and compared.
    goes_on()?;
    lab.heal_disk(to, &disk)?;
    ensure!(lab.guest_host()? == from, "the guest ran at the target before its disk was healed");
    let report = started.finish(lab)?;
    all_equal(&report)?;
    used_references(&report)?;
    let refused = report.source.context("the report does not say why references were refused")?.refused;
    ensure!(refused.io_error > 0, "no reference was refused for a disk that fails: {report:?}");
    println!(
        "disk failed after {} pages by reference: {} accepted in all, {} refused for EIO",
        at_failure.accepted,
        report.pages_accepted.unwrap_or(0),
        refused.io_error
    );
    same_and_here(bed, to)
}

/// How far a migration is, as it tells Prometheus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    round: u64,
    accepted: u64,
    refused: u64,
}

impl Seen {
    fn now(lab: &Lab, from: Host) -> Result<Self> {
        // There is none before the first second.
        Ok(Self::read(&lab.host(from).must(&format!("cat {METRICS} 2>/dev/null || :"), LIMIT)?))
    }

    fn read(text: &str) -> Self {
        let value = |name: &str, label: &str| {
            let is_it = |line: &&str| line.starts_with(&format!("poolskip_{name}{{")) && line.contains(label);
            let value =
                text.lines().find(is_it).and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            value.unwrap_or(0.0) as u64
        };
        Self {
            round: value("migration_round", ""),
            accepted: value("migration_pages_total", "way=\"accepted\""),
            refused: value("migration_pages_total", "way=\"refused\""),
        }
    }
}

fn all_equal(report: &Report) -> Result<()> {
    ensure!(
        report.verify_mismatches == Some(0) && report.pages_verified.unwrap_or(0) > 0,
        "pages differ at the target, or none was compared: {report:?}"
    );
    Ok(())
}

fn used_references(report: &Report) -> Result<()> {
    ensure!(report.pages_accepted.unwrap_or(0) > 0, "no page came from the target's disk: {report:?}");
    Ok(())
}

/// The guest is the same, answers, and reads and writes its disk.
fn same_and_here(bed: &Bed<'_>, here: Host) -> Result<()> {
    let lab = &bed.lab;
    ensure!(proof::server(lab)? == bed.server, "mysqld is another process");
    let words = proof::query(
        lab,
        "CREATE DATABASE IF NOT EXISTS poolskip; CREATE TABLE poolskip.after (n BIGINT PRIMARY KEY); \
         INSERT INTO poolskip.after VALUES (7); SELECT n FROM poolskip.after; DROP TABLE poolskip.after; DROP DATABASE poolskip",
    )?;
    ensure!(words.trim() == "7", "the server does not write: {words:?}");
    host(lab, here, "xl list").map(drop)?;
    only_here(lab, here)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_prometheus_is_told_is_read() {
        let text = "# HELP poolskip_migration_round The pass.\npoolskip_migration_round{domain=\"db1\",target=\"t\"} 1\n\
                    poolskip_migration_round_pages{domain=\"db1\",target=\"t\",state=\"done\"} 9\n\
                    poolskip_migration_pages_total{domain=\"db1\",target=\"t\",way=\"accepted\"} 300\n\
                    poolskip_migration_pages_total{domain=\"db1\",target=\"t\",way=\"refused\"} 4\n";
        assert_eq!(Seen::read(text), Seen { round: 1, accepted: 300, refused: 4 });
        assert_eq!(Seen::read(""), Seen::default());
    }
}
