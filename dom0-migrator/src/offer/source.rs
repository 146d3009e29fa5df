//! The source's helper: it listens, and takes in who has read the stream.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{ADDRESSES_MAX, Offer, OfferError};
use crate::command::connection::prepare;
use crate::command::pump;
use crate::command::strangers::Strangers;
use crate::command::tls::{Deadlined, OneTime};
use crate::control::{self, Connection, STREAM_VERSION, Token, VERSION};
use crate::engine::Coming;

/// How long memory waits for the target: it makes the domain first. A target without this program never comes.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether somebody is still wanted.
const TICK: u16 = 100;
/// How long a connection may take to say who it is.
const GREETING: Duration = Duration::from_secs(10);

/// Why nothing is offered.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The offer.
    #[error(transparent)]
    Offer(#[from] OfferError),
}

/// Listens for as long as it lives.
#[derive(Debug)]
pub struct Listening {
    ended: Arc<AtomicBool>,
    address: SocketAddr,
}

impl Listening {
    /// Where.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
    }
}

/// Listens on a port, or on any that is free (0), and makes the offer that says so. `compare`: whether all pages are compared at the end.
///
/// # Errors
/// [`ListenError`].
pub fn listen(port: u16, compare: bool) -> Result<(Coming, Listening), ListenError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| ListenError::System { what, source }
    };
    let any = [IpAddr::from(Ipv6Addr::UNSPECIFIED), Ipv4Addr::UNSPECIFIED.into()];
    let listener = TcpListener::bind(&any.map(|address| SocketAddr::new(address, port))[..])
        .map_err(failed(&format!("listening on port {port} for the target's helper")))?;
    listener.set_nonblocking(true).map_err(failed("listening"))?;
    let address = listener.local_addr().map_err(failed("listening"))?;
    let certificate = OneTime::make().map_err(failed("making a certificate"))?;
    let token = Token::random().map_err(failed("a random token"))?;
    let offer = Offer {
        stream_version: STREAM_VERSION,
        token: token.clone(),
        port: address.port(),
        addresses: own_addresses(),
        certificate: certificate.pem().to_owned(),
        compare,
    };
    let ended = Arc::new(AtomicBool::new(false));
    let (sender, sockets) = bounded(1);
    let waiting = Waiting { token, certificate, sender, ended: ended.clone() };
    std::thread::Builder::new()
        .name("offer".into())
        .spawn(move || accept(&listener, &Arc::new(waiting)))
        .map_err(failed("a thread"))?;
    Ok((Coming { offer: offer.body()?, sockets, patience: PATIENCE }, Listening { ended, address }))
}

/// Who is waited for.
struct Waiting {
    token: Token,
    certificate: OneTime,
    sender: Sender<OwnedFd>,
    ended: Arc<AtomicBool>,
}

/// Takes connections in until one is the target's.
fn accept(listener: &TcpListener, waiting: &Arc<Waiting>) {
    let strangers = Arc::<Strangers>::default();
    while !waiting.ended.load(Ordering::Acquire) {
        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut ready, PollTimeout::from(TICK)), Ok(1..)) {
            continue;
        }
        let Ok((tcp, from)) = listener.accept() else { continue };
        let Ok((stranger, _)) = strangers.admit(&tcp) else { continue };
        let waiting = waiting.clone();
        // Each has its own thread, so that one that says nothing holds nobody up.
        std::thread::spawn(move || {
            match greet(&tcp, &waiting) {
                Ok(socket) => {
                    tracing::info!(%from, "the target's helper has come");
                    waiting.ended.store(true, Ordering::Release);
                    // A second one with the same token finds the place taken.
                    let _ = waiting.sender.try_send(socket);
                }
                Err(error) => tracing::warn!(%from, %error, "a connection came to nothing"),
            }
            drop(stranger);
        });
    }
}

/// Lets the peer show that it has read the stream.
fn greet(tcp: &TcpStream, waiting: &Waiting) -> io::Result<OwnedFd> {
    tcp.set_nonblocking(false)?;
    prepare(tcp)?;
    let tls = waiting.certificate.accept(tcp)?;
    let socket = TcpStream::from(OwnedFd::from(pump::start(tcp, Some(tls), None)?));
    let mut timed = Deadlined { stream: &socket, until: Instant::now() + GREETING };
    let greeting = control::read_greeting(&mut timed).map_err(io::Error::other)?;
    let is_known = greeting.poolskip == VERSION
        && greeting.connection == Connection::Side
        && greeting.token == waiting.token;
    if !is_known {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "its greeting is not the target's"));
    }
    socket.set_read_timeout(None)?;
    Ok(socket.into())
}

/// Addresses of this host that another may reach, the first few.
fn own_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = getifaddrs() else { return Vec::new() };
    let addresses = interfaces
        .filter(|one| one.flags.contains(InterfaceFlags::IFF_UP))
        .filter(|one| !one.flags.contains(InterfaceFlags::IFF_LOOPBACK))
        .filter_map(|one| {
            let address = one.address?;
            let four = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
            four.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
        });
    let usable = |address: &IpAddr| match address {
        IpAddr::V4(four) => !four.is_link_local(),
        IpAddr::V6(six) => !six.is_unicast_link_local(),
    };
    addresses.filter(usable).take(ADDRESSES_MAX).collect()
}
