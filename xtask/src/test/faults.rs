//! The fault matrix: in each phase of a migration each thing that can go wrong there, and what comes of it. A cell is a test of dom0-migrator;
//! `docs/reliability.md` keeps the table, and differs from it only until it is written anew.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, bail};

use crate::deployment::{cargo, root};
use crate::step::step;

/// The phases, in the order of time, and how they are called.
const PHASES: [(&str, &str); 9] = [
    ("Offer", "offer"),
    ("Plan", "plan"),
    ("FirstRound", "first round"),
    ("LaterRounds", "later rounds"),
    ("Drain", "drain"),
    ("Suspend", "suspend"),
    ("LastPages", "last pages"),
    ("HandOver", "hand-over"),
    ("After", "after"),
];

/// What goes wrong, and how it is called.
const FAULTS: [(&str, &str); 14] = [
    ("SourceHelperGone", "source's helper or command gone"),
    ("TargetHelperGone", "target's helper or command gone"),
    ("StreamCut", "stream cut"),
    ("StreamStalled", "stream stalled"),
    ("SideCut", "side channel cut"),
    ("SideStalled", "side channel stalled"),
    ("Reordered", "connections reordered"),
    ("DiskEio", "disk: EIO"),
    ("DiskShort", "disk: short"),
    ("DiskSlow", "disk: slow"),
    ("ListsGone", "lists gone"),
    ("MemoryRefused", "memory refused"),
    ("ReportDiskFull", "report's disk full"),
    ("RecordDiskFull", "records' disk full"),
];

/// What may come of it.
const OUTCOMES: [(&str, &str); 3] = [
    ("Completed", "completed"),
    ("SourceRuns", "source runs"),
    ("PausedAndResolved", "**paused, resolved**"),
];

/// Where the table begins and ends in the file.
const BEGIN: &str = "<!-- cargo xtask test --faults writes from here -->\n";
const END: &str = "<!-- to here -->\n";

/// Runs every cell and prints the table; with `write` it goes into the file, else the file must have it.
///
/// # Errors
/// When a cell fails, is missing, or is not as the file has it.
pub fn run(write: bool) -> Result<()> {
    let words = step("fault matrix", || {
        let output = cargo()
            .args(["test", "--locked", "--package=dom0-migrator", "faults::", "--", "--show-output"])
            .output()
            .context("cannot start cargo")?;
        let words = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("{words}\n{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(words)
    })?;
    let table = table(&cells(&words))?;
    println!("{table}");
    let path = root().join("docs/reliability.md");
    let kept = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let whole = with_table(&kept, &table).context("docs/reliability.md has no place for the table")?;
    if write {
        fs::write(&path, whole)?;
    } else if whole != kept {
        bail!(
            "docs/reliability.md has another table: `cargo xtask test --faults --write-table` writes this one"
        );
    }
    Ok(())
}

/// What came of each cell: by phase and fault.
fn cells(words: &str) -> BTreeMap<(&str, &str), &str> {
    words
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("CELL ")?.split(' ');
            Some(((words.next()?, words.next()?), words.next()?))
        })
        .collect()
}

/// As Markdown.
fn table(cells: &BTreeMap<(&str, &str), &str>) -> Result<String> {
    let mut lines = vec!["| |".to_owned(), "|---|".to_owned()];
    for (_, phase) in PHASES {
        lines[0].push_str(&format!(" {phase} |"));
        lines[1].push_str("---|");
    }
    for (fault, name) in FAULTS {
        let mut line = format!("| {name} |");
        for (phase, _) in PHASES {
            let outcome =
                cells.get(&(phase, fault)).with_context(|| format!("no test tells of {phase}, {fault}"))?;
            let outcome = OUTCOMES.iter().find(|(word, _)| word == outcome);
            line.push_str(&format!(" {} |", outcome.with_context(|| format!("{phase}, {fault}"))?.1));
        }
        lines.push(line);
    }
    lines.push(String::new());
    Ok(lines.join("\n"))
}

fn with_table(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{table}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cell_may_be_empty() {
        let mut words = String::new();
        for (phase, _) in PHASES {
            for (fault, _) in FAULTS {
                words.push_str(&format!("---- some::test stdout ----\nCELL {phase} {fault} Completed\n\n"));
            }
        }
        let made = table(&cells(&words)).unwrap();
        assert_eq!(made.lines().count(), 2 + FAULTS.len());
        assert!(made.lines().all(|line| line.matches('|').count() == PHASES.len() + 2), "{made}");
        let less = words.replacen("CELL Drain DiskEio Completed\n", "", 1);
        assert!(table(&cells(&less)).unwrap_err().to_string().contains("Drain, DiskEio"));
        let other = words.replacen("Completed", "Lost", 1);
        assert!(table(&cells(&other)).is_err());
        let text = format!("a\n{BEGIN}old\n{END}b\n");
        let once = with_table(&text, &made).unwrap();
        assert_eq!(with_table(&once, &made).unwrap(), once);
    }
}
