//! The source's filter: between libxenguest and the network.
//!
//! ```text
//!                ┌► workers: zeros, hashes ─┐
//! libxenguest ─► intake ═══ in order ══════►│ filter ═══ in order ═══► outlet ─► network
//!                  ▲ requests                 │  ▲ verdicts
//!                  └ libxenguest's thread     ▼  └ side channel's thread
//!                                          window
//! ```
//!
//! One thread, the filter's, owns the window and decides how each page goes. It takes records in the order in which they were written,
//! whatever the order in which the workers finish, and what it sends of a PFN is written in the order in which it was sent ([`backlog`] says
//! what may overtake what). So the order in which it handles things *is* the order of truth: what it sends later is newer. The others
//! only read ahead, look at bytes that no longer change, or write what it has sent: so the wire is not idle while pages are hashed,
//! and libxenguest does not wait for the wire before the budget for what is on the way is used up.
//!
//! # The rule for a page that goes by reference
//! What one would like is to forget a page once its reference is sent. But the target may refuse it, much later, when the
//! guest has long written to the page and libxenguest will not send it again before the next pass, or, after suspension,
//! never. So the bytes that were hashed are kept (the [`Window`]) until one of these comes to pass, whichever is first:
//!
//! * the target accepts: the bytes are in libxenguest's hands there; forget them;
//! * the target refuses: send the bytes, as ordinary PAGE_DATA, and forget them;
//! * an entry of any type for the same PFN comes: it is newer; forget them. A verdict that is already on its way names the
//!   reference by number, and a number that is settled is not looked at again;
//! * time is over, or the side channel is lost: send the bytes, as if refused.
//!
//! In every case what the target knows last about the PFN is what libxenguest sent last: what the stream says of a PFN stands in the order
//! in which the filter's thread sent it, and every one of these cases happens on that thread. In particular a refusal and a newer entry for the same PFN cannot
//! cross: either the refusal is handled first, and the retained bytes go before the newer entry, or it comes later
//! and finds the number settled.

mod backlog;
mod coming;
mod filter;
mod left_out;
mod looks;
mod plan;
mod settle;
mod side;
mod work;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::config::{Config, DiskName};
use super::descriptor::{Input, Output, Ringer, bell};
use super::dirty_log::DirtyLog;
use super::error::EngineError;
use super::intake::Intake;
use super::late_writes::LastSent;
use super::memory_record::Builder;
use super::outlet::Outlet;
use super::pool::Pool;
use super::reference_map::ReferenceMap;
use super::summary::{DrainReport, SourceStats, SourceSummary};
use super::window::Window;
use backlog::SinceFence;
use coming::Awaited;
pub use coming::Coming;
use filter::{Filter, Mode};
use left_out::LeftOut;
pub use looks::{Looks, PassLooks};
use side::Side;
use work::{Agreed, Knowledge, Pass, ToWorkers, Workers};

/// Records on their way through the filter at once, beside those that workers hold and those that the window keeps: a few that wait for
/// their turn, a few that wait for the wire.
const BUFFERS: usize = 6;
/// Parcels on their way to the wire at most. What they hold is bounded in bytes, by the pools and by the filter.
const BEHIND: usize = 1024;
/// Buffers for copies of retained pages that are sent after all.
const COPIES: usize = 2;

/// What a [`SourceFilter`] stands between, and what it knows.
#[derive(Debug)]
pub struct SourceParts {
    /// Where libxenguest's stream comes out: the reading end of a pipe or a socket pair.
    pub from_save: OwnedFd,
    /// The way to the target.
    pub to_wire: OwnedFd,
    /// The side channel, a connected socket; `None`: the stream passes through unchanged.
    pub side: Option<OwnedFd>,
    /// Where pages lie.
    pub map: ReferenceMap,
    /// The domain's disks, as the target is to find them.
    pub disks: Vec<DiskName>,
    /// Settings.
    pub config: Config,
}

/// What libxenguest's thread asks of the filter's.
#[derive(Debug)]
enum Request {
    Round(u32),
    CatchUp(Sender<()>),
    /// Until no reference is outstanding; and, if so wanted, until the target has all that was sent.
    Drain {
        reply: Sender<DrainReport>,
        arrive: bool,
    },
    Suspending,
    Suspended,
}

/// The source's filter.
#[derive(Debug)]
pub struct SourceFilter {
    requests: Sender<Request>,
    ringer: Ringer,
    aborted: Arc<AtomicBool>,
    stats: Arc<Mutex<SourceStats>>,
    looks: Option<Arc<Looks>>,
    /// The input's buffers, and the map for as long as it is there.
    #[cfg(test)]
    pub(super) memory: (Pool, std::sync::Weak<ReferenceMap>),
    thread: JoinHandle<Result<SourceSummary, EngineError>>,
}

impl SourceFilter {
    /// Says hello on the side channel, if there is one, and starts the filter. A side channel that does not answer is as good
    /// as none: the stream passes through, and the summary says so.
    ///
    /// # Errors
    /// [`EngineError::Start`] when threads or sockets cannot be had.
    pub fn start(parts: SourceParts) -> Result<Self, EngineError> {
        Self::start_with(parts, None, None)
    }

    /// The same with the domain's log of dirty pages, at which it may look: a page that is marked again is left for a later pass.
    ///
    /// # Errors
    /// [`EngineError::Start`] when threads or sockets cannot be had.
    pub fn start_with_log(parts: SourceParts, log: Arc<dyn DirtyLog>) -> Result<Self, EngineError> {
        Self::start_with(parts, Some(log), None)
    }

    /// Starts the filter before there is a side channel: the stream tells the target where it is to be had.
    ///
    /// # Errors
    /// [`EngineError::Start`] when threads or sockets cannot be had.
    pub fn start_before_side(parts: SourceParts, coming: Coming) -> Result<Self, EngineError> {
        Self::start_with(SourceParts { side: None, ..parts }, None, Some(coming))
    }

    fn start_with(
        parts: SourceParts,
        log: Option<Arc<dyn DirtyLog>>,
        coming: Option<Coming>,
    ) -> Result<Self, EngineError> {
        let SourceParts { from_save, to_wire, side, mut map, disks, config } = parts;
        map.seal();
        #[cfg(test)]
        if let Some(disk) = disks.first() {
            super::fault::point(&disk.path, super::fault::Point::SourceStart).map_err(EngineError::Start)?;
        }
        let (ringer, bell) = bell().map_err(EngineError::Start)?;
        let (requests, requests_rx) = unbounded();
        let aborted = Arc::new(AtomicBool::new(false));
        let stats = Arc::new(Mutex::new(SourceStats::default()));
        let mut summary = SourceSummary { pages_mapped: map.len(), ..SourceSummary::default() };
        let side = side.map(|fd| Side::open(fd, &disks, &map, &config)).and_then(|opened| match opened {
            Ok((side, answer)) => {
                summary.poolskip = true;
                summary.disks = answer.disks;
                Some(side)
            }
            Err(error) => {
                tracing::warn!(%error, "no side channel: everything goes raw");
                summary.stats.side_channel_lost = true;
                None
            }
        });
        let window = Window::new(side.as_ref().map_or(0, |side| side.window_pages));
        let may_refer = side.is_some() && config.references;
        // Without a target that knows us every byte goes as it is.
        let log = log.filter(|_| side.is_some());
        let (looks, taken) = log
            .clone()
            .map(|log| Looks::new(log, Arc::clone(&stats)))
            .map_or((None, None), |(looks, taken)| (Some(Arc::new(looks)), Some(taken)));
        let knowledge = Knowledge::new(map, side.as_ref().map(Agreed::on), config.reference_passes);
        knowledge.may_refer.store(may_refer, Ordering::Relaxed);
        knowledge.room.store(window.room(), Ordering::Relaxed);
        let knowledge = Arc::new(knowledge);
        let awaited = coming.map(|coming| Awaited::start(coming, disks, &knowledge, &config));
        let awaited = awaited.transpose().map_err(EngineError::Start)?;
        let hashers = config.hashers.max(1);
        let workers = Workers::start(hashers, &knowledge).map_err(EngineError::Start)?;
        let outlet = Outlet::start("source-outlet", BEHIND, Output::new(to_wire), |done: Sender<()>| {
            // Whoever asked may be gone.
            let _ = done.send(());
        })
        .map_err(EngineError::Start)?;
        let pool = Pool::new(BUFFERS + hashers);
        let intake = Intake::start(
            "source-intake",
            Input::new(from_save),
            (ringer.clone(), bell),
            Arc::clone(&aborted),
            pool.clone(),
            requests_rx,
            ToWorkers { workers, pass: Pass::default() },
        )
        .map_err(EngineError::Start)?;
        #[cfg(test)]
        let memory = (pool.clone(), Arc::downgrade(&knowledge.map()));
        let mut filter = Filter {
            arrived: intake.arrived.clone(),
            outlet,
            copies: Pool::new(COPIES),
            pool,
            knowledge,
            mode: if side.is_some() { Mode::Filter } else { Mode::PassThrough },
            may_refer,
            target_knows_us: side.is_some(),
            awaited,
            met: None,
            last_sent: config.compare.then(LastSent::default),
            side,
            window,
            config,
            drain: None,
            catching_up: None,
            since_fence: SinceFence::default(),
            left_out: LeftOut::new(log, taken.as_ref().map(|taken| taken.spare.clone())),
            looks: taken.map_or_else(crossbeam_channel::never, |taken| taken.looks),
            raw: Vec::new(),
            placeholders: false,
            syncs: (0, 0),
            verdicts_heard: 0,
            stats: summary.stats.clone(),
            travel: super::travel::Travel::default(),
            bytes_sent: 0,
            shared: Arc::clone(&stats),
            builder: Builder::default(),
        };
        let thread = std::thread::Builder::new()
            .name("source-filter".into())
            .spawn(move || {
                let result = filter.run();
                if let Some(side) = filter.side.take() {
                    side.close();
                }
                let met = filter.met.take();
                summary.poolskip |= met.is_some();
                summary.disks.extend(met.into_iter().flatten());
                let result = filter.end(intake, result);
                result.map(|(stats, travel)| SourceSummary { stats, travel, ..summary })
            })
            .map_err(EngineError::Start)?;
        Ok(Self {
            requests,
            ringer,
            aborted,
            stats,
            looks,
            #[cfg(test)]
            memory,
            thread,
        })
    }

    fn ask(&self, request: Request) {
        // A filter that has ended is noticed by `drain` and `finish`.
        let _ = self.requests.send(request);
        self.ringer.ring();
    }

    /// Tells that libxenguest begins a pass over memory (0 is the first): the log was cleared for it, and nothing of it is written yet.
    pub fn enter_round(&self, iteration: u32) {
        if let Some(looks) = &self.looks {
            looks.enter(iteration);
        }
        self.ask(Request::Round(iteration));
    }

    /// Looks at the log of dirty pages, if there is one: to be taken on libxenguest's thread.
    pub fn looks(&self) -> Option<Arc<Looks>> {
        self.looks.clone()
    }

    /// Call from libxenguest's thread, in the precopy policy, between two passes: has something in it once everything written so
    /// far has been consumed and all but a little of it is on the wire. The log of dirty pages, which is read after that, then says
    /// nothing of pages that wait to be sent. It is disconnected when the filter has ended.
    pub fn catch_up(&self) -> Receiver<()> {
        let (reply, caught_up) = bounded(1);
        self.ask(Request::CatchUp(reply));
        caught_up
    }

    /// Call from libxenguest's thread, just before the domain is suspended. Returns when everything
    /// written so far has been consumed and no reference is outstanding any more: what is not settled within
    /// [`Config::drain_timeout`] is sent as it is. It also waits until the target has handed all of that to libxenguest, so that
    /// nothing of it is still on the way while the domain is suspended. From then on nothing goes by reference.
    ///
    /// # Errors
    /// [`EngineError::Gone`] when the filter has ended; [`finish`](Self::finish) tells why.
    pub fn drain(&self) -> Result<DrainReport, EngineError> {
        self.drain_until(true)
    }

    /// As [`drain`](Self::drain), but does not wait for what is on the way. To be called in the precopy policy, when one more pass is sent
    /// before the domain is suspended: each moment here, the guest writes more pages for that pass.
    ///
    /// # Errors
    /// As [`drain`](Self::drain).
    pub fn settle_references(&self) -> Result<DrainReport, EngineError> {
        self.drain_until(false)
    }

    fn drain_until(&self, arrive: bool) -> Result<DrainReport, EngineError> {
        let (reply, report) = bounded(1);
        self.ask(Request::Drain { reply, arrive });
        report.recv().map_err(|_| EngineError::Gone)
    }

    /// Tells that the domain is to be suspended: no page is left for a later pass from here on.
    pub fn suspending(&self) {
        if let Some(looks) = &self.looks {
            looks.end();
        }
        self.ask(Request::Suspending);
    }

    /// Tells that the domain is suspended: nothing goes by reference from here on, drained or not.
    pub fn suspended(&self) {
        self.ask(Request::Suspended);
    }

    /// The counters as they are now.
    pub fn stats(&self) -> SourceStats {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A look at the counters that outlives the filter.
    pub fn watch(&self) -> super::Watch<SourceStats> {
        super::Watch(Arc::clone(&self.stats))
    }

    /// Whether the filter's thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end of the stream; the save side must have closed its end, or do so. On success everything up to the END
    /// record is on the wire.
    ///
    /// # Errors
    /// What ended the filter before END.
    pub fn finish(self) -> Result<SourceSummary, EngineError> {
        self.thread.join().map_err(|_| EngineError::Panicked)?
    }

    /// Ends the filter. One that is blocked in a write notices only when its other side closes.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        self.ringer.ring();
    }
}
