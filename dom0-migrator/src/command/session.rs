//! One migration at the target: `xl migrate-receive`, the helper, and the hand-over.

use std::io::{self, BufReader};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::child::{self, Xl};
use super::connection::Wire;
use super::relay::{self, Inlet, Said};
use super::settle::{self, SettleError};
use crate::control::{self, FromSource, FromTarget, HelperKind, TargetOutcome};
use crate::disks::{self, RefusedDisk};
use crate::engine::DiskName;
use crate::handoff::{Event, HandoffError, Listener, Order, OwnDisk, Peer};
use crate::handover::record::{Process, Record};
use crate::handover::{TargetEvent, TargetState, Verdict};
use crate::report::RestoreReport;
use crate::xen::DomainId;

/// How often things are looked after.
const TICK: Duration = Duration::from_millis(100);
/// How long xl may take to end in its own way, and after each stronger hint.
const GRACE: Duration = Duration::from_secs(5);
/// How long a domain that has come as a whole waits for permission. Giving up is always safe, and the source may ask later.
const PERMISSION: Duration = Duration::from_secs(120);
/// How long xl may take to start a domain that was given.
const START: Duration = Duration::from_secs(60);

/// Why a session failed in itself.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The helper's socket.
    #[error(transparent)]
    Handoff(#[from] HandoffError),
    /// What is left could not be settled.
    #[error(transparent)]
    Settle(#[from] SettleError),
    /// The record.
    #[error(transparent)]
    Record(#[from] crate::handover::record::RecordError),
    /// The system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> SessionError {
    move |source| SessionError::System { what, source }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a session hears.
pub enum Happening {
    /// The source said something on the control connection.
    Source(FromSource),
    /// The control connection is gone.
    SourceGone,
    /// Somebody asks what becomes of it, and is to be told.
    Asked(Sender<Verdict>),
    /// xl said something.
    Xl(Said),
}

/// What is to be received, and over what.
pub struct Session<'a> {
    /// The helper that runs.
    pub helper: HelperKind,
    /// Whether all pages are compared at the end.
    pub compare: bool,
    /// Where the verdict and the outcome go.
    pub control: &'a mut TcpStream,
    /// xl's stream.
    pub stream: Wire,
    /// The record, in its first state.
    pub record: Arc<Mutex<Record<TargetState>>>,
    /// Set when this host is to stop receiving.
    pub ending: &'a AtomicBool,
}

/// What was heard of the helper.
#[derive(Default)]
struct Heard {
    /// The restored domain's number.
    domain: Mutex<Option<DomainId>>,
    restored: Mutex<Option<RestoreReport>>,
    /// The domain's disks, from its configuration at the head of the stream, which xl reads before it starts the helper.
    disks: Arc<Mutex<Vec<OwnDisk>>>,
    attending: AtomicUsize,
    mismatch_lines: AtomicU64,
}

/// Passes on what the source says on its control connection.
pub fn listen(mut lines: BufReader<TcpStream>, tell: Sender<Happening>) {
    std::thread::spawn(move || {
        while let Ok(said) = control::read_line(&mut lines) {
            if tell.send(Happening::Source(said)).is_err() {
                return;
            }
        }
        let _ = tell.send(Happening::SourceGone);
    });
}

impl Session<'_> {
    /// Runs xl until the domain runs here, or nothing of it is left here. `side` is the helpers' side channel.
    ///
    /// # Errors
    /// [`SessionError`]; the record then says what is still to be done.
    pub fn run(
        self,
        side: Wire,
        tell: &Sender<Happening>,
        happenings: &Receiver<Happening>,
    ) -> Result<TargetOutcome, SessionError> {
        let heard = Arc::new(Heard::default());
        let listener = Arc::new(Listener::bind()?);
        let order = Order { references: true, debug: self.compare, ..Order::default() };
        serve(&listener, side.into_socket(), order, &heard, &self.record).map_err(system("handoff"))?;
        let (mut xl, inlet) = self.start_xl(&listener, &heard, &heard.disks, tell)?;
        let process = Process::of(xl.pid());
        lock(&self.record).amend(|content| content.xl = process)?;
        let mut run = Run {
            record: self.record.clone(),
            inlet,
            control: self.control,
            ending: self.ending,
            asked: Vec::new(),
            limit: None,
            giving_up: None,
        };
        let status = run.watch(&mut xl, happenings)?;
        listener.close();
        // The helper's last words may still be on their way.
        for _ in 0..50 {
            if heard.attending.load(Ordering::Acquire) == 0 {
                break;
            }
            std::thread::sleep(TICK);
        }
        while let Ok(happening) = happenings.try_recv() {
            run.handle(happening)?;
        }
        let state = settle::target(&mut lock(&self.record))?;
        run.tell_verdict();
        let started = state == TargetState::Running;
        let said = xl.said();
        let error = (!started).then(|| match state {
            TargetState::Lost => "it was taken over, and is not here any more".to_owned(),
            _ => said.last().cloned().unwrap_or_else(|| format!("xl ended with {status}")),
        });
        let restore = lock(&heard.restored).take();
        Ok(TargetOutcome {
            started,
            error,
            incoming_destroyed: state == TargetState::Removed,
            restore,
            mismatch_lines: heard.mismatch_lines.load(Ordering::Acquire),
        })
    }

    fn start_xl(
        &self,
        listener: &Listener,
        heard: &Arc<Heard>,
        disks_of: &Arc<Mutex<Vec<OwnDisk>>>,
        tell: &Sender<Happening>,
    ) -> Result<(Xl, Inlet), SessionError> {
        let failed = || system("xl migrate-receive");
        let mut command = child::xl(&["migrate-receive"], self.helper, listener.name()).map_err(failed())?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let (heard, disks_of) = (heard.clone(), disks_of.clone());
        let mut xl = Xl::start(command, move |line| {
            tracing::info!("xl: {line}");
            if line.contains("verify pfn ") && line.contains(" failed") {
                heard.mismatch_lines.fetch_add(1, Ordering::AcqRel);
            }
        })
        .map_err(failed())?;
        let (stdin, stdout) = xl.take_pipes().ok_or_else(|| failed()(io::ErrorKind::BrokenPipe.into()))?;
        let (record, tell) = (self.record.clone(), tell.clone());
        let complete = move || match lock(&record).note(TargetEvent::Complete) {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(%error, "all has come, too late");
                false
            }
        };
        let configured = move |configuration: &Value| {
            let found = disks::of_configuration(configuration);
            for RefusedDisk { disk, reason } in &found.refused {
                tracing::info!(disk, reason, "the disk's pages come over the network");
            }
            let own = |disk: DiskName| OwnDisk { vdev: disk.vdev.0, path: disk.path };
            *lock(&disks_of) = found.readable.into_iter().map(own).collect();
        };
        let inlet = relay::start(&self.stream.socket, stdin, stdout, configured, complete, move |said| {
            let _ = tell.send(Happening::Xl(said));
        })
        .map_err(failed())?;
        Ok((xl, inlet))
    }
}

/// xl, and what happens around it.
struct Run<'a> {
    record: Arc<Mutex<Record<TargetState>>>,
    inlet: Inlet,
    control: &'a mut TcpStream,
    ending: &'a AtomicBool,
    /// Who else wants to know.
    asked: Vec<Sender<Verdict>>,
    /// When patience ends in the present state.
    limit: Option<(TargetState, Instant)>,
    /// When xl is made to end, and whether it was told already.
    giving_up: Option<(Instant, bool)>,
}

impl Run<'_> {
    fn watch(&mut self, xl: &mut Xl, happenings: &Receiver<Happening>) -> Result<ExitStatus, SessionError> {
        loop {
            if let Ok(happening) = happenings.recv_timeout(TICK) {
                self.handle(happening)?;
            }
            if let Some(status) = xl.try_wait().map_err(system("xl migrate-receive"))? {
                return Ok(status);
            }
            self.look_after(xl)?;
        }
    }

    fn state(&self) -> TargetState {
        lock(&self.record).state()
    }

    fn handle(&mut self, happening: Happening) -> Result<(), SessionError> {
        match happening {
            Happening::Source(FromSource::Given) => self.take_over()?,
            Happening::Source(FromSource::GaveUp) => self.give_up("the source gave up", GRACE)?,
            Happening::Source(
                FromSource::Start { .. }
                | FromSource::Ask { .. }
                | FromSource::Check(_)
                | FromSource::Examine(_),
            ) => {
                self.give_up("the source said something out of turn", GRACE)?;
            }
            Happening::SourceGone => self.give_up("the connection to the source is gone", GRACE)?,
            Happening::Asked(tell) => {
                self.asked.push(tell);
                self.give_up("the source asks from elsewhere", GRACE)?;
                self.tell_verdict();
            }
            Happening::Xl(Said::Status(status)) if self.state() == TargetState::Accepted => {
                let event = if status == 0 { TargetEvent::Started } else { TargetEvent::NotStarted };
                lock(&self.record).step(event)?;
                // One that was not started is told when it is removed.
                if status == 0 {
                    self.tell_verdict();
                }
            }
            Happening::Xl(Said::Status(status)) => tracing::debug!(status, "xl has ended without permission"),
            Happening::Xl(Said::Nonsense(problem)) => self.give_up(&problem, Duration::ZERO)?,
        }
        Ok(())
    }

    /// The source has given the domain: takes it, on record first, and lets xl start it.
    fn take_over(&mut self) -> Result<(), SessionError> {
        let taken = lock(&self.record).step(TargetEvent::Given);
        match taken {
            Ok(_) => {
                // An xl that is gone is found to be; the domain is then started without it.
                if let Err(error) = self.inlet.go() {
                    tracing::warn!(%error, "xl cannot be told to start the domain");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "permission that is not taken");
                self.give_up("permission came before the domain had come as a whole", GRACE)?;
                self.tell_verdict();
            }
        }
        Ok(())
    }

    /// Gives up, unless permission was taken; xl then has so long to end by itself.
    fn give_up(&mut self, why: &str, grace: Duration) -> Result<(), SessionError> {
        let mut record = lock(&self.record);
        if !matches!(record.state(), TargetState::Receiving | TargetState::Ready) {
            return Ok(());
        }
        tracing::warn!(domain = record.content().domain, "giving up: {why}");
        record.step(TargetEvent::GaveUp)?;
        drop(record);
        self.inlet.close();
        self.giving_up = Some((Instant::now() + grace, false));
        Ok(())
    }

    fn look_after(&mut self, xl: &Xl) -> Result<(), SessionError> {
        let state = self.state();
        if self.ending.load(Ordering::Acquire) {
            self.give_up("this host is about to stop receiving", Duration::ZERO)?;
        } else if lock(&self.record).is_cancelled() {
            self.give_up("cancelled", Duration::ZERO)?;
        }
        if self.limit.is_none_or(|(of, _)| of != state) {
            let patience = match state {
                TargetState::Ready => PERMISSION,
                TargetState::Accepted => START,
                _ => Duration::MAX,
            };
            self.limit = Instant::now().checked_add(patience).map(|at| (state, at));
        }
        if self.limit.is_some_and(|(_, at)| Instant::now() >= at) {
            match state {
                TargetState::Ready => self.give_up("no permission came", GRACE)?,
                // Whatever holds xl up: the domain is whole, and is started without it.
                TargetState::Accepted => self.giving_up = Some((Instant::now(), true)),
                _ => {}
            }
            self.limit = None;
        }
        if let Some((at, told)) = self.giving_up
            && Instant::now() >= at
        {
            xl.signal(if told { Signal::SIGKILL } else { Signal::SIGTERM });
            self.giving_up = Some((Instant::now() + GRACE, true));
        }
        Ok(())
    }

    /// Tells whoever wants to know, once there is something to tell.
    fn tell_verdict(&mut self) {
        let Some(verdict) = self.state().verdict() else { return };
        if let Err(error) = control::write_line(self.control, &FromTarget::Verdict(verdict)) {
            tracing::debug!(%error, ?verdict, "the source does not hear the verdict");
        }
        for asked in self.asked.drain(..) {
            let _ = asked.send(verdict);
        }
    }
}

/// Gives the helper its order, and keeps what it says.
fn serve(
    listener: &Arc<Listener>,
    side: TcpStream,
    order: Order,
    heard: &Arc<Heard>,
    record: &Arc<Mutex<Record<TargetState>>>,
) -> io::Result<()> {
    let (listener, heard, record) = (listener.clone(), heard.clone(), record.clone());
    // There is one helper; the side channel is its alone from then on, so that its end is the channel's end.
    let mut side = Some(OwnedFd::from(side));
    std::thread::Builder::new().name("handoff".into()).spawn(move || {
        while let Ok(peer) = listener.accept() {
            heard.attending.fetch_add(1, Ordering::AcqRel);
            if let Err(error) = attend(&peer, side.take(), &order, &heard, &record) {
                tracing::warn!(%error, "the helper was lost");
            }
            heard.attending.fetch_sub(1, Ordering::AcqRel);
        }
    })?;
    Ok(())
}

fn attend(
    peer: &Peer,
    side: Option<OwnedFd>,
    order: &Order,
    heard: &Heard,
    record: &Mutex<Record<TargetState>>,
) -> Result<(), HandoffError> {
    let Some(Event::Hello { domain, .. }) = peer.hear()? else {
        return Err(HandoffError::Closed("its hello"));
    };
    *lock(&heard.domain) = domain;
    let own_disks = lock(&heard.disks).clone();
    peer.order(&Order { socket: side.is_some(), own_disks, ..order.clone() }, side.as_ref())?;
    drop(side);
    // After the order: it takes the disk's time, and until then the record has the name.
    if let Err(error) = lock(record).amend(|content| content.domain_id = domain) {
        tracing::warn!(%error, "the domain's number is not in the record");
    }
    while let Some(event) = peer.hear()? {
        if let Event::Restored(report) = event {
            *lock(&heard.restored) = Some(*report);
        }
    }
    Ok(())
}
