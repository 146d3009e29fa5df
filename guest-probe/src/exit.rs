//! How `guest-probe` ends: an exit code of its own for each kind of failure, so that a unit or a script can tell them apart.

use std::error::Error;
use std::io;

use nix::errno::Errno;
use procfs::ProcError;

use crate::catalogue::CatalogueError;
use crate::config::ConfigError;
use crate::control_blocks::BlocksError;
use crate::derive::DeriveError;
use crate::device::DeviceError;
use crate::doctor::DoctorError;
use crate::elf::ElfError;
use crate::memory::MemoryError;
use crate::probes::ProbeError;
use crate::process::ProcessError;
use crate::service::ServiceError;
use crate::session::SessionError;
use crate::status::StatusError;

/// The exit codes. 2 is that of a command line that cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done, or ended by a signal.
    Success = 0,
    /// Any failure that has no code of its own.
    Failure = 1,
    /// There is no mysqld, or the one that was named has ended.
    NoMysqld = 3,
    /// The kernel forbids it: not root, a capability is missing, or it is locked down.
    NotPermitted = 4,
    /// The kernel does not take the eBPF programs or probes.
    NoProbes = 5,
    /// The mysqld is none that is known, or has a setting that cannot be served.
    UnknownBuild = 6,
    /// The kernel module's device is not there or does not work.
    NoModule = 7,
    /// Another guest-probe runs, or none when its status is asked for.
    OtherProbe = 8,
    /// The configuration cannot be used.
    Configuration = 9,
    /// `doctor` found something missing, or `catalogue add` is not sure.
    NotUsable = 10,
    /// The program file is damaged, cut short, for another machine, or lacks what tells its build.
    BadProgram = 11,
    /// mysqld's memory cannot be read, or is not as its build says: it is starting, resizing or ending, or it is no such mysqld.
    BadMemory = 12,
    /// A catalogue of builds cannot be used.
    BadCatalogue = 13,
}

impl Exit {
    /// The code for an error.
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        match errno(error) {
            Some(Errno::EPERM | Errno::EACCES) => return Self::NotPermitted,
            Some(Errno::ESRCH) => return Self::NoMysqld,
            _ => {}
        }
        if let Some(error) = error.downcast_ref::<ServiceError>() {
            match error {
                ServiceError::Session(error) => Self::of(error),
                ServiceError::Process(error) => Self::of(error),
                ServiceError::Probes(error) => Self::of(error),
                ServiceError::Device(error) => Self::of(error),
                ServiceError::Runs(_) => Self::OtherProbe,
                ServiceError::Socket { .. } | ServiceError::Metrics { .. } => Self::Configuration,
                ServiceError::System { .. } => Self::Failure,
            }
        } else if let Some(error) = error.downcast_ref::<SessionError>() {
            match error {
                SessionError::Process(error) => Self::of(error),
                SessionError::Elf(error) => Self::of(error),
                SessionError::Catalogue(error) => Self::of(error),
                SessionError::Probes(error) => Self::of(error),
                SessionError::Blocks(error) => Self::of(error),
                SessionError::Device(error) => Self::of(error),
                _ => Self::Failure,
            }
        } else if let Some(error) = error.downcast_ref::<BlocksError>() {
            if matches!(error, BlocksError::PageSize { .. }) { Self::UnknownBuild } else { Self::BadMemory }
        } else if error.is::<MemoryError>() {
            Self::BadMemory
        } else if error.is::<ElfError>() {
            Self::BadProgram
        } else if error.is::<ProcessError>() {
            Self::NoMysqld
        } else if let Some(error) = error.downcast_ref::<CatalogueError>() {
            if matches!(error, CatalogueError::Unknown { .. }) {
                Self::UnknownBuild
            } else {
                Self::BadCatalogue
            }
        } else if let Some(error) = error.downcast_ref::<DoctorError>() {
            match error {
                DoctorError::Derive(error) => Self::of(error),
                DoctorError::Catalogue(error) => Self::of(error),
                DoctorError::Binary { .. } => Self::BadProgram,
                DoctorError::NotRunning(_) => Self::NoMysqld,
                DoctorError::Open { .. } => Self::Failure,
                DoctorError::NotSure(_) => Self::NotUsable,
            }
        } else if let Some(error) = error.downcast_ref::<DeriveError>() {
            match error {
                DeriveError::Process(error) => Self::of(error),
                DeriveError::Elf(error) => Self::of(error),
                DeriveError::Memory(error) => Self::of(error),
                DeriveError::Spaces(_) => Self::Failure,
                // An entry of nonsense that was found out is no catalogue that lies somewhere.
                DeriveError::Entry(_) => Self::NotUsable,
            }
        } else if let Some(error) = error.downcast_ref::<ProbeError>() {
            if let ProbeError::Elf(error) = error { Self::of(error) } else { Self::NoProbes }
        } else if let Some(error) = error.downcast_ref::<DeviceError>() {
            match error {
                DeviceError::Open { source, .. } if source.raw_os_error() == Some(libc::EBUSY) => {
                    Self::OtherProbe
                }
                _ => Self::NoModule,
            }
        } else if error.is::<StatusError>() {
            Self::OtherProbe
        } else if error.is::<ConfigError>() {
            Self::Configuration
        } else {
            Self::Failure
        }
    }
}

/// What the system said, wherever it stands in the chain of causes.
fn errno(error: &(dyn Error + 'static)) -> Option<Errno> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.raw_os_error().map(Errno::from_raw);
        }
        if let Some(errno) = error.downcast_ref::<Errno>() {
            return Some(*errno);
        }
        if let Some(MemoryError { source, .. }) = error.downcast_ref::<MemoryError>() {
            return source.raw_os_error().map(Errno::from_raw);
        }
        match error.downcast_ref::<ProcError>() {
            Some(ProcError::PermissionDenied(_)) => return Some(Errno::EACCES),
            Some(ProcError::NotFound(_)) => return Some(Errno::ESRCH),
            _ => {}
        }
        cause = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_code() {
        let memory = |errno: i32| MemoryError {
            pid: 7,
            address: 8,
            bytes: 9,
            source: io::Error::from_raw_os_error(errno),
        };
        let blocks = |errno| SessionError::Blocks(BlocksError::Memory(memory(errno)));
        assert_eq!(Exit::of(&blocks(libc::ESRCH)), Exit::NoMysqld, "it has ended while it was read");
        assert_eq!(Exit::of(&blocks(libc::EPERM)), Exit::NotPermitted);
        assert_eq!(Exit::of(&blocks(libc::EFAULT)), Exit::BadMemory, "nothing is mapped there");
        let lies = BlocksError::Implausible { pools: 0, chunks: 0, blocks: 0 };
        assert_eq!(Exit::of(&SessionError::Blocks(lies)), Exit::BadMemory);
        let page_size = SessionError::Blocks(BlocksError::PageSize { bytes: 4096 });
        assert_eq!(Exit::of(&page_size), Exit::UnknownBuild);
        assert_eq!(Exit::of(&SessionError::Process(ProcessError::None)), Exit::NoMysqld);
        let no_symbol = || ElfError::NoSymbol { symbol: "x".into() };
        assert_eq!(Exit::of(&SessionError::Elf(ElfError::NoBuildId)), Exit::BadProgram);
        assert_eq!(Exit::of(&SessionError::Probes(ProbeError::Elf(no_symbol()))), Exit::BadProgram);
        let unknown = CatalogueError::Unknown { build_id: "x".into(), known: "y".into() };
        assert_eq!(Exit::of(&SessionError::Catalogue(unknown)), Exit::UnknownBuild);
        let twice = || CatalogueError::Twice("x".into());
        assert_eq!(Exit::of(&SessionError::Catalogue(twice())), Exit::BadCatalogue);
        assert_eq!(Exit::of(&DoctorError::Catalogue(twice())), Exit::BadCatalogue);
        let foreign = ElfError::Foreign { class: 1, order: 1, machine: 40 };
        let binary = DoctorError::Binary { path: "x".into(), source: foreign };
        assert_eq!(Exit::of(&binary), Exit::BadProgram);
        assert_eq!(Exit::of(&DoctorError::Derive(ProcessError::None.into())), Exit::NoMysqld);
        let open = |errno: i32| DeviceError::Open {
            path: "/dev/x".into(),
            source: io::Error::from_raw_os_error(errno),
        };
        assert_eq!(Exit::of(&ServiceError::Device(open(libc::ENOENT))), Exit::NoModule);
        assert_eq!(Exit::of(&open(libc::EBUSY)), Exit::OtherProbe);
        assert_eq!(Exit::of(&open(libc::EACCES)), Exit::NotPermitted);
        assert_eq!(Exit::of(&ServiceError::Runs("/run/x".into())), Exit::OtherProbe);
        let missing = ServiceError::Session(SessionError::Probes(ProbeError::Missing("map", "EVENTS")));
        assert_eq!(Exit::of(&missing), Exit::NoProbes);
    }
}
