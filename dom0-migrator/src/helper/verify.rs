//! The comparison that a debug migration makes: libxenguest only logs a page that differs; here it is counted, and made an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::xen::logger::{Level, Sink};

/// Counts what libxenguest logs about its comparison, and hands everything on to another sink.
///
/// In `xg_sr_restore.c` the record VERIFY logs "Verify mode enabled", and each page that differs after it
/// "verify pfn 0x… failed (type 0x…)". The wording is the same from Xen 4.17 to 4.22.
pub struct VerifyWatch<S> {
    next: Arc<S>,
    enabled: AtomicBool,
    mismatches: AtomicU64,
}

impl<S> std::fmt::Debug for VerifyWatch<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifyWatch").field("mismatches", &self.mismatches).finish_non_exhaustive()
    }
}

impl<S> VerifyWatch<S> {
    /// A watch in front of `next`.
    pub fn new(next: Arc<S>) -> Self {
        Self { next, enabled: AtomicBool::new(false), mismatches: AtomicU64::new(0) }
    }

    /// Whether libxenguest said that it compares.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Pages that differed.
    pub fn mismatches(&self) -> u64 {
        self.mismatches.load(Ordering::Acquire)
    }
}

/// Whether a line of log says that a page differs.
fn is_mismatch(text: &str) -> bool {
    text.find("verify pfn ").is_some_and(|at| text.get(at..).is_some_and(|rest| rest.contains(" failed")))
}

impl<S: Sink> Sink for VerifyWatch<S> {
    fn message(&self, level: Level, errno: i32, context: &str, text: &str) {
        if is_mismatch(text) {
            self.mismatches.fetch_add(1, Ordering::AcqRel);
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
        assert_eq!(watch.mismatches(), 2);
    }
}
