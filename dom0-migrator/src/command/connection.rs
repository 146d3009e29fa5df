//! TCP connections between the hosts.

use std::io::{self, BufReader};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::DEFAULT_PORT;
use super::bundle::{BlocksReport, Bundle, Compression};
use super::pump::{self, Bandwidth};
use super::tls::Identity;
use crate::control::{self, Connection, Greeting, LineError, Token, VERSION};

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a silent connection is believed in: after this, probes; then the peer is taken for dead.
const KEEPALIVE_IDLE_SECONDS: u32 = 20;

/// `HOST` or `HOST:PORT` with a port.
pub fn with_port(target: &str) -> String {
    let has_port = match target.rsplit_once(':') {
        Some((host, port)) => port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']')),
        None => false,
    };
    match (has_port, target.contains(':') && !target.starts_with('[')) {
        (true, _) => target.to_owned(),
        (false, true) => format!("[{target}]:{DEFAULT_PORT}"),
        (false, false) => format!("{target}:{DEFAULT_PORT}"),
    }
}

/// How connections between the hosts are made.
#[derive(Clone, Debug, Default)]
pub struct Transport {
    /// Who this host is; none where connections are plain.
    pub identity: Option<Identity>,
    /// The limit on what is sent.
    pub bandwidth: Option<Arc<Bandwidth>>,
}

/// A connection between the hosts: what is read and written here, and what carries it.
#[derive(Debug)]
pub struct Wire {
    /// What is read and written.
    pub socket: TcpStream,
    carrier: Carrier,
}

/// What carries what is read and written.
#[derive(Debug)]
enum Carrier {
    /// A TCP connection: the same socket, where nothing stands between; else the socket is one end of a socket pair.
    One(TcpStream),
    /// Several.
    Several(Bundle),
}

impl Transport {
    /// Takes a connection that has come. Not longer than a TLS handshake may take, whatever the peer does.
    ///
    /// # Errors
    /// What the system says, or why the peer is refused.
    pub fn accept(&self, tcp: TcpStream) -> io::Result<Wire> {
        prepare(&tcp)?;
        let tls = self.identity.as_ref().map(|identity| identity.accept(&tcp)).transpose()?;
        self.wire(tcp, tls)
    }

    fn connect(&self, address: &SocketAddr, host: &str) -> io::Result<Wire> {
        let tcp = TcpStream::connect_timeout(address, CONNECT)?;
        prepare(&tcp)?;
        let tls = self.identity.as_ref().map(|identity| identity.connect(&tcp, host)).transpose()?;
        self.wire(tcp, tls)
    }

    fn wire(&self, tcp: TcpStream, tls: Option<rustls::Connection>) -> io::Result<Wire> {
        let socket = if tls.is_some() || self.bandwidth.is_some() {
            // Of a socket, only what every kind of stream socket can do is used.
            TcpStream::from(OwnedFd::from(pump::start(&tcp, tls, self.bandwidth.clone())?))
        } else {
            tcp.try_clone()?
        };
        Ok(Wire { socket, carrier: Carrier::One(tcp) })
    }
}

impl Wire {
    /// The one descriptor, for another process.
    pub fn into_socket(self) -> TcpStream {
        self.socket
    }

    /// Several as one: what is written goes in blocks, compressed as it is wanted, and comes out in order.
    ///
    /// # Errors
    /// When there is no socket or no thread to be had.
    pub fn of_several(lanes: Vec<Self>, compression: Compression) -> io::Result<Self> {
        let (socket, bundle) = Bundle::start(lanes, compression)?;
        Ok(Self { socket, carrier: Carrier::Several(bundle) })
    }

    /// Bytes on the network, as the kernel counts them; 0 where it does not.
    pub fn carried(&self) -> Carried {
        match &self.carrier {
            Carrier::One(tcp) => carried(tcp).unwrap_or_default(),
            Carrier::Several(bundle) => bundle.carried(),
        }
    }

    /// What went in blocks, where it did.
    pub fn blocks(&self) -> Option<BlocksReport> {
        match &self.carrier {
            Carrier::One(_) => None,
            Carrier::Several(bundle) => Some(bundle.report()),
        }
    }

    /// One that no network carries.
    #[cfg(test)]
    pub fn of_socket(socket: TcpStream) -> Self {
        let carrier = Carrier::One(socket.try_clone().unwrap());
        Self { socket, carrier }
    }

    /// Ends it in both directions.
    pub fn hang_up(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Connects and greets.
///
/// # Errors
/// The last address's error.
pub fn connect(
    target: &str,
    connection: Connection,
    token: &Token,
    transport: &Transport,
) -> Result<Wire, LineError> {
    connect_lane(target, connection, 0, token, transport)
}

/// Connects and greets, as one of several connections of a stream.
///
/// # Errors
/// The last address's error.
pub fn connect_lane(
    target: &str,
    connection: Connection,
    lane: u16,
    token: &Token,
    transport: &Transport,
) -> Result<Wire, LineError> {
    let host = target.rsplit_once(':').map_or(target, |(host, _)| host);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no address of that name");
    for address in target.to_socket_addrs()? {
        match transport.connect(&address, host) {
            Ok(mut wire) => {
                let greeting = Greeting { poolskip: VERSION, connection, token: token.clone(), lane };
                control::write_line(&mut wire.socket, &greeting)?;
                return Ok(wire);
            }
            Err(error) => last = error,
        }
    }
    Err(last.into())
}

/// Sends without delay, and notices a peer that is gone.
///
/// # Errors
/// What the system says.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_SECONDS)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &5)?;
    setsockopt(stream, sockopt::TcpKeepCount, &6)?;
    Ok(())
}

/// A reader of lines beside the connection itself.
///
/// # Errors
/// What the system says.
pub fn reader(stream: &TcpStream) -> io::Result<BufReader<TcpStream>> {
    Ok(BufReader::new(stream.try_clone()?))
}

/// Bytes that a connection has carried, as the kernel counts them: what the other side has acknowledged, and what came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// To the other side.
    pub sent: u64,
    /// From the other side.
    pub received: u64,
}

impl Carried {
    /// Both directions.
    pub fn total(self) -> u64 {
        self.sent + self.received
    }
}

/// Beginning of `struct tcp_info` (`linux/tcp.h`), whose fields never move; the C library's own ends before the counters.
#[repr(C)]
struct TcpInfo {
    options: [u8; 8],
    times_and_windows: [u32; 24],
    pacing_rate: u64,
    max_pacing_rate: u64,
    bytes_acked: u64,
    bytes_received: u64,
}

const _: () = assert!(std::mem::offset_of!(TcpInfo, bytes_acked) == 120);

/// What a connection has carried.
///
/// # Errors
/// What the kernel says, or that it is older than 4.1 and does not count.
fn carried(stream: &TcpStream) -> io::Result<Carried> {
    let mut info = MaybeUninit::<TcpInfo>::zeroed();
    let mut length = size_of::<TcpInfo>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to the structure.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    if (length as usize) < size_of::<TcpInfo>() {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel does not count a connection's bytes",
        ));
    }
    // SAFETY: all of it is integers, zeroed or written by the kernel.
    let info = unsafe { info.assume_init() };
    // The kernel counts the connection's opening as one byte.
    Ok(Carried { sent: info.bytes_acked.saturating_sub(1), received: info.bytes_received })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    #[test]
    fn a_port_is_added_where_there_is_none() {
        assert_eq!(with_port("10.9.0.2"), "10.9.0.2:8002");
        assert_eq!(with_port("10.9.0.2:9000"), "10.9.0.2:9000");
        assert_eq!(with_port("host-b"), "host-b:8002");
        assert_eq!(with_port("fd00::2"), "[fd00::2]:8002");
        assert_eq!(with_port("[fd00::2]"), "[fd00::2]:8002");
        assert_eq!(with_port("[fd00::2]:9000"), "[fd00::2]:9000");
    }

    #[test]
    fn the_kernel_counts_what_goes_and_comes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let token = Token::random().unwrap();
        let far = std::thread::spawn(move || {
            let (mut far, _) = listener.accept().unwrap();
            let greeting = control::read_greeting(&mut far).unwrap();
            far.write_all(&[0; 100]).unwrap();
            let mut rest = Vec::new();
            far.read_to_end(&mut rest).unwrap();
            (greeting, rest.len())
        });
        let mut near = connect(&address, Connection::Side, &token, &Transport::default()).unwrap();
        near.socket.write_all(&[0; 3000]).unwrap();
        near.socket.read_exact(&mut [0; 100]).unwrap();
        near.socket.shutdown(Shutdown::Write).unwrap();
        let (greeting, rest) = far.join().unwrap();
        assert_eq!((greeting.connection, rest), (Connection::Side, 3000));
        let greeted = serde_json::to_vec(&greeting).unwrap().len() as u64 + 1;
        let carried = near.carried();
        // The closing of a side counts as one byte more.
        assert!((100..=101).contains(&carried.received), "{carried:?}");
        assert!((3000 + greeted..=3001 + greeted).contains(&carried.sent), "{carried:?}");
    }
}
