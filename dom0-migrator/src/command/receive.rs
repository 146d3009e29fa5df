//! `receive`: listens, and runs `xl migrate-receive` for each migration that comes.
//!
//! What holds after a migration: either the domain runs here, or nothing of it is left here, a half-received
//! `NAME--incoming` included. The daemon goes on after a failed one. What an earlier one left that was killed is settled first.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::io::{self, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::configuration::Configuration;
use super::connection::{Transport, Wire};
use super::domain::{self, INCOMING};
use super::pump;
use super::session::{self, Happening, Session};
use super::settle;
use super::strangers::{Stranger, Strangers};
use super::tls::Deadlined;
use super::{EXIT_FAILED, EXIT_MIGRATED, EXIT_NOT_BEGUN, Receive, connection, signals};
use crate::control::{
    self, Connection, FromSource, FromTarget, HelperKind, LineError, STREAM_VERSION, TargetOutcome, Token,
    VERSION,
};
use crate::handover::record::{RecordError, Records};
use crate::handover::{TargetEvent, TargetState, Verdict};
use crate::xen::DomainId;
use crate::xen::release::Release;
use crate::xenstore::{StoreError, Xenstore};

/// How often things are looked after.
const TICK: Duration = Duration::from_millis(100);
/// How long a new connection may be silent.
const GREETING: Duration = Duration::from_secs(10);
/// How long the other two connections may take to come.
const PARTNERS: Duration = Duration::from_secs(30);
/// How long a question may take to be answered: a session that is asked about ends first.
const QUESTION: Duration = Duration::from_secs(25);
/// How long the end waits for what is still to be sent.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Migrations and questions that are attended to at once; more are refused.
const CONVERSATIONS_MAX: usize = 64;
/// Longest name of a domain that is accepted.
const NAME_MAX: usize = 256;

/// Why a migration did not begin, or was given up.
#[derive(Debug, thiserror::Error)]
enum ReceiveError {
    #[error(transparent)]
    Line(#[from] LineError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Settle(#[from] settle::SettleError),
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
    #[error("the source speaks version {0}, this program {VERSION}: use the same release on both hosts")]
    Version(u32),
    #[error("the {0:?} connection did not come within {seconds} s", seconds = PARTNERS.as_secs())]
    Partner(Connection),
    #[error("{0:?} is no name of a domain")]
    Name(String),
    #[error("{0} is being received already")]
    Busy(String),
    #[error(
        "{name}{INCOMING} is here already, as domain {id}, and no record tells of it; `xl destroy {id}` removes it"
    )]
    Leftover { name: String, id: DomainId },
    #[error("a domain {name} is here already, as domain {id}")]
    Exists { name: String, id: DomainId },
    #[error("the source did not begin with what it wants")]
    NoStart,
    #[error("this host is about to stop receiving")]
    Ending,
    #[error("no record of migration {id} is here, but a domain {name}: look whether it is the same")]
    Unknown { id: Token, name: String },
    #[error("it is not decided yet; ask again")]
    Undecided,
    #[error("{CONVERSATIONS_MAX} migrations and questions are attended to already; try again later")]
    Full,
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> ReceiveError {
    move |source| ReceiveError::System { what, source }
}

/// What all sessions share.
struct Shared {
    records: Records,
    transport: Transport,
    waiting: Mutex<BTreeMap<Token, Sender<(Connection, Wire)>>>,
    /// The sessions of now, for whoever asks about one.
    running: Mutex<BTreeMap<Token, Sender<Happening>>>,
    names: Mutex<BTreeSet<String>>,
    strangers: Arc<Strangers>,
    conversations: AtomicUsize,
    sessions: AtomicUsize,
    ending: AtomicBool,
    finished: Mutex<Option<bool>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Receives until it is told to end, or one migration is over when only one is wanted.
pub fn run(options: &Receive, configuration: &Configuration) -> u8 {
    let failed = |error: &dyn std::fmt::Display| {
        eprintln!("dom0-migrator: {error}");
        EXIT_NOT_BEGUN
    };
    let Some(listen) = options.listen.or(configuration.listen) else {
        return failed(&"where to listen? `--listen ADDRESS:PORT`, or `listen` in the configuration");
    };
    let transport = match configuration.transport(&options.connecting) {
        Ok(transport) => transport,
        Err(error) => return failed(&error),
    };
    let records = match Records::open(Some(&configuration.records)) {
        Ok(records) => records,
        Err(error) => return failed(&error),
    };
    let shared = Arc::new(Shared {
        records,
        transport,
        waiting: Mutex::default(),
        running: Mutex::default(),
        names: Mutex::default(),
        strangers: Arc::default(),
        conversations: AtomicUsize::new(0),
        sessions: AtomicUsize::new(0),
        ending: AtomicBool::new(false),
        finished: Mutex::default(),
    });
    let on_signal = {
        let shared = shared.clone();
        signals::on_signal(move |signal| {
            tracing::info!(%signal, "ending");
            shared.ending.store(true, Ordering::Release);
        })
    };
    let listening = on_signal.and_then(|()| TcpListener::bind(listen));
    let listener = match listening {
        Ok(listener) => listener,
        Err(error) => return failed(&format!("cannot listen on {listen}: {error}")),
    };
    shared.records.prune();
    settle_all(&shared.records, None);
    let encrypted = shared.transport.identity.is_some();
    tracing::info!(address = %listen, encrypted, "ready to receive domains");
    while !shared.ending.load(Ordering::Acquire) {
        if options.once && lock(&shared.finished).is_some() {
            break;
        }
        accept(&listener, &shared);
    }
    while shared.sessions.load(Ordering::Acquire) > 0 {
        std::thread::sleep(TICK);
    }
    // The last words to the source.
    pump::drain(LAST_WORDS);
    match *lock(&shared.finished) {
        Some(false) if options.once => EXIT_FAILED,
        None if options.once => EXIT_NOT_BEGUN,
        _ => EXIT_MIGRATED,
    }
}

/// Settles what was left by sessions whose process is gone: of one name, or all.
fn settle_all(records: &Records, name: Option<&str>) {
    for open in records.open_ones::<TargetState>().unwrap_or_default() {
        if name.is_some_and(|name| name != open.domain) || records.is_busy(&open.id, open.side) {
            continue;
        }
        let settled = records
            .take::<TargetState>(&open.id)
            .map_err(settle::SettleError::from)
            .and_then(|record| record.map(|mut record| settle::target(&mut record)).transpose());
        match settled {
            Ok(state) => {
                tracing::info!(id = %open.id, domain = open.domain, ?state, "a migration that was cut off is settled")
            }
            Err(error) => {
                tracing::error!(id = %open.id, domain = open.domain, %error, "a migration that was cut off is not settled")
            }
        }
    }
}

/// Waits a while for a connection.
fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::MAX);
    if !matches!(poll(&mut waiting, timeout), Ok(1..)) {
        return;
    }
    let Ok((stream, from)) = listener.accept() else { return };
    let stranger = match shared.strangers.admit(&stream) {
        Ok((stranger, one_went)) => {
            if one_went {
                tracing::debug!("too many connections that say nothing, the oldest is closed");
            }
            stranger
        }
        Err(error) => {
            tracing::warn!(%from, %error, "a connection came to nothing");
            return;
        }
    };
    let shared = shared.clone();
    std::thread::spawn(move || {
        if let Err(error) = greet(stream, from, stranger, &shared) {
            tracing::warn!(%from, %error, "a connection came to nothing");
        }
    });
}

/// Reads a connection's first line and sends it where it belongs.
fn greet(
    stream: TcpStream,
    from: SocketAddr,
    stranger: Stranger,
    shared: &Arc<Shared>,
) -> Result<(), ReceiveError> {
    let here = stream.local_addr().is_ok_and(|here| here.ip() == from.ip());
    let mut wire = shared.transport.accept(stream).map_err(system("refused"))?;
    wire.socket.set_write_timeout(Some(GREETING)).map_err(system("connection"))?;
    // All of it has its time, not each byte: a peer that dawdles holds nobody up.
    let mut timed = Deadlined { stream: &wire.socket, until: Instant::now() + GREETING };
    let greeting = control::read_greeting(&mut timed)?;
    drop(stranger);
    if greeting.poolskip != VERSION {
        let error = ReceiveError::Version(greeting.poolskip);
        if greeting.connection == Connection::Control {
            return refuse(&mut wire, error);
        }
        return Err(error);
    }
    match greeting.connection {
        Connection::Control => {
            let others = shared.conversations.fetch_add(1, Ordering::AcqRel);
            let done = if others < CONVERSATIONS_MAX {
                converse(wire, from, here, &greeting.token, shared)
            } else {
                refuse(&mut wire, ReceiveError::Full)
            };
            shared.conversations.fetch_sub(1, Ordering::AcqRel);
            done
        }
        other => {
            wire.socket.set_read_timeout(None).map_err(system("connection"))?;
            wire.socket.set_write_timeout(None).map_err(system("connection"))?;
            if let Some(session) = lock(&shared.waiting).get(&greeting.token) {
                // A session that has ended does not want it any more.
                let _ = session.send((other, wire));
            }
            Ok(())
        }
    }
}

/// Says no, and why.
fn refuse(wire: &mut Wire, why: ReceiveError) -> Result<(), ReceiveError> {
    control::write_line(&mut wire.socket, &FromTarget::Refused { reason: why.to_string() })?;
    Err(why)
}

/// A control connection: a migration, or a question.
fn converse(
    mut wire: Wire,
    from: SocketAddr,
    here: bool,
    token: &Token,
    shared: &Arc<Shared>,
) -> Result<(), ReceiveError> {
    let first = {
        let mut timed = BufReader::new(Deadlined { stream: &wire.socket, until: Instant::now() + GREETING });
        // The source says nothing more before it is answered, so nothing is left in this buffer.
        control::read_line(&mut timed)?
    };
    let lines = connection::reader(&wire.socket).map_err(system("control connection"))?;
    let (domain, helper, compare, stock_because) = match first {
        FromSource::Start { domain, helper, stream_version, debug } => {
            let why = (helper == HelperKind::Poolskip).then(|| stock_because(stream_version)).flatten();
            (domain, if why.is_some() { HelperKind::Stock } else { helper }, debug, why)
        }
        FromSource::Ask { id, domain } => {
            let answer = answer(&id, &domain, shared);
            tracing::info!(%from, %id, ?answer, "asked what became of a migration");
            let said = match answer {
                Ok(verdict) => FromTarget::Verdict(verdict),
                Err(error) => FromTarget::Refused { reason: error.to_string() },
            };
            return Ok(control::write_line(&mut wire.socket, &said)?);
        }
        FromSource::Given | FromSource::GaveUp => return Err(ReceiveError::NoStart),
    };
    let (partner, partners) = channel();
    let (tell, happenings) = channel();
    // Whoever says a token again, by mistake or to do harm, changes nothing for the migration that has it.
    if let Entry::Vacant(place) = lock(&shared.running).entry(token.clone()) {
        place.insert(tell.clone());
    } else {
        return refuse(&mut wire, RecordError::Busy { id: token.clone() }.into());
    }
    lock(&shared.waiting).insert(token.clone(), partner);
    shared.sessions.fetch_add(1, Ordering::AcqRel);
    let done = Claim::new(&domain, here, shared).and_then(|claim| {
        let record = shared.records.begin(token, TargetState::Receiving, &domain, None, &from.to_string())?;
        Ok((claim, record))
    });
    let done = match done {
        Ok((claim, record)) => {
            tracing::info!(domain, ?helper, compare, "a domain comes");
            let record = Arc::new(Mutex::new(record));
            let begun = control::write_line(&mut wire.socket, &FromTarget::Ready { stock_because })
                .map_err(ReceiveError::from)
                .and_then(|()| both(&partners));
            match begun {
                Ok((stream, side)) => {
                    let _ = wire.socket.set_read_timeout(None);
                    session::listen(lines, tell.clone());
                    let session = Session {
                        helper,
                        compare,
                        control: &mut wire.socket,
                        stream,
                        record: record.clone(),
                        ending: &shared.ending,
                    };
                    let outcome = session.run(side, &tell, &happenings).unwrap_or_else(|error| {
                        TargetOutcome { error: Some(error.to_string()), ..TargetOutcome::default() }
                    });
                    finish(&mut wire, &claim, outcome, shared);
                    Ok(())
                }
                Err(error) => {
                    // Nothing was begun.
                    lock(&record).step(TargetEvent::GaveUp)?;
                    lock(&record).step(TargetEvent::Removed)?;
                    Err(error)
                }
            }
        }
        Err(error) => refuse(&mut wire, error),
    };
    lock(&shared.waiting).remove(token);
    lock(&shared.running).remove(token);
    shared.sessions.fetch_sub(1, Ordering::AcqRel);
    done
}

/// Why this program's helper cannot run here with the source's.
fn stock_because(stream_version: u16) -> Option<String> {
    if stream_version != STREAM_VERSION {
        return Some(format!(
            "the source's helper speaks version {stream_version}, the target's {STREAM_VERSION}"
        ));
    }
    Release::running().err().map(|error| format!("at the target: {error}"))
}

/// Says how it ended, here and to the source.
fn finish(wire: &mut Wire, claim: &Claim<'_>, outcome: TargetOutcome, shared: &Shared) {
    let domain = &claim.name;
    match &outcome.error {
        None => tracing::info!(domain, "the domain runs here"),
        Some(error) => {
            tracing::warn!(domain, error, removed = outcome.incoming_destroyed, "the domain did not come");
        }
    }
    *lock(&shared.finished) = Some(outcome.started);
    // The source may be gone by now; what happened here happened all the same.
    if let Err(error) = control::write_line(&mut wire.socket, &FromTarget::Finished(Box::new(outcome))) {
        tracing::warn!(%error, "the source was not told");
    }
}

/// What became of a migration. One that is not decided is decided now: against it.
fn answer(id: &Token, name: &str, shared: &Shared) -> Result<Verdict, ReceiveError> {
    let session = lock(&shared.running).get(id).cloned();
    if let Some(session) = session {
        let (tell, verdict) = channel();
        if session.send(Happening::Asked(tell)).is_ok()
            && let Ok(verdict) = verdict.recv_timeout(QUESTION)
        {
            return Ok(verdict);
        }
    }
    let Some(mut record) = shared.records.take::<TargetState>(id)? else {
        // It never came this far, or was closed long ago; but records can be lost.
        let incoming = format!("{name}{INCOMING}");
        let there = domain::all(&mut Xenstore::open()?)?;
        return match there.into_iter().find(|found| found.name == name || found.name == incoming) {
            Some(found) => Err(ReceiveError::Unknown { id: id.clone(), name: found.name }),
            None => Ok(Verdict::Discarded),
        };
    };
    settle::target(&mut record)?.verdict().ok_or(ReceiveError::Undecided)
}

/// A domain's name, taken for as long as it is being received.
struct Claim<'a> {
    name: String,
    shared: &'a Shared,
}

impl<'a> Claim<'a> {
    /// `same_host`: the source is this host, so that the domain itself is here.
    fn new(name: &str, same_host: bool, shared: &'a Shared) -> Result<Self, ReceiveError> {
        let plausible = !name.is_empty() && name.len() <= NAME_MAX && !name.contains(['/', '\0', '\n']);
        if !plausible {
            return Err(ReceiveError::Name(name.chars().take(NAME_MAX).collect()));
        }
        if shared.ending.load(Ordering::Acquire) {
            return Err(ReceiveError::Ending);
        }
        if !lock(&shared.names).insert(name.to_owned()) {
            return Err(ReceiveError::Busy(name.to_owned()));
        }
        let claim = Self { name: name.to_owned(), shared };
        settle_all(&shared.records, Some(name));
        for found in domain::all(&mut Xenstore::open()?)? {
            if found.name == format!("{name}{INCOMING}") {
                return Err(ReceiveError::Leftover { name: claim.name.clone(), id: found.id });
            }
            if found.name == name && !same_host {
                return Err(ReceiveError::Exists { name: claim.name.clone(), id: found.id });
            }
        }
        Ok(claim)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(&self.shared.names).remove(&self.name);
    }
}

/// Waits for the other two connections.
fn both(partners: &Receiver<(Connection, Wire)>) -> Result<(Wire, Wire), ReceiveError> {
    let (mut stream, mut side) = (None, None);
    loop {
        match (stream, side) {
            (Some(stream), Some(side)) => return Ok((stream, side)),
            (have_stream, have_side) => (stream, side) = (have_stream, have_side),
        }
        let missing = if stream.is_none() { Connection::Stream } else { Connection::Side };
        match partners.recv_timeout(PARTNERS).map_err(|_| ReceiveError::Partner(missing))? {
            (Connection::Side, connection) => side = Some(connection),
            (_, connection) => stream = Some(connection),
        }
    }
}
