//! `guest-probe run`: waits for many things at once, and for most of the time does nothing.
//!
//! Events are taken once a second, and when the ring buffer is half full: an idle server costs one wake-up a second.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use enlightenment::device::Request;
use enlightenment::xenstore::RequestKind;
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::device::{Device, DeviceError};
use crate::session::{Options, Session, SessionError};
use crate::statistics;
use crate::status::{Answer, Status, peak_memory_bytes};

/// How often events are taken when nothing else happens.
const TICK: Duration = Duration::from_secs(1);
/// How long somebody who asks for the status may take to read it.
const READER_PATIENCE: Duration = Duration::from_secs(2);

/// Why the service ended.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// The session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
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
    /// mysqld has ended; what was published is withdrawn.
    MysqldGone,
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

/// Serves until a signal comes or mysqld ends. On the way out the lists are withdrawn and the probes are taken out.
///
/// # Errors
/// [`ServiceError`].
pub async fn serve(
    options: &Options,
    device: &mut (impl Device + AsFd),
    socket: &Path,
    with_statistics: bool,
) -> Result<Ended, ServiceError> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("wait for SIGINT"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(system("wait for SIGTERM"))?;
    let listener = listen(socket)?;
    let _counting =
        with_statistics.then(statistics::count).transpose().map_err(system("let the kernel count"))?;
    let mut service = Service::start(options)?;
    let process = open_pid(service.session.server().process.pid).map_err(system("watch mysqld"))?;
    let ended = wait_for(process.as_fd()).map_err(system("wait for mysqld's end"))?;
    let requests = wait_for(device.as_fd()).map_err(system("wait for requests"))?;
    let many_events = wait_for(service.session.wake_fd()).map_err(system("wait for events"))?;
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let why = loop {
        tokio::select! {
            _ = interrupt.recv() => break Ended::BySignal,
            _ = terminate.recv() => break Ended::BySignal,
            ready = ended.readable() => {
                ready.map_err(system("wait for mysqld's end"))?.clear_ready();
                break Ended::MysqldGone;
            }
            ready = requests.readable() => {
                let mut ready = ready.map_err(system("wait for requests"))?;
                match device.next_request()? {
                    Some(request) => service.answer(device, request),
                    None => ready.clear_ready(),
                }
            }
            ready = many_events.readable() => {
                ready.map_err(system("wait for events"))?.clear_ready();
                service.update();
            }
            _ = tick.tick() => service.update(),
            Ok((stream, _)) = listener.accept() => service.tell(stream).await,
        }
    };
    // Lists of frames that nobody watches any more are worth nothing.
    if let Err(error) = device.withdraw() {
        tracing::warn!(%error, "the lists stay published");
    }
    // Nothing listens there any more; a file that stays does no harm.
    let _ = std::fs::remove_file(socket);
    Ok(why)
}

struct Service {
    session: Session,
    answers: u64,
    last_answer: Option<Answer>,
    last_error: Option<String>,
}

impl Service {
    fn start(options: &Options) -> Result<Self, ServiceError> {
        let session = Session::start(options)?;
        let server = session.server();
        let (_, snapshot_took) = session.snapshots();
        tracing::info!(
            pid = server.process.pid,
            package = server.build.package,
            frames = session.table().len(),
            ?snapshot_took,
            "probes are in place"
        );
        Ok(Self { session, answers: 0, last_answer: None, last_error: None })
    }

    fn update(&mut self) {
        if let Err(error) = self.session.update() {
            self.failed(&error);
        }
    }

    fn answer(&mut self, device: &mut impl Device, request: Request) {
        if RequestKind::from_u32(request.kind) != Some(RequestKind::Snapshot) {
            tracing::info!(request.sequence, request.kind, "told");
            return;
        }
        match self.session.publish(device, request.sequence) {
            Ok(answer) => {
                tracing::info!(
                    sequence = answer.sequence,
                    generation = answer.generation,
                    frames_read = answer.lists.frames_read,
                    frames_written = answer.lists.frames_written,
                    clean = answer.lists.pool_frames_clean,
                    pages = answer.pages_listed,
                    milliseconds = answer.milliseconds,
                    "lists are published"
                );
                self.answers += 1;
                self.last_answer = Some(answer);
            }
            // dom0 waits for an answer only so long; a migration without lists is a plain one.
            Err(error) => self.failed(&error),
        }
    }

    /// A failure that is not the end: mysqld may be resizing its pool, or ending, which is told otherwise.
    fn failed(&mut self, error: &SessionError) {
        tracing::warn!(%error, "not done");
        self.last_error = Some(error.to_string());
    }

    async fn tell(&mut self, mut stream: UnixStream) {
        self.update();
        let told = async {
            let json = serde_json::to_vec(&self.status())?;
            stream.write_all(&json).await?;
            stream.shutdown().await
        };
        match timeout(READER_PATIENCE, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "somebody asked and did not listen"),
            Err(_) => tracing::debug!("somebody asked and did not read"),
        }
    }

    fn status(&self) -> Status {
        let server = self.session.server();
        let (snapshots, snapshot_took) = self.session.snapshots();
        let events = self.session.events().iter();
        Status {
            mysqld_pid: server.process.pid,
            mysqld_package: server.build.package.clone(),
            frames: self.session.table().counts(),
            events: events.map(|(kind, count)| (kind.word().to_owned(), *count)).collect(),
            events_lost: self.session.probes().missed().map_or(0, |missed| missed.total()),
            snapshots,
            snapshot_milliseconds: snapshot_took.as_millis() as u64,
            answers: self.answers,
            last_answer: self.last_answer.clone(),
            last_error: self.last_error.clone(),
            programs: statistics::of_programs(&self.session.probes().program_ids()),
            peak_memory_bytes: peak_memory_bytes(),
            hints_made_wrong: self.session.hints_made_wrong(),
        }
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

/// A descriptor that becomes readable when the process ends.
fn open_pid(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call with integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just handed out this descriptor, to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
