//! Packages of another Debian suite than this machine's, resolved and fetched by apt itself in an area of its own: the machine's apt
//! state is neither read (but for the mirror it uses) nor changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::cache;
use crate::step::{run, step};

/// How long fetched package lists are used before the mirror is asked again.
const LISTS_LAST: Duration = Duration::from_secs(12 * 3600);

/// Where Debian keeps the keys of its archive.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A package, as the suite has it now.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

impl std::fmt::Display for Package {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

/// An apt of our own for one suite, kept in the cache. Holds a lock: one at a time.
pub struct Area {
    suite: &'static str,
    dir: PathBuf,
    _lock: Flock<fs::File>,
}

impl Area {
    /// Opens the area of a suite of the Debian archive, with package lists that are at most twelve hours old.
    ///
    /// # Errors
    /// When this is no Debian machine, or the mirror cannot be reached and no list was fetched before.
    pub fn open(suite: &'static str) -> Result<Self> {
        let dir = cache::dir()?.join(format!("apt-{suite}"));
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let lock_path = dir.join("lock");
        let lock_file = fs::File::create(&lock_path)?;
        let lock = Flock::lock(lock_file, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("cannot lock {}", lock_path.display()))?;
        let area = Self { suite, dir, _lock: lock };
        let line = format!("deb [signed-by={KEYRING}] {} {suite} main\n", debian_mirror()?);
        fs::write(area.dir.join("sources.list"), line)?;
        fs::write(area.dir.join("status"), "")?;
        if area.lists_age().is_none_or(|age| age > LISTS_LAST) {
            let fresh = area.refresh();
            if let Err(error) = fresh {
                if area.lists_age().is_none() {
                    return Err(error);
                }
                eprintln!("  using the package lists of {suite} that were fetched before: {error:#}");
            }
        }
        Ok(area)
    }

    /// Asks the mirror for new package lists.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn refresh(&self) -> Result<()> {
        step(&format!("package lists of Debian {}", self.suite), || run(self.apt().arg("update")))?;
        fs::write(self.stamp(), "")?;
        Ok(())
    }

    /// What installing `packages` into an empty root would install, sorted.
    ///
    /// # Errors
    /// When the suite lacks one of them.
    pub fn resolve(&self, packages: &[&str]) -> Result<Vec<Package>> {
        let output = run(self.apt().args(["install", "--simulate"]).args(packages))
            .with_context(|| format!("Debian {} cannot resolve: {}", self.suite, packages.join(" ")))?;
        let mut resolved: Vec<_> =
            String::from_utf8_lossy(&output).lines().filter_map(parse_simulated).collect();
        resolved.sort();
        resolved.dedup();
        if resolved.is_empty() {
            bail!("apt resolved {} to nothing", packages.join(" "));
        }
        Ok(resolved)
    }

    /// Downloads exactly these packages and returns their files, in the same order.
    ///
    /// # Errors
    /// When the mirror has moved on to newer versions, or cannot be reached.
    pub fn download(&self, packages: &[Package]) -> Result<Vec<PathBuf>> {
        let into = self.dir.join("debs");
        if into.exists() {
            fs::remove_dir_all(&into)?;
        }
        fs::create_dir_all(&into)?;
        let names = packages.iter().map(|package| format!("{}={}", package.name, package.version));
        run(self.apt().arg("download").args(names).current_dir(&into))?;
        packages.iter().map(|package| find_deb(&into, package)).collect()
    }

    fn stamp(&self) -> PathBuf {
        self.dir.join("fetched")
    }

    fn lists_age(&self) -> Option<Duration> {
        let fetched = fs::metadata(self.stamp()).and_then(|meta| meta.modified()).ok()?;
        Some(SystemTime::now().duration_since(fetched).unwrap_or_default())
    }

    fn apt(&self) -> Command {
        let mut apt = Command::new("apt-get");
        let dir = self.dir.display();
        apt.env("LC_ALL", "C").args([
            "-q".to_owned(),
            "-y".to_owned(),
            format!("-oDir::State::Lists={dir}/lists"),
            format!("-oDir::State::status={dir}/status"),
            format!("-oDir::Cache={dir}/cache"),
            format!("-oDir::Etc::SourceList={dir}/sources.list"),
            "-oDir::Etc::SourceParts=/dev/null".to_owned(),
            "-oDir::Etc::Preferences=/dev/null".to_owned(),
            "-oDir::Etc::PreferencesParts=/dev/null".to_owned(),
            // A mirror may serve a Release file that is past its date; its signature is still checked.
            "-oAcquire::Check-Valid-Until=false".to_owned(),
            "-oAcquire::Languages=none".to_owned(),
            "-oAcquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "-oAPT::Sandbox::User=root".to_owned(),
            "-oAPT::Install-Recommends=false".to_owned(),
        ]);
        apt
    }
}

/// The mirror of the Debian archive that this machine's apt uses.
///
/// # Errors
/// When apt knows none.
pub fn debian_mirror() -> Result<String> {
    let output = run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN)\t$(LABEL)\t$(COMPONENT)\t$(REPO_URI)",
    ]))?;
    parse_mirror(&String::from_utf8_lossy(&output)).context(
        "apt knows no package list of the Debian archive: this works on Debian, after one `apt-get update`",
    )
}

/// Unpacks packages into a root with merged /usr. No maintainer script runs.
///
/// # Errors
/// When a file is no package, or the root cannot be written.
pub fn unpack(debs: &[PathBuf], root: &Path) -> Result<()> {
    for side in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(root.join("usr").join(side))?;
        let link = root.join(side);
        if fs::symlink_metadata(&link).is_err() {
            std::os::unix::fs::symlink(Path::new("usr").join(side), link)?;
        }
    }
    for deb in debs {
        let mut unpacking = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(deb)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start dpkg-deb")?;
        let tarball = unpacking.stdout.take().context("dpkg-deb has no output")?;
        let status = Command::new("tar")
            .args(["x", "--keep-directory-symlink", "-C"])
            .arg(root)
            .stdin(tarball)
            .status()
            .context("cannot start tar")?;
        let unpacked = unpacking.wait()?;
        if !status.success() || !unpacked.success() {
            bail!("cannot unpack {} into {}", deb.display(), root.display());
        }
    }
    Ok(())
}

/// A line of `apt-get --simulate`: `Inst NAME (VERSION SUITE [ARCH])`.
fn parse_simulated(line: &str) -> Option<Package> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    let version = rest.split_once('(')?.1.split_whitespace().next()?;
    Some(Package { name: name.to_owned(), version: version.to_owned() })
}

/// The mirror among lines of `ORIGIN\tLABEL\tCOMPONENT\tURI`: security updates have a label of their own and another archive.
fn parse_mirror(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let mut fields = line.split('\t');
        let main = (fields.next()?, fields.next()?, fields.next()?) == ("Debian", "Debian", "main");
        main.then(|| fields.next().map(str::to_owned))?
    })
}

/// The file of a package: `NAME_VERSION_ARCH.deb`, with `:` written as `%3a`.
fn find_deb(dir: &Path, package: &Package) -> Result<PathBuf> {
    let start = format!("{}_{}_", package.name, package.version.replace(':', "%3a"));
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&start) {
            return Ok(entry.path());
        }
    }
    bail!("apt fetched no file for {package} into {}", dir.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_installation_names_packages_and_versions() {
        assert_eq!(
            parse_simulated("Inst libc6 (2.41-12 Debian:unstable [amd64]) []"),
            Some(Package { name: "libc6".into(), version: "2.41-12".into() })
        );
        assert_eq!(parse_simulated("Conf libc6 (2.41-12 Debian:unstable [amd64])"), None);
        assert_eq!(parse_simulated("Inst"), None);
    }

    #[test]
    fn the_mirror_is_the_archive_s_and_not_a_third_party_s() {
        let targets = "other\tother\tmain\thttp://third.example/\n\
                       Debian\tDebian-Security\tmain\thttp://security.example/\n\
                       Debian\tDebian\tmain\thttp://mirror.example/debian/\n";
        assert_eq!(parse_mirror(targets).as_deref(), Some("http://mirror.example/debian/"));
        assert_eq!(parse_mirror("third\tparty\tmain\thttp://third.example/"), None);
    }
}
