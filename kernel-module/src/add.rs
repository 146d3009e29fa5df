//! `ADD`: addresses of a process become PFNs in the open generation.

use enlightenment::device::UserRun;
use enlightenment::{PAGE_SIZE, Run};

use crate::wire::user_run;
use crate::{Errno, Lists, NOT_RAM, Shim};

/// Runs that are copied from the caller at once.
const CHUNK: usize = 128;
/// Pages that are translated at once.
const BATCH: usize = 512;
/// Bytes of address space, more than which no x86-64 process has.
const ADDRESS_END: u64 = 1 << 56;

/// Room to work in, kept off the kernel's small stacks.
#[derive(Debug)]
pub struct Workspace {
    runs: [u8; CHUNK * size_of::<UserRun>()],
    pfns: [u64; BATCH],
}

/// What came of an [`add`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Added {
    /// Pages listed.
    pub listed: u64,
    /// Pages left out: not mapped, or not ordinary memory.
    pub unmapped: u64,
}

impl Workspace {
    /// Empty.
    pub const fn new() -> Self {
        Self { runs: [0; CHUNK * size_of::<UserRun>()], pfns: [0; BATCH] }
    }

    /// Translates `count` runs from the array at `array` in the caller's memory and appends them to the open generation.
    ///
    /// # Errors
    /// `EFAULT`, `EINVAL`, `EINTR`, `ENOMEM`; some runs may have been appended then, and the caller takes them back.
    pub fn add<S: Shim>(
        &mut self,
        shim: &mut S,
        lists: &mut Lists,
        process: &S::Process,
        array: u64,
        count: u32,
    ) -> Result<Added, Errno> {
        let mut added = Added::default();
        let mut done = 0;
        while done < count {
            let here = (count - done).min(CHUNK as u32);
            let size = here as usize * size_of::<UserRun>();
            let from =
                array.checked_add(u64::from(done) * size_of::<UserRun>() as u64).ok_or(Errno::EFAULT)?;
            let to = self.runs.get_mut(..size).ok_or(Errno::EFAULT)?;
            shim.copy_from_user(to, from)?;
            self.add_chunk(shim, lists, process, here as usize, &mut added)?;
            done += here;
        }
        Ok(added)
    }

    /// Neighbouring addresses are translated together, however many runs they are: the frames of a pool adjoin.
    fn add_chunk<S: Shim>(
        &mut self,
        shim: &mut S,
        lists: &mut Lists,
        process: &S::Process,
        count: usize,
        added: &mut Added,
    ) -> Result<(), Errno> {
        for i in 0..count {
            check(&user_run(&self.runs, i))?;
        }
        let mut known = Known { address: 0, next: 0, end: 0 };
        for i in 0..count {
            let run = user_run(&self.runs, i);
            // Pages that adjoin are appended together: a page by itself would cost as much as a run.
            let mut pending: Option<Run> = None;
            for page in 0..u64::from(run.pages) {
                let address = run.address + page * PAGE_SIZE as u64;
                if !known.has(address) {
                    let wanted = self.neighbours(i, count, page);
                    known = Known { address, next: 0, end: wanted };
                    let pfns = self.pfns.get_mut(..wanted).unwrap_or_default();
                    let mapped = shim.translate(process, address, pfns)?;
                    // The first that is not mapped is known too; what comes after it is asked for again.
                    if let Some(first) = pfns.get_mut(mapped) {
                        *first = NOT_RAM;
                        known.end = mapped + 1;
                    }
                }
                let pfn = self.pfns.get(known.next).copied().unwrap_or(NOT_RAM);
                known.next += 1;
                let listed = Run {
                    pfn,
                    disk_offset: run.disk_offset + page * PAGE_SIZE as u64,
                    vdev: run.vdev,
                    pages: 1,
                    list: run.list,
                    reserved: 0,
                };
                if pfn > Run::MAX_PFN {
                    added.unmapped += 1;
                } else {
                    added.listed += 1;
                    if !pending.as_mut().is_some_and(|last| last.try_extend(&listed))
                        && let Some(whole) = pending.replace(listed)
                    {
                        lists.append(shim, whole)?;
                    }
                }
            }
            if let Some(whole) = pending {
                lists.append(shim, whole)?;
            }
        }
        Ok(())
    }

    /// Pages from page `page` of run `i` on that have neighbouring addresses, up to a batch.
    fn neighbours(&self, i: usize, count: usize, page: u64) -> usize {
        let run = user_run(&self.runs, i);
        let mut pages = u64::from(run.pages) - page;
        let mut end = run.address + u64::from(run.pages) * PAGE_SIZE as u64;
        for next in i + 1..count {
            let run = user_run(&self.runs, next);
            if pages >= BATCH as u64 || run.address != end {
                break;
            }
            pages += u64::from(run.pages);
            end += u64::from(run.pages) * PAGE_SIZE as u64;
        }
        pages.min(BATCH as u64) as usize
    }
}

/// Translations that are at hand: those of the pages from `address` on lie at `next..end` of the batch.
struct Known {
    address: u64,
    next: usize,
    end: usize,
}

impl Known {
    fn has(&self, address: u64) -> bool {
        self.next < self.end && self.address + (self.next * PAGE_SIZE) as u64 == address
    }
}

/// Whether the fields lie in their bounds.
fn check(run: &UserRun) -> Result<(), Errno> {
    let as_listed = Run {
        pfn: 0,
        disk_offset: run.disk_offset,
        vdev: run.vdev,
        pages: run.pages,
        list: run.list,
        reserved: run.reserved,
    };
    let end = run.address.checked_add(u64::from(run.pages) * PAGE_SIZE as u64);
    let address_fits =
        run.address.is_multiple_of(PAGE_SIZE as u64) && end.is_some_and(|end| end <= ADDRESS_END);
    if address_fits && as_listed.check().is_ok() { Ok(()) } else { Err(Errno::EINVAL) }
}
