//! This release against the one before: commands and filters of both on this machine, each way round.
//!
//! The one before is the newest tag that this checkout descends from; as long as there is none, a commit that is named here. It is built from
//! git, once: the programs are kept in the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::{self, Key};
use crate::deployment::{cargo, root};
use crate::ending::status_of_group;
use crate::step::{run as run_program, step};

/// What counts as the release before while there is no tag: the last commit before a stream could go in blocks and hosts could ask each
/// other what a migration would be. So what was added since is tried against a host that has never heard of it.
const BEFORE_TAGS: &str = "a33d792b38a4edcf2b5d19a3bde8fbc6a81e8c0e";

/// One side's filter as a program: the test's own source, built among those of the other release.
const PEER: &str = "dom0-migrator/examples/peer.rs";

/// The release before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Before {
    /// Its tag, or what stands in for one.
    name: String,
    commit: String,
}

/// What is known of it.
pub(super) enum Found {
    /// It can be built.
    Here(Before),
    /// This checkout does not have it; why, and what to do.
    NotHere(String),
}

/// Looks for it in this checkout's history.
///
/// # Errors
/// When git cannot be asked.
pub(super) fn find() -> Result<Found> {
    if !root().join(".git").exists() {
        return Ok(Found::NotHere(
            "these sources are no git checkout, so they have no release before".into(),
        ));
    }
    let tags = git(&["tag", "--list", "v*", "--sort=-version:refname", "--merged", "HEAD"])?;
    let head = git(&["rev-parse", "HEAD"])?;
    let mut before = Before { name: "the commit that stands in for one".into(), commit: BEFORE_TAGS.into() };
    for tag in tags.lines() {
        let commit = git(&["rev-parse", &format!("{tag}^{{commit}}")])?;
        // A release is tried against the one before it, not against itself.
        if commit != head {
            before = Before { name: tag.to_owned(), commit: commit.trim().to_owned() };
            break;
        }
    }
    let is_shallow = git(&["rev-parse", "--is-shallow-repository"])?.trim() == "true";
    let is_here = git(&["cat-file", "-e", &format!("{}^{{commit}}", before.commit)]).is_ok();
    Ok(match (is_here, is_shallow) {
        (true, _) => Found::Here(before),
        (false, true) => Found::NotHere(format!(
            "this clone is shallow and does not have {}, {}: `git fetch --unshallow --tags` brings it",
            before.name, before.commit
        )),
        (false, false) => bail!(
            "{}, {}, is not in this repository's history: name another one in {}",
            before.name,
            before.commit,
            file!()
        ),
    })
}

fn git(arguments: &[&str]) -> Result<String> {
    let words = run_program(Command::new("git").arg("-C").arg(root()).args(arguments))?;
    String::from_utf8(words).context("git said something that is no text")
}

/// Builds it if need be, and tries both releases against each other.
///
/// # Errors
/// When it does not build, or a test fails.
pub(super) fn run(before: &Before) -> Result<()> {
    let programs = build(before)?;
    step(&format!("this release against {} ({:.12})", before.name, before.commit), || {
        let mut tests = cargo();
        tests.args(["test", "--locked", "--package=dom0-migrator", "--test=versions", "--test=commands"]);
        // Those that are ignored otherwise, and these alone.
        tests.args(["--no-fail-fast", "--", "--ignored"]).env("POOLSKIP_PREVIOUS", &programs);
        let status = status_of_group(&mut tests)?;
        if !status.success() {
            bail!("cargo test ended with {status}");
        }
        Ok(())
    })
}

/// The directory with its programs.
fn build(before: &Before) -> Result<PathBuf> {
    let compiler = run_program(Command::new("rustc").arg("--version"))?;
    let key = Key::new("previous-1")
        .with(before.commit.as_bytes())
        .with(&compiler)
        .with_file(&root().join(PEER))?;
    cache::get_or_make("previous", key, |dir| {
        let tree = dir.join("tree");
        fs::create_dir(&tree)?;
        unpack(&before.commit, &tree)?;
        fs::create_dir_all(tree.join("dom0-migrator/examples"))?;
        fs::copy(root().join(PEER), tree.join(PEER))?;
        let target = tree.join("target");
        let mut build = cargo();
        build
            .current_dir(&tree)
            .args(["build", "--locked", "--package=dom0-migrator", "--bin=dom0-migrator", "--example=peer"])
            .arg("--target-dir")
            .arg(&target)
            // Nobody changes it afterwards, and debug information is most of what would be written.
            .env("CARGO_INCREMENTAL", "0")
            .env("CARGO_PROFILE_DEV_DEBUG", "0");
        run_program(&mut build).context(
            "the release before does not build; its `peer` is this checkout's, which must fit both",
        )?;
        fs::copy(target.join("debug/dom0-migrator"), dir.join("dom0-migrator"))?;
        fs::copy(target.join("debug/examples/peer"), dir.join("peer"))?;
        fs::remove_dir_all(&tree)?;
        Ok(())
    })
}

/// The sources of a commit, without a worktree that git would have to know of.
fn unpack(commit: &str, tree: &Path) -> Result<()> {
    let mut archive = Command::new("git")
        .arg("-C")
        .arg(root())
        .args(["archive", "--format=tar", commit])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start git")?;
    let archived = archive.stdout.take().context("git archive has no output")?;
    let unpacked = Command::new("tar").arg("-x").arg("-C").arg(tree).stdin(archived).status();
    let archived = archive.wait()?;
    if !archived.success() || !unpacked.context("cannot start tar")?.success() {
        bail!("the sources of {commit} cannot be unpacked");
    }
    Ok(())
}
