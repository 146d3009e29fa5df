//! What a machine is, as far as an installation could change it, and what differs between two looks at it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};

/// The script that looks.
pub(super) const SCRIPT: &str = include_str!("files/footprint.sh");

/// Things by kind: files, units, modules, probes, nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Footprint(BTreeMap<String, BTreeSet<String>>);

impl Footprint {
    /// Reads what the script printed.
    ///
    /// # Errors
    /// When it did not come to its end, or saw nothing of what every machine has.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut footprint = Self::default();
        for (kind, thing) in text.lines().filter_map(|line| line.split_once('\t')) {
            footprint.0.entry(kind.to_owned()).or_default().insert(thing.to_owned());
        }
        ensure!(footprint.0.remove("end").is_some(), "the look at the machine was cut short: {text:?}");
        for kind in ["file", "package", "unit", "process", "module", "listening"] {
            ensure!(
                footprint.0.contains_key(kind),
                "no {kind} was seen: then a new one would not be, either"
            );
        }
        Ok(footprint)
    }

    /// What has come (`+`) and what has gone (`-`) since an earlier look.
    pub(super) fn since(&self, before: &Self) -> Vec<String> {
        let kinds: BTreeSet<&String> = self.0.keys().chain(before.0.keys()).collect();
        let (none, mut differences) = (BTreeSet::new(), Vec::new());
        for kind in kinds {
            let (then, now) = (before.0.get(kind).unwrap_or(&none), self.0.get(kind).unwrap_or(&none));
            differences.extend(then.difference(now).map(|thing| format!("- {kind} {thing}")));
            differences.extend(now.difference(then).map(|thing| format!("+ {kind} {thing}")));
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LITTLE: &str = "file\tf 644 0:0 1 1.0 /etc/hosts \npackage\tbash 1 ii \nunit\tssh.service active\n\
                          process\tsystemd\nlistening\t0016\nmodule\text4\n";

    #[test]
    fn what_comes_and_goes_is_named() {
        let before = Footprint::parse(&format!("{LITTLE}node\t/y\nend\t\n")).unwrap();
        let after = Footprint::parse(&format!("{LITTLE}module\tpoolskip\nnode\t/x\nend\t\n")).unwrap();
        assert_eq!(after.since(&before), ["+ module poolskip", "- node /y", "+ node /x"]);
        assert!(before.since(&before).is_empty());
    }

    #[test]
    fn half_a_look_is_none() {
        assert!(Footprint::parse(LITTLE).is_err());
        assert!(Footprint::parse("file\tx\nend\t\n").is_err());
    }

    #[test]
    fn the_script_can_be_read_by_a_shell() {
        let output = std::process::Command::new("sh").args(["-n", "-c", SCRIPT]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
