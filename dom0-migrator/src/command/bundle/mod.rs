//! A stream over several connections, and compressed where that is wanted. Between the socket that carrier and relay see and the
//! connections:
//!
//! ```text
//!           ┌─ lane 0 ─► header, block 0 │ header, block 3 │ … │ end      ─┐
//! socket ─► cut ─ lane 1 ─► header, block 1 │ …              │ end        ─┼─► in order ─► socket
//!           └─ lane 2 ─► header, block 2 │ …                 │ end        ─┘
//! ```
//!
//! A lane that is free takes the next block, so a slow one takes fewer; both directions go so, by themselves. What holds:
//! * Every byte comes out as it went in, in order, or the socket ends early: a reader of it never sees a gap.
//! * Whatever goes wrong on one lane (a cut, a block that cannot be, a block that does not decompress) ends all of them and the socket, on
//!   both sides. The save at the source then fails as with one connection, and the domain runs on.
//! * Memory is bounded: [`order::AHEAD_MAX`] blocks wait for their turn, a few are on their way.

mod block;
mod choice;
mod compression;
mod gate;
mod order;

#[cfg(test)]
mod tests;
#[cfg(test)]
#[allow(clippy::duplicate_mod, reason = "it is the same source on purpose")]
mod under_loom;

/// The locks of the gate.
mod sync {
    pub use std::sync::{Condvar, Mutex, MutexGuard};
}

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};

use super::connection::{Carried, Wire};
use super::pump::Passing;
pub use block::VERSION;
use block::{BLOCK_MAX, Codec, HEADER, Header};
use choice::Chooser;
use compression::Coder;
pub use compression::Compression;
use gate::{Gate, Taken};
use order::AHEAD_MAX;

/// What went through the blocks of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlocksReport {
    /// TCP connections.
    pub connections: usize,
    /// What was wanted.
    pub compression: Compression,
    /// What `auto` chose, with its numbers.
    pub chosen: Option<String>,
    /// Bytes of the stream that were sent.
    pub bytes_before: u64,
    /// Bytes that they were in blocks.
    pub bytes_after: u64,
}

/// A block of the stream, with room for its header before it.
type Block = Vec<u8>;

/// What all threads of a bundle know.
#[derive(Debug)]
struct Shared {
    near: UnixStream,
    lanes: Vec<Wire>,
    gate: Gate<Block>,
    /// Blocks of the whole stream that is sent, once they are counted.
    blocks: OnceLock<u64>,
    chooser: Chooser,
    wanted: Compression,
    before: AtomicU64,
    after: AtomicU64,
}

/// A bundle, as its owner sees it beside its socket.
#[derive(Debug)]
pub struct Bundle {
    shared: Arc<Shared>,
    /// Disconnected when all lanes have sent what there was to send.
    sent: Receiver<()>,
}

/// How long the peer is given to take what was written last, and the end behind it.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Bundle {
    /// Begins to pass on between connections and a new socket, which is returned.
    ///
    /// # Errors
    /// When there is no socket or no thread to be had.
    pub fn start(lanes: Vec<Wire>, compression: Compression) -> io::Result<(TcpStream, Self)> {
        let (near, far) = UnixStream::pair()?;
        let count = lanes.len();
        let shared = Arc::new(Shared {
            near,
            lanes,
            gate: Gate::new(AHEAD_MAX),
            blocks: OnceLock::new(),
            chooser: Chooser::new(compression, count),
            wanted: compression,
            before: AtomicU64::new(0),
            after: AtomicU64::new(0),
        });
        // A lane takes a block when it is free, and no block waits in between: what is on its way has to arrive before a domain is
        // suspended.
        let (send, blocks) = bounded(0);
        let (give_back, empty) = bounded(count + 1);
        let (sending, sent) = bounded(0);
        let bundle = Self { shared, sent };
        bundle.spawn("cut", move |shared| cut(shared, &send, &empty))?;
        for lane in 0..count {
            let (blocks, give_back, sending) = (blocks.clone(), give_back.clone(), sending.clone());
            bundle.spawn("lane out", move |shared| {
                let _sending: Sender<()> = sending;
                send_blocks(shared, lane, &blocks, &give_back)
            })?;
            bundle.spawn("lane in", move |shared| receive_blocks(shared, lane))?;
        }
        bundle.spawn("in order", deliver)?;
        // Of a socket, only what every kind of stream socket can do is used.
        Ok((TcpStream::from(OwnedFd::from(far)), bundle))
    }

    /// Runs a part; when it fails, everything ends.
    fn spawn(
        &self,
        name: &str,
        part: impl FnOnce(&Shared) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let (shared, passing) = (self.shared.clone(), Passing::begin());
        let spawned = std::thread::Builder::new().name(name.into()).spawn(move || {
            let _passing = passing;
            if let Err(error) = part(&shared) {
                shared.fail(&error);
            }
        });
        if let Err(error) = &spawned {
            self.shared.fail(error);
        }
        spawned.map(drop)
    }

    /// Bytes on the network, over all connections.
    pub fn carried(&self) -> Carried {
        self.shared.carried()
    }

    /// What went through it.
    pub fn report(&self) -> BlocksReport {
        BlocksReport {
            connections: self.shared.lanes.len(),
            compression: self.shared.wanted,
            chosen: self.shared.chooser.choice().map(|choice| choice.to_string()),
            bytes_before: self.shared.before.load(Ordering::Relaxed),
            bytes_after: self.shared.after.load(Ordering::Relaxed),
        }
    }
}

/// What was written goes to its end, for a peer to whom one lane ends before all of it was there would take the stream for broken off, last words
/// and all; then nobody waits any longer for a peer that does not end its side.
impl Drop for Bundle {
    fn drop(&mut self) {
        // Nothing more is taken from the socket, whoever else still has it.
        let _ = self.shared.near.shutdown(Shutdown::Read);
        if !self.shared.has_failed() {
            let _ = self.sent.recv_timeout(LAST_WORDS);
        }
        self.shared.lanes.iter().for_each(Wire::hang_up);
    }
}

impl Shared {
    fn has_failed(&self) -> bool {
        self.gate.is_broken()
    }

    fn carried(&self) -> Carried {
        self.lanes.iter().map(Wire::carried).fold(Carried::default(), |sum, one| Carried {
            sent: sum.sent + one.sent,
            received: sum.received + one.received,
        })
    }

    /// Ends everything: whoever waits for a socket, a block or a turn goes on and finds it over.
    fn fail(&self, error: &io::Error) {
        if !self.gate.break_off() {
            return;
        }
        tracing::warn!(%error, "a connection of the stream is lost, and the others end with it");
        for lane in &self.lanes {
            lane.hang_up();
        }
        let _ = self.near.shutdown(Shutdown::Both);
    }
}

fn ended(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, what.to_owned())
}

/// Cuts what comes from the socket into blocks, as much as is there at a time.
fn cut(shared: &Shared, send: &Sender<(u64, Block)>, empty: &Receiver<Block>) -> io::Result<()> {
    let mut number = 0;
    loop {
        let mut block = empty.try_recv().unwrap_or_default();
        block.resize(HEADER + BLOCK_MAX, 0);
        let length = match (&shared.near).read(block.get_mut(HEADER..).unwrap_or_default()) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        block.truncate(HEADER + length);
        if send.send((number, block)).is_err() {
            // All lanes have failed, and said so.
            return Ok(());
        }
        number += 1;
    }
    if !shared.has_failed() {
        let _ = shared.blocks.set(number);
    }
    Ok(())
}

/// Sends blocks as they come, and at last how many there were.
fn send_blocks(
    shared: &Shared,
    lane: usize,
    blocks: &Receiver<(u64, Block)>,
    give_back: &Sender<Block>,
) -> io::Result<()> {
    let Some(wire) = shared.lanes.get(lane) else { return Ok(()) };
    let mut socket = &wire.socket;
    let mut coder = Coder::new();
    while let Ok((number, mut block)) = blocks.recv() {
        let (head, bytes) = block.split_at_mut(HEADER);
        let length = bytes.len();
        let codec = shared.chooser.codec(bytes, &mut coder);
        let compressed = coder.compress(codec, bytes)?;
        let stored = compressed.map_or(length, <[u8]>::len);
        let codec = if compressed.is_some() { codec } else { Codec::Raw };
        head.copy_from_slice(&Header::Block { number, codec, length, stored }.to_bytes());
        // Before it goes: whoever has received all of a stream finds all of it counted.
        shared.before.fetch_add(length as u64, Ordering::Relaxed);
        shared.after.fetch_add((HEADER + stored) as u64, Ordering::Relaxed);
        let began = Instant::now();
        match compressed {
            Some(compressed) => {
                socket.write_all(head)?;
                socket.write_all(compressed)?;
            }
            None => socket.write_all(&block)?,
        }
        shared.chooser.sent(stored, began.elapsed(), || shared.carried().sent);
        let _ = give_back.try_send(block);
    }
    // Without a number the stream did not end, but was broken off.
    if let Some(&blocks) = shared.blocks.get() {
        socket.write_all(&Header::End { blocks }.to_bytes())?;
        // A peer that has all of the stream from the other lanes may have closed this one already.
        match socket.shutdown(Shutdown::Write) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Takes one lane's blocks, each when there is room for it.
fn receive_blocks(shared: &Shared, lane: usize) -> io::Result<()> {
    let Some(wire) = shared.lanes.get(lane) else { return Ok(()) };
    let bad = |error: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::InvalidData, format!("connection {lane} brought {error}"))
    };
    let mut socket = &wire.socket;
    let (mut head, mut stored_bytes, mut coder) = ([0; HEADER], Vec::new(), Coder::new());
    let mut last = None;
    loop {
        socket.read_exact(&mut head).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ended("a connection of the stream ended before the stream did"),
            _ => error,
        })?;
        let (number, codec, length, stored) = match Header::parse(&head).map_err(|error| bad(&error))? {
            Header::Block { number, codec, length, stored } => (number, codec, length, stored),
            Header::End { blocks } => {
                return shared.gate.end(blocks).map_err(|error| bad(&error));
            }
        };
        // Each lane ascends: by that the one that has the next block never waits for room.
        if last.is_some_and(|last| number <= last) {
            return Err(bad(&format!("block {number} out of turn")));
        }
        last = Some(number);
        let mut block = vec![0; length];
        if codec == Codec::Raw {
            socket.read_exact(&mut block)?;
        } else {
            stored_bytes.resize(stored, 0);
            socket.read_exact(&mut stored_bytes)?;
            coder.decompress(codec, &stored_bytes, &mut block).map_err(|error| bad(&error))?;
        }
        if !shared.gate.put(number, block).map_err(|error| bad(&error))? {
            return Ok(());
        }
    }
}

/// Hands blocks on in their order.
fn deliver(shared: &Shared) -> io::Result<()> {
    loop {
        match shared.gate.take() {
            Taken::Block(block) => (&shared.near).write_all(&block)?,
            Taken::Complete => return shared.near.shutdown(Shutdown::Write).or(Ok(())),
            Taken::Broken => return Ok(()),
        }
    }
}
