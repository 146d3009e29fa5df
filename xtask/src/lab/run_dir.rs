//! The directories of one raised lab, and that nothing is left of them or of its QEMUs, however this process ends: [`ending`] says how.
//! After a SIGKILL, from which nobody can clean up, the next lab removes directories that no living process has locked.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::ending::remove;
use crate::{cache, ending};

/// What other processes of this user may know of a raised lab.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct Record {
    /// The process that holds it.
    pub(super) pid: u32,
    /// Whether it was raised for a person to use; others are a test's or a demo's, and not to be touched.
    pub(super) by_hand: bool,
    /// Its directory for sockets.
    pub(super) sockets: PathBuf,
    /// Ports that lead to a shell in the dom0s of source and target; empty while it is raised.
    pub(super) dom0_ports: Vec<u16>,
    /// Ports that lead to a shell in the guest, at the source and at the target.
    pub(super) guest_ports: Vec<u16>,
}

/// The directories of one lab.
pub(super) struct RunDir {
    disks: PathBuf,
    sockets: PathBuf,
    lock: Option<Flock<File>>,
}

impl RunDir {
    /// New ones: for disks in the cache, on a real file system, and for sockets in the directory for temporary files, for their paths
    /// must be short.
    ///
    /// # Errors
    /// When they cannot be made.
    pub(super) fn make() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep()?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let disks = runs()?.join(format!("{}-{number}", std::process::id()));
        fs::create_dir_all(&disks).with_context(|| format!("cannot make {}", disks.display()))?;
        let sockets = tempfile::Builder::new().prefix("poolskip-lab-").tempdir()?.keep();
        let mut run_dir = Self { disks, sockets, lock: None };
        ending::register_directories(&[&run_dir.disks, &run_dir.sockets])?;
        let lock = File::create(run_dir.disks.join("lock"))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| error)
            .context("another process has locked a directory that was just made")?;
        run_dir.lock = Some(lock);
        run_dir.record(&Record {
            pid: std::process::id(),
            sockets: run_dir.sockets.clone(),
            ..Record::default()
        })?;
        Ok(run_dir)
    }

    /// Where disks and logs are.
    pub(super) fn disks(&self) -> &Path {
        &self.disks
    }

    /// Where sockets are.
    pub(super) fn sockets(&self) -> &Path {
        &self.sockets
    }

    /// Tells other processes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn record(&self, record: &Record) -> Result<()> {
        let partial = self.disks.join("lab.partial");
        fs::write(&partial, serde_json::to_vec_pretty(record)?)?;
        fs::rename(partial, self.disks.join("lab.json"))?;
        Ok(())
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        remove(&[self.disks.clone(), self.sockets.clone()]);
        ending::forget_directories(&[&self.disks, &self.sockets]);
    }
}

/// Labs of this user that are up.
///
/// # Errors
/// When the cache cannot be read.
pub(super) fn living() -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for (dir, alive) in all()? {
        if alive && let Some(record) = read_record(&dir).filter(|record| !record.dom0_ports.is_empty()) {
            records.push(record);
        }
    }
    Ok(records)
}

/// Removes what processes left that were killed.
fn sweep() -> Result<()> {
    for (dir, alive) in all()? {
        if !alive {
            let sockets = read_record(&dir).map(|record| record.sockets);
            remove(&[vec![dir], sockets.into_iter().collect()].concat());
        }
    }
    Ok(())
}

fn runs() -> Result<PathBuf> {
    let runs = cache::dir()?.join("run");
    fs::create_dir_all(&runs)?;
    Ok(runs)
}

/// All directories, and whether a living process holds each.
fn all() -> Result<Vec<(PathBuf, bool)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(runs()?)? {
        let dir = entry?.path();
        // One without a lock is just being made or removed.
        let Ok(lock) = File::open(dir.join("lock")) else { continue };
        let alive = Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_err();
        all.push((dir, alive));
    }
    Ok(all)
}

fn read_record(dir: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(dir.join("lab.json")).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_there_while_it_is_held_and_gone_afterwards() {
        let run_dir = RunDir::make().unwrap();
        let (disks, sockets) = (run_dir.disks().to_owned(), run_dir.sockets().to_owned());
        assert!(disks.is_dir() && sockets.is_dir());
        sweep().unwrap();
        assert!(disks.is_dir(), "a sweep removed a directory that is in use");
        drop(run_dir);
        assert!(!disks.exists() && !sockets.exists());
    }

    #[test]
    fn what_a_killed_process_left_is_swept() {
        let dir = runs().unwrap().join(format!("left-by-{}", std::process::id()));
        let sockets = tempfile::tempdir().unwrap().keep();
        fs::create_dir_all(&dir).unwrap();
        File::create(dir.join("lock")).unwrap();
        let record = Record { sockets: sockets.clone(), ..Record::default() };
        fs::write(dir.join("lab.json"), serde_json::to_vec(&record).unwrap()).unwrap();
        sweep().unwrap();
        assert!(!dir.exists() && !sockets.exists());
    }
}
