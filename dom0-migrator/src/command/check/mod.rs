//! `check`: what a migration would be now, and what is in its way. Nothing is begun, and nothing is changed on either side; the guest is
//! asked for its lists as a migration asks, and told that it is over.
//!
//! ```text
//! source                                              target
//!   lists, a look at some pages of memory
//!   samples of every disk ─── Inquiry ─────────────► the same paths: opened, compared, tried out
//!                         ◄── Findings ────────────── version, memory, disks, storage
//!   for a second ═══════════ bytes, N connections ══► counted
//!   a second look: what has changed meanwhile
//! ```

pub mod answer;
mod ask;
mod model;
mod obstacle;
mod report;
mod rounds;
mod sample;

use std::sync::Arc;
use std::time::Duration;

use enlightenment::Pfn;
use enlightenment::xenstore::RequestKind;

use super::configuration::Configuration;
use super::connection::{self, Transport};
use super::domain::{self, Domain};
use super::host::Quiet;
use super::{Check, EXIT_FAILED, EXIT_MIGRATED, EXIT_NOT_BEGUN};
use crate::control::STREAM_VERSION;
use crate::disks::{self, Disks};
use crate::engine::ReferenceMap;
use crate::engine::disk::{AlignedBuffer, Disk};
use crate::engine::xen_stream::PAGE;
use crate::handover::SourceState;
use crate::handover::record::Records;
use crate::helper::Libraries;
use crate::inquiry::{DISKS_MAX, Digest, DiskInquiry, Findings, Inquiry, Needs, Sample};
use crate::lists::{self, DomainMemory, GuestMemory, Requester};
use crate::xenstore::{Store, StoreError, Xenstore};
use obstacle::{Obstacle, Weight};
use report::CheckReport;
use sample::Look;

/// Pages of memory that are looked at.
const LOOKED_AT: u64 = 4096;
/// Listed pages that the target compares.
const LISTED: usize = 512;
/// Samples that are read from disks here, of all disks together, and of one at most.
const READ_HERE: usize = 512;
const READ_OF_ONE: usize = 32;
/// Share of samples of a disk that must be the same, when it is the same disk: what is being written to differs for a moment.
const SAME_DISK: f64 = 0.5;
/// Share of listed pages that should be the same.
const GOOD_HINTS: f64 = 0.9;

/// Checks, and says what was found. The exit code is 0 when nothing is in the way, 1 when it would go with less than could be, 2 when it
/// would not begin.
pub fn run(options: &Check, configuration: &Configuration) -> u8 {
    let failed = |error: &dyn std::fmt::Display| {
        eprintln!("dom0-migrator: {error}");
        EXIT_NOT_BEGUN
    };
    let transport = match configuration.transport(&options.connecting) {
        Ok(transport) => Transport { bandwidth: configuration.limit(options.bandwidth), ..transport },
        Err(error) => return failed(&error),
    };
    let found = Xenstore::open()
        .map_err(domain::DomainError::from)
        .and_then(|mut store| Ok((domain::find(&mut store, &options.domain)?, store)));
    let (domain, mut store) = match found {
        Ok(found) => found,
        Err(error) => return failed(&error),
    };
    let report = match check(options, configuration, &transport, &domain, &mut store) {
        Ok(report) => report,
        Err(error) => return failed(&error),
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report).unwrap_or_default());
    } else {
        print!("{report}");
    }
    match report.worst() {
        None => EXIT_MIGRATED,
        Some(Weight::Some | Weight::Plain) => EXIT_FAILED,
        Some(Weight::Blocks) => EXIT_NOT_BEGUN,
    }
}

fn check(
    options: &Check,
    configuration: &Configuration,
    transport: &Transport,
    domain: &Domain,
    store: &mut Xenstore,
) -> Result<CheckReport, StoreError> {
    let mut report = CheckReport {
        domain: domain.name.clone(),
        target: connection::with_port(&options.target),
        connections: options.connections.unwrap_or(configuration.connections),
        ..CheckReport::default()
    };
    report.memory_bytes = domain::memory_bytes(store, domain.id)?;
    report.obstacles.extend(local(store, domain, configuration)?);
    let disks = disks::survey(store, domain.id)?;
    report.obstacles.extend(disks.refused.iter().map(Obstacle::of_disk));

    let libraries = Libraries::open(Arc::new(Quiet)).map_err(|error| {
        let way_out = "a release of Xen that this one of Poolskip knows; until then libxl's own helper runs";
        report.obstacles.push(Obstacle::new("source-xen", Weight::Plain, error, way_out));
    });
    let patience = Duration::from_secs(options.wait_lists.unwrap_or(configuration.wait_lists));
    let mut guest = match &libraries {
        Ok(libraries) => GuestView::open(libraries, domain, patience, &mut report)?,
        Err(()) => None,
    };
    let mut first = None;
    let mut listed = None;
    if let Some(GuestView { memory, map }) = &mut guest {
        let pages = sample::spread(memory.last_pfn(), LOOKED_AT);
        first = seen(sample::look(memory, map.as_ref(), &pages), &mut report);
        if let Some(map) = map {
            let pages = map.some(LISTED);
            listed = seen(sample::look(memory, Some(map), &pages), &mut report);
        }
    }
    let map = guest.as_ref().and_then(|guest| guest.map.as_ref());
    let (inquiry, here) = inquiry(domain, &disks, listed.as_ref(), map);
    let findings = match ask::ask(&report.target, &inquiry, transport) {
        Ok(findings) => {
            report.link = match ask::try_link(&report.target, report.connections, transport) {
                Ok(link) => Some(link),
                Err(error) => {
                    let way_out = "look at the network between the hosts; the target's log may say more";
                    let what = format!("the link could not be tried out: {error}");
                    report.obstacles.push(Obstacle::new("link", Weight::Some, what, way_out));
                    None
                }
            };
            Some(findings)
        }
        Err(error) => {
            report.obstacles.push(Obstacle::of_target(&error));
            None
        }
    };
    let with_helper =
        libraries.is_ok() && findings.as_ref().is_none_or(|found| found.stock_because.is_none());
    if let Some(findings) = findings {
        judge(&inquiry, &here, listed.as_ref(), &findings, &mut report);
    }
    if let (Some(first), Some(GuestView { memory, map })) = (&first, &mut guest) {
        report.zero_bytes = Some(first.zero() * report.memory_bytes as f64);
        let pages: Vec<Pfn> = first.pages.iter().map(|seen| seen.pfn).collect();
        if let Some(later) = seen(sample::look(memory, map.as_ref(), &pages), &mut report) {
            report.dirty_bytes_per_second =
                Some(first.changes_per_second(&later) * report.memory_bytes as f64);
        }
    }
    report.estimate(with_helper, options.max_downtime as f64 / 1e3);
    report.obstacles.sort_by_key(|obstacle| std::cmp::Reverse(obstacle.weight));
    Ok(report)
}

/// A look, or why there was none.
fn seen(look: std::io::Result<Look>, report: &mut CheckReport) -> Option<Look> {
    look.map_err(|error| {
        let what = format!("the guest's memory cannot be looked at: {error}");
        report.obstacles.push(Obstacle::new(
            "memory-unreadable",
            Weight::Some,
            what,
            "run it as root in dom0",
        ));
    })
    .ok()
}

/// What is in the way here, whatever the target says.
fn local(
    store: &mut impl Store,
    domain: &Domain,
    configuration: &Configuration,
) -> Result<Vec<Obstacle>, StoreError> {
    let mut obstacles = Vec::new();
    if !store.directory(&format!("/local/domain/0/backend/pci/{}", domain.id))?.is_empty() {
        obstacles.push(Obstacle::new(
            "passthrough",
            Weight::Blocks,
            "the domain has a PCI device of this host",
            format!(
                "`xl pci-list {0}`, and `xl pci-detach {0} …` for each; attach another one at the target",
                domain.name
            ),
        ));
    }
    let open = Records::open(Some(&configuration.records))
        .and_then(|records| records.open_ones::<SourceState>())
        .unwrap_or_default();
    if open.iter().any(|one| one.domain_id == Some(domain.id) || one.domain == domain.name) {
        obstacles.push(Obstacle::new(
            "earlier-migration",
            Weight::Some,
            "an earlier migration of the domain runs, or was cut off and is not settled",
            format!("`dom0-migrator status`; `dom0-migrator resolve {}` settles it, and `migrate` does before it begins", domain.name),
        ));
    }
    Ok(obstacles)
}

/// What the guest tells, and its memory.
struct GuestView<'a> {
    memory: DomainMemory<'a>,
    map: Option<ReferenceMap>,
}

impl<'a> GuestView<'a> {
    fn open(
        libraries: &'a Libraries,
        domain: &Domain,
        patience: Duration,
        report: &mut CheckReport,
    ) -> Result<Option<Self>, StoreError> {
        let mut requester = Requester::new(Xenstore::open()?, domain.id);
        let Libraries { control, guest, .. } = libraries;
        let map = match lists::take(&mut requester, control, guest, domain.id, None, patience) {
            Ok(lists) => {
                report.pages_listed = Some(lists.report.pages_listed);
                Some(lists.map)
            }
            Err(error) => {
                report.obstacles.push(Obstacle::of_lists(&error));
                None
            }
        };
        // What waits for a migration need not wait any longer.
        if let Err(error) = requester.tell(RequestKind::Ended) {
            tracing::warn!(%error, "the guest was not told that it is over");
        }
        match DomainMemory::open(requester.store(), &libraries.control, &libraries.guest, domain.id) {
            Ok(memory) => Ok(Some(Self { memory, map })),
            Err(error) => {
                report.obstacles.push(Obstacle::new(
                    "memory-unreadable",
                    Weight::Some,
                    error,
                    "run it as root in dom0",
                ));
                Ok(None)
            }
        }
    }
}

/// What is asked; and of each disk, how many of its samples were read from it here (the others are listed pages of the guest's memory).
fn inquiry(
    domain: &Domain,
    disks: &Disks,
    listed: Option<&Look>,
    map: Option<&ReferenceMap>,
) -> (Inquiry, Vec<usize>) {
    let each = (READ_HERE / disks.readable.len().max(1)).clamp(1, READ_OF_ONE);
    let mut here = Vec::new();
    let mut asked = Vec::new();
    for name in disks.readable.iter().take(DISKS_MAX) {
        let mut samples = read_some(&name.path, each);
        here.push(samples.len());
        samples.extend(listed.iter().flat_map(|look| &look.pages).filter_map(|seen| {
            let place = seen.place?;
            let vdev = map?.vdevs().get(usize::from(place.disk))?;
            (*vdev == name.vdev).then_some(Sample { offset: place.offset, digest: seen.digest })
        }));
        asked.push(DiskInquiry { vdev: name.vdev.0, path: name.path.clone(), samples });
    }
    // Memory has a name of its own among the obstacles.
    let needs = Needs { memory_bytes: 0, disks: disks.fixed.clone() };
    (Inquiry { domain: domain.name.clone(), stream_version: STREAM_VERSION, needs, disks: asked }, here)
}

/// Some pages of a disk as it is read here.
fn read_some(path: &std::path::Path, count: usize) -> Vec<Sample> {
    let Ok(disk) = Disk::open(path) else { return Vec::new() };
    let Some(last) = (disk.size() / PAGE as u64).checked_sub(1) else { return Vec::new() };
    let mut buffer = AlignedBuffer::default();
    sample::spread(Pfn(last), count as u64)
        .into_iter()
        .filter_map(|page| {
            let offset = page.0 * PAGE as u64;
            let read = disk.read(buffer.get(PAGE), offset).ok()?;
            (read == PAGE).then(|| Sample { offset, digest: Digest::of(&buffer.bytes()[..PAGE]) })
        })
        .collect()
}

/// Makes of the target's findings what they mean.
fn judge(
    inquiry: &Inquiry,
    here: &[usize],
    listed: Option<&Look>,
    findings: &Findings,
    report: &mut CheckReport,
) {
    report.target_version = Some(findings.version.clone());
    report.storage = findings.storage;
    let mut found = Vec::new();
    let mut add =
        |name, weight, what: String, way_out: &str| found.push(Obstacle::new(name, weight, what, way_out));
    if let Some(why) = &findings.refused_because {
        add("target-refuses", Weight::Blocks, why.clone(), "what it says");
    }
    if let Some(why) = &findings.stock_because {
        let way_out = "the same release of Poolskip on both hosts, and a Xen that it knows; until then libxl's own helper runs";
        add("target-helper", Weight::Plain, why.clone(), way_out);
    }
    match findings.free_memory_bytes {
        Some(free) if free < report.memory_bytes => add(
            "memory",
            // A dom0 that gives way may have enough; xl finds out.
            if findings.dom0_gives_way { Weight::Some } else { Weight::Blocks },
            format!("the target has {} MiB free, the domain needs {}", free >> 20, report.memory_bytes >> 20),
            "`xl mem-set` for domains there, dom0 included, or another target",
        ),
        Some(_) => {}
        None => add(
            "memory-unknown",
            Weight::Some,
            "xl at the target does not say how much memory is free".into(),
            "`xl info` there",
        ),
    }
    let zeros = Digest::of_zeros();
    // Listed pages whose disk is the same one, and of these, those that are the same.
    let (mut with_disk, mut same) = (0, 0);
    for ((asked, &here), disk) in inquiry.disks.iter().zip(here).zip(&findings.disks) {
        let shown = asked.path.display();
        let share = format!("both hosts must see the same disk at {shown}");
        if let Some(problem) = &disk.problem {
            add("disk-at-target", Weight::Some, problem.clone(), &share);
            continue;
        }
        let telling: Vec<bool> = asked
            .samples
            .iter()
            .zip(&disk.same)
            .take(here)
            .filter(|(sample, _)| sample.digest != zeros)
            .map(|(_, &same)| same)
            .collect();
        let alike = telling.iter().filter(|&&same| same).count();
        if !telling.is_empty() && (alike as f64) < telling.len() as f64 * SAME_DISK {
            let what =
                format!("{shown}: {alike} of {} pages that were compared are the same there", telling.len());
            add("disk-differs", Weight::Some, what, &share);
            continue;
        }
        let of_guest = disk.same.get(here..).unwrap_or_default();
        with_disk += of_guest.len();
        same += of_guest.iter().filter(|&&same| same).count();
    }
    if with_disk > 0 && (same as f64) < with_disk as f64 * GOOD_HINTS {
        add(
            "hints-differ",
            Weight::Some,
            format!(
                "of {with_disk} listed pages that were looked at, {same} lie on the disk as the guest says"
            ),
            "`guest-probe status` in the guest; pages that differ go over the network, so nothing is lost but time",
        );
    }
    let samples = listed.map_or(0, |look| look.pages.len());
    report.samples = samples as u64;
    report.samples_same = same as u64;
    if let Some(pages) = report.pages_listed.filter(|_| samples > 0) {
        report.reference_bytes = (pages * PAGE as u64) as f64 * same as f64 / samples as f64;
    }
    if report.pages_listed.is_some() && report.reference_bytes == 0.0 {
        let way_out = "the obstacles beside this one say why";
        add(
            "no-references",
            Weight::Plain,
            "no listed page was found on a disk of the target".into(),
            way_out,
        );
    }
    report.obstacles.extend(found);
}
