//! One side's filter as a program of its own, so that it can be built at another release and tried against this one's
//! (`tests/versions.rs`; `cargo xtask test upgrade` builds it among that release's sources). It uses nothing of the engine that
//! a neighbouring release may not have.
//!
//! ```text
//! peer source DIR DISK PAGES     connects to DIR/save, DIR/wire and DIR/side; the lists say that PFN n is page n of the disk
//! peer target DIR DISK           connects to DIR/restore, DIR/wire and DIR/side
//! ```
//!
//! What came of it is one line of numbers: the version of the stream, and references that were accepted, and refused.

use std::error::Error;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use dom0_migrator::control::STREAM_VERSION;
use dom0_migrator::engine::{
    Config, DiskName, ReferenceMap, SourceFilter, SourceParts, TargetFilter, TargetParts,
};
use enlightenment::{ListKind, Pfn, Run, Vdev};

/// `xvda`.
const VDEV: u32 = 51712;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let connect = |directory: &str, name: &str| -> Result<OwnedFd, Box<dyn Error>> {
        let path = PathBuf::from(directory).join(name);
        let stream = UnixStream::connect(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(OwnedFd::from(stream))
    };
    let (accepted, refused) = match arguments[..] {
        ["source", directory, disk, pages] => {
            let pages: u64 = pages.parse()?;
            let mut map = ReferenceMap::new(Pfn(pages - 1));
            for pfn in 0..pages {
                let run = Run {
                    pfn,
                    disk_offset: pfn * 4096,
                    vdev: VDEV,
                    pages: 1,
                    list: ListKind::Read as u8,
                    reserved: 0,
                };
                map.insert_run(&run)?;
            }
            let source = SourceFilter::start(SourceParts {
                from_save: connect(directory, "save")?,
                to_wire: connect(directory, "wire")?,
                side: Some(connect(directory, "side")?),
                map,
                disks: vec![DiskName { vdev: Vdev(VDEV), path: disk.into() }],
                config: Config::default(),
            })?;
            let stats = source.finish()?.stats;
            (stats.references_accepted, stats.references_refused)
        }
        ["target", directory, disk] => {
            let own_disks = vec![DiskName { vdev: Vdev(VDEV), path: disk.into() }];
            let target = TargetFilter::start(TargetParts {
                from_wire: connect(directory, "wire")?,
                to_restore: connect(directory, "restore")?,
                side: Some(connect(directory, "side")?),
                config: Config { own_disks: Some(own_disks), ..Config::default() },
            })?;
            let stats = target.finish()?.stats;
            let refused = &stats.refused;
            let refused = refused.hash + refused.io_error + refused.out_of_bounds + refused.unknown_disk;
            (stats.references_accepted, refused)
        }
        _ => return Err("usage: peer source DIR DISK PAGES | peer target DIR DISK".into()),
    };
    println!("{STREAM_VERSION} {accepted} {refused}");
    Ok(())
}
