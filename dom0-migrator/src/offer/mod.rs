//! The side channel of a plain `xl migrate`, where `LIBXL_SAVE_HELPER` alone is set on both hosts.
//!
//! Nobody has opened a connection for the two helpers then, and libxl has no way back from target to source. But there is a way there: the
//! stream. The source's helper listens on a port, makes a certificate for this one migration, and puts both into the stream's first
//! record, behind the headers; the target's helper reads it before anything else, connects, and gives the token that stood in it. So
//! the side channel is as trustworthy as the stream is, which is what ssh has made it, and nothing has to be set up for it: whoever can read the stream
//! may take part, and whom the target has connected to is shown by the certificate. A record of an optional type is ignored by
//! libxenguest, so that a target with libxl's own helper restores the domain as ever.
//!
//! ```text
//! source's helper                               target's helper
//!   │ listens, makes a certificate                 │
//!   │ ══ the stream: headers, OFFER ══════════════►│  port, token, certificate
//!   │ holds memory back for a while                │
//!   │ ◄── connects to where ssh came from, TLS ────│
//!   │ ◄── Greeting { side, token } ────────────────│
//!   │ ── hello, as on any side channel ───────────►│
//! ```
//!
//! Only what `xl migrate` sends has an offer: a stream that goes to a file is read by nobody who could come.

mod source;
mod target;
mod xl;

pub use source::{Listening, PATIENCE, listen};
pub use target::{Beginning, ssh_client, take};
pub use xl::{NotByXl, by_xl};

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::control::{STREAM_VERSION, Token};

/// Longest body of the record in bytes.
pub const BODY_MAX: usize = 16 << 10;
/// Addresses in an offer at most.
pub const ADDRESSES_MAX: usize = 8;

/// Where the side channel is to be had: the record's body, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The source's [`STREAM_VERSION`].
    pub stream_version: u16,
    /// What the target gives when it has connected.
    pub token: Token,
    /// The source's port.
    pub port: u16,
    /// The source's own addresses, for a target that does not know from where the stream comes.
    pub addresses: Vec<IpAddr>,
    /// The certificate of this migration, as PEM.
    pub certificate: String,
    /// Whether all pages are compared at the end.
    pub compare: bool,
}

/// Why there is no side channel.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// The record cannot be understood.
    #[error("the source's offer of a side channel cannot be understood: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The record is too long.
    #[error("the source's offer of a side channel has {0} bytes, {BODY_MAX} at most are read")]
    TooLong(u32),
    /// The helpers are of different releases.
    #[error(
        "the source's helper speaks version {0}, this one {STREAM_VERSION}: use the same release on both hosts"
    )]
    Version(u16),
    /// The source cannot be reached.
    #[error(
        "the source's helper cannot be reached on port {port}: {problem}; `side_port` in its configuration fixes the port"
    )]
    Unreachable {
        /// The port.
        port: u16,
        /// What was tried, and what came of it.
        problem: String,
    },
}

impl Offer {
    /// The record's body.
    ///
    /// # Errors
    /// [`OfferError`] when it is too long to be read.
    pub fn body(&self) -> Result<Vec<u8>, OfferError> {
        let body = serde_json::to_vec(self)?;
        if body.len() > BODY_MAX {
            return Err(OfferError::TooLong(u32::try_from(body.len()).unwrap_or(u32::MAX)));
        }
        Ok(body)
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`OfferError::Malformed`], [`OfferError::Version`].
    pub fn parse(body: &[u8]) -> Result<Self, OfferError> {
        /// What every version has.
        #[derive(Deserialize)]
        struct Versioned {
            stream_version: u16,
        }
        let Versioned { stream_version } = serde_json::from_slice(body)?;
        if stream_version != STREAM_VERSION {
            return Err(OfferError::Version(stream_version));
        }
        Ok(serde_json::from_slice(body)?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::os::fd::{AsFd as _, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::engine::xen_stream::{DOMAIN_HEADER, IMAGE_HEADER, RecordHeader, record};

    const HEADERS: usize = IMAGE_HEADER + DOMAIN_HEADER;

    /// A stream's beginning with a record of this type and body.
    fn stream(kind: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![7; HEADERS];
        bytes.extend_from_slice(&RecordHeader::bytes(kind, body.len()));
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// What a target finds at the beginning of a stream, and what it leaves in it.
    fn taken(bytes: &[u8]) -> (Beginning, Vec<u8>) {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        near.write_all(bytes).unwrap();
        drop(near);
        let beginning = take(far.as_fd()).unwrap();
        let mut rest = Vec::new();
        far.read_to_end(&mut rest).unwrap();
        (beginning, rest)
    }

    fn offered() -> (crate::engine::Coming, Listening, Offer) {
        let (coming, listening) = listen(0, true).unwrap();
        let offer = Offer::parse(&coming.offer).unwrap();
        (coming, listening, offer)
    }

    #[test]
    fn a_target_that_reads_the_offer_gets_the_side_channel() {
        let (coming, _listening, offer) = offered();
        let mut bytes = stream(record::OFFER, &coming.offer);
        bytes.extend(b"what follows");
        let (beginning, rest) = taken(&bytes);
        assert_eq!(beginning.bytes, [7; HEADERS]);
        assert_eq!(rest, b"what follows");
        let found = beginning.offer.unwrap().unwrap();
        assert!(found.compare);
        assert_eq!(found, offer);
        // From the offer's addresses alone, then from where ssh came.
        let mut near = UnixStream::from(found.accept(Some(Ipv4Addr::LOCALHOST.into())).unwrap());
        let mut far = UnixStream::from(coming.sockets.recv_timeout(Duration::from_secs(60)).unwrap());
        near.write_all(b"there").unwrap();
        far.write_all(b"back!").unwrap();
        let mut said = [0; 5];
        far.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"there");
        near.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"back!");
    }

    #[test]
    fn other_streams_are_left_as_they_are() {
        for bytes in [stream(record::VERIFY, b""), stream(1, b"12345678"), vec![1; 9], Vec::new()] {
            let (beginning, rest) = taken(&bytes);
            assert!(beginning.offer.is_none());
            assert_eq!([beginning.bytes, rest].concat(), bytes);
        }
    }

    #[test]
    fn a_bad_offer_is_left_out_and_named() {
        let (beginning, rest) = taken(&stream(record::OFFER, b"{}"));
        assert!(matches!(beginning.offer, Some(Err(OfferError::Malformed(_)))));
        assert_eq!((beginning.bytes.len(), rest.len()), (HEADERS, 0));
        let other = br#"{"stream_version":9,"something":"else"}"#;
        assert!(matches!(taken(&stream(record::OFFER, other)).0.offer, Some(Err(OfferError::Version(9)))));
        // One that is too long stays in the stream, where it does no harm.
        let long = stream(record::OFFER, &vec![b' '; BODY_MAX + 1]);
        let (beginning, rest) = taken(&long);
        assert!(matches!(beginning.offer, Some(Err(OfferError::TooLong(_)))));
        assert_eq!([beginning.bytes, rest].concat(), long);
    }

    #[test]
    fn strangers_do_not_get_the_side_channel_and_hold_nobody_up() {
        let (coming, _listening, offer) = offered();
        let address = (Ipv4Addr::LOCALHOST, offer.port);
        // One that says nothing, one that says no TLS.
        let _silent = TcpStream::connect(address).unwrap();
        TcpStream::connect(address).unwrap().write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        // One that has the certificate, but another token: it is closed.
        let stranger = Offer { token: Token::random().unwrap(), ..offer.clone() };
        let mut closed = UnixStream::from(stranger.accept(Some(Ipv4Addr::LOCALHOST.into())).unwrap());
        assert_eq!(closed.read(&mut [0]).unwrap_or(0), 0);
        assert!(coming.sockets.try_recv().is_err());
        drop(offer.accept(Some(Ipv4Addr::LOCALHOST.into())).unwrap());
        coming.sockets.recv_timeout(Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn a_host_with_another_certificate_is_not_the_source() {
        let (_coming, _listening, other) = offered();
        let (_coming, _listening, offer) = offered();
        let wrong = Offer { addresses: Vec::new(), port: other.port, ..offer };
        let error = wrong.accept(Some(Ipv4Addr::LOCALHOST.into())).unwrap_err().to_string();
        assert!(error.contains("127.0.0.1") && error.contains("side_port"), "{error}");
    }

    #[test]
    fn nobody_is_waited_for_once_it_is_over() {
        let (coming, listening, offer) = offered();
        drop(listening);
        // The channel's other end goes with the listener.
        assert!(coming.sockets.recv_timeout(Duration::from_secs(60)).is_err());
        let nobody = Offer { addresses: Vec::new(), ..offer };
        assert!(nobody.accept(Some(Ipv4Addr::LOCALHOST.into())).is_err());
        // A port that is taken is no port to listen on.
        let taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        assert!(listen(taken.local_addr().unwrap().port(), false).is_err());
    }

    #[test]
    fn any_address_in_the_offer_will_do() {
        let (coming, _listening, offer) = offered();
        let offer = Offer { addresses: vec![Ipv4Addr::LOCALHOST.into()], ..offer };
        let _socket: OwnedFd = offer.accept(None).unwrap();
        coming.sockets.recv_timeout(Duration::from_secs(60)).unwrap();
    }
}
