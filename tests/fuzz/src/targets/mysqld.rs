//! mysqld's memory, and what is known of its builds.

use std::sync::OnceLock;

use arbitrary::{Result, Unstructured};
use guest_probe::catalogue::{Build, Catalogue};
use guest_probe::control_blocks::{ControlBlock, ControlBlocks, PoolVariables, SpacesInMemory};
use guest_probe::memory::{Memory, MemoryError};

/// Frames that the pool may have.
const MOST_FRAMES: u64 = 64;
/// Where things are, when they are where they should be.
const VARIABLES: u64 = 0x1000;
const POOL: u64 = 0x2_0000;
const CHUNKS: u64 = 0x3_0000;
const BLOCKS: u64 = 0x10_0000;
const FRAMES: u64 = 0x7000_0000_0000;

/// Pieces of memory by address.
struct Pieces(Vec<(u64, Vec<u8>)>);

impl Memory for Pieces {
    fn read(&self, address: u64, buffer: &mut [u8]) -> std::result::Result<(), MemoryError> {
        let piece = self.0.iter().find_map(|(start, piece)| {
            let at = usize::try_from(address.checked_sub(*start)?).ok()?;
            piece.get(at..at.checked_add(buffer.len())?)
        });
        match piece {
            Some(piece) => {
                buffer.copy_from_slice(piece);
                Ok(())
            }
            None => Err(MemoryError {
                pid: 1,
                address,
                bytes: buffer.len(),
                source: std::io::ErrorKind::AddrNotAvailable.into(),
            }),
        }
    }
}

fn build() -> &'static Build {
    static CATALOGUE: OnceLock<Catalogue> = OnceLock::new();
    &CATALOGUE.get_or_init(|| Catalogue::built_in().unwrap()).builds()[0]
}

/// A pool as choices have it: a few words of it are others than they should be.
fn memory(choices: &mut Unstructured<'_>) -> Result<Pieces> {
    let build = build();
    let blocks = choices.int_in_range(1..=8_u64)?;
    let mut chunk = vec![0; build.chunk.size];
    put(&mut chunk, build.chunk.block_count, blocks);
    put(&mut chunk, build.chunk.blocks, BLOCKS);
    let mut pool = vec![0; build.pool.size];
    put(&mut pool, build.pool.chunk_count, 1);
    put(&mut pool, build.pool.chunks, CHUNKS);
    let mut array = vec![0; build.block.size * blocks as usize];
    for (index, block) in array.chunks_exact_mut(build.block.size).enumerate() {
        block[build.block.state] = choices.arbitrary()?;
        block[build.block.io_fix] = choices.int_in_range(0..=3)?;
        put(block, build.block.page_id, choices.arbitrary()?);
        put(block, build.block.newest, u64::from(choices.arbitrary::<u8>()?));
        put(block, build.block.oldest, u64::from(choices.arbitrary::<bool>()?));
        put(block, build.block.frame, FRAMES + index as u64 * 16384);
    }
    let mut variables = Vec::new();
    for value in [POOL, 1, 16384] {
        variables.extend(u64::to_le_bytes(value));
    }
    let mut pieces = vec![(VARIABLES, variables), (POOL, pool), (CHUNKS, chunk), (BLOCKS, array)];
    for _ in 0..choices.int_in_range(0..=3)? {
        let (_, piece) = &mut pieces[choices.choose_index(4)?];
        let at = choices.int_in_range(0..=piece.len() - 1)?;
        let bytes = choices.arbitrary::<u64>()?.to_le_bytes();
        let most = (piece.len() - at).min(8);
        piece[at..at + most].copy_from_slice(&bytes[..most]);
    }
    Ok(Pieces(pieces))
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// One block, and a whole pool of them.
pub fn control_blocks(data: &[u8]) {
    let build = build();
    if let Some(block) = ControlBlock::parse(data, build) {
        let _ = block.state();
    }
    let mut choices = Unstructured::new(data);
    let Ok(memory) = memory(&mut choices) else { return };
    let variables = PoolVariables { pools: VARIABLES, pool_count: VARIABLES + 8, page_size: VARIABLES + 16 };
    let blocks = ControlBlocks::new(&memory, build, variables, MOST_FRAMES);
    if let Ok(chunks) = blocks.chunks() {
        assert!(chunks.iter().map(|chunk| chunk.count).sum::<u64>() <= MOST_FRAMES);
        for chunk in chunks {
            let mut seen = 0;
            if blocks.for_each(chunk, |_| seen += 1).is_ok() {
                assert_eq!(seen, chunk.count);
            }
        }
    }
    let mut spaces = SpacesInMemory::new(&memory, build);
    for address in [0, POOL, BLOCKS, u64::MAX] {
        assert!(spaces.get(address).is_none() || address != 0);
    }
}

/// An entry that is taken has its offsets where fields can be.
pub fn catalogue(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(catalogue) = Catalogue::parse(text) else { return };
    for build in catalogue.builds() {
        assert!(catalogue.find(&build.build_id).is_ok());
        let layout = build.event_layout(1);
        assert_eq!(layout.block_frame as usize, build.block.frame);
        assert!(build.space_bytes() >= build.space.id + 4);
        let again = build.to_toml().unwrap();
        assert_eq!(Catalogue::parse(&again).unwrap().builds(), std::slice::from_ref(build));
    }
}
