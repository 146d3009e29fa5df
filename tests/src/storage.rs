//! Files of made-up tablespaces on a real file system, and what must hold of a storage map there: for each page of a file, the bytes of
//! the whole disk at the place that the map names are the file's bytes, or the map says why it names none.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enlightenment::Vdev;
use guest_probe::disk::Disks;
use guest_probe::frame_table::PageId;
use guest_probe::left_out::LeftOut;
use guest_probe::page_cache;
use guest_probe::process::MysqldProcess;
use guest_probe::spaces::Spaces;
use guest_probe::storage_map::{DiskRule, StorageMap};

use crate::server::wait_for;

const PAGE: usize = 16_384;
/// For a machine that has other work.
const PATIENCE: Duration = Duration::from_secs(600);
/// Bytes in a guest page.
const GUEST_PAGE: u64 = 4096;

/// Pages that were named, and the others with the reason.
pub type Checked = (Vec<u32>, Vec<(u32, LeftOut)>);

/// Reads a whole disk past all caches, by its number in the map; offset and length are multiples of 4096.
pub type ReadDisk<'a> = &'a dyn Fn(Vdev, u64, usize) -> Result<Vec<u8>>;

/// A mounted file system, and a process that does nothing but stand in its directory, in mysqld's place: the map finds files by a
/// process's directory and open files.
pub struct Mounted<'a> {
    /// Where it is mounted.
    pub path: PathBuf,
    /// The process.
    pub pid: i32,
    /// Its disks.
    pub read: ReadDisk<'a>,
}

impl Mounted<'_> {
    /// A file on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The tablespaces that are found there.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn spaces(&self) -> Result<Spaces> {
        Ok(Spaces::scan(&MysqldProcess::find(Some(self.pid))?)?)
    }

    /// Compares each page of a file with the whole disk at the place that the map names; returns the pages that were named, and for
    /// the others the reason.
    ///
    /// # Errors
    /// When bytes differ.
    pub fn check(&self, map: &mut StorageMap<'_>, space: u32, path: &Path) -> Result<Checked> {
        let (mut named, mut left_out) = (Vec::new(), Vec::new());
        let file = File::open(path)?;
        let mut pieces = Vec::new();
        for page in 0..(file.metadata()?.len() / PAGE as u64) as u32 {
            if let Err(reason) = map.pieces(PageId { space, page }, &mut pieces) {
                left_out.push((page, reason));
                continue;
            }
            ensure!(!pieces.is_empty(), "page {page} has no pieces and no reason");
            for piece in &pieces {
                let length = usize::from(piece.pages) * GUEST_PAGE as usize;
                let mut in_file = vec![0; length];
                file.read_exact_at(&mut in_file, u64::from(page) * PAGE as u64 + piece.offset)?;
                // Direct reads begin at multiples of 4096; a piece on a disk may begin at any sector.
                let begin = piece.disk_offset / GUEST_PAGE * GUEST_PAGE;
                let skip = (piece.disk_offset - begin) as usize;
                let on_disk = (self.read)(piece.vdev, begin, length + GUEST_PAGE as usize)
                    .with_context(|| format!("page {page}, {piece:?}"))?;
                ensure!(
                    on_disk[skip..skip + length] == in_file,
                    "page {page}, {piece:?}: the disk has other bytes"
                );
            }
            named.push(page);
        }
        Ok((named, left_out))
    }
}

/// A page of a tablespace's file: page 0 as `Spaces` wants it, all others different from each other at every 4 KiB.
pub fn page(space: u32, number: u32, salt: u32) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    for (index, word) in bytes.chunks_exact_mut(4).enumerate() {
        let value = (space << 24) ^ number.wrapping_mul(0x9e37_79b9) ^ salt.rotate_left(13) ^ index as u32;
        word.copy_from_slice(&value.to_le_bytes());
    }
    if number == 0 {
        bytes[..PAGE / 2].fill(0);
        bytes[24..26].copy_from_slice(&8_u16.to_be_bytes());
        bytes[34..38].copy_from_slice(&space.to_be_bytes());
        bytes[38..42].copy_from_slice(&space.to_be_bytes());
    }
    bytes
}

/// Opens a file to be written, and makes it.
///
/// # Errors
/// When it cannot be made.
pub fn create(path: &Path) -> Result<File> {
    Ok(OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?)
}

/// Writes pages of a tablespace, down to the disk.
///
/// # Errors
/// When they cannot be written.
pub fn write_pages(path: &Path, space: u32, pages: impl Iterator<Item = u32>, salt: u32) -> Result<File> {
    let file = create(path)?;
    for number in pages {
        file.write_all_at(&page(space, number, salt), u64::from(number) * PAGE as u64)?;
    }
    file.sync_all()?;
    Ok(file)
}

/// What must hold on any file system.
///
/// # Errors
/// What does not.
pub fn every_page_is_found_or_has_a_reason(system: &Mounted<'_>) -> Result<()> {
    let one = system.path("whole.ibd");
    write_pages(&one, 1, 0..100, 0)?;
    // Two files that grow in turn, in pieces that are not multiples of a page, so that their pages lie in several places.
    let (two, three) = (system.path("split.ibd"), system.path("other.ibd"));
    let (split, other) = (create(&two)?, create(&three)?);
    let whole = |space| (0..40).flat_map(move |number| page(space, number, 0)).collect::<Vec<_>>();
    for (index, (left, right)) in whole(2).chunks(12_288).zip(whole(3).chunks(12_288)).enumerate() {
        split.write_all_at(left, index as u64 * 12_288)?;
        split.sync_all()?;
        other.write_all_at(right, index as u64 * 12_288)?;
        other.sync_all()?;
    }
    // Holes from page 2 to 5, room that was never written from page 6 to 9, and a page that is half a hole.
    let four = system.path("holes.ibd");
    let holes = write_pages(&four, 4, [0, 1, 6].into_iter(), 0)?;
    let (at, room) = (7 * PAGE as i64, 3 * PAGE as i64);
    // SAFETY: a plain system call on a descriptor that is open.
    ensure!(unsafe { libc::fallocate(holes.as_raw_fd(), 0, at, room) } == 0, "fallocate");
    holes.write_all_at(&page(4, 10, 0)[..8192], 10 * PAGE as u64)?;
    holes.set_len(11 * PAGE as u64)?;
    holes.sync_all()?;

    let spaces = system.spaces()?;
    let mut disks = Disks::default();
    let mut map = StorageMap::new(&spaces, &mut disks, DiskRule::Any);
    for (space, path, pages) in [(1, &one, 100), (2, &two, 40), (3, &three, 40)] {
        let (named, left_out) = system.check(&mut map, space, path)?;
        ensure!(named.len() == pages, "{}: {left_out:?}", path.display());
    }
    let (named, left_out) = system.check(&mut map, 4, &four)?;
    ensure!(named == [0, 1, 6], "{named:?}");
    let expected = [2, 3, 4, 5]
        .map(|page| (page, LeftOut::Hole))
        .into_iter()
        .chain([7, 8, 9].map(|page| (page, LeftOut::Unwritten)));
    let (last, before) = left_out.split_last().context("no page is left out")?;
    ensure!(before == expected.collect::<Vec<_>>(), "{left_out:?}");
    // Behind what is written XFS reserves room of its own accord.
    ensure!(last.0 == 10 && matches!(last.1, LeftOut::Hole | LeftOut::Unwritten), "{left_out:?}");
    ensure!(map.pieces(PageId { space: 1, page: 100 }, &mut Vec::new()) == Err(LeftOut::BeyondFile));
    ensure!(!map.found_moved_file());
    Ok(())
}

/// A file that grows, shrinks, is renamed, replaced and dropped, as mysqld does for tables.
///
/// # Errors
/// What is not followed.
pub fn a_map_made_anew_follows_the_files(system: &Mounted<'_>) -> Result<()> {
    let (old, new) = (system.path("life.ibd"), system.path("renamed.ibd"));
    let file = write_pages(&old, 9, 0..4, 0)?;
    let spaces = system.spaces()?;
    let mut disks = Disks::default();
    let named = |spaces: &Spaces, disks: &mut Disks, path: &Path| -> Result<usize> {
        let mut map = StorageMap::new(spaces, disks, DiskRule::Any);
        Ok(system.check(&mut map, 9, path)?.0.len())
    };
    ensure!(named(&spaces, &mut disks, &old)? == 4);
    // It grows: no new scan is needed.
    write_pages(&old, 9, 4..12, 0)?;
    ensure!(named(&spaces, &mut disks, &old)? == 12);
    // It is written anew in place, and shrinks.
    write_pages(&old, 9, 0..12, 7)?;
    ensure!(named(&spaces, &mut disks, &old)? == 12);
    file.set_len(2 * PAGE as u64)?;
    file.sync_all()?;
    ensure!(named(&spaces, &mut disks, &old)? == 2);
    {
        let mut map = StorageMap::new(&spaces, &mut disks, DiskRule::Any);
        ensure!(map.pieces(PageId { space: 9, page: 5 }, &mut Vec::new()) == Err(LeftOut::BeyondFile));
    }
    // Renamed: nothing is named until files are looked for again, and the map asks for that.
    fs::rename(&old, &new)?;
    let gone = |spaces: &Spaces, disks: &mut Disks, why: LeftOut| -> Result<()> {
        let mut map = StorageMap::new(spaces, disks, DiskRule::Any);
        let found = map.pieces(PageId { space: 9, page: 1 }, &mut Vec::new());
        ensure!(found == Err(why), "{found:?}");
        ensure!(map.found_moved_file());
        Ok(())
    };
    gone(&spaces, &mut disks, LeftOut::FileGone)?;
    let spaces = system.spaces()?;
    ensure!(named(&spaces, &mut disks, &new)? == 2);
    // Another file under the same name, as ALTER TABLE leaves it.
    write_pages(&system.path("alter.tmp"), 9, 0..3, 1)?;
    fs::rename(system.path("alter.tmp"), &new)?;
    gone(&spaces, &mut disks, LeftOut::FileGone)?;
    let spaces = system.spaces()?;
    ensure!(named(&spaces, &mut disks, &new)? == 3);
    // Dropped, and a tablespace of which no file was seen.
    fs::remove_file(&new)?;
    gone(&spaces, &mut disks, LeftOut::FileGone)?;
    gone(&system.spaces()?, &mut disks, LeftOut::NoFile)
}

/// Pages of a file in the kernel's page cache are listed, each with the place where the disk has its bytes; those that are not in memory are
/// not read for it, and those that are not on disk as they are, not listed. Returns the guest pages that were listed, and those that could be.
///
/// # Errors
/// What does not hold.
pub fn cached_pages_are_listed_where_they_lie(system: &Mounted<'_>) -> Result<(usize, usize)> {
    const PAGES: u32 = 128;
    const DROPPED: std::ops::Range<u32> = 32..64;
    const DIRTY: u32 = 100;
    let per_page = (PAGE as u64 / GUEST_PAGE) as u32;
    let path = system.path("cached.bin");
    // In memory, since it was just written; a hole behind it, in memory since it is read.
    let file = write_pages(&path, 11, 0..PAGES, 3)?;
    file.set_len(u64::from(PAGES + 4) * PAGE as u64)?;
    file.sync_all()?;
    let range = |pages: &std::ops::Range<u32>| {
        (i64::from(pages.start) * PAGE as i64, pages.len() as i64 * PAGE as i64)
    };
    let (at, length) = range(&DROPPED);
    // Not at once where another test lists at this moment, since it has the page mapped.
    wait_for("the kernel to drop what it was asked to", || {
        // SAFETY: a plain system call on a descriptor that is open.
        ensure!(unsafe { libc::posix_fadvise(file.as_raw_fd(), at, length, libc::POSIX_FADV_DONTNEED) } == 0);
        Ok(in_memory(&file, &DROPPED)? == 0)
    })?;
    // SAFETY: as above; without it the reads below would read ahead.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
    let mut bytes = vec![0; PAGE];
    file.read_exact_at(&mut bytes, u64::from(PAGES) * PAGE as u64)?;
    let cached = in_memory(&file, &(0..PAGES))?;
    // What is written now is not on disk for a while.
    file.write_all_at(&page(11, DIRTY, 77), u64::from(DIRTY) * PAGE as u64)?;

    let numbers: HashMap<Vec<u8>, u32> = (0..PAGES)
        .flat_map(|number| {
            let bytes = page(11, number, 3);
            let pieces: Vec<_> = bytes.chunks(GUEST_PAGE as usize).map(<[u8]>::to_vec).collect();
            pieces.into_iter().zip(number * per_page..)
        })
        .collect();
    let mut listed = BTreeSet::new();
    let process = MysqldProcess::find(Some(system.pid))?;
    let own_disk = map_of(system)?;
    let summary = page_cache::build([&process], DiskRule::Any, PATIENCE, |runs| {
        for run in runs.iter().filter(|run| run.vdev == own_disk.0) {
            for index in 0..u64::from(run.pages) {
                let address = (run.address + index * GUEST_PAGE) as *const u8;
                // SAFETY: the address is mapped until this returns, and none of the files there shrinks.
                let in_memory = unsafe { std::slice::from_raw_parts(address, GUEST_PAGE as usize) };
                let at = run.disk_offset + index * GUEST_PAGE;
                let begin = at / GUEST_PAGE * GUEST_PAGE;
                let on_disk = (system.read)(own_disk, begin, 2 * GUEST_PAGE as usize)?;
                let skip = (at - begin) as usize;
                ensure!(
                    on_disk[skip..skip + GUEST_PAGE as usize] == *in_memory,
                    "the disk has other bytes at {at:#x}"
                );
                if let Some(number) = numbers.get(in_memory) {
                    listed.insert(*number);
                }
            }
        }
        Ok(())
    })?;
    ensure!(
        !listed.iter().any(|number| DROPPED.contains(&(number / per_page))),
        "pages that are not in memory are listed"
    );
    ensure!(in_memory(&file, &DROPPED)? == 0, "pages were read into memory to be listed");
    ensure!(summary.pages >= listed.len() as u64 && summary.files > 0, "{summary:?}");
    ensure!(summary.pages_without_place > 0, "the hole has a place: {summary:?}");
    Ok((listed.len(), cached - per_page as usize))
}

/// Where the kernel refuses to map a file any more, half-way through it, what was listed until then is handed over and counted, and the
/// summary says why there is no more.
///
/// # Errors
/// What does not hold.
pub fn a_listing_that_the_kernel_ends_says_how_far_it_came(system: &Mounted<'_>) -> Result<()> {
    // One guest page in each window of page_cache.rs. It hands over 256 windows at once: these wait when the kernel refuses the next.
    const WINDOW: u64 = 64 << 20;
    const REFUSED_FROM: u64 = 64;
    let file = File::create(system.path("windows.bin"))?;
    for window in 0..REFUSED_FROM + 10 {
        file.write_all_at(&[window as u8 | 1; GUEST_PAGE as usize], window * WINDOW)?;
    }
    file.sync_all()?;
    let process = MysqldProcess::find(Some(system.pid))?;
    let own_disk = map_of(system)?;
    let (mut pages, mut pages_of_file) = (0, 0);
    // The filter stays until its thread ends.
    let summary = std::thread::scope(|scope| {
        let listing = scope.spawn(|| -> Result<_> {
            refuse_to_map(REFUSED_FROM * WINDOW)?;
            page_cache::build([&process], DiskRule::Any, PATIENCE, |runs| {
                for run in runs.iter() {
                    pages += u64::from(run.pages);
                    // SAFETY: the page is mapped until this returns, and the file does not shrink.
                    let first = unsafe { std::ptr::read_volatile(run.address as *const u8) };
                    pages_of_file += u64::from(run.vdev == own_disk.0 && run.pages == 1 && first & 1 == 1);
                }
                Ok(())
            })
        });
        listing.join().map_err(|_| anyhow::anyhow!("the listing panicked"))?
    })?;
    ensure!(pages_of_file >= REFUSED_FROM, "{pages_of_file} pages of the file: {summary:?}");
    ensure!(summary.pages == pages && summary.files > 0, "{pages} pages were handed over: {summary:?}");
    let why = summary.ended_early.context("nothing is said")?;
    ensure!(why.starts_with("the kernel does not map a file: "), "{why}");
    // Whose time is up at once has nothing, and says so.
    let none =
        page_cache::build([&process], DiskRule::Any, Duration::ZERO, |_| anyhow::bail!("pages after all"))?;
    ensure!(none.pages == 0 && none.ended_early.as_deref() == Some("time was up after 0 s"), "{none:?}");
    fs::remove_file(system.path("windows.bin"))?;
    Ok(())
}

/// From now on the kernel refuses this thread, and those that it starts, to map a file from this offset on, a multiple of 4 GiB.
fn refuse_to_map(offset: u64) -> Result<()> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let unless = |test: u32, k, jf| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_K | test) as u16,
        jt: 0,
        jf,
        k,
    };
    // In a `struct seccomp_data` the call's number is the first word; the upper half of its sixth argument lies at byte 60.
    let mut program = [
        statement(LOAD, 0),
        unless(libc::BPF_JEQ, libc::SYS_mmap as u32, 3),
        statement(LOAD, 60),
        unless(libc::BPF_JGE, (offset >> 32) as u32, 1),
        statement(RETURN, libc::SECCOMP_RET_ERRNO | libc::ENODEV as u32),
        statement(RETURN, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: plain system calls; the filter and its program live through them.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) < 0
    };
    ensure!(!refused, "seccomp: {}", std::io::Error::last_os_error());
    Ok(())
}

/// The disk of a file system, as a map names it.
fn map_of(system: &Mounted<'_>) -> Result<Vdev> {
    let spaces = system.spaces()?;
    let mut disks = Disks::default();
    let mut map = StorageMap::new(&spaces, &mut disks, DiskRule::Any);
    let mut pieces = Vec::new();
    let space = spaces.iter().next().context("no tablespace is found")?.header.space;
    map.pieces(PageId { space, page: 0 }, &mut pieces)
        .map_err(|reason| anyhow::anyhow!("page 0: {}", reason.words()))?;
    Ok(pieces.first().context("page 0 has no place")?.vdev)
}

/// Guest pages of a file in memory, of a range of pages.
fn in_memory(file: &File, pages: &std::ops::Range<u32>) -> Result<usize> {
    let (at, length) = (i64::from(pages.start) * PAGE as i64, pages.len() * PAGE);
    let mut present = vec![0_u8; length / GUEST_PAGE as usize];
    // SAFETY: a new mapping, which is asked about and taken away again; the vector has a byte for each of its pages.
    let asked = unsafe {
        let address =
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), at);
        ensure!(address != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        let asked = libc::mincore(address, length, present.as_mut_ptr());
        libc::munmap(address, length);
        asked
    };
    ensure!(asked == 0, "mincore: {}", std::io::Error::last_os_error());
    Ok(present.iter().filter(|present| **present & 1 != 0).count())
}
