//! The fields of tablespaces and their files in memory: every page's block points to its tablespace, which must have the page's id.

use std::collections::{BTreeMap, BTreeSet};

use crate::bytes::{u32_le, u64_le};
use crate::memory::Memory;
use crate::spaces::Spaces;

use super::code::Evidence;
use super::fields::Sample;
use super::{Finding, Witness, is_address};

/// Bytes of a tablespace that are searched: its flags are at 0x90 in MySQL 9.7.
const SPACE_BYTES: usize = 0x200;
/// Bytes of a file node that are searched.
const NODE_BYTES: usize = 0x80;
/// So many tablespaces tell their fields from chance.
const ENOUGH_SPACES: usize = 3;
/// A name of a file is no longer.
const NAME_BYTES: usize = 512;

/// What is told here.
pub(super) const ALL: [&str; 7] = [
    "block.space",
    "block.version",
    "space.id",
    "space.version",
    "space.deleted",
    "space.flags",
    "node.space",
];

/// A tablespace in memory.
struct Space {
    address: u64,
    id: u32,
    bytes: Vec<u8>,
}

/// Finds the fields that tablespaces tell.
pub(super) fn find<M: Memory>(
    memory: &M,
    samples: &[Sample],
    code: &Evidence,
    spaces: &Spaces,
    fields: &mut BTreeMap<&'static str, Finding>,
) {
    let Some(id_at) = fields.get("block.page_id").and_then(|finding| finding.value) else {
        let why = "it is told by the pages' ids, and where those are is not known";
        fields.extend(ALL.map(|name| (name, Finding::missing(why))));
        return;
    };
    let pages: Vec<&Sample> = samples
        .iter()
        .filter(|sample| sample.page().is_some() && sample.id_at(id_at) == sample.page())
        .collect();
    let bytes = samples.first().map_or(0, |sample| sample.block.len());
    // A block points to many things; only one of them has the page's tablespace id, always at the same place.
    let mut found: Vec<(usize, Vec<usize>, Vec<Space>)> = Vec::new();
    for at in (0..bytes.saturating_sub(7)).step_by(8) {
        let Some(pointed) = spaces_at(memory, &pages, at) else { continue };
        let places: Vec<usize> = (0..SPACE_BYTES - 3)
            .step_by(4)
            .filter(|place| pointed.iter().all(|space| u32_le(&space.bytes, *place) == Some(space.id)))
            .collect();
        if !places.is_empty() {
            found.push((at, places, pointed));
        }
    }
    let pointers = Witness::new(
        found.iter().map(|(at, _, _)| *at).collect(),
        format!("leads to the tablespace of {} pages", pages.len()),
    );
    let pointer = Finding::of(Some(pointers), code.space());
    let named = pointer.value.and_then(|at| code.space_id(at));
    let known = found.into_iter().find(|(at, _, _)| pointer.value == Some(*at));
    fields.insert("block.space", pointer);
    let Some((_, places, known)) = known else {
        let why = format!(
            "no pointer in the blocks leads to the tablespaces (pages of {ENOUGH_SPACES} tablespaces at least must be in the pool)"
        );
        fields.extend(ALL.into_iter().skip(1).map(|name| (name, Finding::missing(why.clone()))));
        return;
    };
    let says = format!("id of {} tablespaces", known.len());
    fields.insert("space.id", Finding::of(Some(Witness::new(places, says)), named));
    find_versions(&pages, &known, code, id_at, fields);
    let may_be_bool = (0..SPACE_BYTES).filter(|at| known.iter().all(|space| space.bytes[*at] <= 1)).collect();
    let deleted = Witness::new(may_be_bool, format!("0 or 1 in {} tablespaces", known.len()));
    let deleted = match code.deleted() {
        Some(code) => Finding::of(Some(deleted), Some(code)),
        None => Finding::missing("the program has no fil_space_t::is_deleted that would say which"),
    };
    fields.insert("space.deleted", deleted);
    fields.insert("space.flags", find_flags(&known, spaces, code));
    fields.insert("node.space", find_node(memory, &known, spaces));
}

/// The tablespaces that blocks point to at an offset; `None` when it is no such pointer, or leads to too few.
fn spaces_at<M: Memory>(memory: &M, pages: &[&Sample], at: usize) -> Option<Vec<Space>> {
    let mut ids: BTreeMap<u64, u32> = BTreeMap::new();
    for page in pages {
        let address = page.word(at);
        let (id, _) = page.page()?;
        if !is_address(address) || *ids.entry(address).or_insert(id) != id {
            return None;
        }
    }
    let distinct: BTreeSet<u32> = ids.values().copied().collect();
    if distinct.len() < ENOUGH_SPACES || distinct.len() != ids.len() {
        return None;
    }
    let spaces = ids.into_iter().map(|(address, id)| {
        let mut bytes = vec![0; SPACE_BYTES];
        memory.read(address, &mut bytes).ok()?;
        Some(Space { address, id, bytes })
    });
    spaces.collect()
}

/// The version of a tablespace, and what it was when each page was loaded. Mostly 0, so the code must say where.
fn find_versions(
    pages: &[&Sample],
    known: &[Space],
    code: &Evidence,
    id_at: usize,
    fields: &mut BTreeMap<&'static str, Finding>,
) {
    let small = (0..SPACE_BYTES - 3).step_by(4).filter(|at| {
        known.iter().all(|space| u32_le(&space.bytes, *at).is_some_and(|value| value < 1 << 16))
    });
    let small = Witness::new(small.collect(), format!("small in {} tablespaces", known.len()));
    let space_version = match code.space_version() {
        Some(code) => Finding::of(Some(small), Some(code)),
        None => Finding::missing("the program has no fil_space_t::get_recent_version that would say which"),
    };
    let place = space_version.value;
    fields.insert("space.version", space_version);
    let version = match (place, code.version()) {
        (Some(place), Some(mut code)) => {
            code.places.retain(|at| *at != id_at);
            let now: BTreeMap<u32, Option<u32>> =
                known.iter().map(|space| (space.id, u32_le(&space.bytes, place))).collect();
            let bytes = pages.first().map_or(0, |page| page.block.len());
            // Pages of a table that was emptied keep an older version until they are freed: one in twenty may.
            let places = (0..bytes.saturating_sub(3)).step_by(4).filter(|at| {
                let same = pages.iter().filter(|page| {
                    page.page().and_then(|(id, _)| now.get(&id).copied().flatten())
                        == u32_le(&page.block, *at)
                });
                same.count() * 20 >= pages.len() * 19
            });
            let says = format!("version of the tablespace in {} pages", pages.len());
            Finding::of(Some(Witness::new(places.collect(), says)), Some(code))
        }
        (_, None) => Finding::missing("the program has no buf_page_t::was_stale that would say which"),
        (None, _) => Finding::missing("it is told by the tablespaces' versions, which are not known"),
    };
    fields.insert("block.version", version);
}

/// The flags in memory are those of page 0 of the file.
fn find_flags(known: &[Space], spaces: &Spaces, code: &Evidence) -> Finding {
    let with_file: Vec<(&Space, u32)> =
        known.iter().filter_map(|space| Some((space, spaces.get(space.id)?.header.flags.0))).collect();
    let set = with_file.iter().filter(|(_, flags)| *flags != 0).count();
    if set < ENOUGH_SPACES {
        return Finding::missing(format!(
            "flags of {set} tablespaces' files are known; {ENOUGH_SPACES} are needed"
        ));
    }
    let places = (0..SPACE_BYTES - 3)
        .step_by(4)
        .filter(|at| with_file.iter().all(|(space, flags)| u32_le(&space.bytes, *at) == Some(*flags)));
    let says = format!("flags in page 0 of {} files", with_file.len());
    Finding::of(Some(Witness::new(places.collect(), says)), code.flags())
}

/// A tablespace's first file node points back to it, and to the name of its file.
fn find_node<M: Memory>(memory: &M, known: &[Space], spaces: &Spaces) -> Finding {
    let with_file: Vec<(&Space, String)> = known
        .iter()
        .filter_map(|space| {
            let name = spaces.get(space.id)?.name.file_name()?.to_string_lossy().into_owned();
            Some((space, name))
        })
        .collect();
    if with_file.len() < ENOUGH_SPACES {
        return Finding::missing(format!(
            "files of {} tablespaces are known; {ENOUGH_SPACES} are needed",
            with_file.len()
        ));
    }
    let mut places = Vec::new();
    for at in (0..SPACE_BYTES).step_by(8) {
        let mut common: Option<Vec<usize>> = None;
        for (space, name) in &with_file {
            let back = u64_le(&space.bytes, at)
                .filter(|node| is_address(*node))
                .map(|node| places_back(memory, node, space.address, name))
                .unwrap_or_default();
            common = Some(match common {
                None => back,
                Some(before) => before.into_iter().filter(|place| back.contains(place)).collect(),
            });
            if common.as_ref().is_some_and(Vec::is_empty) {
                break;
            }
        }
        places.extend(common.unwrap_or_default());
    }
    let says = format!(
        "file nodes of {} tablespaces point back to them, and have their files' names",
        with_file.len()
    );
    Finding::of(Some(Witness::new(places, says)), None)
}

/// Where what may be a file node points back to its tablespace; nowhere when it does not have the file's name.
fn places_back<M: Memory>(memory: &M, node: u64, space: u64, name: &str) -> Vec<usize> {
    let mut bytes = vec![0; NODE_BYTES];
    if memory.read(node, &mut bytes).is_err() {
        return Vec::new();
    }
    let words: Vec<u64> = bytes.chunks_exact(8).filter_map(|word| u64_le(word, 0)).collect();
    // A node of this space, but not of one that lies within the next node of an array.
    let has_name =
        words.iter().any(|word| *word >= 0x1_0000 && *word < 1 << 47 && ends_with(memory, *word, name));
    if !has_name {
        return Vec::new();
    }
    words.iter().enumerate().filter(|(_, word)| **word == space).map(|(index, _)| index * 8).collect()
}

/// Whether a text in memory is a path that ends with a file's name.
fn ends_with<M: Memory>(memory: &M, address: u64, name: &str) -> bool {
    // Not across a page's end, behind which nothing may be mapped.
    let room = (4096 - address % 4096).min(NAME_BYTES as u64) as usize;
    let mut bytes = vec![0; room];
    if memory.read(address, &mut bytes).is_err() {
        return false;
    }
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    text.rsplit(|byte| *byte == b'/').next() == Some(name.as_bytes())
}
