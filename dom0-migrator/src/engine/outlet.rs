//! The thread that writes a filter's output, behind the filter's own.
//!
//! What the filter sends is written in the order in which it was sent, so the filter's order stays the order of truth. The channel is
//! bounded in parcels, and what they hold in bytes by the pools that it comes from: so the wire has something to send while
//! the filter thinks, and the filter waits when the wire is that far behind.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::descriptor::Output;
use super::error::EngineError;
use super::pool::Buffer;
use super::xen_stream::{PAGE, ZERO_PAGE};

/// Parcels on their way at most.
const BEHIND: usize = 64;

/// Where a parcel's pages lie.
pub trait Body: Send + 'static {
    /// All of its bytes.
    fn bytes(&self) -> &[u8];
}

/// A piece of what is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of the parcel's body.
    Body(Range<usize>),
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
    /// Bytes that will be written.
    pub fn length(&self) -> u64 {
        let of_one = |piece: &Piece| match piece {
            Piece::Body(range) => range.len(),
            Piece::Zeros(pages) => pages * PAGE,
        };
        (self.head.len() + self.pieces.iter().map(of_one).sum::<usize>()) as u64
    }

    /// Bytes alone.
    pub fn bytes(head: Vec<u8>) -> Self {
        Self { head, pieces: Vec::new(), body: None, then: None }
    }

    /// Bytes, and all of a body.
    pub fn whole(head: Vec<u8>, body: B) -> Self {
        let pieces = vec![Piece::Body(0..body.bytes().len())];
        Self { head, pieces, body: Some(body), then: None }
    }
}

/// The writing thread.
#[derive(Debug)]
pub struct Outlet<B, T> {
    parcels: Sender<Parcel<B, T>>,
    written: Arc<AtomicU64>,
    abandoned: Arc<AtomicBool>,
    /// Disconnected when the thread has ended.
    pub gone: Receiver<()>,
    thread: JoinHandle<Result<(), EngineError>>,
}

impl<B: Body, T: Send + 'static> Outlet<B, T> {
    /// Starts it; `say` is called, on the writing thread, with what a parcel has to say.
    pub fn start(name: &str, output: Output, say: impl FnMut(T) + Send + 'static) -> std::io::Result<Self> {
        let (parcels, receiver) = bounded(BEHIND);
        let (alive, gone) = bounded::<()>(0);
        let written = Arc::new(AtomicU64::new(0));
        let abandoned = Arc::new(AtomicBool::new(false));
        let writer = Writer {
            parcels: receiver,
            output,
            written: Arc::clone(&written),
            abandoned: Arc::clone(&abandoned),
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let result = writer.run(say);
            drop(alive);
            result
        })?;
        Ok(Self { parcels, written, abandoned, gone, thread })
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    /// Sends a parcel off; waits while too many are on their way.
    ///
    /// # Errors
    /// [`EngineError::Gone`] when the thread has ended; [`end`](Self::end) tells why.
    pub fn send(&self, parcel: Parcel<B, T>) -> Result<(), EngineError> {
        self.parcels.send(parcel).map_err(|_| EngineError::Gone)
    }

    /// Ends it once all is written, or, when the filter has `failed`, after what it is writing. The output is closed then.
    ///
    /// # Errors
    /// What ended the writing.
    pub fn end(self, failed: bool) -> Result<(), EngineError> {
        self.abandoned.store(failed, Ordering::Relaxed);
        drop(self.parcels);
        self.thread.join().map_err(|_| EngineError::Panicked)?
    }
}

struct Writer<B, T> {
    parcels: Receiver<Parcel<B, T>>,
    output: Output,
    written: Arc<AtomicU64>,
    abandoned: Arc<AtomicBool>,
}

impl<B: Body, T> Writer<B, T> {
    fn run(mut self, mut say: impl FnMut(T)) -> Result<(), EngineError> {
        while let Ok(parcel) = self.parcels.recv() {
            if self.abandoned.load(Ordering::Relaxed) {
                return Ok(());
            }
            let body = parcel.body.as_ref().map_or(&[][..], Body::bytes);
            let mut slices = Vec::with_capacity(1 + parcel.pieces.len());
            slices.push(IoSlice::new(&parcel.head));
            for piece in &parcel.pieces {
                match piece {
                    // The filter takes ranges from the very bytes that they are ranges of.
                    Piece::Body(range) => {
                        slices.push(IoSlice::new(body.get(range.clone()).unwrap_or_default()));
                    }
                    Piece::Zeros(pages) => {
                        slices.extend((0..*pages).map(|_| IoSlice::new(&ZERO_PAGE[..PAGE])));
                    }
                }
            }
            self.output.write_slices(&mut slices)?;
            self.written.store(self.output.bytes(), Ordering::Release);
            if let Some(then) = parcel.then {
                say(then);
            }
        }
        Ok(())
    }
}

/// Adds a range to the pieces, joined to the last one where it continues it.
pub fn add_range(pieces: &mut Vec<Piece>, range: Range<usize>) {
    match pieces.last_mut() {
        Some(Piece::Body(last)) if last.end == range.start => last.end = range.end,
        _ => pieces.push(Piece::Body(range)),
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
    fn bytes(&self) -> &[u8] {
        self
    }
}
