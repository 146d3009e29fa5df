//! The disks of a domain, as xenstore names them on this host.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use enlightenment::Vdev;
use enlightenment::xenstore::parse_number;

use crate::engine::DiskName;
use crate::xen::DomainId;
use crate::xenstore::{Store, StoreError};

/// Backends that dom0 itself serves, by their directory.
const BACKENDS: [&str; 2] = ["vbd", "qdisk"];

/// Disks of a domain that can be read by byte offset: block devices, and files with the disk's bytes as they are. Others
/// (other formats, other backends, other driver domains) are left out, and their pages go over the network.
///
/// # Errors
/// [`StoreError`].
pub fn of_domain(store: &mut impl Store, domain: DomainId) -> Result<Vec<DiskName>, StoreError> {
    let mut disks = Vec::new();
    for backend in BACKENDS {
        let directory = format!("/local/domain/0/backend/{backend}/{domain}");
        for name in store.directory(&directory)? {
            let Some(vdev) = parse_number(name.as_bytes()).and_then(|number| u32::try_from(number).ok())
            else {
                continue;
            };
            let mut node = |node: &str| store.read_text(&format!("{directory}/{name}/{node}"));
            let place = Backend {
                kind: node("type")?,
                parameters: node("params")?,
                device_type: node("device-type")?,
            };
            match place.path() {
                Some(path) if is_readable_by_offset(&path) => disks.push(DiskName { vdev: Vdev(vdev), path }),
                _ => tracing::info!(
                    vdev,
                    ?place,
                    "disk cannot be read by offset, its pages go over the network"
                ),
            }
        }
    }
    Ok(disks)
}

#[derive(Debug)]
struct Backend {
    kind: Option<String>,
    parameters: Option<String>,
    device_type: Option<String>,
}

impl Backend {
    /// The path of the disk's bytes, if its nodes name one.
    fn path(&self) -> Option<PathBuf> {
        if self.device_type.as_deref() == Some("cdrom") {
            return None;
        }
        // What the domain's configuration says, which goes to the target as it is; a device that a hotplug script has made of it
        // here may be another disk's there.
        let parameters = self.parameters.as_deref()?;
        let path = match self.kind.as_deref() {
            Some("phy" | "file") => parameters,
            // Format and path; every format but the raw one has the bytes elsewhere.
            Some("qdisk") => parameters.strip_prefix("aio:").or_else(|| parameters.strip_prefix("raw:"))?,
            _ => return None,
        };
        path.starts_with('/').then(|| PathBuf::from(path))
    }
}

fn is_readable_by_offset(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.is_file() || found.file_type().is_block_device())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(kind: &str, parameters: &str, device_type: &str) -> Option<String> {
        let backend = Backend {
            kind: Some(kind.into()),
            parameters: Some(parameters.into()),
            device_type: Some(device_type.into()),
        };
        backend.path().map(|path| path.display().to_string())
    }

    #[test]
    fn raw_disks_have_a_path_and_others_none() {
        assert_eq!(path("phy", "/dev/vdb", "disk").as_deref(), Some("/dev/vdb"));
        assert_eq!(path("phy", "iqn.2026:x", "disk"), None);
        assert_eq!(path("file", "/srv/db.raw", "disk").as_deref(), Some("/srv/db.raw"));
        assert_eq!(path("qdisk", "aio:/srv/db.raw", "disk").as_deref(), Some("/srv/db.raw"));
        assert_eq!(path("qdisk", "qcow2:/srv/db.qcow2", "disk"), None);
        assert_eq!(path("phy", "/dev/cdrom", "cdrom"), None);
        assert_eq!(path("tap", "/dev/vdb", "disk"), None);
    }
}
