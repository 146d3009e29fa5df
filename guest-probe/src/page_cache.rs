//! The guest kernel's page cache: pages of files that lie on disk as much as those of the pool do, and often most of what is left of a
//! guest's memory beside it. A server whose files are opened without O_DIRECT has many pages there a second time.
//!
//! Each file is mapped here, a window at a time; `mincore(2)` says which of its pages are in memory, only those are entered into the page
//! tables (nothing is read from disk for it), and the module translates them like frames of a server, by addresses of this process.
//! Pages that the kernel says are dirty or being written are left out. All of it is a hint, as ever: what changes a moment later is
//! found by its hash.

use std::cell::{LazyCell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use enlightenment::device::UserRun;
use enlightenment::{ListKind, PAGE_SIZE};
use procfs::process::Process;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bytes::u64_le;
use crate::disk::{DeviceNumber, Disks};
use crate::frame_table::FrameAddr;
use crate::left_out::LeftOut;
use crate::lists::Runs;
use crate::privileges;
use crate::process::MysqldProcess;
use crate::storage_map::{DiskRule, PlacedFile};

/// Bytes of a file that are mapped as one window.
const WINDOW: u64 = 64 << 20;
/// Windows that are mapped at once: their runs are handed over together.
const WINDOWS_AT_ONCE: usize = 256;
/// Runs that are handed over together at most; one window's may be some more.
const RUNS_AT_ONCE: usize = 16_384;
/// No more files are looked at for one answer.
const MOST_FILES: usize = 65_536;
/// How deep files lie under the data directory.
const DEEPEST: usize = 3;
/// For so long at most files are looked at for dom0, which waits for the answer. The server's own come first.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// `MADV_POPULATE_READ` of linux/mman.h (5.14).
const POPULATE_READ: libc::c_int = 22;
/// Bits of `/proc/PID/pagemap`: the page is there, and its PFN.
const PRESENT: u64 = 1 << 63;
const PFN: u64 = (1 << 55) - 1;
/// Bits of `/proc/kpageflags` (linux/kernel-page-flags.h): DIRTY and WRITEBACK.
const CHANGED: u64 = 1 << 4 | 1 << 8;

/// What became of the page cache.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheSummary {
    /// Files with pages that are listed.
    pub files: u64,
    /// Guest pages that were handed over.
    pub pages: u64,
    /// Pages in memory that were left out because they are not on disk as they are.
    pub pages_changed: u64,
    /// Pages in memory whose place may not be named: holes, extents that are not written yet.
    pub pages_without_place: u64,
    /// Files that may not be named at all, by reason.
    pub files_left_out: BTreeMap<LeftOut, u64>,
    /// Why the listing ended before all files had been looked at, for people; none when it did not. All counts are of what was done until then.
    pub ended_early: Option<String>,
    /// Milliseconds that it took.
    pub milliseconds: u64,
}

/// Why a listing ends before all files have been looked at.
#[derive(Debug, Error)]
enum EndedEarly {
    /// dom0 waits.
    #[error("time was up after {} s", .0.as_secs())]
    TimeUp(Duration),
    /// Or there is a circle somewhere.
    #[error("there are more than {MOST_FILES} files")]
    TooManyFiles,
    /// `mincore(2)` tells who may not know that everything is in memory.
    #[error("CAP_FOWNER is missing, without which the kernel does not say which pages are in memory")]
    NotAllowed,
    /// A call that the kernel does not know, or refuses for each file.
    #[error("the kernel does not {what}: {source}")]
    Kernel {
        /// What was asked.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// What ends a listing: something here, or who takes the lists.
enum Stop<E> {
    Here(EndedEarly),
    Sink(E),
}

impl<E> From<EndedEarly> for Stop<E> {
    fn from(why: EndedEarly) -> Self {
        Self::Here(why)
    }
}

/// Lists the cached pages of the files that these servers have open, mapped or under their data directories, then of those that any
/// other process has open or mapped, for so long at most. The addresses are of this process, and hold only until `sink` returns.
///
/// What goes wrong here ends the listing and stands in the summary; what was found until then is handed over.
///
/// # Errors
/// Those of `sink`.
pub fn build<'a, E>(
    servers: impl IntoIterator<Item = &'a MysqldProcess>,
    rule: DiskRule,
    patience: Duration,
    mut sink: impl FnMut(&mut [UserRun]) -> Result<(), E>,
) -> Result<CacheSummary, E> {
    let start = Instant::now();
    let mut summary = CacheSummary::default();
    let mut batch = Batch::default();
    match list_all(servers, rule, Limit { start, patience }, &mut summary, &mut batch, &mut sink) {
        Ok(()) => {}
        Err(Stop::Here(why)) => {
            tracing::warn!(%why, "not all cached pages of files are listed");
            summary.ended_early = Some(why.to_string());
        }
        Err(Stop::Sink(error)) => return Err(error),
    }
    batch.hand_over(&mut sink)?;
    summary.milliseconds = start.elapsed().as_millis() as u64;
    Ok(summary)
}

/// How long a listing may take.
#[derive(Clone, Copy)]
struct Limit {
    start: Instant,
    patience: Duration,
}

impl Limit {
    fn check(self) -> Result<(), EndedEarly> {
        if self.start.elapsed() >= self.patience { Err(EndedEarly::TimeUp(self.patience)) } else { Ok(()) }
    }
}

/// All but the last hand-over.
fn list_all<'a, E>(
    servers: impl IntoIterator<Item = &'a MysqldProcess>,
    rule: DiskRule,
    limit: Limit,
    summary: &mut CacheSummary,
    batch: &mut Batch,
    sink: &mut impl FnMut(&mut [UserRun]) -> Result<(), E>,
) -> Result<(), Stop<E>> {
    if !privileges::has(privileges::FOWNER) {
        return Err(EndedEarly::NotAllowed.into());
    }
    let mut disks = Disks::default();
    let flags = PageFlags::open();
    let mut seen = HashSet::new();
    let servers: Vec<&MysqldProcess> = servers.into_iter().collect();
    let own = servers.iter().flat_map(|process| files_of_server(process));
    let of_others = processes().filter(|pid| !servers.iter().any(|process| process.pid == *pid));
    for Candidate { path, id } in own.chain(of_others.flat_map(files_of_process)) {
        limit.check()?;
        if seen.len() >= MOST_FILES {
            return Err(EndedEarly::TooManyFiles.into());
        }
        if id.is_some_and(|id| seen.contains(&id)) {
            continue;
        }
        let Some((file, device)) = open_once(&path, &mut seen) else { continue };
        let name = fs::read_link(&path).unwrap_or(path);
        let place = match PlacedFile::of(&file, &name, device, &mut disks, rule) {
            Ok(place) => place,
            Err(reason) => {
                *summary.files_left_out.entry(reason).or_default() += 1;
                continue;
            }
        };
        let cached = Cached { file: &file, place: &place, flags: flags.as_ref(), rule, limit };
        let before = summary.pages;
        let listed = cached.list(&mut disks, summary, batch, sink);
        summary.files += u64::from(summary.pages > before);
        listed?;
    }
    Ok(())
}

/// Opens a regular file that was not seen yet and has bytes; one that cannot be opened is none.
fn open_once(path: &Path, seen: &mut HashSet<(u64, u64)>) -> Option<(File, DeviceNumber)> {
    let meta = fs::metadata(path).ok()?;
    if !meta.is_file() || meta.len() == 0 || !seen.insert((meta.dev(), meta.ino())) {
        return None;
    }
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()?;
    // Another may have taken its name between the two.
    let meta = file.metadata().ok()?;
    meta.is_file().then(|| (file, DeviceNumber::from_st_dev(meta.dev())))
}

/// A file that may have cached pages.
struct Candidate {
    /// A path through which it can be opened.
    path: PathBuf,
    /// Device and inode, where they are known without asking its file system.
    id: Option<(u64, u64)>,
}

fn files_of_server(process: &MysqldProcess) -> impl Iterator<Item = Candidate> + use<> {
    let mut under = Vec::new();
    walk(&process.data_dir(), DEEPEST, &mut under);
    let under = under.into_iter().map(|path| Candidate { path, id: None });
    files_of_process(process.pid).chain(under)
}

fn walk(dir: &Path, deep: usize, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if found.len() >= MOST_FILES {
            return;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && deep > 1 => walk(&entry.path(), deep - 1, found),
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A process's mapped and open files, by paths under `/proc` through which they can be opened whatever root it has; of one that ends,
/// fewer. Only those of file systems on a block device: to ask another for a file may take as long as its server is away.
fn files_of_process(pid: i32) -> impl Iterator<Item = Candidate> {
    let process = Process::new(pid).ok();
    let maps = process.as_ref().and_then(|process| process.maps().ok());
    let mapped = maps.into_iter().flatten().filter(|map| map.dev.0 > 0 && map.inode > 0).map(move |map| {
        let (begin, end) = map.address;
        let device = libc::makedev(map.dev.0 as u32, map.dev.1 as u32);
        Candidate {
            path: format!("/proc/{pid}/map_files/{begin:x}-{end:x}").into(),
            id: Some((device, map.inode)),
        }
    });
    // Only of those that have files open: the kernel's own threads have none.
    let on_devices: LazyCell<HashSet<i32>, _> = LazyCell::new(move || {
        let mounts = process.and_then(|process| process.mountinfo().ok());
        let mounts = mounts.into_iter().flatten().filter(|mount| !mount.majmin.starts_with("0:"));
        mounts.map(|mount| mount.mnt_id).collect()
    });
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let open = open.filter(move |entry| {
        let number = entry.file_name();
        let info =
            fs::read_to_string(Path::new(&format!("/proc/{pid}/fdinfo")).join(number)).unwrap_or_default();
        mount_of(&info).is_some_and(|mount| on_devices.contains(&mount))
    });
    mapped.chain(open.map(|entry| Candidate { path: entry.path(), id: None }))
}

/// The mount of an open file, as its `fdinfo` has it.
fn mount_of(info: &str) -> Option<i32> {
    info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

/// A file whose cached pages are listed.
struct Cached<'a> {
    file: &'a File,
    place: &'a PlacedFile,
    flags: Option<&'a PageFlags>,
    rule: DiskRule,
    limit: Limit,
}

impl Cached<'_> {
    fn list<E>(
        &self,
        disks: &mut Disks,
        summary: &mut CacheSummary,
        batch: &mut Batch,
        sink: &mut impl FnMut(&mut [UserRun]) -> Result<(), E>,
    ) -> Result<(), Stop<E>> {
        // Its size now: of one that shrinks, pages behind the end are not there any more, and the kernel says so.
        let Ok(meta) = self.file.metadata() else { return Ok(()) };
        let mut at = 0;
        // A file can be nearly endless and have few bytes: holes are passed over.
        while let Some(next) = self.place.next_fit(at).filter(|next| *next < meta.len()) {
            self.limit.check()?;
            at = next / PAGE_SIZE as u64 * PAGE_SIZE as u64;
            let length = WINDOW.min(meta.len() - at);
            let window = Window::map(self.file, at, length)
                .map_err(|source| EndedEarly::Kernel { what: "map a file", source })?;
            let listed = self.list_window(&window, at, disks, summary, &mut batch.runs);
            // Also where it was not listed to its end: runs of it wait.
            batch.windows.push(window);
            listed?;
            if batch.windows.len() >= WINDOWS_AT_ONCE || batch.runs.len() >= RUNS_AT_ONCE {
                batch.hand_over(sink).map_err(Stop::Sink)?;
            }
            at += length;
        }
        Ok(())
    }

    /// Lists a window, which begins at this byte of the file.
    fn list_window(
        &self,
        window: &Window,
        at: u64,
        disks: &mut Disks,
        summary: &mut CacheSummary,
        runs: &mut Runs,
    ) -> Result<(), EndedEarly> {
        for (first, count) in window.resident()? {
            window.enter(first, count)?;
            let changed = self.flags.map(|flags| flags.changed(window.page(first), count));
            for (skip, pages) in unchanged(count, changed.as_deref()) {
                let (first, in_file) = (first + skip, at + ((first + skip) * PAGE_SIZE) as u64);
                let mut placed = 0;
                self.place.fit_pieces(disks, self.rule, in_file, (pages * PAGE_SIZE) as u64, |piece| {
                    placed += u64::from(piece.pages);
                    runs.push(FrameAddr(window.page(first)), &piece, ListKind::Read);
                });
                summary.pages += placed;
                summary.pages_without_place += pages as u64 - placed;
            }
            let of_run = changed.iter().flatten().filter(|changed| **changed).count();
            summary.pages_changed += of_run as u64;
        }
        Ok(())
    }
}

/// Runs, and the windows that their addresses are in.
#[derive(Default)]
struct Batch {
    runs: Runs,
    windows: Vec<Window>,
}

impl Batch {
    fn hand_over<E>(&mut self, sink: &mut impl FnMut(&mut [UserRun]) -> Result<(), E>) -> Result<(), E> {
        let handed_over = self.runs.hand_over(sink);
        self.windows.clear();
        handed_over
    }
}

/// The stretches of a run of pages that are not changed: where each begins in it, and its pages.
fn unchanged(count: usize, changed: Option<&[bool]>) -> Vec<(usize, usize)> {
    match changed {
        None => vec![(0, count)],
        Some(changed) => stretches(changed, |changed| !changed),
    }
}

/// Stretches of neighbours that are wanted: where each begins, and how many they are.
fn stretches<T: Copy>(all: &[T], wanted: impl Fn(T) -> bool) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for (at, _) in all.iter().enumerate().filter(|(_, one)| wanted(**one)) {
        match found.last_mut() {
            Some((begin, count)) if *begin + *count == at => *count += 1,
            _ => found.push((at, 1)),
        }
    }
    found
}

/// A piece of a file in this process's address space. Its bytes are never looked at: the file may shrink at any time.
struct Window {
    address: *mut libc::c_void,
    length: usize,
}

impl Window {
    fn map(file: &File, at: u64, length: u64) -> io::Result<Self> {
        let length = (length as usize).next_multiple_of(PAGE_SIZE);
        // SAFETY: a new mapping at an address that the kernel chooses; it replaces none.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                at as i64,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let window = Self { address, length };
        // So that no page is read ahead because of one that is looked at.
        // SAFETY: the range is the mapping.
        unsafe { libc::madvise(address, length, libc::MADV_RANDOM) };
        Ok(window)
    }

    fn page(&self, index: usize) -> u64 {
        (self.address as usize + index * PAGE_SIZE) as u64
    }

    /// Runs of pages that are in memory: the index of the first, and how many.
    fn resident(&self) -> Result<Vec<(usize, usize)>, EndedEarly> {
        let mut present = vec![0_u8; self.length / PAGE_SIZE];
        // SAFETY: the range is the mapping, and the vector has a byte for each of its pages.
        if unsafe { libc::mincore(self.address, self.length, present.as_mut_ptr()) } < 0 {
            let source = io::Error::last_os_error();
            return Err(EndedEarly::Kernel { what: "say which pages are in memory (mincore)", source });
        }
        Ok(stretches(&present, |present| present & 1 != 0))
    }

    /// Enters pages that are in memory into the page tables. One that has just left is read again; one behind the file's end is left out.
    fn enter(&self, first: usize, count: usize) -> Result<(), EndedEarly> {
        let address = (self.address as usize + first * PAGE_SIZE) as *mut libc::c_void;
        // SAFETY: a part of the mapping; nothing of it is dereferenced, and the kernel answers with an error where a look would be a signal.
        if unsafe { libc::madvise(address, count * PAGE_SIZE, POPULATE_READ) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            source if source.raw_os_error() == Some(libc::EINVAL) => {
                Err(EndedEarly::Kernel { what: "enter pages into a page table (MADV_POPULATE_READ)", source })
            }
            // The module finds out which were entered.
            _ => Ok(()),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's alone, and ends with it.
        unsafe { libc::munmap(self.address, self.length) };
    }
}

/// What the kernel says of pages.
struct PageFlags {
    pagemap: File,
    flags: File,
    /// Blocks of flags that were read, by number: a bit for each frame. One read for a frame costs as much as one for its whole block, and a cached file's pages lie
    /// all over memory. What changes after the read is a wrong hint like any other.
    known: RefCell<HashMap<u64, [u64; BLOCK as usize / 64]>>,
}

/// Frames whose flags are read at once.
const BLOCK: u64 = 256;

impl PageFlags {
    /// `None` where the kernel does not have it, or this process may not see it; then changed pages are found by their hash.
    fn open() -> Option<Self> {
        let open = |path| {
            File::open(path)
                .inspect_err(|error| tracing::debug!(%error, path, "changed pages are not told apart"))
                .ok()
        };
        let (pagemap, flags) = (open("/proc/self/pagemap")?, open("/proc/kpageflags")?);
        Some(Self { pagemap, flags, known: RefCell::default() })
    }

    /// For each of some pages of this process whether it is not on disk as it is, as far as the kernel says.
    fn changed(&self, address: u64, count: usize) -> Vec<bool> {
        let entries = words(&self.pagemap, address / PAGE_SIZE as u64, count);
        let is_changed =
            |entry: u64| entry & PRESENT != 0 && entry & PFN != 0 && self.frame_changed(entry & PFN);
        let mut changed: Vec<bool> = entries.into_iter().map(is_changed).collect();
        changed.resize(count, false);
        changed
    }

    fn frame_changed(&self, pfn: u64) -> bool {
        let (block, at) = (pfn / BLOCK, (pfn % BLOCK) as usize);
        let mut known = self.known.borrow_mut();
        let bits = known.entry(block).or_insert_with(|| {
            let mut bits = [0; BLOCK as usize / 64];
            for (at, flags) in words(&self.flags, block * BLOCK, BLOCK as usize).into_iter().enumerate() {
                bits[at / 64] |= u64::from(flags & CHANGED != 0) << (at % 64);
            }
            bits
        });
        bits[at / 64] >> (at % 64) & 1 != 0
    }
}

/// Words of a file of `/proc` that has one for each page; fewer where there are no more.
fn words(file: &File, first: u64, count: usize) -> Vec<u64> {
    let mut bytes = vec![0; count * 8];
    let read = first.checked_mul(8).and_then(|at| file.read_at(&mut bytes, at).ok()).unwrap_or(0);
    bytes.truncate(read);
    bytes.chunks_exact(8).filter_map(|word| u64_le(word, 0)).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn stretches_are_neighbours() {
        assert_eq!(stretches(&[1, 1, 0, 1, 0, 0, 1], |one| one == 1), [(0, 2), (3, 1), (6, 1)]);
        assert_eq!(stretches(&[0_u8; 3], |one| one == 1), []);
        assert_eq!(unchanged(4, None), [(0, 4)]);
        assert_eq!(unchanged(4, Some(&[false, true, false, false])), [(0, 1), (2, 2)]);
    }

    #[test]
    fn flags_are_read_by_blocks_and_found_by_frame() {
        let file_of = |words: &[u64]| {
            let mut file = tempfile::tempfile().unwrap();
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            file.write_all(&bytes).unwrap();
            file
        };
        let changed = [0, 63, 64, BLOCK - 1, BLOCK, 2 * BLOCK + 7];
        // The last block is not whole, and all the other bits are set.
        let flags: Vec<u64> =
            (0..2 * BLOCK + 8).map(|pfn| if changed.contains(&pfn) { !0 } else { !CHANGED }).collect();
        let pfns: Vec<u64> = (1..3 * BLOCK).rev().chain([BLOCK, 1 << 50]).collect();
        // One that is not there, and one whose frame may not be seen, are before them.
        let mut entries = vec![BLOCK, PRESENT];
        entries.extend(pfns.iter().map(|pfn| PRESENT | pfn));
        let page_flags =
            PageFlags { pagemap: file_of(&entries), flags: file_of(&flags), known: RefCell::default() };
        let found = page_flags.changed(0, entries.len() + 1);
        assert_eq!(found[..2], [false, false]);
        for (pfn, found) in pfns.iter().zip(&found[2..]) {
            assert_eq!(*found, changed.contains(pfn), "{pfn}");
        }
        // Pages of which the kernel says nothing count as they are.
        assert_eq!((found.len(), found[entries.len()]), (entries.len() + 1, false));
    }

    #[test]
    fn the_mount_of_an_open_file_is_read() {
        assert_eq!(mount_of("pos:\t0\nflags:\t0100002\nmnt_id:\t29\nino:\t7\n"), Some(29));
        assert_eq!(mount_of("pos:\t0\n"), None);
        assert_eq!(mount_of("mnt_id:\tmany\n"), None);
    }

    #[test]
    fn this_programs_own_file_is_among_its_files() {
        let own = std::fs::metadata(std::env::current_exe().unwrap()).unwrap();
        let mut found = files_of_process(std::process::id() as i32);
        let on_a_device = libc::major(own.dev()) > 0;
        assert_eq!(found.any(|candidate| candidate.id == Some((own.dev(), own.ino()))), on_a_device);
    }
}
