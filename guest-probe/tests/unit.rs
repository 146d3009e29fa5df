//! The systemd unit, as systemd itself reads it.

use std::fs;
use std::process::{Command, Output};

const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/guest-probe.service");

/// The most that `systemd-analyze security` may find exposed, in tenths; a unit without any hardening has 96. What is left is what
/// probing another process takes: CAP_SYS_ADMIN, CAP_SYS_PTRACE, all of /proc, other users' processes.
const MOST_EXPOSED: &str = "35";

fn systemd_analyze(arguments: &[&str]) -> Output {
    let output = Command::new("systemd-analyze").args(arguments).output();
    output.expect("systemd-analyze is there: `cargo xtask setup` installs the package systemd")
}

#[test]
fn every_line_means_something() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("guest-probe.service");
    // Where the program is not installed, nothing else is to be complained about.
    let unit = fs::read_to_string(UNIT).unwrap();
    let started = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let program = started.split(' ').next().unwrap();
    fs::write(&copy, unit.replace(program, "/bin/true")).unwrap();
    let output = systemd_analyze(&["verify", "--man=no", copy.to_str().unwrap()]);
    let words = String::from_utf8_lossy(&output.stderr);
    // It may complain about units of this machine.
    let ours: Vec<&str> = words.lines().filter(|line| line.contains("guest-probe.service")).collect();
    assert!(ours.is_empty(), "{ours:?}");
}

#[test]
fn little_is_exposed() {
    let threshold = format!("--threshold={MOST_EXPOSED}");
    let output = systemd_analyze(&["security", "--offline=true", "--no-pager", &threshold, UNIT]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
