//! Which guest page lies where on which disk.

use enlightenment::run::RunError;
use enlightenment::{ListKind, Pfn, Run, Vdev};

/// Why a run did not go into the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The run itself is wrong.
    #[error(transparent)]
    Run(#[from] RunError),
    /// It reaches beyond the domain's memory.
    #[error("run of {pages} pages from PFN {pfn:#x} exceeds the domain's last PFN {max_pfn:#x}")]
    BeyondMemory {
        /// First PFN.
        pfn: u64,
        /// Pages.
        pages: u16,
        /// The domain's last PFN.
        max_pfn: u64,
    },
    /// More runs than the domain has pages: most must be duplicates.
    #[error("more runs than the domain has pages ({pages})")]
    TooMany {
        /// The domain's pages.
        pages: u64,
    },
    /// More virtual devices than a domain can sensibly have.
    #[error("runs on more than {} disks", ReferenceMap::MAX_DISKS)]
    TooManyDisks,
}

/// Where a page's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The disk, as its index in [`ReferenceMap::vdevs`].
    pub disk: u8,
    /// Byte offset on it, a multiple of 512.
    pub offset: u64,
}

/// Sixteen bytes a run, so that the lists of a 1 TiB pool take about 1 GiB.
///
/// ```text
/// place:  | pfn (40) | pages (16) | disk (8) |
/// sector: | offset / 512 (63) | list (1)     |
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    place: u64,
    sector: u64,
}

impl Segment {
    fn new(pfn: u64, pages: u16, disk: u8, offset: u64, written: bool) -> Self {
        Self {
            place: pfn << 24 | u64::from(pages) << 8 | u64::from(disk),
            sector: (offset >> 9) << 1 | u64::from(written),
        }
    }
    fn pfn(self) -> u64 {
        self.place >> 24
    }
    fn pages(self) -> u64 {
        self.place >> 8 & 0xffff
    }
    fn end(self) -> u64 {
        self.pfn() + self.pages()
    }
    fn disk(self) -> u8 {
        (self.place & 0xff) as u8
    }
    fn offset(self) -> u64 {
        (self.sector >> 1) << 9
    }
    fn written(self) -> bool {
        self.sector & 1 == 1
    }
    /// The part of it within `from..to`, which must overlap it.
    fn cut(self, from: u64, to: u64) -> Self {
        let (from, to) = (from.max(self.pfn()), to.min(self.end()));
        let offset = self.offset() + (from - self.pfn()) * 4096;
        Self::new(from, (to - from) as u16, self.disk(), offset, self.written())
    }
    /// Appends `next` if it continues this one in every respect.
    fn try_extend(&mut self, next: Self) -> bool {
        let joins = self.disk() == next.disk()
            && self.written() == next.written()
            && self.end() == next.pfn()
            && self.offset() + self.pages() * 4096 == next.offset()
            && self.pages() + next.pages() <= u64::from(u16::MAX);
        if joins {
            self.place += next.pages() << 8;
        }
        joins
    }
}

/// Segments that are sorted at once, about: with their keys they fit into a processor's own cache.
const PART: usize = 4096;

/// PFN -> place on disk, built from the lists that the guest published. All of it is hints.
///
/// Runs are inserted in any order; where two name the same page, the last one wins. [`seal`](Self::seal) sorts them, and only
/// then can pages be looked up.
#[derive(Debug)]
pub struct ReferenceMap {
    segments: Vec<Segment>,
    vdevs: Vec<Vdev>,
    max_pfn: u64,
    sealed: bool,
    pages_read: u64,
    pages_written: u64,
}

impl ReferenceMap {
    /// Disks that the runs of one map may name.
    pub const MAX_DISKS: usize = 255;

    /// An empty map for a domain whose last PFN is `max_pfn`.
    pub fn new(max_pfn: Pfn) -> Self {
        Self {
            segments: Vec::new(),
            vdevs: Vec::new(),
            max_pfn: max_pfn.0.min(Run::MAX_PFN),
            sealed: true,
            pages_read: 0,
            pages_written: 0,
        }
    }

    /// Adds a run.
    ///
    /// # Errors
    /// [`MapError`]; the map is as before.
    pub fn insert_run(&mut self, run: &Run) -> Result<(), MapError> {
        run.check()?;
        // `check` has bounded pfn + pages by `Run::MAX_PFN`: no overflow.
        if run.pfn + u64::from(run.pages) - 1 > self.max_pfn {
            return Err(MapError::BeyondMemory { pfn: run.pfn, pages: run.pages, max_pfn: self.max_pfn });
        }
        if self.segments.len() as u64 > self.max_pfn || self.segments.len() >= u32::MAX as usize {
            return Err(MapError::TooMany { pages: self.max_pfn + 1 });
        }
        let vdev = Vdev(run.vdev);
        let disk = match self.vdevs.iter().position(|&known| known == vdev) {
            Some(index) => index,
            None if self.vdevs.len() >= Self::MAX_DISKS => return Err(MapError::TooManyDisks),
            None => {
                self.vdevs.push(vdev);
                self.vdevs.len() - 1
            }
        };
        let written = run.list == ListKind::Written as u8;
        *(if written { &mut self.pages_written } else { &mut self.pages_read }) += u64::from(run.pages);
        let segment = Segment::new(run.pfn, run.pages, disk as u8, run.disk_offset, written);
        self.sealed = match self.segments.last_mut() {
            None => true,
            Some(last) => {
                if last.try_extend(segment) {
                    return Ok(());
                }
                self.sealed && last.end() <= segment.pfn()
            }
        };
        self.segments.push(segment);
        Ok(())
    }

    /// Sorts the runs and resolves duplicates. Inserting afterwards is allowed, and asks for another `seal`.
    pub fn seal(&mut self) {
        if self.sealed {
            return;
        }
        let mut order = self.in_order();
        let mut sorted: Vec<Segment> = Vec::with_capacity(self.segments.len());
        let mut push = |segment: Segment| {
            if !sorted.last_mut().is_some_and(|last| last.try_extend(segment)) {
                sorted.push(segment);
            }
        };
        let mut rest = order.as_mut_slice();
        while let Some(&first) = rest.first() {
            let mut end = self.segments[first as usize].end();
            let mut size = 1;
            while let Some(&next) = rest.get(size).filter(|&&i| self.segments[i as usize].pfn() < end) {
                end = end.max(self.segments[next as usize].end());
                size += 1;
            }
            let (cluster, tail) = rest.split_at_mut(size);
            rest = tail;
            if let [only] = cluster {
                push(self.segments[*only as usize]);
            } else {
                cluster.sort_unstable();
                overlay(cluster.iter().map(|&i| self.segments[i as usize])).into_iter().for_each(&mut push);
            }
        }
        self.segments = sorted;
        self.sealed = true;
        (self.pages_read, self.pages_written) = (0, 0);
        for segment in &self.segments {
            *(if segment.written() { &mut self.pages_written } else { &mut self.pages_read }) +=
                segment.pages();
        }
    }

    /// The segments' indices in the order of their PFNs, and where these are equal in that of their insertion.
    ///
    /// They are parted by their PFN first, so that what is sorted in each part fits into a cache, however large the guest is: the cost of a
    /// segment does not grow with their number.
    fn in_order(&self) -> Vec<u32> {
        let count = self.segments.len();
        let mut shift = 0;
        while self.max_pfn >> shift > (count / PART) as u64 {
            shift += 1;
        }
        let part_of = |segment: &Segment| (segment.pfn() >> shift) as usize;
        // For each part how many there are, then where its next one goes, and in the end where it ends. `insert_run` has bounded the PFNs.
        let mut places = vec![0_usize; (self.max_pfn >> shift) as usize + 1];
        self.segments.iter().for_each(|segment| places[part_of(segment)] += 1);
        let mut begin = 0;
        for place in &mut places {
            begin += std::mem::replace(place, begin);
        }
        let mut order = vec![0_u32; count];
        for (index, segment) in (0..).zip(&self.segments) {
            let place = &mut places[part_of(segment)];
            order[*place] = index;
            *place += 1;
        }
        let (mut begin, mut keys) = (0, Vec::new());
        for end in places {
            let part = &mut order[begin..end];
            keys.clear();
            keys.extend(part.iter().map(|&index| (self.segments[index as usize].pfn(), index)));
            keys.sort_unstable();
            part.iter_mut().zip(&keys).for_each(|(to, key)| *to = key.1);
            begin = end;
        }
        order
    }

    /// Where the page lies, if the lists say so. `None` for every page while the map is not sealed.
    pub fn lookup(&self, pfn: Pfn) -> Option<Place> {
        self.cursor().lookup(pfn)
    }

    /// Looks many pages up, quickly when their PFNs ascend.
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor { segments: if self.sealed { &self.segments } else { &[] }, at: usize::MAX }
    }

    /// So many of the listed pages at most, spread over the runs: to look at some of them.
    pub fn some(&self, count: usize) -> Vec<Pfn> {
        let step = self.segments.len().div_ceil(count.max(1)).max(1);
        self.segments.iter().step_by(step).map(|segment| Pfn(segment.pfn() + segment.pages() / 2)).collect()
    }

    /// Pages in a list; exact once sealed, duplicates counted before.
    pub fn pages(&self, list: ListKind) -> u64 {
        match list {
            ListKind::Read => self.pages_read,
            ListKind::Written => self.pages_written,
        }
    }

    /// Pages in both lists.
    pub fn len(&self) -> u64 {
        self.pages_read + self.pages_written
    }

    /// Whether there is no page in it.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The disks that the runs name, by the index that a [`Place`] gives.
    pub fn vdevs(&self) -> &[Vdev] {
        &self.vdevs
    }
}

/// A place in the map, from which what lies close behind is found without a search in all of it: the map of a large guest is larger than
/// any cache.
#[derive(Clone, Copy, Debug)]
pub struct Cursor<'a> {
    segments: &'a [Segment],
    at: usize,
}

impl Cursor<'_> {
    /// Where the page lies, if the lists say so.
    pub fn lookup(&mut self, pfn: Pfn) -> Option<Place> {
        let begins_before = |index: usize| self.segments.get(index).is_some_and(|s| s.pfn() <= pfn.0);
        // The last segment that begins at the page or before it is at `low` or up to `end`.
        let (mut low, mut end) = (0, self.segments.len());
        if begins_before(self.at) {
            let mut step = 1;
            low = self.at;
            while begins_before(low + step) {
                low += step;
                step *= 2;
            }
            end = end.min(low + step);
        }
        let behind = self.segments.get(low..end).unwrap_or_default();
        self.at = (low + behind.partition_point(|segment| segment.pfn() <= pfn.0)).checked_sub(1)?;
        let segment = self.segments.get(self.at)?;
        (pfn.0 < segment.end()).then(|| Place {
            disk: segment.disk(),
            offset: segment.offset() + (pfn.0 - segment.pfn()) * 4096,
        })
    }
}

/// Lays segments over each other in the order given; the later one wins. The result is sorted and without overlap.
fn overlay(segments: impl Iterator<Item = Segment>) -> Vec<Segment> {
    let mut laid = std::collections::BTreeMap::<u64, Segment>::new();
    for segment in segments {
        let (from, to) = (segment.pfn(), segment.end());
        while let Some((&start, &below)) =
            laid.range(..to).next_back().filter(|(_, below)| below.end() > from)
        {
            laid.remove(&start);
            if below.end() > to {
                laid.insert(to, below.cut(to, u64::MAX));
            }
            if start < from {
                laid.insert(start, below.cut(0, from));
            }
        }
        laid.insert(from, segment);
    }
    laid.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(pfn: u64, pages: u16, vdev: u32, disk_offset: u64, list: ListKind) -> Run {
        Run { pfn, disk_offset, vdev, pages, list: list as u8, reserved: 0 }
    }

    #[test]
    fn bounds_are_kept() {
        let mut map = ReferenceMap::new(Pfn(99));
        assert!(matches!(
            map.insert_run(&run(99, 2, 1, 0, ListKind::Read)),
            Err(MapError::BeyondMemory { .. })
        ));
        assert!(matches!(map.insert_run(&run(0, 0, 1, 0, ListKind::Read)), Err(MapError::Run(_))));
        map.insert_run(&run(99, 1, 1, 512, ListKind::Read)).unwrap();
        map.seal();
        assert_eq!(map.lookup(Pfn(99)), Some(Place { disk: 0, offset: 512 }));
        assert_eq!(map.lookup(Pfn(98)), None);
    }

    #[test]
    fn runs_are_bounded_by_the_pages() {
        let mut map = ReferenceMap::new(Pfn(3));
        let results: Vec<_> =
            (0..10).map(|i| map.insert_run(&run(0, 1, 1, i * 8192, ListKind::Read))).collect();
        assert!(results[..4].iter().all(Result::is_ok));
        assert!(results[4..].iter().all(|r| matches!(r, Err(MapError::TooMany { .. }))));
        map.seal();
        assert_eq!(map.len(), 1);
        assert_eq!(map.lookup(Pfn(0)), Some(Place { disk: 0, offset: 3 * 8192 }));
    }

    /// More than are sorted at once, in no order, and some of them twice.
    #[test]
    fn many_parts_are_sorted_as_one() {
        let runs = 5 * PART as u64;
        let mut map = ReferenceMap::new(Pfn(runs * 3));
        let scattered = |number: u64| number * 7919 % runs;
        for number in 0..runs {
            let place = scattered(number);
            map.insert_run(&run(place * 3, 2, 1, place * 1_000_448, ListKind::Read)).unwrap();
        }
        for place in (0..runs).step_by(1000) {
            map.insert_run(&run(place * 3, 2, 2, place * 512, ListKind::Read)).unwrap();
        }
        map.seal();
        for place in 0..runs {
            let expected = if place % 1000 == 0 { (1, place * 512) } else { (0, place * 1_000_448) };
            let found = map.lookup(Pfn(place * 3)).map(|found| (found.disk, found.offset));
            assert_eq!((found, map.lookup(Pfn(place * 3 + 2))), (Some(expected), None), "{place}");
        }
    }

    proptest! {
        #[test]
        fn last_wins_everywhere(
            runs in proptest::collection::vec((0_u64..200, 1_u16..40, 0_u32..3, 0_u64..1000, any::<bool>()), 0..60),
            looked_up in proptest::collection::vec(0_u64..300, 0..40),
        ) {
            let mut map = ReferenceMap::new(Pfn(299));
            let mut model = vec![None; 300];
            for &(pfn, pages, vdev, sector, written) in &runs {
                let list = if written { ListKind::Written } else { ListKind::Read };
                map.insert_run(&run(pfn, pages, vdev, sector * 512, list)).unwrap();
                for page in 0..u64::from(pages) {
                    model[(pfn + page) as usize] = Some((vdev, sector * 512 + page * 4096, written));
                }
            }
            map.seal();
            for (pfn, expected) in model.iter().enumerate() {
                let found = map.lookup(Pfn(pfn as u64)).map(|p| (map.vdevs()[p.disk as usize].0, p.offset));
                prop_assert_eq!(found, expected.map(|(vdev, offset, _)| (vdev, offset)));
            }
            let mut cursor = map.cursor();
            for pfn in looked_up {
                prop_assert_eq!(cursor.lookup(Pfn(pfn)), map.lookup(Pfn(pfn)));
            }
            let written = model.iter().flatten().filter(|place| place.2).count() as u64;
            prop_assert_eq!(map.pages(ListKind::Written), written);
            prop_assert_eq!(map.len(), model.iter().flatten().count() as u64);
        }
    }
}
