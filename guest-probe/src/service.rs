//! `guest-probe run`: waits for many things at once, and for most of the time does nothing.
//!
//! ```text
//!              dom0 asks                     dom0 says that it is over, or asks nothing for a while
//! on demand:   ────────► attach, snapshot, publish ──── follow events, answer again ────► detach
//! resident:    attach to each mysqld as it starts, follow events, publish when dom0 asks, until the end
//! ```
//!
//! On demand and between two migrations nothing is attached: mysqld runs as if there were no probe, and this program wakes up once a second.
//! Events are taken once a second, and when a ring buffer is half full.

use std::collections::BTreeMap;
use std::future::pending;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use enlightenment::device::Request;
use enlightenment::xenstore::RequestKind;
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::config::{Config, Mode};
use crate::device::{Device, DeviceError};
use crate::event::EventKind;
use crate::metrics;
use crate::probes::{ProbeError, Probes};
use crate::process::{Choice, MysqldProcess, ProcessError, ProcessKey};
use crate::servers::Servers;
use crate::session::{Options, Server, Session, SessionError};
use crate::statistics;
use crate::status::{Answer, RefusedStatus, ServerStatus, Status, peak_memory_bytes};

/// How often events are taken when nothing else happens.
const TICK: Duration = Duration::from_secs(1);
/// Resident: how often a mysqld that has started is looked for.
const BETWEEN_LOOKS: Duration = Duration::from_secs(2);
/// How long somebody who asks for the status or for metrics may take.
const READER_PATIENCE: Duration = Duration::from_secs(2);
/// No request for metrics has a longer head.
const LONGEST_HEAD: usize = 8192;

/// Why the service ended.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// A server cannot be probed, and no other is wanted.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Processes cannot be looked at, or the one that is wanted is not there.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The kernel takes no probes.
    #[error(transparent)]
    Probes(#[from] ProbeError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The status socket cannot be made.
    #[error("cannot listen at {path}: {source}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Metrics cannot be served.
    #[error("cannot listen at {address} for metrics: {source}")]
    Metrics {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Another probe listens there.
    #[error("another guest-probe runs: it answers at {0}")]
    Runs(PathBuf),
    /// The system lacks something.
    #[error("cannot {what}: {source}")]
    System {
        /// What for.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Why a service that did its work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A signal asked for it.
    BySignal,
    /// The only mysqld that was wanted has ended; what was published is withdrawn.
    MysqldGone,
}

/// What a service does: its configuration, and what only the command line and tests may choose.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// The configuration.
    pub config: Config,
    /// Which servers are probed.
    pub choice: Choice,
    /// Options of each session.
    pub session: Options,
}

impl From<Config> for ServiceOptions {
    fn from(config: Config) -> Self {
        Self { choice: config.choice(), session: config.options(), config }
    }
}

/// Waits for a descriptor through a copy, so that its owner stays free.
fn wait_for(fd: BorrowedFd<'_>) -> io::Result<AsyncFd<OwnedFd>> {
    let copy = fd.try_clone_to_owned()?;
    // SAFETY: the AsyncFd owns the copy: it stays open and the same for as long as the AsyncFd lives.
    Ok(unsafe { AsyncFd::register_with_interest(copy, Interest::READABLE) }?)
}

fn system(what: &'static str) -> impl Fn(io::Error) -> ServiceError {
    move |source| ServiceError::System { what, source }
}

/// Serves until a signal comes, or the only mysqld that is wanted ends. On the way out the lists are withdrawn and the probes are
/// taken out.
///
/// # Errors
/// [`ServiceError`].
pub async fn serve(
    options: ServiceOptions,
    device: &mut (impl Device + AsFd),
) -> Result<Ended, ServiceError> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("wait for SIGINT"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(system("wait for SIGTERM"))?;
    let config = options.config.clone();
    let listener = listen(&config.socket)?;
    // Said now, not in the middle of a migration.
    Probes::check()?;
    let metrics_listener = listen_for_metrics(&config).await?;
    let _counting =
        config.statistics.then(statistics::count).transpose().map_err(system("let the kernel count"))?;
    let requests = wait_for(device.as_fd()).map_err(system("wait for requests"))?;
    let mut service = Service::start(options)?;
    let happened = Arc::clone(&service.happened);
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let why = loop {
        tokio::select! {
            _ = interrupt.recv() => break Ended::BySignal,
            _ = terminate.recv() => break Ended::BySignal,
            () = happened.notified() => service.update(device),
            ready = requests.readable() => {
                let mut ready = ready.map_err(system("wait for requests"))?;
                match device.next_request()? {
                    Some(request) => service.answer(device, request),
                    None => ready.clear_ready(),
                }
            }
            _ = tick.tick() => service.tick(device),
            Ok((stream, _)) = listener.accept() => service.tell(device, stream),
            Ok(stream) = accept(metrics_listener.as_ref()) => service.tell_metrics(device, stream),
        }
        if service.wanted_is_gone() {
            break Ended::MysqldGone;
        }
    };
    service.withdraw(device);
    // Nothing listens there any more; a file that stays does no harm.
    let _ = std::fs::remove_file(&config.socket);
    Ok(why)
}

/// Tasks that wait for a server's end and for its ring buffer; they end when this is dropped.
struct Watch(Vec<JoinHandle<()>>);

impl Watch {
    /// Begins to wait for descriptors: once, or again and again.
    fn start(
        happened: &Arc<Notify>,
        fds: impl IntoIterator<Item = (io::Result<AsyncFd<OwnedFd>>, bool)>,
    ) -> Self {
        let tasks = fds.into_iter().filter_map(|(fd, once)| {
            // What is not told at once is seen at the next tick.
            let fd = fd.inspect_err(|error| tracing::debug!(%error, "cannot be waited for")).ok()?;
            Some(tokio::spawn(tell_when_ready(fd, once, Arc::clone(happened))))
        });
        Self(tasks.collect())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

struct Service {
    config: Config,
    servers: Servers,
    /// The only mysqld that is wanted, if there is one.
    wanted: Option<MysqldProcess>,
    _wanted_watch: Option<Watch>,
    watches: BTreeMap<ProcessKey, Watch>,
    /// Told by the watches.
    happened: Arc<Notify>,
    last_look: Instant,
    last_textfile: Option<Instant>,
    last_request: Option<Instant>,
    answers: u64,
    last_answer: Option<Answer>,
    published: bool,
    last_error: Option<String>,
    /// By sessions that have ended.
    hints_made_wrong: u64,
}

impl Service {
    fn start(options: ServiceOptions) -> Result<Self, ServiceError> {
        let ServiceOptions { config, choice, session } = options;
        let wanted = match choice {
            Choice::One(pid) => Some(MysqldProcess::find(Some(pid))?),
            Choice::All | Choice::ChildrenOf(_) => None,
        };
        let happened = Arc::new(Notify::new());
        let wanted_watch = wanted.as_ref().map(|process| {
            Watch::start(&happened, [(process.end_fd().and_then(|fd| wait_for(fd.as_fd())), true)])
        });
        let mut service = Self {
            servers: Servers::new(session, choice),
            wanted,
            _wanted_watch: wanted_watch,
            watches: BTreeMap::new(),
            happened,
            last_look: Instant::now(),
            last_textfile: None,
            last_request: None,
            answers: 0,
            last_answer: None,
            published: false,
            last_error: None,
            hints_made_wrong: 0,
            config,
        };
        match service.config.mode {
            Mode::Resident => {
                service.attach()?;
                // With no other to wait for, what cannot be probed is the end.
                if let (Some(_), Some(error)) = (&service.wanted, service.servers.take_final_refusal()) {
                    return Err(error.into());
                }
            }
            Mode::OnDemand => {
                if let Choice::One(pid) = choice {
                    Server::find(Some(pid))?;
                }
                tracing::info!("nothing is attached until dom0 asks");
            }
        }
        service.watch();
        Ok(service)
    }

    fn attach(&mut self) -> Result<usize, ProcessError> {
        self.last_look = Instant::now();
        self.servers.attach()
    }

    /// Waits for what happens to the servers that are probed now, and no longer for what happened to others.
    fn watch(&mut self) {
        let keys: Vec<ProcessKey> = self.servers.sessions().map(|(key, _)| *key).collect();
        self.watches.retain(|key, _| keys.contains(key));
        for (key, session) in self.servers.sessions() {
            self.watches.entry(*key).or_insert_with(|| {
                let end = session.server().process.end_fd().and_then(|fd| wait_for(fd.as_fd()));
                Watch::start(&self.happened, [(end, true), (wait_for(session.wake_fd()), false)])
            });
        }
    }

    fn wanted_is_gone(&self) -> bool {
        self.wanted.as_ref().is_some_and(|process| !process.is_alive())
    }

    /// Takes events, and sees which servers have ended.
    fn update(&mut self, device: &mut impl Device) {
        match self.servers.update() {
            Ok(0) => {}
            Ok(ended) => {
                tracing::info!(ended, left = self.servers.len(), "mysqld has ended");
                // Lists of frames that are gone are worth nothing.
                self.withdraw(device);
                self.watch();
            }
            // mysqld may be resizing its pool.
            Err(error) => self.failed(&error),
        }
    }

    fn tick(&mut self, device: &mut impl Device) {
        self.update(device);
        match self.config.mode {
            Mode::Resident if self.last_look.elapsed() >= BETWEEN_LOOKS => {
                match self.attach() {
                    Ok(_) => {}
                    Err(error) => self.failed(&error),
                }
                self.watch();
            }
            Mode::OnDemand
                if !self.servers.is_empty()
                    && self.last_request.is_none_or(|at| at.elapsed() >= self.config.detach_after()) =>
            {
                tracing::info!("dom0 has asked nothing for a while");
                // What is published stays: dom0 may be in the middle of a long migration, and hints may be old.
                self.detach();
            }
            _ => {}
        }
        self.write_textfile();
    }

    fn detach(&mut self) {
        if !self.servers.is_empty() {
            self.hints_made_wrong += self.hints_of_sessions();
            self.servers.detach();
            self.watches.clear();
            tracing::info!("probes are taken out");
        }
    }

    fn answer(&mut self, device: &mut impl Device, request: Request) {
        self.last_request = Some(Instant::now());
        match RequestKind::from_u32(request.kind) {
            Some(RequestKind::Snapshot) => self.publish(device, request.sequence),
            Some(RequestKind::Ended) => {
                tracing::info!(request.sequence, "dom0 says that the migration has ended");
                if self.config.mode == Mode::OnDemand {
                    self.detach();
                    self.withdraw(device);
                }
            }
            Some(RequestKind::Begun) | None => tracing::info!(request.sequence, request.kind, "told"),
        }
    }

    fn publish(&mut self, device: &mut impl Device, sequence: u64) {
        let start = Instant::now();
        // In resident mode this finds a server that has only just started.
        if let Err(error) = self.attach() {
            self.failed(&error);
        }
        self.watch();
        match self.servers.publish(device, sequence) {
            Ok(mut answer) => {
                answer.milliseconds = start.elapsed().as_millis() as u64;
                tracing::info!(
                    sequence = answer.sequence,
                    generation = answer.generation,
                    servers = answer.servers,
                    frames_read = answer.lists.frames_read,
                    frames_written = answer.lists.frames_written,
                    clean = answer.lists.pool_frames_clean,
                    pages = answer.pages_listed,
                    cached = answer.page_cache.as_ref().map(|cache| cache.pages),
                    milliseconds = answer.milliseconds,
                    "lists are published"
                );
                self.answers += 1;
                self.last_answer = Some(answer);
                self.published = true;
            }
            // dom0 waits for an answer only so long; a migration without lists is a plain one.
            Err(error) => self.failed(&error),
        }
    }

    fn withdraw(&mut self, device: &mut impl Device) {
        if self.published {
            match device.withdraw() {
                Ok(()) => self.published = false,
                Err(error) => tracing::warn!(%error, "the lists stay published"),
            }
        }
    }

    /// A failure that is not the end: mysqld may be resizing its pool, or ending, which is told otherwise.
    fn failed(&mut self, error: &dyn std::error::Error) {
        tracing::warn!(%error, "not done");
        self.last_error = Some(error.to_string());
    }

    fn tell(&mut self, device: &mut impl Device, mut stream: UnixStream) {
        self.update(device);
        let module = device.stats().inspect_err(|error| tracing::debug!(%error, "no counters"));
        let status = Status { module: module.ok().map(Into::into), ..self.status() };
        match serde_json::to_vec(&status) {
            Ok(json) => {
                tokio::spawn(async move { tell_all(&mut stream, &json).await });
            }
            Err(error) => tracing::warn!(%error, "no status"),
        }
    }

    fn tell_metrics(&mut self, device: &mut impl Device, mut stream: TcpStream) {
        self.update(device);
        let text = metrics::text(&self.status());
        tokio::spawn(async move {
            let mut head = Vec::new();
            let read = async {
                let mut piece = [0; 1024];
                while head.len() < LONGEST_HEAD && !head.windows(4).any(|end| end == b"\r\n\r\n") {
                    match stream.read(&mut piece).await? {
                        0 => break,
                        read => head.extend_from_slice(&piece[..read]),
                    }
                }
                Ok::<(), io::Error>(())
            };
            match timeout(READER_PATIENCE, read).await {
                Ok(Ok(())) => {
                    let answer = metrics::http_answer(&head, || text);
                    tell_all(&mut stream, answer.as_bytes()).await;
                }
                _ => tracing::debug!("somebody wanted metrics and said nothing"),
            }
        });
    }

    fn write_textfile(&mut self) {
        let Some(path) = self.config.metrics.textfile.clone() else { return };
        let every = Duration::from_secs(self.config.metrics.textfile_seconds);
        if self.last_textfile.is_some_and(|at| at.elapsed() < every) {
            return;
        }
        self.last_textfile = Some(Instant::now());
        if let Err(error) = metrics::write_file(&path, &metrics::text(&self.status())) {
            let error = io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()));
            self.failed(&error);
        }
    }

    fn hints_of_sessions(&self) -> u64 {
        self.servers.sessions().map(|(_, session)| session.hints_made_wrong()).sum()
    }

    fn status(&self) -> Status {
        let refused = self.servers.refused().map(|(key, refused)| RefusedStatus {
            mysqld_pid: key.pid,
            why: refused.error.to_string(),
            is_final: refused.error.is_final(),
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mode: self.config.mode,
            servers: self
                .servers
                .sessions()
                .map(|(_, session)| server_status(session, self.config.statistics))
                .collect(),
            refused: refused.collect(),
            seconds_since_request: self.last_request.map(|at| at.elapsed().as_secs()),
            answers: self.answers,
            last_answer: self.last_answer.clone(),
            published: self.published,
            last_error: self.last_error.clone(),
            peak_memory_bytes: peak_memory_bytes(),
            hints_made_wrong: self.hints_made_wrong
                + self.hints_of_sessions()
                + self.servers.cache_hints_made_wrong(),
            module: None,
        }
    }
}

fn server_status(session: &Session, counting: bool) -> ServerStatus {
    let server = session.server();
    let (snapshots, snapshot_took) = session.snapshots();
    let missed = session.probes().missed().unwrap_or_default();
    let count = |kind: &EventKind| session.events().get(kind).copied().unwrap_or_default();
    ServerStatus {
        mysqld_pid: server.process.pid,
        mysqld_package: server.build.package.clone(),
        mysqld_build_id: server.build.build_id.clone(),
        probes: session.probes().attached().len() as u64,
        frames: session.table().counts(),
        events: EventKind::ALL.iter().map(|kind| (kind.word().to_owned(), count(kind))).collect(),
        events_lost: missed.lost,
        events_unreadable: missed.unreadable,
        snapshots,
        snapshot_milliseconds: snapshot_took.as_millis() as u64,
        // Without counting there is nothing to tell, and the kernel's list may not be read without CAP_SYS_ADMIN.
        programs: if counting {
            statistics::of_programs(&session.probes().program_ids())
        } else {
            Vec::new()
        },
    }
}

async fn tell_when_ready(fd: AsyncFd<OwnedFd>, once: bool, happened: Arc<Notify>) {
    while let Ok(mut ready) = fd.readable().await {
        ready.clear_ready();
        happened.notify_one();
        if once {
            break;
        }
    }
}

async fn tell_all(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) {
    let told = async {
        stream.write_all(bytes).await?;
        stream.shutdown().await
    };
    match timeout(READER_PATIENCE, told).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "somebody asked and did not listen"),
        Err(_) => tracing::debug!("somebody asked and did not read"),
    }
}

async fn listen_for_metrics(config: &Config) -> Result<Option<TcpListener>, ServiceError> {
    let Some(address) = config.metrics.listen else { return Ok(None) };
    let listener = TcpListener::bind(address).await;
    listener.map(Some).map_err(|source| ServiceError::Metrics { address, source })
}

/// The next connection; never where nothing listens.
async fn accept(listener: Option<&TcpListener>) -> io::Result<TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(stream, _)| stream),
        None => pending().await,
    }
}

/// Listens at a path of which nobody else does; a socket file that a killed probe left is replaced.
fn listen(path: &Path) -> Result<UnixListener, ServiceError> {
    let failed = |source| ServiceError::Socket { path: path.to_path_buf(), source };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ServiceError::Runs(path.to_path_buf()));
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}
