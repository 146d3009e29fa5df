//! A connection that a test can hold up and cut.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    HeldUp,
    Cut,
}

/// Two ends with this test between them.
#[derive(Clone)]
pub struct Link {
    state: Arc<(Mutex<State>, Condvar)>,
    inner: Arc<[UnixStream; 2]>,
}

impl Link {
    /// A connection, with its two ends.
    pub fn new() -> (Self, UnixStream, UnixStream) {
        let [near, far] = std::array::from_fn(|_| UnixStream::pair().unwrap());
        let link = Self {
            state: Arc::new((Mutex::new(State::Open), Condvar::new())),
            inner: Arc::new([near.1, far.1]),
        };
        for (from, to) in [(0, 1), (1, 0)] {
            let link = link.clone();
            std::thread::spawn(move || link.carry(from, to));
        }
        (link, near.0, far.0)
    }

    fn carry(&self, from: usize, to: usize) {
        let (mut from, mut to) = (&self.inner[from], &self.inner[to]);
        let mut bytes = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut bytes) {
            if !self.passes() || to.write_all(&bytes[..length]).is_err() {
                // Whoever writes on is told that nobody reads any more.
                let _ = from.shutdown(Shutdown::Both);
                break;
            }
        }
        if self.passes() {
            let _ = to.shutdown(Shutdown::Write);
        }
    }

    /// Waits as long as it is held up. False: it is cut.
    fn passes(&self) -> bool {
        let (state, changed) = &*self.state;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        while *state == State::HeldUp {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        *state == State::Open
    }

    fn set(&self, to: State) {
        let (state, changed) = &*self.state;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state != State::Cut {
            *state = to;
        }
        changed.notify_all();
    }

    /// Nothing passes until it goes on.
    pub fn hold_up(&self) {
        self.set(State::HeldUp);
    }

    /// What was held up passes, and all that follows.
    pub fn go_on(&self) {
        self.set(State::Open);
    }

    /// It ends for both sides, with what is on the way.
    pub fn cut(&self) {
        self.set(State::Cut);
        self.inner.iter().for_each(|end| {
            let _ = end.shutdown(Shutdown::Both);
        });
    }
}
