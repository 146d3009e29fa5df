//! An allocator that counts, by which it is seen that no input sets how much memory is taken.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static NOW: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

/// The system's allocator, with the bytes counted that each thread holds of what it has taken itself.
#[derive(Debug)]
pub struct Counting;

fn count(bytes: i64) {
    // A thread that is ending has no cell any more, and nobody asks about it.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now.get())));
    });
}

// SAFETY: every call goes to the system's allocator as it is; counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promises are those that it makes to us.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// What a piece of work took on this thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    /// Bytes that it held at most, of those that it took itself.
    pub peak_bytes: u64,
}

impl Spent {
    /// Does the work and counts. Nothing is counted unless [`Counting`] is the program's allocator.
    pub fn on(work: impl FnOnce()) -> Self {
        let before = NOW.with(Cell::get);
        PEAK.with(|peak| peak.set(before));
        work();
        let peak = PEAK.with(Cell::get) - before;
        Self { peak_bytes: u64::try_from(peak).unwrap_or(0) }
    }
}
