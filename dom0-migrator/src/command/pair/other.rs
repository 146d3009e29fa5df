//! The other host's part in `pair`: a request for a certificate, and its acceptance.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use clap::Args;
use nix::fcntl::{RenameFlags, renameat2};
use rcgen::{KeyPair, PublicKeyData as _};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use super::{Granted, PairError, Requested, hostname};
use crate::command::certificates::{self, CertificateError, Signer};
use crate::command::configuration::Configuration;
use crate::command::doctor::fingerprint;
use crate::command::tls::{AUTHORITY, KEY};
use crate::command::{EXIT_FAILED, EXIT_MIGRATED};

/// Longest answer that is read.
const GRANTED_MAX: u64 = 1 << 20;

/// Options of `certificates accept`.
#[derive(Args, Clone, Debug)]
pub struct Accept {
    /// Replace certificates of another authority.
    #[arg(long)]
    pub replace: bool,
}

/// Where a key waits for its certificate.
fn pending(directory: &Path) -> PathBuf {
    let mut name = directory.file_name().unwrap_or_default().to_owned();
    name.push(".pending");
    directory.with_file_name(name)
}

/// Makes a key, and prints a request for a certificate for it. What is in use stays so until `accept`.
pub fn request(configuration: &Configuration) -> u8 {
    done(requested(&configuration.certificates).map(|requested| {
        println!("{}", serde_json::to_string(&requested).unwrap_or_default());
    }))
}

fn requested(directory: &Path) -> Result<Requested, PairError> {
    let mut names = hostname();
    if names.is_empty() {
        names.push("host".into());
    }
    let failed =
        |problem: rcgen::Error| PairError::Making { what: "a request".into(), problem: problem.to_string() };
    let (key, request) = certificates::request(&names).map_err(failed)?;
    let pending = pending(directory);
    let at = |source| CertificateError::Io { path: pending.clone(), source };
    match fs::remove_dir_all(&pending) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(error).into()),
        _ => {}
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&pending).map_err(at)?;
    certificates::write(&pending.join(KEY), &key, 0o600)?;
    Ok(Requested { names, request, authority: fingerprint(&directory.join(AUTHORITY)).ok() })
}

/// Options of `certificates grant`.
#[derive(Args, Clone, Debug)]
pub struct Grant {
    /// Names of the host that asks, by which others connect to it.
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// The authority, which is made if there is none.
    #[arg(long, value_name = "DIRECTORY", default_value = super::AUTHORITY_DIRECTORY)]
    pub authority: PathBuf,
}

/// Reads a request, and prints what is granted: `null` where the host has a certificate of this authority.
pub fn grant(options: &Grant) -> u8 {
    done(granted(options).map(|granted| println!("{}", serde_json::to_string(&granted).unwrap_or_default())))
}

fn granted(options: &Grant) -> Result<Option<Granted>, PairError> {
    let failed = |problem: String| PairError::Making { what: "the request".into(), problem };
    let mut text = Vec::new();
    io::stdin().take(GRANTED_MAX).read_to_end(&mut text).map_err(|error| failed(error.to_string()))?;
    let requested: Requested = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
    let authority = Signer::open(&options.authority)?;
    let print = fingerprint(&options.authority.join(AUTHORITY)).map_err(failed)?;
    if requested.authority == Some(print) {
        return Ok(None);
    }
    let mut names = options.names.clone();
    names.extend(requested.names);
    names.iter().try_for_each(|name| certificates::check_name(name))?;
    names.dedup();
    let certificate =
        authority.sign(&requested.request, &names).map_err(|error| failed(error.to_string()))?;
    Ok(Some(Granted { certificate, authority: authority.certificate }))
}

/// Reads what was granted, and takes it into use; `null` means that what is there holds, and the request is forgotten.
pub fn accept(options: &Accept, configuration: &Configuration) -> u8 {
    let mut text = Vec::new();
    let read = io::stdin().take(GRANTED_MAX).read_to_end(&mut text).map_err(|error| error.to_string());
    let granted = read
        .and_then(|_| serde_json::from_slice::<Option<Granted>>(&text).map_err(|error| error.to_string()))
        .map_err(|problem| PairError::Making { what: "what was granted".into(), problem });
    let directory = &configuration.certificates;
    done(
        granted
            .and_then(|granted| match granted {
                Some(granted) => accepted(directory, &granted, options.replace),
                None => forget(directory),
            })
            .map(|()| println!("\"accepted\"")),
    )
}

/// Removes a key that waits for no certificate any more.
fn forget(directory: &Path) -> Result<(), PairError> {
    let path = pending(directory);
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CertificateError::Io { path, source: error }.into())
        }
        _ => Ok(()),
    }
}

fn done(result: Result<(), PairError>) -> u8 {
    match result {
        Ok(()) => EXIT_MIGRATED,
        Err(error) => {
            eprintln!("dom0-migrator: {error}");
            EXIT_FAILED
        }
    }
}

fn accepted(directory: &Path, granted: &Granted, replace: bool) -> Result<(), PairError> {
    let failed = |problem: String| PairError::Making { what: "what was granted".into(), problem };
    let pending = pending(directory);
    let key = fs::read_to_string(pending.join(KEY))
        .map_err(|error| failed(format!("no request is pending here ({}: {error})", pending.display())))?;
    let own = KeyPair::from_pem(&key).map_err(|error| failed(error.to_string()))?;
    let der =
        |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| failed(error.to_string()));
    let (certificate, authority) = (der(&granted.certificate)?, der(&granted.authority)?);
    let parsed = |der| {
        X509Certificate::from_der(der).map(|(_, parsed)| parsed).map_err(|error| failed(error.to_string()))
    };
    let (certificate, authority) = (parsed(&certificate)?, parsed(&authority)?);
    if certificate.public_key().raw != own.subject_public_key_info() {
        return Err(failed("the certificate is for another key than the one that was requested here".into()));
    }
    certificate
        .verify_signature(Some(authority.public_key()))
        .map_err(|_| failed("the certificate was not signed by the authority beside it".into()))?;
    let before = directory.join(AUTHORITY);
    let same = fs::read_to_string(&before).is_ok_and(|known| known == granted.authority);
    if before.exists() && !same && !replace {
        let known = fingerprint(&before).unwrap_or_else(|problem| problem);
        return Err(PairError::Other { host: "this host".into(), fingerprint: known });
    }
    install(directory, &key, &granted.certificate, &granted.authority)?;
    forget(directory)
}

/// Puts three files in place of those that are there, all at once: a host is never left with a key and another one's certificate.
///
/// # Errors
/// [`CertificateError::Io`]; then what was there is there still.
pub fn install(
    directory: &Path,
    key: &str,
    certificate: &str,
    authority: &str,
) -> Result<(), CertificateError> {
    let mut name = directory.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = directory.with_file_name(name);
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| CertificateError::Io { path, source }
    };
    match fs::remove_dir_all(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&new)(error)),
        _ => {}
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&new).map_err(at(&new))?;
    certificates::write_host(&new, key, certificate, authority)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o700)).map_err(at(&new))?;
    if directory.exists() {
        renameat2(nix::fcntl::AT_FDCWD, &new, nix::fcntl::AT_FDCWD, directory, RenameFlags::RENAME_EXCHANGE)
            .map_err(|error| at(directory)(error.into()))?;
        // What was there before; that it goes is not what counts.
        let _ = fs::remove_dir_all(&new);
        Ok(())
    } else {
        fs::rename(&new, directory).map_err(at(directory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tls::Identity;

    #[test]
    fn a_certificate_is_accepted_for_the_key_that_was_made_here_and_for_no_other() {
        let work = tempfile::tempdir().unwrap();
        let own = work.path().join("certificates");
        let signer = Signer::open(&work.path().join("authority")).unwrap();
        let first = requested(&own).unwrap();
        assert_eq!(first.authority, None);
        let names = vec!["host-b".to_owned(), "10.0.0.2".to_owned()];
        let stale = Granted {
            certificate: signer.sign(&first.request, &names).unwrap(),
            authority: signer.certificate.clone(),
        };
        let again = requested(&own).unwrap();
        let error = accepted(&own, &stale, false).unwrap_err().to_string();
        assert!(error.contains("another key"), "{error}");
        assert!(!own.exists());
        let granted = Granted { certificate: signer.sign(&again.request, &names).unwrap(), ..stale.clone() };
        accepted(&own, &granted, false).unwrap();
        Identity::load(&own).unwrap();
        assert!(!pending(&own).exists());
        assert_eq!(fs::metadata(own.join(KEY)).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(accepted(&own, &granted, false).unwrap_err().to_string().contains("no request is pending"));
    }

    #[test]
    fn another_authority_is_believed_only_when_told_to() {
        let work = tempfile::tempdir().unwrap();
        let own = work.path().join("certificates");
        let names = vec!["host-b".to_owned()];
        let grant = |signer: &Signer, requested: &Requested| Granted {
            certificate: signer.sign(&requested.request, &names).unwrap(),
            authority: signer.certificate.clone(),
        };
        let [one, two] = ["one", "two"].map(|name| Signer::open(&work.path().join(name)).unwrap());
        let asked = requested(&own).unwrap();
        accepted(&own, &grant(&one, &asked), false).unwrap();
        let before = fs::read_to_string(own.join(AUTHORITY)).unwrap();
        let asked = requested(&own).unwrap();
        assert!(asked.authority.is_some());
        forget(&own).unwrap();
        assert!(!pending(&own).exists());
        let asked = requested(&own).unwrap();
        let error = accepted(&own, &grant(&two, &asked), false).unwrap_err();
        assert!(matches!(error, PairError::Other { .. }), "{error}");
        assert_eq!(fs::read_to_string(own.join(AUTHORITY)).unwrap(), before);
        // Signed by one, with the other one's certificate beside it.
        let mixed = Granted { authority: two.certificate.clone(), ..grant(&one, &asked) };
        assert!(accepted(&own, &mixed, true).unwrap_err().to_string().contains("not signed"));
        accepted(&own, &grant(&two, &asked), true).unwrap();
        assert_ne!(fs::read_to_string(own.join(AUTHORITY)).unwrap(), before);
        Identity::load(&own).unwrap();
        let left: Vec<_> =
            fs::read_dir(work.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }
}
