//! The comparison that a debug migration makes: libxenguest only logs a page that differs; here it is counted, and made an error.
//!
//! Pages that were written after the suspension differ too, with the stock helper as with ours ([`LateWrites`]): the source's filter names
//! them, and the target takes them out of the count.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::engine::LateWrites;
use crate::xen::logger::{Level, Sink};

/// Differing pages that are remembered by number at most; the rest is only counted, and never taken for a late write.
const MAX_NAMED: usize = 1 << 20;

/// Pages that differed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// For no known reason.
    pub unexplained: u64,
    /// Since the source itself did not send the same bytes again.
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
        let late = LateWrites::new(vec![9]);
        assert_eq!(watch.differences(&late), Differences { unexplained: 2, late_writes: 1 });
    }
}
