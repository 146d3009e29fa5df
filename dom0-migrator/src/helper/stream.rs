//! What lies between libxenguest and the filter, and what ends it early: a pair of sockets at the source, a pipe at the target.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{setsockopt, sockopt};

use super::HelperError;

/// Bytes that the pair may hold: enough that whoever writes seldom waits, and no more than the processor's caches do, out of which they are read
/// again. A GiB through the pair takes a tenth less of the processor than with 4 MiB, and a tenth of the waits that the system's 208 KiB bring.
const BUFFER: usize = 1 << 20;

/// The pipe out of which libxenguest restores, and the filter's end of it, which lends its pages to the pipe: a GiB takes 0.13 s of the processor so, both
/// ends together, where the pair of sockets takes 0.24 s (64 MiB written over and over, read into 256 MiB).
///
/// # Errors
/// [`HelperError::System`].
pub fn restore_pipe() -> Result<(OwnedFd, OwnedFd), HelperError> {
    let (library, filter) = std::io::pipe().map_err(|source| HelperError::System { what: "pipe", source })?;
    // Without it (a limit of this user's) it holds 64 KiB, and is slower.
    let _ = fcntl(&filter, FcntlArg::F_SETPIPE_SZ(BUFFER as i32));
    Ok((library.into(), filter.into()))
}

/// libxenguest's end at the source. The filter's is a descriptor of its own.
#[derive(Debug)]
pub struct LibraryEnd(UnixStream);

impl LibraryEnd {
    /// Makes the pair.
    ///
    /// # Errors
    /// [`HelperError::System`].
    pub fn pair() -> Result<(Self, OwnedFd), HelperError> {
        let (library, filter) =
            UnixStream::pair().map_err(|source| HelperError::System { what: "socket pair", source })?;
        for end in [&library, &filter] {
            // More than the system's maximum is cut down to it, and less is only slower.
            let _ = setsockopt(end, sockopt::SndBufForce, &BUFFER)
                .or_else(|_| setsockopt(end, sockopt::SndBuf, &BUFFER));
        }
        Ok((Self(library), filter.into()))
    }

    /// The descriptor that libxenguest is given.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Ends the stream: the filter reads its end.
    pub fn close(&self) {
        let _ = self.0.shutdown(std::net::Shutdown::Write);
    }

    /// Has SIGTERM end the stream, by which libxenguest ends with an error and cleans up. To be called before any other thread
    /// is started, since it blocks the signal in this one and in those that follow.
    ///
    /// # Errors
    /// [`HelperError::System`].
    pub fn end_on_sigterm(&self) -> Result<Terminated, HelperError> {
        let failed = |what| move |source: std::io::Error| HelperError::System { what, source };
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGTERM);
        signals.thread_block().map_err(|error| failed("blocking SIGTERM")(error.into()))?;
        let end = self.0.try_clone().map_err(failed("socket pair"))?;
        let terminated = Terminated::default();
        let flag = terminated.clone();
        std::thread::Builder::new()
            .name("sigterm".into())
            .spawn(move || {
                if signals.wait().is_ok() {
                    flag.0.store(true, Ordering::Release);
                    let _ = end.shutdown(std::net::Shutdown::Both);
                }
            })
            .map_err(failed("a thread"))?;
        Ok(terminated)
    }
}

/// Whether SIGTERM has come.
#[derive(Clone, Debug, Default)]
pub struct Terminated(Arc<AtomicBool>);

impl Terminated {
    /// Whether it has.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
