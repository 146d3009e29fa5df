//! `bench storage`: migrations to a host whose storage gives a tenth of what it gave just before, beside stock ones over the same link.

use anyhow::{Result, ensure};

use super::figures::{Figure, Report};
use crate::deployment::Deployment;
use crate::lab::{self, Flavour, Lab};
use crate::migration::{Options, migrate};
use crate::proof;
use crate::step::step;
use crate::storage::at_a_tenth;

/// Migrate to a host whose storage gives a tenth of what it gave just before, stock and Poolskip in turn.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pairs of a stock and a Poolskip migration
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Rate of the link between the hosts, in Mbit/s; low enough that the link sets the pace, not the emulated processor
    #[arg(long, value_name = "MBIT", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
    /// The kind of guest
    #[arg(long, value_enum, default_value = "pv")]
    guest: Flavour,
}

/// Measures. The guest goes to the other host by the stock helper and comes back by Poolskip; in every other pair the other way round.
///
/// # Errors
/// When a migration fails, or does without references.
pub fn run(args: &Args) -> Result<Report> {
    let deployment = Deployment::build(args.guest)?;
    let options = lab::Options { flavour: args.guest, ..lab::Options::default() };
    let lab = step("the lab", || Lab::warm(&options))?;
    deployment.install(&lab)?;
    deployment.start_probe(&lab, "")?;
    let server = proof::server(&lab)?;
    lab.set_link_rate(Some(u64::from(args.rate) * 1_000_000))?;
    let (mut stock, mut ours) = (Vec::new(), Vec::new());
    let (mut usual, mut slowed) = (Vec::new(), Vec::new());
    for pair in 0..args.pairs {
        for is_stock in [pair % 2 == 0, pair % 2 == 1] {
            let options = Options { stock: is_stock, verify: false };
            let name = if is_stock { "stock" } else { "Poolskip" };
            let (report, rates) = step(&format!("pair {}: migrating, {name}", pair + 1), || {
                at_a_tenth(&lab, || migrate(&lab, lab.guest_host()?, options))
            })?;
            if is_stock {
                stock.push(report.total_seconds);
                continue;
            }
            ensure!(
                report.pages_accepted.unwrap_or(0) > 0,
                "no page came from the target's disk: {report:?}"
            );
            ours.push(report.total_seconds);
            usual.push(rates.usual as f64);
            slowed.push(rates.slowed as f64);
        }
    }
    ensure!(proof::server(&lab)? == server, "mysqld is another process");
    Ok(Report {
        bench: format!("storage-{}", args.guest.name()),
        figures: vec![
            Figure::paired("slow_storage_total_time", "s", ours, &stock),
            Figure::paired("storage_rate", "bytes/s", slowed, &usual),
        ],
    })
}
