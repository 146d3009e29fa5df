//! What a host's certificates say: whose they are, how long they hold, and whether the key is for its host alone.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

use crate::command::tls::{AUTHORITY, CERTIFICATE, Identity, KEY};
use crate::examination::Finding;

/// Days before its end from which on a certificate is worth a word.
const SOON_DAYS: i64 = 60;
const DAY: i64 = 86_400;

/// Looks at a directory.
pub fn look(directory: &Path) -> Vec<Finding> {
    const MAKE: &str = "`dom0-migrator pair HOST` makes certificates for this host and another, and brings the other its own";
    let what = "certificates";
    if let Err(error) = Identity::load(directory) {
        return vec![Finding::bad(what, error.to_string(), MAKE)];
    }
    let mut findings = Vec::new();
    for (name, whose) in
        [(CERTIFICATE, "this host's certificate"), (AUTHORITY, "the authority's certificate")]
    {
        findings.push(match dates(&directory.join(name)) {
            Ok(dates) => judge(whose, &dates),
            Err(problem) => Finding::bad(whose, problem, MAKE),
        });
    }
    if let Err(problem) = belongs(&directory.join(CERTIFICATE), &directory.join(AUTHORITY)) {
        findings.push(Finding::bad("this host's certificate", problem, MAKE));
    }
    let key = directory.join(KEY);
    match fs::metadata(&key) {
        Ok(found) if found.permissions().mode() & 0o077 != 0 => findings.push(Finding::warning(
            "this host's key",
            format!("{} may be read by others than root", key.display()),
            &format!(
                "`chmod 600 {}`; if anybody else has had it, `dom0-migrator pair HOST --renew`",
                key.display()
            ),
        )),
        Ok(_) => {}
        Err(error) => {
            findings.push(Finding::bad("this host's key", format!("{}: {error}", key.display()), MAKE))
        }
    }
    findings
}

/// What a certificate says.
struct Dates {
    /// Seconds after 1970.
    from: i64,
    /// The same.
    until: i64,
    /// `until` in words.
    shown: String,
    /// The names that others may connect to; of an authority, its own name.
    names: String,
}

fn read(path: &Path) -> Result<CertificateDer<'static>, String> {
    CertificateDer::from_pem_file(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn dates(path: &Path) -> Result<Dates, String> {
    let der = read(path)?;
    let (_, certificate) =
        X509Certificate::from_der(&der).map_err(|error| format!("{}: {error}", path.display()))?;
    let validity = certificate.validity();
    let mut names: Vec<String> = Vec::new();
    if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
        names.extend(alternative.value.general_names.iter().map(|name| match name {
            GeneralName::DNSName(name) => (*name).to_owned(),
            GeneralName::IPAddress(bytes) => address(bytes),
            other => other.to_string(),
        }));
    }
    Ok(Dates {
        from: validity.not_before.timestamp(),
        until: validity.not_after.timestamp(),
        shown: validity.not_after.to_string(),
        names: if names.is_empty() { certificate.subject().to_string() } else { names.join(", ") },
    })
}

/// An address as its bytes stand in a certificate.
fn address(bytes: &[u8]) -> String {
    let four = <[u8; 4]>::try_from(bytes).map(std::net::IpAddr::from);
    let sixteen = <[u8; 16]>::try_from(bytes).map(std::net::IpAddr::from);
    four.or(sixteen)
        .map_or_else(|_| "an address of a length that none has".into(), |address| address.to_string())
}

fn judge(whose: &str, dates: &Dates) -> Finding {
    const RENEW: &str = "`dom0-migrator pair HOST --renew` makes new ones";
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed());
    let Dates { from, until, shown, names } = dates;
    if now < *from {
        let why = format!("for {names}: does not hold yet, by this host's clock");
        return Finding::bad(whose, why, "set the clock");
    }
    match (until - now) / DAY {
        _ if *until <= now => Finding::bad(whose, format!("for {names}: held until {shown}"), RENEW),
        days if days < SOON_DAYS => {
            Finding::warning(whose, format!("for {names}: holds {days} days more, until {shown}"), RENEW)
        }
        _ => Finding::good(whose, format!("for {names}, holds until {shown}")),
    }
}

/// Whether the authority has signed it.
fn belongs(certificate: &Path, authority: &Path) -> Result<(), String> {
    let (certificate, authority) = (read(certificate)?, read(authority)?);
    let parsed =
        |der| X509Certificate::from_der(der).map(|(_, parsed)| parsed).map_err(|error| error.to_string());
    let (certificate, authority) = (parsed(&certificate)?, parsed(&authority)?);
    certificate
        .verify_signature(Some(authority.public_key()))
        .map_err(|_| format!("was not signed by the authority beside it ({})", authority.subject()))
}

/// A certificate's fingerprint, by which two people compare it: SHA-256, as `openssl x509 -fingerprint -sha256` shows it.
///
/// # Errors
/// When the file cannot be read, in words.
pub fn fingerprint(path: &Path) -> Result<String, String> {
    let der = read(path)?;
    let digest = sha256(&der);
    Ok(digest.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":"))
}

fn sha256(der: &[u8]) -> [u8; 32] {
    use sha2::Digest as _;
    sha2::Sha256::digest(der).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examination::State;
    use rcgen::{CertificateParams, Issuer, KeyPair, date_time_ymd};

    fn states(directory: &Path) -> Vec<(String, State)> {
        look(directory).into_iter().map(|finding| (finding.what, finding.state)).collect()
    }

    #[test]
    fn certificates_that_were_just_made_are_good() {
        let all = tempfile::tempdir().unwrap();
        crate::command::certificates::make(all.path(), &["10.0.0.1".into(), "host-b".into()]).unwrap();
        let findings = look(&all.path().join("10.0.0.1"));
        assert!(findings.iter().all(|finding| finding.state == State::Good), "{findings:#?}");
        assert!(findings[0].found.starts_with("for 10.0.0.1, holds until "), "{findings:#?}");
        let print = fingerprint(&all.path().join(AUTHORITY)).unwrap();
        assert_eq!((print.len(), print.matches(':').count()), (95, 31));
    }

    #[test]
    fn each_fault_is_named() {
        let all = tempfile::tempdir().unwrap();
        crate::command::certificates::make(all.path(), &["host-a".into(), "host-b".into()]).unwrap();
        let own = all.path().join("host-a");
        let [certificate, authority, key] =
            ["this host's certificate", "the authority's certificate", "this host's key"].map(str::to_owned);
        // A key that others can read.
        fs::set_permissions(own.join(KEY), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(states(&own).last(), Some(&(key, State::Warning)));
        // One that expires soon, or has.
        let read = |name: &str| fs::read_to_string(all.path().join(name)).unwrap();
        let issuer = || {
            let key = KeyPair::from_pem(&read("authority-key.pem")).unwrap();
            Issuer::from_ca_cert_pem(&read(AUTHORITY), key).unwrap()
        };
        let mut params = CertificateParams::new(vec!["host-a".to_owned()]).unwrap();
        params.not_before = date_time_ymd(2020, 1, 1);
        for (until, state) in
            [(date_time_ymd(2021, 1, 1), State::Bad), (date_time_ymd(2090, 1, 1), State::Good)]
        {
            params.not_after = until;
            let key = KeyPair::generate().unwrap();
            fs::write(own.join(CERTIFICATE), params.signed_by(&key, &issuer()).unwrap().pem()).unwrap();
            fs::write(own.join(KEY), key.serialize_pem()).unwrap();
            assert_eq!(states(&own)[0], (certificate.clone(), state));
        }
        // Another authority's.
        let other = tempfile::tempdir().unwrap();
        crate::command::certificates::make(other.path(), &["x".into()]).unwrap();
        fs::copy(other.path().join(AUTHORITY), own.join(AUTHORITY)).unwrap();
        let found = states(&own);
        assert_eq!(found[1], (authority, State::Good));
        assert_eq!(found[2], (certificate, State::Bad));
        // None.
        assert_eq!(states(&all.path().join("nobody")), [("certificates".to_owned(), State::Bad)]);
    }
}
