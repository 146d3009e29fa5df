//! The source's helper.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use enlightenment::Pfn;
use enlightenment::xenstore::RequestKind;

use super::arguments::SaveArguments;
use super::channel::{Channel, ChannelError};
use super::first_pass::FirstPass;
use super::message::Message;
use super::policy::{Limits, Observed, Policy};
use super::sampling::SaveSampling;
use super::stream::{LibraryEnd, Terminated};
use super::{HelperError, Libraries, complete, take_descriptor};
use crate::command::configuration::Configuration;
use crate::command::domain;
use crate::disks;
use crate::engine::{
    Coming, Config, DirtyLog, Looks, ReferenceMap, SourceFilter, SourceParts, SourceSummary,
};
use crate::handoff::{Event, Order, Peer, Role};
use crate::lists::{self, Requester};
use crate::offer;
use crate::report::SaveReport;
use crate::timeline::Moment;
use crate::xen::DomainId;
use crate::xen::dirty_log::DomainLog;
use crate::xen::guest::{Precopy, PrecopyStats, SaveCallbacks};
use crate::xen::logger::{Level, Sink};
use crate::xenstore::Xenstore;

/// What a helper does that no command of ours has started, as long as it has no side channel: it takes zero pages out of nothing, and is
/// otherwise libxl's own.
const ALONE: Order = Order {
    socket: false,
    references: false,
    wait_lists_seconds: 0,
    debug: false,
    own_disks: Vec::new(),
    limits: Limits::DEFAULT,
    asked: None,
    peek: false,
};

/// `XCFLAGS_LIVE`: memory is sent while the domain runs, so there is a log of dirty pages.
const SAVE_LIVE: u32 = 1 << 0;
/// `XCFLAGS_DEBUG`: all pages are sent again at the end, and compared.
const SAVE_DEBUG: u32 = 1 << 1;

/// How often to look whether the end was asked for while waiting for something else.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The shortest wait between two of these.
const SHORT_WAIT: Duration = Duration::from_millis(1);

/// How long a filter may take to end after a save that failed; its way to the target may be blocked.
const FAREWELL: Duration = Duration::from_secs(5);

/// Saves a domain and tells libxl and the command.
pub fn run(arguments: &SaveArguments, channel: &Arc<Channel>) -> Result<(), ChannelError> {
    let started = Instant::now();
    let mut report = SaveReport::default();
    let peer = Peer::from_environment()
        .inspect_err(|error| channel.log(Level::WARN, &format!("{error}; a plain migration follows")))
        .ok()
        .flatten()
        .map(Arc::new);
    let result = save(arguments, channel, peer.as_ref(), started, &mut report);
    report.seconds = started.elapsed().as_secs_f64();
    report.error = result.as_ref().err().map(ToString::to_string);
    if let Some(peer) = &peer {
        let _ = peer.tell(&Event::Travelled(std::mem::take(&mut report.travel)));
        let _ = peer.tell(&Event::Saved(Box::new(report)));
    }
    complete(channel, &result)
}

fn save(
    arguments: &SaveArguments,
    channel: &Arc<Channel>,
    peer: Option<&Arc<Peer>>,
    started: Instant,
    report: &mut SaveReport,
) -> Result<(), HelperError> {
    let domain = arguments.domain;
    let wire = take_descriptor(arguments.io_fd)?;
    let (library_end, filter_end) = LibraryEnd::pair()?;
    let terminated = library_end.end_on_sigterm()?;
    let (order, side) = match peer.map(|peer| peer.introduce(Role::Save, Some(domain))) {
        Some(Ok(given)) => given,
        Some(Err(error)) => {
            channel.log(Level::WARN, &format!("{error}; a plain migration follows"));
            (ALONE, None)
        }
        None => (ALONE, None),
    };
    let (order, offered) = if peer.is_none() { offered(arguments, order, channel) } else { (order, None) };
    let round = Arc::new(AtomicU32::new(0));
    let first_pass = Arc::new(FirstPass::default());
    let sink = Arc::new(Progress {
        channel: channel.clone(),
        peer: peer.cloned(),
        round: round.clone(),
        first_pass: first_pass.clone(),
        looks: OnceLock::new(),
    });
    let libraries = Libraries::open(sink.clone())?;
    let may_have_side = side.is_some() || offered.is_some();
    let mut hints = Hints::take(domain, &order, may_have_side, &libraries, channel, peer, report);
    let peek = order.peek && side.is_some() && arguments.flags & SAVE_LIVE != 0;
    let parts = SourceParts {
        from_save: filter_end,
        to_wire: wire,
        side,
        map: hints.map.take().unwrap_or_else(|| ReferenceMap::new(Pfn(0))),
        disks: std::mem::take(&mut hints.disks),
        config: Config {
            references: order.references,
            compare: arguments.flags & SAVE_DEBUG != 0,
            process_ends: true,
            ..Config::default()
        },
    };
    let (engine, _listening) = match offered {
        Some((coming, listening)) => (SourceFilter::start_before_side(parts, coming)?, Some(listening)),
        None => match peek.then(|| open_log(&libraries, domain, channel)).flatten() {
            Some(log) => (SourceFilter::start_with_log(parts, log)?, None),
            None => (SourceFilter::start(parts)?, None),
        },
    };
    first_pass.begin(populated(domain), engine.watch());
    hints.tell(RequestKind::Begun);
    let looks = engine.looks();
    if let Some(looks) = &looks {
        // It is set here alone.
        let _ = sink.looks.set(Arc::downgrade(looks));
    }
    let sampling = SaveSampling::start(started, peer, &engine);
    let policy = Policy::new(order.limits);
    let (terminator, began) = (terminated.clone(), Instant::now());
    let mut saver = Saver {
        channel: channel.clone(),
        engine,
        looks,
        sampling,
        terminated: terminator,
        round,
        first_pass,
        policy,
        began,
    };
    let saved =
        libraries.guest.save(&libraries.control, library_end.as_fd(), domain, arguments.flags, &mut saver);
    // The end of the stream for the filter; the thread that waits for SIGTERM keeps a copy, so it is said aloud.
    library_end.close();
    let mut finished = if saved.is_ok() { saver.engine.finish() } else { finish_soon(saver.engine, report) };
    // A last sample, before the report that is the last word.
    drop(saver.sampling);
    if let Ok(summary) = &mut finished {
        report.count(summary);
        if peer.is_none() {
            tell_summary(summary, channel);
        }
        report.travel = std::mem::take(&mut summary.travel);
    }
    let result = match (saved, finished) {
        (Ok(()), Ok(_)) => Ok(()),
        // A filter that failed is why the library's writing failed, unless there was a signal.
        _ if terminated.get() => Err(HelperError::Terminated),
        (Ok(()) | Err(_), Err(error)) if !is_consequence(&error) => Err(error.into()),
        (Err(error), _) => Err(error.into()),
        (Ok(()), Err(error)) => Err(error.into()),
    };
    if result.is_err() {
        hints.tell(RequestKind::Ended);
    }
    result
}

/// The domain's log of dirty pages, to look at. Without it the migration goes on.
fn open_log(libraries: &Libraries, domain: DomainId, channel: &Channel) -> Option<Arc<dyn DirtyLog>> {
    match DomainLog::new(&libraries.control, domain) {
        Ok(log) => Some(Arc::new(log)),
        Err(error) => {
            channel.log(Level::WARN, &format!("{error}; no page is left for a later pass"));
            None
        }
    }
}

/// What is offered to the target of a plain `xl migrate`, and what is to be done then.
fn offered(
    arguments: &SaveArguments,
    order: Order,
    channel: &Channel,
) -> (Order, Option<(Coming, offer::Listening)>) {
    let nothing = |why: &dyn std::fmt::Display| {
        channel.log(Level::INFO, &format!("{why}: no references"));
    };
    if let Err(why) = offer::by_xl() {
        nothing(&why);
        return (order, None);
    }
    let configuration = Configuration::load(None).unwrap_or_else(|error| {
        channel.log(Level::WARN, &format!("{error}; going on with what is usual"));
        Configuration::default()
    });
    match offer::listen(configuration.side_port, arguments.debug()) {
        Ok((coming, listening)) => {
            let words = format!("the target's helper is waited for on {}", listening.address());
            channel.log(Level::INFO, &words);
            let order = Order { references: true, wait_lists_seconds: configuration.wait_lists, ..order };
            (order, Some((coming, listening)))
        }
        Err(error) => {
            nothing(&error);
            (order, None)
        }
    }
}

/// Pages that a domain has, 0 where that is not known.
fn populated(id: DomainId) -> u64 {
    let bytes = Xenstore::open().and_then(|mut store| domain::memory_bytes(&mut store, id));
    bytes.unwrap_or_default() / enlightenment::PAGE_SIZE as u64
}

/// Tells people, where no command of ours does.
fn tell_summary(summary: &SourceSummary, channel: &Channel) {
    let SourceSummary { stats, .. } = summary;
    let words = format!(
        "poolskip: {} pages by reference ({} accepted, {} refused), {} zero, {} whole, {} compared; {} bytes became {}",
        stats.pages_referenced,
        stats.references_accepted,
        stats.references_refused,
        stats.pages_zero,
        stats.pages_raw,
        stats.pages_verified,
        stats.bytes_in,
        stats.bytes_out
    );
    channel.log(Level::INFO, &words);
    if !summary.poolskip {
        channel.log(Level::INFO, "poolskip: the target's helper did not come: a plain migration");
    }
}

/// Whether a filter failed only because the library stopped writing.
fn is_consequence(error: &crate::engine::EngineError) -> bool {
    use crate::engine::EngineError;
    matches!(error, EngineError::Truncated { .. } | EngineError::Aborted | EngineError::Gone)
}

/// Ends a filter after a save that failed, without waiting for long; what it counted by then is in the report.
fn finish_soon(
    engine: SourceFilter,
    report: &mut SaveReport,
) -> Result<crate::engine::SourceSummary, crate::engine::EngineError> {
    engine.abort();
    let deadline = Instant::now() + FAREWELL;
    while !engine.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let summary = crate::engine::SourceSummary { stats: engine.stats(), ..Default::default() };
    report.count(&summary);
    if engine.is_finished() { engine.finish() } else { Err(crate::engine::EngineError::Aborted) }
}

/// What the guest told, and the way to tell it how the migration goes.
struct Hints {
    requester: Option<Requester<Xenstore>>,
    map: Option<ReferenceMap>,
    disks: Vec<crate::engine::DiskName>,
}

impl Hints {
    /// Asks the guest; whatever goes wrong is said, and means a migration without references.
    fn take(
        domain: DomainId,
        order: &Order,
        side: bool,
        libraries: &Libraries,
        channel: &Channel,
        peer: Option<&Arc<Peer>>,
        report: &mut SaveReport,
    ) -> Self {
        let mut hints = Self { requester: None, map: None, disks: Vec::new() };
        if !side || !order.references {
            report.lists_problem = Some("references were not asked for".into());
            return hints;
        }
        if let Some(peer) = peer {
            let _ = peer.tell(&Event::Phase("waiting for the guest's lists".into()));
        }
        match hints.try_take(domain, order, libraries) {
            Ok(lists) => {
                let counts = format!(
                    "lists of generation {}: {} pages, of {} frames read and {} written, and {} of cached files; {} disks",
                    lists.generation,
                    lists.pages_listed,
                    lists.frames_read,
                    lists.frames_written,
                    lists.pages_of_cached_files(),
                    hints.disks.len()
                );
                channel.log(Level::INFO, &counts);
                report.lists = Some(lists);
            }
            Err(problem) => {
                channel.log(Level::WARN, &format!("{problem}; the migration goes on without references"));
                report.lists_problem = Some(problem);
            }
        }
        hints
    }

    fn try_take(
        &mut self,
        domain: DomainId,
        order: &Order,
        libraries: &Libraries,
    ) -> Result<lists::ListsReport, String> {
        let mut store = Xenstore::open().map_err(|error| error.to_string())?;
        self.disks = disks::of_domain(&mut store, domain).map_err(|error| error.to_string())?;
        let requester = self.requester.insert(Requester::new(store, domain));
        let patience = Duration::from_secs(order.wait_lists_seconds);
        let lists =
            lists::take(requester, &libraries.control, &libraries.guest, domain, order.asked, patience)
                .map_err(|error| error.to_string())?;
        self.map = Some(lists.map);
        Ok(lists.report)
    }

    /// Tells the guest, if it was asked.
    fn tell(&mut self, kind: RequestKind) {
        if let Some(requester) = &mut self.requester
            && let Err(error) = requester.tell(kind)
        {
            tracing::warn!(%error, "the guest was not told");
        }
    }
}

/// Answers libxenguest.
struct Saver {
    channel: Arc<Channel>,
    engine: SourceFilter,
    looks: Option<Arc<Looks>>,
    sampling: SaveSampling,
    terminated: Terminated,
    round: Arc<AtomicU32>,
    first_pass: Arc<FirstPass>,
    policy: Policy,
    began: Instant,
}

impl Saver {
    /// A pass begins (0 is the first), of so many pages if that is known.
    fn enter_round(&self, round: u32, pages: Option<u64>) {
        self.round.store(round + 1, Ordering::Relaxed);
        self.engine.enter_round(round);
        self.sampling.mark(Moment::Round { number: round.saturating_add(1), pages });
    }

    /// Waits until the wire has taken what libxenguest has written; what is marked again meanwhile need not go. False: it never will, or the end was
    /// asked for.
    fn catch_up(&self) -> bool {
        let caught_up = self.engine.catch_up();
        loop {
            let patience = self.looks.as_ref().and_then(|looks| looks.patience());
            match caught_up.recv_timeout(patience.unwrap_or(LOOK_AGAIN).clamp(SHORT_WAIT, LOOK_AGAIN)) {
                Ok(()) => return true,
                Err(error) if error.is_timeout() && !self.terminated.get() => {}
                Err(_) => return false,
            }
            if let Some(looks) = &self.looks {
                looks.look_if_due();
            }
        }
    }

    /// Says what the looks of the pass that ends were.
    fn tell_looks(&self) {
        if let Some(looks) = self.looks.as_ref().and_then(|looks| looks.of_pass()) {
            self.channel.log(Level::INFO, &looks.to_string());
        }
    }
}

impl SaveCallbacks for Saver {
    fn suspend(&mut self) -> i32 {
        // The last pass before it may still lie in buffers on the way: it goes while the domain runs. No reference is outstanding, so
        // this waits for the wire alone.
        if !self.catch_up() {
            return 0;
        }
        self.tell_looks();
        self.engine.suspending();
        if self.engine.drain().is_err() {
            return 0;
        }
        let suspended = self.channel.ask("suspend", &Message::Suspend).unwrap_or_else(|error| {
            tracing::error!(%error, "cannot suspend");
            0
        });
        if suspended != 0 {
            self.engine.suspended();
            self.sampling.mark(Moment::Suspended);
            self.enter_round(self.round.load(Ordering::Relaxed), None);
        }
        suspended
    }

    fn precopy_policy(&mut self, stats: PrecopyStats) -> Precopy {
        if self.terminated.get() || self.engine.is_finished() {
            return Precopy::Abort;
        }
        // After a pass: what is still on its way would be marked again by the time it is sent.
        if stats.dirty_count < 0 {
            if !self.catch_up() {
                return Precopy::Abort;
            }
            self.tell_looks();
        }
        let bytes_sent = self.engine.stats().bytes_out;
        let decision = self.policy.decide(Observed::new(stats, bytes_sent, self.began.elapsed()));
        self.channel.log(Level::INFO, &decision.to_string());
        let mut answer = decision.answer;
        if stats.dirty_count > 0 {
            let pages = u64::try_from(stats.dirty_count).ok();
            let pages = pages.map(|pages| self.first_pass.count(stats.iteration + 1, 0, pages).1);
            self.enter_round(stats.iteration, pages);
        }
        if answer == Precopy::StopAndCopy {
            // Nothing may wait for storage while the domain is suspended. That all has arrived is waited for in `suspend`.
            self.sampling.mark(Moment::Drain);
            let drained = self.engine.settle_references();
            self.sampling.mark(Moment::Drained);
            match drained {
                Ok(drained) => {
                    let words = format!(
                        "drained in {:.2} s: {} references outstanding, {} accepted, {} refused, {} replaced",
                        drained.seconds,
                        drained.outstanding,
                        drained.accepted,
                        drained.refused,
                        drained.replaced
                    );
                    self.channel.log(Level::INFO, &words);
                    answer =
                        self.policy.drained(Duration::try_from_secs_f64(drained.seconds).unwrap_or_default());
                }
                Err(_) => return Precopy::Abort,
            }
        }
        answer
    }

    fn switch_qemu_logdirty(&mut self, domain: DomainId, enable: bool) -> i32 {
        let message = Message::SwitchQemuLogdirty { domain, enable };
        self.channel.ask("the device model's log", &message).unwrap_or(-1)
    }
}

/// Hands the library's messages to libxl, and its progress to the command too.
struct Progress {
    channel: Arc<Channel>,
    peer: Option<Arc<Peer>>,
    round: Arc<AtomicU32>,
    looks: OnceLock<Weak<Looks>>,
    first_pass: Arc<FirstPass>,
}

impl Sink for Progress {
    fn message(&self, level: Level, errno: i32, context: &str, text: &str) {
        self.channel.message(level, errno, context, text);
    }

    fn progress(&self, context: &str, doing: &str, done: u64, total: u64) {
        self.channel.progress(context, doing, done, total);
        // libxenguest calls this every 4 MiB of a pass, on its own thread: no other operation on the log is under way.
        if let Some(looks) = self.looks.get().and_then(Weak::upgrade) {
            looks.look_if_due();
        }
        if let Some(peer) = &self.peer {
            let round = self.round.load(Ordering::Relaxed);
            let (done, total) = self.first_pass.count(round, done, total);
            let _ = peer.tell(&Event::Progress { round, done, total });
        }
    }
}
