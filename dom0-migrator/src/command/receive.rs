//! `receive`: listens, and runs `xl migrate-receive` for each migration that comes.
//!
//! What holds after a migration: either the domain runs here, or nothing of it is left here, a half-received
//! `NAME--incoming` included. The daemon goes on after a failed one. What an earlier one left that was killed is settled first.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::io::{self, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

use super::bundle::{self, Compression};
use super::check::answer;
use super::configuration::{Configuration, Connecting};
use super::connection::{Transport, Wire};
use super::domain::{self, INCOMING};
use super::listening::Listening;
use super::pump;
use super::session::{self, Happening, Session};
use super::settle;
use super::strangers::{Stranger, Strangers};
use super::tls::Deadlined;
use super::{EXIT_FAILED, EXIT_MIGRATED, EXIT_NOT_BEGUN, Receive, connection, doctor, signals};
use crate::control::{
    self, BlocksOffer, CONNECTIONS_MAX as CONNECTIONS_OF_STREAM, Connection, FromSource, FromTarget,
    HelperKind, LineError, STREAM_VERSION, TargetOutcome, Token, VERSION,
};
use crate::examination::{self, Question};
use crate::handover::record::{RecordError, Records};
use crate::handover::{TargetEvent, TargetState, Verdict};
use crate::inquiry::{DISKS_MAX, Inquiry, Needs};
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
/// Arenas that the allocator may have. It keeps what a thread has freed in the arena that the thread had, and makes up to eight for each
/// processor; with threads for each migration a receiver grew to 8 MiB over thirty of them. With two it rests below 3 MiB from the fifth on.
const ARENAS: libc::c_int = 2;

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
    #[error(
        "{} MiB of memory are free here, the domain needs {}: `xl mem-set` makes room, of dom0's own memory too",
        free >> 20, needed >> 20
    )]
    Memory { free: u64, needed: u64 },
    #[error("a disk of the domain is not here: {}: {source}", path.display())]
    Disk { path: PathBuf, source: io::Error },
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

/// A connection that belongs to a session: which, which of several, and itself.
type Partner = (Connection, u16, Wire);

/// What all sessions share.
struct Shared {
    configuration: Configuration,
    connecting: Connecting,
    records: Records,
    transport: Transport,
    waiting: Mutex<BTreeMap<Token, Sender<Partner>>>,
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
    // SAFETY: it takes two numbers and changes the allocator's own settings, behind the allocator's own lock. If it is refused, nothing
    // but memory is lost.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    let listening = match Listening::open(options.listen, configuration.listen) {
        Ok(listening) => listening,
        Err(error) => return failed(&error),
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
        configuration: configuration.clone(),
        connecting: options.connecting.clone(),
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
    if let Err(error) = on_signal {
        return failed(&format!("signals: {error}"));
    }
    shared.records.prune();
    settle_all(&shared.records, None);
    let encrypted = shared.transport.identity.is_some();
    tracing::info!(address = %listening.addresses(), encrypted, "ready to receive domains");
    while !shared.ending.load(Ordering::Acquire) {
        if options.once && lock(&shared.finished).is_some() {
            break;
        }
        accept(&listening, &shared);
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
fn accept(listening: &Listening, shared: &Arc<Shared>) {
    let timeout = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::MAX);
    let Some((stream, from)) = listening.accept(timeout) else { return };
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
        Connection::Probe => answer::take_link(&mut wire.socket).map_err(system("a link that is tried out")),
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
                let _ = session.send((other, greeting.lane, wire));
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
    let (domain, helper, compare, stock_because, blocks, needs) = match first {
        FromSource::Start { domain, helper, stream_version, debug, blocks, needs } => {
            let why = (helper == HelperKind::Poolskip).then(|| stock_because(stream_version)).flatten();
            let helper = if why.is_some() { HelperKind::Stock } else { helper };
            (domain, helper, debug, why, granted(blocks), needs.unwrap_or_default())
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
        FromSource::Examine(question) => return examine(&mut wire, lines, from, question, shared),
        FromSource::Check(inquiry) => {
            tracing::info!(%from, domain = inquiry.domain, "asked what a migration would be");
            let refused = stands_in_the_way(&inquiry, here, shared).err().map(|error| error.to_string());
            let said = match answer::answer(&inquiry, refused, stock_because(inquiry.stream_version)) {
                Ok(findings) => FromTarget::Checked(Box::new(findings)),
                Err(reason) => FromTarget::Refused { reason },
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
        has(&needs)?;
        let record = shared.records.begin(token, TargetState::Receiving, &domain, None, &from.to_string())?;
        Ok((claim, record))
    });
    let done = match done {
        Ok((claim, record)) => {
            tracing::info!(domain, ?helper, compare, "a domain comes");
            let record = Arc::new(Mutex::new(record));
            let begun = control::write_line(&mut wire.socket, &FromTarget::Ready { stock_because, blocks })
                .map_err(ReceiveError::from)
                .and_then(|()| stream_and_side(&partners, blocks));
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

/// A control connection of another host's `doctor`.
fn examine(
    wire: &mut Wire,
    mut lines: BufReader<TcpStream>,
    from: SocketAddr,
    question: Question,
    shared: &Shared,
) -> Result<(), ReceiveError> {
    tracing::info!(%from, "this host is examined");
    wire.socket.set_read_timeout(Some(QUESTION)).map_err(system("control connection"))?;
    wire.socket.set_write_timeout(Some(QUESTION)).map_err(system("control connection"))?;
    let host = || doctor::host(&shared.configuration, &shared.connecting);
    Ok(examination::attend(question, &mut lines, &mut wire.socket, &host)?)
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
        plausible(name, shared)?;
        if !lock(&shared.names).insert(name.to_owned()) {
            return Err(ReceiveError::Busy(name.to_owned()));
        }
        let claim = Self { name: name.to_owned(), shared };
        settle_all(&shared.records, Some(name));
        not_here(name, same_host)?;
        Ok(claim)
    }
}

/// A name that a domain can have, when there is time for one.
fn plausible(name: &str, shared: &Shared) -> Result<(), ReceiveError> {
    let plausible = !name.is_empty() && name.len() <= NAME_MAX && !name.contains(['/', '\0', '\n']);
    if !plausible {
        return Err(ReceiveError::Name(name.chars().take(NAME_MAX).collect()));
    }
    if shared.ending.load(Ordering::Acquire) { Err(ReceiveError::Ending) } else { Ok(()) }
}

/// That no domain of the name is here, neither whole nor half.
fn not_here(name: &str, same_host: bool) -> Result<(), ReceiveError> {
    for found in domain::all(&mut Xenstore::open()?)? {
        if found.name == format!("{name}{INCOMING}") {
            return Err(ReceiveError::Leftover { name: name.to_owned(), id: found.id });
        }
        if found.name == name && !same_host {
            return Err(ReceiveError::Exists { name: name.to_owned(), id: found.id });
        }
    }
    Ok(())
}

/// That this host has what a domain needs. What xl does not tell is for it to find out.
fn has(needs: &Needs) -> Result<(), ReceiveError> {
    for path in needs.disks.iter().take(DISKS_MAX) {
        std::fs::metadata(path).map_err(|source| ReceiveError::Disk { path: path.clone(), source })?;
    }
    if needs.memory_bytes > 0
        && let (Some(free), false) = answer::free_memory()
        && free < needs.memory_bytes
    {
        return Err(ReceiveError::Memory { free, needed: needs.memory_bytes });
    }
    Ok(())
}

/// Whether a domain would be received; nothing is claimed, and nothing that was cut off is settled.
fn stands_in_the_way(inquiry: &Inquiry, same_host: bool, shared: &Shared) -> Result<(), ReceiveError> {
    let name = &inquiry.domain;
    plausible(name, shared)?;
    if lock(&shared.names).contains(name) {
        return Err(ReceiveError::Busy(name.to_owned()));
    }
    not_here(name, same_host)?;
    has(&inquiry.needs)
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(&self.shared.names).remove(&self.name);
    }
}

/// Over how many connections a stream may come in blocks; none, where the source does not offer it or has blocks of another version.
fn granted(offer: Option<BlocksOffer>) -> Option<u16> {
    let BlocksOffer { version, connections } = offer?;
    (version == bundle::VERSION).then(|| connections.clamp(1, CONNECTIONS_OF_STREAM))
}

/// Waits for the other connections: the stream's, in blocks over so many or as it is over one, and the side channel.
fn stream_and_side(partners: &Receiver<Partner>, blocks: Option<u16>) -> Result<(Wire, Wire), ReceiveError> {
    let mut lanes: Vec<Option<Wire>> = Vec::new();
    lanes.resize_with(usize::from(blocks.unwrap_or(1)), || None);
    let mut side = None;
    while side.is_none() || lanes.iter().any(Option::is_none) {
        let missing = if side.is_none() { Connection::Side } else { Connection::Stream };
        match partners.recv_timeout(PARTNERS).map_err(|_| ReceiveError::Partner(missing))? {
            (Connection::Side, _, wire) => side = Some(wire),
            (_, lane, wire) => {
                // One that nobody waits for is closed.
                if let Some(place) = lanes.get_mut(usize::from(lane)) {
                    *place = Some(wire);
                }
            }
        }
    }
    let lost = || ReceiveError::Partner(Connection::Stream);
    let mut lanes: Vec<Wire> = lanes.into_iter().flatten().collect();
    let stream = match blocks {
        // What goes back is a few words.
        Some(_) => Wire::of_several(lanes, Compression::Off).map_err(system("the stream's connections"))?,
        None => lanes.pop().ok_or_else(lost)?,
    };
    Ok((stream, side.ok_or_else(lost)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_of_another_version_is_not_begun() {
        for other in [STREAM_VERSION - 1, STREAM_VERSION + 1, u16::MAX] {
            let why = stock_because(other).unwrap();
            assert!(why.contains(&format!("speaks version {other}, the target's {STREAM_VERSION}")), "{why}");
        }
        // What else there may be, on a machine without Xen, is no question of versions.
        let same = stock_because(STREAM_VERSION);
        assert!(!same.as_ref().is_some_and(|why| why.contains("speaks version")), "{same:?}");
    }
}
