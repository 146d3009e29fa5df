//! How much of each table is listed.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::left_out::LeftOut;
use crate::lists::ListSummary;
use crate::spaces::Spaces;

/// No answer names more tables; the others are summed up, so that a status stays readable with a hundred thousand of them.
const MOST_TABLES: usize = 64;

/// What became of the frames of one tablespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coverage {
    /// In the read list.
    pub frames_read: u64,
    /// In the written list.
    pub frames_written: u64,
    /// In neither.
    pub left_out: u64,
    /// The same by reason.
    pub reasons: BTreeMap<LeftOut, u64>,
}

impl Coverage {
    /// Frames in all.
    pub const fn frames(&self) -> u64 {
        self.frames_read + self.frames_written + self.left_out
    }

    /// Counts a frame that is in neither list.
    pub fn leave_out(&mut self, reason: LeftOut) {
        self.left_out += 1;
        *self.reasons.entry(reason).or_default() += 1;
    }

    fn add(&mut self, other: &Self) {
        self.frames_read += other.frames_read;
        self.frames_written += other.frames_written;
        self.left_out += other.left_out;
        for (reason, count) in &other.reasons {
            *self.reasons.entry(*reason).or_default() += count;
        }
    }
}

/// A table with its name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableCoverage {
    /// The server's PID.
    pub pid: i32,
    /// The tablespace; none for the sum of all that are not named.
    pub space: Option<u32>,
    /// `schema/table` or the file's name; `space N` where no file is known.
    pub table: String,
    /// Its frames.
    #[serde(flatten)]
    pub coverage: Coverage,
}

/// The tables of a server with the most frames, the rest summed up at the end.
pub fn by_table(pid: i32, summary: &ListSummary, spaces: &Spaces) -> Vec<TableCoverage> {
    let mut all: Vec<(u32, &Coverage)> =
        summary.by_space.iter().map(|(space, coverage)| (*space, coverage)).collect();
    all.sort_by_key(|(space, coverage)| (std::cmp::Reverse(coverage.frames()), *space));
    let others = all.split_off(all.len().min(MOST_TABLES));
    let mut tables: Vec<TableCoverage> = all
        .into_iter()
        .map(|(space, coverage)| {
            let name = spaces.get(space).map(|file| table_name(&file.name));
            let table = name.unwrap_or_else(|| format!("space {space}"));
            TableCoverage { pid, space: Some(space), table, coverage: coverage.clone() }
        })
        .collect();
    if !others.is_empty() {
        let table = format!("{} other tables", others.len());
        let mut sum = TableCoverage { pid, space: None, table, coverage: Coverage::default() };
        others.iter().for_each(|(_, coverage)| sum.coverage.add(coverage));
        tables.push(sum);
    }
    tables
}

/// `schema/table` of `…/schema/table.ibd`; of any other file its name.
fn table_name(path: &Path) -> String {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match (path.extension(), path.parent()) {
        (Some(extension), Some(parent)) if extension == "ibd" => {
            format!("{}/{}", name(parent), name(&path.with_extension("")))
        }
        _ => name(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_named_as_people_know_them() {
        assert_eq!(table_name(Path::new("/var/lib/mysql/sbtest/sbtest1.ibd")), "sbtest/sbtest1");
        assert_eq!(table_name(Path::new("/var/lib/mysql/ibdata1")), "ibdata1");
        assert_eq!(table_name(Path::new("")), "");
    }

    #[test]
    fn small_tables_are_summed_up() {
        let mut summary = ListSummary::default();
        for space in 0..100 {
            let mut coverage =
                Coverage { frames_read: u64::from(space), frames_written: 1, ..Coverage::default() };
            if space % 2 == 1 {
                coverage.leave_out(LeftOut::Dirty);
            }
            summary.by_space.insert(space, coverage);
        }
        let tables = by_table(7, &summary, &Spaces::default());
        assert_eq!(tables.len(), MOST_TABLES + 1);
        assert_eq!((tables[0].space, tables[0].table.as_str()), (Some(99), "space 99"));
        let last = tables.last().unwrap();
        assert_eq!((last.space, last.table.as_str()), (None, "36 other tables"));
        assert_eq!(last.coverage.reasons, [(LeftOut::Dirty, 17)].into());
        let frames: u64 = tables.iter().map(|table| table.coverage.frames()).sum();
        assert_eq!(frames, summary.by_space.values().map(Coverage::frames).sum::<u64>());
    }
}
