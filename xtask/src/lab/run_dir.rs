//! The directories of one raised lab, and that nothing is left of them or of its QEMUs, however this process ends.
//!
//! - It ends by itself: `Drop`.
//! - SIGINT, SIGTERM, SIGHUP: a handler wakes a thread that kills the QEMUs, removes the directories and exits.
//! - SIGKILL: the kernel kills the QEMUs (`PR_SET_PDEATHSIG`), and the next lab removes directories that no living process has locked.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::unistd::{Pid, pipe};
use serde::{Deserialize, Serialize};

use crate::cache;

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
        catch_signals()?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let disks = runs()?.join(format!("{}-{number}", std::process::id()));
        fs::create_dir_all(&disks).with_context(|| format!("cannot make {}", disks.display()))?;
        let sockets = tempfile::Builder::new().prefix("poolskip-lab-").tempdir()?.keep();
        let mut run_dir = Self { disks, sockets, lock: None };
        register(|registered| {
            registered.directories.extend([run_dir.disks.clone(), run_dir.sockets.clone()])
        });
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
        register(|registered| {
            registered.directories.retain(|dir| *dir != self.disks && *dir != self.sockets)
        });
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

/// Notes a process that must not outlive this one.
pub(super) fn register_process(pid: u32) {
    register(|registered| registered.processes.push(pid));
}

/// Forgets a process that has ended: its number may soon be another's.
pub(super) fn forget_process(pid: u32) {
    register(|registered| registered.processes.retain(|known| *known != pid));
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

fn remove(directories: &[PathBuf]) {
    for dir in directories {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                eprintln!("  cannot remove {}: {error}", dir.display());
            }
            _ => {}
        }
    }
}

#[derive(Default)]
struct Registered {
    directories: Vec<PathBuf>,
    processes: Vec<u32>,
}

static REGISTERED: Mutex<Registered> =
    Mutex::new(Registered { directories: Vec::new(), processes: Vec::new() });

fn register<T>(change: impl FnOnce(&mut Registered) -> T) -> T {
    change(&mut REGISTERED.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Where the handler writes the signal's number; -1 until it is set up.
static WAKE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn note_signal(signal: libc::c_int) {
    let byte = u8::try_from(signal).unwrap_or(0);
    // SAFETY: `write` may be called in a signal handler; the byte is on this stack, and a bad descriptor is only an error.
    unsafe { libc::write(WAKE.load(Ordering::Relaxed), std::ptr::from_ref(&byte).cast(), 1) };
}

fn catch_signals() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = set_up_signals());
    result
}

fn set_up_signals() -> Result<()> {
    let (reader, writer): (OwnedFd, OwnedFd) = pipe().context("cannot make a pipe")?;
    WAKE.store(writer.as_raw_fd(), Ordering::Relaxed);
    // It stays open as long as the handler may write to it: for ever.
    std::mem::forget(writer);
    thread::spawn(move || {
        let mut byte = [0];
        if nix::unistd::read(&reader, &mut byte) == Ok(1) {
            end(i32::from(byte[0]));
        }
    });
    let action = SigAction::new(SigHandler::Handler(note_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing but load an atomic and call `write`.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("cannot catch {signal}"))?;
    }
    Ok(())
}

/// Ends the QEMUs, removes the directories, and exits as a process does that the signal killed.
fn end(signal: i32) -> ! {
    let registered = register(std::mem::take);
    for pid in registered.processes {
        if let Ok(pid) = i32::try_from(pid) {
            // One that has just ended by itself is what we want.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    remove(&registered.directories);
    eprintln!("\n  signal {signal}: the lab is gone");
    std::process::exit(128 + signal);
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
