//! A whole layout against all control blocks of a running server, and pages that it calls clean against the files on disk.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;

use serde::Serialize;

use crate::bytes::{u16_be, u32_be, u64_be};
use crate::catalogue::Build;
use crate::control_blocks::{
    Chunk, ControlBlock, ControlBlocks, PoolVariables, SpaceInMemory, SpacesInMemory,
};
use crate::elf::{Elf, ReadAt};
use crate::frame_table::PAGE_BYTES;
use crate::memory::Memory;
use crate::spaces::Spaces;
use crate::storage_map::unfit;

use super::DeriveError;

/// Blocks that are read in one piece.
const BLOCKS_AT_ONCE: u64 = 1024;
/// Bytes of a page's header.
const HEADER_BYTES: usize = 38;
/// How often a block that contradicts is read again: what is true stays so.
const TRIES: u32 = 4;
/// Pages that must bear the layout out.
const ENOUGH_PAGES: u64 = 200;
/// Clean pages that are compared with their files at most, and at least.
const MOST_COMPARED: u64 = 512;
const ENOUGH_COMPARED: u64 = 50;
/// States and kinds of I/O that InnoDB has.
const STATES: u8 = 8;
const IO_FIXES: u8 = 4;
/// FIL_PAGE_TYPE, and the types of pages that lie on disk in another form than in memory (compressed, encrypted).
const AT_TYPE: usize = 24;
const CHANGED_ON_DISK: std::ops::RangeInclusive<u16> = 14..=17;

/// How many blocks bear a layout out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Agreement {
    /// Control blocks of the pool.
    pub blocks: u64,
    /// Blocks with a page whose every field fits the page itself and its tablespace.
    pub agree: u64,
    /// Blocks that were in use, in I/O or changing, and pages that are all zeros: they prove nothing.
    pub busy: u64,
    /// Blocks without a page, whose state says so.
    pub free: u64,
    /// Blocks that contradict the layout while nothing changes them.
    pub contradict: u64,
    /// One of them, in words.
    pub example: Option<String>,
    /// Clean pages that were compared with their files.
    pub compared: u64,
}

impl Agreement {
    /// Why the layout is not to be trusted, one sentence each.
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        if self.contradict > 0 {
            let example = self.example.as_deref().unwrap_or_default();
            doubts.push(format!(
                "{} of {} control blocks contradict it: {example}",
                self.contradict, self.blocks
            ));
        }
        if self.agree < ENOUGH_PAGES {
            doubts.push(format!(
                "{} pages bear it out; {ENOUGH_PAGES} are needed (run some queries)",
                self.agree
            ));
        }
        if self.compared < ENOUGH_COMPARED {
            doubts.push(format!(
                "{} clean pages could be compared with their files; {ENOUGH_COMPARED} are needed",
                self.compared
            ));
        }
        doubts
    }
}

/// What one block says of the layout.
enum Verdict {
    Agrees,
    Free,
    Busy,
    Contradicts(String),
}

/// Holds a layout against everything.
pub(super) fn of<F: ReadAt + ?Sized, M: Memory>(
    elf: &Elf<'_, F>,
    memory: &M,
    bias: u64,
    most_frames: u64,
    build: &Build,
    spaces: &Spaces,
) -> Result<Agreement, DeriveError> {
    let names = &build.variables;
    let mut addresses = Vec::new();
    for name in [&names.pools, &names.pool_count, &names.page_size] {
        let places = elf.symbols(&[name.as_str()])?;
        addresses.extend(places.first().map(|place| bias.wrapping_add(place.address)));
    }
    let &[pools, pool_count, page_size] = &addresses[..] else { return Ok(Agreement::default()) };
    let variables = PoolVariables { pools, pool_count, page_size };
    let blocks = ControlBlocks::new(memory, build, variables, most_frames);
    let mut judge = Judge {
        memory,
        build,
        spaces_in_memory: SpacesInMemory::new(memory, build),
        spaces,
        files: HashMap::new(),
        agreement: Agreement::default(),
        compare_every: 1,
    };
    let chunks = match blocks.chunks() {
        Ok(chunks) => chunks,
        Err(error) => {
            judge.agreement.contradict = 1;
            judge.agreement.example = Some(error.to_string());
            return Ok(judge.agreement);
        }
    };
    let all: u64 = chunks.iter().map(|chunk| chunk.count).sum();
    judge.compare_every = (all / MOST_COMPARED).max(1);
    for chunk in chunks {
        judge.chunk(chunk)?;
    }
    for file in judge.files.values().flatten() {
        // What was read of mysqld's files need not stay in the page cache.
        // SAFETY: a plain system call on a descriptor that is open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
    Ok(judge.agreement)
}

struct Judge<'a, M: Memory> {
    memory: &'a M,
    build: &'a Build,
    spaces_in_memory: SpacesInMemory<'a, M>,
    spaces: &'a Spaces,
    files: HashMap<u32, Option<File>>,
    agreement: Agreement,
    compare_every: u64,
}

impl<M: Memory> Judge<'_, M> {
    fn chunk(&mut self, chunk: Chunk) -> Result<(), DeriveError> {
        let size = self.build.block.size;
        let mut first_frame = None;
        let mut index = 0;
        while index < chunk.count {
            let now = (chunk.count - index).min(BLOCKS_AT_ONCE);
            let mut piece = vec![0; size * now as usize];
            self.memory.read(chunk.blocks.wrapping_add(index * size as u64), &mut piece)?;
            for bytes in piece.chunks_exact(size) {
                self.agreement.blocks += 1;
                let address = chunk.blocks.wrapping_add(index * size as u64);
                let frame = ControlBlock::parse(bytes, self.build).map_or(0, |block| block.frame.0);
                let first = *first_frame.get_or_insert(frame);
                let expected = first.wrapping_add(index * PAGE_BYTES);
                let verdict = if frame == expected && frame.is_multiple_of(PAGE_BYTES) && frame != 0 {
                    self.block(address, bytes)
                } else {
                    Verdict::Contradicts(format!("its frame is at {frame:#x}, not at {expected:#x}"))
                };
                match verdict {
                    Verdict::Agrees => self.agreement.agree += 1,
                    Verdict::Free => self.agreement.free += 1,
                    Verdict::Busy => self.agreement.busy += 1,
                    Verdict::Contradicts(why) => {
                        self.agreement.contradict += 1;
                        self.agreement.example.get_or_insert(format!("the block at {address:#x}: {why}"));
                    }
                }
                index += 1;
            }
        }
        Ok(())
    }

    /// Judges a block; one that contradicts is read again, since it may have changed between block and page.
    fn block(&mut self, address: u64, bytes: &[u8]) -> Verdict {
        let mut now = bytes.to_vec();
        let mut verdict = Verdict::Busy;
        for _ in 0..TRIES {
            verdict = self.once(&now);
            if !matches!(verdict, Verdict::Contradicts(_)) {
                return verdict;
            }
            let mut again = vec![0; now.len()];
            if self.memory.read(address, &mut again).is_err() {
                return Verdict::Busy;
            }
            if again == now {
                return verdict;
            }
            now = again;
        }
        // It changes at each look: it proves nothing either way.
        if matches!(verdict, Verdict::Contradicts(_)) { Verdict::Busy } else { verdict }
    }

    fn once(&mut self, bytes: &[u8]) -> Verdict {
        let (layout, values) = (&self.build.block, &self.build.values);
        let wrong = |why: String| Verdict::Contradicts(why);
        let Some(block) = ControlBlock::parse(bytes, self.build) else {
            return wrong("it is shorter than the layout".to_owned());
        };
        let (state, io_fix) = (bytes[layout.state], bytes[layout.io_fix]);
        if state >= STATES || io_fix >= IO_FIXES {
            return wrong(format!("state {state} and io_fix {io_fix} are none"));
        }
        if state != values.state_file_page {
            return Verdict::Free;
        }
        if block.io_pending || block.fix_count != 0 {
            return Verdict::Busy;
        }
        let mut header = [0; HEADER_BYTES];
        if self.memory.read(block.frame.0, &mut header).is_err() {
            return wrong(format!("its frame at {:#x} cannot be read", block.frame.0));
        }
        if header == [0; HEADER_BYTES] {
            return Verdict::Busy;
        }
        let (Some(page), Some(space), Some(lsn)) =
            (u32_be(&header, 4), u32_be(&header, 34), u64_be(&header, 16))
        else {
            return Verdict::Busy;
        };
        if (space, page) != (block.page.space, block.page.page) {
            return wrong(format!(
                "it has page {:?}, its frame has tablespace {space}, page {page}",
                block.page
            ));
        }
        if block.newest != 0 && (block.newest < lsn || block.newest >= 1 << 62) {
            return wrong(format!(
                "its newest change is {:#x}, older than its page's {lsn:#x}",
                block.newest
            ));
        }
        if block.oldest > block.newest || (block.oldest != 0 && block.newest - block.oldest >= 1 << 40) {
            return wrong(format!(
                "its oldest change {:#x} is newer than its newest {:#x}",
                block.oldest, block.newest
            ));
        }
        let Some(space) = self.spaces_in_memory.get(block.space) else {
            return wrong(format!("its tablespace at {:#x} cannot be read", block.space));
        };
        if space.id != block.page.space {
            return wrong(format!("its tablespace is {}, its page's is {}", space.id, block.page.space));
        }
        let index = self.agreement.blocks;
        if block.oldest == 0 && index.is_multiple_of(self.compare_every) {
            self.compare(&block, space)
        } else {
            Verdict::Agrees
        }
    }

    /// Compares a page that should be clean with its file. Only [`Judge::block`]'s second look at the block makes a difference count.
    fn compare(&mut self, block: &ControlBlock, space: SpaceInMemory) -> Verdict {
        let id = block.page.space;
        let stale = space.deleted || space.version != block.version;
        let Some(known) = self.spaces.get(id).filter(|known| {
            unfit(known.header.flags).is_none()
                && !stale
                && !block.compressed
                && space.flags == known.header.flags.0
        }) else {
            return Verdict::Agrees;
        };
        let file = self.files.entry(id).or_insert_with(|| known.open().ok());
        let Some(file) = file else { return Verdict::Agrees };
        let (mut on_disk, mut in_memory) = (vec![0; PAGE_BYTES as usize], vec![0; PAGE_BYTES as usize]);
        let read = ReadAt::read_exact_at(file, &mut on_disk, u64::from(block.page.page) * PAGE_BYTES).is_ok()
            && self.memory.read(block.frame.0, &mut in_memory).is_ok();
        if !read || u16_be(&on_disk, AT_TYPE).is_none_or(|kind| CHANGED_ON_DISK.contains(&kind)) {
            return Verdict::Agrees;
        }
        self.agreement.compared += 1;
        if on_disk == in_memory {
            return Verdict::Agrees;
        }
        Verdict::Contradicts(format!("it calls page {:?} clean, but the file has other bytes", block.page))
    }
}
