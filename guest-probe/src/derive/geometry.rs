//! Where the control blocks are: pool instances, their chunks, and the blocks in them.
//!
//! What gives a block array away is the pointer to the frame: in each block it is 16 KiB further than in the one before, and nothing else
//! in memory looks like that for hundreds of blocks in a row.

use std::collections::{BTreeMap, HashSet};

use crate::bytes::u64_le;
use crate::elf::ReadAt;
use crate::frame_table::PAGE_BYTES;
use crate::memory::{Memory, MemoryError};

use super::code::Evidence;
use super::names::Names;
use super::{Finding, Server, Witness, is_address};

/// InnoDB has at most 64 pool instances.
const MOST_POOLS: u64 = 64;
/// Bytes of a pool instance that are searched: 0x2548 in MySQL 9.7.
const POOL_BYTES: usize = 0x4000;
/// A chunk descriptor has 24 bytes; more than these it has in no build.
const CHUNK_BYTES: usize = 128;
/// A control block has between these many bytes: 368 in MySQL 9.7.
const BLOCK_BYTES: std::ops::Range<usize> = 64..2048;
/// Bytes at the beginning of a block array that are searched.
const HEAD_BYTES: usize = 16 << 10;
/// A chunk has more blocks than this: 1 MiB of pool has 64.
const FEWEST_BLOCKS: u64 = 32;
/// No more chunks are followed; a pool of 16 TiB in chunks of 128 MiB has more.
const MOST_CHUNKS: usize = 1 << 17;
/// Blocks of one chunk that are looked at to see whether it is one.
const PROBED_BLOCKS: u64 = 16;
/// Instances of a pool lie no further apart than this.
const MOST_STRIDE: usize = 0x10000;

/// The control blocks of a server, as far as their places go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pools {
    /// Address of each chunk's first block, and how many there are.
    pub chunks: Vec<(u64, u64)>,
    /// Bytes in a block.
    pub block_bytes: usize,
    /// Offset of the frame's address in a block.
    pub frame: usize,
}

/// How a block array looks from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    block_bytes: usize,
    frame: usize,
}

/// How chunk descriptors look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    count: usize,
    blocks: usize,
    shape: Shape,
}

/// Finds the chunks of all instances. Findings go into `fields`; `None` when no block array was found.
pub(super) fn find<F: ReadAt + ?Sized, M: Memory>(
    server: &Server<'_, F, M>,
    names: &Names,
    code: &Evidence,
    fields: &mut BTreeMap<&'static str, Finding>,
) -> Result<Option<Pools>, MemoryError> {
    const ALL: [&str; 8] = [
        "pool.size",
        "pool.chunk_count",
        "pool.chunks",
        "chunk.size",
        "chunk.block_count",
        "chunk.blocks",
        "block.size",
        "block.frame",
    ];
    let mut nothing = |why: &str| {
        fields.extend(ALL.map(|name| (name, Finding::missing(why))));
        Ok(None)
    };
    let address = |field| names.address(field).map(|address| server.bias.wrapping_add(address));
    let (Some(pools), Some(count), Some(page_size)) =
        (address("pools"), address("pool_count"), address("page_size"))
    else {
        return nothing("the variables that lead to the pool are not known");
    };
    let instances = server.memory.read_u64(count)?;
    let pool = server.memory.read_u64(pools)?;
    let page_size = server.memory.read_u64(page_size)?;
    if page_size != PAGE_BYTES {
        return nothing(&format!("mysqld has pages of {page_size} bytes; guest-probe is for 16384"));
    }
    if !(1..=MOST_POOLS).contains(&instances) || !is_address(pool) {
        return nothing(&format!("{instances} pool instances at {pool:#x}: mysqld is starting or ending"));
    }
    let words = read_words(server.memory, pool, POOL_BYTES);
    let Some((chunks_at, descriptors)) = find_descriptors(server, &words) else {
        return nothing("no array of control blocks is reached from the pool");
    };
    let Some(first) = words.get(chunks_at / 8).copied() else { return nothing("the pool cannot be read") };
    let found = follow_chunks(server, first, &descriptors);
    let Some(Followed { descriptor, stride, chunks, places }) = found else {
        return nothing("the chunks of the pool contradict each other");
    };
    let blocks_in_all: u64 = chunks.iter().map(|(_, count)| count).sum();

    // All words of the pool that lead to the same chunks, or hold their number: of equal ones the code says which.
    let equal =
        |value: u64| (0..words.len()).filter(|index| words[*index] == value).map(|index| index * 8).collect();
    let to_chunks = Witness::new(equal(first), "words of the pool that point to its chunks");
    let pool_chunks = Finding::of(Some(to_chunks), code.chunks());
    let of_chunk = pool_chunks.value.and_then(|at| code.chunk(at));
    fields.insert("pool.chunks", pool_chunks);
    let number =
        Witness::new(equal(chunks.len() as u64), format!("words of the pool that are {}", chunks.len()));
    fields.insert("pool.chunk_count", Finding::of(Some(number), code.chunks()));

    let says = format!("{} chunks with {blocks_in_all} blocks whose frames lie 16 KiB apart", chunks.len());
    let memory = |places: Vec<usize>| Some(Witness::new(places, says.clone()));
    fields.insert("block.size", Finding::of(memory(vec![descriptor.shape.block_bytes]), code.block_size()));
    fields.insert("block.frame", Finding::of(memory(vec![descriptor.shape.frame]), code.frame()));
    // A chunk has the address of its memory beside that of its blocks, which begin there.
    let to_blocks = places.iter().map(|descriptor| descriptor.blocks).collect();
    fields.insert("chunk.blocks", Finding::of(memory(to_blocks), of_chunk.clone()));
    let counts = places.iter().map(|descriptor| descriptor.count).collect();
    fields.insert("chunk.block_count", Finding::of(memory(counts), of_chunk));
    let stride_finding = match stride {
        Some(stride) => Finding::of(memory(vec![stride]), None),
        None => {
            Finding::missing("the pool has one chunk only; with a second one its descriptor's size shows")
        }
    };
    fields.insert("chunk.size", stride_finding);

    let (size, all_chunks) =
        other_instances(server, pool, instances, chunks_at, &words, &chunks, descriptor, stride);
    fields.insert("pool.size", Finding::of(size, code.pool_size()));
    let Shape { block_bytes, frame } = descriptor.shape;
    Ok(Some(Pools { chunks: all_chunks, block_bytes, frame }))
}

/// Words from an address on, as many as can be read.
fn read_words<M: Memory>(memory: &M, address: u64, bytes: usize) -> Vec<u64> {
    let mut bytes_left = bytes;
    while bytes_left >= 8 {
        let mut buffer = vec![0; bytes_left];
        if memory.read(address, &mut buffer).is_ok() {
            return buffer.chunks_exact(8).filter_map(|word| u64_le(word, 0)).collect();
        }
        // Where the mapping ends the piece before it is left.
        bytes_left /= 2;
    }
    Vec::new()
}

/// The first word of the pool that points to chunk descriptors, and how those may look.
fn find_descriptors<F: ReadAt + ?Sized, M: Memory>(
    server: &Server<'_, F, M>,
    words: &[u64],
) -> Option<(usize, Vec<Descriptor>)> {
    let mut tried = HashSet::new();
    for (index, pointer) in words.iter().enumerate().filter(|(_, word)| is_address(**word)) {
        if !tried.insert(*pointer) {
            continue;
        }
        let descriptors = descriptors_at(server, *pointer);
        if !descriptors.is_empty() {
            return Some((index * 8, descriptors));
        }
    }
    None
}

/// How a chunk's descriptor at this address may look: a pointer to a block array beside the number of its blocks.
fn descriptors_at<F: ReadAt + ?Sized, M: Memory>(server: &Server<'_, F, M>, address: u64) -> Vec<Descriptor> {
    let words = read_words(server.memory, address, CHUNK_BYTES);
    let mut found = Vec::new();
    let counts = |count: u64| (FEWEST_BLOCKS..=server.most_frames).contains(&count);
    if !words.iter().any(|word| counts(*word)) {
        return found;
    }
    for (at, blocks) in words.iter().enumerate().filter(|(_, word)| is_address(**word)) {
        let Some(shape) = shape_at(server.memory, *blocks) else { continue };
        for (count_at, count) in words.iter().enumerate().filter(|(_, word)| counts(**word)) {
            if is_chunk(server.memory, *blocks, *count, shape) {
                found.push(Descriptor { count: count_at * 8, blocks: at * 8, shape });
            }
        }
    }
    found
}

/// The shape of the block array that begins here; `None` when there is none, or more than one shape fits.
fn shape_at<M: Memory>(memory: &M, blocks: u64) -> Option<Shape> {
    let words = read_words(memory, blocks, HEAD_BYTES);
    let mut shapes = Vec::new();
    for (index, first) in words.iter().enumerate().take(BLOCK_BYTES.end / 8) {
        if !is_frame(*first) {
            continue;
        }
        for (next, second) in words.iter().enumerate().skip(index + 1).take(BLOCK_BYTES.end / 8) {
            let stride = next - index;
            let fits = *second == first + PAGE_BYTES
                && BLOCK_BYTES.contains(&(stride * 8))
                && index < stride
                && words
                    .iter()
                    .skip(index)
                    .step_by(stride)
                    .enumerate()
                    .all(|(number, word)| *word == first.wrapping_add(number as u64 * PAGE_BYTES));
            if fits {
                shapes.push(Shape { block_bytes: stride * 8, frame: index * 8 });
            }
        }
    }
    match shapes[..] {
        [shape] => Some(shape),
        _ => None,
    }
}

fn is_frame(value: u64) -> bool {
    is_address(value) && value.is_multiple_of(PAGE_BYTES)
}

/// Whether `count` blocks of a shape lie here: some of them are looked at, the last one above all.
fn is_chunk<M: Memory>(memory: &M, blocks: u64, count: u64, shape: Shape) -> bool {
    let frame_of = |index: u64| {
        let at = blocks
            .checked_add(index.checked_mul(shape.block_bytes as u64)?)?
            .checked_add(shape.frame as u64)?;
        memory.read_u64(at).ok()
    };
    let Some(first) = frame_of(0).filter(|first| is_frame(*first)) else { return false };
    (0..=PROBED_BLOCKS).all(|part| {
        let index = (count - 1) * part / PROBED_BLOCKS;
        frame_of(index).is_some_and(|frame| Some(frame) == first.checked_add(index * PAGE_BYTES))
    }) && frame_of(count).is_none_or(|behind| Some(behind) != first.checked_add(count * PAGE_BYTES))
}

/// The chunks of a pool.
struct Followed {
    descriptor: Descriptor,
    stride: Option<usize>,
    chunks: Vec<(u64, u64)>,
    /// All descriptors that lead to these chunks.
    places: Vec<Descriptor>,
}

/// Follows the descriptors from the first on. `None` when not all of the longest readings lead to the same chunks.
fn follow_chunks<F: ReadAt + ?Sized, M: Memory>(
    server: &Server<'_, F, M>,
    first: u64,
    descriptors: &[Descriptor],
) -> Option<Followed> {
    let mut best: Option<Followed> = None;
    let mut contradicted = false;
    for descriptor in descriptors {
        let least = (descriptor.count.max(descriptor.blocks)) + 8;
        for stride in (least..=CHUNK_BYTES).step_by(8) {
            let chunks = chunks_from(server, first, *descriptor, stride);
            // With one chunk every stride fits, so it stays open.
            let stride = (chunks.len() > 1).then_some(stride);
            let longest = best.as_ref().map_or(0, |followed| followed.chunks.len());
            match &mut best {
                _ if chunks.is_empty() || chunks.len() < longest => {}
                Some(best) if chunks.len() == longest => {
                    contradicted |= best.chunks != chunks
                        || best.stride != stride
                        || best.descriptor.shape != descriptor.shape;
                    if !best.places.contains(descriptor) {
                        best.places.push(*descriptor);
                    }
                }
                _ => {
                    contradicted = false;
                    best =
                        Some(Followed { descriptor: *descriptor, stride, chunks, places: vec![*descriptor] });
                }
            }
        }
    }
    best.filter(|_| !contradicted)
}

fn chunks_from<F: ReadAt + ?Sized, M: Memory>(
    server: &Server<'_, F, M>,
    first: u64,
    descriptor: Descriptor,
    stride: usize,
) -> Vec<(u64, u64)> {
    let mut chunks: Vec<(u64, u64)> = Vec::new();
    let mut seen = HashSet::new();
    let mut blocks_left = server.most_frames;
    while chunks.len() < MOST_CHUNKS {
        let at = first.wrapping_add((chunks.len() * stride) as u64);
        let word = |offset: usize| server.memory.read_u64(at.wrapping_add(offset as u64)).ok();
        let (Some(blocks), Some(count)) = (word(descriptor.blocks), word(descriptor.count)) else { break };
        let fits = is_address(blocks)
            && (FEWEST_BLOCKS..=blocks_left).contains(&count)
            && seen.insert(blocks)
            && is_chunk(server.memory, blocks, count, descriptor.shape);
        if !fits {
            break;
        }
        blocks_left -= count;
        chunks.push((blocks, count));
    }
    chunks
}

/// With several instances the distance between them shows; returns it, and the chunks of all instances.
#[allow(clippy::too_many_arguments, reason = "each is a thing of its own that is known by then")]
fn other_instances<F: ReadAt + ?Sized, M: Memory>(
    server: &Server<'_, F, M>,
    pool: u64,
    instances: u64,
    chunks_at: usize,
    words: &[u64],
    chunks: &[(u64, u64)],
    descriptor: Descriptor,
    stride: Option<usize>,
) -> (Option<Witness>, Vec<(u64, u64)>) {
    let own = chunks.to_vec();
    let Some(stride) = stride.filter(|_| instances > 1) else { return (None, own) };
    let distances: Vec<(usize, Vec<(u64, u64)>)> = (chunks_at + 8..MOST_STRIDE)
        .step_by(8)
        .filter_map(|distance| {
            let mut all = own.clone();
            for instance in 1..instances {
                let at = pool.checked_add(instance * distance as u64)?.checked_add(chunks_at as u64)?;
                let first = server.memory.read_u64(at).ok().filter(|first| is_address(*first))?;
                if words.get(chunks_at / 8) == Some(&first) {
                    return None;
                }
                let more = chunks_from(server, first, descriptor, stride);
                let new = more.len() == chunks.len() && more.iter().all(|chunk| !all.contains(chunk));
                all.extend(new.then_some(more)?);
            }
            Some((distance, all))
        })
        .collect();
    let places = distances.iter().map(|(distance, _)| *distance).collect();
    let witness = Witness::new(places, format!("distance between {instances} pool instances"));
    match &distances[..] {
        [(_, all)] => (Some(witness), all.clone()),
        _ => (Some(witness), own),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::fake::FakeMemory;

    const FRAMES: u64 = 0x7000_0000_0000;
    const BLOCKS: u64 = 0x10_0000;
    const SHAPE: Shape = Shape { block_bytes: 368, frame: 0x100 };

    fn blocks(count: u64) -> Vec<u8> {
        let mut bytes = vec![0; 368 * count as usize];
        for index in 0..count {
            let at = index as usize * 368 + 0x100;
            bytes[at..at + 8].copy_from_slice(&(FRAMES + index * PAGE_BYTES).to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_block_array_is_told_by_its_frames() {
        let memory = FakeMemory(vec![(BLOCKS, blocks(200))]);
        assert_eq!(shape_at(&memory, BLOCKS), Some(SHAPE));
        assert!(is_chunk(&memory, BLOCKS, 200, SHAPE));
        assert!(!is_chunk(&memory, BLOCKS, 199, SHAPE), "one more would follow");
        assert!(!is_chunk(&memory, BLOCKS, 201, SHAPE));
        assert_eq!(shape_at(&memory, BLOCKS + 8), Some(Shape { block_bytes: 368, frame: 0xf8 }));
    }

    #[test]
    fn one_frame_at_another_place_is_enough_to_refuse() {
        let mut bytes = blocks(200);
        bytes[368 * 30 + 0x100 + 1] ^= 0x40;
        assert_eq!(shape_at(&FakeMemory(vec![(BLOCKS, bytes)]), BLOCKS), None);
        assert_eq!(shape_at(&FakeMemory(vec![(BLOCKS, vec![0; 1 << 16])]), BLOCKS), None);
        assert_eq!(shape_at(&FakeMemory::default(), BLOCKS), None, "memory that is not mapped");
    }
}
