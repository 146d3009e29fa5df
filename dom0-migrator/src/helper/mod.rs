//! The save helper: what libxl starts, by `LIBXL_SAVE_HELPER`, to write a domain to a stream or read it from one.
//!
//! It does what libxl's own helper does (`libxl_save_helper.c`), with one end of a socket pair in the stream's place and a
//! filter of the [engine](crate::engine) between the pair and the stream:
//!
//! ```text
//!        libxl                          libxl
//!          │ ▲ messages, replies          │ ▲
//!          ▼ │                            ▼ │
//!   ┌─ save helper ──────────┐     ┌─ restore helper ──────────┐
//!   │ xc_domain_save         │     │        xc_domain_restore  │
//!   │     └► SourceFilter ───┼────►│──► TargetFilter ┘         │
//!   └────────────────────────┘     └───────────────────────────┘
//! ```
//!
//! What holds at the end, whatever happens: a save that failed has turned the log of dirty pages off (libxenguest does, as long
//! as this process is not killed by SIGKILL; hence SIGPIPE is ignored, which libxl has set to its default), and a helper that
//! reports success has written everything, or read not a byte past the end.

pub mod arguments;
pub mod channel;
mod first_pass;
pub mod message;
pub mod policy;
mod restore;
pub(crate) mod sampling;
mod save;
mod stream;
pub mod verify;

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use arguments::Arguments;
use channel::{Channel, ChannelError};
use message::Message;

pub use stream::{LibraryEnd, restore_pipe};

use crate::xen::CallError;
use crate::xen::control::{Control, OpenError};
use crate::xen::guest::Guest;
use crate::xen::logger::{Level, Logger, Sink};
use crate::xen::release::{Release, ReleaseError};

/// Bytes that the stream's pipe is made to hold; what every process may ask for (`fs.pipe-max-size`).
const STREAM_PIPE: libc::c_int = 1 << 20;

/// Why a helper failed before or after the library's part.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The running Xen is not known.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// Its libraries cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The library's part failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The filter's part failed.
    #[error("the stream filter: {0}")]
    Engine(#[from] crate::engine::EngineError),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Pages at the target differ from the source's.
    #[error("{0} pages of the restored domain differ from the source's; it is not started")]
    Mismatch(u64),
    /// A debug migration that compared nothing.
    #[error("a debug migration was asked for, but the stream had no VERIFY record: nothing was compared")]
    NotVerified,
    /// The filter did not end although the library has.
    #[error("the stream filter did not come to the end of the stream")]
    Unfinished,
    /// SIGTERM came.
    #[error("ended by a signal")]
    Terminated,
}

impl HelperError {
    /// The `errno` that libxl is told.
    fn errno(&self) -> i32 {
        match self {
            Self::Call(CallError { source, .. }) | Self::System { source, .. } => source.raw_os_error(),
            Self::Terminated => Some(libc::EINTR),
            _ => None,
        }
        .unwrap_or(libc::EIO)
    }
}

/// Does what the command line says; `arguments` are those after the program's name. The exit code is 0 whenever libxl was told
/// of the result, good or bad, as libxl wants it.
pub fn run(arguments: &Arguments) -> ExitCode {
    // libxl has set SIGPIPE to its default, by which a broken stream would kill this process before libxenguest has turned the log
    // of dirty pages off. Rust's runtime ignores it too, but that is no promise.
    // SAFETY: no handler is installed, and no other thread runs yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let channel = Arc::new(Channel::new(std::io::stdin(), std::io::stdout()));
    let done = match arguments {
        Arguments::Save(arguments) => save::run(arguments, &channel),
        Arguments::Restore(arguments) => restore::run(arguments, &channel),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "libxl is gone");
            ExitCode::FAILURE
        }
    }
}

/// Tells libxl of the result, the last message of all.
fn complete(channel: &Channel, result: &Result<(), HelperError>) -> Result<(), ChannelError> {
    let (result, errno) = match result {
        Ok(()) => (0, 0),
        Err(error) => {
            channel.log(Level::ERROR, &error.to_string());
            (-1, error.errno())
        }
    };
    channel.ask("the result", &Message::Complete { result, errno }).map(|_| ())
}

/// The libraries of the running Xen, opened.
pub(crate) struct Libraries {
    pub(crate) control: Arc<Control>,
    pub(crate) guest: Guest,
}

impl Libraries {
    pub(crate) fn open(sink: Arc<dyn Sink>) -> Result<Self, HelperError> {
        let release = Release::running()?;
        let guest = Guest::load(release, release.restore_abi()?)?;
        Ok(Self { control: Arc::new(Control::open(release, Logger::new(sink))?), guest })
    }
}

/// Takes over a descriptor that libxl has passed by number, and keeps it from children.
fn take_descriptor(number: i32) -> Result<OwnedFd, HelperError> {
    let failed = |source| HelperError::System { what: "the stream that libxl passed", source };
    // SAFETY: asks about a number; one that is not open is an error.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    // A larger pipe means fewer turns between the two processes; of a socket or file this is refused, and is of no consequence.
    // SAFETY: sets an attribute of a descriptor that was just seen to be open.
    unsafe { libc::fcntl(number, libc::F_SETPIPE_SZ, STREAM_PIPE) };
    // SAFETY: the descriptor is open, and libxl passed it for this process to use; nothing else here knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
