//! The memory that is read into: so many buffers, each taken from the system when it is first needed.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::super::memory::Memory;

/// A buffer. Its memory is aligned as direct I/O asks for.
#[derive(Debug, Default)]
pub(super) struct ReadBuffer {
    memory: Memory,
    /// Its number, none twice.
    number: usize,
    /// Whether the ring knows its memory by that number.
    pub(super) is_registered: bool,
}

impl ReadBuffer {
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

#[derive(Debug)]
struct State {
    /// The last one came back last, and goes out first: its memory is there, and warm.
    free: Vec<ReadBuffer>,
    /// Buffers made so far.
    made: usize,
    over: bool,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Buffers {
    state: Mutex<State>,
    given_back: Condvar,
    most: usize,
    /// Bytes of each.
    bytes: usize,
}

impl Buffers {
    /// At most so many, of so many bytes each.
    pub(super) fn new(most: usize, bytes: usize) -> Self {
        let state = Mutex::new(State { free: Vec::new(), made: 0, over: false });
        Self { state, given_back: Condvar::new(), most, bytes }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer, which is waited for if it may be. When it is over there is always one, without memory.
    pub(super) fn take(&self, may_wait: bool) -> Option<ReadBuffer> {
        let mut state = self.lock();
        loop {
            if let Some(buffer) = state.free.pop() {
                return Some(buffer);
            }
            if state.made < self.most {
                let number = state.made;
                state.made += 1;
                drop(state);
                return Some(ReadBuffer { memory: Memory::zeroed(self.bytes), number, is_registered: false });
            }
            if state.over {
                return Some(ReadBuffer::default());
            }
            if !may_wait {
                return None;
            }
            state = self.given_back.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes one back.
    pub(super) fn give_back(&self, buffer: ReadBuffer) {
        if !buffer.memory.is_empty() {
            self.lock().free.push(buffer);
            self.given_back.notify_one();
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
        let buffers = Buffers::new(3, 8192);
        let taken: Vec<_> = std::iter::from_fn(|| buffers.take(false)).collect();
        assert_eq!(taken.iter().map(ReadBuffer::number).collect::<Vec<_>>(), [0, 1, 2]);
        for buffer in taken {
            buffers.give_back(buffer);
        }
        let mut last = buffers.take(false).unwrap();
        assert_eq!((last.number(), last.get(10).len(), last.all().len()), (2, 10, 8192));
        buffers.give_back(last);
        assert_eq!(buffers.take(false).unwrap().number(), 2);
    }

    #[test]
    fn who_waits_is_told_that_it_is_over() {
        let buffers = std::sync::Arc::new(Buffers::new(1, 4096));
        let held = buffers.take(true).unwrap();
        let waiting = std::thread::spawn({
            let buffers = std::sync::Arc::clone(&buffers);
            move || buffers.take(true).unwrap().bytes().len()
        });
        buffers.end();
        assert_eq!(waiting.join().unwrap(), 0);
        drop(held);
    }
}
