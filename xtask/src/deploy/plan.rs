//! What is to be done on a machine, in words and as steps.

use crate::package::VERSION;
use crate::package::contents::Role;

use super::facts::{Facts, Installed};

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Copy the package.
    Copy {
        /// Its size.
        bytes: u64,
    },
    /// Install it, and what it needs.
    Install {
        /// The kernel's headers too.
        headers: Option<String>,
    },
    /// Give the host a certificate of the authority on the first host.
    Certificate,
    /// Listen for domains.
    Listen,
    /// Have `xl migrate` go through Poolskip.
    EnableXl,
    /// Remove the package, its configuration, and what came with it.
    Remove,
}

impl Step {
    /// What it is, for the plan and for a failure.
    pub fn words(&self, role: Role) -> String {
        let package = role.package();
        match self {
            Self::Copy { bytes } => format!("copy {package} {VERSION} there ({} KiB)", bytes.div_ceil(1024)),
            Self::Install { headers } => {
                let more = headers.as_ref().map(|headers| format!(" and {headers}")).unwrap_or_default();
                let what = match role {
                    Role::Guest => {
                        "with DKMS and a compiler where they are missing; the module is built and loaded, the probe started, mysqld left alone"
                    }
                    Role::Dom0 => "with what it needs; nothing is restarted",
                };
                format!("install {package}{more} by apt, {what}")
            }
            Self::Certificate => {
                "make a key there, and a certificate for it by the authority on the first host".to_owned()
            }
            Self::Listen => "listen for domains on port 8002 (poolskip-receive.socket)".to_owned(),
            Self::EnableXl => "have `xl migrate` go through Poolskip (/usr/local/sbin/xl)".to_owned(),
            Self::Remove => {
                format!("purge {package}, and packages that came with it and that nothing else needs")
            }
        }
    }
}

/// What is to be done to install; nothing where all of it is there.
pub fn install(role: Role, facts: &Facts, hash: &str, bytes: u64) -> Vec<Step> {
    let mut steps = Vec::new();
    if !facts.has(role, VERSION, hash) {
        let headers = facts.wants_headers(role).then(|| format!("linux-headers-{}", facts.kernel()));
        steps.extend([Step::Copy { bytes }, Step::Install { headers }]);
    }
    if role == Role::Dom0 {
        // Each looks itself whether it is so already.
        steps.extend([Step::Certificate, Step::EnableXl]);
        if facts.systemd() {
            steps.push(Step::Listen);
        }
    }
    steps
}

/// What is to be done to remove.
pub fn remove(role: Role, facts: &Facts) -> Vec<Step> {
    if facts.installed(role) == Installed::No && !facts.has_record() {
        Vec::new()
    } else {
        vec![Step::Remove]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(lines: &str) -> Facts {
        Facts::parse(&format!("uid=0\nkernel=6.1\nsystemd=yes\n{lines}\nend=yes\n")).unwrap()
    }

    #[test]
    fn what_is_there_already_is_not_done_again() {
        let there = facts(&format!("state_guest=ii  {VERSION}\nhash_guest=abc"));
        assert!(install(Role::Guest, &there, "abc", 1).is_empty());
        // Another build of the same version, or half of it.
        assert_eq!(install(Role::Guest, &there, "abd", 1).len(), 2);
        let half = facts(&format!("state_guest=iF  {VERSION}\nhash_guest=abc"));
        assert_eq!(install(Role::Guest, &half, "abc", 1).len(), 2);
        let headers = install(Role::Guest, &facts("headers=available"), "abc", 1);
        assert_eq!(headers[1], Step::Install { headers: Some("linux-headers-6.1".into()) });
    }

    #[test]
    fn nothing_is_removed_where_nothing_is() {
        assert!(remove(Role::Dom0, &facts("")).is_empty());
        assert_eq!(remove(Role::Dom0, &facts("state_dom0=rc  0.1.0")), [Step::Remove]);
        assert_eq!(remove(Role::Dom0, &facts("record=yes")), [Step::Remove]);
    }
}
