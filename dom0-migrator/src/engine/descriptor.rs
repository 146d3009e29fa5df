//! The two ends of a stream, read and written exactly, and the bell that wakes a filter from its wait.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{SpliceFFlags, vmsplice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::{EngineError, StreamProblem};
use super::xen_stream::{
    DOMAIN_HEADER, IMAGE_HEADER, MAX_RECORD, RECORD_HEADER, RecordHeader, check_headers,
};

/// Slices that one `writev(2)` takes at most (`IOV_MAX` of Linux).
const MAX_SLICES: usize = 1024;

/// Rings a [`Bell`]; cheap, from any thread, never blocks.
#[derive(Clone, Debug)]
pub struct Ringer(Arc<UnixStream>);

/// What a filter's thread polls beside its input.
#[derive(Debug)]
pub struct Bell(UnixStream);

/// A bell and its ringer.
pub fn bell() -> io::Result<(Ringer, Bell)> {
    let (ringer, bell) = UnixStream::pair()?;
    ringer.set_nonblocking(true)?;
    bell.set_nonblocking(true)?;
    Ok((Ringer(Arc::new(ringer)), Bell(bell)))
}

impl Ringer {
    /// Rings. A full socket means that it rings already; a closed one, that nobody listens any more.
    pub fn ring(&self) {
        let _ = (&*self.0).write(&[1]);
    }
}

impl Bell {
    fn silence(&self) {
        let mut bytes = [0; 64];
        while matches!((&self.0).read(&mut bytes), Ok(n) if n == bytes.len()) {}
    }
}

/// What ends a read before it is done: the flag, and the bell that says to look at it.
pub type Until<'a> = (&'a Bell, &'a AtomicBool);

/// The end that a filter reads: never a byte more than it is asked for.
#[derive(Debug)]
pub struct Input {
    file: File,
    /// What somebody has read of it already.
    beginning: Vec<u8>,
    offset: u64,
}

impl Input {
    pub fn new(fd: OwnedFd) -> Self {
        Self::with_beginning(fd, Vec::new())
    }

    /// One whose first bytes were read already: they come first.
    pub fn with_beginning(fd: OwnedFd, beginning: Vec<u8>) -> Self {
        Self { file: File::from(fd), beginning, offset: 0 }
    }

    /// Bytes read so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Reads and checks the image and domain headers, with which a stream begins.
    pub fn read_stream_headers(
        &mut self,
        until: Until<'_>,
    ) -> Result<[u8; IMAGE_HEADER + DOMAIN_HEADER], EngineError> {
        let mut headers = [0; IMAGE_HEADER + DOMAIN_HEADER];
        self.read_exact(&mut headers, "the image and domain headers", until)?;
        check_headers(&headers).map_err(EngineError::Header)?;
        Ok(headers)
    }

    /// Reads a record's header; one that is longer than any record may be is refused.
    pub fn read_record_header(&mut self, until: Until<'_>) -> Result<RecordHeader, EngineError> {
        let offset = self.offset;
        let mut bytes = [0; RECORD_HEADER];
        self.read_exact(&mut bytes, "a record's header", until)?;
        let header = RecordHeader::parse(&bytes, offset);
        if header.length > MAX_RECORD {
            let (length, expected) = (u64::from(header.length), u64::from(MAX_RECORD));
            return Err(header.error(StreamProblem::Length { length, expected }));
        }
        Ok(header)
    }

    /// Fills the buffer, unless it is told to stop.
    pub fn read_exact(
        &mut self,
        buffer: &mut [u8],
        what: &'static str,
        (bell, stop): Until<'_>,
    ) -> Result<(), EngineError> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            // Looked at before every wait: a ring may have been heard while there was something to read too.
            loop {
                if stop.load(Ordering::Acquire) {
                    return Err(EngineError::Aborted);
                }
                if self.wait(bell, None)? {
                    break;
                }
            }
            let read = if self.beginning.is_empty() {
                self.file.read(rest)
            } else {
                let length = rest.len().min(self.beginning.len());
                rest.iter_mut().zip(self.beginning.drain(..length)).for_each(|(to, byte)| *to = byte);
                Ok(length)
            };
            match read {
                Ok(0) => return Err(EngineError::Truncated { what, offset: self.offset }),
                Ok(n) => {
                    filled += n;
                    self.offset += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(self.error(error)),
            }
        }
        Ok(())
    }

    fn error(&self, source: io::Error) -> EngineError {
        EngineError::Io { what: "reading the stream", offset: self.offset, source }
    }

    /// Waits until there is something to read (its end included), the bell rings, or time is over. True: there is
    /// something to read.
    pub fn wait(&self, bell: &Bell, timeout: Option<Duration>) -> Result<bool, EngineError> {
        if !self.beginning.is_empty() {
            return Ok(true);
        }
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = match deadline {
                None => PollTimeout::NONE,
                Some(deadline) => {
                    // Rounded up, so that the last millisecond is not spent spinning.
                    let left =
                        deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
                    PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX)
                }
            };
            let mut fds = [
                PollFd::new(self.file.as_fd(), PollFlags::POLLIN),
                PollFd::new(bell.0.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, left) {
                Ok(_) => {
                    let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
                    if ready(&fds[1]) {
                        bell.silence();
                    }
                    return Ok(ready(&fds[0]));
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(self.error(errno.into())),
            }
        }
    }
}

/// The end that a filter writes: nothing is kept back.
#[derive(Debug)]
pub struct Output {
    file: File,
    bytes: u64,
    lends: bool,
}

impl Output {
    pub fn new(fd: OwnedFd) -> Self {
        Self { file: File::from(fd), bytes: 0, lends: false }
    }

    /// One that [lends](Self::lend_slices), if it is a pipe. Whoever reads it must do so by `read(2)` or the like: what is spliced or teed out of the
    /// pipe counts as read, and its memory is still in use.
    pub fn lending(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        let lends = file.metadata().is_ok_and(|data| data.file_type().is_fifo());
        Self { file, bytes: 0, lends }
    }

    /// Whether it lends.
    pub fn lends(&self) -> bool {
        self.lends
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes all slices, in order.
    pub fn write_slices(&mut self, slices: &mut [IoSlice<'_>]) -> Result<(), EngineError> {
        self.write_by(slices, |mut file, slices| file.write_vectored(slices))
    }

    /// Puts all slices into the pipe, in order, without copying them: who reads reads this very memory, which must stay as it is until
    /// [`read`](Self::read) has come to where they end.
    pub fn lend_slices(&mut self, slices: &mut [IoSlice<'_>]) -> Result<(), EngineError> {
        self.write_by(slices, |file, slices| Ok(vmsplice(file, slices, SpliceFFlags::empty())?))
    }

    /// Of the bytes written to a pipe: those that were read. None, as far as is known, should the system not say.
    pub fn read(&self) -> u64 {
        let mut unread: libc::c_int = 0;
        // SAFETY: the call writes one `int`, and to this one.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::FIONREAD, &raw mut unread) };
        let unread = if result == 0 { u64::try_from(unread).ok() } else { None };
        unread.map_or(0, |unread| self.bytes.saturating_sub(unread))
    }

    /// Waits until nobody can read any more, or for a while. Whether nobody can.
    pub fn wait_for_its_end(&self, patience: Duration) -> bool {
        // That is told whatever is asked about.
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::empty())];
        let patience = PollTimeout::try_from(patience.as_millis()).unwrap_or(PollTimeout::MAX);
        poll(&mut fds, patience).is_ok_and(|ready| ready > 0)
    }

    fn write_by(
        &mut self,
        mut slices: &mut [IoSlice<'_>],
        write: impl Fn(&File, &[IoSlice<'_>]) -> io::Result<usize>,
    ) -> Result<(), EngineError> {
        // Empty slices in front would let writev return 0.
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let batch = slices.len().min(MAX_SLICES);
            let result = match slices.get(..batch) {
                Some(batch) => write(&self.file, batch),
                None => break,
            };
            match result {
                Ok(0) => return Err(self.error(io::ErrorKind::WriteZero.into())),
                Ok(n) => {
                    self.bytes += n as u64;
                    IoSlice::advance_slices(&mut slices, n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait_for(self.file.as_fd(), PollFlags::POLLOUT).map_err(|e| self.error(e))?;
                }
                Err(error) => return Err(self.error(error)),
            }
        }
        Ok(())
    }

    fn error(&self, source: io::Error) -> EngineError {
        EngineError::Io { what: "writing the stream", offset: self.bytes, source }
    }
}

/// For a descriptor that somebody has made non-blocking.
fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(fd, flags)], PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
