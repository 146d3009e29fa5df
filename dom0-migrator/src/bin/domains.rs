//! Prints the domains of this host as the hypervisor has them, one JSON object a line:
//! `{"domain":1,"pages":180224,"dying":false,"paused":false,"shutdown":null}`.
//!
//! The lab's second opinion on what a migration leaves behind: it asks the hypervisor through the `xenctrl` crate, so neither through
//! the toolstack, which does not list a domain that it has forgotten, nor through the libraries' loader of `dom0-migrator` itself.
//! The crate takes the structures of the release whose headers it was built with, so this is built for the lab's release only, and is
//! not installed anywhere else.

use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;
use xenctrl::XenControl;

/// `XEN_DOMINF_dying`.
const DYING: u32 = 1 << 0;
/// `XEN_DOMINF_shutdown`.
const SHUTDOWN: u32 = 1 << 2;
/// `XEN_DOMINF_paused`.
const PAUSED: u32 = 1 << 3;
/// `XEN_DOMINF_shutdownshift`: the reason lies in eight bits from here.
const SHUTDOWN_REASON: u32 = 16;

#[derive(Serialize)]
struct Domain {
    /// Its number.
    domain: u16,
    /// Pages of 4 KiB that it has.
    pages: u64,
    /// Destroyed, but something still holds pages of it.
    dying: bool,
    /// Paused by the toolstack.
    paused: bool,
    /// Why it does not run any more (`SHUTDOWN_*` of Xen's `sched.h`: 0 power off, 1 reboot, 2 suspend, 3 crash).
    shutdown: Option<u32>,
}

fn main() -> ExitCode {
    match print() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("domains: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print() -> Result<(), Box<dyn std::error::Error>> {
    let control = XenControl::new_default()
        .map_err(|error| format!("cannot open the hypervisor's interface: {error}"))?;
    let mut out = std::io::stdout().lock();
    let mut next = 0;
    // The call gives the first domain whose number is at least that.
    while let Some(info) = control.domain_getinfolist(next).map_err(|error| error.to_string())? {
        let flags = info.flags;
        let domain = Domain {
            domain: info.domain,
            pages: info.tot_pages,
            dying: flags & DYING != 0,
            paused: flags & PAUSED != 0,
            shutdown: (flags & SHUTDOWN != 0).then_some((flags >> SHUTDOWN_REASON) & 0xff),
        };
        serde_json::to_writer(&mut out, &domain)?;
        writeln!(out)?;
        next = u32::from(info.domain) + 1;
    }
    Ok(())
}
