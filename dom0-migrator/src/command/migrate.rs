//! `migrate`: runs `xl migrate` with this program as its helper and its transport.
//!
//! What holds afterwards: either the domain runs at the target, or it runs on here with its log of dirty pages off, and no
//! process of ours is left. Only when the two hosts lose each other in the hand-over for longer than a minute it stands suspended
//! here until they can talk again ([`Outcome::Undefined`]); `dom0-migrator resolve` then settles it.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use enlightenment::xenstore::RequestKind;

use super::configuration::{Configuration, ConfigurationError};
use super::connection::Transport;
use super::domain::{self, Domain, DomainError};
use super::judge::{Ended, judge};
use super::link::{self, Link, LinkError, Wanted};
use super::metrics::Metrics;
use super::observer::{Observed, Observer};
use super::progress::{Progress, show_summary};
use super::settle::{self, SettleError};
use super::summary::{Outcome, Parts, Summary};
use super::watch::{Happening, Run, Seen, serve, start_xl};
use super::{
    EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MIGRATED, EXIT_NOT_BEGUN, EXIT_UNDEFINED, Migrate, connection,
    signals,
};
use crate::control::{HelperKind, TargetOutcome, Token};
use crate::disks;
use crate::handoff::{HandoffError, Listener, Order};
use crate::handover::record::{Process, Record, RecordError, Records};
use crate::handover::{SourceEvent, SourceState};
use crate::helper::policy::Limits;
use crate::inquiry::Needs;
use crate::lists::Requester;
use crate::xen::release::Release;
use crate::xenstore::{StoreError, Xenstore};

/// Why nothing was begun.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// xenstore.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The domain.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// The target.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The helpers' socket.
    #[error(transparent)]
    Handoff(#[from] HandoffError),
    /// The record of this migration.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The certificates.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// An earlier migration of this domain is not settled.
    #[error("an earlier migration of {domain} is not settled: {source}")]
    Earlier {
        /// The domain.
        domain: String,
        /// Why.
        source: SettleError,
    },
    /// The system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> MigrateError {
    move |source| MigrateError::System { what, source }
}

/// Migrates, prints the summary, writes it where it is wanted.
pub fn run(options: &Migrate, configuration: &Configuration) -> u8 {
    let (tell, happenings) = channel();
    let on_signal = {
        let tell = tell.clone();
        signals::on_signal(move |signal| drop(tell.send(Happening::Signal(signal))))
    };
    // Opened before anything is begun: what cannot be written had better be known now.
    let json = match options.json.as_ref().map(File::create).transpose() {
        Ok(json) => json,
        Err(error) => {
            eprintln!("dom0-migrator: the file for the summary: {error}");
            return EXIT_NOT_BEGUN;
        }
    };
    let migrated = on_signal
        .map_err(system("signals"))
        .and_then(|()| migrate(options, configuration, &tell, &happenings));
    match migrated {
        Ok((summary, observed)) => {
            show_summary(options.progress, &summary);
            write_json(json, &summary);
            observed.close(options, &summary);
            match summary.outcome {
                Outcome::Migrated => EXIT_MIGRATED,
                Outcome::Failed => EXIT_FAILED,
                Outcome::Interrupted => EXIT_INTERRUPTED,
                Outcome::Undefined => EXIT_UNDEFINED,
            }
        }
        Err(error) => {
            eprintln!("dom0-migrator: {error}");
            let not_begun = serde_json::json!({
                "domain": options.domain, "outcome": "not_begun", "error": error.to_string(),
            });
            write_json(json, &not_begun);
            EXIT_NOT_BEGUN
        }
    }
}

/// Writes the summary, if it is wanted. What happened to the domain is what the exit code tells, so failing is only said.
fn write_json(file: Option<File>, summary: &impl serde::Serialize) {
    let Some(mut file) = file else { return };
    let written = serde_json::to_writer_pretty(&file, summary)
        .map_err(std::io::Error::from)
        .and_then(|()| writeln!(file));
    if let Err(error) = written {
        eprintln!("dom0-migrator: the summary could not be written: {error}");
    }
}

fn migrate(
    options: &Migrate,
    configuration: &Configuration,
    tell: &Sender<Happening>,
    happenings: &Receiver<Happening>,
) -> Result<(Summary, Observed), MigrateError> {
    let transport = configuration.transport(&options.connecting)?;
    let records = Records::open(Some(&configuration.records))?;
    records.prune();
    let domain = settled(&records, &options.domain, &transport)?;
    let mut helper = if options.stock { HelperKind::Stock } else { HelperKind::Poolskip };
    if helper == HelperKind::Poolskip
        && let Err(error) = Release::running()
    {
        tracing::warn!("a plain migration with libxl's own helper follows: {error}");
        helper = HelperKind::Stock;
    }
    let started = Instant::now();
    let metrics = Metrics::start(
        &domain.name,
        &options.target,
        options.metrics_listen,
        options.metrics_file.as_deref(),
    );
    let metrics = metrics.map_err(system("the port for metrics"))?;
    let token = Token::random().map_err(system("a random token"))?;
    let mut store = Xenstore::open()?;
    let disks = disks::survey(&mut store, domain.id)?;
    let needs = Needs { memory_bytes: domain::memory_bytes(&mut store, domain.id)?, disks: disks.fixed };
    let disks_refused = disks.refused;
    let mut link = Link::open(
        &connection::with_port(&options.target),
        token.clone(),
        &domain,
        helper,
        options.debug,
        Wanted {
            transport: Transport { bandwidth: configuration.limit(options.bandwidth), ..transport.clone() },
            connections: options.connections.unwrap_or(configuration.connections),
            compression: options.compress.unwrap_or(configuration.compress),
            needs,
        },
    )?;
    if let Some(why) = &link.stock_because {
        tracing::warn!("a plain migration with libxl's own helper follows: {why}");
        helper = HelperKind::Stock;
    }
    if let Some(why) = &link.one_because {
        tracing::warn!("the stream goes over one connection, as it is: {why}");
    }
    let asked = (helper == HelperKind::Poolskip && !options.no_references)
        .then(|| AskedForLists::ask(&domain))
        .flatten();
    let listener = Arc::new(Listener::bind()?);
    let order = Order {
        socket: true,
        references: !options.no_references,
        wait_lists_seconds: options.wait_lists.unwrap_or(configuration.wait_lists),
        debug: options.debug,
        limits: Limits { max_downtime_ms: options.max_downtime, on_stall: options.on_stall },
        asked: asked.as_ref().map(|asked| asked.request),
        peek: configuration.peek && !options.no_peek,
        ..Order::default()
    };
    serve(&listener, &link, order, tell).map_err(system("handoff"))?;
    let mut record =
        records.begin(&token, SourceState::Sending, &domain.name, Some(domain.id), &link.target)?;
    let progress = Progress::new(options.progress, &domain.name, &options.target);
    let observer = Observer::new(started, progress, metrics);
    let xl = match start_xl(options, &domain, helper, &listener, tell) {
        Ok(xl) => xl,
        Err(error) => {
            // Nothing was done to the domain.
            record.step(SourceEvent::GaveUp)?;
            record.step(SourceEvent::Resumed)?;
            return Err(system("xl migrate")(error));
        }
    };
    // From here on the helper talks to the guest.
    asked.into_iter().for_each(AskedForLists::hand_over);
    let process = Process::of(xl.pid());
    record.amend(|content| content.xl = process)?;
    let mut run = Run { xl, helper, observer, link: &mut link, record: &mut record, seen: Seen::default() };
    let status = run.watch(happenings);
    let total_seconds = started.elapsed().as_secs_f64();
    run.end_orphan(status);
    run.collect(happenings);
    let said = run.xl.said();
    let before_end = run.link.carried();
    let mut observed = run.observer.finish(before_end.total());
    let Seen { saved, carried, interrupted, .. } = run.seen;
    listener.close();
    link.hang_up(!matches!(record.state(), SourceState::Sending));
    let mut target = match record.state() {
        SourceState::Given => Err(format!("{} cannot be reached", link.target)),
        _ => link.outcome(),
    };
    if let Ok(TargetOutcome { restore: Some(restore), .. }) = &mut target {
        observed.target = std::mem::take(&mut restore.timeline);
    }
    // The guest is told what xl's helper could not tell it.
    if record.state() != SourceState::Gone && saved.is_none() && helper == HelperKind::Poolskip {
        tell_guest(&domain);
    }
    let settled = finish(&mut record, &transport);
    let ended = Ended { status, interrupted, said: &said, saved: saved.as_ref(), target: target.as_ref() };
    let (outcome, error) = judge(&ended, record.state(), settled.err());
    let mut wire = link.carried();
    (wire.stream, wire.side) = (before_end.stream, before_end.side);
    // What acknowledges the last words may come a moment after them.
    observed.carried_in_all(wire.total());
    let summary = Summary::new(Parts {
        domain: domain.name,
        helper,
        outcome,
        error,
        total_seconds,
        wire,
        stream: link.blocks(),
        save: saved,
        carried,
        disks_refused,
        target: target.ok(),
    });
    Ok((summary, observed))
}

/// Finds the domain, after an earlier migration of it that was cut off is settled.
fn settled(records: &Records, wanted: &str, transport: &Transport) -> Result<Domain, MigrateError> {
    let mut found = domain::find(&mut Xenstore::open()?, wanted);
    for open in records.open_ones::<SourceState>()? {
        let same = found.as_ref().map_or(wanted == open.domain, |domain| {
            Some(domain.id) == open.domain_id || domain.name == open.domain
        });
        if !same {
            continue;
        }
        let earlier = |source| MigrateError::Earlier { domain: open.domain.clone(), source };
        let Some(mut record) = records.take::<SourceState>(&open.id)? else { continue };
        let state = finish(&mut record, transport).map_err(earlier)?;
        tracing::info!(id = %open.id, ?state, "an earlier migration that was cut off is settled");
        found = domain::find(&mut Xenstore::open()?, wanted);
    }
    Ok(found?)
}

/// Settles the source's side.
fn finish(record: &mut Record<SourceState>, transport: &Transport) -> Result<SourceState, SettleError> {
    settle::source(record, |record| {
        let content = record.content();
        link::ask(&content.peer, &content.id, &content.domain, transport)
    })
}

/// A guest that makes its lists while xl starts. Told that it is over when this is dropped.
struct AskedForLists<'a> {
    domain: &'a Domain,
    request: u64,
    handed_over: bool,
}

impl<'a> AskedForLists<'a> {
    /// Asks; what goes wrong the helper meets again, and says.
    fn ask(domain: &'a Domain) -> Option<Self> {
        let mut requester = Requester::new(Xenstore::open().ok()?, domain.id);
        let request = requester
            .request()
            .inspect_err(|error| tracing::debug!(%error, "the helper will ask for the lists"))
            .ok()?;
        Some(Self { domain, request, handed_over: false })
    }

    /// Somebody else talks to the guest now.
    fn hand_over(mut self) {
        self.handed_over = true;
    }
}

impl Drop for AskedForLists<'_> {
    fn drop(&mut self) {
        if !self.handed_over {
            tell_guest(self.domain);
        }
    }
}

/// Tells the guest that its migration is over.
fn tell_guest(domain: &Domain) {
    if let Ok(store) = Xenstore::open() {
        let _ = Requester::new(store, domain.id).tell(RequestKind::Ended);
    }
}
