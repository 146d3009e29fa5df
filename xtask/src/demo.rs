//! `cargo xtask demo`: the main job. One database guest, migrated by the stock helper and by Poolskip over the same link, side by
//! side; then the proof that nothing of it is lost.

mod live;
mod page;
mod picture;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::deployment::{Deployment, target_directory};
use crate::lab::{self, Flavour, Host, Lab};
use crate::migration::{self, Options, Report};
use crate::proof::{self, Writer};
use crate::setup;
use crate::step::step;
pub use live::Show;
use page::Pages;

/// Migrate a database guest between two Xen hosts, with the stock helper and with Poolskip, and compare.
#[derive(clap::Args)]
pub struct Args {
    /// Write all figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report files of both measured migrations into this directory, and a page for a browser that has them side by
    /// side: report.html [default: target/demo]
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Show lines also where there is a terminal
    #[arg(long)]
    lines: bool,
    /// Only show a migration that was recorded: lines of `dom0-migrator migrate --progress json`. Needs no lab
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "report", "rate"])]
    replay: Option<PathBuf>,
    /// Rate of the link between the hosts, in Mbit/s; low enough that the link sets the pace, not the emulated processor
    #[arg(long, value_name = "MBIT", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
}

/// One measured migration.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// The longest gap that the ticker inside the guest saw.
    pub downtime_seconds: f64,
    /// What the migrator reported.
    #[serde(flatten)]
    pub report: Report,
}

/// The guest.
#[derive(Debug, Serialize)]
pub struct Guest {
    /// Its memory.
    pub memory_bytes: u64,
    /// `innodb_buffer_pool_size`.
    pub pool_bytes: u64,
    /// Frames of the pool that are clean.
    pub pool_frames_clean: u64,
    /// Frames in the read list.
    pub frames_listed_read: u64,
    /// Frames in the written list.
    pub frames_listed_written: u64,
}

/// What was compared afterwards.
#[derive(Debug, Serialize)]
pub struct Proof {
    /// Pages that differed in a migration where all of memory is sent again and compared at the target.
    pub verify_mismatches: u64,
    /// Pages compared there.
    pub pages_verified: u64,
    /// How often mysqld was another process afterwards.
    pub mysqld_restarts: u64,
    /// Whether `CHECK TABLE` said OK for every table.
    pub tables_ok: bool,
    /// Tables that were checked.
    pub tables: usize,
    /// Whether every table's row checksum is what it was.
    pub checksums_equal: bool,
}

/// The run with wrong hints, through which a client writes.
#[derive(Debug, Serialize)]
pub struct Writing {
    /// References that were right.
    pub pages_accepted: u64,
    /// References whose page on disk was another, noticed by the hash.
    pub pages_refused: u64,
    /// Pages that differed at the target.
    pub verify_mismatches: u64,
    /// Pages that differed since a packet came for the suspended guest: told apart by the log of dirty pages.
    pub verify_late_writes: u64,
    /// Transactions that the client was told were committed; all of them are in the tables.
    pub transactions_acknowledged: u64,
}

/// All figures of a demo.
#[derive(Debug, Serialize)]
pub struct Figures {
    /// Rate of the link.
    pub link_bits_per_second: u64,
    /// With the stock helper.
    pub stock: Measured,
    /// With ours.
    pub poolskip: Measured,
    /// The guest.
    pub guest: Guest,
    /// That it is whole.
    pub proof: Proof,
    /// With deliberately wrong hints, while a client writes.
    pub wrong_hints_while_writing: Writing,
}

/// Runs the demo.
///
/// # Errors
/// When a migration fails, or the guest is not whole afterwards.
pub fn run(args: &Args) -> Result<()> {
    if let Some(recorded) = &args.replay {
        return live::replay(recorded);
    }
    setup::ensure()?;
    let show = if args.lines { Show::Lines } else { Show::auto() };
    let deployment = Deployment::build(Flavour::Pv)?;
    let rate = u64::from(args.rate) * 1_000_000;
    let pages = match &args.report {
        Some(directory) => Pages::new(directory)?,
        None => Pages::new(&target_directory()?.join("demo"))?,
    };

    let stock = {
        let lab = step("the lab, for the stock migration", || Lab::warm(&lab::Options::default()))?;
        deployment.install(&lab)?;
        deployment.start_probe(&lab, "")?;
        step("migrating with the stock helper", || {
            measure(&lab, rate, Options { stock: true, verify: false }, &pages, show)
        })?
    };

    let lab = step("the lab again, from the same frozen state, for Poolskip", || {
        Lab::warm(&lab::Options::default())
    })?;
    deployment.install(&lab)?;
    deployment.start_probe(&lab, "")?;
    let server = proof::server(&lab)?;
    let poolskip = step("migrating with Poolskip", || measure(&lab, rate, Options::default(), &pages, show))?;
    let page = pages.write(deployment.migrator())?;
    let lists = poolskip
        .report
        .lists
        .clone()
        .context("the migration used no lists: probe or module did not answer")?;
    let guest = Guest {
        memory_bytes: lab::GuestSize::default().memory_bytes(),
        pool_bytes: lab::GuestSize::default().pool_bytes(),
        pool_frames_clean: lists.pool_frames_clean,
        frames_listed_read: lists.frames_read,
        frames_listed_written: lists.frames_written,
    };
    let proof = prove(&lab, server, show)?;
    deployment.give_wrong_hints(&lab)?;
    let wrong_hints_while_writing = write_through(&lab, server, show)?;
    ensure!(
        wrong_hints_while_writing.pages_refused > 0,
        "wrong hints were given, and none was refused: they prove nothing"
    );

    let figures =
        Figures { link_bits_per_second: rate, stock, poolskip, guest, proof, wrong_hints_while_writing };
    print!("{}", picture::table(&figures));
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&figures)?;
        std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("figures written to {}", path.display());
    }
    println!("\nBoth migrations, for your browser: {}", page.display());
    Ok(())
}

/// Migrates from source to target over the limited link with the ticker running; the report is kept for the page.
fn measure(lab: &Lab, rate: u64, options: Options, pages: &Pages, show: Show) -> Result<Measured> {
    lab.set_link_rate(Some(rate))?;
    lab.set_clocks()?;
    Deployment::start_ticker(lab)?;
    let mut report = show.migrate(lab, Host::Source, options, false)?;
    if options.stock {
        // The stock helper knows neither markers nor references.
        for none in [
            &mut report.pages_zero,
            &mut report.pages_referenced,
            &mut report.pages_accepted,
            &mut report.pages_refused,
        ] {
            *none = Some(0);
        }
    }
    let downtime: Duration = Deployment::stop_ticker(lab)?;
    lab.set_link_rate(None)?;
    let report_file = migration::report_file(lab, Host::Source)?;
    pages.keep(options.stock, &report_file, downtime.as_secs_f64())?;
    Ok(Measured { downtime_seconds: downtime.as_secs_f64(), report })
}

/// Compares the guest that has just arrived on the target with what it was, then sends it back with all memory verified.
///
/// # Errors
/// When anything differs.
pub fn prove(lab: &Lab, before: proof::Server, show: Show) -> Result<Proof> {
    let found = whole(lab, before)?;
    let report = step("back again, with all memory compared at the end", || {
        show.migrate(lab, Host::Target, Options { stock: false, verify: true }, false)
    })?;
    let verify_mismatches = report.verify_mismatches.context("the migration did not verify")?;
    ensure!(verify_mismatches == 0, "{verify_mismatches} pages differ at the target");
    ensure!(
        report.pages_accepted.unwrap_or(0) > 0,
        "nothing went by reference in the verified migration: it proves nothing"
    );
    let Whole { tables, tables_ok, checksums_equal, restarts } = found;
    Ok(Proof {
        verify_mismatches,
        pages_verified: report.pages_verified.unwrap_or(0),
        mysqld_restarts: restarts + u64::from(proof::server(lab)? != before),
        tables_ok,
        tables,
        checksums_equal,
    })
}

/// Migrates while a client writes, and compares what the client was told was committed. The hints are
/// those of the probe that runs: wrong ones after [`Deployment::give_wrong_hints`].
///
/// All memory is compared too, with packets arriving for the guest all the while: netback copies those that come after the suspension
/// into pages that have been sent. The comparison must name them, and find no other page that differs.
///
/// # Errors
/// When a transaction is lost, half there or one too many, a table is not sound, a page differs, or no packet came late (then the
/// comparison's own part was not tried).
pub fn write_through(lab: &Lab, before: proof::Server, show: Show) -> Result<Writing> {
    let writer = step("starting a client that writes", || Writer::start(lab))?;
    let acknowledged_before = writer.acknowledged(lab)?;
    let from = lab.guest_host()?;
    let packets = lab.host(from).spawn("exec ping -i 0.5 -I br1 ff02::1")?;
    let report = step("migrating while the client writes and packets arrive, all memory compared", || {
        show.migrate(lab, from, Options { stock: false, verify: true }, true)
    })?;
    ensure!(!packets.has_ended(), "the packets ended before the migration: {}", packets.output());
    drop(packets);
    let verify_mismatches = report.verify_mismatches.context("the migration did not verify")?;
    ensure!(verify_mismatches == 0, "{verify_mismatches} pages differ at the target");
    let verify_late_writes = report.verify_late_writes.unwrap_or(0);
    ensure!(
        verify_late_writes > 0,
        "packets arrived for the suspended guest, and no page was seen to change"
    );
    let acknowledged_after = writer.acknowledged(lab)?;
    ensure!(acknowledged_after > acknowledged_before, "no transaction was acknowledged during the migration");
    let transactions = step("comparing what the client was told", || writer.finish(lab))?;
    let tables = proof::tables(lab)?;
    step("CHECK TABLE", || proof::check_tables(lab, &tables))?;
    // All but the two that the client writes to.
    let untouched: Vec<_> =
        tables.into_iter().filter(|table| !proof::WRITTEN.contains(&table.as_str())).collect();
    let (found, mut expected) =
        step("row checksums", || Ok((proof::checksums(lab, &untouched)?, proof::expected_checksums(lab)?)))?;
    expected.retain(|table, _| untouched.contains(table));
    ensure!(found == expected, "a table that nobody wrote to has another checksum than before");
    let after = proof::server(lab)?;
    ensure!(after == before, "mysqld was {before:?} and is {after:?}");
    Ok(Writing {
        pages_accepted: report.pages_accepted.unwrap_or(0),
        pages_refused: report.pages_refused.unwrap_or(0),
        verify_mismatches,
        verify_late_writes,
        transactions_acknowledged: transactions,
    })
}

/// What a guest was found to be.
struct Whole {
    tables: usize,
    tables_ok: bool,
    checksums_equal: bool,
    restarts: u64,
}

/// Looks whether the server is the same process, and every row of every table what it was when the guest's disk was made.
fn whole(lab: &Lab, before: proof::Server) -> Result<Whole> {
    let tables = proof::tables(lab)?;
    let expected = proof::expected_checksums(lab)?;
    let checksums_equal = step("row checksums", || Ok(proof::checksums(lab, &tables)? == expected))?;
    ensure!(checksums_equal, "the tables' row checksums are not what they were before the migration");
    let sound = step("CHECK TABLE", || proof::check_tables(lab, &tables))?;
    let after = proof::server(lab)?;
    ensure!(after == before, "mysqld was {before:?} and is {after:?}");
    Ok(Whole {
        tables: tables.len(),
        tables_ok: sound == tables.len(),
        checksums_equal,
        restarts: u64::from(after != before),
    })
}
