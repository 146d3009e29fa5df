//! `receive`: listens, and runs `xl migrate-receive` for each migration that comes.
//!
//! What holds after a migration: either the domain runs here, or nothing of it is left here, a half-received
//! `NAME--incoming` included. The daemon goes on after a failed one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::child::{self, Xl};
use super::domain::{self, INCOMING};
use super::{EXIT_FAILED, EXIT_MIGRATED, EXIT_NOT_BEGUN, Receive, connection, signals};
use crate::control::{
    self, Connection, FromSource, FromTarget, HelperKind, LineError, TargetOutcome, Token, VERSION,
};
use crate::handoff::{Event, HandoffError, Listener, Order, Peer};
use crate::helper::policy::Limits;
use crate::report::RestoreReport;
use crate::xen::DomainId;
use crate::xenstore::{Store, StoreError, Xenstore};

/// How often things are looked after.
const TICK: Duration = Duration::from_millis(100);
/// How long a new connection may be silent.
const GREETING: Duration = Duration::from_secs(10);
/// How long the other two connections may take to come.
const PARTNERS: Duration = Duration::from_secs(30);
/// How long xl may take to end in its own way.
const GRACE: Duration = Duration::from_secs(5);
/// Connections that are attended to at once; more are closed.
const CONNECTIONS_MAX: usize = 64;
/// Longest name of a domain that is accepted.
const NAME_MAX: usize = 256;

/// Why a migration did not begin, or was given up.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Line(#[from] LineError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Handoff(#[from] HandoffError),
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
        "{name}{INCOMING} is here already, as domain {id}, left by a migration that was cut off; `xl destroy {id}` removes it"
    )]
    Leftover { name: String, id: DomainId },
    #[error("a domain {name} is here already, as domain {id}")]
    Exists { name: String, id: DomainId },
    #[error("the source did not begin with what it wants")]
    NoStart,
    #[error("this host is about to stop receiving")]
    Ending,
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> SessionError {
    move |source| SessionError::System { what, source }
}

/// What all sessions share.
#[derive(Default)]
struct Shared {
    waiting: Mutex<BTreeMap<Token, Sender<(Connection, TcpStream)>>>,
    names: Mutex<BTreeSet<String>>,
    connections: AtomicUsize,
    sessions: AtomicUsize,
    ending: AtomicBool,
    finished: Mutex<Option<bool>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Receives until it is told to end, or one migration is over when only one is wanted.
pub fn run(options: &Receive) -> u8 {
    let shared = Arc::new(Shared::default());
    let on_signal = {
        let shared = shared.clone();
        signals::on_signal(move |signal| {
            tracing::info!(%signal, "ending");
            shared.ending.store(true, Ordering::Release);
        })
    };
    let listening = on_signal.and_then(|()| TcpListener::bind(options.listen));
    let listener = match listening {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("dom0-migrator: cannot listen on {}: {error}", options.listen);
            return EXIT_NOT_BEGUN;
        }
    };
    tracing::info!(address = %options.listen, "ready to receive domains");
    while !shared.ending.load(Ordering::Acquire) {
        if options.once && lock(&shared.finished).is_some() {
            break;
        }
        accept(&listener, &shared);
    }
    while shared.sessions.load(Ordering::Acquire) > 0 {
        std::thread::sleep(TICK);
    }
    match *lock(&shared.finished) {
        Some(false) if options.once => EXIT_FAILED,
        None if options.once => EXIT_NOT_BEGUN,
        _ => EXIT_MIGRATED,
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
    if shared.connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
        shared.connections.fetch_sub(1, Ordering::AcqRel);
        tracing::warn!(%from, "too many connections, one is closed");
        return;
    }
    let shared = shared.clone();
    std::thread::spawn(move || {
        if let Err(error) = greet(stream, &shared) {
            tracing::warn!(%from, %error, "a connection came to nothing");
        }
        shared.connections.fetch_sub(1, Ordering::AcqRel);
    });
}

/// Reads a connection's first line and sends it where it belongs.
fn greet(mut stream: TcpStream, shared: &Arc<Shared>) -> Result<(), SessionError> {
    connection::prepare(&stream).map_err(system("connection"))?;
    stream.set_read_timeout(Some(GREETING)).map_err(system("connection"))?;
    let greeting = control::read_greeting(&mut stream)?;
    if greeting.poolskip != VERSION {
        let error = SessionError::Version(greeting.poolskip);
        if greeting.connection == Connection::Control {
            let refused = FromTarget::Refused { reason: error.to_string() };
            control::write_line(&mut stream, &refused)?;
        }
        return Err(error);
    }
    match greeting.connection {
        Connection::Control => {
            let (partner, partners) = channel();
            lock(&shared.waiting).insert(greeting.token.clone(), partner);
            shared.sessions.fetch_add(1, Ordering::AcqRel);
            let done = control_session(stream, &partners, shared, &greeting.token);
            lock(&shared.waiting).remove(&greeting.token);
            if let Ok(Some(started)) = &done {
                *lock(&shared.finished) = Some(*started);
            }
            shared.sessions.fetch_sub(1, Ordering::AcqRel);
            done.map(|_| ())
        }
        other => {
            stream.set_read_timeout(None).map_err(system("connection"))?;
            if let Some(session) = lock(&shared.waiting).get(&greeting.token) {
                // A session that has ended does not want it any more.
                let _ = session.send((other, stream));
            }
            Ok(())
        }
    }
}

/// One migration. `Some(started)` when xl was run for it.
fn control_session(
    mut control: TcpStream,
    partners: &Receiver<(Connection, TcpStream)>,
    shared: &Shared,
    token: &Token,
) -> Result<Option<bool>, SessionError> {
    let mut lines = connection::reader(&control).map_err(system("control connection"))?;
    let FromSource::Start { domain, helper, debug: compare } = control::read_line(&mut lines)? else {
        return Err(SessionError::NoStart);
    };
    let here =
        control.local_addr().and_then(|here| Ok(here.ip() == control.peer_addr()?.ip())).unwrap_or(false);
    let claim = match Claim::new(&domain, here, shared) {
        Ok(claim) => claim,
        Err(error) => {
            control::write_line(&mut control, &FromTarget::Refused { reason: error.to_string() })?;
            return Err(error);
        }
    };
    tracing::info!(domain, ?helper, compare, "a domain comes");
    control::write_line(&mut control, &FromTarget::Ready)?;
    let (stream, side) = both(partners)?;
    lock(&shared.waiting).remove(token);
    control.set_read_timeout(None).map_err(system("control connection"))?;
    let gave_up = Arc::new(AtomicBool::new(false));
    let flag = gave_up.clone();
    std::thread::spawn(move || {
        let said = control::read_line(&mut lines);
        flag.store(matches!(said, Ok(FromSource::GaveUp)), Ordering::Release);
    });
    let migration = Migration { name: &claim.name, helper, compare };
    let given_up = || gave_up.load(Ordering::Acquire);
    let outcome = receive(&migration, stream, side, shared, given_up)
        .unwrap_or_else(|error| TargetOutcome { error: Some(error.to_string()), ..TargetOutcome::default() });
    match &outcome.error {
        None => tracing::info!(domain, "the domain runs here"),
        Some(error) => {
            tracing::warn!(domain, error, destroyed = outcome.incoming_destroyed, "the domain did not come");
        }
    }
    let started = outcome.started;
    // The source may be gone by now; what happened here happened all the same.
    if let Err(error) = control::write_line(&mut control, &FromTarget::Finished(Box::new(outcome))) {
        tracing::warn!(%error, "the source was not told");
    }
    Ok(Some(started))
}

/// A domain's name, taken for as long as it is being received.
struct Claim<'a> {
    name: String,
    shared: &'a Shared,
}

impl<'a> Claim<'a> {
    /// `same_host`: the source is this host, so that the domain itself is here.
    fn new(name: &str, same_host: bool, shared: &'a Shared) -> Result<Self, SessionError> {
        let plausible = !name.is_empty() && name.len() <= NAME_MAX && !name.contains(['/', '\0', '\n']);
        if !plausible {
            return Err(SessionError::Name(name.chars().take(NAME_MAX).collect()));
        }
        if shared.ending.load(Ordering::Acquire) {
            return Err(SessionError::Ending);
        }
        if !lock(&shared.names).insert(name.to_owned()) {
            return Err(SessionError::Busy(name.to_owned()));
        }
        let claim = Self { name: name.to_owned(), shared };
        for found in domain::all(&mut Xenstore::open()?)? {
            if found.name == format!("{name}{INCOMING}") {
                return Err(SessionError::Leftover { name: claim.name.clone(), id: found.id });
            }
            if found.name == name && !same_host {
                return Err(SessionError::Exists { name: claim.name.clone(), id: found.id });
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
fn both(partners: &Receiver<(Connection, TcpStream)>) -> Result<(TcpStream, TcpStream), SessionError> {
    let (mut stream, mut side) = (None, None);
    loop {
        match (stream, side) {
            (Some(stream), Some(side)) => return Ok((stream, side)),
            (have_stream, have_side) => (stream, side) = (have_stream, have_side),
        }
        let missing = if stream.is_none() { Connection::Stream } else { Connection::Side };
        match partners.recv_timeout(PARTNERS).map_err(|_| SessionError::Partner(missing))? {
            (Connection::Side, connection) => side = Some(connection),
            (_, connection) => stream = Some(connection),
        }
    }
}

/// What was heard while xl ran.
#[derive(Default)]
struct Heard {
    /// The restored domain's number, from the helper.
    domain: Mutex<Option<DomainId>>,
    restored: Mutex<Option<RestoreReport>>,
    attending: AtomicUsize,
    /// Memory is complete: from here on xl decides together with the source's.
    complete: AtomicBool,
    /// xl says that it has removed the domain itself.
    gave_up: AtomicBool,
    mismatch_lines: AtomicU64,
}

/// What is to be received.
struct Migration<'a> {
    name: &'a str,
    helper: HelperKind,
    compare: bool,
}

/// Runs xl for one migration, and removes what it leaves when it fails.
fn receive(
    migration: &Migration<'_>,
    stream: TcpStream,
    side: TcpStream,
    shared: &Shared,
    given_up: impl Fn() -> bool,
) -> Result<TargetOutcome, SessionError> {
    let Migration { name, helper, compare } = *migration;
    let heard = Arc::new(Heard::default());
    let listener = Arc::new(Listener::bind()?);
    let order = Order {
        socket: true,
        references: true,
        wait_lists_seconds: 0,
        debug: compare,
        limits: Limits::DEFAULT,
    };
    serve(&listener, side, order, &heard).map_err(system("handoff"))?;
    let mut xl = start_xl(helper, &listener, stream, &heard).map_err(system("xl migrate-receive"))?;
    let mut deadline: Option<Instant> = None;
    let status = loop {
        if let Some(status) = xl.try_wait().map_err(system("xl migrate-receive"))? {
            break status;
        }
        if !heard.complete.load(Ordering::Acquire) {
            // A source that gave up has closed the stream, by which xl ends in its own way; but it may not be listening.
            let grace = if shared.ending.load(Ordering::Acquire) {
                Some(Duration::ZERO)
            } else {
                given_up().then_some(GRACE)
            };
            if let Some(grace) = grace
                && Instant::now() >= *deadline.get_or_insert_with(|| Instant::now() + grace)
            {
                xl.signal(Signal::SIGTERM);
                deadline = Some(Instant::now() + GRACE);
            }
        }
        std::thread::sleep(TICK);
    };
    listener.close();
    // The helper's last words may still be on their way.
    for _ in 0..50 {
        if heard.attending.load(Ordering::Acquire) == 0 {
            break;
        }
        std::thread::sleep(TICK);
    }
    let started = status.success() && !heard.gave_up.load(Ordering::Acquire);
    let mut outcome = TargetOutcome {
        started,
        error: None,
        incoming_destroyed: false,
        restore: lock(&heard.restored).take(),
        mismatch_lines: heard.mismatch_lines.load(Ordering::Acquire),
    };
    if !started {
        let said = xl.said();
        outcome.error = Some(said.last().cloned().unwrap_or_else(|| format!("xl ended with {status}")));
        outcome.incoming_destroyed = destroy_incoming(name, *lock(&heard.domain))?;
    }
    Ok(outcome)
}

fn start_xl(
    helper: HelperKind,
    listener: &Listener,
    stream: TcpStream,
    heard: &Arc<Heard>,
) -> io::Result<Xl> {
    let mut command = child::xl(&["migrate-receive"], helper, listener.path())?;
    let stream = OwnedFd::from(stream);
    command.stdout(Stdio::from(stream.try_clone()?)).stdin(Stdio::from(stream));
    let heard = heard.clone();
    Xl::start(command, move |line| {
        tracing::info!("xl: {line}");
        if line.contains("requesting permission to start domain") {
            heard.complete.store(true, Ordering::Release);
        } else if line.contains("Failure, destroying our copy") {
            heard.gave_up.store(true, Ordering::Release);
        } else if line.contains("verify pfn ") && line.contains(" failed") {
            heard.mismatch_lines.fetch_add(1, Ordering::AcqRel);
        }
    })
}

/// Gives the helper its order, and keeps what it says.
fn serve(listener: &Arc<Listener>, side: TcpStream, order: Order, heard: &Arc<Heard>) -> io::Result<()> {
    let (listener, heard) = (listener.clone(), heard.clone());
    std::thread::Builder::new().name("handoff".into()).spawn(move || {
        // There is one helper; the side channel is its alone from then on, so that its end is the channel's end.
        let mut side = Some(OwnedFd::from(side));
        while let Ok(peer) = listener.accept() {
            heard.attending.fetch_add(1, Ordering::AcqRel);
            if let Err(error) = attend(&peer, side.take(), &order, &heard) {
                tracing::warn!(%error, "the helper was lost");
            }
            heard.attending.fetch_sub(1, Ordering::AcqRel);
        }
    })?;
    Ok(())
}

fn attend(peer: &Peer, side: Option<OwnedFd>, order: &Order, heard: &Heard) -> Result<(), HandoffError> {
    let Some(Event::Hello { domain, .. }) = peer.hear()? else {
        return Err(HandoffError::Closed("its hello"));
    };
    *lock(&heard.domain) = domain;
    peer.order(&Order { socket: side.is_some(), ..order.clone() }, side.as_ref())?;
    drop(side);
    while let Some(event) = peer.hear()? {
        if let Event::Restored(report) = event {
            *lock(&heard.restored) = Some(*report);
        }
    }
    Ok(())
}

/// Removes a half-received domain: the one of that name, which was not there before, and of that number if the helper told it.
fn destroy_incoming(name: &str, id: Option<DomainId>) -> Result<bool, SessionError> {
    let mut store = Xenstore::open()?;
    let wanted = format!("{name}{INCOMING}");
    let Some(found) = domain::all(&mut store)?.into_iter().find(|domain| domain.name == wanted) else {
        return Ok(false);
    };
    if id.is_some_and(|id| id != found.id) {
        tracing::warn!(name = wanted, id = %found.id, "not the domain that was received, left alone");
        return Ok(false);
    }
    let destroyed = Command::new("xl")
        .args(["destroy", &found.id.to_string()])
        .stdin(Stdio::null())
        .status()
        .map_err(system("xl destroy"))?;
    let gone = store.read(&format!("/local/domain/{}/name", found.id))?.is_none();
    if !gone {
        tracing::error!(name = wanted, id = %found.id, %destroyed, "could not be destroyed");
    }
    Ok(gone)
}
