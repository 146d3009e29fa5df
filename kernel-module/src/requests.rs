//! Requests of dom0 that wait for the probe.

use enlightenment::device::Request;
use enlightenment::xenstore;

/// Requests that wait at most; the oldest is dropped for a newer one, since only the newest matter to dom0.
const MOST: usize = 8;

/// A queue of requests.
#[derive(Debug)]
pub struct Requests {
    waiting: [Request; MOST],
    count: usize,
}

impl Requests {
    /// An empty queue.
    pub const fn new() -> Self {
        const NONE: Request = Request { sequence: 0, kind: 0, reserved: 0 };
        Self { waiting: [NONE; MOST], count: 0 }
    }

    /// Takes in the value of the xenstore node; whether there is a new request in it. A watch fires more often than the value
    /// changes, so one that equals the last that waits is not new.
    pub fn offer(&mut self, value: &[u8]) -> bool {
        let Some((sequence, kind)) = xenstore::parse_request(value) else { return false };
        let request = Request { sequence, kind: kind as u32, reserved: 0 };
        if self.waiting().last() == Some(&request) {
            return false;
        }
        if self.count == MOST {
            self.remove_first();
        }
        if let Some(place) = self.waiting.get_mut(self.count) {
            *place = request;
            self.count += 1;
        }
        true
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
