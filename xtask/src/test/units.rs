//! What systemd thinks of the units that the project ships.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::deployment::root;
use crate::step::run as run_program;

/// Units with the highest exposure that they may have, in tenths (0 to 100, `systemd-analyze security`), and why it is not less.
const LIMITS: [(&str, u32); 2] = [
    // Root, with CAP_SYS_ADMIN, CAP_BPF and CAP_SYS_PTRACE: probes in another process. It sees all processes, and has the loopback for metrics.
    ("guest-probe.service", 35),
    // Root of dom0 with the toolstack and the network: it starts xl, which may do anything to a domain. What it could be kept from is little.
    ("poolskip-receive.service", 91),
];

/// Looks at every unit in the tree.
///
/// # Errors
/// When one is more exposed than it may be, or one with a limit is not there.
pub fn check() -> Result<()> {
    let listed = run_program(Command::new("git").current_dir(root()).args(["ls-files", "*.service"]))?;
    let listed = String::from_utf8(listed).context("git's list is no text")?;
    let mut seen = Vec::new();
    for path in listed.lines().map(Path::new) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let limit = LIMITS.iter().find(|(unit, _)| *unit == name).map(|(_, limit)| *limit);
        let mut command = Command::new("systemd-analyze");
        command.current_dir(root()).args(["security", "--offline=true", "--no-pager"]);
        command.args(limit.map(|limit| format!("--threshold={limit}"))).arg(path);
        let words = run_program(&mut command)?;
        let words = String::from_utf8_lossy(&words);
        let overall =
            words.lines().find_map(|line| line.split_once("exposure level for ")).map(|(_, rest)| rest);
        eprintln!("  exposure of {}", overall.context("systemd-analyze says nothing of the exposure")?);
        seen.push(name);
    }
    if let Some((missing, _)) = LIMITS.iter().find(|(unit, _)| !seen.contains(unit)) {
        bail!("the unit {missing} is not in the tree");
    }
    Ok(())
}
