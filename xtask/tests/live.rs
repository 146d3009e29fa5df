//! The live picture of `cargo xtask demo`, by the program itself, of a migration's lines from a file: on a terminal, and where there is none.
//! The file is what `dom0-migrator migrate --progress json` wrote in the lab: a guest of 1120 MiB with a pool of 768 MiB under sysbench's
//! oltp_read_write, over a link of 64 Mbit/s.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::io::{ErrorKind, Read as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::pty::{Winsize, openpty};

/// The lines.
fn recorded() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/demo/files/progress.jsonl")
}

fn replay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["demo", "--replay"]).arg(recorded()).stdin(Stdio::null()).env_remove("NO_COLOR");
    command
}

/// All that the program writes to a terminal of this size.
fn on_a_terminal(columns: u16, lines: u16, command: &mut Command) -> String {
    let size = Winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).unwrap();
    let slave: OwnedFd = pty.slave;
    let mut child =
        command.stdout(Stdio::from(slave.try_clone().unwrap())).stderr(Stdio::from(slave)).spawn().unwrap();
    // Our copies of the other end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut master = std::fs::File::from(pty.master);
    let (mut said, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        match master.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) => said.extend_from_slice(&chunk[..length]),
            // The last of those who had the other end has closed it.
            Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(child.wait().unwrap().success(), "{}", String::from_utf8_lossy(&said));
    String::from_utf8(said).unwrap()
}

/// What stands on a terminal that was empty, line by line; it knows no more than the picture needs, and ends at anything else.
fn screen(said: &str) -> Vec<String> {
    let (mut screen, mut line, mut column) = (vec![String::new()], 0_usize, 0_usize);
    let mut chars = said.chars();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => {
                assert_eq!(chars.next(), Some('['));
                let mut number = String::new();
                let command = loop {
                    match chars.next().unwrap() {
                        c @ ('0'..='9' | ';') => number.push(c),
                        c => break c,
                    }
                };
                match (command, number.as_str()) {
                    ('m', _) => {}
                    ('A', up) => line = line.checked_sub(up.parse().unwrap()).unwrap(),
                    ('K', "2") => screen[line].clear(),
                    other => panic!("{other:?}"),
                }
            }
            '\r' => column = 0,
            '\n' => {
                line += 1;
                if line == screen.len() {
                    screen.push(String::new());
                }
            }
            c => {
                assert_eq!(
                    column,
                    screen[line].chars().count(),
                    "written over something: {:?}",
                    screen[line]
                );
                screen[line].push(c);
                column += 1;
            }
        }
    }
    screen
}

#[test]
fn a_terminal_has_one_picture_that_ends_with_the_guest_at_the_target() {
    let said = on_a_terminal(90, 30, &mut replay());
    assert!(said.matches("\x1b[17A").count() > 10, "it was not drawn again and again: {said:?}");
    let screen = screen(&said);
    let text = screen.join("\n");
    assert_eq!(text.matches("■ db1").count(), 1, "{text}");
    let at = screen.iter().find_map(|line| line.find("■ db1")).unwrap();
    assert!(at > 45, "the guest is not at the target:\n{text}");
    for word in [
        "recorded",
        "source",
        "target",
        "pass ",
        "by reference",
        "zero",
        "whole",
        "network",
        "database",
        "passes",
    ] {
        assert!(text.contains(word), "no {word:?}:\n{text}");
    }
    assert!(said.contains("▶"), "nothing was ever under way");
    assert!(screen.iter().all(|line| line.chars().count() < 90), "{text}");
}

#[test]
fn without_a_terminal_there_are_plain_lines() {
    let output = replay().output().unwrap();
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && !said.contains('\x1b') && !said.contains('■'), "{said}");
    assert!(said.lines().count() > 10 && said.contains("by reference"), "{said}");
}

#[test]
fn a_terminal_without_room_gets_lines_too() {
    for (columns, lines) in [(50, 30), (90, 12)] {
        let said = on_a_terminal(columns, lines, &mut replay());
        assert!(!said.contains('\x1b') && said.contains("by reference"), "{said}");
    }
}

#[test]
fn a_person_who_wants_no_colours_gets_none() {
    let said = on_a_terminal(90, 30, replay().env("NO_COLOR", "1"));
    assert!(said.contains("■ db1") && !said.contains("\x1b[0;1;32m"), "{said}");
}
