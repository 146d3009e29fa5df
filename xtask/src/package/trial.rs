//! The packages tried: what is in them, whether they are the same twice, what lintian says, whether they install and go without a trace.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::contents::Role;
use super::{Made, Programs, VERSION, make};
use crate::debian_root::Machine;
use crate::deploy;
use crate::step::{line_of, run as run_program, step};

/// A time that is not today's.
const EPOCH: u64 = 1_600_000_000;

/// Builds and tries them; all trials, even when one fails.
///
/// # Errors
/// What failed.
pub fn run() -> Result<()> {
    let programs = Programs::build()?;
    let out = tempfile::tempdir()?;
    let made = make(&programs, &out.path().join("first"), EPOCH)?;
    let work = out.path();
    let trials: [(&str, &dyn Fn() -> Result<()>); 8] = [
        ("the same bytes twice", &|| same_twice(&programs, &made, work)),
        ("what is in the packages", &|| contents(&made, work)),
        ("man pages render, programs explain themselves", &|| pages(&made, work)),
        ("lintian", &|| lintian(&made)),
        ("poolskip-guest installs, builds its module, and goes without a trace", &|| guest(&made)),
        (
            "poolskip-dom0 installs, refuses to go while a migration is open, and goes without a trace",
            &|| dom0(&made),
        ),
        ("the tarball installs and goes without a trace", &|| tarball(&made, work)),
        ("deployed over ssh to three systems, and removed again", &|| {
            deploy::trial::run(&work.join("first"))
        }),
    ];
    let mut failed = Vec::new();
    for (name, trial) in trials {
        if let Err(error) = step(name, trial) {
            eprintln!("FAILED {name}: {error:?}");
            failed.push(name);
        }
    }
    println!("packages: {} passed, {} failed", trials.len() - failed.len(), failed.len());
    ensure!(failed.is_empty(), "failed: {}", failed.join("; "));
    Ok(())
}

fn same_twice(programs: &Programs, made: &Made, work: &Path) -> Result<()> {
    let again = make(programs, &work.join("second"), EPOCH)?;
    for (first, second) in made.all().iter().zip(again.all()) {
        ensure!(
            fs::read(first)? == fs::read(&second)?,
            "{} differs from {}: something of the moment is in it",
            first.display(),
            second.display()
        );
    }
    run_program(
        Command::new("sha256sum").args(["--check", "--quiet", "SHA256SUMS"]).current_dir(work.join("first")),
    )
    .map(drop)
}

/// Modes and paths of all files, man pages by their number, against the lists in the tree.
fn contents(made: &Made, _: &Path) -> Result<()> {
    for (role, deb) in Role::ALL.iter().zip(&made.debs) {
        let listed = String::from_utf8(run_program(Command::new("dpkg-deb").arg("--contents").arg(deb))?)?;
        let mut lines = Vec::new();
        let mut pages = 0;
        for line in listed.lines() {
            let mut fields = line.split_whitespace();
            let (mode, owner) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
            let path = line.rsplit(' ').next().unwrap_or_default();
            ensure!(owner == "root/root", "{path} belongs to {owner}");
            if path.starts_with("./usr/share/man/man8/") && path.ends_with(".gz") {
                pages += 1;
            } else if mode != "drwxr-xr-x" || path.starts_with("./etc/") {
                // Of directories, those of an operator's own, and those that have a mode of their own.
                lines.push(format!("{mode} {path}"));
            }
        }
        let expected = match role {
            Role::Guest => include_str!("files/poolskip-guest.list"),
            Role::Dom0 => include_str!("files/poolskip-dom0.list"),
        };
        let expected = expected.replace("@VERSION@", VERSION);
        let (found, expected): (BTreeSet<&str>, BTreeSet<&str>) =
            (lines.iter().map(String::as_str).collect(), expected.lines().collect());
        let more: Vec<_> = found.difference(&expected).collect();
        let less: Vec<_> = expected.difference(&found).collect();
        ensure!(
            more.is_empty() && less.is_empty(),
            "{}: not in its list: {more:#?}; not in the package: {less:#?}",
            role.package()
        );
        ensure!(pages >= 7, "{} has {pages} man pages", role.package());
        ensure!(
            !role_words(deb)?.contains("@VERSION@"),
            "{}: a script's version was not filled in",
            role.package()
        );
    }
    Ok(())
}

/// A package's control files, as one text.
fn role_words(deb: &Path) -> Result<String> {
    let work = tempfile::tempdir()?;
    run_program(Command::new("dpkg-deb").arg("--control").arg(deb).arg(work.path()))?;
    let mut words = String::new();
    for entry in fs::read_dir(work.path())? {
        words.push_str(&fs::read_to_string(entry?.path())?);
    }
    Ok(words)
}

fn pages(made: &Made, work: &Path) -> Result<()> {
    for (role, deb) in Role::ALL.iter().zip(&made.debs) {
        let unpacked = work.join(role.name());
        run_program(Command::new("dpkg-deb").arg("--extract").arg(deb).arg(&unpacked))?;
        let program = unpacked.join("usr/sbin").join(role.program());
        for option in ["--help", "--version"] {
            let said = String::from_utf8(run_program(Command::new(&program).arg(option))?)?;
            ensure!(said.contains(role.program()), "{} {option} says {said:?}", role.program());
        }
        let manual = unpacked.join("usr/share/man/man8");
        for entry in fs::read_dir(&manual)? {
            let page = entry?.path();
            // As lintian does it: every warning of groff's is one of ours.
            let mut man = Command::new("man");
            man.args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"]).arg(&page);
            man.env("MANROFFSEQ", "").env("MANWIDTH", "80").env("LC_ALL", "C.UTF-8");
            let output = man.output().context("cannot start man")?;
            let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(
                output.status.success() && complaints.is_empty(),
                "{}: `{}` says {complaints}",
                page.display(),
                line_of(&man)
            );
        }
        let bash = unpacked.join("usr/share/bash-completion/completions").join(role.program());
        run_program(Command::new("bash").arg("-n").arg(&bash))?;
    }
    Ok(())
}

/// Everything that lintian says, but for what an override in the package answers.
fn lintian(made: &Made) -> Result<()> {
    let mut lintian = Command::new("lintian");
    lintian.args(["--allow-root", "--no-cfg", "--tag-display-limit", "0", "--fail-on", "error,warning,info"]);
    // It takes machine code such as "wTH" for English; which words it finds is another matter with each build, so that no override fits.
    lintian.args(["--suppress-tags", "spelling-error-in-binary"]);
    lintian.args(["--display-info"]).args(&made.debs);
    let output = lintian.output().context("cannot start lintian")?;
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success()
        || words.lines().any(|line| ["E: ", "W: ", "I: "].iter().any(|tag| line.starts_with(tag)))
    {
        bail!("lintian says:\n{words}{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn installed(machine: &Machine, deb: &Path) -> Result<String> {
    machine.put(deb, "/tmp/package.deb")?;
    machine.run(&["dpkg", "--install", "/tmp/package.deb"])
}

fn guest(made: &Made) -> Result<()> {
    let machine = Machine::new()?;
    let said = installed(&machine, &made.debs[0])?;
    let status = machine.run(&["dkms", "status"])?;
    ensure!(
        status.contains(&format!("poolskip/{VERSION}")) && status.contains("installed"),
        "DKMS says {status:?} after:\n{said}"
    );
    ensure!(find(&machine.written(), "poolskip.ko")?.is_some(), "there is no module after:\n{said}");
    ensure!(machine.run(&["dpkg", "--verify", "poolskip-guest"])?.is_empty(), "dpkg --verify complains");
    let enabled = "/etc/systemd/system/multi-user.target.wants/guest-probe.service";
    ensure!(machine.traces()?.iter().any(|path| path == enabled), "the probe does not start at boot");
    // Once more, as an upgrade does it.
    installed(&machine, &made.debs[0])?;
    // Removed, it leaves its configuration; purged, nothing.
    machine.run(&["dpkg", "--remove", "poolskip-guest"])?;
    let left = machine.traces()?;
    ensure!(
        left.iter().any(|path| path == "/etc/poolskip/guest-probe.toml"),
        "the configuration went: {left:?}"
    );
    ensure!(
        !left.iter().any(|path| path.contains(".ko") || path.starts_with("/usr/sbin/")),
        "left: {left:?}"
    );
    machine.run(&["dpkg", "--purge", "poolskip-guest"])?;
    nothing_left(&machine)
}

fn dom0(made: &Made) -> Result<()> {
    let machine = Machine::new()?;
    installed(&machine, &made.debs[1])?;
    ensure!(machine.run(&["dpkg", "--verify", "poolskip-dom0"])?.is_empty(), "dpkg --verify complains");
    let wants = machine.traces()?;
    ensure!(
        !wants.iter().any(|path| path.contains(".wants/")),
        "something listens without being asked: {wants:?}"
    );
    machine.run(&[
        "dom0-migrator",
        "certificates",
        "make",
        "--out",
        "/etc/poolskip/certificates",
        "host-a",
    ])?;
    // A migration that was cut off, as its record says.
    let record = machine.written().join("var/lib/poolskip/migrations");
    fs::create_dir_all(&record)?;
    let id = "00112233445566778899aabbccddeeff";
    let record = record.join(format!("{id}-source.json"));
    fs::write(&record, OPEN_RECORD.replace("@ID@", id))?;
    let (removed, said) = machine.try_run(&["dpkg", "--remove", "poolskip-dom0"])?;
    ensure!(!removed && said.contains("dom0-migrator resolve"), "removed with an open migration: {said}");
    fs::remove_file(&record)?;
    machine.run(&["dpkg", "--remove", "poolskip-dom0"])?;
    let left = machine.traces()?;
    ensure!(
        left.iter().any(|path| path == "/etc/poolskip/migrator.toml"),
        "the configuration went: {left:?}"
    );
    machine.run(&["dpkg", "--purge", "poolskip-dom0"])?;
    nothing_left(&machine)
}

/// The record of a migration that was cut off.
const OPEN_RECORD: &str = r#"{"version":1,"id":"@ID@","side":"source","domain":"db1","domain_id":3,"peer":"host-b:8002","boot":"",
"xl":null,"state":"sending","history":[["sending",0]],"note":null}"#;

fn tarball(made: &Made, work: &Path) -> Result<()> {
    let directory = work.join("tarball");
    fs::create_dir(&directory)?;
    run_program(Command::new("tar").arg("-xzf").arg(&made.tarball).arg("-C").arg(&directory))?;
    let script = directory.join(format!("poolskip-{VERSION}-amd64/install.sh"));
    run_program(Command::new("sh").arg("-n").arg(&script))?;
    let root = work.join("other-system");
    fs::create_dir_all(root.join("etc"))?;
    let install = |arguments: &[&str]| {
        run_program(Command::new("sh").arg(&script).args(arguments).arg("--root").arg(&root))
            .map(|words| String::from_utf8_lossy(&words).into_owned())
    };
    for role in Role::ALL {
        install(&[role.name()])?;
        let program = root.join("usr/local/sbin").join(role.program());
        let said = String::from_utf8(run_program(Command::new(program).arg("--version"))?)?;
        ensure!(said.contains(VERSION), "{said}");
        // Twice is once.
        let before = all_files(&root)?;
        install(&[role.name()])?;
        ensure!(before == all_files(&root)?, "a second installation changes something");
    }
    // What was changed stays, unless all is to go.
    let configuration = root.join("etc/poolskip/migrator.toml");
    fs::write(&configuration, "plain = true\n")?;
    let said = install(&["dom0"])?;
    ensure!(said.contains("migrator.toml is there already, and is kept"), "{said}");
    install(&["--remove", "dom0"])?;
    ensure!(configuration.exists(), "a configuration that was changed is gone");
    install(&["--purge", "dom0"])?;
    ensure!(!configuration.exists(), "purged, and a configuration is there");
    install(&["--remove", "guest"])?;
    let left = all_files(&root)?;
    ensure!(left.is_empty(), "left: {left:?}");
    // Another prefix, and units that name it.
    install(&["guest", "--prefix", "/opt/poolskip"])?;
    let unit = fs::read_to_string(root.join("etc/systemd/system/guest-probe.service"))?;
    ensure!(unit.contains("ExecStart=/opt/poolskip/sbin/guest-probe run"), "{unit}");
    for wrong in [&["--prefix"][..], &["nobody"], &[], &["guest", "--prefix", "relative"]] {
        let status = Command::new("sh").arg(&script).args(wrong).output()?.status;
        ensure!(status.code() == Some(2), "{wrong:?} ends with {status}");
    }
    Ok(())
}

fn nothing_left(machine: &Machine) -> Result<()> {
    let left = machine.traces()?;
    ensure!(left.is_empty(), "purged, and yet there are {left:#?}");
    Ok(())
}

fn all_files(root: &Path) -> Result<Vec<String>> {
    let words = run_program(Command::new("find").arg(root).args(["-type", "f", "-printf", "%P\n"]))?;
    let mut files: Vec<String> = String::from_utf8_lossy(&words).lines().map(str::to_owned).collect();
    files.sort();
    Ok(files)
}

/// The file of this name somewhere below a directory.
fn find(below: &Path, name: &str) -> Result<Option<PathBuf>> {
    let words =
        run_program(Command::new("find").arg(below).args(["-name", &format!("{name}*"), "-type", "f"]))?;
    Ok(String::from_utf8_lossy(&words).lines().next().map(PathBuf::from))
}
