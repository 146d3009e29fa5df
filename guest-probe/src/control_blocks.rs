//! InnoDB's control blocks, one for each frame: the truth about a page at the moment of use.
//!
//! They are read while the server runs and changes them. A block is 368 bytes, and what is torn in it makes one frame look
//! unfit or wrong: a wrong hint at worst.

use std::collections::HashMap;

use thiserror::Error;

use crate::bytes::{u32_le, u64_le};
use crate::catalogue::Build;
use crate::frame_table::{FrameAddr, FrameState, FrameTable, Overlap, PAGE_BYTES, PageId};
use crate::memory::{Memory, MemoryError};

/// InnoDB has at most 64 pool instances.
const MOST_POOLS: u64 = 64;
/// Blocks that are read in one piece.
const BLOCKS_AT_ONCE: u64 = 2048;
/// Bit of `page_size_t` that says that the page is compressed: 17 bits physical size, 15 unused, 17 bits logical size, this.
const COMPRESSED_BIT: u64 = 1 << 49;
/// How often a snapshot that was torn is tried again.
const SNAPSHOT_TRIES: u32 = 5;

/// Why the control blocks cannot be read.
#[derive(Debug, Error)]
pub enum BlocksError {
    /// A read failed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Not the page size that this program is for.
    #[error("mysqld has pages of {bytes} bytes; guest-probe is for 16384 (innodb_page_size)")]
    PageSize {
        /// What it has.
        bytes: u64,
    },
    /// The pool's descriptors cannot be right.
    #[error(
        "mysqld's memory says that it has {pools} pools and {chunks} chunks with {blocks} blocks: it is starting, resizing or ending"
    )]
    Implausible {
        /// Pool instances.
        pools: u64,
        /// Chunks of the one that was looked at.
        chunks: u64,
        /// Blocks that were counted up to there.
        blocks: u64,
    },
    /// The pool is being resized.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// A block's frame is not where the chunk has it.
    #[error(
        "control block {index} of the chunk at {blocks:#x} has its frame at {frame:#x}, not at {expected:#x}: the pool is being resized"
    )]
    Frame {
        /// Address of the chunk's first block.
        blocks: u64,
        /// The block's number in it.
        index: u64,
        /// Where its frame is.
        frame: u64,
        /// Where it would be.
        expected: u64,
    },
}

/// Where the variables lie that lead to the pools, in mysqld's memory.
#[derive(Clone, Copy, Debug)]
pub struct PoolVariables {
    /// Pointer to the array of pool instances.
    pub pools: u64,
    /// How many there are.
    pub pool_count: u64,
    /// Bytes in a page.
    pub page_size: u64,
}

/// A chunk of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Address of its first control block.
    pub blocks: u64,
    /// Control blocks in it, and frames.
    pub count: u64,
}

/// What one control block says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlBlock {
    /// The page.
    pub page: PageId,
    /// Whether it holds a page of a file.
    pub is_file_page: bool,
    /// Whether the page is compressed on disk.
    pub compressed: bool,
    /// Threads that use the page.
    pub fix_count: u32,
    /// Whether a read or a write is under way.
    pub io_pending: bool,
    /// Whether it is a read.
    pub reading: bool,
    /// LSN of the newest change since the page was loaded, 0 for none.
    pub newest: u64,
    /// LSN of the oldest change that is not on disk, 0 for none.
    pub oldest: u64,
    /// Address of its tablespace.
    pub space: u64,
    /// That one's version when the page was loaded.
    pub version: u32,
    /// Its frame.
    pub frame: FrameAddr,
}

impl ControlBlock {
    /// Parses one block; `None` when the bytes are too few.
    pub fn parse(bytes: &[u8], build: &Build) -> Option<Self> {
        let layout = &build.block;
        let io_fix = *bytes.get(layout.io_fix)?;
        Some(Self {
            page: PageId { space: u32_le(bytes, layout.page_id)?, page: u32_le(bytes, layout.page_id + 4)? },
            is_file_page: *bytes.get(layout.state)? == build.values.state_file_page,
            compressed: u64_le(bytes, layout.page_size)? & COMPRESSED_BIT != 0,
            fix_count: u32_le(bytes, layout.fix_count)?,
            io_pending: io_fix != build.values.io_fix_none,
            reading: io_fix == build.values.io_fix_read,
            newest: u64_le(bytes, layout.newest)?,
            oldest: u64_le(bytes, layout.oldest)?,
            space: u64_le(bytes, layout.space)?,
            version: u32_le(bytes, layout.version)?,
            frame: FrameAddr(u64_le(bytes, layout.frame)?),
        })
    }

    /// What the frame table would say of it.
    pub fn state(&self) -> FrameState {
        // A page whose read has not ended is told by an event when it has.
        if !self.is_file_page || self.reading {
            FrameState::Free
        } else if self.oldest != 0 {
            FrameState::Dirty(self.page)
        } else if self.newest != 0 {
            FrameState::Written(self.page)
        } else {
            FrameState::Read(self.page)
        }
    }
}

/// What a tablespace in memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceInMemory {
    /// Its id.
    pub id: u32,
    /// Its version.
    pub version: u32,
    /// Whether it was dropped.
    pub deleted: bool,
    /// Its flags.
    pub flags: u32,
}

/// The control blocks of one server.
pub struct ControlBlocks<'m, M: Memory> {
    memory: &'m M,
    build: &'m Build,
    variables: PoolVariables,
    /// No more frames than this can be.
    most_frames: u64,
}

impl<'m, M: Memory> ControlBlocks<'m, M> {
    /// Control blocks of the server with this memory.
    pub fn new(memory: &'m M, build: &'m Build, variables: PoolVariables, most_frames: u64) -> Self {
        Self { memory, build, variables, most_frames }
    }

    /// The chunks of all pool instances.
    ///
    /// # Errors
    /// [`BlocksError`] when the memory cannot be read or cannot be right.
    pub fn chunks(&self) -> Result<Vec<Chunk>, BlocksError> {
        let page_size = self.memory.read_u64(self.variables.page_size)?;
        if page_size != PAGE_BYTES {
            return Err(BlocksError::PageSize { bytes: page_size });
        }
        let pools = self.memory.read_u64(self.variables.pool_count)?;
        let first_pool = self.memory.read_u64(self.variables.pools)?;
        let implausible = |chunks, blocks| BlocksError::Implausible { pools, chunks, blocks };
        if pools == 0 || pools > MOST_POOLS || first_pool == 0 {
            return Err(implausible(0, 0));
        }
        let mut found = Vec::new();
        let mut blocks_in_all = 0_u64;
        for pool in 0..pools {
            let pool = first_pool.wrapping_add(pool * self.build.pool.size as u64);
            let count = self.memory.read_u64(pool.wrapping_add(self.build.pool.chunk_count as u64))?;
            let chunks = self.memory.read_u64(pool.wrapping_add(self.build.pool.chunks as u64))?;
            // A chunk has one block at least.
            if count == 0 || count > self.most_frames {
                return Err(implausible(count, blocks_in_all));
            }
            for index in 0..count {
                let chunk = chunks.wrapping_add(index.wrapping_mul(self.build.chunk.size as u64));
                let count_at = chunk.wrapping_add(self.build.chunk.block_count as u64);
                let blocks_at = chunk.wrapping_add(self.build.chunk.blocks as u64);
                let chunk = Chunk {
                    blocks: self.memory.read_u64(blocks_at)?,
                    count: self.memory.read_u64(count_at)?,
                };
                blocks_in_all = blocks_in_all.saturating_add(chunk.count);
                if chunk.count == 0 || blocks_in_all > self.most_frames {
                    return Err(implausible(count, blocks_in_all));
                }
                found.push(chunk);
            }
        }
        Ok(found)
    }

    /// Reads all blocks of a chunk in order and hands each to `each`.
    ///
    /// # Errors
    /// [`BlocksError`] when the memory cannot be read, or a frame is not where it should be.
    pub fn for_each(&self, chunk: Chunk, mut each: impl FnMut(ControlBlock)) -> Result<(), BlocksError> {
        let size = self.build.block.size;
        let mut buffer = vec![0; size * chunk.count.min(BLOCKS_AT_ONCE) as usize];
        let mut first_frame = None;
        let mut index = 0;
        while index < chunk.count {
            let now = (chunk.count - index).min(BLOCKS_AT_ONCE);
            let piece = &mut buffer[..size * now as usize];
            self.memory.read(chunk.blocks.wrapping_add(index * size as u64), piece)?;
            for bytes in piece.chunks_exact(size) {
                // The catalogue's check has all fields inside a block.
                let Some(block) = ControlBlock::parse(bytes, self.build) else { continue };
                let first = *first_frame.get_or_insert(block.frame.0);
                let expected = first.wrapping_add(index * PAGE_BYTES);
                if block.frame.0 != expected || !expected.is_multiple_of(4096) || expected == 0 {
                    let frame = block.frame.0;
                    return Err(BlocksError::Frame { blocks: chunk.blocks, index, frame, expected });
                }
                each(block);
                index += 1;
            }
        }
        Ok(())
    }

    /// A frame table of the pool as it is now. A pool that is being resized is tried a few times.
    ///
    /// # Errors
    /// [`BlocksError`] of the last try.
    pub fn snapshot(&self) -> Result<FrameTable, BlocksError> {
        let mut tries = SNAPSHOT_TRIES;
        loop {
            tries -= 1;
            match self.try_snapshot() {
                Err(error) if tries > 0 => {
                    tracing::debug!(%error, "snapshot is tried again");
                    std::thread::sleep(std::time::Duration::from_millis(50));
                }
                result => return result,
            }
        }
    }

    fn try_snapshot(&self) -> Result<FrameTable, BlocksError> {
        let mut table = FrameTable::default();
        for chunk in self.chunks()? {
            let mut first = None;
            let mut states = Vec::with_capacity(chunk.count as usize);
            self.for_each(chunk, |block| {
                first.get_or_insert(block.frame);
                states.push(block.state());
            })?;
            if let Some(first) = first {
                table.add_chunk(first, states.into_iter())?;
            }
        }
        Ok(table)
    }
}

/// Tablespaces in memory, each read once.
pub struct SpacesInMemory<'m, M: Memory> {
    memory: &'m M,
    build: &'m Build,
    read: HashMap<u64, Option<SpaceInMemory>>,
}

impl<'m, M: Memory> SpacesInMemory<'m, M> {
    /// None read yet.
    pub fn new(memory: &'m M, build: &'m Build) -> Self {
        Self { memory, build, read: HashMap::new() }
    }

    /// The tablespace at an address; `None` when nothing can be read there.
    pub fn get(&mut self, address: u64) -> Option<SpaceInMemory> {
        let (memory, build) = (self.memory, self.build);
        *self.read.entry(address).or_insert_with(|| {
            let mut bytes = vec![0; build.space_bytes()];
            if address == 0 {
                return None;
            }
            memory.read(address, &mut bytes).ok()?;
            Some(SpaceInMemory {
                id: u32_le(&bytes, build.space.id)?,
                version: u32_le(&bytes, build.space.version)?,
                deleted: *bytes.get(build.space.deleted)? != 0,
                flags: u32_le(&bytes, build.space.flags)?,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::catalogue::Catalogue;
    use crate::memory::fake::FakeMemory;

    const BUILD_ID: &str = "cc8a18826385d7182761a4a8f41044748267244d";
    const FRAMES: u64 = 0x7000_0000_0000;

    fn block(index: u64, state: u8, newest: u64, oldest: u64) -> Vec<u8> {
        let mut bytes = vec![0; 368];
        bytes[0..4].copy_from_slice(&7_u32.to_le_bytes());
        bytes[4..8].copy_from_slice(&(index as u32).to_le_bytes());
        bytes[0x15] = state;
        bytes[0x30..0x38].copy_from_slice(&newest.to_le_bytes());
        bytes[0x38..0x40].copy_from_slice(&oldest.to_le_bytes());
        bytes[0x100..0x108].copy_from_slice(&(FRAMES + index * PAGE_BYTES).to_le_bytes());
        bytes
    }

    fn memory(blocks: &[Vec<u8>], page_size: u64) -> FakeMemory {
        let mut pool = vec![0; 0x2548];
        pool[0x168..0x170].copy_from_slice(&1_u64.to_le_bytes());
        pool[0x178..0x180].copy_from_slice(&0x3000_u64.to_le_bytes());
        let mut chunk = vec![0; 24];
        chunk[0..8].copy_from_slice(&(blocks.len() as u64).to_le_bytes());
        chunk[16..24].copy_from_slice(&0x10_0000_u64.to_le_bytes());
        let variables = [0x2_0000_u64, 1, page_size].map(u64::to_le_bytes).concat();
        FakeMemory(vec![(0x1000, variables), (0x2_0000, pool), (0x3000, chunk), (0x10_0000, blocks.concat())])
    }

    fn snapshot(memory: &FakeMemory, most_frames: u64) -> Result<FrameTable, BlocksError> {
        let catalogue = Catalogue::built_in().unwrap();
        let build = catalogue.find(BUILD_ID).unwrap();
        let variables = PoolVariables { pools: 0x1000, pool_count: 0x1008, page_size: 0x1010 };
        ControlBlocks::new(memory, build, variables, most_frames).try_snapshot()
    }

    #[test]
    fn a_snapshot_sorts_frames_by_what_their_blocks_say() {
        let mut reading = block(4, 5, 0, 0);
        reading[0x14] = 1;
        let blocks = [block(0, 5, 0, 0), block(1, 5, 90, 0), block(2, 5, 90, 80), block(3, 3, 0, 0), reading];
        let table = snapshot(&memory(&blocks, 16384), 100).unwrap();
        let states: Vec<FrameState> = table.iter().map(|(_, state)| state).collect();
        let id = |page| PageId { space: 7, page };
        assert_eq!(
            states,
            [
                FrameState::Read(id(0)),
                FrameState::Written(id(1)),
                FrameState::Dirty(id(2)),
                FrameState::Free,
                FrameState::Free
            ]
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let blocks = [block(0, 5, 0, 0), block(7, 5, 0, 0)];
        assert!(matches!(snapshot(&memory(&blocks, 16384), 100), Err(BlocksError::Frame { index: 1, .. })));
        let blocks = [block(0, 5, 0, 0), block(1, 5, 0, 0)];
        assert!(matches!(snapshot(&memory(&blocks, 8192), 100), Err(BlocksError::PageSize { bytes: 8192 })));
        assert!(matches!(snapshot(&memory(&blocks, 16384), 1), Err(BlocksError::Implausible { .. })));
        assert!(matches!(snapshot(&FakeMemory::default(), 1), Err(BlocksError::Memory(_))));
    }

    proptest! {
        #[test]
        fn any_block_is_parsed(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let catalogue = Catalogue::built_in().unwrap();
            let parsed = ControlBlock::parse(&bytes, catalogue.find(BUILD_ID).unwrap());
            prop_assert_eq!(parsed.is_some(), bytes.len() >= 0x108);
        }
    }
}
