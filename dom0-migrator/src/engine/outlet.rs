//! The thread that writes a filter's output, behind the filter's own.
//!
//! What the filter sends is written in the order in which it was sent, so the filter's order stays the order of truth; but for parcels that
//! are sent [first](Outlet::send_first): these overtake all that was sent since the last [fence](Outlet::fence), and no more. So the wire
//! has something to send while the filter thinks, what is short and urgent does not wait behind it, and the filter waits when
//! the wire is too far behind: the parcels are bounded in number here, and in bytes by whoever sends them.
//!
//! An output that lends does not copy what it writes, so a body is let go of only when the other side has read it.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::descriptor::Output;
use super::error::EngineError;
use super::pool::Buffer;
use super::waiting::{Gone, Length, Taken, Waiting};
use super::xen_stream::{PAGE, ZERO_PAGE};

/// How often it is looked, while nothing is to be written, whether what is lent was read.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Less is copied: it is hardly worth it, and whatever a pipe holds (1 MiB), few bodies are lent at once.
const LENT_AT_LEAST: u64 = 64 << 10;

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
        let writer = Writer { shared: Arc::clone(&shared), output, lent: VecDeque::new(), tick };
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
    /// What the other side may still read: where each ends in all that was written.
    lent: VecDeque<(u64, B)>,
    tick: Sender<()>,
}

impl<B: Body, T> Writer<B, T> {
    fn run(mut self, mut say: impl FnMut(T)) -> Result<(), EngineError> {
        while let Some(parcel) = self.next() {
            if self.shared.abandoned.load(Ordering::Relaxed) {
                return Ok(());
            }
            let length = parcel.length();
            let part = |number| parcel.body.as_ref().map_or(&[][..], |body| body.part(number));
            let lends = self.output.lends() && length >= LENT_AT_LEAST;
            let mut slices = Vec::with_capacity(1 + parcel.pieces.len());
            slices.push(IoSlice::new(&parcel.head));
            if lends {
                self.output.write_slices(&mut slices)?;
                slices.clear();
            }
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
            if lends {
                self.output.lend_slices(&mut slices)?;
            } else {
                self.output.write_slices(&mut slices)?;
            }
            self.shared.written.store(self.output.bytes(), Ordering::Release);
            let Parcel { body, then, .. } = parcel;
            if lends {
                self.lent.extend(body.map(|body| (self.output.bytes(), body)));
            } else {
                drop(body);
            }
            self.shared.waiting.written(length);
            let _ = self.tick.try_send(());
            if let Some(then) = then {
                say(then);
            }
        }
        self.wait_until_read();
        Ok(())
    }

    /// Waits for the next parcel, and lets go of what was read meanwhile. None when there will be no more.
    fn next(&mut self) -> Option<Parcel<B, T>> {
        loop {
            self.let_go_of_read();
            let patience = (!self.lent.is_empty()).then_some(LOOK_AGAIN);
            match self.shared.waiting.take(patience) {
                Taken::One(parcel) => return Some(parcel),
                Taken::Nothing => {}
                Taken::Over => return None,
            }
        }
    }

    fn let_go_of_read(&mut self) {
        if !self.lent.is_empty() {
            let read = self.output.read();
            while self.lent.front().is_some_and(|&(end, _)| end <= read) {
                self.lent.pop_front();
            }
        }
    }

    /// All is written. What is lent stays until it was read, or nobody reads any more; or the filter has failed: then the stream has no end, and what came
    /// before is of no use to anybody.
    fn wait_until_read(&mut self) {
        while !self.shared.abandoned.load(Ordering::Relaxed) {
            self.let_go_of_read();
            if self.lent.is_empty() || self.output.wait_for_its_end(LOOK_AGAIN) {
                break;
            }
        }
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
    use std::io::Read;

    use super::super::pool::Pool;
    use super::*;

    const LONG: usize = 2 * LENT_AT_LEAST as usize;

    fn lending() -> (std::io::PipeReader, Outlet<Buffer, ()>) {
        let (reader, writer) = std::io::pipe().unwrap();
        (reader, Outlet::start("outlet", 4, Output::lending(writer.into()), drop).unwrap())
    }

    fn full_of(byte: u8, pool: &Pool) -> Parcel<Buffer, ()> {
        let mut buffer = pool.take(LONG);
        buffer.bytes_mut().fill(byte);
        Parcel::whole(vec![byte], buffer)
    }

    #[test]
    fn what_is_lent_stays_as_it_is_until_it_was_read() {
        // Each goes into the memory that the last one but one was in.
        let (pool, (mut reader, outlet)) = (Pool::new(2), lending());
        let reading = std::thread::spawn(move || {
            for byte in 0..50 {
                let mut came = vec![0; 1 + LONG];
                // Little at a time, so that much is lent meanwhile.
                for piece in came.chunks_mut(5000) {
                    reader.read_exact(piece).unwrap();
                    std::thread::yield_now();
                }
                assert!(came.iter().all(|&one| one == byte), "{byte}");
            }
            reader.read(&mut [0]).unwrap()
        });
        for byte in 0..50 {
            outlet.send(full_of(byte, &pool)).unwrap();
        }
        outlet.end(false).unwrap();
        assert_eq!(reading.join().unwrap(), 0);
    }

    #[test]
    fn what_is_lent_is_let_go_of_once_it_was_read_and_not_before() {
        let (pool, (mut reader, outlet)) = (Pool::new(1), lending());
        outlet.send(full_of(1, &pool)).unwrap();
        let taking = std::thread::spawn(move || drop(pool.take(LONG)));
        let mut came = vec![0; 1 + LONG];
        let (last, before) = came.split_last_mut().unwrap();
        reader.read_exact(before).unwrap();
        // All is written, and one byte of it is still to be read.
        while outlet.written() < 1 + LONG as u64 {
            std::thread::yield_now();
        }
        std::thread::sleep(10 * LOOK_AGAIN);
        assert!(!taking.is_finished());
        reader.read_exact(std::slice::from_mut(last)).unwrap();
        // With nothing else to write.
        taking.join().unwrap();
        assert!(came.iter().all(|&byte| byte == 1));
        outlet.end(false).unwrap();
    }

    #[test]
    fn who_lends_ends_when_nobody_reads_any_more() {
        let (pool, (reader, outlet)) = (Pool::new(1), lending());
        // As much as the pipe holds.
        let mut parcel = full_of(1, &pool);
        parcel.head = vec![1; 12 << 10];
        parcel.pieces = vec![Piece::Body { part: 0, range: 0..52 << 10 }];
        outlet.send(parcel).unwrap();
        while outlet.backlog() > 0 {
            std::thread::yield_now();
        }
        let ending = std::thread::spawn(move || outlet.end(false));
        std::thread::sleep(10 * LOOK_AGAIN);
        assert!(!ending.is_finished(), "it is not read");
        drop(reader);
        ending.join().unwrap().unwrap();
        drop(pool.take(LONG));
    }

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
