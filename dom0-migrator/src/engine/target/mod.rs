//! The target's filter: between the network and libxenguest.
//!
//! ```text
//! network ─► intake ═══ in order ═══► filter ═══ in order ═══► outlet ─► libxenguest
//!                                      │  ▲ batches              │ verdicts, once the pages are written
//!                            references ▼  │                      ▼
//!                                      restorer               side channel
//! ```
//!
//! One thread, the filter's, owns the table of references that are held; what it sends is written in the order in which it was sent. It waits
//! neither for disks nor, as long as there are buffers, for libxenguest, so the network is read on while either is slow. Two threads serve the
//! side channel, one writing verdicts, one waiting for its end.
//!
//! # The rule for a reference that is held
//! A reference is held from the moment at which it comes until libxenguest has been handed the page, or anything newer for
//! its PFN. What a reader brings is handed on only if the table still holds that very number for that PFN; so a load that
//! comes late never overwrites anything, and an acceptance is said by the thread that writes, once the page is in libxenguest's pipe. A refused
//! reference stays in the table too: memory is not whole until its page has come.
//!
//! For PVH and HVM guests an entry "allocate only" (XALLOC) goes ahead of a held page: newer versions of libxenguest build 2 MiB
//! superpages out of PFNs that come in order in the first pass, and would find holes otherwise.

mod filter;
mod held;
mod page_data_out;
mod side;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::never;

use super::config::Config;
use super::descriptor::{Input, Output, Ringer, bell};
use super::error::EngineError;
use super::intake::Intake;
use super::late_writes::LateWrites;
use super::outlet::Outlet;
use super::pool::Pool;
use super::summary::{TargetStats, TargetSummary};
use filter::{AsTheyAre, Filter, MAX_PRIVATE, Phase};
use held::HeldReferences;
use side::Side;

/// Records of 4 MiB on their way through the filter at once.
const BUFFERS: usize = 8;
/// Parcels on their way to libxenguest: a few, for what the disks bring meanwhile is joined to longer ones.
const BEHIND: usize = 4;

/// What a [`TargetFilter`] stands between.
#[derive(Debug)]
pub struct TargetParts {
    /// The way from the source; read up to the END record, and not a byte further.
    pub from_wire: OwnedFd,
    /// Where libxenguest reads; from a pipe without that it is copied in between, so by `read(2)` and the like, not by `splice(2)`.
    pub to_restore: OwnedFd,
    /// The side channel, a connected socket; `None`: the stream passes through unchanged.
    pub side: Option<OwnedFd>,
    /// Settings.
    pub config: Config,
}

/// The target's filter.
#[derive(Debug)]
pub struct TargetFilter {
    ringer: Ringer,
    aborted: Arc<AtomicBool>,
    stats: Arc<Mutex<TargetStats>>,
    /// The input's buffers.
    #[cfg(test)]
    pub(super) pool: Pool,
    thread: JoinHandle<Result<TargetSummary, EngineError>>,
}

impl TargetFilter {
    /// Starts the filter; the hello is answered by a thread of its own.
    ///
    /// # Errors
    /// [`EngineError::Start`] when threads or sockets cannot be had.
    pub fn start(parts: TargetParts) -> Result<Self, EngineError> {
        Self::start_after(parts, Vec::new())
    }

    /// Starts the filter of a stream whose beginning was read already.
    ///
    /// # Errors
    /// [`EngineError::Start`] when threads or sockets cannot be had.
    pub fn start_after(parts: TargetParts, beginning: Vec<u8>) -> Result<Self, EngineError> {
        let TargetParts { from_wire, to_restore, side, config } = parts;
        let (ringer, bell) = bell().map_err(EngineError::Start)?;
        let aborted = Arc::new(AtomicBool::new(false));
        let stats = Arc::new(Mutex::new(TargetStats::default()));
        let side = side.map(|fd| Side::start(fd, &config)).transpose().map_err(EngineError::Start)?;
        let sayings = side.as_ref().map(|side| side.sayings.clone());
        let outlet = Outlet::start("target-outlet", BEHIND, Output::lending(to_restore), move |saying| {
            if let Some(sayings) = &sayings {
                sayings.say(saying);
            }
        })
        .map_err(EngineError::Start)?;
        let pool = Pool::with_length(BUFFERS, MAX_PRIVATE);
        let intake = Intake::start(
            "target-intake",
            Input::with_beginning(from_wire, beginning),
            (ringer.clone(), bell),
            Arc::clone(&aborted),
            pool.clone(),
            never(),
            AsTheyAre,
        )
        .map_err(EngineError::Start)?;
        #[cfg(test)]
        let of_input = pool.clone();
        let filter = Filter {
            arrived: intake.arrived.clone(),
            outlet,
            phase: Phase::Memory,
            placeholders: false,
            side,
            side_ended: false,
            session: None,
            held: HeldReferences::default(),
            next_number: 0,
            config,
            stats: TargetStats::default(),
            bytes_sent: 0,
            shared: Arc::clone(&stats),
            disks: Vec::new(),
            late_writes: LateWrites::default(),
            pool,
        };
        let thread = std::thread::Builder::new()
            .name("target-filter".into())
            .spawn(move || {
                let mut filter = filter;
                let result = filter.run();
                filter.end(intake, result)
            })
            .map_err(EngineError::Start)?;
        Ok(Self {
            ringer,
            aborted,
            stats,
            #[cfg(test)]
            pool: of_input,
            thread,
        })
    }

    /// The counters as they are now.
    pub fn stats(&self) -> TargetStats {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A look at the counters that outlives the filter.
    pub fn watch(&self) -> super::Watch<TargetStats> {
        super::Watch(Arc::clone(&self.stats))
    }

    /// Whether the filter's thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until END has been handed to libxenguest.
    ///
    /// # Errors
    /// What ended the filter before END.
    pub fn finish(self) -> Result<TargetSummary, EngineError> {
        self.thread.join().map_err(|_| EngineError::Panicked)?
    }

    /// Ends the filter. One that is blocked in a write notices only when its other side closes.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        self.ringer.ring();
    }
}
