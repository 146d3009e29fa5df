//! Known weaknesses of the crates that Poolskip is built with, by RustSec's database (CC0), as `cargo deny check advisories` would look.
//!
//! The database is of its day, and a build without a network does not get it. So what it says of our crates is kept in the tree, with its date;
//! `cargo xtask test --write-advisories DIR` takes it anew from a checkout of the database. A lint is as good as that date.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use semver::{Version, VersionReq};
use serde::{Deserialize, Serialize};

use crate::deployment::{cargo, root};
use crate::step::run as run_program;

/// What is kept.
const KEPT: &str = "xtask/src/test/advisories.json";

/// Advisories that apply and are lived with: each with the reason why it does no harm here.
const ACCEPTED: [(&str, &str); 0] = [];

/// What the database says of our crates.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Kept {
    /// Date of its newest advisory.
    of: String,
    /// Crates that it was asked about.
    crates: BTreeSet<String>,
    advisories: Vec<Advisory>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Advisory {
    id: String,
    package: String,
    /// No weakness, but news of a kind: that nobody maintains a crate any more, or that it is unsound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    informational: Option<String>,
    patched: Vec<String>,
    unaffected: Vec<String>,
}

impl Advisory {
    /// Whether a version has it.
    fn applies_to(&self, version: &Version) -> Result<bool> {
        for range in self.patched.iter().chain(&self.unaffected) {
            let range = VersionReq::parse(range).with_context(|| format!("{}: {range:?}", self.id))?;
            if range.matches(version) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A crate of somebody else's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Theirs {
    name: String,
    version: Version,
}

/// Looks at every crate in `Cargo.lock`, and says how good the data are.
///
/// # Errors
/// All advisories that apply.
pub(super) fn check() -> Result<()> {
    let path = root().join(KEPT);
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let kept: Kept =
        serde_json::from_slice(&bytes).with_context(|| format!("{KEPT} is not what was written"))?;
    let theirs = theirs()?;
    let found = kept.look(&theirs)?;
    eprintln!("  {}", kept.said(&theirs));
    found.news.iter().for_each(|news| eprintln!("  {news}"));
    ensure!(found.weak.is_empty(), "{}", found.weak.join("\n"));
    Ok(())
}

/// Takes what a checkout of the database says of our crates.
///
/// # Errors
/// When it is none.
pub(super) fn write(database: &Path) -> Result<()> {
    let theirs = theirs()?;
    let mut kept = Kept { crates: theirs.iter().map(|one| one.name.clone()).collect(), ..Kept::default() };
    for file in advisory_files(database)? {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let read = parse(&text).with_context(|| file.display().to_string())?;
        kept.of = kept.of.max(read.date);
        if let Some(advisory) = read.advisory.filter(|advisory| kept.crates.contains(&advisory.package)) {
            kept.advisories.push(advisory);
        }
    }
    kept.advisories.sort_by(|a, b| a.id.cmp(&b.id));
    let path = root().join(KEPT);
    fs::write(&path, serde_json::to_vec_pretty(&kept)?).with_context(|| path.display().to_string())?;
    println!("{}", kept.said(&theirs));
    Ok(())
}

fn advisory_files(database: &Path) -> Result<Vec<PathBuf>> {
    let crates = database.join("crates");
    let mut files = Vec::new();
    for of_crate in fs::read_dir(&crates).with_context(|| format!("no database: {}", crates.display()))? {
        for file in fs::read_dir(of_crate?.path())? {
            files.push(file?.path());
        }
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    ensure!(!files.is_empty(), "{} has no advisory", crates.display());
    Ok(files)
}

struct Read {
    date: String,
    /// None when it was withdrawn.
    advisory: Option<Advisory>,
}

/// An advisory is Markdown with TOML before it.
fn parse(text: &str) -> Result<Read> {
    #[derive(Deserialize)]
    struct Whole {
        advisory: Head,
        versions: Versions,
    }
    #[derive(Deserialize)]
    struct Head {
        id: String,
        package: String,
        date: String,
        withdrawn: Option<String>,
        informational: Option<String>,
    }
    #[derive(Deserialize)]
    struct Versions {
        #[serde(default)]
        patched: Vec<String>,
        #[serde(default)]
        unaffected: Vec<String>,
    }
    let toml = text.trim_start().strip_prefix("```toml").and_then(|text| text.split_once("```"));
    let (toml, _) = toml.context("it does not begin with TOML")?;
    let Whole { advisory: head, versions } = toml::from_str(toml)?;
    let advisory = head.withdrawn.is_none().then_some(Advisory {
        id: head.id,
        package: head.package,
        informational: head.informational,
        patched: versions.patched,
        unaffected: versions.unaffected,
    });
    Ok(Read { date: head.date, advisory })
}

/// All crates that come from elsewhere.
fn theirs() -> Result<Vec<Theirs>> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        version: Version,
        source: Option<String>,
    }
    let words = run_program(cargo().args(["metadata", "--format-version=1", "--locked", "--all-features"]))?;
    let metadata: Metadata = serde_json::from_slice(&words).context("cargo metadata said something else")?;
    let theirs = metadata.packages.into_iter().filter(|package| package.source.is_some());
    Ok(theirs.map(|Package { name, version, .. }| Theirs { name, version }).collect())
}

#[derive(Debug, Default)]
struct Found {
    /// What must not be.
    weak: Vec<String>,
    /// What is worth knowing.
    news: Vec<String>,
}

impl Kept {
    fn look(&self, theirs: &[Theirs]) -> Result<Found> {
        let mut found = Found::default();
        for Theirs { name, version } in theirs {
            for advisory in self.advisories.iter().filter(|advisory| advisory.package == *name) {
                if !advisory.applies_to(version)? {
                    continue;
                }
                let accepted = ACCEPTED.iter().find(|(id, _)| *id == advisory.id);
                match (&advisory.informational, accepted) {
                    (_, Some((id, why))) => found.news.push(format!("{id} on {name} {version}: {why}")),
                    (Some(kind), None) if kind != "unsound" => {
                        found.news.push(format!("{} on {name} {version}: {kind}", advisory.id));
                    }
                    _ => found.weak.push(format!(
                        "{} applies to {name} {version}: take one of {:?}, or say in xtask/src/test/advisories.rs why it does no harm",
                        advisory.id, advisory.patched
                    )),
                }
            }
        }
        if let Some((id, _)) = ACCEPTED.iter().find(|(id, _)| !self.advisories.iter().any(|it| it.id == *id))
        {
            bail!("{id} is accepted, and there is no such advisory");
        }
        Ok(found)
    }

    fn said(&self, theirs: &[Theirs]) -> String {
        let newer: BTreeSet<&str> = theirs
            .iter()
            .filter(|one| !self.crates.contains(&one.name))
            .map(|one| one.name.as_str())
            .collect();
        let mut said =
            format!("advisories up to {}: {} on crates that are used here", self.of, self.advisories.len());
        if !newer.is_empty() {
            let newer: Vec<&str> = newer.into_iter().collect();
            said.push_str(&format!("; not asked about, since they came later: {}", newer.join(", ")));
        }
        said
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADVISORY: &str = "```toml\n[advisory]\nid = \"RUSTSEC-2024-0001\"\npackage = \"theirs\"\ndate = \"2024-04-19\"\n\
        [versions]\npatched = [\">= 1.4.2\", \">= 1.2.9, < 1.3.0\"]\nunaffected = [\"< 1.0.0\"]\n```\n\n# Words\n";

    fn found(text: &str, version: &str) -> Found {
        let advisory = parse(text).unwrap().advisory;
        let kept = Kept { advisories: advisory.into_iter().collect(), ..Kept::default() };
        kept.look(&[Theirs { name: "theirs".into(), version: version.parse().unwrap() }]).unwrap()
    }

    #[test]
    fn versions_in_between_are_weak() {
        for (version, is_weak) in [
            ("0.9.0", false),
            ("1.0.0", true),
            ("1.2.8", true),
            ("1.2.9", false),
            ("1.3.0", true),
            ("1.4.1", true),
            ("1.4.2", false),
            ("2.0.0", false),
        ] {
            assert_eq!(found(ADVISORY, version).weak.len(), usize::from(is_weak), "{version}");
        }
        let other = Kept { advisories: vec![parse(ADVISORY).unwrap().advisory.unwrap()], ..Kept::default() };
        let ours = Theirs { name: "other".into(), version: Version::new(1, 0, 0) };
        assert!(other.look(&[ours]).unwrap().weak.is_empty());
    }

    #[test]
    fn what_is_withdrawn_or_only_news_is_no_weakness() {
        let withdrawn = ADVISORY.replace("date =", "withdrawn = \"2024-05-01\"\ndate =");
        assert!(found(&withdrawn, "1.0.0").weak.is_empty());
        let unmaintained = ADVISORY.replace("date =", "informational = \"unmaintained\"\ndate =");
        let found_news = found(&unmaintained, "1.0.0");
        assert!(found_news.weak.is_empty() && found_news.news.len() == 1, "{found_news:?}");
        let unsound = ADVISORY.replace("date =", "informational = \"unsound\"\ndate =");
        assert_eq!(found(&unsound, "1.0.0").weak.len(), 1);
        assert!(parse("# Words\n").is_err());
    }

    #[test]
    fn what_the_data_do_not_know_is_said() {
        let kept = Kept { of: "2024-04-19".into(), crates: ["a".to_owned()].into(), advisories: Vec::new() };
        let one = |name: &str| Theirs { name: name.into(), version: Version::new(1, 0, 0) };
        assert_eq!(kept.said(&[one("a")]), "advisories up to 2024-04-19: 0 on crates that are used here");
        assert!(kept.said(&[one("a"), one("b")]).ends_with("came later: b"));
    }
}
