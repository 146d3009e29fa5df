//! `xl migrate` as it is, over ssh, with nothing but `LIBXL_SAVE_HELPER`. It holds for both kinds of guest.

use anyhow::{Context, Result, ensure};

use super::bed::Bed;
use super::guest_cases::{PATIENCE, only_here};
use crate::deployment::MIGRATOR;
use crate::lab::{Host, Lab, ssh};
use crate::migration::DOMAIN;
use crate::proof;

/// With the variable on both sides pages go by reference, all memory compared; with the variable at the source alone the same stream is
/// taken by libxl's own helper.
pub(super) fn by_the_variable_alone(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    ssh::install(lab, MIGRATOR)?;
    let from = lab.guest_host()?;
    let words = migrate(lab, from, "--debug")?;
    let summary = Summary::find(&words)?;
    ensure!(
        summary.accepted > 0 && summary.compared > 0 && !words.contains("did not come"),
        "no page went by reference, or none was compared: {words}"
    );
    // A page that differs is an error of the target's helper, by which xl would have failed, unless the source names it as written to after the
    // suspension: a packet came.
    let late = words.matches("verify pfn ").count();
    println!("xl migrate: {summary:?}, of those compared {late} written to after the suspension");
    arrived(bed, from.other())?;
    let words = migrate(lab, from.other(), ssh::PLAIN_TRANSPORT)?;
    let summary = Summary::find(&words)?;
    ensure!(
        words.contains("did not come") && summary.accepted == 0,
        "libxl's own helper is said to have taken pages from a disk: {words}"
    );
    arrived(bed, from)
}

/// Migrates by xl; all that it and the other side said.
fn migrate(lab: &Lab, from: Host, options: &str) -> Result<String> {
    let to = from.other().name();
    let line = format!("export LIBXL_SAVE_HELPER={MIGRATOR}; exec xl migrate {options} {DOMAIN} {to} 2>&1");
    let ended = lab.host(from).spawn(&line)?.wait(2 * PATIENCE)?;
    ensure!(ended.status == 0, "xl migrate ended with {}: {}", ended.status, ended.stdout);
    Ok(ended.stdout)
}

fn arrived(bed: &Bed<'_>, here: Host) -> Result<()> {
    let lab = &bed.lab;
    ensure!(proof::server(lab)? == bed.server, "mysqld is another process");
    ensure!(proof::query(lab, "SELECT 1")?.trim() == "1", "the server does not answer");
    only_here(lab, here)
}

/// What the source's helper says at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Summary {
    referenced: u64,
    accepted: u64,
    compared: u64,
    bytes_in: u64,
    bytes_out: u64,
}

impl Summary {
    /// In the words of a migration.
    fn find(words: &str) -> Result<Self> {
        let line = words
            .lines()
            .find_map(|line| line.split_once("poolskip: ").filter(|(_, said)| said.contains("by reference")));
        let (_, said) = line.with_context(|| format!("the source's helper gave no summary: {words}"))?;
        let before = |what: &str| -> Option<u64> {
            said.split_once(what)?.0.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        let summary = || {
            Some(Self {
                referenced: before(" pages by reference")?,
                accepted: before(" accepted")?,
                compared: before(" compared")?,
                bytes_in: before(" bytes became")?,
                bytes_out: said.rsplit(' ').next()?.trim().parse().ok()?,
            })
        };
        summary().with_context(|| format!("cannot read the summary {said:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_helper_s_summary_is_read() {
        let words = "xc: info: poolskip: lists of generation 3\n\
                     xc: info: poolskip: 40 pages by reference (38 accepted, 2 refused), 7 zero, 9 whole, 56 compared; 4096 bytes became 100\n";
        let expected = Summary { referenced: 40, accepted: 38, compared: 56, bytes_in: 4096, bytes_out: 100 };
        assert_eq!(Summary::find(words).unwrap(), expected);
        assert!(Summary::find("nothing").is_err());
    }
}
