//! The fields of a control block, from what must hold for all of them at once.
//!
//! A sample is read as block, frame, block: where both readings of the block are the same, block and frame belong together.

use std::collections::BTreeMap;

use crate::bytes::{u32_be, u32_le, u64_be, u64_le};
use crate::frame_table::PAGE_BYTES;
use crate::memory::Memory;

use super::code::Evidence;
use super::geometry::Pools;
use super::{Finding, STATE_FILE_PAGE, Witness};

/// Blocks that are looked at, spread over the pool: 3 MiB of them.
const MOST_SAMPLES: u64 = 8192;
/// Bytes of a page's header.
const HEADER_BYTES: usize = 38;
/// A field is believed when this many pages bear it out.
const ENOUGH_PAGES: usize = 200;
/// Pages that were changed and flushed, and pages with changes not flushed: one needs some of each.
const ENOUGH_LSNS: usize = 20;
const ENOUGH_DIRTY: usize = 5;
/// No page is used by more threads.
const MOST_FIXES: u32 = 100_000;
/// FIL_PAGE_OFFSET, FIL_PAGE_LSN and FIL_PAGE_SPACE_ID of the page header (fil0types.h).
const AT_PAGE: usize = 4;
const AT_LSN: usize = 16;
const AT_SPACE: usize = 34;

/// A control block with its page's header.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub block: Vec<u8>,
    header: [u8; HEADER_BYTES],
}

impl Sample {
    /// Tablespace and page number, as the page itself says; `None` for a frame that holds nothing, or a first page, whose
    /// zeros would prove nothing.
    pub fn page(&self) -> Option<(u32, u32)> {
        let (space, page) = (u32_be(&self.header, AT_SPACE)?, u32_be(&self.header, AT_PAGE)?);
        (page != 0 && page != u32::MAX).then_some((space, page))
    }

    fn lsn(&self) -> u64 {
        u64_be(&self.header, AT_LSN).unwrap_or_default()
    }

    /// Tablespace and page number at an offset of the block.
    pub fn id_at(&self, offset: usize) -> Option<(u32, u32)> {
        Some((u32_le(&self.block, offset)?, u32_le(&self.block, offset + 4)?))
    }

    pub fn word(&self, offset: usize) -> u64 {
        u64_le(&self.block, offset).unwrap_or_default()
    }
}

/// Reads blocks from all chunks, those that did not change meanwhile.
pub(super) fn sample<M: Memory>(memory: &M, pools: &Pools) -> Vec<Sample> {
    let all: u64 = pools.chunks.iter().map(|(_, count)| count).sum();
    let step = (all / MOST_SAMPLES).max(1);
    let mut samples = Vec::new();
    let mut passed = 0_u64;
    for (blocks, count) in &pools.chunks {
        let first = passed.next_multiple_of(step) - passed;
        for index in (first..*count).step_by(step as usize) {
            let address = blocks.wrapping_add(index * pools.block_bytes as u64);
            samples.extend(read_sample(memory, address, pools));
        }
        passed += count;
    }
    samples
}

fn read_sample<M: Memory>(memory: &M, address: u64, pools: &Pools) -> Option<Sample> {
    let mut block = vec![0; pools.block_bytes];
    let mut again = block.clone();
    let mut header = [0; HEADER_BYTES];
    memory.read(address, &mut block).ok()?;
    let frame = u64_le(&block, pools.frame)?;
    if !frame.is_multiple_of(PAGE_BYTES) {
        return None;
    }
    memory.read(frame, &mut header).ok()?;
    memory.read(address, &mut again).ok()?;
    (block == again).then_some(Sample { block, header })
}

/// Finds all fields that blocks and headers tell.
pub(super) fn find(samples: &[Sample], code: &Evidence, fields: &mut BTreeMap<&'static str, Finding>) {
    let bytes = samples.first().map_or(0, |sample| sample.block.len());
    let page_id = find_page_id(samples, bytes);
    let id_at = page_id.value;
    fields.insert("block.page_id", page_id);
    let pages: Vec<&Sample> = samples
        .iter()
        .filter(|sample| sample.page().is_some())
        .filter(|sample| id_at.is_some_and(|at| sample.id_at(at) == sample.page()))
        .collect();
    // A block without a page has an id that is none.
    let free: Vec<&Sample> = samples
        .iter()
        .filter(|sample| {
            id_at
                .and_then(|at| sample.id_at(at))
                .is_some_and(|id| matches!(id, (0, 0) | (u32::MAX, u32::MAX)))
        })
        .collect();
    if pages.len() < ENOUGH_PAGES {
        let why =
            format!("{} pages are in the pool; {ENOUGH_PAGES} are needed (run some queries)", pages.len());
        fields.extend(ALL.into_iter().skip(1).map(|name| (name, Finding::missing(why.clone()))));
        return;
    }
    fields.insert("block.page_size", find_page_size(&pages, bytes));
    fields.insert("block.state", find_state(&pages, &free, bytes, code));
    fields.insert("block.io_fix", find_io_fix(samples, &pages, bytes, code));
    fields.insert("block.fix_count", find_fix_count(samples, &pages, bytes, code));
    let (newest, newest_at) = find_newest(&pages, bytes);
    fields.insert("block.newest", newest);
    fields.insert("block.oldest", find_oldest(samples, &pages, bytes, newest_at, code));
}

/// What is told here.
pub(super) const ALL: [&str; 7] = [
    "block.page_id",
    "block.page_size",
    "block.fix_count",
    "block.io_fix",
    "block.state",
    "block.newest",
    "block.oldest",
];

/// The page id is what the page's own header says.
fn find_page_id(samples: &[Sample], bytes: usize) -> Finding {
    let mut scores: Vec<(usize, usize)> = (0..bytes.saturating_sub(7))
        .step_by(4)
        .map(|at| {
            (
                samples
                    .iter()
                    .filter(|sample| sample.page().is_some() && sample.id_at(at) == sample.page())
                    .count(),
                at,
            )
        })
        .filter(|(score, _)| *score > 0)
        .collect();
    scores.sort_unstable_by(|left, right| right.cmp(left));
    let Some((best, _)) = scores.first().copied() else {
        return Finding::missing("no page in the pool has its own id in its block");
    };
    if best < ENOUGH_PAGES {
        return Finding::missing(format!(
            "{best} pages have their own id in their block; {ENOUGH_PAGES} are needed (run some queries)"
        ));
    }
    // A place that says the same for a part of the pages is a doubt; by chance few do.
    let places = scores.iter().filter(|(score, _)| *score * 20 >= best).map(|(_, at)| *at).collect();
    Finding::of(Some(Witness::new(places, format!("id of {best} pages' own headers"))), None)
}

/// The page size says 16 KiB logical, and a physical size that is no larger, in bit fields.
fn find_page_size(pages: &[&Sample], bytes: usize) -> Finding {
    let places = (0..bytes.saturating_sub(7)).step_by(4).filter(|at| {
        pages.iter().all(|sample| {
            let value = sample.word(*at);
            let (physical, logical) = (value & 0x1_ffff, value >> 32 & 0x1_ffff);
            let compressed = value >> 49 & 1 != 0;
            logical == PAGE_BYTES
                && physical.is_power_of_two()
                && (1024..=PAGE_BYTES).contains(&physical)
                && (physical < PAGE_BYTES) <= compressed
        })
    });
    Finding::of(Some(Witness::new(places.collect(), format!("page size in {} blocks", pages.len()))), None)
}

/// The state is "file page" for all pages, and something else for all blocks without one. A full pool may have none of those; then
/// the code must name the place.
fn find_state(pages: &[&Sample], free: &[&Sample], bytes: usize, code: &Evidence) -> Finding {
    let places = (0..bytes).filter(|at| {
        pages.iter().all(|sample| sample.block[*at] == STATE_FILE_PAGE)
            && free.iter().all(|sample| sample.block[*at] != STATE_FILE_PAGE && sample.block[*at] < 8)
    });
    let says =
        format!("{} pages have {STATE_FILE_PAGE}, {} blocks without have not", pages.len(), free.len());
    let witness = Witness::new(places.collect(), says);
    if free.is_empty() {
        needs_code(witness, code.state(), "buf_LRU_block_free_non_file_page")
    } else {
        Finding::of(Some(witness), code.state())
    }
}

/// Which I/O is under way is none for nearly all pages, and one of four things for each.
fn find_io_fix(samples: &[Sample], pages: &[&Sample], bytes: usize, code: &Evidence) -> Finding {
    let places = (0..bytes).filter(|at| {
        samples.iter().all(|sample| sample.block[*at] < 4)
            && pages.iter().filter(|sample| sample.block[*at] == 0).count() * 10 >= pages.len() * 9
    });
    let says = format!("at most 3 in {} blocks, mostly 0", samples.len());
    needs_code(
        Witness::new(places.collect(), says),
        code.io_fix(),
        "buf_page_t::is_io_fix_read and is_io_fix_write",
    )
}

/// The number of threads that use a page is a small one, mostly none.
fn find_fix_count(samples: &[Sample], pages: &[&Sample], bytes: usize, code: &Evidence) -> Finding {
    let value = |sample: &Sample, at: usize| u32_le(&sample.block, at).unwrap_or(u32::MAX);
    let places = (0..bytes.saturating_sub(3)).step_by(4).filter(|at| {
        samples.iter().all(|sample| value(sample, *at) < MOST_FIXES)
            && pages.iter().filter(|sample| value(sample, *at) == 0).count() * 2 >= pages.len()
    });
    let says = format!("small in {} blocks, mostly 0", samples.len());
    // The same function asks whether the page is stale, by its version, which is small as well.
    let versions = code.version().map(|witness| witness.places).unwrap_or_default();
    let mut named = code.fix_count();
    if let Some(named) = &mut named {
        named.places.retain(|place| !versions.contains(place));
    }
    needs_code(Witness::new(places.collect(), says), named, "buf_flush_ready_for_replace")
}

/// Where what memory allows is too wide, the code must name the place.
fn needs_code(memory: Witness, code: Option<Witness>, functions: &str) -> Finding {
    match code {
        Some(code) => Finding::of(Some(memory), Some(code)),
        None => Finding {
            value: None,
            witnesses: vec![memory.words()],
            doubts: vec![format!("the program has no {functions} that would say which")],
        },
    }
}

/// The newest change is 0, or what the page's header got when it was flushed, or later.
fn find_newest(pages: &[&Sample], bytes: usize) -> (Finding, Option<usize>) {
    let mut places = Vec::new();
    let mut equal = 0;
    for at in (0..bytes.saturating_sub(7)).step_by(8) {
        // Below the header's only where the page was read after a restart; an LSN is below 2^62 in any case.
        let possible = pages.iter().all(|sample| {
            let value = sample.word(at);
            value == 0 || (value >= sample.lsn() && value < 1 << 62)
        });
        let flushed =
            pages.iter().filter(|sample| sample.lsn() != 0 && sample.word(at) == sample.lsn()).count();
        if possible && flushed >= ENOUGH_LSNS {
            places.push(at);
            equal = flushed;
        }
    }
    if places.is_empty() {
        let why = format!(
            "fewer than {ENOUGH_LSNS} pages in the pool were changed and flushed (let it run under load)"
        );
        return (Finding::missing(why), None);
    }
    let finding =
        Finding::of(Some(Witness::new(places, format!("LSN in {equal} headers of flushed pages"))), None);
    let at = finding.value;
    (finding, at)
}

/// The oldest change that is not on disk is 0, or no newer than the newest.
fn find_oldest(
    samples: &[Sample],
    pages: &[&Sample],
    bytes: usize,
    newest: Option<usize>,
    code: &Evidence,
) -> Finding {
    let Some(newest) = newest else {
        return Finding::missing("it is told by the newest change, which is not known");
    };
    let mut most_dirty = 0;
    let places: Vec<usize> = (0..bytes.saturating_sub(7))
        .step_by(8)
        .filter(|at| *at != newest)
        .filter(|at| {
            let dirty = pages.iter().filter(|sample| sample.word(*at) != 0).count();
            let possible = samples.iter().all(|sample| {
                let value = sample.word(*at);
                // Within 2^40 bytes of log: no server has more of it unflushed, and an address is far from an LSN.
                value == 0 || (value <= sample.word(newest) && sample.word(newest) - value < 1 << 40)
            });
            most_dirty = most_dirty.max(if possible { dirty } else { 0 });
            possible && dirty >= ENOUGH_DIRTY
        })
        .collect();
    if places.is_empty() {
        return Finding::missing(format!(
            "{most_dirty} pages in the pool have changes that are not on disk; {ENOUGH_DIRTY} are needed (let it run under load)"
        ));
    }
    let says = format!("no newer than the newest in {most_dirty} dirty pages");
    needs_code(Witness::new(places, says), code.oldest(), "buf_flush_remove")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(count: u32) -> Vec<Sample> {
        (1..=count)
            .map(|page| {
                let mut block = vec![0; 368];
                let mut header = [0; HEADER_BYTES];
                header[AT_PAGE..AT_PAGE + 4].copy_from_slice(&page.to_be_bytes());
                header[AT_SPACE..AT_SPACE + 4].copy_from_slice(&(page % 7 + 300).to_be_bytes());
                block[0x40..0x44].copy_from_slice(&(page % 7 + 300).to_le_bytes());
                block[0x44..0x48].copy_from_slice(&page.to_le_bytes());
                Sample { block, header }
            })
            .collect()
    }

    #[test]
    fn the_page_id_is_where_headers_bear_it_out() {
        let mut samples = samples(300);
        assert_eq!(find_page_id(&samples, 368).value, Some(0x40));
        // Another place that has it too: which one is right cannot be told.
        for sample in &mut samples {
            sample.block.copy_within(0x40..0x48, 0x80);
        }
        let finding = find_page_id(&samples, 368);
        assert!(finding.value.is_none() && finding.doubts[0].starts_with("several places"), "{finding:?}");
    }

    #[test]
    fn few_pages_prove_nothing() {
        assert!(find_page_id(&samples(100), 368).doubts[0].contains("100 pages"));
        assert!(find_page_id(&[], 0).value.is_none());
    }

    #[test]
    fn witnesses_must_agree() {
        let memory = || Some(Witness::new(vec![8, 16, 24], "memory"));
        assert_eq!(Finding::of(memory(), Some(Witness::new(vec![16, 40], "code"))).value, Some(16));
        for code in [vec![], vec![40], vec![8, 16]] {
            let finding = Finding::of(memory(), Some(Witness::new(code, "code")));
            assert!(!finding.is_sure() && finding.value.is_none(), "{finding:?}");
        }
        assert!(!Finding::of(None, None).is_sure());
    }
}
