//! What is done to domains of this host, by `xl` where xl can do it.

use std::io;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::domain::{self, Domain};
use crate::handover::record::Process;
use crate::xen::DomainId;
use crate::xen::control::Control;
use crate::xen::guest::Guest;
use crate::xen::logger::{Level, Logger, Sink};
use crate::xen::release::Release;
use crate::xenstore::{StoreError, Xenstore};

/// From this release on xl has a `resume` of its own, which also lets a device model run on.
const XL_RESUMES: Release = Release::new(4, 20);
/// How long a process may take to be gone after SIGKILL.
const KILL: Duration = Duration::from_secs(10);

/// Why something could not be done to a domain.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// xenstore failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// xl could not be started.
    #[error("xl {arguments}: {source}")]
    NoXl {
        /// Its arguments.
        arguments: String,
        /// What the system said.
        source: io::Error,
    },
    /// xl failed.
    #[error("xl {arguments} failed: {said}")]
    Xl {
        /// Its arguments.
        arguments: String,
        /// What it said.
        said: String,
    },
    /// Xen's libraries failed.
    #[error("domain {domain} could not be resumed: {problem}")]
    Resume {
        /// The domain.
        domain: DomainId,
        /// What went wrong.
        problem: String,
    },
    /// It is still there.
    #[error("domain {0} is still there after `xl destroy {0}`")]
    NotDestroyed(DomainId),
    /// A process does not end.
    #[error("xl, process {0}, of a migration that was cut off does not end; nothing was done")]
    Alive(u32),
}

/// The domain of a name, if it is here.
///
/// # Errors
/// [`StoreError`].
pub fn named(name: &str) -> Result<Option<Domain>, StoreError> {
    Ok(domain::all(&mut Xenstore::open()?)?.into_iter().find(|domain| domain.name == name))
}

fn xl(arguments: &[&str]) -> Result<(), HostError> {
    let shown = || arguments.join(" ");
    let output = Command::new("xl")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| HostError::NoXl { arguments: shown(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(HostError::Xl { arguments: shown(), said })
}

/// Gives a domain a name.
///
/// # Errors
/// [`HostError`].
pub fn rename(domain: DomainId, name: &str) -> Result<(), HostError> {
    xl(&["rename", &domain.to_string(), name])
}

/// Lets a paused domain run; one that runs is left as it is.
///
/// # Errors
/// [`HostError`].
pub fn unpause(domain: DomainId) -> Result<(), HostError> {
    xl(&["unpause", &domain.to_string()])
}

/// Destroys a domain; it is gone when this returns without error.
///
/// # Errors
/// [`HostError`].
pub fn destroy(domain: &Domain) -> Result<(), HostError> {
    let done = xl(&["destroy", &domain.id.to_string()]);
    let still = named(&domain.name)?.is_some_and(|found| found.id == domain.id);
    match done {
        Ok(()) if still => Err(HostError::NotDestroyed(domain.id)),
        Err(error) if still => Err(error),
        _ => Ok(()),
    }
}

/// Lets a suspended domain run on, and turns its log of dirty pages off. One that is not suspended only loses the log.
///
/// # Errors
/// [`HostError`].
pub fn resume(domain: DomainId) -> Result<(), HostError> {
    let Ok(release) = Release::running() else {
        // A release whose libraries this program does not know: xl knows them.
        return xl(&["resume", &domain.to_string()]);
    };
    let failed = |problem: String| HostError::Resume { domain, problem };
    let control =
        Control::open(release, Logger::new(Arc::new(Quiet))).map_err(|error| failed(error.to_string()))?;
    if let Err(error) = control.logdirty_off(domain) {
        tracing::warn!(%error, "the log of dirty pages may still be on; it costs the domain time");
    }
    if release >= XL_RESUMES {
        return xl(&["resume", &domain.to_string()]);
    }
    let abi = release.restore_abi().map_err(|error| failed(error.to_string()))?;
    let guest = Guest::load(release, abi).map_err(|error| failed(error.to_string()))?;
    match guest.resume(&control, domain) {
        Ok(()) => Ok(Xenstore::open()?.resume_domain(domain)?),
        Err(error) if error.source.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        Err(error) => Err(failed(error.to_string())),
    }
}

/// Ends an xl that outlived its command: what it would still do, it must not do later.
///
/// # Errors
/// [`HostError::Alive`].
pub fn end_process(process: Process) -> Result<(), HostError> {
    let deadline = Instant::now() + KILL;
    while process.runs() {
        let _ = kill(Pid::from_raw(process.pid.cast_signed()), Signal::SIGKILL);
        if Instant::now() >= deadline {
            return Err(HostError::Alive(process.pid));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Takes the libraries' messages for this program's own log.
pub struct Quiet;

impl Sink for Quiet {
    fn message(&self, _: Level, _: i32, context: &str, text: &str) {
        tracing::debug!("{context}: {text}");
    }
    fn progress(&self, _: &str, _: &str, _: u64, _: u64) {}
}
