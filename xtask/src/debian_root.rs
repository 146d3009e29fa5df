//! A Debian system in a directory, with a package database of its own: where packages are installed, and machines that are no machines
//! answer ssh. Made once, kept in the cache, and never written to: each use lies over it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

use crate::apt::debian_mirror;
use crate::cache::{self, Key};
use crate::step::{line_of, run};

/// The suite, that of the lab's machines.
const SUITE: &str = "bookworm";

/// What is in it beside what every Debian has: what the packages need, so that they install without a network, and ssh.
const PACKAGES: &str =
    "dkms,kmod,libelf1,linux-headers-amd64,openssh-client,openssh-server,procps,xen-utils-common,zlib1g";

/// The system's directory; made by mmdebstrap on first use.
///
/// # Errors
/// When this is not run by root, or the mirror cannot be reached.
pub fn root() -> Result<PathBuf> {
    let key = Key::new("debian-root 1").with(SUITE.as_bytes()).with(PACKAGES.as_bytes());
    cache::get_or_make("debian-root", key, |dir| make(SUITE, PACKAGES, &dir.join("root")))
        .map(|made| made.join("root"))
}

/// Makes a Debian system in a directory: what every Debian has, and these packages (with commas between them), all of them configured.
///
/// # Errors
/// When this is not run by root, or the mirror cannot be reached.
pub fn make(suite: &str, packages: &str, directory: &Path) -> Result<()> {
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--mode=root", "--variant=minbase", "--format=directory"])
        .arg(format!("--include={packages}"))
        .arg(suite)
        .arg(directory)
        .arg(debian_mirror()?))
    .map(drop)
}

/// A system that begins as the one in the cache, and is written to.
#[derive(Debug)]
pub struct Machine {
    root: PathBuf,
    over: tempfile::TempDir,
}

/// Mounts the system in a namespace that ends with the program.
const INSIDE: &str = "root=$1 over=$2; shift 2
mount -t overlay overlay -o \"lowerdir=$root,upperdir=$over/upper,workdir=$over/work\" \"$over/merged\"
mount --rbind /proc \"$over/merged/proc\"
mount --rbind /dev \"$over/merged/dev\"
exec chroot \"$over/merged\" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C \
DEBIAN_FRONTEND=noninteractive \"$@\"";

impl Machine {
    /// A new one.
    ///
    /// # Errors
    /// Those of [`root`].
    pub fn new() -> Result<Self> {
        let over = tempfile::tempdir().context("cannot make a temporary directory")?;
        for directory in ["upper", "work", "merged"] {
            fs::create_dir(over.path().join(directory))?;
        }
        Ok(Self { root: root()?, over })
    }

    /// Where what was written since the beginning lies; files can be put here too.
    pub fn written(&self) -> PathBuf {
        self.over.path().join("upper")
    }

    /// Puts a file into it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn put(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.written().join(to.trim_start_matches('/'));
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
        Ok(())
    }

    /// A command that runs a program in it.
    pub fn command(&self, program: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "/bin/sh", "-ec", INSIDE, "sh"])
            .arg(&self.root)
            .arg(self.over.path())
            .args(program);
        command
    }

    /// Runs a program in it to its end: whether it ended well, and all that it said.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn try_run(&self, program: &[&str]) -> Result<(bool, String)> {
        let Output { status, stdout, stderr } =
            self.command(program).output().context("cannot start unshare (package util-linux)")?;
        Ok((status.success(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned()))
    }

    /// Runs a program in it, which must end well; all that it said.
    ///
    /// # Errors
    /// When it does not.
    pub fn run(&self, program: &[&str]) -> Result<String> {
        match self.try_run(program)? {
            (true, words) => Ok(words),
            (false, words) => {
                let line = line_of(Command::new(program[0]).args(&program[1..]));
                bail!("in the Debian root: `{line}` failed:\n{words}")
            }
        }
    }

    /// What was written since the beginning ([`traces`]).
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn traces(&self) -> Result<Vec<String>> {
        traces(&self.written())
    }
}

/// Files that only say that packages came or went: dpkg's own, logs, caches, what depmod writes anew for any module.
const BY_NATURE: &[&str] =
    &["/var/lib/dpkg/", "/var/lib/apt/", "/var/log/", "/var/cache/", "/root/", "/tmp/", "/run/", "/dev/"];

/// All files that were written, changed or removed in an overlay's upper directory, but for those that say so by their nature.
///
/// # Errors
/// When it cannot be read.
pub fn traces(upper: &Path) -> Result<Vec<String>> {
    let words =
        run(Command::new("find").arg(upper).args(["-mindepth", "1", "!", "-type", "d", "-printf", "/%P\n"]))?;
    let depmod = |path: &str| {
        path.contains("lib/modules/")
            && path.rsplit('/').next().is_some_and(|name| name.starts_with("modules."))
    };
    let mut traces: Vec<String> = String::from_utf8_lossy(&words)
        .lines()
        .filter(|path| !BY_NATURE.iter().any(|prefix| path.starts_with(prefix)) && !depmod(path))
        .map(str::to_owned)
        .collect();
    traces.sort();
    Ok(traces)
}
