//! What each of the two packages holds, whatever archive it goes into.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::tree::Tree;
use crate::build::module::layout as dkms;
use crate::deployment::root;
use crate::step::run;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A guest with mysqld.
    Guest,
    /// A Xen host.
    Dom0,
}

impl Role {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Guest, Self::Dom0];

    /// As the tarball and `install.sh` call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Dom0 => "dom0",
        }
    }

    /// The Debian package.
    pub fn package(self) -> &'static str {
        match self {
            Self::Guest => "poolskip-guest",
            Self::Dom0 => "poolskip-dom0",
        }
    }

    /// The program.
    pub fn program(self) -> &'static str {
        match self {
            Self::Guest => "guest-probe",
            Self::Dom0 => "dom0-migrator",
        }
    }
}

/// Where things go: as a Debian package has them, or as one who installs by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Places {
    /// Below `/usr`, pages compressed.
    Debian,
    /// `prefix/` and `root/`, which `install.sh` copies to its `--prefix` and to `/`.
    Tarball,
}

/// The path that units name in the tree; a package puts its own there.
pub const SBIN: &str = "/usr/local/sbin/";

impl Places {
    fn program(self, name: &str) -> String {
        match self {
            Self::Debian => format!("usr/sbin/{name}"),
            Self::Tarball => format!("prefix/sbin/{name}"),
        }
    }

    fn unit(self, name: &str) -> String {
        match self {
            // Not /usr/lib: Debian 12 has them here.
            Self::Debian => format!("lib/systemd/system/{name}"),
            Self::Tarball => format!("root/etc/systemd/system/{name}"),
        }
    }

    fn etc(self, name: &str) -> String {
        match self {
            Self::Debian => format!("etc/{name}"),
            Self::Tarball => format!("root/etc/{name}"),
        }
    }

    fn share(self, name: &str) -> String {
        match self {
            Self::Debian => format!("usr/share/{name}"),
            Self::Tarball => format!("prefix/share/{name}"),
        }
    }

    fn source(self, name: &str) -> String {
        match self {
            Self::Debian => format!("usr/src/{name}"),
            Self::Tarball => format!("root/usr/src/{name}"),
        }
    }

    fn modules_load(self) -> &'static str {
        match self {
            Self::Debian => "usr/lib/modules-load.d/poolskip.conf",
            Self::Tarball => "root/etc/modules-load.d/poolskip.conf",
        }
    }
}

/// Fills a tree with what a role needs. `program` is its built program, without debug information.
///
/// # Errors
/// When a file is missing, or the program does not write its pages.
pub fn contents(role: Role, places: Places, program: &Path) -> Result<Tree> {
    let mut tree = Tree::default();
    let from = |path: &str| {
        let path = root().join(path);
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    tree.file(
        places.program(role.program()),
        0o755,
        fs::read(program).with_context(|| format!("cannot read {}", program.display()))?,
    );
    let units: &[&str] = match role {
        Role::Guest => &["guest-probe/systemd/guest-probe.service"],
        Role::Dom0 => &[
            "dom0-migrator/systemd/poolskip-receive.service",
            "dom0-migrator/systemd/poolskip-receive.socket",
        ],
    };
    for unit in units {
        let name = unit.rsplit('/').next().unwrap_or(unit);
        let text = String::from_utf8(from(unit)?).context("a unit is text")?;
        ensure!(name.ends_with(".socket") || text.contains(SBIN), "{unit} starts nothing below {SBIN}");
        let text = if places == Places::Debian { text.replace(SBIN, "/usr/sbin/") } else { text };
        tree.file(places.unit(name), 0o644, text);
    }
    match role {
        Role::Guest => {
            tree.file(places.etc("poolskip/guest-probe.toml"), 0o644, from("guest-probe/guest-probe.toml")?);
            tree.directory(places.etc("poolskip/catalogue.d"), 0o755);
            tree.file(places.share("poolskip/catalogue.toml"), 0o644, from("guest-probe/catalogue.toml")?);
            tree.file(
                places.modules_load(),
                0o644,
                "# Poolskip: /dev/poolskip, by which guest-probe and dom0 talk.\npoolskip\n",
            );
            let work = tempfile::tempdir()?;
            for entry in fs::read_dir(dkms::write(work.path())?)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                // The text of the licence is on every Debian system.
                if places == Places::Debian && name == "LICENSE" {
                    continue;
                }
                let to = places.source(&format!("{}/{name}", dkms::directory_name()));
                tree.file(to, 0o644, fs::read(&path)?);
            }
        }
        Role::Dom0 => {
            tree.file(
                places.etc("poolskip/migrator.toml"),
                0o644,
                from("dom0-migrator/migrator.example.toml")?,
            );
            tree.directory(places.etc("poolskip/certificates"), 0o700);
        }
    }
    pages(&mut tree, role, places, program)?;
    Ok(tree)
}

/// Man pages and completions, as the program itself writes them.
fn pages(tree: &mut Tree, role: Role, places: Places, program: &Path) -> Result<()> {
    let work = tempfile::tempdir()?;
    for kind in ["man", "bash", "zsh", "fish"] {
        run(Command::new(program).args(["generate", kind, "--out"]).arg(work.path()))?;
    }
    let mut files: Vec<PathBuf> =
        fs::read_dir(work.path())?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = fs::read(&file)?;
        if name.ends_with(".8") && places == Places::Debian {
            tree.file(places.share(&format!("man/man8/{name}.gz")), 0o644, super::gzip(&bytes)?);
        } else if name.ends_with(".8") {
            tree.file(places.share(&format!("man/man8/{name}")), 0o644, bytes);
        } else if name.ends_with(".bash") {
            let to = format!("bash-completion/completions/{}", role.program());
            tree.file(places.share(&to), 0o644, bytes);
        } else if name.ends_with(".fish") {
            tree.file(places.share(&format!("fish/vendor_completions.d/{name}")), 0o644, bytes);
        } else {
            let to = if places == Places::Debian { "vendor-completions" } else { "site-functions" };
            tree.file(places.share(&format!("zsh/{to}/{name}")), 0o644, bytes);
        }
    }
    Ok(())
}
