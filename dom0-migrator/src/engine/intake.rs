//! The thread that reads a filter's input, ahead of the filter's own.
//!
//! It reads exactly one record after the other, up to END and not a byte further, and puts them into a bounded channel in their
//! order. Records of memory lie in buffers of a [`Pool`]; when all of them are on their way, it waits, and so does whoever writes.
//!
//! What is asked of the filter from outside ([`Request`](Dispatch::Request)) goes through the same channel, so that it has its place between the records.
//! A request for silence is handed on only when there is nothing left to read: whoever asks writes nothing until it is answered,
//! so everything written before stands before it in the channel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::descriptor::{Bell, Input, Ringer};
use super::error::{EngineError, StreamProblem};
use super::memory_record;
use super::pool::{Buffer, Pool};
use super::xen_stream::{DOMAIN_HEADER, IMAGE_HEADER, RecordHeader, record};

/// Longest piece of a record that is passed on in pieces.
const PIECE: usize = 1 << 20;
/// Things on their way to the filter at most, beside what the pool bounds.
const AHEAD: usize = 64;

/// What a filter makes of a record of memory while it is still on its way.
pub trait Dispatch: Send + 'static {
    /// What is asked from outside.
    type Request: std::fmt::Debug + Send + 'static;
    /// A record on its way.
    type Record: std::fmt::Debug + Send + 'static;
    /// Longest body of a record of this type that is read whole; longer ones, and those of types without, come in pieces.
    fn longest(&self, kind: u32) -> Option<usize>;
    /// Takes a record that was read whole.
    fn record(&mut self, header: RecordHeader, body: Buffer) -> Self::Record;
    /// Sees the header of one that was not.
    fn other(&mut self, header: RecordHeader);
    /// Whether a request is to wait until there is nothing left to read.
    fn asks_for_silence(request: &Self::Request) -> bool;
}

/// Something that came, and how many bytes had been read by then.
#[derive(Debug)]
pub struct Arrived<D: Dispatch> {
    /// What came.
    pub what: Incoming<D>,
    /// Bytes read so far.
    pub offset: u64,
}

/// What the filter gets, in its order.
#[derive(Debug)]
pub enum Incoming<D: Dispatch> {
    /// The stream's two headers.
    Headers([u8; IMAGE_HEADER + DOMAIN_HEADER]),
    /// A record of memory.
    Record(D::Record),
    /// The header of another record, whose body follows in pieces.
    Other(RecordHeader),
    /// A piece of it, padding included.
    Piece(Buffer),
    /// A request.
    Request(D::Request),
    /// The last one: why there is no more.
    Failed(EngineError),
}

/// The reading thread.
#[derive(Debug)]
pub struct Intake<D: Dispatch> {
    /// What it has read.
    pub arrived: Receiver<Arrived<D>>,
    ringer: Ringer,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl<D: Dispatch> Intake<D> {
    /// Starts it. `stop` and a ring end it at any time.
    pub fn start(
        name: &str,
        input: Input,
        (ringer, bell): (Ringer, Bell),
        stop: Arc<AtomicBool>,
        pool: Pool,
        requests: Receiver<D::Request>,
        dispatch: D,
    ) -> std::io::Result<Self> {
        let (sender, arrived) = bounded(AHEAD);
        let mut reader = Reader {
            input,
            bell,
            stop: Arc::clone(&stop),
            pool,
            requests,
            for_silence: Vec::new(),
            dispatch,
            to: sender,
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            if let Err(End::Failed(error)) = reader.run() {
                let _ = reader.send(Incoming::Failed(error));
            }
        })?;
        Ok(Self { arrived, ringer, stop, thread })
    }

    /// Has it stop reading; it may still be waiting for the channel or for the pool.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ringer.ring();
    }

    /// Ends it, and so closes the input. No buffer may be held by what has not ended.
    pub fn end(self) {
        self.stop();
        // What it has read holds buffers, for one of which it may be waiting; a bounded channel keeps them as long as it has a sender.
        while self.arrived.recv().is_ok() {}
        let _ = self.thread.join();
    }
}

/// Why the reading ends.
enum End {
    /// The filter no longer takes anything.
    Gone,
    Failed(EngineError),
}

impl From<EngineError> for End {
    fn from(error: EngineError) -> Self {
        Self::Failed(error)
    }
}

struct Reader<D: Dispatch> {
    input: Input,
    bell: Bell,
    stop: Arc<AtomicBool>,
    pool: Pool,
    requests: Receiver<D::Request>,
    /// Requests that wait until there is nothing left to read.
    for_silence: Vec<D::Request>,
    dispatch: D,
    to: Sender<Arrived<D>>,
}

impl<D: Dispatch> Reader<D> {
    fn run(&mut self) -> Result<(), End> {
        let until = (&self.bell, &*self.stop);
        let headers = self.input.read_stream_headers(until)?;
        self.send(Incoming::Headers(headers))?;
        loop {
            self.wait_for_record()?;
            let until = (&self.bell, &*self.stop);
            let header = self.input.read_record_header(until)?;
            let longest = self.dispatch.longest(header.kind);
            if longest.is_some_and(|longest| header.padded() <= longest as u64) {
                let mut body = self.pool.take(header.padded() as usize);
                let what =
                    if header.kind == memory_record::RECORD_TYPE { "a private record" } else { "PAGE_DATA" };
                self.input.read_exact(body.bytes_mut(), what, until)?;
                let record = self.dispatch.record(header, body);
                self.send(Incoming::Record(record))?;
                continue;
            }
            // Whoever is handed END reads on no further, so nothing may come after its header.
            if header.kind == record::END && header.length != 0 {
                let length = u64::from(header.length);
                return Err(header.error(StreamProblem::Length { length, expected: 0 }).into());
            }
            self.dispatch.other(header);
            self.send(Incoming::Other(header))?;
            let mut left = header.padded();
            while left > 0 {
                let length = left.min(PIECE as u64) as usize;
                let mut piece = self.pool.take(length);
                self.input.read_exact(piece.bytes_mut(), "a record's body", (&self.bell, &*self.stop))?;
                self.send(Incoming::Piece(piece))?;
                left -= length as u64;
            }
            if header.kind == record::END {
                return Ok(());
            }
        }
    }

    fn send(&self, what: Incoming<D>) -> Result<(), End> {
        self.to.send(Arrived { what, offset: self.input.offset() }).map_err(|_| End::Gone)
    }

    /// Hands requests on until there is a record to read.
    fn wait_for_record(&mut self) -> Result<(), End> {
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(EngineError::Aborted.into());
            }
            self.hand_on_requests()?;
            let timeout = (!self.for_silence.is_empty()).then_some(Duration::ZERO);
            if self.input.wait(&self.bell, timeout)? {
                // What was asked before the record was written goes before it.
                return self.hand_on_requests();
            }
            for request in std::mem::take(&mut self.for_silence) {
                self.send(Incoming::Request(request))?;
            }
        }
    }

    fn hand_on_requests(&mut self) -> Result<(), End> {
        while let Ok(request) = self.requests.try_recv() {
            if D::asks_for_silence(&request) {
                self.for_silence.push(request);
            } else {
                self.send(Incoming::Request(request))?;
            }
        }
        Ok(())
    }
}
