//! What a machine is, before anything is done to it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};

use crate::package::contents::Role;

/// The script that finds out.
pub const SCRIPT: &str = include_str!("files/facts.sh");

/// What it found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    values: BTreeMap<String, String>,
    /// Servers that run, by number and beginning.
    pub mysqld: BTreeSet<String>,
}

/// How far a package is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Installed {
    /// Not at all.
    No,
    /// Wholly, in this version.
    Whole(String),
    /// It was removed, and its configuration is left.
    Leftovers,
    /// An installation that was broken off, in dpkg's letters.
    Half(String),
}

impl Facts {
    /// Reads what the script printed.
    ///
    /// # Errors
    /// When it did not come to its end.
    pub fn parse(text: &str) -> Result<Self> {
        let mut facts = Self::default();
        for line in text.lines() {
            // A login's greeting may stand before.
            let Some((key, value)) = line.split_once('=') else { continue };
            if key == "mysqld" {
                facts.mysqld.insert(value.to_owned());
            } else {
                facts.values.insert(key.to_owned(), value.trim().to_owned());
            }
        }
        ensure!(facts.value("end") == "yes", "the machine did not say all that it was asked: {text:?}");
        Ok(facts)
    }

    fn value(&self, key: &str) -> &str {
        self.values.get(key).map_or("", String::as_str)
    }

    fn is(&self, key: &str, value: &str) -> bool {
        self.value(key) == value
    }

    /// Its kernel.
    pub fn kernel(&self) -> &str {
        self.value("kernel")
    }

    /// Whether its kernel's headers have to be installed too.
    pub fn wants_headers(&self, role: Role) -> bool {
        role == Role::Guest && self.is("headers", "available")
    }

    /// Whether it runs systemd.
    pub fn systemd(&self) -> bool {
        self.is("systemd", "yes")
    }

    /// Whether an earlier deployment left its record.
    pub fn has_record(&self) -> bool {
        self.is("record", "yes")
    }

    /// How far its role's package is there.
    pub fn installed(&self, role: Role) -> Installed {
        let state = self.value(&format!("state_{}", role.name()));
        match state.split_once(' ').map(|(letters, version)| (letters.trim(), version.trim())) {
            None | Some(("un", _)) => Installed::No,
            Some(("ii", version)) => Installed::Whole(version.to_owned()),
            Some(("rc", _)) => Installed::Leftovers,
            Some((letters, _)) => Installed::Half(letters.to_owned()),
        }
    }

    /// Whether exactly this package file was installed there by an earlier deployment.
    pub fn has(&self, role: Role, version: &str, hash: &str) -> bool {
        self.installed(role) == Installed::Whole(version.to_owned())
            && self.value(&format!("hash_{}", role.name())) == hash
    }

    /// What stands in the way of installing, each with what to do.
    pub fn obstacles(&self, role: Role) -> Vec<String> {
        let mut obstacles = self.obstacles_to_anything();
        if !obstacles.is_empty() {
            return obstacles;
        }
        if !self.is("architecture", "amd64") {
            obstacles.push(format!(
                "its architecture is {}; Poolskip is built for amd64",
                self.value("architecture")
            ));
        }
        // Guests get a compiler and headers.
        let needed_mib = if role == Role::Guest { 500 } else { 150 };
        let free_mib = self.value("free_kib").parse::<u64>().unwrap_or(0) / 1024;
        if free_mib < needed_mib {
            obstacles.push(format!("its disk has {free_mib} MiB left (the least of /usr, /var and /tmp), and {needed_mib} are needed: free some"));
        }
        match role {
            Role::Guest if self.is("headers", "none") => obstacles.push(format!(
                "there are no headers for its kernel {}, neither installed nor to be had: the module cannot be built; boot a kernel of the \
                 distribution, or install its headers by hand",
                self.kernel()
            )),
            Role::Dom0 if self.value("xen").is_empty() => {
                obstacles.push("it does not run Xen now: boot it with Xen 4.17 to 4.22".to_owned());
            }
            Role::Dom0 if !self.is("dom0", "yes") => {
                obstacles.push("it runs under Xen, but is no dom0: name the host, and not a guest".to_owned());
            }
            _ => {}
        }
        obstacles
    }

    /// What stands in the way of removing, too.
    pub fn obstacles_to_anything(&self) -> Vec<String> {
        if !self.is("uid", "0") {
            return vec![format!("the login is no root (uid {}): use root@HOST", self.value("uid"))];
        }
        if !self.is("apt", "yes") {
            return vec![format!(
                "it is {}, without apt and dpkg: use the tarball of `cargo xtask package` and its install.sh",
                self.value("os")
            )];
        }
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine on which all is well, with these lines in place of its own.
    fn facts(other: &str) -> Facts {
        let good = "Welcome!\nuid=0\nos=Debian\napt=yes\narchitecture=amd64\nkernel=6.1.0-1-amd64\nheaders=here\nxen=4.17\ndom0=yes\n\
                    free_kib=9000000\nmodule=no\nsystemd=yes\ndpkg=whole\n";
        Facts::parse(&format!("{good}{other}\nend=yes\n")).unwrap()
    }

    #[test]
    fn a_good_machine_has_no_obstacles() {
        for role in Role::ALL {
            assert!(facts("").obstacles(role).is_empty());
            assert_eq!(facts("").installed(role), Installed::No);
        }
        assert!(Facts::parse("uid=0\n").is_err());
        let two = facts("mysqld=12@345\nmysqld=13@346");
        assert_eq!(two.mysqld.len(), 2);
    }

    #[test]
    fn each_obstacle_says_what_to_do() {
        for (line, role, word) in [
            ("uid=1000", Role::Guest, "root@HOST"),
            ("apt=no\nos=Fedora 40", Role::Dom0, "Fedora 40, without apt"),
            ("architecture=arm64", Role::Guest, "arm64"),
            ("free_kib=1000", Role::Guest, "0 MiB left"),
            ("headers=none", Role::Guest, "headers for its kernel 6.1.0-1-amd64"),
            ("xen=", Role::Dom0, "does not run Xen"),
            ("dom0=no", Role::Dom0, "no dom0"),
        ] {
            let obstacles = facts(line).obstacles(role);
            assert!(obstacles.len() == 1 && obstacles[0].contains(word), "{line}: {obstacles:?}");
        }
        // A host needs no headers, a guest no Xen.
        assert!(facts("headers=none").obstacles(Role::Dom0).is_empty());
        assert!(facts("xen=\ndom0=no").obstacles(Role::Guest).is_empty());
    }

    #[test]
    fn states_of_packages_are_told_apart() {
        let installed = |state: &str| facts(&format!("state_guest={state}")).installed(Role::Guest);
        assert_eq!(installed("ii  0.1.0"), Installed::Whole("0.1.0".into()));
        assert_eq!(installed("iF  0.1.0"), Installed::Half("iF".into()));
        assert_eq!(installed("rc  0.1.0"), Installed::Leftovers);
        assert_eq!(installed("un "), Installed::No);
        assert!(facts("state_dom0=ii  0.1.0\nhash_dom0=abc").has(Role::Dom0, "0.1.0", "abc"));
        assert!(!facts("state_dom0=iU  0.1.0\nhash_dom0=abc").has(Role::Dom0, "0.1.0", "abc"));
    }
}
