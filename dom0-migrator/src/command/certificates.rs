//! `certificates make`: a small authority of the operator's own, and a certificate for each host.
//!
//! ```text
//! DIR/authority.pem, authority-key.pem     stays where it is made; signs more hosts later
//! DIR/HOST/certificate.pem, key.pem, authority.pem     goes to HOST as /etc/poolskip/certificates
//! ```

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};

use super::tls::{AUTHORITY, CERTIFICATE, KEY};
use super::{CertificatesMake, EXIT_FAILED, EXIT_MIGRATED};

/// The authority's key.
const AUTHORITY_KEY: &str = "authority-key.pem";
/// Years that an authority holds.
const AUTHORITY_YEARS: i32 = 10;
/// Years that a host's certificate holds.
const HOST_YEARS: i32 = 3;

/// Why certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not a name that can be put into a certificate.
    #[error("{name:?}: {source}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        source: rcgen::Error,
    },
    /// Not a name that can be a directory's.
    #[error("{0:?} is neither a host's name nor an address")]
    NotAName(String),
    /// The authority that is there cannot be used.
    #[error("the authority in {path}: {source}")]
    Authority {
        /// Its directory.
        path: PathBuf,
        /// What is wrong with it.
        source: rcgen::Error,
    },
}

/// Makes them, and says what to do with them.
pub fn run(options: &CertificatesMake) -> u8 {
    match make(&options.out, &options.names) {
        Ok(()) => {
            for name in &options.names {
                let directory = options.out.join(name);
                println!("{}: copy it to {name} as {}", directory.display(), super::tls::DIRECTORY);
            }
            println!("{}: keep it here, and to yourself", options.out.join(AUTHORITY_KEY).display());
            EXIT_MIGRATED
        }
        Err(error) => {
            eprintln!("dom0-migrator: {error}");
            EXIT_FAILED
        }
    }
}

/// Makes a certificate for each host, signed by the authority in `out`, which is made if it is not there.
///
/// # Errors
/// [`CertificateError`].
pub fn make(out: &Path, names: &[String]) -> Result<(), CertificateError> {
    names.iter().try_for_each(|name| check_name(name))?;
    make_directory(out)?;
    let authority = Signer::open(out)?;
    for name in names {
        let bad = |source| CertificateError::Name { name: name.clone(), source };
        let key = KeyPair::generate().map_err(bad)?;
        let host =
            host(std::slice::from_ref(name)).map_err(bad)?.signed_by(&key, &authority.issuer).map_err(bad)?;
        write_host(&out.join(name), &key.serialize_pem(), &host.pem(), &authority.certificate)?;
    }
    Ok(())
}

/// Whether a name can be a host's.
///
/// # Errors
/// [`CertificateError::NotAName`].
pub fn check_name(name: &str) -> Result<(), CertificateError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(CertificateError::NotAName(name.to_owned()));
    }
    Ok(())
}

/// The authority in a directory.
pub struct Signer {
    /// Its certificate, as PEM.
    pub certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Signer {
    /// Reads the authority in a directory, or makes one where there is none.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn open(directory: &Path) -> Result<Self, CertificateError> {
        let failed = |source| CertificateError::Authority { path: directory.to_owned(), source };
        let (certificate_file, key_file) = (directory.join(AUTHORITY), directory.join(AUTHORITY_KEY));
        let (certificate, key) = if key_file.exists() {
            (read(&certificate_file)?, read(&key_file)?)
        } else {
            make_directory(directory)?;
            let key = KeyPair::generate().map_err(failed)?;
            let certificate = authority().self_signed(&key).map_err(failed)?.pem();
            write(&key_file, &key.serialize_pem(), 0o600)?;
            write(&certificate_file, &certificate, 0o644)?;
            (certificate, key.serialize_pem())
        };
        let key = KeyPair::from_pem(&key).map_err(failed)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(failed)?;
        Ok(Self { certificate, issuer })
    }

    /// Whether a directory has one.
    pub fn is_there(directory: &Path) -> bool {
        directory.join(AUTHORITY_KEY).exists()
    }

    /// A certificate for a key that is not here, as PEM: of the request only the key counts.
    ///
    /// # Errors
    /// When the request is none, is not signed by its key, or a name cannot be put into a certificate.
    pub fn sign(&self, request: &str, names: &[String]) -> Result<String, rcgen::Error> {
        let mut request = CertificateSigningRequestParams::from_pem(request)?;
        request.params = host(names)?;
        Ok(request.signed_by(&self.issuer)?.pem())
    }
}

/// A new key, and a request for a certificate for it, both as PEM.
///
/// # Errors
/// When no key can be made.
pub fn request(names: &[String]) -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    // Names and no more: what a certificate says beside them, its signer decides.
    let request = CertificateParams::new(names)?.serialize_request(&key)?;
    Ok((key.serialize_pem(), request.pem()?))
}

/// Writes what a host needs to a directory.
///
/// # Errors
/// [`CertificateError::Io`].
pub fn write_host(
    directory: &Path,
    key: &str,
    certificate: &str,
    authority: &str,
) -> Result<(), CertificateError> {
    make_directory(directory)?;
    write(&directory.join(KEY), key, 0o600)?;
    write(&directory.join(CERTIFICATE), certificate, 0o644)?;
    write(&directory.join(AUTHORITY), authority, 0o644)
}

/// This year, near enough for a certificate's.
fn year() -> i32 {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    1970 + i32::try_from(seconds / 31_556_952).unwrap_or(0)
}

fn valid(mut params: CertificateParams, name: &str, years: i32) -> CertificateParams {
    params.distinguished_name.push(DnType::CommonName, name);
    // From before the new year, since clocks differ.
    params.not_before = date_time_ymd(year() - 1, 1, 1);
    params.not_after = date_time_ymd(year() + years, 12, 31);
    params
}

fn authority() -> CertificateParams {
    let mut params = valid(CertificateParams::default(), "Poolskip migration authority", AUTHORITY_YEARS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn host(names: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let first = names.first().map_or("", String::as_str);
    // Addresses become addresses, other names DNS names.
    let mut params = valid(CertificateParams::new(names)?, first, HOST_YEARS);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> CertificateError + '_ {
    move |source| CertificateError::Io { path: path.to_owned(), source }
}

fn make_directory(path: &Path) -> Result<(), CertificateError> {
    fs::create_dir_all(path).map_err(at(path))
}

fn read(path: &Path) -> Result<String, CertificateError> {
    fs::read_to_string(path).map_err(at(path))
}

/// Writes a file that only its owner, or everybody, may read, from the first byte on.
///
/// # Errors
/// [`CertificateError::Io`].
pub fn write(path: &Path, text: &str, mode: u32) -> Result<(), CertificateError> {
    let _ = fs::remove_file(path);
    let file = File::options().create_new(true).write(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(at(path))
}
