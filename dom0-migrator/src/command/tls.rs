//! TLS between the hosts: both show a certificate, and take the other's only if the operator's own authority has signed it.

use std::io::{self, Read};
use std::net::{IpAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

/// Where the certificates of a host lie.
pub const DIRECTORY: &str = "/etc/poolskip/certificates";
/// The host's certificate, in its directory.
pub const CERTIFICATE: &str = "certificate.pem";
/// Its key.
pub const KEY: &str = "key.pem";
/// Who signs.
pub const AUTHORITY: &str = "authority.pem";
/// How long a handshake may take, all of it.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or cannot be read.
    #[error(
        "{path}: {source}; `dom0-migrator certificates make` makes certificates, `--plain` does without on a network that only the \
         hosts share"
    )]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: pem::Error,
    },
    /// The files do not fit together, or are not usable.
    #[error("the certificates in {directory}: {problem}")]
    Unusable {
        /// Their directory.
        directory: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// A host's certificate, and whom it believes.
#[derive(Clone, Debug)]
pub struct Identity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Identity {
    /// Reads a host's directory.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(directory: &Path) -> Result<Self, TlsError> {
        let file = |name: &str| directory.join(name);
        let bad = |path: PathBuf| move |source| TlsError::File { path, source };
        let unusable = |problem: String| TlsError::Unusable { directory: directory.to_owned(), problem };
        let certificates = |name: &str| {
            CertificateDer::pem_file_iter(file(name))
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(bad(file(name)))
        };
        let own = certificates(CERTIFICATE)?;
        let key = PrivateKeyDer::from_pem_file(file(KEY)).map_err(bad(file(KEY)))?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(AUTHORITY)? {
            roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let failed = |error: rustls::Error| unusable(error.to_string());
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(own.clone(), key.clone_key())
            .map_err(failed)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| unusable(error.to_string()))?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(own, key)
            .map_err(failed)?;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    /// Begins TLS as the one who connects; the other's certificate must have the name that was connected to.
    ///
    /// # Errors
    /// What the handshake says.
    pub fn connect(&self, tcp: &TcpStream, host: &str) -> io::Result<Connection> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = match host.parse::<IpAddr>() {
            Ok(address) => ServerName::from(address),
            Err(_) => ServerName::try_from(host.to_owned()).map_err(io::Error::other)?,
        };
        let connection = ClientConnection::new(self.client.clone(), name).map_err(io::Error::other)?;
        shake_hands(connection.into(), tcp)
    }

    /// Begins TLS as the one who was connected to.
    ///
    /// # Errors
    /// What the handshake says: no certificate, one of another authority, one that has expired.
    pub fn accept(&self, tcp: &TcpStream) -> io::Result<Connection> {
        let connection = ServerConnection::new(self.server.clone()).map_err(io::Error::other)?;
        shake_hands(connection.into(), tcp)
    }
}

/// The name in a [`OneTime`] certificate: nothing is resolved by it.
const ONE_TIME_NAME: &str = "one-time.poolskip.invalid";

/// A certificate for a single migration, made by the side that is connected to. The one who connects knows it by another way, and takes no
/// other; who connects is shown by what it says then.
#[derive(Debug)]
pub struct OneTime {
    server: Arc<ServerConfig>,
    pem: String,
}

impl OneTime {
    /// Makes one.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn make() -> io::Result<Self> {
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let certificate = CertificateParams::new(vec![ONE_TIME_NAME.to_owned()])
            .and_then(|params| params.self_signed(&key))
            .map_err(io::Error::other)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(io::Error::other)?;
        let server = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .map_err(io::Error::other)?;
        Ok(Self { server: Arc::new(server), pem: certificate.pem() })
    }

    /// What the one who connects is to be given.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Begins TLS as the one who was connected to.
    ///
    /// # Errors
    /// What the handshake says.
    pub fn accept(&self, tcp: &TcpStream) -> io::Result<Connection> {
        let connection = ServerConnection::new(self.server.clone()).map_err(io::Error::other)?;
        shake_hands(connection.into(), tcp)
    }

    /// Begins TLS as the one who connects, with somebody who has this certificate's key.
    ///
    /// # Errors
    /// What the handshake says, or that this is no certificate.
    pub fn connect(pem: &str, tcp: &TcpStream) -> io::Result<Connection> {
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(io::Error::other)?;
        let mut roots = RootCertStore::empty();
        roots.add(certificate).map_err(io::Error::other)?;
        let client = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(ONE_TIME_NAME).map_err(io::Error::other)?;
        let connection = ClientConnection::new(Arc::new(client), name).map_err(io::Error::other)?;
        shake_hands(connection.into(), tcp)
    }
}

/// Completes a handshake in the time that it has, whatever the peer does.
fn shake_hands(mut connection: Connection, tcp: &TcpStream) -> io::Result<Connection> {
    let until = Instant::now() + HANDSHAKE;
    let mut timed = Deadlined { stream: tcp, until };
    tcp.set_write_timeout(Some(HANDSHAKE))?;
    let mut done = Ok(());
    while done.is_ok() && (connection.is_handshaking() || connection.wants_write()) {
        if connection.wants_write() {
            connection.write_tls(&mut &*tcp)?;
            continue;
        }
        if connection.read_tls(&mut timed)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer ended the TLS handshake"));
        }
        done = connection.process_new_packets().map(drop);
    }
    if let Err(error) = done {
        // The alert that says why.
        let _ = connection.write_tls(&mut &*tcp);
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("TLS: {error}")));
    }
    tcp.set_write_timeout(None)?;
    tcp.set_read_timeout(None)?;
    Ok(connection)
}

/// Reads until a moment, however slowly the bytes come.
#[derive(Debug)]
pub struct Deadlined<'a> {
    /// What is read.
    pub stream: &'a TcpStream,
    /// The moment.
    pub until: Instant,
}

impl Read for Deadlined<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer is too slow"));
        }
        self.stream.set_read_timeout(Some(left))?;
        match (&*self.stream).read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "the peer is too slow"))
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, Issuer, KeyPair, date_time_ymd};
    use std::net::TcpListener;

    /// What the one who is connected to says of a peer with the certificate of `peer`.
    fn accepted(own: &Path, peer: &Path) -> io::Result<()> {
        let (own, peer) = (Identity::load(own).unwrap(), Identity::load(peer).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(peer.connect(&near, "127.0.0.1")));
            own.accept(&far).map(drop)
        })
    }

    #[test]
    fn a_certificate_that_has_expired_is_refused_as_such() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["127.0.0.1".to_owned(), "old".to_owned()];
        super::super::certificates::make(directory.path(), &names).unwrap();
        let (own, old) = (directory.path().join("127.0.0.1"), directory.path().join("old"));
        accepted(&own, &old).unwrap();
        let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
        let key = KeyPair::from_pem(&read("authority-key.pem")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&read(AUTHORITY), key).unwrap();
        let mut params = CertificateParams::new(vec!["old".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        let key = KeyPair::generate().unwrap();
        std::fs::write(old.join(CERTIFICATE), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        std::fs::write(old.join(KEY), key.serialize_pem()).unwrap();
        let error = accepted(&own, &old).unwrap_err().to_string();
        assert!(error.contains("xpired"), "{error}");
    }

    #[test]
    fn what_is_missing_is_named_with_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let error = Identity::load(directory.path()).unwrap_err().to_string();
        assert!(error.contains(CERTIFICATE) && error.contains("certificates make"), "{error}");
    }
}
