//! The memory that is read into: so many buffers, each taken from the system when it is first needed.
//!
//! There are small ones, for reads as most are, and large ones, for the longest that there may be. So what is read lies close together, and
//! the more so as the buffer that came back last goes out first.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::super::memory::Memory;

/// A buffer. Its memory is aligned as direct I/O asks for. Dropped, it goes back.
#[derive(Debug, Default)]
pub(super) struct ReadBuffer {
    memory: Memory,
    /// Its number, none twice.
    number: usize,
    /// Whether the ring knows its memory by that number.
    pub(super) is_registered: bool,
    home: Option<Arc<Buffers>>,
}

impl ReadBuffer {
    /// Whether it is none: what there is when it is over.
    pub(super) fn is_none(&self) -> bool {
        self.memory.is_empty()
    }

    /// Its number, from 0 on.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    /// Its first bytes, so many of them.
    pub(super) fn get(&mut self, length: usize) -> &mut [u8] {
        self.memory.get_mut(..length).unwrap_or_default()
    }

    /// All of its memory.
    pub(super) fn all(&mut self) -> &mut [u8] {
        &mut self.memory
    }

    /// The same, to read.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory
    }
}

impl Drop for ReadBuffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            let (number, is_registered) = (self.number, self.is_registered);
            let memory = std::mem::take(&mut self.memory);
            let mut state = home.lock();
            state.free.push(Free { memory, number, is_registered });
            let is_waited_for = state.waiting > 0;
            drop(state);
            // A call of the system for each read, if nobody waits, is one too many.
            if is_waited_for {
                home.given_back.notify_one();
            }
        }
    }
}

/// A buffer that nobody has.
#[derive(Debug)]
struct Free {
    memory: Memory,
    number: usize,
    is_registered: bool,
}

#[derive(Debug)]
struct State {
    /// The last one came back last, and goes out first: its memory is there, and warm.
    free: Vec<Free>,
    /// Buffers made so far.
    made: usize,
    /// Threads that wait for one.
    waiting: usize,
    over: bool,
}

/// All of one size.
#[derive(Debug)]
pub(super) struct Buffers {
    state: Mutex<State>,
    given_back: Condvar,
    /// Number of the first one.
    first: usize,
    most: usize,
    bytes: usize,
}

impl Buffers {
    /// At most so many, of so many bytes each, numbered from `first` on.
    pub(super) fn new(first: usize, most: usize, bytes: usize) -> Arc<Self> {
        let state = Mutex::new(State { free: Vec::new(), made: 0, waiting: 0, over: false });
        Arc::new(Self { state, given_back: Condvar::new(), first, most, bytes })
    }

    /// Whether what is so long fits into one of these.
    pub(super) fn fits(&self, length: usize) -> bool {
        self.most > 0 && length <= self.bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer, which is waited for if it may be. When it is over there is always one, without memory.
    pub(super) fn take(self: &Arc<Self>, may_wait: bool) -> Option<ReadBuffer> {
        let mut state = self.lock();
        loop {
            if state.over {
                return Some(ReadBuffer::default());
            }
            let home = Some(Arc::clone(self));
            if let Some(Free { memory, number, is_registered }) = state.free.pop() {
                return Some(ReadBuffer { memory, number, is_registered, home });
            }
            if state.made < self.most {
                let number = self.first + state.made;
                state.made += 1;
                drop(state);
                let memory = Memory::zeroed(self.bytes);
                return Some(ReadBuffer { memory, number, is_registered: false, home });
            }
            if !may_wait {
                return None;
            }
            state.waiting += 1;
            state = self.given_back.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }

    /// Nobody waits any more.
    pub(super) fn end(&self) {
        self.lock().over = true;
        self.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_came_back_last_goes_out_first_and_no_more_are_made_than_may_be() {
        let buffers = Buffers::new(7, 3, 8192);
        let taken: Vec<_> = std::iter::from_fn(|| buffers.take(false)).collect();
        assert_eq!(taken.iter().map(ReadBuffer::number).collect::<Vec<_>>(), [7, 8, 9]);
        taken.into_iter().for_each(drop);
        let mut last = buffers.take(false).unwrap();
        assert_eq!((last.number(), last.get(10).len(), last.all().len()), (9, 10, 8192));
        drop(last);
        assert_eq!(buffers.take(false).unwrap().number(), 9);
        assert!(buffers.fits(8192) && !buffers.fits(8193) && !Buffers::new(0, 0, 8192).fits(1));
    }

    #[test]
    fn whoever_waits_gets_one_that_comes_back() {
        let buffers = Buffers::new(0, 1, 4096);
        let mut held = buffers.take(true);
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let buffers = Arc::clone(&buffers);
                std::thread::spawn(move || !buffers.take(true).unwrap().is_none())
            })
            .collect();
        while buffers.lock().waiting < 3 {
            std::thread::yield_now();
        }
        held.take();
        assert!(waiting.into_iter().all(|thread| thread.join().unwrap()));
        assert_eq!(buffers.lock().waiting, 0);
    }

    #[test]
    fn who_waits_is_told_that_it_is_over() {
        let buffers = Buffers::new(0, 1, 4096);
        let held = buffers.take(true).unwrap();
        let waiting = std::thread::spawn({
            let buffers = Arc::clone(&buffers);
            move || buffers.take(true).unwrap().is_none()
        });
        buffers.end();
        assert!(waiting.join().unwrap() && !held.is_none());
    }
}
