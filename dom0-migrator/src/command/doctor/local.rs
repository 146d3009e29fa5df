//! What can be seen on a host by itself.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::sys::statvfs::statvfs;

use super::certificates;
use crate::command::configuration::{Configuration, Connecting};
use crate::command::{domain, toolstack};
use crate::disks;
use crate::engine::disk::Disk;
use crate::examination::Finding;
use crate::handover::record::Records;
use crate::handover::{SourceState, TargetState};
use crate::xen::DomainId;
use crate::xen::control::Control;
use crate::xen::guest::Guest;
use crate::xen::logger::{Level, Logger, Sink};
use crate::xen::release::Release;
use crate::xenstore::Xenstore;

/// MiB that the helper needs in dom0: pages that were sent by reference and are not accepted yet (256), the lists, buffers.
const DOM0_MIB: u64 = 512;
/// MiB for records and reports.
const DISK_MIB: u64 = 64;

/// Looks at this host.
pub fn look(configuration: &Configuration, connecting: &Connecting) -> Vec<Finding> {
    let mut findings = vec![root()];
    findings.extend(xen());
    findings.extend(toolstacks());
    let xl = Xl::ask();
    findings.push(match &xl {
        Ok(xl) => memory_of_xen(xl),
        Err(problem) => Finding::bad("xl", problem.clone(), "install xen-utils and boot with Xen"),
    });
    findings.push(memory_of_dom0());
    findings.push(helper());
    if connecting.plain || configuration.plain {
        findings.push(Finding::warning(
            "certificates",
            "none are used: connections are neither encrypted nor authenticated",
            "only on a network that no others than the hosts share; `dom0-migrator pair HOST` makes certificates",
        ));
    } else {
        let directory = connecting.certificates.as_ref().unwrap_or(&configuration.certificates);
        findings.extend(certificates::look(directory));
    }
    findings.extend(records(&configuration.records));
    findings.push(clock());
    findings.extend(disks_of_domains());
    findings
}

fn root() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::good("user", "root")
    } else {
        Finding::bad(
            "user",
            "not root",
            "run it as root: the hypervisor and the domains' disks are for root alone",
        )
    }
}

/// The hypervisor, and whether the libraries of its release are here and work.
fn xen() -> Vec<Finding> {
    let what = "Xen";
    let release = match Release::running() {
        Ok(release) => release,
        Err(error) => {
            return vec![Finding::bad(
                what,
                error.to_string(),
                "boot this host with Xen 4.17 to 4.22 and look again in dom0",
            )];
        }
    };
    let mut findings = vec![Finding::good(what, release.to_string())];
    let what = "Xen's libraries";
    const INSTALL: &str = "install the toolstack's libraries of the running release (Debian: libxenmisc and xen-utils of its version)";
    let guest = release
        .restore_abi()
        .map_err(|error| error.to_string())
        .and_then(|abi| Guest::load(release, abi).map_err(|error| error.to_string()));
    let control = Control::open(release, Logger::new(Arc::new(Silent))).map_err(|error| error.to_string());
    findings.push(match guest.map(|_| ()).and(control.map(|_| ())) {
        Ok(()) => Finding::good(
            what,
            format!("{} and {}", release.library("libxenctrl"), release.library("libxenguest")),
        ),
        Err(problem) => Finding::bad(what, problem, INSTALL),
    });
    findings
}

/// Takes what libxenctrl says.
struct Silent;

impl Sink for Silent {
    fn message(&self, _: Level, _: i32, context: &str, text: &str) {
        tracing::debug!("{context}: {text}");
    }
    fn progress(&self, _: &str, _: &str, _: u64, _: u64) {}
}

/// What `xl info` says.
#[derive(Debug)]
pub struct Xl(String);

impl Xl {
    /// Asks it.
    ///
    /// # Errors
    /// Why it cannot be asked, in words.
    pub fn ask() -> Result<Self, String> {
        let output = Command::new("xl")
            .arg("info")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("xl cannot be started: {error}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("`xl info` failed: {}", said.trim()));
        }
        Ok(Self(String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.0.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim())
        })
    }

    /// MiB that new domains can have.
    pub fn free_mib(&self) -> Option<u64> {
        self.value("free_memory")?.parse().ok()
    }
}

fn memory_of_xen(xl: &Xl) -> Finding {
    let what = "memory for domains";
    match xl.free_mib() {
        Some(mib) => Finding::good(what, format!("{mib} MiB are free")),
        None => Finding::warning(what, "`xl info` does not say how much is free", "look at `xl info`"),
    }
}

fn memory_of_dom0() -> Finding {
    let what = "memory of dom0";
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib / 1024)
    });
    match available {
        Some(mib) if mib >= DOM0_MIB => Finding::good(what, format!("{mib} MiB are available")),
        Some(mib) => Finding::warning(
            what,
            format!("{mib} MiB are available; a migration may take {DOM0_MIB}"),
            "give dom0 more (`xl mem-set 0 …`, or dom0_mem= on Xen's command line)",
        ),
        None => Finding::warning(what, "/proc/meminfo does not tell what is available", "look at it"),
    }
}

/// This program as libxl finds it.
fn helper() -> Finding {
    let what = "save helper";
    let found = std::env::current_exe().and_then(|path| fs::metadata(&path).map(|metadata| (path, metadata)));
    match found {
        Ok((path, metadata))
            if metadata.mode() & 0o022 != 0 || (metadata.uid() != 0 && nix::unistd::geteuid().is_root()) =>
        {
            Finding::warning(
                what,
                format!("{} can be written to by others than root, and is started as root", path.display()),
                "have it belong to root, with mode 755",
            )
        }
        Ok((path, metadata)) if metadata.permissions().mode() & 0o111 == 0 => {
            Finding::bad(what, format!("{} cannot be executed", path.display()), "chmod 755")
        }
        Ok((path, _)) => Finding::good(what, path.display().to_string()),
        Err(error) => Finding::bad(
            what,
            format!("this program's file is gone: {error}"),
            "it was replaced while it ran: start it again (`systemctl restart poolskip-receive.service`)",
        ),
    }
}

/// What was enabled, and whether it still leads anywhere.
fn toolstacks() -> Vec<Finding> {
    let what = "toolstack";
    let enabled = toolstack::enabled(Path::new("/"));
    if enabled.is_empty() {
        return vec![Finding::good(what, "as shipped; `dom0-migrator migrate` needs no more")];
    }
    enabled
        .into_iter()
        .map(|(name, program)| {
            if program.exists() {
                Finding::good(what, format!("{name} goes through {}", program.display()))
            } else {
                Finding::bad(
                    what,
                    format!("{name} is to go through {}, which is not there", program.display()),
                    "`dom0-migrator enable` once more from where it is now, or `disable`",
                )
            }
        })
        .collect()
}

/// The directory of records, and what is open in it.
fn records(directory: &Path) -> Vec<Finding> {
    let what = "records";
    // It is made when it is first needed: what counts until then is where.
    let there = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let mut findings = Vec::new();
    findings.push(match statvfs(there) {
        Err(error) => Finding::bad(what, format!("{}: {error}", there.display()), "mount its disk"),
        Ok(space) => {
            let mib = (space.blocks_available() * space.fragment_size()) >> 20;
            let shown = format!("{}: {mib} MiB are free", directory.display());
            if mib < DISK_MIB {
                Finding::bad(what, shown, "free some: without its record no migration begins")
            } else if nix::unistd::access(there, nix::unistd::AccessFlags::W_OK).is_err() {
                Finding::bad(what, format!("{} cannot be written to", there.display()), "mount it writable")
            } else {
                Finding::good(what, shown)
            }
        }
    });
    if !directory.exists() {
        return findings;
    }
    let open = Records::open(Some(directory)).map_err(|error| error.to_string()).and_then(|records| {
        let source = records.open_ones::<SourceState>().map_err(|error| error.to_string())?;
        let target = records.open_ones::<TargetState>().map_err(|error| error.to_string())?;
        let source = source.into_iter().map(|one| (one.id, one.side, one.domain));
        let all = source.chain(target.into_iter().map(|one| (one.id, one.side, one.domain)));
        Ok(all
            .filter(|(id, side, _)| !records.is_busy(id, *side))
            .map(|(_, _, domain)| domain)
            .collect::<Vec<_>>())
    });
    match open {
        Ok(domains) if domains.is_empty() => {}
        Ok(domains) => findings.push(Finding::warning(
            "earlier migrations",
            format!("cut off and not settled: {}", domains.join(", ")),
            "`dom0-migrator resolve` settles them",
        )),
        Err(problem) => findings.push(Finding::bad(what, problem, "look at the directory of records")),
    }
    findings
}

/// Whether something keeps the clock: certificates have dates, and the two hosts' times are compared in reports.
fn clock() -> Finding {
    let what = "clock";
    // SAFETY: a structure of integers, for which all zeros is a value; with no mode set nothing is changed.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live structure.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    if state < 0 || timex.status & libc::STA_UNSYNC != 0 {
        return Finding::warning(what, "nothing keeps it", "run a time daemon (systemd-timesyncd, chrony)");
    }
    Finding::good(what, "is kept")
}

/// Disks of each domain here, and whether dom0 can read them as the target would.
fn disks_of_domains() -> Vec<Finding> {
    let surveyed = Xenstore::open().and_then(|mut store| {
        domain::all(&mut store)?
            .into_iter()
            .filter(|domain| domain.id != DomainId(0))
            .map(|domain| Ok((domain.name, disks::survey(&mut store, domain.id)?)))
            .collect::<Result<Vec<_>, _>>()
    });
    let surveyed = match surveyed {
        Ok(surveyed) => surveyed,
        Err(error) => {
            return vec![Finding::bad("xenstore", error.to_string(), "start xenstored, or run this in dom0")];
        }
    };
    let mut findings = vec![Finding::good("domains", format!("{} beside dom0", surveyed.len()))];
    for (name, disks) in surveyed {
        for refused in disks.refused {
            findings.push(Finding::warning(
                format!("disk {} of {name}", refused.disk),
                format!("{}: its pages go over the network", refused.reason),
                "nothing need be done; only raw block devices and files can be read by the target",
            ));
        }
        for disk in disks.readable {
            let what = format!("disk {} of {name}", disk.path.display());
            findings.push(match Disk::open(&disk.path) {
                Ok(open) => {
                    Finding::good(what, format!("{} MiB, readable past the cache", open.size() >> 20))
                }
                Err(error) => Finding::warning(
                    what,
                    format!("{error}: its pages go over the network"),
                    "the target reads with O_DIRECT, which this file system or device does not do",
                ),
            });
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examination::State;

    #[test]
    fn xl_info_is_read() {
        let xl = Xl("host                   : a\nfree_memory            : 1234\nxen_major : 4\n".into());
        assert_eq!((xl.free_mib(), xl.value("xen_major"), xl.value("none")), (Some(1234), Some("4"), None));
    }

    #[test]
    fn records_that_are_open_are_told_and_a_directory_that_is_not_there_yet_is_no_fault() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("not/yet");
        let found = records(&path);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].state, path.exists()), (State::Good, false), "{found:?}");
        let id = crate::control::Token::random().unwrap();
        let open = Records::open(Some(directory.path())).unwrap();
        drop(open.begin(&id, SourceState::Sending, "db1", None, "host-b").unwrap());
        let found = records(directory.path());
        assert_eq!(found[1].state, State::Warning);
        assert!(found[1].found.contains("db1"), "{found:?}");
    }
}
