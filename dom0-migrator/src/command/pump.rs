//! Between a TCP connection and the socket that the rest of the program, or a helper, reads and writes: TLS, and a limit on the
//! rate. One thread for each connection, with bounded buffers.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::Connection;

/// Bytes of one step.
const STEP: usize = 128 * 1024;
/// Bytes on their way to the near side at most, before no more is read.
const WAITING_MAX: usize = 256 * 1024;
/// Bytes at most that a limited pump is given at once, so that connections that share a limit take turns.
const TURN: usize = 64 * 1024;
/// A moment's rest where poll reports without being asked.
const REST: Duration = Duration::from_millis(5);

/// Pumps that still have something to pass on.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// Something that still has to be passed on, for as long as this lives.
#[derive(Debug)]
pub struct Passing(());

impl Passing {
    /// One more.
    pub fn begin() -> Self {
        RUNNING.fetch_add(1, Ordering::AcqRel);
        Self(())
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Waits until everything is passed on and every connection closed, not for long: the peer may not close its own.
pub fn drain(patience: Duration) {
    let until = Instant::now() + patience;
    while RUNNING.load(Ordering::Acquire) > 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes per second that all connections of a migration may send together.
///
/// Whoever wants to send is given bytes and the moment from which on it may send them, each after those that were given before. So
/// everybody sleeps once for a turn, however many wait.
#[derive(Debug)]
pub struct Bandwidth {
    per_second: u64,
    /// When everything given up to now may have been sent.
    free: Mutex<Instant>,
}

/// For how long at most what nobody sends is kept for later.
const KEPT: Duration = Duration::from_millis(100);

impl Bandwidth {
    /// That many; at least one.
    pub fn new(per_second: u64) -> Self {
        Self { per_second: per_second.max(1), free: Mutex::new(Instant::now()) }
    }

    /// Takes up to `wanted` bytes, at least one of them: how many, and when they may be sent.
    fn take(&self, wanted: usize) -> (usize, Instant) {
        self.take_at(wanted, Instant::now())
    }

    fn take_at(&self, wanted: usize, now: Instant) -> (usize, Instant) {
        // No more than is kept, or a slow link would have long turns.
        let most = usize::try_from(self.per_second / 20).unwrap_or(TURN).clamp(1, TURN);
        let taken = wanted.min(most);
        let nanoseconds = (taken as u64).saturating_mul(1_000_000_000).div_ceil(self.per_second);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let from = now.checked_sub(KEPT).map_or(*free, |earliest| earliest.max(*free));
        *free = from + Duration::from_nanos(nanoseconds);
        (taken, from)
    }
}

/// What stands in the connection.
#[derive(Debug)]
enum Layer {
    Tls(Box<Connection>),
    Plain { out: Vec<u8> },
}

impl Layer {
    fn wants_write(&self) -> bool {
        match self {
            Self::Tls(tls) => tls.wants_write(),
            Self::Plain { out } => !out.is_empty(),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tls(tls) => tls.writer().write_all(bytes),
            Self::Plain { out } => {
                out.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn end(&mut self) {
        if let Self::Tls(tls) = self {
            tls.send_close_notify();
        }
    }

    fn flush(&mut self, mut tcp: &TcpStream) -> io::Result<()> {
        match self {
            Self::Tls(tls) => tls.write_tls(&mut tcp).map(drop),
            Self::Plain { out } => {
                let written = tcp.write(out)?;
                out.drain(..written);
                Ok(())
            }
        }
    }

    /// Reads what is there; whether the peer has ended its side, in order.
    fn receive(&mut self, mut tcp: &TcpStream, into: &mut Vec<u8>, buffer: &mut [u8]) -> io::Result<bool> {
        let Self::Tls(tls) = self else {
            let length = tcp.read(buffer)?;
            into.extend_from_slice(buffer.get(..length).unwrap_or_default());
            return Ok(length == 0);
        };
        let cut = tls.read_tls(&mut tcp)? == 0;
        let ended = Self::decrypt(tls, into, buffer)?;
        // An end without a farewell may be anybody's doing.
        if cut && !ended { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(ended) }
    }

    /// What came together with the end of the handshake.
    fn received_already(&mut self, into: &mut Vec<u8>, buffer: &mut [u8]) -> io::Result<bool> {
        match self {
            Self::Tls(tls) => Self::decrypt(tls, into, buffer),
            Self::Plain { .. } => Ok(false),
        }
    }

    fn decrypt(tls: &mut Connection, into: &mut Vec<u8>, buffer: &mut [u8]) -> io::Result<bool> {
        let state =
            tls.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let mut left = state.plaintext_bytes_to_read();
        while left > 0 {
            let length = tls.reader().read(buffer)?;
            into.extend_from_slice(buffer.get(..length).unwrap_or_default());
            left = left.saturating_sub(length.max(1));
        }
        Ok(state.peer_has_closed())
    }
}

/// Begins to pass on between a TCP connection and a new socket, which is returned. `tls` is a connection whose handshake is done.
///
/// # Errors
/// When there is no socket or no thread to be had.
pub fn start(
    tcp: &TcpStream,
    tls: Option<Connection>,
    bandwidth: Option<Arc<Bandwidth>>,
) -> io::Result<UnixStream> {
    let (near, far) = UnixStream::pair()?;
    let tcp = tcp.try_clone()?;
    // The flag belongs to the connection, so to every copy of its descriptor; nobody but the pump reads or writes it now.
    tcp.set_nonblocking(true)?;
    near.set_nonblocking(true)?;
    let layer = match tls {
        Some(mut tls) => {
            tls.set_buffer_limit(None);
            Layer::Tls(Box::new(tls))
        }
        None => Layer::Plain { out: Vec::new() },
    };
    let passing = Passing::begin();
    std::thread::Builder::new().name("pump".into()).spawn(move || {
        let _passing = passing;
        if let Err(error) = pass(&tcp, &near, layer, bandwidth.as_deref()) {
            tracing::debug!(%error, "a connection ended");
        }
        let _ = tcp.shutdown(Shutdown::Both);
        let _ = near.shutdown(Shutdown::Both);
    })?;
    Ok(far)
}

/// What of an attempt that may have had nothing to do.
fn tried(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(())
        }
        other => other,
    }
}

fn pass(
    tcp: &TcpStream,
    mut near: &UnixStream,
    mut layer: Layer,
    bandwidth: Option<&Bandwidth>,
) -> io::Result<()> {
    let mut buffer = vec![0; STEP];
    let mut waiting: Vec<u8> = Vec::new();
    // What the near side sends, and what the peer sends: whether each has ended, and whether the other was told.
    let (mut near_ended, mut peer_ended, mut told_peer, mut told_near) = (false, false, false, false);
    peer_ended |= layer.received_already(&mut waiting, &mut buffer)?;
    // Bytes that may be sent before the limit is asked again, and from when on.
    let (mut allowance, mut allowed_from) = (0, Instant::now());
    loop {
        if near_ended && !told_peer && !layer.wants_write() {
            tcp.shutdown(Shutdown::Write)?;
            told_peer = true;
        }
        if peer_ended && !told_near && waiting.is_empty() {
            let _ = near.shutdown(Shutdown::Write);
            told_near = true;
        }
        if told_peer && told_near {
            return Ok(());
        }
        let may_read = !near_ended && !layer.wants_write();
        if may_read && allowance == 0 {
            (allowance, allowed_from) =
                bandwidth.map_or((STEP, allowed_from), |bandwidth| bandwidth.take(STEP));
        }
        let held_back = allowed_from.saturating_duration_since(Instant::now());
        let may_read = may_read && held_back.is_zero();
        let when = |wanted: bool, flag| if wanted { flag } else { PollFlags::empty() };
        let of_tcp = when(!peer_ended && waiting.len() < WAITING_MAX, PollFlags::POLLIN)
            | when(layer.wants_write(), PollFlags::POLLOUT);
        let of_near = when(may_read, PollFlags::POLLIN) | when(!waiting.is_empty(), PollFlags::POLLOUT);
        let mut fds = [PollFd::new(tcp.as_fd(), of_tcp), PollFd::new(near.as_fd(), of_near)];
        // A wait of less than a millisecond is one of a millisecond: what is kept for later makes up for it.
        let milliseconds = u16::try_from(held_back.as_millis()).unwrap_or(u16::MAX).saturating_add(1);
        let timeout = if held_back.is_zero() { PollTimeout::NONE } else { PollTimeout::from(milliseconds) };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let seen = |fd: &PollFd<'_>, flag| fd.revents().is_some_and(|flags| flags.intersects(flag));
        let broken = PollFlags::POLLERR | PollFlags::POLLHUP;
        let (tcp_in, tcp_out) =
            (seen(&fds[0], PollFlags::POLLIN | broken), seen(&fds[0], PollFlags::POLLOUT | broken));
        let (near_in, near_out) =
            (seen(&fds[1], PollFlags::POLLIN | broken), seen(&fds[1], PollFlags::POLLOUT | broken));
        let seen_hang_up = seen(&fds[0], broken);
        let mut idle = true;
        if tcp_out && layer.wants_write() {
            idle = false;
            tried(layer.flush(tcp))?;
        }
        if tcp_in && !peer_ended && waiting.len() < WAITING_MAX {
            idle = false;
            match layer.receive(tcp, &mut waiting, &mut buffer) {
                Ok(ended) => peer_ended = ended,
                other => tried(other.map(drop))?,
            }
        }
        if near_out && !waiting.is_empty() {
            idle = false;
            match near.write(&waiting) {
                Ok(written) => drop(waiting.drain(..written)),
                other => tried(other.map(drop))?,
            }
        }
        if near_in && may_read {
            idle = false;
            let most = allowance.min(buffer.len());
            match near.read(buffer.get_mut(..most).unwrap_or_default()) {
                Ok(0) => {
                    near_ended = true;
                    layer.end();
                }
                Ok(length) => {
                    allowance -= length;
                    layer.send(buffer.get(..length).unwrap_or_default())?;
                    tried(layer.flush(tcp))?;
                }
                other => tried(other.map(drop))?,
            }
        }
        if idle && (tcp_in || near_in) {
            // A hang-up, which poll reports without being asked. The peer's, when there is still something to be told to it, is
            // the end; the near side's waits for what is on its way.
            if seen_hang_up && !told_peer && peer_ended {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            std::thread::sleep(REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_limited_connection_passes_everything_both_ways_and_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let bandwidth = Arc::new(Bandwidth::new(10_000_000));
        let mut socket = start(&near, None, Some(bandwidth)).unwrap();
        let sent: Vec<u8> = (0..1_000_000_u32).map(|i| (i / 5) as u8).collect();
        let expected = sent.clone();
        let mut writer = socket.try_clone().unwrap();
        let writing = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut arrived = Vec::new();
        far.read_to_end(&mut arrived).unwrap();
        assert!(arrived == expected);
        far.write_all(b"answer").unwrap();
        drop(far);
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
        writing.join().unwrap();
    }

    /// Bytes that may be sent until then by somebody who waits for each turn, from `at` on.
    fn sent_until(bandwidth: &Bandwidth, mut at: Instant, end: Instant) -> usize {
        let mut sent = 0;
        loop {
            let (taken, from) = bandwidth.take_at(STEP, at);
            at = at.max(from);
            if at > end {
                return sent;
            }
            sent += taken;
        }
    }

    #[test]
    fn no_more_is_given_than_the_limit_and_no_less() {
        for rate in [1, 19, 1_000, 1_000_000, 10_000_000_000] {
            let bandwidth = Bandwidth::new(rate);
            let begun = Instant::now();
            *bandwidth.free.lock().unwrap() = begun;
            let (rate, turn) = (rate as usize, (rate as usize / 20).clamp(1, TURN));
            let sent = sent_until(&bandwidth, begun, begun + Duration::from_secs(10));
            // Turns are whole nanoseconds.
            let least = 10 * rate - rate / 1000 - turn;
            assert!((least..=10 * rate + turn).contains(&sent), "{sent} at {rate} a second");
            // After a long pause: what is kept, and what comes within a second.
            let later = begun + Duration::from_secs(60);
            let sent = sent_until(&bandwidth, later, later + Duration::from_secs(1));
            let kept = rate + rate / 10;
            let least = (kept - rate / 1000).saturating_sub(turn);
            assert!((least..=kept + turn).contains(&sent), "{sent} at {rate} a second");
        }
    }

    #[test]
    fn those_who_wait_have_a_turn_each() {
        let bandwidth = Bandwidth::new(1_000_000);
        let begun = Instant::now();
        *bandwidth.free.lock().unwrap() = begun;
        let turns: Vec<_> = (0..4).map(|_| bandwidth.take_at(STEP, begun)).collect();
        let expected: Vec<_> =
            (0..4).map(|turn| (50_000, begun + Duration::from_millis(50 * turn))).collect();
        assert_eq!(turns, expected);
        // Who wants little waits for little.
        assert_eq!(bandwidth.take_at(10, begun), (10, begun + Duration::from_millis(200)));
        assert_eq!(bandwidth.take_at(1, begun), (1, begun + Duration::from_micros(200_010)));
    }
}
