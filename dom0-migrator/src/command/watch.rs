//! xl, the helper and the carrier at the source, and what happens around them while they run.

use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Migrate;
use super::child::{self, Xl};
use super::domain::Domain;
use super::link::Link;
use super::observer::Observer;
use crate::control::HelperKind;
use crate::handoff::{Answer, Event, HandoffError, Listener, Order, Peer, Role};
use crate::handover::record::{self, Record};
use crate::handover::{SourceEvent, SourceState};
use crate::report::{CarriedReport, SaveReport};

/// How often xl is looked after.
const TICK: Duration = Duration::from_millis(100);
/// How long helpers may take to report once xl has ended.
const REPORTS: Duration = Duration::from_secs(10);
/// How often `status` is told how far it is.
const SHOW: Duration = Duration::from_secs(1);

/// Something that happened while xl runs.
pub enum Happening {
    /// A helper said something.
    Heard(Event),
    /// The carrier holds xl's permission, and is to be told what to answer.
    Permission(Arc<Peer>),
    /// A helper is gone.
    Gone(Role),
    /// xl said a line.
    Line(String),
    /// A signal came.
    Signal(Signal),
}

/// Starts xl, with this program as its transport.
///
/// # Errors
/// What the system says.
pub fn start_xl(
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
    let command = child::xl(&arguments, helper, listener.name())?;
    let tell = tell.clone();
    Xl::start(command, move |line| drop(tell.send(Happening::Line(line.to_owned()))))
}

/// Gives helpers and carrier their orders, and hands on what they say, until the listener is closed.
///
/// # Errors
/// What the system says.
pub fn serve(
    listener: &Arc<Listener>,
    link: &Link,
    order: Order,
    tell: &Sender<Happening>,
) -> std::io::Result<()> {
    let sockets = (link.stream().try_clone()?, link.side().try_clone()?);
    let (listener, tell) = (listener.clone(), tell.clone());
    std::thread::Builder::new().name("handoff".into()).spawn(move || {
        while let Ok(peer) = listener.accept() {
            let (Ok(stream), Ok(side)) = (sockets.0.try_clone(), sockets.1.try_clone()) else { return };
            let (order, tell) = (order.clone(), tell.clone());
            std::thread::spawn(move || {
                let peer = Arc::new(peer);
                if let Err(error) = attend(&peer, stream, side, &order, &tell) {
                    tracing::warn!(%error, "a helper was lost");
                }
            });
        }
    })?;
    Ok(())
}

fn attend(
    peer: &Arc<Peer>,
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
        let _ = tell.send(match event {
            Event::Permission => Happening::Permission(peer.clone()),
            event => Happening::Heard(event),
        });
        heard = peer.hear();
    }
    let _ = tell.send(Happening::Gone(role));
    heard.map(|_| ())
}

/// What was seen of a run.
#[derive(Default)]
pub struct Seen {
    /// What the helper reported.
    pub saved: Option<SaveReport>,
    /// What the carrier reported.
    pub carried: Option<CarriedReport>,
    /// A signal or `cancel` came in time.
    pub interrupted: bool,
    save_helper: Option<u32>,
    carrier: bool,
    /// xl has gone so far that it starts the helper, if it has not done so.
    saving: bool,
    shown: record::Progress,
    shown_at: Option<Instant>,
}

/// xl and what happens around it.
pub struct Run<'a> {
    /// xl.
    pub xl: Xl,
    /// Which helper it runs.
    pub helper: HelperKind,
    /// Where it is shown.
    pub observer: Observer,
    /// The connections.
    pub link: &'a mut Link,
    /// The record.
    pub record: &'a mut Record<SourceState>,
    /// What was seen.
    pub seen: Seen,
}

impl Run<'_> {
    /// Looks after xl until it ends.
    pub fn watch(&mut self, happenings: &Receiver<Happening>) -> Option<std::process::ExitStatus> {
        loop {
            match happenings.recv_timeout(TICK) {
                Ok(happening) => self.handle(happening),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            }
            let link = &*self.link;
            self.observer.tick(|| link.carried().total());
            match self.xl.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => return Some(status),
                Err(error) => {
                    tracing::error!(%error, "xl was lost");
                    return None;
                }
            }
            if !self.seen.interrupted && self.seen.saved.is_none() && self.record.is_cancelled() {
                self.seen.interrupted = true;
                self.observer.line("cancelled: giving up, the domain stays here");
            }
            if self.seen.interrupted {
                self.interrupt();
            }
            self.show();
        }
    }

    /// Ends a helper whose xl has been killed: it would write all memory before it noticed.
    pub fn end_orphan(&self, status: Option<std::process::ExitStatus>) {
        let killed = status.is_none_or(|status| status.code().is_none());
        if let Some(pid) = self.seen.save_helper.filter(|_| killed && self.seen.saved.is_none()) {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
        }
    }

    /// Hears what is still being said once xl has ended.
    pub fn collect(&mut self, happenings: &Receiver<Happening>) {
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
            Happening::Heard(Event::Hello { .. } | Event::Restored(_) | Event::Permission) => {}
            Happening::Heard(Event::Progress { round, done, total }) => {
                self.observer.passed(round, done, total);
                (self.seen.shown.round, self.seen.shown.done, self.seen.shown.total) = (round, done, total);
            }
            Happening::Heard(Event::Sampled(sample)) => self.observer.sampled(sample),
            Happening::Heard(Event::Marked(mark)) => self.observer.marked(mark),
            Happening::Heard(Event::Travelled(travel)) => self.observer.travelled(travel),
            Happening::Heard(Event::Phase(phase)) => {
                self.observer.progress.phase(&phase);
                self.seen.shown.phase = phase;
            }
            Happening::Permission(carrier) => {
                let answer = self.hand_over();
                if let Err(error) = carrier.answer(answer) {
                    tracing::warn!(%error, ?answer, "the carrier was not told; what xl leaves is done without it");
                }
            }
            Happening::Heard(Event::Saved(report)) => self.seen.saved = Some(*report),
            Happening::Heard(Event::Carried(report)) => self.seen.carried = Some(report),
            Happening::Gone(Role::Save) => {
                self.seen.save_helper = None;
                let _ = self.link.side().shutdown(Shutdown::Both);
            }
            Happening::Gone(Role::Carrier) => {
                // Our copy of the connection would keep it open for the target.
                self.seen.carrier = false;
                let _ = self.link.stream().shutdown(Shutdown::Both);
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

    /// xl is ready to give the domain away: gives it, on record first, and hears what became of it.
    fn hand_over(&mut self) -> Answer {
        if self.seen.interrupted || self.record.is_cancelled() {
            self.seen.interrupted = true;
            self.observer.line("given up before the target had permission; the domain stays here");
            return Answer::Kept;
        }
        if let Err(error) = self.record.step(SourceEvent::Permission) {
            // Nothing has been said to the target: it must not run it, so this side may.
            self.observer.line(&format!("the hand-over cannot be recorded, the domain stays here: {error}"));
            return Answer::Kept;
        }
        let domain = self.record.content().domain.clone();
        let verdict = match self.link.give(&domain) {
            Ok(verdict) => verdict,
            Err(problem) => {
                self.observer.line(&format!("not known whether the target runs it: {problem}"));
                return Answer::Doubt;
            }
        };
        match self.record.step(SourceEvent::Verdict(verdict)) {
            Ok(SourceState::Gone) => Answer::Runs,
            Ok(SourceState::Kept) => Answer::Kept,
            Ok(_) => Answer::Doubt,
            Err(error) => {
                self.observer
                    .line(&format!("the target says {verdict:?}, which cannot be recorded: {error}"));
                Answer::Doubt
            }
        }
    }

    /// Tells `status` how far it is, now and then.
    fn show(&mut self) {
        if self.seen.shown_at.is_none_or(|at| at.elapsed() >= SHOW) {
            self.seen.shown_at = Some(Instant::now());
            self.record.show(&self.seen.shown);
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
