//! Which domain goes where, and in which order.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// MiB that Xen takes for a domain beside its memory: its tables, and video memory where it has some.
const OVERHEAD_MIB: u64 = 16;

/// A domain of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Guest {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Its memory.
    pub mib: u64,
    /// Why it does not go, whatever the hosts.
    #[serde(skip)]
    pub obstacle: Option<String>,
    /// Its disks that can be compared.
    #[serde(skip)]
    pub disks: Vec<PathBuf>,
}

/// A host where domains may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// As it was named.
    pub host: String,
    /// What it has room for.
    pub free_mib: u64,
    /// Why nothing can go there.
    pub problem: Option<String>,
    /// Domains whose disks it has not, with the reason.
    pub without: Vec<(u32, String)>,
}

/// One domain's way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Move {
    /// The domain.
    pub guest: Guest,
    /// Where it goes first, and then, should that fail, hosts that would have room for it too.
    pub hosts: Vec<String>,
}

/// A domain that stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stay {
    /// The domain.
    pub guest: Guest,
    /// Why.
    pub why: String,
}

/// The plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// What goes, in this order.
    pub moves: Vec<Move>,
    /// What stays.
    pub stay: Vec<Stay>,
    /// Hosts that take nothing, and why.
    pub hosts_out: Vec<(String, String)>,
}

/// Makes it. The largest domain is placed first, on the host that then has the most room: so as many as possible find a place. They go in
/// the same order: with several at once, the long ones are not the last.
pub fn make(mut guests: Vec<Guest>, mut targets: Vec<Target>) -> Plan {
    let hosts_out =
        targets.iter().filter_map(|target| Some((target.host.clone(), target.problem.clone()?))).collect();
    targets.retain(|target| target.problem.is_none());
    guests.sort_by(|one, other| other.mib.cmp(&one.mib).then_with(|| one.name.cmp(&other.name)));
    let (mut moves, mut stay) = (Vec::new(), Vec::new());
    for guest in guests {
        if let Some(why) = guest.obstacle.clone() {
            stay.push(Stay { guest, why });
            continue;
        }
        let needs = guest.mib + OVERHEAD_MIB;
        let lacks = |target: &Target| -> Option<String> {
            target.without.iter().find(|(id, _)| *id == guest.id).map(|(_, why)| why.clone())
        };
        let mut fitting: Vec<usize> = (0..targets.len())
            .filter(|&at| targets[at].free_mib >= needs && lacks(&targets[at]).is_none())
            .collect();
        fitting.sort_by_key(|&at| std::cmp::Reverse(targets[at].free_mib));
        match fitting.first() {
            Some(&best) => {
                let hosts = fitting.iter().map(|&at| targets[at].host.clone()).collect();
                targets[best].free_mib -= needs;
                moves.push(Move { guest, hosts });
            }
            None => {
                let reasons: Vec<String> = targets
                    .iter()
                    .map(|target| match lacks(target) {
                        Some(why) => format!("{}: {why}", target.host),
                        None => format!("{} has {} MiB left", target.host, target.free_mib),
                    })
                    .collect();
                let why = match reasons.is_empty() {
                    true => "no host takes anything".to_owned(),
                    false => format!("it needs {needs} MiB; {}", reasons.join("; ")),
                };
                stay.push(Stay { guest, why });
            }
        }
    }
    Plan { moves, stay, hosts_out }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (host, why) in &self.hosts_out {
            writeln!(f, "{host} takes nothing: {why}")?;
        }
        for (at, Move { guest, hosts }) in self.moves.iter().enumerate() {
            let (first, others) =
                hosts.split_first().map_or(("", &[][..]), |(first, rest)| (first.as_str(), rest));
            write!(f, "{:>3}. {:<24} {:>8} MiB  to {first}", at + 1, guest.name, guest.mib)?;
            if !others.is_empty() {
                write!(f, " (or {})", others.join(", "))?;
            }
            writeln!(f)?;
        }
        for Stay { guest, why } in &self.stay {
            writeln!(f, "     {:<24} {:>8} MiB  stays: {why}", guest.name, guest.mib)?;
        }
        if self.moves.is_empty() && self.stay.is_empty() {
            writeln!(f, "no domain is here")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn guest(id: u32, mib: u64) -> Guest {
        Guest { id, name: format!("db{id}"), mib, obstacle: None, disks: Vec::new() }
    }

    fn target(host: &str, free_mib: u64) -> Target {
        Target { host: host.into(), free_mib, problem: None, without: Vec::new() }
    }

    fn ways(plan: &Plan) -> Vec<(u32, &str)> {
        plan.moves.iter().map(|one| (one.guest.id, one.hosts[0].as_str())).collect()
    }

    #[test]
    fn the_largest_is_placed_first_where_most_room_is() {
        let plan = make(
            vec![guest(1, 1000), guest(2, 4000), guest(3, 3000)],
            vec![target("a", 5000), target("b", 4500)],
        );
        assert_eq!(ways(&plan), [(2, "a"), (3, "b"), (1, "b")]);
        assert!(plan.stay.is_empty());
        assert_eq!(plan.moves[0].hosts, ["a", "b"]);
    }

    #[test]
    fn what_stays_says_why() {
        let mut pci = guest(1, 10);
        pci.obstacle = Some("it has a PCI device of this host".into());
        let mut elsewhere = target("a", 9000);
        elsewhere.without.push((2, "disk /x of db2: another one".into()));
        let mut gone = target("b", 0);
        gone.problem = Some("connection refused".into());
        let plan = make(vec![pci, guest(2, 100), guest(3, 9000)], vec![elsewhere, gone]);
        let why: Vec<(u32, &str)> = plan.stay.iter().map(|stay| (stay.guest.id, stay.why.as_str())).collect();
        assert_eq!(
            why,
            [
                (3, "it needs 9016 MiB; a has 9000 MiB left"),
                (2, "it needs 116 MiB; a: disk /x of db2: another one"),
                (1, "it has a PCI device of this host")
            ]
        );
        assert_eq!(plan.hosts_out, [("b".to_owned(), "connection refused".to_owned())]);
        let shown = plan.to_string();
        assert!(
            shown.contains("b takes nothing: connection refused") && shown.contains("stays: it has"),
            "{shown}"
        );
        assert_eq!(make(vec![guest(1, 1)], Vec::new()).stay[0].why, "no host takes anything");
    }

    proptest! {
        #[test]
        fn no_host_gets_more_than_it_has_room_for(
            memories in proptest::collection::vec(0_u64..10_000, 0..40),
            rooms in proptest::collection::vec(0_u64..30_000, 0..5),
        ) {
            let guests: Vec<Guest> = memories.iter().enumerate().map(|(id, mib)| guest(id as u32, *mib)).collect();
            let targets: Vec<Target> =
                rooms.iter().enumerate().map(|(at, room)| target(&at.to_string(), *room)).collect();
            let plan = make(guests, targets);
            prop_assert_eq!(plan.moves.len() + plan.stay.len(), memories.len());
            for (at, room) in rooms.iter().enumerate() {
                let taken: u64 = plan
                    .moves
                    .iter()
                    .filter(|one| one.hosts[0] == at.to_string())
                    .map(|one| one.guest.mib + OVERHEAD_MIB)
                    .sum();
                prop_assert!(taken <= *room);
            }
            prop_assert!(plan.moves.is_sorted_by(|one, other| one.guest.mib >= other.guest.mib));
        }
    }
}
