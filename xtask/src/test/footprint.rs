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
            if !is_of_any_migration(kind, thing) {
                footprint.0.entry(kind.to_owned()).or_default().insert(thing.to_owned());
            }
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

/// Whether it is xl's own, and differs after a migration: libxl keeps the configuration of a domain in a file that has the domain's
/// number in its name, writes into xenstore from what a domain was booted only when it makes it anew, and leaves the two uppermost nodes on a host that
/// has had one. Concluded from who writes these; a stock migration alone was not compared yet.
fn is_of_any_migration(kind: &str, thing: &str) -> bool {
    match kind {
        "file" => thing.contains(" /var/lib/xen/userdata-d.") && thing.trim_end().ends_with(".libxl-json"),
        "node" => {
            let image = thing.strip_prefix("/vm/").and_then(|rest| rest.split_once("/image/"));
            matches!(thing, "/vm" | "/libxl")
                || image.is_some_and(|(_, from)| matches!(from, "kernel" | "ramdisk" | "cmdline"))
        }
        _ => false,
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
    fn what_any_migration_changes_is_none_of_ours() {
        let before = Footprint::parse(&format!(
            "{LITTLE}file\tf 600 0:0 1293 1.0 /var/lib/xen/userdata-d.1.37711179-f9ff.libxl-json \n\
             node\t/vm/37711179-f9ff/image/kernel\nnode\t/vm/37711179-f9ff/image/ostype\nend\t\n"
        ));
        let after = Footprint::parse(&format!(
            "{LITTLE}file\tf 600 0:0 1382 2.0 /var/lib/xen/userdata-d.2.37711179-f9ff.libxl-json \n\
             node\t/vm/37711179-f9ff/image/ostype\nnode\t/vm\nnode\t/libxl\nend\t\n"
        ));
        assert!(after.unwrap().since(&before.unwrap()).is_empty());
        for (kind, ours) in [
            ("file", "f 644 0:0 1 1.0 /var/lib/xen/poolskip "),
            ("file", "f 644 0:0 1 1.0 /var/lib/xen/userdata-d.1.x.poolskip "),
            ("node", "/vm/37711179-f9ff/image/poolskip"),
            ("node", "/vm/37711179-f9ff/poolskip/kernel"),
            ("node", "/libxl/1/poolskip"),
        ] {
            assert!(!is_of_any_migration(kind, ours), "{kind} {ours}");
        }
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
