//! `evacuate`: every domain that can go to other hosts, goes.
//!
//! The plan comes first and is shown: which domain goes where, in which order, and which stays and why. Then each migration is one of
//! [`migrate`](super::migrate)'s, in a process of its own, so many at once as was said. Nothing is written down beside the migrations' own
//! records: what is still here is what is still to go, so a second call goes on where a first one ended, however it ended.

mod plan;
mod work;

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::configuration::{Configuration, Connecting};
use super::doctor::remote::Peer;
use super::domain::{self, INCOMING};
use super::{EXIT_FAILED, EXIT_MIGRATED, EXIT_NOT_BEGUN, connection};
use crate::disks;
use crate::examination::State;
use crate::xen::DomainId;
use crate::xenstore::{Store, StoreError, Xenstore};
use plan::{Guest, Plan, Target};

/// What xl appends to the name of a domain that it has given away, and that nobody knows of.
const GIVEN_AWAY: &str = "--migratedaway";

/// Options of `evacuate`.
#[derive(Args, Clone, Debug)]
pub struct Evacuate {
    /// Where domains may go: hosts on which `receive` listens.
    #[arg(long, value_name = "HOST[:PORT]", value_delimiter = ',', required = true)]
    pub to: Vec<String>,
    /// Migrations at once.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub at_once: u16,
    /// Show the plan and stop.
    #[arg(long)]
    pub dry_run: bool,
    /// Only these domains.
    #[arg(long, value_name = "DOMAIN", value_delimiter = ',', conflicts_with = "except")]
    pub only: Vec<String>,
    /// All domains but these.
    #[arg(long, value_name = "DOMAIN", value_delimiter = ',')]
    pub except: Vec<String>,
    /// The plan, and in the end what became of it, as JSON.
    #[arg(long)]
    pub json: bool,
    /// How to connect.
    #[command(flatten)]
    pub connecting: Connecting,
}

/// What became of it all.
#[derive(Serialize)]
struct Outcome<'a> {
    plan: &'a Plan,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    done: Vec<work::Done>,
}

/// Plans, shows the plan, and carries it out.
pub fn run(options: &Evacuate, configuration: &Configuration, file: Option<&PathBuf>) -> u8 {
    let mut guests = match Xenstore::open().and_then(|mut store| guests(&mut store)) {
        Ok(guests) => guests,
        Err(error) => {
            eprintln!("dom0-migrator: {error}");
            return EXIT_NOT_BEGUN;
        }
    };
    let known: BTreeSet<&str> = guests.iter().map(|guest| guest.name.as_str()).collect();
    if let Some(unknown) =
        options.only.iter().chain(&options.except).find(|name| !known.contains(name.as_str()))
    {
        eprintln!("dom0-migrator: no domain {unknown:?} here; `xl list` shows those that are");
        return EXIT_NOT_BEGUN;
    }
    guests.retain(|guest| match options.only.is_empty() {
        true => !options.except.contains(&guest.name),
        false => options.only.contains(&guest.name),
    });
    let mut targets = Vec::new();
    for host in &options.to {
        targets.push(target(host, &guests, options, configuration));
    }
    let plan = plan::make(guests, targets);
    if !options.json {
        print!("{plan}");
    }
    let mut done = Vec::new();
    if !options.dry_run && !plan.moves.is_empty() {
        let workers = work::Workers { options, file, at_once: usize::from(options.at_once) };
        done = match workers.carry_out(&plan) {
            Ok(done) => done,
            Err(error) => {
                eprintln!("dom0-migrator: {error}");
                return EXIT_NOT_BEGUN;
            }
        };
    }
    if options.json {
        let outcome = Outcome { plan: &plan, done: done.clone() };
        println!("{}", serde_json::to_string_pretty(&outcome).unwrap_or_default());
    }
    if options.dry_run {
        return if plan.stay.is_empty() { EXIT_MIGRATED } else { EXIT_FAILED };
    }
    work::exit_code(&plan, &done)
}

/// Domains of this host, as xenstore knows them.
fn guests(store: &mut impl Store) -> Result<Vec<Guest>, StoreError> {
    let mut guests = Vec::new();
    for domain in domain::all(store)?.into_iter().filter(|domain| domain.id != DomainId(0)) {
        let id = domain.id;
        let mut kib = |node: &str| -> Result<Option<u64>, StoreError> {
            let text = store.read_text(&format!("/local/domain/{id}/memory/{node}"))?;
            Ok(text.and_then(|text| text.trim().parse().ok()))
        };
        // What it may come to have: the target must be able to give it.
        let kib = match kib("static-max")? {
            Some(kib) => Some(kib),
            None => kib("target")?,
        };
        let mut obstacle = None;
        if domain.name.ends_with(INCOMING) {
            obstacle = Some("it is being received".to_owned());
        } else if domain.name.ends_with(GIVEN_AWAY) {
            obstacle = Some(
                "it was given away, and nobody knows whether it runs there: `dom0-migrator resolve`"
                    .to_owned(),
            );
        } else if !store.directory(&format!("/local/domain/0/backend/pci/{id}"))?.is_empty() {
            obstacle = Some("it has a PCI device of this host".to_owned());
        } else if kib.is_none() {
            obstacle = Some("xenstore does not say how much memory it has".to_owned());
        }
        let disks = disks::survey(store, id)?.readable.into_iter().map(|disk| disk.path).collect();
        guests.push(Guest {
            id: id.0,
            name: domain.name,
            mib: kib.unwrap_or(0).div_ceil(1024),
            obstacle,
            disks,
        });
    }
    Ok(guests)
}

/// What a host has room for, and whose disks it has not.
fn target(host: &str, guests: &[Guest], options: &Evacuate, configuration: &Configuration) -> Target {
    let mut target = Target { host: host.to_owned(), free_mib: 0, problem: None, without: Vec::new() };
    let asked = Peer::connect(&connection::with_port(host), &options.connecting, configuration)
        .and_then(|mut peer| peer.host().map(|there| (peer, there)));
    let (mut peer, there) = match asked {
        Ok(asked) => asked,
        Err(problem) => {
            target.problem = Some(problem);
            return target;
        }
    };
    match there.free_mib {
        Some(mib) => target.free_mib = mib,
        None => {
            target.problem =
                Some("it does not say how much memory is free; `dom0-migrator doctor` there says why".into())
        }
    }
    for guest in guests.iter().filter(|guest| guest.obstacle.is_none()) {
        for disk in &guest.disks {
            let finding = peer.disk(disk, &guest.name);
            if finding.state == State::Bad {
                target.without.push((guest.id, format!("{}: {}", finding.what, finding.found)));
                break;
            }
        }
    }
    target
}
