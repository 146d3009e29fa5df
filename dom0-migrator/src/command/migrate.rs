//! `migrate`: runs `xl migrate` with this program as its helper and its transport.
//!
//! What holds afterwards: either the domain runs at the target, or it runs on here with its log of dirty pages off, and no
//! process of ours is left. The one exception is xl's own: once the target has been told to go, a lost reply leaves both sides
//! in doubt ([`Outcome::Undefined`]).

use std::fs::File;
use std::io::{BufReader, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use enlightenment::xenstore::RequestKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::child::{self, Xl};
use super::domain::{self, Domain, DomainError};
use super::metrics::Metrics;
use super::observer::{Observed, Observer};
use super::progress::{Progress, show_summary};
use super::summary::{Outcome, Parts, Summary, WireBytes};
use super::{
    EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MIGRATED, EXIT_NOT_BEGUN, EXIT_UNDEFINED, Migrate, connection,
    signals,
};
use crate::control::{self, Connection, FromSource, FromTarget, HelperKind, LineError, TargetOutcome, Token};
use crate::handoff::{Event, HandoffError, Listener, Order, Peer, Role};
use crate::helper::policy::Limits;
use crate::lists::Requester;
use crate::report::{CarriedReport, SaveReport};
use crate::xen::control::Control;
use crate::xen::logger::{Level, Logger, Sink};
use crate::xen::release::Release;
use crate::xenstore::{StoreError, Xenstore};

/// How often xl is looked after.
const TICK: Duration = Duration::from_millis(100);
/// How long helpers may take to report once xl has ended.
const REPORTS: Duration = Duration::from_secs(10);
/// How long the target may take to clean up and report.
const TARGET: Duration = Duration::from_secs(120);
/// How long the target may take to answer before anything is begun.
const ANSWER: Duration = Duration::from_secs(30);

/// Why nothing was begun.
#[derive(Debug, thiserror::Error)]
enum MigrateError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Domain(#[from] DomainError),
    #[error("{what} {target}: {source}; does `dom0-migrator receive` listen there?")]
    Target { what: &'static str, target: String, source: LineError },
    #[error("{target} refuses: {reason}")]
    Refused { target: String, reason: String },
    #[error(transparent)]
    Handoff(#[from] HandoffError),
    #[error("{what}: {source}")]
    System { what: &'static str, source: std::io::Error },
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> MigrateError {
    move |source| MigrateError::System { what, source }
}

/// Something that happened while xl runs.
enum Happening {
    Heard(Event),
    Gone(Role),
    Line(String),
    Signal(Signal),
}

/// Migrates, prints the summary, writes it where it is wanted.
pub fn run(options: &Migrate) -> u8 {
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
    let migrated = on_signal.map_err(system("signals")).and_then(|()| migrate(options, &tell, &happenings));
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
    tell: &Sender<Happening>,
    happenings: &Receiver<Happening>,
) -> Result<(Summary, Observed), MigrateError> {
    let domain = domain::find(&mut Xenstore::open()?, &options.domain)?;
    let helper = if options.stock { HelperKind::Stock } else { HelperKind::Poolskip };
    let started = Instant::now();
    let metrics = Metrics::start(
        &domain.name,
        &options.target,
        options.metrics_listen,
        options.metrics_file.as_deref(),
    );
    let metrics = metrics.map_err(system("the port for metrics"))?;
    let mut link = Link::open(&connection::with_port(&options.target), &domain, helper, options.debug)?;
    let listener = Arc::new(Listener::bind()?);
    let order = Order {
        socket: true,
        references: !options.no_references,
        wait_lists_seconds: options.wait_lists,
        debug: options.debug,
        limits: Limits { max_downtime_ms: options.max_downtime, on_stall: options.on_stall },
    };
    serve(&listener, &link, order, tell).map_err(system("handoff"))?;
    let progress = Progress::new(options.progress, &domain.name, &options.target);
    let observer = Observer::new(started, progress, metrics);
    let xl = start_xl(options, &domain, helper, &listener, tell).map_err(system("xl migrate"))?;
    let mut run = Run { xl, helper, observer, link: &link, seen: Seen::default() };
    let status = run.watch(happenings);
    let total_seconds = started.elapsed().as_secs_f64();
    run.end_orphan(status);
    run.collect(happenings);
    let said = run.xl.said();
    let mut observed = run.observer.finish(link.carried().total());
    let Seen { saved, carried, interrupted, .. } = run.seen;
    listener.close();
    let wire_before_end = link.carried();
    link.hang_up(status.is_some_and(|status| status.success()));
    let mut target = link.outcome();
    if let Ok(TargetOutcome { restore: Some(restore), .. }) = &mut target {
        observed.target = std::mem::take(&mut restore.timeline);
    }
    let (outcome, error) = judge(status, interrupted, &said, saved.as_ref(), target.as_ref());
    if outcome != Outcome::Migrated {
        clean_up(&domain, helper, saved.is_some());
    }
    let wire =
        WireBytes { control: connection::carried(&link.control).map_or(0, |c| c.total()), ..wire_before_end };
    let summary = Summary::new(Parts {
        domain: domain.name,
        helper,
        outcome,
        error,
        total_seconds,
        wire,
        save: saved,
        carried,
        target: target.ok(),
    });
    Ok((summary, observed))
}

fn start_xl(
    options: &Migrate,
    domain: &Domain,
    helper: HelperKind,
    listener: &Listener,
    tell: &Sender<Happening>,
) -> std::io::Result<Xl> {
    // xl runs this by `sh -c`, with the stream's two directions as stdin and stdout.
    let own_path = std::env::current_exe()?;
    let quoted = own_path.to_string_lossy().replace('\'', r"'\''");
    let transport = format!("exec '{quoted}' carry");
    let number = domain.id.to_string();
    let mut arguments = vec!["migrate"];
    if options.debug {
        arguments.push("--debug");
    }
    arguments.extend(["-s", "", &number, &transport]);
    let command = child::xl(&arguments, helper, listener.path())?;
    let tell = tell.clone();
    Xl::start(command, move |line| drop(tell.send(Happening::Line(line.to_owned()))))
}

/// Gives helpers and carrier their orders, and hands on what they say, until the listener is closed.
fn serve(
    listener: &Arc<Listener>,
    link: &Link,
    order: Order,
    tell: &Sender<Happening>,
) -> std::io::Result<()> {
    let sockets = (link.stream.try_clone()?, link.side.try_clone()?);
    let (listener, tell) = (listener.clone(), tell.clone());
    std::thread::Builder::new().name("handoff".into()).spawn(move || {
        while let Ok(peer) = listener.accept() {
            let (Ok(stream), Ok(side)) = (sockets.0.try_clone(), sockets.1.try_clone()) else { return };
            let (order, tell) = (order.clone(), tell.clone());
            std::thread::spawn(move || {
                if let Err(error) = attend(&peer, stream, side, &order, &tell) {
                    tracing::warn!(%error, "a helper was lost");
                }
            });
        }
    })?;
    Ok(())
}

fn attend(
    peer: &Peer,
    stream: TcpStream,
    side: TcpStream,
    order: &Order,
    tell: &Sender<Happening>,
) -> Result<(), HandoffError> {
    let Some(Event::Hello { role, domain, pid }) = peer.hear()? else {
        return Err(HandoffError::Closed("its hello"));
    };
    peer.order(order, Some(&OwnedFd::from(if role == Role::Carrier { stream } else { side })))?;
    let _ = tell.send(Happening::Heard(Event::Hello { role, domain, pid }));
    let mut heard = peer.hear();
    while let Ok(Some(event)) = heard {
        let _ = tell.send(Happening::Heard(event));
        heard = peer.hear();
    }
    let _ = tell.send(Happening::Gone(role));
    heard.map(|_| ())
}

/// The three connections.
struct Link {
    target: String,
    control: TcpStream,
    lines: BufReader<TcpStream>,
    stream: TcpStream,
    side: TcpStream,
}

impl Link {
    fn open(target: &str, domain: &Domain, helper: HelperKind, debug: bool) -> Result<Self, MigrateError> {
        let at = |what| {
            let target = target.to_owned();
            move |source| MigrateError::Target { what, target, source }
        };
        let token = Token::random().map_err(system("a random token"))?;
        let mut control =
            connection::connect(target, Connection::Control, &token).map_err(at("cannot reach"))?;
        let mut lines = connection::reader(&control).map_err(system("control connection"))?;
        control.set_read_timeout(Some(ANSWER)).map_err(system("control connection"))?;
        let start = FromSource::Start { domain: domain.name.clone(), helper, debug };
        control::write_line(&mut control, &start).map_err(at("cannot talk to"))?;
        match control::read_line(&mut lines).map_err(at("no answer from"))? {
            FromTarget::Ready => {}
            FromTarget::Refused { reason } => {
                return Err(MigrateError::Refused { target: target.to_owned(), reason });
            }
            FromTarget::Finished(outcome) => {
                let reason = outcome.error.unwrap_or_default();
                return Err(MigrateError::Refused { target: target.to_owned(), reason });
            }
        }
        let stream = connection::connect(target, Connection::Stream, &token).map_err(at("cannot reach"))?;
        let side = connection::connect(target, Connection::Side, &token).map_err(at("cannot reach"))?;
        Ok(Self { target: target.to_owned(), control, lines, stream, side })
    }

    fn carried(&self) -> WireBytes {
        let of = |connection| connection::carried(connection).map_or(0, connection::Carried::total);
        WireBytes { stream: of(&self.stream), side: of(&self.side), control: of(&self.control) }
    }

    /// Ends stream and side channel: xl is done here, whatever the target still waits for; and says so when it failed.
    fn hang_up(&mut self, migrated: bool) {
        if !migrated && let Err(error) = control::write_line(&mut self.control, &FromSource::GaveUp) {
            tracing::warn!(%error, target = self.target, "could not be told that xl has failed");
        }
        for connection in [&self.stream, &self.side] {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// What the target says in the end.
    fn outcome(&mut self) -> Result<TargetOutcome, String> {
        let _ = self.control.set_read_timeout(Some(TARGET));
        match control::read_line(&mut self.lines) {
            Ok(FromTarget::Finished(outcome)) => Ok(*outcome),
            Ok(other) => Err(format!("{} said {other:?} instead of how it ended", self.target)),
            Err(error) => Err(format!("{} did not say how it ended: {error}", self.target)),
        }
    }
}

/// What was seen of a run.
#[derive(Default)]
struct Seen {
    saved: Option<SaveReport>,
    carried: Option<CarriedReport>,
    save_helper: Option<u32>,
    carrier: bool,
    /// xl has gone so far that it starts the helper, if it has not done so.
    saving: bool,
    interrupted: bool,
}

/// xl and what happens around it.
struct Run<'a> {
    xl: Xl,
    helper: HelperKind,
    observer: Observer,
    link: &'a Link,
    seen: Seen,
}

impl Run<'_> {
    /// Looks after xl until it ends.
    fn watch(&mut self, happenings: &Receiver<Happening>) -> Option<std::process::ExitStatus> {
        loop {
            match happenings.recv_timeout(TICK) {
                Ok(happening) => self.handle(happening),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            }
            let link = self.link;
            self.observer.tick(|| link.carried().total());
            match self.xl.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => return Some(status),
                Err(error) => {
                    tracing::error!(%error, "xl was lost");
                    return None;
                }
            }
            if self.seen.interrupted {
                self.interrupt();
            }
        }
    }

    /// Ends a helper whose xl has been killed: it would write all memory before it noticed.
    fn end_orphan(&self, status: Option<std::process::ExitStatus>) {
        let killed = status.is_none_or(|status| status.code().is_none());
        if let Some(pid) = self.seen.save_helper.filter(|_| killed && self.seen.saved.is_none()) {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
        }
    }

    /// Hears what is still being said once xl has ended.
    fn collect(&mut self, happenings: &Receiver<Happening>) {
        let deadline = Instant::now() + REPORTS;
        while self.seen.save_helper.is_some() || self.seen.carrier {
            let left = deadline.saturating_duration_since(Instant::now());
            match happenings.recv_timeout(left) {
                Ok(happening) => self.handle(happening),
                Err(_) => return,
            }
        }
        while let Ok(happening) = happenings.try_recv() {
            self.handle(happening);
        }
    }

    fn handle(&mut self, happening: Happening) {
        match happening {
            Happening::Heard(Event::Hello { role: Role::Save, pid, .. }) => {
                self.seen.save_helper = Some(pid);
                self.observer.helper_began();
            }
            Happening::Heard(Event::Hello { role: Role::Carrier, .. }) => self.seen.carrier = true,
            Happening::Heard(Event::Hello { .. } | Event::Restored(_)) => {}
            Happening::Heard(Event::Progress { round, done, total }) => {
                self.observer.passed(round, done, total);
            }
            Happening::Heard(Event::Sampled(sample)) => self.observer.sampled(sample),
            Happening::Heard(Event::Marked(mark)) => self.observer.marked(mark),
            Happening::Heard(Event::Travelled(travel)) => self.observer.travelled(travel),
            Happening::Heard(Event::Phase(phase)) => self.observer.progress.phase(&phase),
            Happening::Heard(Event::Saved(report)) => self.seen.saved = Some(*report),
            Happening::Heard(Event::Carried(report)) => self.seen.carried = Some(report),
            Happening::Gone(Role::Save) => {
                self.seen.save_helper = None;
                let _ = self.link.side.shutdown(Shutdown::Both);
            }
            Happening::Gone(Role::Carrier) => {
                // Our copy of the connection would keep it open for the target.
                self.seen.carrier = false;
                let _ = self.link.stream.shutdown(Shutdown::Both);
            }
            Happening::Gone(Role::Restore) => {}
            Happening::Line(line) => {
                self.seen.saving |= line.starts_with("Saving to migration stream");
                self.observer.line(&line);
            }
            Happening::Signal(signal) if self.seen.saved.is_some() => {
                self.observer.line(&format!("{signal}: too late, all memory is sent; a few seconds more"));
            }
            Happening::Signal(signal) => {
                self.seen.interrupted = true;
                self.observer.line(&format!("{signal}: giving up, the domain stays here"));
            }
        }
    }

    /// Ends the save, by which the domain runs on here. Only the helper is told: xl then resumes the domain and ends. Before
    /// there is a helper nothing has been done to the domain, and xl itself is told; once the memory is sent there is no helper
    /// any more, and what xl does then had better not be cut off.
    fn interrupt(&mut self) {
        let helper = match self.helper {
            HelperKind::Poolskip => self.seen.save_helper,
            HelperKind::Stock => stock_helper(self.xl.pid()),
        };
        match helper {
            Some(pid) if self.seen.saved.is_none() => {
                let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
            }
            None if !self.seen.saving => self.xl.signal(Signal::SIGTERM),
            _ => {}
        }
    }
}

/// libxl's own helper among the children of xl.
fn stock_helper(xl: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{xl}/task/{xl}/children")).ok()?;
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(|pid: &u32| {
        // The kernel cuts names after 15 bytes.
        std::fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|name| name.starts_with("libxl-save-help"))
    })
}

/// How it ended, and why it failed.
fn judge(
    status: Option<std::process::ExitStatus>,
    interrupted: bool,
    said: &[String],
    saved: Option<&SaveReport>,
    target: Result<&TargetOutcome, &String>,
) -> (Outcome, Option<String>) {
    if status.is_some_and(|status| status.success()) {
        return (Outcome::Migrated, None);
    }
    let undefined = said.iter().any(|line| line.contains("failed during final handshake"));
    let outcome = match (undefined, interrupted) {
        (true, _) => Outcome::Undefined,
        (false, true) => Outcome::Interrupted,
        (false, false) => Outcome::Failed,
    };
    if outcome == Outcome::Interrupted {
        return (outcome, Some("a signal came before all memory was sent".into()));
    }
    // Each side's error is the other's consequence; the one that is not is wanted.
    let restore = target.ok().and_then(|target| target.restore.as_ref());
    let restore_error =
        restore.filter(|restore| !restore.cut_short).and_then(|restore| restore.error.clone());
    let at_target = |error| format!("at the target: {error}");
    let helper_lost = restore.is_some_and(|restore| restore.cut_short) && saved.is_none();
    let why = restore_error
        .map(at_target)
        .or_else(|| saved.and_then(|saved| saved.error.clone()))
        .or_else(|| helper_lost.then(|| "the save helper ended without a report: was it killed?".into()))
        .or_else(|| target.ok().and_then(|target| target.error.clone()).map(at_target))
        .or_else(|| target.err().cloned())
        .or_else(|| said.last().cloned())
        .unwrap_or_else(|| format!("xl ended with {status:?}"));
    (outcome, Some(why))
}

/// What a helper leaves behind that did not come to its own end. All of it is harmless when there is nothing to do.
fn clean_up(domain: &Domain, helper: HelperKind, saved: bool) {
    struct Tracing;
    impl Sink for Tracing {
        fn message(&self, _: Level, _: i32, context: &str, text: &str) {
            tracing::debug!("{context}: {text}");
        }
        fn progress(&self, _: &str, _: &str, _: u64, _: u64) {}
    }
    let still_here =
        Xenstore::open().is_ok_and(|mut store| domain::find(&mut store, &domain.id.to_string()).is_ok());
    if !still_here || saved {
        return;
    }
    let off = Release::running()
        .map_err(|error| error.to_string())
        .and_then(|release| {
            Control::open(release, Logger::new(Arc::new(Tracing))).map_err(|error| error.to_string())
        })
        .and_then(|control| control.logdirty_off(domain.id).map_err(|error| error.to_string()));
    match off {
        Ok(()) => tracing::info!(domain = domain.name, "the log of dirty pages is off"),
        Err(error) => {
            tracing::warn!(error, "the log of dirty pages may still be on; it costs the domain time")
        }
    }
    if helper == HelperKind::Poolskip
        && let Ok(store) = Xenstore::open()
    {
        let _ = Requester::new(store, domain.id).tell(RequestKind::Ended);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::RestoreReport;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    fn failed() -> Option<ExitStatus> {
        Some(ExitStatus::from_raw(1 << 8))
    }

    fn target(error: &str, cut_short: bool) -> TargetOutcome {
        let restore = RestoreReport { error: Some(error.into()), cut_short, ..RestoreReport::default() };
        TargetOutcome { error: Some("xl gave up".into()), restore: Some(restore), ..TargetOutcome::default() }
    }

    #[test]
    fn the_cause_is_told_and_not_its_consequence() {
        let saved = SaveReport { error: Some("broken pipe".into()), ..SaveReport::default() };
        let cause = |target: &TargetOutcome| judge(failed(), false, &[], Some(&saved), Ok(target)).1.unwrap();
        assert_eq!(cause(&target("2 pages differ", false)), "at the target: 2 pages differ");
        assert_eq!(cause(&target("stream ended", true)), "broken pipe");
        assert_eq!(cause(&TargetOutcome::default()), "broken pipe");
        let killed = judge(failed(), false, &[], None, Ok(&target("stream ended", true))).1.unwrap();
        assert!(killed.contains("without a report"), "{killed}");
    }

    #[test]
    fn outcomes_are_told_apart() {
        let gone = "no answer".to_owned();
        let outcome = |status, interrupted, line: &str| {
            judge(status, interrupted, &[line.to_owned()], None, Err(&gone)).0
        };
        assert_eq!(outcome(Some(ExitStatus::from_raw(0)), false, ""), Outcome::Migrated);
        assert_eq!(outcome(failed(), false, "Migration failed, resuming at sender."), Outcome::Failed);
        assert_eq!(outcome(failed(), true, "Migration failed, resuming at sender."), Outcome::Interrupted);
        let handshake = "** Migration failed during final handshake **";
        assert_eq!(outcome(failed(), true, handshake), Outcome::Undefined);
        assert_eq!(outcome(None, false, ""), Outcome::Failed);
    }
}
