//! Buffers that go round: read into by one thread, written out by another, and given back by being dropped.

use std::ops::Deref;

use crossbeam_channel::{Receiver, Sender, bounded};

/// A fixed number of buffers; so many times the longest that is asked for is the most memory they take together.
#[derive(Clone, Debug)]
pub struct Pool {
    give: Sender<Vec<u8>>,
    take: Receiver<Vec<u8>>,
}

/// One of them. Dropped, it goes back.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    /// Of these: what is used now. The rest is kept as it is, so that a longer record need not have it zeroed again.
    length: usize,
    home: Sender<Vec<u8>>,
}

impl Pool {
    /// With so many buffers, each taking memory only when it is first used.
    pub fn new(buffers: usize) -> Self {
        let (give, take) = bounded(buffers);
        for _ in 0..buffers {
            let _ = give.try_send(Vec::new());
        }
        Self { give, take }
    }

    /// Waits for a buffer, and gives it this length; its content is whatever it was.
    pub fn take(&self, length: usize) -> Buffer {
        // The pool holds a sender itself, so there is no other way for this to end than with a buffer.
        let mut bytes = self.take.recv().unwrap_or_default();
        if bytes.len() < length {
            bytes.resize(length, 0);
        }
        Buffer { bytes, length, home: self.give.clone() }
    }
}

impl Buffer {
    /// To be written into.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.length).unwrap_or_default()
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // There is room for every buffer that there is.
        let _ = self.home.try_send(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
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
}
