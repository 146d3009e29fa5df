//! Finding a domain by name or number.

use crate::xen::DomainId;
use crate::xenstore::{Store, StoreError};

/// Suffix of the name that xl gives a domain while it is received.
pub const INCOMING: &str = "--incoming";

/// A domain of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its number.
    pub id: DomainId,
    /// Its name.
    pub name: String,
}

/// Why there is no such domain.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// xenstore failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// None of that name or number.
    #[error("no domain {0:?} here; `xl list` shows those that are")]
    Unknown(String),
    /// dom0 itself.
    #[error("domain 0 cannot be migrated")]
    Dom0,
}

/// All domains of this host that have a name.
///
/// # Errors
/// [`StoreError`].
pub fn all(store: &mut impl Store) -> Result<Vec<Domain>, StoreError> {
    let mut domains = Vec::new();
    for number in store.directory("/local/domain")? {
        let Ok(id) = number.parse().map(DomainId) else { continue };
        if let Some(name) = store.read_text(&format!("/local/domain/{id}/name"))? {
            domains.push(Domain { id, name });
        }
    }
    Ok(domains)
}

/// Finds a domain by its name, or else by its number, as xl does.
///
/// # Errors
/// [`DomainError`].
pub fn find(store: &mut impl Store, wanted: &str) -> Result<Domain, DomainError> {
    let domains = all(store)?;
    let number = wanted.parse().ok().map(DomainId);
    let found = domains
        .iter()
        .find(|domain| domain.name == wanted)
        .or_else(|| domains.iter().find(|domain| Some(domain.id) == number))
        .ok_or_else(|| DomainError::Unknown(wanted.to_owned()))?;
    if found.id == DomainId(0) { Err(DomainError::Dom0) } else { Ok(found.clone()) }
}

/// Memory of a domain, as its toolstack wants it to be; 0 where that is not known.
///
/// # Errors
/// [`StoreError`].
pub fn memory_bytes(store: &mut impl Store, domain: DomainId) -> Result<u64, StoreError> {
    let text = store.read_text(&format!("/local/domain/{domain}/memory/target"))?;
    let kibibytes = text.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or_default();
    Ok(kibibytes.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake;
    impl Store for Fake {
        fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
            Ok(match path {
                "/local/domain/0/name" => Some(b"Domain-0".to_vec()),
                "/local/domain/3/name" => Some(b"db1".to_vec()),
                "/local/domain/4/name" => Some(b"3".to_vec()),
                _ => None,
            })
        }
        fn directory(&mut self, _: &str) -> Result<Vec<String>, StoreError> {
            Ok(["0", "3", "4", "9", "x"].map(str::to_owned).to_vec())
        }
        fn write(&mut self, _: &str, _: &[u8]) -> Result<(), StoreError> {
            Ok(())
        }
    }

    #[test]
    fn a_name_comes_before_a_number() {
        assert_eq!(find(&mut Fake, "db1").unwrap().id, DomainId(3));
        assert_eq!(find(&mut Fake, "3").unwrap().id, DomainId(4));
        assert_eq!(find(&mut Fake, "4").unwrap().name, "3");
        assert!(matches!(find(&mut Fake, "0"), Err(DomainError::Dom0)));
        assert!(matches!(find(&mut Fake, "9"), Err(DomainError::Unknown(_))));
    }
}
