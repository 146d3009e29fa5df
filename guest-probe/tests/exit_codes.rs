//! `guest-probe` as it ends when something is missing: a code of its own for each kind, and one sentence.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use guest_probe::exit::Exit;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Runs it; its exit code and what it says on stderr.
fn ends(arguments: &[&str], without_capabilities: bool) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_guest-probe"));
    command.args(arguments).env_remove("POOLSKIP_LOG");
    let drop_all = || {
        for capability in 0..64 {
            // SAFETY: a plain system call with integers.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
                break;
            }
        }
        Ok(())
    };
    if without_capabilities {
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(drop_all) };
    }
    let output = command.output().expect("guest-probe was built for this test");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Runs it with another `/etc`.
fn ends_in(arguments: &[&str], etc: &Path) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_guest-probe"));
    command.args(arguments).env_remove("POOLSKIP_LOG");
    let etc = etc.to_path_buf();
    let enter = move || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some(&etc), "/etc", none, MsFlags::MS_BIND, none)?;
        Ok(())
    };
    // SAFETY: the closure makes system calls only; its paths are short enough to need no memory.
    unsafe { command.pre_exec(enter) };
    let output = command.output().expect("guest-probe was built for this test");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// One sentence of guest-probe with these words.
fn is_one_sentence(words: &str, with: &str) {
    assert_eq!(words.trim().lines().count(), 1, "{words}");
    assert!(words.starts_with("guest-probe: ") && words.contains(with), "{words}");
}

fn code(exit: Exit) -> Option<i32> {
    Some(i32::from(exit as u8))
}

#[test]
fn each_failure_has_its_code_and_its_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let socket = path("probe.sock");

    let (exit, words) = ends(&["run", "--device", &path("no-device"), "--socket", &socket], false);
    assert_eq!(exit, code(Exit::NoModule), "{words}");
    is_one_sentence(&words, "insmod");

    let (exit, words) = ends(&["status", "--socket", &socket], false);
    assert_eq!(exit, code(Exit::OtherProbe), "{words}");
    is_one_sentence(&words, "guest-probe run");

    fs::write(dir.path().join("x.toml"), "mode = \"never\"\n").unwrap();
    let (exit, words) = ends(&["run", "--config", &path("x.toml")], false);
    assert_eq!(exit, code(Exit::Configuration), "{words}");
    assert!(words.contains("x.toml") && words.contains("on-demand"), "{words}");

    let (exit, words) = ends(&["run", "--config", &path("none.toml")], false);
    assert_eq!(exit, code(Exit::Configuration), "{words}");
    is_one_sentence(&words, "none.toml");

    let (exit, words) = ends(&["snapshot", "--pid", "2147483647"], false);
    assert_eq!(exit, code(Exit::NoMysqld), "{words}");
    is_one_sentence(&words, "2147483647");

    // This very program is no mysqld.
    let (exit, words) = ends(&["snapshot", "--pid", &std::process::id().to_string()], false);
    assert_eq!(exit, code(Exit::UnknownBuild), "{words}");
    is_one_sentence(&words, "build");

    // A catalogue with nonsense is refused as a whole, whatever it is wanted for.
    let nonsense = dir.path().join("etc/poolskip/catalogue.d");
    fs::create_dir_all(&nonsense).unwrap();
    for (text, with) in [
        ("[[build]]\npackage = 7\n", "x.toml"),
        (&"\0".repeat(100), "x.toml"),
        (include_str!("../catalogue.toml"), "two entries have the build id"),
        (
            &include_str!("../catalogue.toml")
                .replace("cc8a1882", "aa8a1882")
                .replace("size = 368", "size = 8"),
            "lies outside",
        ),
    ] {
        fs::write(nonsense.join("x.toml"), text).unwrap();
        for words in [&["catalogue", "list"][..], &["snapshot", "--pid", &std::process::id().to_string()]] {
            let (exit, said) = ends_in(words, &dir.path().join("etc"));
            assert_eq!(exit, code(Exit::BadCatalogue), "{said}");
            assert!(said.starts_with("guest-probe: ") && said.contains(with), "{said}");
        }
    }

    // Whatever is done to this process needs a capability once there is one that it has and the other has not.
    let (exit, words) = ends(&["snapshot", "--pid", "1"], true);
    assert_eq!(exit, code(Exit::NotPermitted), "{words}");
    is_one_sentence(&words, "root");

    // The kernel is asked before anybody waits for the probes.
    let (exit, words) = ends(&["run", "--device", "/dev/null", "--socket", &socket], true);
    assert_eq!(exit, code(Exit::NotPermitted), "{words}");
    let last = words.trim().lines().last().unwrap_or_default();
    is_one_sentence(last, "CAP_BPF");
}
