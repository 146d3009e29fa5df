//! Where `receive` listens: on sockets that systemd has opened (`poolskip-receive.socket`), or on an address.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;

use listenfd::ListenFd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Why there is nothing to listen on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Nobody says where.
    #[error("where to listen? `--listen ADDRESS:PORT`, or `listen` in the configuration")]
    Nowhere,
    /// An address beside sockets that are open already.
    #[error("--listen {0}: systemd has passed sockets to listen on; leave one of the two out")]
    Twice(SocketAddr),
    /// What was passed is something else.
    #[error(
        "descriptor {number} from systemd: {source}; `ListenStream=ADDRESS:PORT` in the socket unit makes one that will do"
    )]
    Passed {
        /// The descriptor, from 3 on.
        number: usize,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The address is not to be had.
    #[error("cannot listen on {address}: {source}")]
    Address {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// First descriptor that systemd passes (`sd_listen_fds(3)`).
const FIRST: usize = 3;

/// What `receive` listens on.
#[derive(Debug)]
pub struct Listening(Vec<TcpListener>);

impl Listening {
    /// Takes the sockets that systemd has passed to this process, or else opens the command line's address, or else the configuration's.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn open(wanted: Option<SocketAddr>, configured: Option<SocketAddr>) -> Result<Self, ListenError> {
        // It looks at LISTEN_PID too, so that what was meant for another process is left alone, and keeps the sockets from children.
        let mut passed = ListenFd::from_env();
        if passed.len() == 0 {
            let address = wanted.or(configured).ok_or(ListenError::Nowhere)?;
            let listener =
                TcpListener::bind(address).map_err(|source| ListenError::Address { address, source })?;
            return Ok(Self(vec![listener]));
        }
        if let Some(address) = wanted {
            return Err(ListenError::Twice(address));
        }
        let mut listeners = Vec::new();
        for index in 0..passed.len() {
            let failed = |source| ListenError::Passed { number: FIRST + index, source };
            listeners.extend(passed.take_tcp_listener(index).map_err(failed)?);
        }
        for (index, listener) in listeners.iter().enumerate() {
            // Another process may accept from the same socket between the poll and ours: then nothing has come, and nobody waits.
            let failed = |source| ListenError::Passed { number: FIRST + index, source };
            listener.set_nonblocking(true).map_err(failed)?;
        }
        Ok(Self(listeners))
    }

    /// Waits a while for a connection.
    pub fn accept(&self, timeout: PollTimeout) -> Option<(std::net::TcpStream, SocketAddr)> {
        let mut waiting: Vec<PollFd<'_>> =
            self.0.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)).collect();
        if !matches!(poll(&mut waiting, timeout), Ok(1..)) {
            return None;
        }
        let ready = waiting.iter().position(|one| one.any() == Some(true))?;
        let (stream, from) = self.0.get(ready)?.accept().ok()?;
        // Accepted sockets do not inherit it on Linux; said aloud, since everything that follows waits.
        stream.set_nonblocking(false).ok()?;
        Some((stream, from))
    }

    /// The addresses, for the log.
    pub fn addresses(&self) -> String {
        let shown = |listener: &TcpListener| {
            listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string())
        };
        self.0.iter().map(shown).collect::<Vec<_>>().join(", ")
    }
}
