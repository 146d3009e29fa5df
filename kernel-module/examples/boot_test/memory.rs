//! Memory of this process to be translated, and what the kernel itself says of it.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// A mapping of this process.
pub struct Memory {
    start: NonNull<std::ffi::c_void>,
    pages: usize,
}

impl Memory {
    /// Private memory that is not touched yet.
    pub fn untouched(pages: usize) -> Result<Self> {
        Self::anonymous(pages, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
    }

    /// Private memory, every page written.
    pub fn touched(pages: usize) -> Result<Self> {
        let memory = Self::untouched(pages)?;
        memory.touch();
        Ok(memory)
    }

    /// Memory of a `memfd`, every page written.
    pub fn of_file(pages: usize) -> Result<Self> {
        let length = NonZeroUsize::new(pages * PAGE).context("no pages")?;
        let fd = nix::sys::memfd::memfd_create(c"boot-test", nix::sys::memfd::MFdFlags::empty())?;
        nix::unistd::ftruncate(&fd, (pages * PAGE) as i64)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &fd, 0)? };
        let memory = Self { start, pages };
        memory.touch();
        Ok(memory)
    }

    /// A file's pages, of its page cache: this program itself.
    pub fn of_program() -> Result<Self> {
        let file = File::open("/proc/self/exe").context("cannot open this program")?;
        let bytes = file.metadata()?.len() as usize;
        let memory = Self::of_device(&file, bytes / PAGE)?;
        memory.read_all();
        Ok(memory)
    }

    /// What a file has at its beginning, to be read only; not looked at.
    pub fn of_device(file: &File, pages: usize) -> Result<Self> {
        let length = NonZeroUsize::new(pages * PAGE).context("no pages")?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Self { start, pages })
    }

    /// Private memory in small pages, every page written, whatever the kernel would do by itself.
    pub fn small(pages: usize) -> Result<Self> {
        let memory = Self::untouched(pages)?;
        // SAFETY: advice about a mapping of our own changes nothing that is in it.
        unsafe { madvise(memory.start, memory.pages * PAGE, MmapAdvise::MADV_NOHUGEPAGE)? };
        memory.touch();
        Ok(memory)
    }

    /// Private memory in huge pages, if the kernel follows the advice; twice 2 MiB, so that one whole one lies in it.
    pub fn huge() -> Result<Self> {
        let memory = Self::untouched(1024)?;
        // SAFETY: advice about a mapping of our own changes nothing that is in it.
        unsafe { madvise(memory.start, memory.pages * PAGE, MmapAdvise::MADV_HUGEPAGE)? };
        memory.touch();
        Ok(memory)
    }

    fn anonymous(pages: usize, protection: ProtFlags, flags: MapFlags) -> Result<Self> {
        let length = NonZeroUsize::new(pages * PAGE).context("no pages")?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(None, length, protection, flags)? };
        Ok(Self { start, pages })
    }

    /// The address of a page.
    pub fn address(&self, page: usize) -> u64 {
        (self.start.addr().get() + page * PAGE) as u64
    }

    /// Pages in it.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Writes to every page.
    pub fn touch(&self) {
        for page in 0..self.pages {
            // SAFETY: within the mapping, which is writable.
            unsafe { self.start.cast::<u8>().add(page * PAGE).write_volatile(page as u8 | 1) };
        }
    }

    /// Reads a byte of every page.
    pub fn read_all(&self) -> u64 {
        // SAFETY: within the mapping, which is readable.
        let byte = |page| unsafe { self.start.cast::<u8>().add(page * PAGE).read_volatile() };
        (0..self.pages).map(|page| u64::from(byte(page))).sum()
    }

    /// Writes a value at a byte of the mapping.
    pub fn put<T: Copy>(&self, at: usize, value: &T) {
        assert!(at + size_of::<T>() <= self.pages * PAGE);
        // SAFETY: within the mapping, which is writable; nobody keeps a reference to what is in it.
        unsafe { self.start.byte_add(at).cast::<T>().write_unaligned(*value) };
    }

    /// Gives the pages from `first` on back; they stay part of the mapping.
    pub fn discard(&self, first: usize, count: usize) -> Result<()> {
        // SAFETY: within the mapping; nobody keeps a reference to what is in it.
        let start = unsafe { self.start.byte_add(first * PAGE) };
        // SAFETY: as above.
        unsafe { madvise(start, count * PAGE, MmapAdvise::MADV_DONTNEED)? };
        Ok(())
    }

    /// Forbids all access to one page.
    pub fn forbid(&self, page: usize) -> Result<()> {
        // SAFETY: within the mapping; nobody keeps a reference to what is in it.
        let start = unsafe { self.start.byte_add(page * PAGE) };
        // SAFETY: as above.
        unsafe { nix::sys::mman::mprotect(start, PAGE, ProtFlags::PROT_NONE)? };
        Ok(())
    }

    /// The PFNs of all pages as the kernel's pagemap has them; `None` for one that is not there.
    pub fn pfns(&self) -> Result<Vec<Option<u64>>> {
        pfns_of("self", self.address(0), self.pages)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our mapping, once.
        let _ = unsafe { munmap(self.start, self.pages * PAGE) };
    }
}

/// The PFNs of pages of a process (Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bits 0 to 54 PFN).
pub fn pfns_of(process: &str, address: u64, pages: usize) -> Result<Vec<Option<u64>>> {
    let pagemap = File::open(format!("/proc/{process}/pagemap")).context("cannot open pagemap")?;
    let mut bytes = vec![0; pages * 8];
    pagemap.read_exact_at(&mut bytes, address / PAGE as u64 * 8).context("cannot read pagemap")?;
    Ok(bytes
        .chunks_exact(8)
        .map(|entry| u64::from_le_bytes(entry.try_into().unwrap_or_default()))
        .map(|entry| (entry >> 63 == 1).then_some(entry & ((1 << 55) - 1)))
        .collect())
}
