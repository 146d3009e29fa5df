//! How references are settled: verdicts, replacements, and the drain.

use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};

use super::backlog::Pages;
use super::filter::{Filter, Mode};
use super::side::SideEvent;
use crate::engine::error::{EngineError, SideError};
use crate::engine::memory_record;
use crate::engine::outlet::Parcel;
use crate::engine::side_message::{Refusal, Report, Verdicts};
use crate::engine::summary::DrainReport;
use crate::engine::travel::Way;
use crate::engine::window::Retained;
use crate::engine::xen_stream::{Entry, MAX_BATCH, NOTAB, PAGE, PAGE_DATA_HEAD, RecordHeader, record};

/// A drain under way.
#[derive(Debug)]
pub(super) struct Drain {
    pub(super) reply: Sender<DrainReport>,
    /// Whether it ends only when the target has all that was sent before it.
    pub(super) arrive: bool,
    pub(super) began: Instant,
    pub(super) report: DrainReport,
    /// Counters when it began: accepted, refused.
    pub(super) before: (u64, u64),
    /// Number of the sync record that was sent when nothing was outstanding any more.
    pub(super) sync: Option<u64>,
}

impl Filter {
    /// One step of a drain: ends it, or says how long to wait for what the target says next.
    ///
    /// Everything that libxenguest wrote before it asked stands before the drain in the input. Once nothing is outstanding the
    /// target is asked whether all has come through, and the drain ends with its answer: what still lies in buffers on the
    /// way would otherwise be sent while the domain is suspended.
    pub(super) fn go_on_draining(&mut self) -> Result<Option<Duration>, EngineError> {
        let outstanding = self.window.outstanding() as u64;
        let (last_sync, answered) = self.syncs;
        let Some(drain) = &mut self.drain else { return Ok(None) };
        drain.report.outstanding = drain.report.outstanding.max(outstanding);
        let left = self.config.drain_timeout.saturating_sub(drain.began.elapsed());
        if outstanding > 0 && left.is_zero() {
            let replaced = self.replace_outstanding()?;
            if let Some(drain) = &mut self.drain {
                drain.report.replaced += replaced;
            }
            return Ok(Some(Duration::ZERO));
        }
        let may_ask = drain.arrive && self.side.is_some() && self.mode == Mode::Filter && !left.is_zero();
        if outstanding == 0 && may_ask && drain.sync.is_none() {
            drain.sync = Some(last_sync + 1);
            self.syncs.0 += 1;
            let body = memory_record::sync_body(self.syncs.0);
            let mut bytes = RecordHeader::bytes(memory_record::RECORD_TYPE, body.len()).to_vec();
            bytes.extend_from_slice(&body);
            self.send_alone(Parcel::bytes(bytes))?;
            return Ok(Some(left));
        }
        let is_synced = drain.sync.is_none_or(|number| number <= answered);
        if outstanding > 0 || (!is_synced && self.side.is_some() && !left.is_zero()) {
            return Ok(Some(left));
        }
        if drain.arrive {
            // All of it is to be out of our hands, whether or not the target has said so.
            self.flush()?;
        }
        if let Some(mut drain) = self.drain.take() {
            let elapsed = drain.began.elapsed().as_secs_f64();
            drain.report.seconds = elapsed;
            drain.report.accepted = self.stats.references_accepted - drain.before.0;
            drain.report.refused = self.stats.references_refused - drain.before.1;
            drain.report.synced = drain.sync.is_some() && is_synced;
            self.stats.drain_seconds += elapsed;
            self.let_go(drain.arrive);
            self.publish();
            let _ = drain.reply.send(drain.report);
        }
        Ok(None)
    }

    /// Nothing goes by reference any more: lets go of what that took, and, before the domain is suspended, of whatever else is not in use. The
    /// process's exit, which libxl waits for while the domain stands still, would have to do it.
    fn let_go(&mut self, suspending: bool) {
        self.window.close();
        self.pool.hold_beside(0);
        self.knowledge.forget_map();
        if suspending {
            self.pool.let_go_of_free();
            self.copies.let_go_of_free();
        }
    }

    /// Waits until all that was sent is written.
    fn flush(&mut self) -> Result<(), EngineError> {
        let (done, is_done) = bounded(1);
        self.send_alone(Parcel { then: Some(done), ..Parcel::bytes(Vec::new()) })?;
        is_done.recv().map_err(|_| EngineError::Gone)
    }

    pub(super) fn handle_side_events(&mut self) -> Result<(), EngineError> {
        loop {
            let Some(side) = &self.side else { return Ok(()) };
            match side.events.try_recv() {
                Ok(event) => self.handle_side_event(event)?,
                Err(_) => return Ok(()),
            }
        }
    }

    pub(super) fn handle_side_event(&mut self, event: SideEvent) -> Result<(), EngineError> {
        match event {
            SideEvent::Report(Report::Verdicts(verdicts)) => self.handle_verdicts(&verdicts),
            SideEvent::Report(Report::Synced(number)) if number <= self.syncs.0 => {
                self.syncs.1 = self.syncs.1.max(number);
                Ok(())
            }
            SideEvent::Report(Report::Synced(_)) => {
                self.lose_side(&SideError::Malformed("an answer to a sync record that was never sent"))
            }
            SideEvent::Lost(error) => self.lose_side(&error),
        }
    }

    pub(super) fn lose_side(&mut self, error: &SideError) -> Result<(), EngineError> {
        tracing::warn!(%error, "side channel lost: no more references");
        self.may_refer = false;
        self.stats.side_channel_lost = true;
        if let Some(side) = self.side.take() {
            side.close();
        }
        self.replace_outstanding()?;
        Ok(())
    }

    pub(super) fn handle_verdicts(&mut self, verdicts: &Verdicts) -> Result<(), EngineError> {
        // A target says of each reference once what became of it. One that says it over and over would keep this thread busy with ranges.
        let said: u64 = verdicts.accepted.iter().map(|(_, count)| u64::from(*count)).sum();
        self.verdicts_heard += said + verdicts.refused.len() as u64;
        if self.verdicts_heard > self.window.next_number() {
            return self.lose_side(&SideError::Malformed("more verdicts than references"));
        }
        let never_sent = SideError::Malformed("a verdict on a reference that was never sent");
        for &(first, count) in &verdicts.accepted {
            if first + u64::from(count) > self.window.next_number() {
                return self.lose_side(&never_sent);
            }
            // Of those PFNs that follow each other: the first, and how many.
            let (mut from, mut pages) = (0, 0);
            for number in first..first + u64::from(count) {
                if let Ok(Some(retained)) = self.window.take(number) {
                    self.window.release(retained);
                    self.stats.references_accepted += 1;
                    if retained.pfn != from + pages {
                        self.travel.span(from, pages, Way::Accepted);
                        (from, pages) = (retained.pfn, 0);
                    }
                    pages += 1;
                }
            }
            self.travel.span(from, pages, Way::Accepted);
        }
        let mut refused = Vec::new();
        for &(number, reason) in &verdicts.refused {
            match self.window.take(number) {
                Ok(Some(retained)) => {
                    self.stats.references_refused += 1;
                    self.travel.span(retained.pfn, 1, Way::Refused);
                    let counts = &mut self.stats.refused;
                    match reason {
                        Refusal::Hash => counts.hash += 1,
                        Refusal::IoError => counts.io_error += 1,
                        Refusal::OutOfBounds => counts.out_of_bounds += 1,
                        Refusal::UnknownDisk => counts.unknown_disk += 1,
                    }
                    refused.push(retained);
                }
                Ok(None) => {}
                Err(_) => {
                    self.send_retained(&refused)?;
                    return self.lose_side(&never_sent);
                }
            }
        }
        self.send_retained(&refused)
    }

    /// Sends the retained pages of all outstanding references.
    pub(super) fn replace_outstanding(&mut self) -> Result<u64, EngineError> {
        let mut retained = Vec::with_capacity(self.window.outstanding());
        for number in self.window.numbers() {
            if let Ok(Some(page)) = self.window.take(number) {
                self.travel.span(page.pfn, 1, Way::Replaced);
                retained.push(page);
            }
        }
        self.stats.references_replaced += retained.len() as u64;
        self.send_retained(&retained)?;
        Ok(retained.len() as u64)
    }

    /// Sends retained pages as ordinary PAGE_DATA and gives their memory back.
    pub(super) fn send_retained(&mut self, retained: &[Retained]) -> Result<(), EngineError> {
        for batch in retained.chunks(MAX_BATCH) {
            let length = PAGE_DATA_HEAD + batch.len() * (8 + PAGE);
            let mut head = RecordHeader::bytes(record::PAGE_DATA, length).to_vec();
            head.extend_from_slice(&(batch.len() as u64).to_le_bytes());
            for page in batch {
                let entry = Entry { pfn: page.pfn, page_type: NOTAB };
                head.extend_from_slice(&entry.word().to_le_bytes());
            }
            // Their memory is given back below, long before the pages are written: so the pages are copied.
            let mut copy = self.copies.take(batch.len() * PAGE);
            for (to, page) in copy.bytes_mut().chunks_exact_mut(PAGE).zip(batch) {
                to.copy_from_slice(self.window.page(*page));
            }
            // Before anything newer of these PFNs, in whichever lane that goes.
            self.send_first(Parcel::whole(head, Pages::Record(copy)))?;
            self.stats.bytes_page_data += (batch.len() * PAGE) as u64;
        }
        for &page in retained {
            self.window.release(page);
        }
        Ok(())
    }

    /// Waits until nothing is outstanding. After a drain nothing is; without one (a save that never called the policy) this
    /// is where the stream waits.
    pub(super) fn settle(&mut self) -> Result<(), EngineError> {
        let began = Instant::now();
        while self.window.outstanding() > 0 {
            self.handle_side_events()?;
            let left = self.config.drain_timeout.saturating_sub(began.elapsed());
            let side_channel = self.side.as_ref().map(|side| side.events.clone());
            match side_channel {
                Some(events) if self.window.outstanding() > 0 && !left.is_zero() => {
                    match events.recv_timeout(left) {
                        Ok(event) => self.handle_side_event(event)?,
                        Err(_) => {
                            self.replace_outstanding()?;
                        }
                    }
                }
                _ => {
                    self.replace_outstanding()?;
                }
            }
        }
        Ok(())
    }
}
