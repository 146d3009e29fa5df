//! The thread that writes a filter's output, behind the filter's own.
//!
//! What the filter sends is written in the order in which it was sent, so the filter's order stays the order of truth; but for parcels that
//! are sent [first](Outlet::send_first): these overtake all that was sent since the last [fence](Outlet::fence), and no more. So the wire
//! has something to send while the filter thinks, what is short and urgent does not wait behind it, and the filter waits when
//! the wire is too far behind: the parcels are bounded in number here, and in bytes by whoever sends them.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::descriptor::Output;
use super::error::EngineError;
use super::pool::Buffer;
use super::waiting::{Gone, Length, Waiting};
use super::xen_stream::{PAGE, ZERO_PAGE};

/// Where a parcel's pages lie: in one part, or in several.
pub trait Body: Send + 'static {
    /// All bytes of a part; the first has the number 0. None of one that is not there.
    fn part(&self, number: usize) -> &[u8];
}

/// A piece of what is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of a part of the parcel's body.
    Body {
        /// The part.
        part: usize,
        /// Which of its bytes.
        range: Range<usize>,
    },
    /// So many pages of zeros.
    Zeros(usize),
}

/// Something to be written as a whole.
#[derive(Debug)]
pub struct Parcel<B, T> {
    /// The bytes that come first.
    pub head: Vec<u8>,
    /// What follows them.
    pub pieces: Vec<Piece>,
    /// Where the pieces lie; let go of once they are written.
    pub body: Option<B>,
    /// What is to be said once it is written.
    pub then: Option<T>,
}

impl<B: Body, T> Parcel<B, T> {
    /// Bytes alone.
    pub fn bytes(head: Vec<u8>) -> Self {
        Self { head, pieces: Vec::new(), body: None, then: None }
    }

    /// Bytes, and all of a body that has one part.
    pub fn whole(head: Vec<u8>, body: B) -> Self {
        let pieces = vec![Piece::Body { part: 0, range: 0..body.part(0).len() }];
        Self { head, pieces, body: Some(body), then: None }
    }
}

impl<B: Body, T> Length for Parcel<B, T> {
    fn length(&self) -> u64 {
        let of_one = |piece: &Piece| match piece {
            Piece::Body { range, .. } => range.len(),
            Piece::Zeros(pages) => pages * PAGE,
        };
        (self.head.len() + self.pieces.iter().map(of_one).sum::<usize>()) as u64
    }
}

/// What the two threads share.
#[derive(Debug)]
struct Shared<P> {
    waiting: Waiting<P>,
    written: AtomicU64,
    abandoned: AtomicBool,
}

/// The writing thread.
#[derive(Debug)]
pub struct Outlet<B, T> {
    shared: Arc<Shared<Parcel<B, T>>>,
    /// Has something in it when the backlog has become less.
    pub progress: Receiver<()>,
    /// Disconnected when the thread has ended.
    pub gone: Receiver<()>,
    thread: JoinHandle<Result<(), EngineError>>,
}

impl<B: Body, T: Send + 'static> Outlet<B, T> {
    /// Starts it, with so many parcels on their way at most; `say` is called, on the writing thread, with what a parcel has to say.
    pub fn start(
        name: &str,
        behind: usize,
        output: Output,
        say: impl FnMut(T) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (alive, gone) = bounded::<()>(0);
        let (tick, progress) = bounded(1);
        let shared = Arc::new(Shared {
            waiting: Waiting::new(behind),
            written: AtomicU64::new(0),
            abandoned: AtomicBool::new(false),
        });
        let writer = Writer { shared: Arc::clone(&shared), output, tick };
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let shared = Arc::clone(&writer.shared);
            // However it ends: whoever waits for room is told.
            let _ending = Ending(&shared, alive);
            writer.run(say)
        })?;
        Ok(Self { shared, progress, gone, thread })
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Acquire)
    }

    /// Bytes that were sent and are not written yet.
    pub fn backlog(&self) -> u64 {
        self.shared.waiting.backlog()
    }

    /// Whether a parcel can be sent without waiting.
    pub fn has_room(&self) -> bool {
        self.shared.waiting.has_room()
    }

    /// What is sent from here on is written after all that was sent before.
    pub fn fence(&self) {
        self.shared.waiting.fence();
    }

    /// Sends a parcel off; waits while too many are on their way.
    ///
    /// # Errors
    /// [`EngineError::Gone`] when the thread has ended; [`end`](Self::end) tells why.
    pub fn send(&self, parcel: Parcel<B, T>) -> Result<(), EngineError> {
        self.shared.waiting.put(parcel, false).map_err(|Gone| EngineError::Gone)
    }

    /// The same for one that overtakes whatever was sent since the last fence, but for those that were sent first too.
    ///
    /// # Errors
    /// As of [`send`](Self::send).
    pub fn send_first(&self, parcel: Parcel<B, T>) -> Result<(), EngineError> {
        self.shared.waiting.put(parcel, true).map_err(|Gone| EngineError::Gone)
    }

    /// Lets `revise` change what waits behind the last fence and was not sent first, one parcel after the other, the last one first. The bytes by which
    /// they became shorter.
    pub fn revise(&self, revise: impl FnMut(&mut Parcel<B, T>)) -> u64 {
        self.shared.waiting.revise(revise)
    }

    /// Ends it once all is written, or, when the filter has `failed`, after what it is writing. The output is closed then.
    ///
    /// # Errors
    /// What ended the writing.
    pub fn end(self, failed: bool) -> Result<(), EngineError> {
        self.shared.abandoned.store(failed, Ordering::Relaxed);
        self.shared.waiting.end();
        self.thread.join().map_err(|_| EngineError::Panicked)?
    }
}

/// Says, when it is dropped, that nobody writes any more, and lets go of what waits.
struct Ending<'a, P: Length>(
    &'a Shared<P>,
    #[expect(dead_code, reason = "dropping it is what it is for")] Sender<()>,
);

impl<P: Length> Drop for Ending<'_, P> {
    fn drop(&mut self) {
        self.0.waiting.go();
    }
}

struct Writer<B, T> {
    shared: Arc<Shared<Parcel<B, T>>>,
    output: Output,
    tick: Sender<()>,
}

impl<B: Body, T> Writer<B, T> {
    fn run(mut self, mut say: impl FnMut(T)) -> Result<(), EngineError> {
        while let Some(parcel) = self.shared.waiting.take() {
            if self.shared.abandoned.load(Ordering::Relaxed) {
                return Ok(());
            }
            let length = parcel.length();
            let part = |number| parcel.body.as_ref().map_or(&[][..], |body| body.part(number));
            let mut slices = Vec::with_capacity(1 + parcel.pieces.len());
            slices.push(IoSlice::new(&parcel.head));
            for piece in &parcel.pieces {
                match piece {
                    // The filter takes ranges from the very bytes that they are ranges of.
                    Piece::Body { part: number, range } => {
                        slices.push(IoSlice::new(part(*number).get(range.clone()).unwrap_or_default()));
                    }
                    Piece::Zeros(pages) => {
                        slices.extend((0..*pages).map(|_| IoSlice::new(&ZERO_PAGE[..PAGE])));
                    }
                }
            }
            self.output.write_slices(&mut slices)?;
            self.shared.written.store(self.output.bytes(), Ordering::Release);
            let then = parcel.then;
            drop(parcel.body);
            self.shared.waiting.written(length);
            let _ = self.tick.try_send(());
            if let Some(then) = then {
                say(then);
            }
        }
        Ok(())
    }
}

/// Adds a range of a part to the pieces, joined to the last one where it continues it.
pub fn add_range(pieces: &mut Vec<Piece>, part: usize, range: Range<usize>) {
    match pieces.last_mut() {
        Some(Piece::Body { part: of, range: last }) if *of == part && last.end == range.start => {
            last.end = range.end;
        }
        _ => pieces.push(Piece::Body { part, range }),
    }
}

/// Adds a page of zeros to the pieces.
pub fn add_zeros(pieces: &mut Vec<Piece>) {
    match pieces.last_mut() {
        Some(Piece::Zeros(pages)) => *pages += 1,
        _ => pieces.push(Piece::Zeros(1)),
    }
}

impl Body for Buffer {
    fn part(&self, number: usize) -> &[u8] {
        if number == 0 { self } else { &[] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_room_is_told_when_nobody_writes_any_more() {
        let (reader, writer) = std::io::pipe().unwrap();
        let outlet: Outlet<Buffer, ()> =
            Outlet::start("outlet", 1, Output::new(writer.into()), drop).unwrap();
        drop(reader);
        let sent = (0..1000).find_map(|_| outlet.send(Parcel::bytes(vec![1; 4096])).err());
        assert!(matches!(sent, Some(EngineError::Gone)));
        assert!(outlet.end(false).is_err());
    }
}
