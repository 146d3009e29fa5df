//! Which runs there are, and in what order.

use serde::{Deserialize, Serialize};

use crate::workload::Workload;

/// Whose migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Xen's own helper
    Stock,
    /// All of Poolskip
    Poolskip,
    /// Poolskip that asks the guest for nothing: zero pages and policy, no references
    NoReferences,
    /// All of Poolskip, and the stream compressed where that is faster (`--compress auto`)
    Compressed,
    /// Xen's own helper, with zstd on the pipe
    StockZstd,
}

impl Variant {
    /// Its name in figures and files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Poolskip => "poolskip",
            Self::NoReferences => "no_references",
            Self::Compressed => "compressed",
            Self::StockZstd => "stock_zstd",
        }
    }
}

/// One migration that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// What the database does.
    pub workload: Workload,
    /// Whose migration.
    pub variant: Variant,
    /// Number of the pair, from 0.
    pub pair: u32,
}

impl Planned {
    /// Its file in the state directory.
    pub fn file(self) -> String {
        format!("{}-{}-{}.json", self.workload.name(), self.pair, self.variant.name())
    }
}

/// All runs: for each workload the pairs, of `spill` a third, then the other baselines. Who begins changes with each pair: the guest goes there and back,
/// so each variant has both directions, and neither always comes first.
pub fn plan(workloads: &[Workload], pairs: u32, baselines: &[Variant], baseline_runs: u32) -> Vec<Planned> {
    let mut runs = Vec::new();
    for &workload in workloads {
        let pairs = if workload == Workload::Spill { pairs.div_ceil(3) } else { pairs };
        for pair in 0..pairs {
            let mut both = [Variant::Stock, Variant::Poolskip];
            if pair % 2 == 1 {
                both.reverse();
            }
            runs.extend(both.map(|variant| Planned { workload, variant, pair }));
        }
        for pair in 0..baseline_runs {
            for &variant in baselines {
                if !matches!(variant, Variant::Stock | Variant::Poolskip) {
                    runs.push(Planned { workload, variant, pair });
                }
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stock_and_poolskip_alternate_and_take_turns_in_beginning() {
        let runs = plan(&[Workload::Idle], 3, &[Variant::NoReferences, Variant::Stock], 1);
        let order: Vec<_> = runs.iter().map(|run| (run.pair, run.variant.name())).collect();
        assert_eq!(
            order,
            [
                (0, "stock"),
                (0, "poolskip"),
                (1, "poolskip"),
                (1, "stock"),
                (2, "stock"),
                (2, "poolskip"),
                (0, "no_references")
            ]
        );
    }

    #[test]
    fn of_spill_there_is_a_third() {
        let pairs = |of| plan(&[Workload::Rw, Workload::Spill], of, &[], 0).len() / 2;
        assert_eq!([1, 3, 4].map(pairs), [2, 4, 6]);
    }

    #[test]
    fn every_run_has_a_file_of_its_own() {
        let all = [Workload::Idle, Workload::Tpcc];
        let runs = plan(&all, 4, &[Variant::NoReferences, Variant::StockZstd], 2);
        let mut files: Vec<_> = runs.iter().map(|run| run.file()).collect();
        files.sort();
        files.dedup();
        assert_eq!((files.len(), runs.len()), (2 * (8 + 4), 2 * (8 + 4)));
    }
}
