//! The comparison that a debug migration makes: libxenguest only logs a page that differs; here it is counted, and made an error.
//!
//! Pages that a backend wrote to after the suspension differ too, with the stock helper as with ours ([`LateWrites`]): the source
//! finds out which these can be when the last page has been sent again, and the target takes them out of the count.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use enlightenment::Pfn;

use crate::engine::{LateWrites, LateWritesTeller};
use crate::xen::control::Control;
use crate::xen::grants::Grants;
use crate::xen::guest::Guest;
use crate::xen::logger::{Level, Sink};
use crate::xen::{CallError, DomainId};

/// Differing pages that are remembered by number at most; the rest is only counted, and never taken for a late write.
const MAX_NAMED: usize = 1 << 20;

/// Pages that differed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// For no known reason.
    pub unexplained: u64,
    /// Since a backend wrote to them after the suspension.
    pub late_writes: u64,
}

/// Notes what libxenguest logs about its comparison, and hands everything on to another sink.
///
/// In `xg_sr_restore.c` the record VERIFY logs "Verify mode enabled", and each page that differs after it
/// "verify pfn 0x… failed (type 0x…)". The wording is the same from Xen 4.17 to 4.22.
pub struct VerifyWatch<S> {
    next: Arc<S>,
    enabled: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    named: BTreeSet<u64>,
    unnamed: u64,
}

impl<S> std::fmt::Debug for VerifyWatch<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifyWatch").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl<S> VerifyWatch<S> {
    /// A watch in front of `next`.
    pub fn new(next: Arc<S>) -> Self {
        Self { next, enabled: AtomicBool::new(false), seen: Mutex::default() }
    }

    /// Whether libxenguest said that it compares.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Pages that differed, of which `late` explains some.
    pub fn differences(&self, late: &LateWrites) -> Differences {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let explained = seen.named.iter().filter(|&&pfn| late.contains(pfn)).count() as u64;
        Differences {
            unexplained: seen.named.len() as u64 - explained + seen.unnamed,
            late_writes: explained,
        }
    }
}

/// The page that a line of log says to differ; `Some(None)` when it does not say which.
fn mismatch(text: &str) -> Option<Option<u64>> {
    let (_, rest) = text.split_once("verify pfn ")?;
    let (number, rest) = rest.split_once(' ')?;
    rest.starts_with("failed")
        .then(|| number.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok()))
}

impl<S: Sink> Sink for VerifyWatch<S> {
    fn message(&self, level: Level, errno: i32, context: &str, text: &str) {
        if let Some(pfn) = mismatch(text) {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            match pfn.filter(|_| seen.named.len() < MAX_NAMED) {
                Some(pfn) => drop(seen.named.insert(pfn)),
                None => seen.unnamed += 1,
            }
        } else if text.contains("Verify mode enabled") {
            self.enabled.store(true, Ordering::Release);
        }
        self.next.message(level, errno, context, text);
    }

    fn progress(&self, context: &str, doing: &str, done: u64, total: u64) {
        self.next.progress(context, doing, done, total);
    }
}

/// Finds the late writes at the one moment at which the log of dirty pages holds nothing else: after libxenguest has sent the last page
/// again, and before it goes on, in the thread in which it does both.
///
/// In `xg_sr_save.c`, `verify_frames` names its progress "Frames verify" and reports it as complete after the last page is written
/// and before the next record. The wording is the same from Xen 4.17 to 4.22; without it nothing is told, and the comparison counts
/// late writes as differences. It does nothing before [`arm`](Self::arm).
#[derive(Default)]
pub struct LateWritesWatch {
    /// What to read, and whom to tell; set once the filter runs.
    reader: OnceLock<(LateWritesReader, LateWritesTeller)>,
    done: AtomicBool,
}

/// Reads what may have been written to a suspended domain.
#[derive(Debug)]
pub struct LateWritesReader {
    /// A handle of its own: libxenguest's is in use.
    pub control: Control,
    /// Knows machine frames.
    pub guest: Guest,
    /// Reads the grant table.
    pub grants: Grants,
    /// The domain.
    pub domain: DomainId,
    /// Whether it is a PV domain, whose grant table has machine frames.
    pub is_pv: bool,
}

impl LateWritesReader {
    fn read(&self) -> Result<LateWrites, CallError> {
        let mut bitmap = self.control.logdirty_peek(self.domain)?;
        let logged = LateWrites::from_bitmap(&bitmap).len();
        match self.grants.mapped_for_writing(&self.control, self.domain) {
            Ok(frames) => {
                tracing::info!(logged, mapped = frames.len(), "pages that backends may have written to late");
                self.mark(&frames, &mut bitmap)?;
            }
            Err(error) => {
                tracing::warn!(%error, "pages that a backend has mapped will count as different if it wrote to them");
            }
        }
        Ok(LateWrites::from_bitmap(&bitmap))
    }

    /// Sets the bits of the guest frames that the grant table names; `frames` are sorted.
    fn mark(&self, frames: &[u64], bitmap: &mut [u8]) -> Result<(), CallError> {
        let mut set = |pfn: u64| {
            if let Some(byte) = usize::try_from(pfn / 8).ok().and_then(|at| bitmap.get_mut(at)) {
                *byte |= 1 << (pfn % 8);
            }
        };
        if !self.is_pv {
            frames.iter().copied().for_each(set);
            return Ok(());
        }
        let table = self.guest.machine_frames(&self.control, self.domain)?;
        (0..table.len())
            .filter(|&pfn| table.lookup(Pfn(pfn)).is_some_and(|frame| frames.binary_search(&frame).is_ok()))
            .for_each(&mut set);
        Ok(())
    }
}

impl std::fmt::Debug for LateWritesWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LateWritesWatch").field("done", &self.done).finish_non_exhaustive()
    }
}

impl LateWritesWatch {
    /// Has the late writes read by `reader`, and told.
    pub fn arm(&self, reader: LateWritesReader, teller: LateWritesTeller) {
        let _ = self.reader.set((reader, teller));
    }

    /// To be called with each progress that libxenguest reports.
    pub fn progress(&self, doing: &str, done: u64, total: u64) {
        let Some((reader, teller)) = self.reader.get().filter(|_| is_verified(doing, done, total)) else {
            return;
        };
        if self.done.swap(true, Ordering::AcqRel) {
            return;
        }
        match reader.read() {
            Ok(writes) => teller.tell(writes),
            Err(error) => {
                tracing::warn!(%error, "pages written after the suspension will count as different")
            }
        }
    }
}

/// Whether progress says that every page has been sent again.
fn is_verified(doing: &str, done: u64, total: u64) -> bool {
    doing.contains("Frames verify") && done == total
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nowhere;
    impl Sink for Nowhere {
        fn message(&self, _: Level, _: i32, _: &str, _: &str) {}
        fn progress(&self, _: &str, _: &str, _: u64, _: u64) {}
    }

    #[test]
    fn what_libxenguest_logs_is_counted() {
        let watch = VerifyWatch::new(Arc::new(Nowhere));
        let say = |text| watch.message(Level::ERROR, -1, "xc", text);
        say("Restoring domain");
        assert!(!watch.enabled());
        say("Verify mode enabled");
        say("verify pfn 0x1a2b failed (type 0)");
        say("internal error: verify pfn 0x1a2c failed (type 0x4): Internal error");
        say("verify pfn list read");
        assert!(watch.enabled());
        let none = watch.differences(&LateWrites::default());
        assert_eq!(none, Differences { unexplained: 2, late_writes: 0 });
    }

    #[test]
    fn only_a_page_that_was_written_late_is_explained() {
        let watch = VerifyWatch::new(Arc::new(Nowhere));
        for text in
            ["verify pfn 0x9 failed (type 0)", "verify pfn 0xa failed (type 0)", "verify pfn ? failed"]
        {
            watch.message(Level::ERROR, -1, "xc", text);
        }
        let late = LateWrites::from_bitmap(&[0, 0b0000_0010]);
        assert_eq!(watch.differences(&late), Differences { unexplained: 2, late_writes: 1 });
    }

    #[test]
    fn the_log_is_read_when_the_last_page_is_through() {
        assert!(!is_verified("Frames", 10, 10));
        assert!(!is_verified("Frames verify", 9, 10));
        assert!(is_verified("Frames verify", 10, 10));
    }
}
