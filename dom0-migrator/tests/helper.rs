//! The save helper as libxl starts it, for a domain that is not there: on a machine without Xen as on one with it, libxl is told
//! why, gets its result with an errno, and sees the helper end well.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// The number under which libxl passes the stream.
const IO_FD: i32 = 19;
/// No domain has this number: the hypervisor keeps it for itself.
const NO_DOMAIN: &str = "32751";
/// Numbers of libxl's messages.
const LOG: u16 = 1;
const RESTORE_RESULTS: u16 = 9;
const COMPLETE: u16 = 10;

/// Messages up to "complete", each with its number, and the helper's exit code.
fn run(arguments: &[&str]) -> (Vec<(u16, Vec<u8>)>, Option<i32>) {
    let (near, _far) = io::pipe().unwrap();
    let stream = near.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_dom0-migrator"));
    command.args(arguments).env_remove("POOLSKIP_HANDOFF").stdin(Stdio::piped()).stdout(Stdio::piped());
    // SAFETY: duplicates a descriptor in the child, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || match libc::dup2(stream, IO_FD) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut helper = command.spawn().unwrap();
    let (mut replies, mut said) = (helper.stdin.take().unwrap(), helper.stdout.take().unwrap());
    let mut messages = Vec::new();
    loop {
        let mut length = [0; 2];
        said.read_exact(&mut length).unwrap();
        let mut body = vec![0; usize::from(u16::from_ne_bytes(length))];
        said.read_exact(&mut body).unwrap();
        let number = u16::from_ne_bytes([body[0], body[1]]);
        messages.push((number, body.split_off(2)));
        if number == COMPLETE {
            break;
        }
    }
    replies.write_all(&0_i32.to_ne_bytes()).unwrap();
    let mut rest = Vec::new();
    said.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"", "nothing follows the last message");
    (messages, helper.wait().unwrap().code())
}

fn check(messages: &[(u16, Vec<u8>)], code: Option<i32>) {
    assert_eq!(code, Some(0), "libxl takes anything else for a crash");
    let (_, result) = messages.last().unwrap();
    let number = |at: usize| i32::from_ne_bytes(result[at..at + 4].try_into().unwrap());
    assert_eq!(number(0), -1);
    assert!(number(4) > 0, "errno {}", number(4));
    assert!(messages.iter().any(|(kind, _)| *kind == LOG), "libxl is told why");
}

#[test]
fn a_save_that_cannot_be_ends_as_libxl_wants_it() {
    let (messages, code) = run(&["--save-domain", &IO_FD.to_string(), "-1", NO_DOMAIN, "1", "136", "0"]);
    check(&messages, code);
}

#[test]
fn a_restore_that_cannot_be_ends_as_libxl_wants_it() {
    let io_fd = IO_FD.to_string();
    let (messages, code) =
        run(&["--restore-domain", &io_fd, "-1", NO_DOMAIN, "1", "0", "2", "0", "768", "0"]);
    check(&messages, code);
    let kinds: Vec<u16> = messages.iter().map(|(kind, _)| *kind).collect();
    assert!(kinds.contains(&RESTORE_RESULTS), "{kinds:?}");
}

#[test]
fn a_command_line_of_another_libxl_is_refused_before_anything_is_done() {
    let refused = Command::new(env!("CARGO_BIN_EXE_dom0-migrator"))
        .args(["--save-domain", "19", "-1", NO_DOMAIN, "1", "136", "0", "77"])
        .output()
        .unwrap();
    assert!(!refused.status.success() && refused.stdout.is_empty());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("arguments more than this program knows"));
}
