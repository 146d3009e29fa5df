//! The target's filter: between the network and libxenguest.
//!
//! One thread owns the table of references that are held, and both ends of the stream. Two threads serve the side channel, one
//! writing verdicts, one waiting for its end; the [`Restorer`]'s read disks.
//!
//! # The rule for a reference that is held
//! A reference is held from the moment at which it comes until libxenguest has been handed the page, or anything newer for
//! its PFN. What a reader brings is handed on only if the table still holds that very number for that PFN; so a load that
//! comes late never overwrites anything, and a verdict is given only once the page is in libxenguest's pipe. A refused
//! reference stays in the table too: memory is not whole until its page has come.
//!
//! For PVH and HVM guests an entry "allocate only" (XALLOC) goes ahead of a held page: newer versions of libxenguest build 2 MiB
//! superpages out of PFNs that come in order in the first pass, and would find holes otherwise.

mod filter;
mod page_data_out;
mod side;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::config::Config;
use super::descriptor::{Input, Output, Ringer, bell};
use super::error::EngineError;
use super::late_writes::LateWrites;
use super::summary::{TargetStats, TargetSummary};
use filter::{Filter, Phase};
use side::Side;

/// What a [`TargetFilter`] stands between.
#[derive(Debug)]
pub struct TargetParts {
    /// The way from the source; read up to the END record, and not a byte further.
    pub from_wire: OwnedFd,
    /// Where libxenguest reads.
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
    thread: JoinHandle<Result<TargetSummary, EngineError>>,
}

impl TargetFilter {
    /// Starts the filter; the hello is answered by a thread of its own.
    ///
    /// # Errors
    /// [`EngineError::Start`] when threads or sockets cannot be had.
    pub fn start(parts: TargetParts) -> Result<Self, EngineError> {
        let TargetParts { from_wire, to_restore, side, config } = parts;
        let (ringer, bell) = bell().map_err(EngineError::Start)?;
        let aborted = Arc::new(AtomicBool::new(false));
        let stats = Arc::new(Mutex::new(TargetStats::default()));
        let side =
            side.map(|fd| Side::start(fd, &config, &ringer)).transpose().map_err(EngineError::Start)?;
        let mut filter = Filter {
            input: Input::new(from_wire),
            output: Output::new(to_restore),
            bell,
            ringer: ringer.clone(),
            aborted: Arc::clone(&aborted),
            phase: Phase::Memory,
            placeholders: false,
            side,
            session: None,
            held: HashMap::new(),
            next_number: 0,
            config,
            stats: TargetStats::default(),
            shared: Arc::clone(&stats),
            disks: Vec::new(),
            late_writes: LateWrites::default(),
            body: Vec::new(),
            head: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("target-filter".into())
            .spawn(move || {
                let result = filter.run();
                filter.publish();
                let poolskip = filter.session.take().is_some();
                if let Some(side) = filter.side.take() {
                    side.close(poolskip && result.is_ok());
                }
                let summary = TargetSummary {
                    stats: filter.stats,
                    poolskip,
                    disks: filter.disks,
                    late_writes: filter.late_writes,
                };
                result.map(|()| summary)
            })
            .map_err(EngineError::Start)?;
        Ok(Self { ringer, aborted, stats, thread })
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

    /// Ends the filter at the next record boundary. A filter that is blocked in a read or a write notices only when its
    /// other side closes.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        self.ringer.ring();
    }
}
