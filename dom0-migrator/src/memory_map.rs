//! A map of guest memory by the way that its pages went: a raster of bounded size, as the report file has it.
//!
//! Frame numbers are sparse (a small PVH guest's span a million), so only regions that hold pages with content are on the map.
//! A cell is a power of two of neighbouring pages, with the number of pages of each way in it; like cells that follow each other are
//! one run.

use serde::{Deserialize, Serialize};

use crate::engine::{PFNS_MAX, Travel, Way, WayCounts};

/// Most cells: 128 by 128, what a page of a browser shows well.
pub const CELLS_MAX: usize = 128 * 128;
/// Pages of a region at least: gaps in between are not worth a region of their own.
const REGION: u64 = 1024;

/// The map.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryMap {
    /// Pages of a cell.
    pub pages_per_cell: u64,
    /// Pages by the way that they went last; each page counts once.
    pub pages: WayCounts,
    /// What is on the map, ascending.
    pub regions: Vec<Region>,
    /// The cells of all regions, one region after the other.
    pub runs: Vec<CellRun>,
}

/// Neighbouring pages that are on the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Its first page.
    pub first_pfn: u64,
    /// Its cells.
    pub cells: u64,
}

/// Cells in a row that are alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CellRun {
    /// How many.
    pub cells: u64,
    /// Pages of each way in each of them; ways without pages are left out.
    pub ways: Vec<(Way, u64)>,
}

/// What is wrong with a map that came from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapProblem {
    /// The cells' size.
    #[error("{0} pages per cell: a power of two up to {PFNS_MAX} is meant")]
    CellSize(u64),
    /// The regions.
    #[error(
        "region {index} begins at page {first_pfn}, which is not above the one before or not below {PFNS_MAX}"
    )]
    Region {
        /// Which.
        index: usize,
        /// Where it begins.
        first_pfn: u64,
    },
    /// Too many cells, or none where some are said.
    #[error("{0} cells: 1 to {CELLS_MAX} are meant in all")]
    Cells(u64),
    /// Regions and runs disagree.
    #[error("the regions have {regions} cells, the runs {runs}")]
    Sum {
        /// Cells of the regions.
        regions: u64,
        /// Cells of the runs.
        runs: u64,
    },
    /// A cell holds more than fits.
    #[error("run {index} has cells of {pages} pages, and a cell has {pages_per_cell}")]
    Full {
        /// Which run.
        index: usize,
        /// Pages in each of its cells.
        pages: u64,
        /// Pages of a cell.
        pages_per_cell: u64,
    },
}

impl MemoryMap {
    /// Of what a filter noted; `None` when no page with content went.
    pub fn of(travel: &Travel) -> Option<Self> {
        let blocks = blocks_with_content(travel);
        let mut pages_per_cell = 1;
        let mut regions = regions(&blocks, pages_per_cell);
        while regions.iter().map(|region| region.cells).sum::<u64>() > CELLS_MAX as u64 {
            pages_per_cell *= 2;
            regions = self::regions(&blocks, pages_per_cell);
        }
        if regions.is_empty() {
            return None;
        }
        let mut map = Self { pages_per_cell, regions, ..Self::default() };
        for (_, ways) in travel.noted() {
            ways.for_each(|way| map.pages.add(way, 1));
        }
        for region in &map.regions {
            for cell in 0..region.cells {
                let first = region.first_pfn + cell * pages_per_cell;
                let mut counts = WayCounts::default();
                (first..first + pages_per_cell).for_each(|pfn| counts.add(travel.way(pfn), 1));
                let ways = Way::ALL.map(|way| (way, counts.get(way)));
                let ways: Vec<_> = ways.into_iter().filter(|&(_, pages)| pages > 0).collect();
                match map.runs.last_mut() {
                    Some(run) if run.ways == ways => run.cells += 1,
                    _ => map.runs.push(CellRun { cells: 1, ways }),
                }
            }
        }
        Some(map)
    }

    /// Checks a map that came from elsewhere: after this no sum overflows, and no loop over cells is long.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), MapProblem> {
        let size = self.pages_per_cell;
        if !size.is_power_of_two() || size > PFNS_MAX {
            return Err(MapProblem::CellSize(size));
        }
        let (mut regions, mut end) = (0_u64, 0_u64);
        for (index, region) in self.regions.iter().enumerate() {
            let first_pfn = region.first_pfn;
            if first_pfn >= PFNS_MAX || first_pfn < end {
                return Err(MapProblem::Region { index, first_pfn });
            }
            regions = within(regions, region.cells)?;
            end = first_pfn + region.cells * size;
        }
        let mut runs = 0;
        for (index, run) in self.runs.iter().enumerate() {
            runs = within(runs, run.cells)?;
            let pages = run.ways.iter().fold(0_u64, |sum, (_, pages)| sum.saturating_add(*pages));
            if pages > size {
                return Err(MapProblem::Full { index, pages, pages_per_cell: size });
            }
        }
        if regions == runs { Ok(()) } else { Err(MapProblem::Sum { regions, runs }) }
    }

    /// Every cell with its region's index, in order.
    pub fn cells(&self) -> impl Iterator<Item = (usize, &[(Way, u64)])> {
        let region_of = self
            .regions
            .iter()
            .enumerate()
            .flat_map(|(index, region)| std::iter::repeat_n(index, region.cells as usize));
        let ways =
            self.runs.iter().flat_map(|run| std::iter::repeat_n(run.ways.as_slice(), run.cells as usize));
        region_of.zip(ways)
    }
}

/// A sum of cells, if it is one that may be.
fn within(sum: u64, more: u64) -> Result<u64, MapProblem> {
    let all = sum.saturating_add(more);
    if more == 0 || all > CELLS_MAX as u64 { Err(MapProblem::Cells(all)) } else { Ok(all) }
}

/// First PFNs of the blocks of [`REGION`] pages that hold a page with content, ascending.
fn blocks_with_content(travel: &Travel) -> Vec<u64> {
    let mut blocks = Vec::new();
    for (first, ways) in travel.noted() {
        for (index, way) in ways.enumerate() {
            let block = (first + index as u64) / REGION * REGION;
            if way > Way::NoData && blocks.last() != Some(&block) {
                blocks.push(block);
            }
        }
    }
    blocks
}

/// Joins blocks to regions of whole cells.
fn regions(blocks: &[u64], pages_per_cell: u64) -> Vec<Region> {
    let mut regions: Vec<Region> = Vec::new();
    for &block in blocks {
        let first_pfn = block / pages_per_cell * pages_per_cell;
        let cells = (block + REGION - first_pfn).div_ceil(pages_per_cell);
        match regions.last_mut() {
            Some(last) if first_pfn <= last.first_pfn + last.cells * pages_per_cell => {
                last.cells = last.cells.max((block + REGION - last.first_pfn).div_ceil(pages_per_cell));
            }
            _ => regions.push(Region { first_pfn, cells }),
        }
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn total(map: &MemoryMap, way: Way) -> u64 {
        let of = |ways: &[(Way, u64)]| ways.iter().filter(|(w, _)| *w == way).map(|(_, n)| n).sum::<u64>();
        map.cells().map(|(_, ways)| of(ways)).sum()
    }

    #[test]
    fn a_sparse_guest_s_gaps_are_left_out() {
        let mut travel = Travel::default();
        travel.span(0, 0xff000, Way::NoData);
        travel.span(0, 80_000, Way::Raw);
        travel.span(500, 7, Way::Refused);
        travel.span(0xfeff8, 8, Way::Raw);
        let map = MemoryMap::of(&travel).unwrap();
        assert_eq!(map.check(), Ok(()));
        assert_eq!((map.regions.len(), map.regions[0].first_pfn), (2, 0));
        assert_eq!(map.regions[1].first_pfn, 0xfec00);
        assert_eq!(map.pages_per_cell, 8);
        assert_eq!((total(&map, Way::Raw), total(&map, Way::Refused)), (80_001, 7));
        assert_eq!((map.pages.raw, map.pages.no_data), (80_001, 0xff000 - 80_008));
    }

    #[test]
    fn a_guest_of_a_tebibyte_is_a_small_map() {
        let mut travel = Travel::default();
        travel.span(0, 1 << 20, Way::Accepted);
        travel.span((1 << 28) - 5, 5, Way::Zero);
        let map = MemoryMap::of(&travel).unwrap();
        assert_eq!(map.check(), Ok(()));
        assert!(map.cells().count() <= CELLS_MAX);
        assert_eq!((total(&map, Way::Accepted), total(&map, Way::Zero)), (1 << 20, 5));
    }

    #[test]
    fn nothing_is_no_map() {
        let mut travel = Travel::default();
        assert_eq!(MemoryMap::of(&travel), None);
        travel.span(0, 5000, Way::NoData);
        assert_eq!(MemoryMap::of(&travel), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut travel = Travel::default();
        travel.span(0, 4096, Way::Raw);
        let right = MemoryMap::of(&travel).unwrap();
        let wrong = |change: fn(&mut MemoryMap)| {
            let mut map = right.clone();
            change(&mut map);
            map.check().unwrap_err()
        };
        assert_eq!(wrong(|map| map.pages_per_cell = 3), MapProblem::CellSize(3));
        assert_eq!(wrong(|map| map.pages_per_cell = 1 << 40), MapProblem::CellSize(1 << 40));
        assert!(matches!(wrong(|map| map.regions[0].cells = u64::MAX), MapProblem::Cells(_)));
        assert!(matches!(wrong(|map| map.runs[0].cells = 0), MapProblem::Cells(0)));
        assert!(matches!(wrong(|map| map.runs[0].cells -= 1), MapProblem::Sum { .. }));
        assert!(matches!(wrong(|map| map.regions[0].first_pfn = u64::MAX), MapProblem::Region { .. }));
        assert!(matches!(wrong(|map| map.runs[0].ways.push((Way::Zero, u64::MAX))), MapProblem::Full { .. }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_page_with_content_is_on_it_once(
            spans in proptest::collection::vec((0..1_u64 << 19, 1..3000_u64, 1..10_u8), 1..20)
        ) {
            let mut travel = Travel::default();
            for (first, pages, way) in spans {
                travel.span(first, pages, Way::from_number(way).unwrap());
            }
            if let Some(map) = MemoryMap::of(&travel) {
                prop_assert_eq!(map.check(), Ok(()));
                for way in &Way::ALL[2..] {
                    prop_assert_eq!(total(&map, *way), map.pages.get(*way));
                }
            }
        }
    }
}
