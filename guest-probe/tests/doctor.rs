//! `guest-probe doctor` and `guest-probe catalogue` on programs that are no mysqld, or damaged ones: one clear sentence, an exit code of its
//! kind, and never an entry.

#![allow(clippy::unwrap_used, reason = "an integration test: clippy knows only #[test] functions as tests")]

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Exit codes (`guest_probe::exit`): nothing would be listed; the program file is damaged or foreign; no such process; anything else.
const NOT_USABLE: i32 = 10;
const BAD_PROGRAM: i32 = 11;
const NO_MYSQLD: i32 = 3;
const FAILURE: i32 = 1;

fn guest_probe(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_guest-probe")).args(arguments).output().unwrap()
}

/// The doctor's words on a file; its exit code is this one.
fn doctor(file: &Path, code: i32) -> String {
    let output = guest_probe(&["doctor", "--binary", file.to_str().unwrap()]);
    let words =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{words}");
    assert!(!words.contains("panicked"), "{words}");
    words
}

/// A mysqld of Debian.
fn mysqld() -> PathBuf {
    let root = std::env::var_os("POOLSKIP_MYSQL_ROOT")
        .expect("POOLSKIP_MYSQL_ROOT is not set: this test needs an unpacked root with mysqld; `cargo xtask test` makes one");
    Path::new(&root).join("usr/sbin/mysqld")
}

#[test]
fn a_known_binary_is_explained() {
    let words = doctor(&mysqld(), NOT_USABLE);
    assert!(words.contains("in the catalogue as mysql-server-core"), "{words}");
    assert!(words.contains("buf_flush_remove(buf_page_t*)") && words.contains("probed at a push"), "{words}");
    let json = guest_probe(&["doctor", "--json", "--binary", mysqld().to_str().unwrap()]);
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(report["symbols"].as_array().unwrap().len(), 11);
    assert_eq!(report["missing"].as_array().unwrap().len(), 0, "{report}");
}

#[test]
fn a_truncated_binary_is_refused_or_still_known() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("mysqld");
    fs::copy(mysqld(), &copy).unwrap();
    let whole = fs::metadata(&copy).unwrap().len();
    let file = File::options().write(true).open(&copy).unwrap();
    for sixteenth in (0..16).rev() {
        file.set_len(whole * sixteenth / 16).unwrap();
        // The table of sections is at the file's end, so every cut is noticed.
        let words = doctor(&copy, BAD_PROGRAM);
        assert!(words.contains("of the ELF file"), "{sixteenth}/16: {words}");
    }
}

#[test]
fn a_binary_of_another_architecture_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("mysqld");
    let mut bytes = vec![0; 4096];
    File::open(mysqld()).unwrap().read_exact(&mut bytes).unwrap();
    fs::write(&copy, &bytes).unwrap();
    let mut file = File::options().write(true).open(&copy).unwrap();
    file.seek(SeekFrom::Start(18)).unwrap();
    file.write_all(&[0xb7, 0]).unwrap();
    assert!(doctor(&copy, BAD_PROGRAM).contains("machine 183: guest-probe is for x86-64"));
}

#[test]
fn a_binary_without_symbols_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("stripped");
    fs::copy(env!("CARGO_BIN_EXE_guest-probe"), &copy).unwrap();
    let strip = Command::new("strip").args(["--strip-all", "--remove-section=.dynsym"]).arg(&copy).status();
    assert!(strip.unwrap().success());
    let words = doctor(&copy, NOT_USABLE);
    assert!(words.contains("not in the catalogue") && words.contains("no symbols at all"), "{words}");
    assert!(words.contains("nothing would be listed"), "{words}");
    assert!(words.contains("missing     buf_flush_remove: the program has no such symbol"), "{words}");
}

#[test]
fn what_is_no_program_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    fs::write(&empty, "").unwrap();
    let text = dir.path().join("text");
    fs::write(&text, "#!/bin/sh\n".repeat(100)).unwrap();
    for (file, words, code) in [
        (empty, "cannot read 64 bytes at 0x0 of the ELF file", BAD_PROGRAM),
        (text, "not a sound ELF file", BAD_PROGRAM),
        (dir.path().to_path_buf(), "no regular file", FAILURE),
        (dir.path().join("nothing"), "cannot open", FAILURE),
    ] {
        let said = doctor(&file, code);
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn an_entry_needs_a_running_server() {
    let dir = tempfile::tempdir().unwrap();
    let output_path = dir.path().join("entry.toml");
    // This very test is running, but it is no mysqld.
    let pid = std::process::id().to_string();
    let own = std::env::current_exe().unwrap();
    for subject in [&["--pid", pid.as_str()][..], &[own.to_str().unwrap()][..]] {
        let mut arguments = vec!["catalogue", "add", "-o", output_path.to_str().unwrap()];
        arguments.extend(subject);
        let output = guest_probe(&arguments);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(NOT_USABLE), "{words}");
        assert!(words.contains("buf_pool_ptr: the program has no such symbol"), "{words}");
        assert!(!output_path.exists(), "an entry was made of nothing");
    }
    let listed = guest_probe(&["catalogue", "list"]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("mysql-server-core"));
    let nobody = guest_probe(&["doctor", "--pid", "2147483647"]);
    assert_eq!(nobody.status.code(), Some(NO_MYSQLD));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("process 2147483647 cannot be looked at"));
}
