//! What the machine must have: privileges, kernel, the module's device.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use crate::privileges::FOWNER;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// What was found.
    pub found: String,
    /// Whether it is as it must be; none where it need not be any way.
    pub good: Option<bool>,
}

/// Capabilities by their bits (linux/capability.h), what each is for, and one that contains it.
const CAPABILITIES: [(&str, u32, &str, Option<u32>); 3] = [
    ("CAP_SYS_PTRACE", 19, "reads mysqld's memory", None),
    ("CAP_PERFMON", 38, "attaches probes", Some(CAP_SYS_ADMIN)),
    ("CAP_BPF", 39, "loads eBPF programs", Some(CAP_SYS_ADMIN)),
];
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
const BTF: &str = "/sys/kernel/btf/vmlinux";
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";
/// A name in the kernel's own types since uprobe_multi is there (Linux 6.6).
const UPROBE_MULTI: &[u8] = b"BPF_TRACE_UPROBE_MULTI";
/// The types of a kernel have about 6 MB.
const LARGEST_BTF: u64 = 64 << 20;
/// Ring buffers came with Linux 5.8.
const OLDEST_KERNEL: (u32, u32) = (5, 8);

/// Looks at everything; returns what was found, and what is missing, one sentence each.
pub(super) fn look(device: &Path) -> (Vec<Check>, Vec<String>) {
    let mut checks = vec![kernel(), btf(), uprobe_multi(), lockdown()];
    checks.extend(capabilities());
    let is_there = device.exists();
    checks.push(Check {
        name: "module's device",
        found: format!("{} is {}there", device.display(), if is_there { "" } else { "not " }),
        good: Some(is_there),
    });
    let missing = checks
        .iter()
        .filter(|check| check.good == Some(false))
        .map(|check| match check.name {
            "module's device" => {
                format!("{}: load the kernel module, or nothing can be published", check.found)
            }
            name => format!("{name}: {}", check.found),
        })
        .collect();
    (checks, missing)
}

fn kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim().to_owned();
    let version = parse_version(&release);
    let (major, minor) = OLDEST_KERNEL;
    let good = version.is_some_and(|version| version >= OLDEST_KERNEL);
    let found = if good { release } else { format!("{release}, where {major}.{minor} or later is needed") };
    Check { name: "kernel", found, good: Some(good) }
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|letter: char| !letter.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn btf() -> Check {
    let bytes = fs::metadata(BTF).map(|meta| meta.len());
    let found = match &bytes {
        Ok(bytes) => format!("{BTF} has {bytes} bytes"),
        Err(error) => format!("{BTF}: {error} (the kernel needs CONFIG_DEBUG_INFO_BTF)"),
    };
    Check { name: "BTF", found, good: Some(bytes.is_ok()) }
}

fn uprobe_multi() -> Check {
    let mut types = Vec::new();
    let read = File::open(BTF).and_then(|file| file.take(LARGEST_BTF).read_to_end(&mut types));
    let has = read.is_ok() && types.windows(UPROBE_MULTI.len()).any(|window| window == UPROBE_MULTI);
    let found =
        if has { "the kernel has it" } else { "the kernel has it not: probes are attached one by one" };
    Check { name: "uprobe_multi", found: found.to_owned(), good: None }
}

fn lockdown() -> Check {
    let text = fs::read_to_string(LOCKDOWN).unwrap_or_default();
    let mode = text.split(['[', ']']).nth(1).unwrap_or("not there").to_owned();
    Check { name: "lockdown", found: mode, good: None }
}

fn capabilities() -> Vec<Check> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = parse_capabilities(&status);
    // Since Linux 5.11 eBPF maps count as the control group's memory, and need no locked memory.
    let memlock = effective >> CAP_SYS_RESOURCE & 1 != 0;
    let memlock = if memlock { "here" } else { "not here: needed before Linux 5.11 only" };
    let checks = CAPABILITIES.into_iter().map(|(name, bit, purpose, contained_in)| {
        let has = |bit: u32| effective >> bit & 1 != 0;
        let good = has(bit) || contained_in.is_some_and(has);
        let found =
            if good { format!("here: {purpose}") } else { format!("not here: {purpose} (run as root)") };
        Check { name, found, good: Some(good) }
    });
    let fowner = if effective >> FOWNER & 1 != 0 { "here" } else { "not here" };
    let fowner = format!("{fowner}: lists cached pages of files, too");
    checks
        .chain([
            Check { name: "CAP_SYS_RESOURCE", found: memlock.to_owned(), good: None },
            Check { name: "CAP_FOWNER", found: fowner, good: None },
        ])
        .collect()
}

fn parse_capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_capabilities_are_parsed() {
        assert_eq!(parse_version("6.1.0-56-amd64"), Some((6, 1)));
        assert_eq!(parse_version("5.10"), Some((5, 10)));
        assert_eq!(parse_version(""), None);
        assert_eq!(parse_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n") >> 39 & 1, 1);
        assert_eq!(parse_capabilities("CapEff: nonsense"), 0);
    }

    #[test]
    fn a_missing_device_is_named() {
        let (checks, missing) = look(Path::new("/nonexistent/poolskip"));
        assert!(
            missing
                .iter()
                .any(|sentence| sentence.contains("/nonexistent/poolskip") && sentence.contains("module"))
        );
        assert!(checks.iter().any(|check| check.name == "CAP_BPF"));
    }
}
