//! The running mysqld: which process it is, its program file and its data directory, wherever it is mounted or chrooted.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use procfs::ProcError;
use procfs::process::{MMapPath, Process, all_processes};
use thiserror::Error;

use crate::frame_table::PAGE_BYTES;
use crate::memory::ProcessMemory;

/// The kernel's name of the process, as in `/proc/PID/comm`.
const COMM: &str = "mysqld";

/// Why no process can be probed.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// There is none.
    #[error("no mysqld runs here; start it first, or name its process with --pid")]
    None,
    /// There are several.
    #[error("{} processes are called mysqld ({}): choose one with --pid", pids.len(), list(pids))]
    Several {
        /// Their PIDs.
        pids: Vec<i32>,
    },
    /// The one that was named cannot be looked at.
    #[error("process {pid} cannot be looked at: {source} (guest-probe needs to run as root)")]
    Proc {
        /// Its PID.
        pid: i32,
        /// Why.
        source: ProcError,
    },
    /// Its program file cannot be opened.
    #[error("cannot open the program of process {pid}: {source} (guest-probe needs to run as root)")]
    Exe {
        /// Its PID.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// Its program is not among its mappings.
    #[error("process {pid} does not map its own program file: is it just starting or ending?")]
    NotMapped {
        /// Its PID.
        pid: i32,
    },
    /// All processes cannot be listed.
    #[error("cannot list processes: {0}")]
    List(ProcError),
}

fn list(pids: &[i32]) -> String {
    pids.iter().map(i32::to_string).collect::<Vec<_>>().join(", ")
}

/// Which processes are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Every mysqld, in whatever container.
    All,
    /// The process with this PID, whatever it is called.
    One(i32),
    /// Every mysqld that this process started.
    ChildrenOf(i32),
}

/// A process and none that gets its PID later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessKey {
    /// Its PID.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
}

/// A running mysqld.
#[derive(Debug)]
pub struct MysqldProcess {
    /// Its PID.
    pub pid: i32,
    /// When it started, in clock ticks since boot: with the PID it names the process for good.
    pub start_time: u64,
    process: Process,
}

impl MysqldProcess {
    /// The process that is named, or the only mysqld there is.
    ///
    /// # Errors
    /// [`ProcessError`] when there is none or more than one.
    pub fn find(pid: Option<i32>) -> Result<Self, ProcessError> {
        let mut found = Self::all(pid.map_or(Choice::All, Choice::One))?;
        match found.len() {
            0 => Err(ProcessError::None),
            1 => found.pop().ok_or(ProcessError::None),
            _ => Err(ProcessError::Several { pids: found.iter().map(|process| process.pid).collect() }),
        }
    }

    /// All that are chosen, by PID. Threads and forked children that still carry the name of their parent are not counted.
    ///
    /// # Errors
    /// [`ProcessError`] when processes cannot be listed, or the one that is named is not there.
    pub fn all(choice: Choice) -> Result<Vec<Self>, ProcessError> {
        if let Choice::One(pid) = choice {
            return Self::open(pid).map(|process| vec![process]);
        }
        let mut found: Vec<(i32, i32)> = Vec::new();
        for process in all_processes().map_err(ProcessError::List)? {
            // A process that ends while the list is read is none.
            let Ok(process) = process else { continue };
            // Nearly all are called otherwise, and this is a tenth of what their whole state takes to read.
            let named = fs::read(format!("/proc/{}/comm", process.pid));
            if !named.is_ok_and(|name| name.trim_ascii_end() == COMM.as_bytes()) {
                continue;
            }
            let Ok(stat) = process.stat() else { continue };
            if stat.state != 'Z' {
                found.push((stat.pid, stat.ppid));
            }
        }
        let all: HashSet<i32> = found.iter().map(|(pid, _)| *pid).collect();
        let chosen = found.iter().filter(|(_, parent)| match choice {
            Choice::ChildrenOf(wanted) => *parent == wanted,
            Choice::All | Choice::One(_) => !all.contains(parent),
        });
        // One that has ended meanwhile is none.
        let mut processes: Vec<Self> = chosen.filter_map(|(pid, _)| Self::open(*pid).ok()).collect();
        processes.sort_by_key(|process| process.pid);
        Ok(processes)
    }

    fn open(pid: i32) -> Result<Self, ProcessError> {
        let failed = |source| ProcessError::Proc { pid, source };
        let process = Process::new(pid).map_err(failed)?;
        let start_time = process.stat().map_err(failed)?.starttime;
        Ok(Self { pid, start_time, process })
    }

    /// What names it for good: a PID is given anew to others.
    pub fn key(&self) -> ProcessKey {
        ProcessKey { pid: self.pid, start_time: self.start_time }
    }

    /// Whether it still runs; one that is dead and waits for its parent does not.
    pub fn is_alive(&self) -> bool {
        let stat = Process::new(self.pid).and_then(|process| process.stat());
        stat.is_ok_and(|stat| stat.starttime == self.start_time && !matches!(stat.state, 'Z' | 'X'))
    }

    /// A descriptor that becomes readable when it ends.
    ///
    /// # Errors
    /// When it is gone, or the kernel is older than 5.3.
    pub fn end_fd(&self) -> io::Result<OwnedFd> {
        // SAFETY: a plain system call with integers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let fd = RawFd::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just handed out this descriptor, to nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Path through which its program can be opened even when it lies in another root or was replaced.
    pub fn exe_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/exe", self.pid))
    }

    /// Path through which its working directory, which for mysqld is its data directory, can be walked.
    pub fn data_dir(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/cwd", self.pid))
    }

    /// Directory of its open files.
    pub fn fd_dir(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd", self.pid))
    }

    /// Its program file.
    ///
    /// # Errors
    /// [`ProcessError::Exe`].
    pub fn exe(&self) -> Result<File, ProcessError> {
        File::open(self.exe_path()).map_err(|source| ProcessError::Exe { pid: self.pid, source })
    }

    /// Its memory.
    pub fn memory(&self) -> ProcessMemory {
        ProcessMemory { pid: self.pid }
    }

    /// Where offset 0 of its program file is mapped.
    ///
    /// # Errors
    /// [`ProcessError::NotMapped`], or when it is gone.
    pub fn load_address(&self) -> Result<u64, ProcessError> {
        let exe = self.exe()?.metadata().map_err(|source| ProcessError::Exe { pid: self.pid, source })?;
        let maps = self.process.maps().map_err(|source| ProcessError::Proc { pid: self.pid, source })?;
        maps.into_iter()
            .filter(|map| matches!(map.pathname, MMapPath::Path(_)))
            .filter(|map| map.inode == exe.ino() && map.offset == 0)
            .map(|map| map.address.0)
            .min()
            .ok_or(ProcessError::NotMapped { pid: self.pid })
    }

    /// The most frames that it can have, from the size of its address space: a bound for what its memory says.
    ///
    /// # Errors
    /// When it is gone.
    pub fn most_frames(&self) -> Result<u64, ProcessError> {
        let stat = self.process.stat().map_err(|source| ProcessError::Proc { pid: self.pid, source })?;
        Ok(stat.vsize / PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_named_is_taken() {
        let me = MysqldProcess::find(Some(std::process::id() as i32)).unwrap();
        assert!(me.load_address().is_ok());
        assert!(me.most_frames().unwrap() > 0);
        assert!(me.exe().is_ok());
        assert!(me.is_alive());
        assert!(!MysqldProcess { start_time: me.start_time + 1, ..me }.is_alive(), "another with its PID");
    }

    #[test]
    fn errors_tell_what_to_do() {
        assert!(matches!(MysqldProcess::find(Some(i32::MAX)), Err(ProcessError::Proc { pid: i32::MAX, .. })));
        let several = ProcessError::Several { pids: vec![7, 8] }.to_string();
        assert_eq!(several, "2 processes are called mysqld (7, 8): choose one with --pid");
    }
}
