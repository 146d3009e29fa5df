//! Licences, sources and unwanted crates: what `cargo deny` would look at, by what `cargo metadata` tells, since `cargo install cargo-deny` takes
//! longer than all lints together. Its advisories are in `advisories.rs`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::deployment::cargo;
use crate::step::run as run_program;

/// Licences that go with anything that Poolskip's rooms are under, but for GPL 2.
const PERMISSIVE: [&str; 10] = [
    "MIT",
    "MIT-0",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "CC0-1.0",
    "0BSD",
];
/// Those that go with GPL 2 alone: Apache 2 has conditions that it does not have.
const WITH_GPL_2: [&str; 8] =
    ["GPL-2.0-only", "MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "0BSD"];

/// What each room may be linked with besides the permissive ones (LICENSE.md says why the rooms differ).
const ROOMS: [(&str, &[&str]); 8] = [
    ("enlightenment", &[]),
    ("guest-probe", &[]),
    // Poolskip's own, and the `xenctrl` crate.
    ("dom0-migrator", &["GPL-3.0-or-later", "GPL-3.0-only"]),
    // See WITH_GPL_2.
    ("kernel-module", &[]),
    // They try dom0-migrator, and nothing of them is shipped. NCSA is LLVM's old licence, libFuzzer's.
    ("tests", &["GPL-3.0-or-later", "GPL-3.0-only"]),
    ("fuzz", &["GPL-3.0-or-later", "GPL-3.0-only", "NCSA"]),
    ("xtask", &[]),
    ("manual", &[]),
];

/// Rooms that have the `xenctrl` crate with all features on, and so what builds it.
const WITH_XENCTRL: [&str; 3] = ["dom0-migrator", "tests", "fuzz"];

/// Crates that must not come in by another one, and why.
const UNWANTED: [(&str, &str); 4] = [
    ("openssl-sys", "rustls is what speaks TLS here"),
    ("native-tls", "rustls is what speaks TLS here"),
    ("aws-lc-sys", "ring builds with a C compiler alone"),
    ("bindgen", "it needs libclang: only the xenctrl crate may have it"),
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    /// None for an ordinary one.
    kind: Option<String>,
}

/// Looks at everything that each room is built from, and says how much that is.
///
/// # Errors
/// All that may not be there.
pub fn check() -> Result<()> {
    let words = run_program(cargo().args(["metadata", "--format-version=1", "--locked", "--all-features"]))?;
    let metadata: Metadata = serde_json::from_slice(&words).context("cargo metadata said something else")?;
    let wrong = problems(&metadata);
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    let mut versions: BTreeMap<&str, usize> = BTreeMap::new();
    metadata.packages.iter().for_each(|package| *versions.entry(&package.name).or_default() += 1);
    let several: Vec<&str> =
        versions.iter().filter(|(_, count)| **count > 1).map(|(name, _)| *name).collect();
    eprintln!("  {} crates; in several versions: {}", metadata.packages.len(), several.join(", "));
    Ok(())
}

fn problems(metadata: &Metadata) -> Vec<String> {
    let packages: BTreeMap<&str, &Package> =
        metadata.packages.iter().map(|package| (package.id.as_str(), package)).collect();
    let nodes: BTreeMap<&str, &Node> =
        metadata.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let mut wrong = BTreeSet::new();
    for package in &metadata.packages {
        let named = format!("{} {}", package.name, package.version);
        if package.source.as_ref().is_some_and(|source| !source.ends_with("/crates.io-index")) {
            wrong.insert(format!("{named} comes from {}", package.source.as_deref().unwrap_or_default()));
        }
        if package.source.is_none() && !ROOMS.iter().any(|(room, _)| *room == package.name) {
            wrong.insert(format!("{named} is a room that xtask/src/test/licences.rs does not know"));
        }
    }
    for (room, more) in ROOMS {
        let allowed: Vec<&str> = match room {
            "kernel-module" => WITH_GPL_2.to_vec(),
            _ => PERMISSIVE.iter().chain(more).copied().collect(),
        };
        let root = metadata.packages.iter().find(|package| package.name == room && package.source.is_none());
        let Some(root) = root else {
            wrong.insert(format!("there is no room {room}"));
            continue;
        };
        for id in built_from(&root.id, &nodes) {
            let Some(package) = packages.get(id) else { continue };
            let named = format!("{room} is built from {} {}", package.name, package.version);
            match &package.license {
                None => {
                    wrong.insert(format!("{named}, which names no licence"));
                }
                Some(licence) if !is_allowed(licence, &allowed) => {
                    wrong.insert(format!("{named}, whose licence is {licence}"));
                }
                Some(_) => {}
            }
            let unwanted = UNWANTED.iter().find(|(name, _)| *name == package.name);
            if let Some((_, why)) =
                unwanted.filter(|(name, _)| *name != "bindgen" || !WITH_XENCTRL.contains(&room))
            {
                wrong.insert(format!("{named}: {why}"));
            }
        }
    }
    wrong.into_iter().collect()
}

/// All that ends up in it or builds it, and it itself; not what only its tests need.
fn built_from<'m>(root: &'m str, nodes: &BTreeMap<&'m str, &'m Node>) -> BTreeSet<&'m str> {
    let mut found = BTreeSet::from([root]);
    let mut next = vec![root];
    while let Some(node) = next.pop().and_then(|id| nodes.get(id)) {
        for dependency in &node.deps {
            let only_tests = dependency.dep_kinds.iter().all(|kind| kind.kind.as_deref() == Some("dev"));
            if !only_tests && found.insert(&dependency.pkg) {
                next.push(&dependency.pkg);
            }
        }
    }
    found
}

/// Whether an SPDX expression can be met: of alternatives one, of what is asked for together all.
fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    // Older manifests write a slash for "or".
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    any_of(&words, &mut at, allowed) && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut met = all_of(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        // Parsed in any case, so that `at` comes to its end.
        met |= all_of(words, at, allowed);
    }
    met
}

fn all_of(words: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let met = any_of(words, at, allowed);
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return met && closed;
    }
    if words.get(*at) == Some(&"WITH") {
        // An exception gives more, and takes nothing.
        *at += 2;
    }
    allowed.contains(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_met_or_not() {
        for (expression, met) in [
            ("MIT", true),
            ("GPL-3.0-only", false),
            ("MIT OR GPL-3.0-only", true),
            ("GPL-3.0-only OR MIT", true),
            ("MIT AND GPL-3.0-only", false),
            ("(GPL-3.0-only OR MIT) AND Unicode-3.0", true),
            ("Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT", true),
            ("GPL-2.0-only WITH Linux-syscall-note", false),
            ("MIT/Apache-2.0", true),
            ("LGPL-2.1-only OR BSD-2-Clause", true),
            ("", false),
            ("(MIT", false),
            ("MIT MIT", false),
        ] {
            assert_eq!(is_allowed(expression, &PERMISSIVE), met, "{expression}");
        }
        assert!(is_allowed("Apache-2.0 OR MIT", &WITH_GPL_2) && !is_allowed("Apache-2.0", &WITH_GPL_2));
    }

    fn metadata(edit: impl FnOnce(&mut Metadata)) -> Vec<String> {
        let package = |name: &str, license: &str, source: Option<&str>| Package {
            id: name.to_owned(),
            name: name.to_owned(),
            version: "1.0.0".to_owned(),
            license: Some(license.to_owned()),
            source: source.map(str::to_owned),
        };
        let mut packages: Vec<Package> = ROOMS.iter().map(|(room, _)| package(room, "MIT", None)).collect();
        packages.push(package("theirs", "MIT", Some("registry+x/crates.io-index")));
        let depends = |on: &str, kind: Option<&str>| Dependency {
            pkg: on.to_owned(),
            dep_kinds: vec![Kind { kind: kind.map(str::to_owned) }],
        };
        let nodes = vec![
            Node { id: "xtask".to_owned(), deps: vec![depends("theirs", None)] },
            Node { id: "tests".to_owned(), deps: vec![depends("theirs", Some("dev"))] },
        ];
        let mut metadata = Metadata { packages, resolve: Resolve { nodes } };
        edit(&mut metadata);
        problems(&metadata)
    }

    #[test]
    fn what_may_not_be_there_is_named() {
        assert_eq!(metadata(|_| {}), [""; 0]);
        let theirs = ROOMS.len();
        let wrong = metadata(|all| all.packages[theirs].license = Some("GPL-3.0-only".to_owned()));
        assert_eq!(wrong, ["xtask is built from theirs 1.0.0, whose licence is GPL-3.0-only"]);
        assert_eq!(metadata(|all| all.packages[theirs].license = None).len(), 1);
        let wrong = metadata(|all| all.packages[theirs].source = Some("git+x".to_owned()));
        assert_eq!(wrong, ["theirs 1.0.0 comes from git+x"]);
        let wrong = metadata(|all| all.packages[theirs].name = "openssl-sys".to_owned());
        assert!(wrong.len() == 1 && wrong[0].contains("rustls"), "{wrong:?}");
        assert_eq!(metadata(|all| all.packages[theirs].source = None).len(), 1, "a room that is not known");
    }
}
