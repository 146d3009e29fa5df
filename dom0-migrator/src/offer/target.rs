//! The target's helper: it looks at the stream's beginning, and connects to where the offer says.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{ADDRESSES_MAX, BODY_MAX, Offer, OfferError};
use crate::command::connection::prepare;
use crate::command::pump;
use crate::command::tls::OneTime;
use crate::control::{self, Connection, Greeting, VERSION};
use crate::engine::xen_stream::{DOMAIN_HEADER, IMAGE_HEADER, RECORD_HEADER, RecordHeader, record};

/// How long one address may take to answer. The stream waits meanwhile.
const CONNECT: Duration = Duration::from_secs(3);

/// What a stream begins with.
#[derive(Debug)]
pub struct Beginning {
    /// The bytes that were read, but for an offer.
    pub bytes: Vec<u8>,
    /// The offer, if there is one.
    pub offer: Option<Result<Offer, OfferError>>,
}

/// Reads a stream's headers and the header of its first record, and takes an offer out of it. A stream that ends before has no offer.
///
/// # Errors
/// What reading gave.
pub fn take(stream: BorrowedFd<'_>) -> io::Result<Beginning> {
    const HEADERS: usize = IMAGE_HEADER + DOMAIN_HEADER;
    let mut stream = Stream(stream.try_clone_to_owned()?.into());
    let mut bytes = Vec::new();
    (&mut stream).take((HEADERS + RECORD_HEADER) as u64).read_to_end(&mut bytes)?;
    let head: Option<[u8; RECORD_HEADER]> = bytes.get(HEADERS..).and_then(|head| head.try_into().ok());
    let header = head.map(|head| RecordHeader::parse(&head, HEADERS as u64));
    let Some(header) = header.filter(|header| header.kind == record::OFFER) else {
        return Ok(Beginning { bytes, offer: None });
    };
    if header.length as usize > BODY_MAX {
        return Ok(Beginning { bytes, offer: Some(Err(OfferError::TooLong(header.length))) });
    }
    let mut body = Vec::new();
    (&mut stream).take(header.padded()).read_to_end(&mut body)?;
    body.truncate(header.length as usize);
    bytes.truncate(HEADERS);
    Ok(Beginning { bytes, offer: Some(Offer::parse(&body)) })
}

/// A descriptor that somebody may have made non-blocking.
struct Stream(std::fs::File);

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                        Ok(_) | Err(nix::Error::EINTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                other => return other,
            }
        }
    }
}

/// Where the ssh connection comes from that this process belongs to: sshd says so in the environment.
pub fn ssh_client() -> Option<IpAddr> {
    client_of(&std::env::var("SSH_CONNECTION").ok()?)
}

/// The client in `SSH_CONNECTION`: its address and port, then the server's.
fn client_of(connection: &str) -> Option<IpAddr> {
    connection.split_whitespace().next()?.parse().ok()
}

impl Offer {
    /// Connects: to where ssh came from, if that is known, then to the source's own addresses.
    ///
    /// # Errors
    /// [`OfferError::Unreachable`].
    pub fn accept(&self, ssh: Option<IpAddr>) -> Result<OwnedFd, OfferError> {
        let mut addresses: Vec<IpAddr> = ssh.into_iter().collect();
        for address in self.addresses.iter().take(ADDRESSES_MAX) {
            if !addresses.contains(address) {
                addresses.push(*address);
            }
        }
        let mut problems = Vec::new();
        for address in addresses {
            match self.connect(address) {
                Ok(socket) => return Ok(socket),
                Err(error) => problems.push(format!("{address}: {error}")),
            }
        }
        let none = || "it names no address, and none is in SSH_CONNECTION".to_owned();
        let problem = if problems.is_empty() { none() } else { problems.join(", ") };
        Err(OfferError::Unreachable { port: self.port, problem })
    }

    fn connect(&self, address: IpAddr) -> io::Result<OwnedFd> {
        let tcp = TcpStream::connect_timeout(&SocketAddr::new(address, self.port), CONNECT)?;
        prepare(&tcp)?;
        let tls = OneTime::connect(&self.certificate, &tcp)?;
        let mut socket = pump::start(&tcp, Some(tls), None)?;
        let greeting =
            Greeting { poolskip: VERSION, connection: Connection::Side, token: self.token.clone(), lane: 0 };
        control::write_line(&mut socket, &greeting).map_err(io::Error::other)?;
        Ok(socket.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sshd_says_where_its_client_is() {
        assert_eq!(client_of("10.9.0.1 40312 10.9.0.2 22"), Some("10.9.0.1".parse().unwrap()));
        assert_eq!(client_of("fd00::1 40312 fd00::2 22"), Some("fd00::1".parse().unwrap()));
        // An address that means something on one host alone.
        assert_eq!(client_of("fe80::1%eth0 40312 fe80::2%eth0 22"), None);
        assert_eq!(client_of(""), None);
    }
}
