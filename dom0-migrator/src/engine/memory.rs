//! Large pieces of memory, straight from the kernel: zeroed, aligned to a page, no page taken before it is touched, and all of it given
//! back when it is dropped. What an allocator keeps for later would count beside every budget here.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the processor's tables map in one step, where the kernel may (`madvise(2)`, `MADV_HUGEPAGE`).
const HUGE: usize = 2 << 20;

/// Whether memory that is dropped stays mapped.
static LEFT_TO_EXIT: AtomicBool = AtomicBool::new(false);

/// From now on memory that is dropped, anywhere in this process, is left to the process's exit. For one that is about to end: the kernel takes
/// all of it at once then, whereas what is unmapped piece by piece holds up the other threads' mappings meanwhile.
pub fn leave_to_exit() {
    LEFT_TO_EXIT.store(true, Ordering::Relaxed);
}

/// Anonymous memory of this process alone.
#[derive(Debug)]
pub struct Memory {
    /// Dangling, and nothing mapped, if `length` is 0.
    start: NonNull<u8>,
    length: usize,
    /// What was mapped: the same, or some more around it.
    mapped: (NonNull<u8>, usize),
}

// SAFETY: the mapping belongs to this value alone, and is reached through it by Rust's own rules of borrowing.
unsafe impl Send for Memory {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for Memory {}

impl Default for Memory {
    fn default() -> Self {
        Self { start: NonNull::dangling(), length: 0, mapped: (NonNull::dangling(), 0) }
    }
}

impl Memory {
    /// So many bytes of zeros. Like any allocation it ends the process when the system has no more to give.
    pub fn zeroed(length: usize) -> Self {
        if length == 0 {
            return Self::default();
        }
        // Huge pages lie at multiples of their size; room to begin at one is address space, not memory.
        let wanted = if length < HUGE { length } else { length.saturating_add(HUGE) };
        // SAFETY: a new mapping that replaces none, since no address is asked for.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                wanted,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let mapped = (mapped != libc::MAP_FAILED).then_some(mapped.cast::<u8>()).and_then(NonNull::new);
        let Some(mapped) = mapped else {
            match std::alloc::Layout::from_size_align(length, super::xen_stream::PAGE) {
                Ok(layout) => std::alloc::handle_alloc_error(layout),
                Err(_) => std::process::abort(),
            }
        };
        let before = if length < HUGE { 0 } else { mapped.as_ptr().align_offset(HUGE) };
        // SAFETY: fewer than HUGE bytes, and that many more than `length` were mapped.
        let start = unsafe { mapped.add(before) };
        if length >= HUGE {
            // The last piece, if it is no whole one, stays in small pages, so that no more memory is taken than was asked for.
            // SAFETY: advice about a part of the mapping above; whether it is taken does not matter.
            unsafe { libc::madvise(start.as_ptr().cast(), length / HUGE * HUGE, libc::MADV_HUGEPAGE) };
        }
        Self { start, length, mapped: (mapped, wanted) }
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `length` bytes from `start` on are mapped, readable and initialised (zeros at first) until `self` is dropped; of an
        // empty one the pointer is dangling and the length 0.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and writable; `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (mapped, length) = self.mapped;
        if length > 0 && !LEFT_TO_EXIT.load(Ordering::Relaxed) {
            // SAFETY: exactly what was mapped; nothing borrows from it any more.
            unsafe { libc::munmap(mapped.as_ptr().cast(), length) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a page is mapped in this process.
    fn is_mapped(page: *mut u8) -> bool {
        let mut in_memory = 0;
        // SAFETY: asks about an address; one that is not mapped is an error.
        unsafe { libc::mincore(page.cast(), 4096, &raw mut in_memory) == 0 }
    }

    #[test]
    fn what_is_left_to_the_exit_stays_mapped() {
        // It is for good, so for a process of its own.
        // SAFETY: the child calls the kernel, and nothing that might wait for another thread.
        match unsafe { libc::fork() } {
            0 => {
                leave_to_exit();
                let mut left = Memory::zeroed(1 << 20);
                let left_page = left.as_mut_ptr();
                drop(left);
                let is_left = is_mapped(left_page);
                // SAFETY: ends the child.
                unsafe { libc::_exit(i32::from(!is_left)) };
            }
            child => {
                let mut status = 0;
                // SAFETY: waits for the child that was just made.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status}");
            }
        }
    }

    #[test]
    fn it_is_zeroed_aligned_and_as_long_as_was_asked_for() {
        for length in [0, 1, 4096, HUGE - 1, HUGE, 2 * HUGE + 12_345] {
            let mut memory = Memory::zeroed(length);
            assert!(memory.len() == length && memory.iter().all(|&byte| byte == 0));
            assert!(length == 0 || memory.as_ptr().addr().is_multiple_of(4096));
            assert!(length < HUGE || memory.as_ptr().addr().is_multiple_of(HUGE));
            memory.fill(7);
            let moved = std::thread::spawn(move || memory.iter().map(|&byte| u64::from(byte)).sum::<u64>());
            assert_eq!(moved.join().unwrap(), 7 * length as u64);
        }
    }
}
