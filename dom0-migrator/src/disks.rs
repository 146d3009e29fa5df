//! The disks of a domain: at the source as xenstore names them, at the target as the configuration does from which its xl makes
//! the domain.

use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use enlightenment::Vdev;
use enlightenment::xenstore::parse_number;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::engine::DiskName;
use crate::xen::DomainId;
use crate::xenstore::{Store, StoreError};

/// Disks of a configuration that are looked at; an engine's references can name no more.
const DISKS_MAX: usize = 255;

/// Backends that dom0 itself serves, by their directory.
const BACKENDS: [&str; 2] = ["vbd", "qdisk"];

/// The script that libxl names where the configuration names none: it attaches what is there.
const BLOCK_SCRIPT: &str = "/etc/xen/scripts/block";

/// A disk whose pages never go by reference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedDisk {
    /// The disk: as the guest knows it, or its number.
    pub disk: String,
    /// Why.
    pub reason: String,
}

/// The disks of a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disks {
    /// Those that can be read by byte offset: block devices, and files with the disk's bytes as they are.
    pub readable: Vec<DiskName>,
    /// Others (other formats, other backends, other driver domains): their pages go over the network.
    pub refused: Vec<RefusedDisk>,
    /// Paths that must be there before the domain is, at the target too: no script of the configuration's own attaches what they name.
    pub fixed: Vec<PathBuf>,
}

/// Disks of a domain that can be read by byte offset; the others are said.
///
/// # Errors
/// [`StoreError`].
pub fn of_domain(store: &mut impl Store, domain: DomainId) -> Result<Vec<DiskName>, StoreError> {
    let disks = survey(store, domain)?;
    for RefusedDisk { disk, reason } in &disks.refused {
        tracing::info!(disk, reason, "the disk's pages go over the network");
    }
    Ok(disks.readable)
}

/// All disks of a domain of this host.
///
/// # Errors
/// [`StoreError`].
pub fn survey(store: &mut impl Store, domain: DomainId) -> Result<Disks, StoreError> {
    let mut disks = Disks::default();
    for backend in BACKENDS {
        let directory = format!("/local/domain/0/backend/{backend}/{domain}");
        for name in store.directory(&directory)? {
            let Some(vdev) = parse_number(name.as_bytes()).and_then(|number| u32::try_from(number).ok())
            else {
                continue;
            };
            let mut node = |node: &str| store.read_text(&format!("{directory}/{name}/{node}"));
            let shown = node("dev")?.unwrap_or(name.clone());
            let place = Backend {
                kind: node("type")?,
                parameters: node("params")?,
                device_type: node("device-type")?,
            };
            let path = place.path();
            if let Ok(path) = &path
                && node("script")?.is_none_or(|script| script == BLOCK_SCRIPT)
            {
                disks.fixed.push(path.clone());
            }
            disks.add(shown, vdev, path);
        }
    }
    Ok(disks)
}

/// The disks of a configuration as libxl writes it (`libxl_domain_config` as JSON), as paths of this host. It comes over the
/// network, from the very source whose word xl takes for the domain.
pub fn of_configuration(configuration: &Value) -> Disks {
    let mut disks = Disks::default();
    let list = configuration.get("disks").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    for disk in list.iter().take(DISKS_MAX) {
        let text = |key: &str| disk.get(key).and_then(Value::as_str).unwrap_or_default();
        let set = |key: &str| disk.get(key).is_some_and(|value| !matches!(value.as_i64(), None | Some(0)));
        let Some(vdev) = device_number(text("vdev")) else {
            let reason = "its name is none that Xen has a number for".to_owned();
            disks.refused.push(RefusedDisk { disk: shorten(text("vdev")), reason });
            continue;
        };
        let path = if set("is_cdrom") {
            Err("a CD-ROM".to_owned())
        } else if set("backend_domid") || !text("backend_domname").is_empty() {
            Err("served by another domain than dom0".to_owned())
        } else if !matches!((text("format"), text("backend")), ("raw", _) | ("" | "unknown", "phy")) {
            Err(format!("format {}, whose bytes lie elsewhere", shorten(text("format"))))
        } else if !matches!(text("backend"), "phy" | "qdisk" | "" | "unknown") {
            Err(format!("backend {:?}", shorten(text("backend"))))
        } else if !text("pdev_path").starts_with('/') {
            // With a script of its own it may be anything, an iSCSI name for instance.
            Err(format!("{:?} is no path", shorten(text("pdev_path"))))
        } else {
            Ok(PathBuf::from(text("pdev_path")))
        };
        disks.add(shorten(text("vdev")), vdev, path);
    }
    disks
}

fn shorten(text: &str) -> String {
    text.chars().take(64).collect()
}

impl Disks {
    fn add(&mut self, shown: String, vdev: u32, path: Result<PathBuf, String>) {
        let readable = path.and_then(|path| match std::fs::metadata(&path) {
            Ok(found) if found.is_file() || found.file_type().is_block_device() => Ok(path),
            Ok(_) => Err(format!("{} is neither a block device nor a file", path.display())),
            Err(error) => Err(format!("{}: {error}", path.display())),
        });
        match readable {
            Ok(path) => self.readable.push(DiskName { vdev: Vdev(vdev), path }),
            Err(reason) => self.refused.push(RefusedDisk { disk: shown, reason }),
        }
    }
}

/// Xen's number of a disk's name (`docs/man/xen-vbd-interface.7.pandoc`): `xvda1`, `hda`, `sda2`, `d5p1`.
fn device_number(name: &str) -> Option<u32> {
    let numbers = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<u32>().ok() };
    let (kind, rest) = match name.get(..3) {
        Some("xvd") => ("xvd", name.get(3..)?),
        _ => match name.get(..2)? {
            kind @ ("hd" | "sd") => (kind, name.get(2..)?),
            _ => {
                let (disk, part) = name.strip_prefix('d')?.split_once('p')?;
                return by_index("xvd", disk.parse().ok()?, part.parse().ok()?);
            }
        },
    };
    let letters = rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(rest.len());
    if !(1..=4).contains(&letters) {
        return None;
    }
    // Like a spreadsheet's columns: a to z, then aa.
    let disk =
        rest.get(..letters)?.bytes().fold(0, |disk, letter| disk * 26 + u32::from(letter - b'a') + 1) - 1;
    by_index(kind, disk, numbers(rest.get(letters..)?)?)
}

fn by_index(kind: &str, disk: u32, part: u32) -> Option<u32> {
    match kind {
        "xvd" if disk < 16 && part < 16 => Some(202 << 8 | disk << 4 | part),
        "xvd" if disk < 1 << 20 && part < 256 => Some(1 << 28 | disk << 8 | part),
        "hd" if disk < 4 && part < 64 => Some((if disk < 2 { 3 } else { 22 }) << 8 | (disk & 1) << 6 | part),
        "sd" if disk < 16 && part < 16 => Some(8 << 8 | disk << 4 | part),
        _ => None,
    }
}

#[derive(Debug)]
struct Backend {
    kind: Option<String>,
    parameters: Option<String>,
    device_type: Option<String>,
}

impl Backend {
    /// The path of the disk's bytes, or why its nodes name none.
    fn path(&self) -> Result<PathBuf, String> {
        if self.device_type.as_deref() == Some("cdrom") {
            return Err("a CD-ROM".into());
        }
        // What the domain's configuration says, which goes to the target as it is; a device that a hotplug script has made of it
        // here may be another disk's there.
        let parameters = self.parameters.as_deref().unwrap_or_default();
        let path = match self.kind.as_deref() {
            Some("phy" | "file") => parameters,
            // Format and path; every format but the raw one has the bytes elsewhere.
            Some("qdisk") => match parameters.split_once(':') {
                Some(("aio" | "raw", path)) => path,
                Some((format, _)) => return Err(format!("format {format}, whose bytes lie elsewhere")),
                None => return Err(format!("{parameters:?} names no format")),
            },
            other => return Err(format!("backend {:?}", other.unwrap_or_default())),
        };
        if path.starts_with('/') { Ok(PathBuf::from(path)) } else { Err(format!("{path:?} is no path")) }
    }
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
        backend.path().ok().map(|path| path.display().to_string())
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

    #[test]
    fn names_have_the_numbers_that_xen_gives_them() {
        for (name, number) in [
            ("xvda", Some(51712)),
            ("xvda1", Some(51713)),
            ("xvdb", Some(51728)),
            ("xvdq", Some((1 << 28) | (16 << 8))),
            ("xvdaa", Some((1 << 28) | (26 << 8))),
            ("hda", Some(768)),
            ("hdd2", Some((22 << 8) + 64 + 2)),
            ("sdb", Some(2064)),
            ("d0p3", Some(51715)),
            ("xvd", None),
            ("xvdzzzzzz", None),
            ("hde", None),
            ("vda", None),
            ("", None),
            ("é", None),
        ] {
            assert_eq!(device_number(name), number, "{name}");
        }
    }

    #[test]
    fn a_configuration_names_the_disks_and_why_some_are_left_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let configuration = serde_json::json!({"disks": [
            {"pdev_path": path, "vdev": "xvda", "backend": "phy", "format": "raw", "readwrite": 1},
            {"pdev_path": path, "vdev": "xvdb", "backend": "qdisk", "format": "qcow2"},
            {"pdev_path": path, "vdev": "xvdc", "backend": "phy", "format": "raw", "is_cdrom": 1},
            {"pdev_path": "iqn.2026:x", "vdev": "xvdd", "backend": "phy", "format": "raw", "script": "block-iscsi"},
            {"pdev_path": "/nowhere", "vdev": "xvde", "backend": "phy", "format": "raw"},
            {"pdev_path": "/tmp", "vdev": "xvdf", "backend": "phy", "format": "raw"},
            {"pdev_path": path, "vdev": "xvdk", "format": "raw", "script": "/etc/xen/scripts/own"},
            {"vdev": 3}, 7,
        ]});
        let disks = of_configuration(&configuration);
        assert_eq!(
            disks.readable,
            [51712, 51872].map(|vdev| DiskName { vdev: Vdev(vdev), path: path.into() })
        );
        let why: Vec<String> =
            disks.refused.iter().map(|refused| format!("{}: {}", refused.disk, refused.reason)).collect();
        assert_eq!(why.len(), 7);
        assert!(why[0].contains("xvdb: format qcow2"), "{why:?}");
        assert_eq!(of_configuration(&serde_json::json!([1])), Disks::default());
    }
}
