//! Requests of dom0 that wait for the probe.

use enlightenment::device::Request;
use enlightenment::xenstore::{self, RequestKind};

/// Requests that wait at most; the oldest is dropped for a newer one, since only the newest matter to dom0.
const MOST: usize = 8;

/// A queue of requests.
#[derive(Debug)]
pub struct Requests {
    waiting: [Request; MOST],
    count: usize,
    forgotten: u64,
}

impl Requests {
    /// An empty queue.
    pub const fn new() -> Self {
        const NONE: Request = Request { sequence: 0, kind: 0, reserved: 0 };
        Self { waiting: [NONE; MOST], count: 0, forgotten: 0 }
    }

    /// Takes in the value of the xenstore node, and returns what it asks if that is new. A watch fires more often than the value
    /// changes, so one that equals the last that waits is not new.
    pub fn offer(&mut self, value: &[u8]) -> Option<RequestKind> {
        let (sequence, kind) = xenstore::parse_request(value)?;
        let request = Request { sequence, kind: kind as u32, reserved: 0 };
        if self.waiting().last() == Some(&request) {
            return None;
        }
        if self.count == MOST {
            self.remove_first();
            self.forgotten += 1;
        }
        if let Some(place) = self.waiting.get_mut(self.count) {
            *place = request;
            self.count += 1;
        }
        Some(kind)
    }

    /// Requests that made room for newer ones.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// The oldest request, if there is one.
    pub fn first(&self) -> Option<Request> {
        self.waiting().first().copied()
    }

    /// Forgets the oldest request.
    pub fn remove_first(&mut self) {
        self.waiting.copy_within(1.., 0);
        self.count = self.count.saturating_sub(1);
    }

    fn waiting(&self) -> &[Request] {
        self.waiting.get(..self.count).unwrap_or(&[])
    }
}

impl Default for Requests {
    fn default() -> Self {
        Self::new()
    }
}
