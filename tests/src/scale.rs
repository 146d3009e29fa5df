//! Guests that are only made up, of any size: lists generated page by page as they are asked for, and a disk with holes where nothing
//! is looked at. What is measured is the real walk, map, window and filters of dom0-migrator.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use dom0_migrator::engine::xen_stream::{MAX_BATCH, RecordHeader, record};
use dom0_migrator::engine::{
    Config, DiskName, ReferenceMap, SourceFilter, SourceParts, TargetFilter, TargetParts,
};
use dom0_migrator::lists::{GuestMemory, walk};
use enlightenment::list::{
    INDEX_MAGIC, LEAF_MAGIC, LEAVES_PER_INDEX, NO_PFN, ROOT_MAGIC, ROOT_SLOTS_OFFSET, RUNS_PER_LEAF,
};
use enlightenment::{ABI_VERSION, ListKind, PAGE_SIZE, Pfn, Run, Vdev};
use serde::Serialize;

/// Pages of a frame of InnoDB's.
const FRAME_PAGES: u64 = 4;

/// Frames whose PFNs ascend: what one transparent huge page holds, and half of one more. The next ones are elsewhere.
const STRETCH: u64 = 128;

/// Pages that go through the filters: as many as the window holds by default, whatever the guest's size.
pub const SAMPLED_PAGES: u64 = 65_536;

/// `xvda`.
const DISK: Vdev = Vdev(51_712);

/// The generation that is published.
const GENERATION: u64 = 1;

/// Where the root page is.
const ROOT: u64 = 1;

/// A made-up guest: 70 % of its memory is a pool whose every frame is listed, each in a run of its own, for on disk no two lie
/// beside each other.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    pages: u64,
    frames: u64,
}

impl Guest {
    /// Of so many GiB.
    pub const fn of_gib(gib: u64) -> Self {
        let pages = gib << 18;
        Self { pages, frames: pages * 7 / 10 / FRAME_PAGES / STRETCH * STRETCH }
    }

    /// Frames of its pool.
    pub const fn frames(&self) -> u64 {
        self.frames
    }

    const fn leaves(&self) -> u64 {
        self.frames.div_ceil(RUNS_PER_LEAF as u64)
    }

    const fn indexes(&self) -> u64 {
        self.leaves().div_ceil(LEAVES_PER_INDEX as u64)
    }

    /// The run of the frame that is listed as the `number`-th. Stretches are listed in no order.
    fn run(&self, number: u64) -> Run {
        let stretches = self.frames / STRETCH;
        let stretch = scattered(number / STRETCH, stretches);
        let place = stretch * STRETCH + number % STRETCH;
        Run {
            pfn: self.pool() + place * FRAME_PAGES,
            disk_offset: self.disk_page(place) * PAGE_SIZE as u64,
            vdev: DISK.0,
            pages: FRAME_PAGES as u16,
            list: ListKind::Read as u8,
            reserved: 0,
        }
    }

    /// First PFN of the pool, behind the pages of the lists.
    const fn pool(&self) -> u64 {
        self.pages - self.frames * FRAME_PAGES
    }

    /// Where the frame at a place of the pool lies on disk.
    fn disk_page(&self, place: u64) -> u64 {
        scattered(place, self.frames) * FRAME_PAGES
    }

    fn page(&self, pfn: u64) -> Option<Box<[u8]>> {
        let mut page = vec![0; PAGE_SIZE].into_boxed_slice();
        let first_leaf = ROOT + 1 + self.indexes();
        if pfn == ROOT {
            self.root(&mut page);
        } else if (ROOT + 1..first_leaf).contains(&pfn) {
            let number = pfn - ROOT - 1;
            let from = number * LEAVES_PER_INDEX as u64;
            let count = (self.leaves() - from).min(LEAVES_PER_INDEX as u64);
            let next = if number + 1 < self.indexes() { pfn + 1 } else { NO_PFN };
            head(&mut page, INDEX_MAGIC, count as u32);
            put(&mut page, 16, next);
            for leaf in 0..count {
                put(&mut page, 24 + 8 * leaf as usize, first_leaf + from + leaf);
            }
        } else if (first_leaf..first_leaf + self.leaves()).contains(&pfn) {
            let from = (pfn - first_leaf) * RUNS_PER_LEAF as u64;
            let count = (self.frames - from).min(RUNS_PER_LEAF as u64);
            head(&mut page, LEAF_MAGIC, count as u32);
            for run in 0..count {
                let at = 16 + Run::SIZE * run as usize;
                page[at..at + Run::SIZE].copy_from_slice(&self.run(from + run).to_bytes());
            }
        } else {
            return None;
        }
        Some(page)
    }

    fn root(&self, page: &mut [u8]) {
        put(page, 0, ROOT_MAGIC);
        put32(page, 8, ABI_VERSION);
        put32(page, 12, PAGE_SIZE as u32);
        put(page, 16, GENERATION);
        put(page, 32, self.frames);
        put(page, 40, self.frames);
        let slot = ROOT_SLOTS_OFFSET + 72 * (GENERATION & 1) as usize;
        put(page, slot, GENERATION);
        put(page, slot + 8, ROOT + 1);
        put32(page, slot + 16, self.indexes() as u32);
        put(page, slot + 24, self.leaves());
        put(page, slot + 32, self.frames);
        put(page, slot + 40, self.frames * FRAME_PAGES);
        put(page, slot + 56, self.frames);
    }
}

impl GuestMemory for Guest {
    fn last_pfn(&self) -> Pfn {
        Pfn(self.pages - 1)
    }

    fn pages(&mut self, pfns: &[Pfn]) -> io::Result<Vec<Option<Box<[u8]>>>> {
        Ok(pfns.iter().map(|pfn| self.page(pfn.0)).collect())
    }
}

/// One to one within `0..count`, neighbours far apart.
fn scattered(number: u64, count: u64) -> u64 {
    // A prime that divides no count here: counts are below it.
    const PRIME: u64 = 2_654_435_761;
    ((u128::from(number) * u128::from(PRIME)) % u128::from(count)) as u64
}

fn head(page: &mut [u8], magic: u32, count: u32) {
    put32(page, 0, magic);
    put32(page, 4, count);
    put(page, 8, GENERATION);
}

fn put(page: &mut [u8], at: usize, value: u64) {
    page[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn put32(page: &mut [u8], at: usize, value: u32) {
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// What a made-up guest of one size cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// Its size.
    pub gib: u64,
    /// Frames in its lists, each a run.
    pub runs: u64,
    /// Reading the lists and sorting them, with the time that it takes to make them up.
    pub list_seconds: f64,
    /// Memory that the lists take once they are read.
    pub list_bytes: u64,
    /// The most that they take while they are read.
    pub list_peak_bytes: u64,
    /// Pages that went through the filters, all of them by reference.
    pub pages: u64,
    /// From the start to the end of both filters.
    pub filter_seconds: f64,
    /// The most that both filters take beside the lists: window, tables, buffers.
    pub filter_peak_bytes: u64,
}

/// Reads the lists of a guest, then has a sample of so many of its pages (a multiple of four), spread over all of its pool, pass both filters. `dir` must be on a
/// file system that has files with holes.
///
/// # Errors
/// When a filter fails, or a page of the sample does not go by reference.
pub fn cost(gib: u64, pages: u64, dir: &Path) -> Result<Cost> {
    let pages = pages / FRAME_PAGES * FRAME_PAGES;
    ensure!((1..=4096).contains(&gib), "a guest of {gib} GiB: it may have 1 to 4096");
    let mut guest = Guest::of_gib(gib);
    let before = reset_peak()?;
    let start = Instant::now();
    let walked = walk(&mut guest, Pfn(ROOT))?;
    let list_seconds = start.elapsed().as_secs_f64();
    ensure!(
        walked.runs == guest.frames
            && walked.runs_refused == 0
            && walked.map.len() == guest.frames * FRAME_PAGES,
        "{} of {} runs were read, {} refused",
        walked.runs,
        guest.frames,
        walked.runs_refused
    );
    let list_peak_bytes = memory("VmHWM")?.saturating_sub(before);
    let with_lists = reset_peak()?;

    let disk = tempfile::NamedTempFile::new_in(dir)?;
    write_sample(guest, pages, disk.as_file())?;
    let start = Instant::now();
    let accepted = filter(guest, pages, walked.map, disk.path())?;
    let filter_seconds = start.elapsed().as_secs_f64();
    ensure!(accepted == pages, "{accepted} of {pages} pages went by reference");
    Ok(Cost {
        gib,
        runs: guest.frames,
        list_seconds,
        list_bytes: with_lists.saturating_sub(before),
        list_peak_bytes,
        pages,
        filter_seconds,
        filter_peak_bytes: memory("VmHWM")?.saturating_sub(with_lists),
    })
}

/// The places in the pool of the sampled frames, ascending, evenly apart.
fn sample(guest: Guest, pages: u64) -> impl Iterator<Item = u64> {
    let frames = pages / FRAME_PAGES;
    (0..frames).map(move |number| number * guest.frames / frames)
}

/// A page that is nowhere else.
fn content(pfn: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0x5a; PAGE_SIZE];
    page[..8].copy_from_slice(&pfn.to_le_bytes());
    page
}

fn write_sample(guest: Guest, pages: u64, disk: &File) -> Result<()> {
    disk.set_len(guest.frames * FRAME_PAGES * PAGE_SIZE as u64)
        .context("the file system has no files with holes of this size")?;
    for place in sample(guest, pages) {
        for page in 0..FRAME_PAGES {
            let offset = (guest.disk_page(place) + page) * PAGE_SIZE as u64;
            disk.write_all_at(&content(guest.pool() + place * FRAME_PAGES + page), offset)?;
        }
    }
    disk.sync_all()?;
    Ok(())
}

/// Has the sample pass a source's and a target's filter, as between two hosts; references that were accepted.
fn filter(guest: Guest, pages: u64, map: ReferenceMap, disk: &Path) -> Result<u64> {
    let (save, from_save) = UnixStream::pair()?;
    let (to_wire, from_wire) = UnixStream::pair()?;
    let (to_restore, restore) = UnixStream::pair()?;
    let (side, side_of_target) = UnixStream::pair()?;
    let target = TargetFilter::start(TargetParts {
        from_wire: OwnedFd::from(from_wire),
        to_restore: OwnedFd::from(to_restore),
        side: Some(OwnedFd::from(side_of_target)),
        config: Config::default(),
    })?;
    let source = SourceFilter::start(SourceParts {
        from_save: OwnedFd::from(from_save),
        to_wire: OwnedFd::from(to_wire),
        side: Some(OwnedFd::from(side)),
        map,
        disks: vec![DiskName { vdev: DISK, path: disk.to_owned() }],
        config: Config::default(),
    })?;
    let restoring = thread::spawn(move || drain(restore));
    let written = write_stream(guest, pages, save);
    let source = source.finish().context("the source's filter");
    let target = target.finish().context("the target's filter");
    restoring.join().map_err(|_| anyhow!("the thread that restores panicked"))??;
    written?;
    target?;
    Ok(source?.stats.references_accepted)
}

fn drain(mut from: UnixStream) -> io::Result<()> {
    let mut chunk = vec![0; 1 << 20];
    while from.read(&mut chunk)? > 0 {}
    Ok(())
}

/// A stream as libxenguest writes one for a PV guest, as far as the filters look at it (Xen's libxc-migration-stream specification).
fn write_stream(guest: Guest, pages: u64, mut to: UnixStream) -> io::Result<()> {
    let mut head = vec![0xff; 8];
    head.extend(0x5845_4e46_u32.to_be_bytes());
    head.extend(3_u32.to_be_bytes());
    head.extend([0; 8]);
    // Type 1 is PV, page shift 12, made by Xen 4.17.
    head.extend(1_u32.to_le_bytes());
    head.extend(12_u16.to_le_bytes());
    head.extend([0; 2]);
    head.extend(4_u32.to_le_bytes());
    head.extend(17_u32.to_le_bytes());
    to.write_all(&head)?;
    let pages: Vec<u64> = sample(guest, pages)
        .flat_map(|place| (0..FRAME_PAGES).map(move |page| guest.pool() + place * FRAME_PAGES + page))
        .collect();
    for batch in pages.chunks(MAX_BATCH) {
        let mut body = (batch.len() as u64).to_le_bytes().to_vec();
        // The type of an ordinary page is 0, in the upper bits.
        batch.iter().for_each(|pfn| body.extend(pfn.to_le_bytes()));
        batch.iter().for_each(|pfn| body.extend(content(*pfn)));
        to.write_all(&RecordHeader::bytes(record::PAGE_DATA, body.len()))?;
        to.write_all(&body)?;
    }
    to.write_all(&RecordHeader::bytes(record::END, 0))
}

/// Sets the process's greatest memory to what it has now; what that is.
fn reset_peak() -> Result<u64> {
    std::fs::write("/proc/self/clear_refs", "5").context("cannot reset the greatest memory")?;
    memory("VmRSS")
}

/// A line of `/proc/self/status`, in bytes.
fn memory(line: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = status.lines().find_map(|words| {
        words.strip_prefix(line)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    Ok(kib.with_context(|| format!("/proc/self/status has no {line}"))? << 10)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_frame_is_listed_once_and_in_memory() {
        let guest = Guest::of_gib(1);
        let runs: Vec<Run> = (0..guest.frames()).map(|number| guest.run(number)).collect();
        assert_eq!(runs.iter().map(|run| run.pfn).collect::<HashSet<_>>().len(), runs.len());
        assert_eq!(runs.iter().map(|run| run.disk_offset).collect::<HashSet<_>>().len(), runs.len());
        let lists_end = ROOT + 1 + guest.indexes() + guest.leaves();
        assert!(runs.iter().all(|run| run.pfn >= lists_end && run.pfn + 4 <= guest.pages));
    }

    #[test]
    fn a_sample_of_a_made_up_guest_goes_by_reference() {
        let dir = tempfile::tempdir().unwrap();
        let cost = cost(1, 4096, dir.path()).unwrap();
        assert_eq!((cost.pages, cost.runs), (4096, Guest::of_gib(1).frames()));
        assert!(cost.list_bytes > 0 && cost.list_peak_bytes >= cost.list_bytes);
    }
}
