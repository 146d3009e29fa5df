//! Buffers that go round: read into by one thread, written out by another, and given back by being dropped.
//!
//! So many are out at once at most, so whoever fills them waits for those who empty them. What lies in a buffer can be kept beyond that
//! ([`Buffer::keep`]): its memory comes back when the last one who keeps it lets go, but it no longer counts as out, so that
//! the next can be filled. What is kept has a budget of its own, which is the keeper's business.
//!
//! The one that came back last is filled next: its memory is likely to be in the processor's caches still.

use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::memory::Memory;

/// Buffers, and how many of them may be out at once.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    given_back: Condvar,
    /// Buffers out at once.
    most: usize,
}

#[derive(Debug, Default)]
struct State {
    /// The last one came back last.
    free: Vec<Memory>,
    out: usize,
    /// Buffers' memory that there is: out, kept, or free.
    made: usize,
    /// The longest buffer so far: all that are made after it are as long.
    longest: usize,
    /// Bytes of memory that may be kept or free beside those that may be out.
    beside: u64,
}

impl State {
    /// Free buffers that are too many. What is kept now is likely to be free soon, and to be wanted then, so both are counted together:
    /// memory that is let go of in between would be taken from the system, and filled with zeros there, again.
    fn too_many(&self, most: usize) -> usize {
        let beside = usize::try_from(self.beside / self.longest.max(1) as u64).unwrap_or(usize::MAX);
        let taken = self.made.saturating_sub(self.free.len());
        self.free.len().saturating_sub(most.saturating_add(beside).saturating_sub(taken))
    }

    /// Takes so many out that have been free for longest.
    fn let_go(&mut self, count: usize) -> Vec<Memory> {
        self.made -= count;
        self.free.drain(..count).collect()
    }

    /// Takes memory back; what is too much is the caller's, to be let go of without the lock.
    fn put(&mut self, memory: Memory, most: usize) -> Vec<Memory> {
        self.free.push(memory);
        let too_many = self.too_many(most);
        self.let_go(too_many)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of them. Dropped, it goes back.
#[derive(Debug)]
pub struct Buffer {
    /// Always there, but while it is being dropped.
    content: Option<Arc<Content>>,
    home: Arc<Shared>,
}

/// What lies in a buffer, kept. It never changes, and nothing else is read into its memory, before the last one who keeps it has dropped it.
#[derive(Clone, Debug)]
pub struct Kept(Arc<Content>);

#[derive(Debug)]
struct Content {
    memory: Memory,
    /// Of it: what is used now. The rest is kept as it is, so that a longer record need not have it taken from the system again.
    length: usize,
    home: Arc<Shared>,
}

impl Pool {
    /// With so many buffers out at once, each taking memory only when it is first used.
    pub fn new(most: usize) -> Self {
        Self::with_length(most, 0)
    }

    /// The same with room for so many bytes in each from the beginning.
    pub fn with_length(most: usize, longest: usize) -> Self {
        let state = Mutex::new(State { longest, ..State::default() });
        Self(Arc::new(Shared { state, given_back: Condvar::new(), most: most.max(1) }))
    }

    /// Waits until a buffer may go out, and gives it this length; its content is whatever it was.
    pub fn take(&self, length: usize) -> Buffer {
        let home = Arc::clone(&self.0);
        let all_out = |state: &mut State| state.out >= home.most;
        let mut state =
            home.given_back.wait_while(home.lock(), all_out).unwrap_or_else(PoisonError::into_inner);
        state.out += 1;
        state.longest = state.longest.max(length);
        let (memory, longest) = (state.free.pop(), state.longest);
        state.made += usize::from(memory.is_none());
        // What is longer now has fewer free ones for it.
        let too_many = state.too_many(home.most);
        let excess = state.let_go(too_many);
        drop(state);
        drop(excess);
        let memory = memory.filter(|memory| memory.len() >= length);
        let memory = memory.unwrap_or_else(|| Memory::zeroed(longest.max(1)));
        let content = Arc::new(Content { memory, length, home: Arc::clone(&home) });
        Buffer { content: Some(content), home }
    }

    /// Lets it have so many bytes of memory, kept or free for later, beside the buffers that may be out; at first none. What is kept stays, whatever is
    /// said here.
    pub fn hold_beside(&self, bytes: u64) {
        let mut state = self.0.lock();
        state.beside = bytes;
        let too_many = state.too_many(self.0.most);
        let excess = state.let_go(too_many);
        drop(state);
        drop(excess);
    }

    /// Lets go of the memory that nobody has. What is wanted later is taken from the system again.
    pub fn let_go_of_free(&self) {
        let mut state = self.0.lock();
        let count = state.free.len();
        let free = state.let_go(count);
        drop(state);
        drop(free);
    }

    /// Bytes of the buffers that nobody has.
    #[cfg(test)]
    pub fn free_bytes(&self) -> usize {
        self.0.lock().free.iter().map(|memory| memory.len()).sum()
    }
}

impl Buffer {
    /// To be written into, unless it is kept: then there is nothing to write into.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let content = self.content.as_mut().and_then(Arc::get_mut);
        content.and_then(|content| content.memory.get_mut(..content.length)).unwrap_or_default()
    }

    /// Keeps what lies in it.
    pub fn keep(&self) -> Option<Kept> {
        self.content.clone().map(Kept)
    }
}

impl Kept {
    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        self.0.memory.len()
    }
}

impl Deref for Kept {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.memory.get(..self.0.length).unwrap_or_default()
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let content = self.content.as_deref();
        content.and_then(|content| content.memory.get(..content.length)).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Unless somebody keeps it.
        let memory = self.content.take().and_then(Arc::into_inner).map(Content::into_memory);
        let mut state = self.home.lock();
        state.out -= 1;
        let excess = memory.map(|memory| state.put(memory, self.home.most));
        drop(state);
        self.home.given_back.notify_one();
        drop(excess);
    }
}

impl Content {
    fn into_memory(mut self) -> Memory {
        std::mem::take(&mut self.memory)
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        if !memory.is_empty() {
            let excess = self.home.lock().put(memory, self.home.most);
            drop(excess);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_buffer_that_is_dropped_is_there_again() {
        let pool = Pool::new(1);
        for length in [5, 3, 8] {
            assert_eq!(pool.take(length).len(), length);
        }
        let held = pool.take(1);
        let waiting = std::thread::spawn({
            let pool = pool.clone();
            move || pool.take(2).len()
        });
        drop(held);
        assert_eq!(waiting.join().unwrap(), 2);
    }

    #[test]
    fn what_is_kept_holds_nobody_up_and_cannot_be_written_into() {
        let pool = Pool::new(1);
        let mut buffer = pool.take(3);
        buffer.bytes_mut().copy_from_slice(b"one");
        let kept = buffer.keep().unwrap();
        assert!(buffer.bytes_mut().is_empty());
        drop(buffer);
        // The only one that may be out is not out any more.
        pool.take(3).bytes_mut().copy_from_slice(b"two");
        assert_eq!(&*kept, b"one");
    }

    /// One step of those who use a pool.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Take(usize),
        Keep(usize),
        Drop(usize),
        LetGo(usize),
        HoldBeside(u64),
        LetGoOfFree,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (1_usize..40).prop_map(Step::Take),
            4 => any::<usize>().prop_map(Step::Keep),
            4 => any::<usize>().prop_map(Step::Drop),
            3 => any::<usize>().prop_map(Step::LetGo),
            1 => (0_u64..400).prop_map(Step::HoldBeside),
            1 => Just(Step::LetGoOfFree),
        ]
    }

    proptest! {
        /// Memory that is kept is never filled again, and what nobody has is no more than it may be.
        #[test]
        fn what_is_kept_stays_as_it_was(steps in proptest::collection::vec(step(), 0..200)) {
            const MOST: usize = 3;
            let pool = Pool::new(MOST);
            let mut out: Vec<(u8, Buffer)> = Vec::new();
            let mut kept: Vec<(u8, Kept)> = Vec::new();
            let (mut mark, mut beside, mut longest) = (0_u8, 0, 0);
            for step in steps {
                match step {
                    Step::Take(length) if out.len() < MOST => {
                        mark = mark.wrapping_add(1);
                        longest = longest.max(length);
                        let mut buffer = pool.take(length);
                        buffer.bytes_mut().fill(mark);
                        out.push((mark, buffer));
                    }
                    Step::Keep(which) if !out.is_empty() => {
                        let (mark, buffer) = &out[which % out.len()];
                        kept.push((*mark, buffer.keep().unwrap()));
                    }
                    Step::Drop(which) if !out.is_empty() => drop(out.swap_remove(which % out.len())),
                    Step::LetGo(which) if !kept.is_empty() => drop(kept.swap_remove(which % kept.len())),
                    Step::HoldBeside(bytes) => {
                        pool.hold_beside(bytes);
                        beside = bytes as usize;
                    }
                    Step::LetGoOfFree => {
                        pool.let_go_of_free();
                        prop_assert_eq!(pool.free_bytes(), 0);
                    }
                    _ => {}
                }
                let contents = out.iter().map(|(mark, buffer)| (mark, &**buffer));
                for (mark, bytes) in contents.chain(kept.iter().map(|(mark, kept)| (mark, &**kept))) {
                    prop_assert!(!bytes.is_empty() && bytes.iter().all(|byte| byte == mark));
                }
                // Memory of those that are out and kept is counted once.
                let taken = out.iter().map(|(_, buffer)| buffer.as_ptr()).chain(kept.iter().map(|(_, kept)| kept.as_ptr()));
                let taken = taken.collect::<std::collections::HashSet<_>>().len();
                prop_assert!(pool.free_bytes() <= (MOST * longest + beside).saturating_sub(taken * longest));
            }
        }
    }
}
