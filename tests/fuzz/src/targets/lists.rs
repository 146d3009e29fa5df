//! The lists that the guest publishes in its own memory.

use std::collections::BTreeMap;
use std::io;

use arbitrary::{Result, Unstructured};
use dom0_migrator::lists::{GuestMemory, walk as walk_lists};
use enlightenment::list::{INDEX_MAGIC, LEAF_MAGIC, NO_PFN, ROOT_MAGIC, parse_index, parse_leaf, parse_root};
use enlightenment::{ABI_VERSION, Generation, PAGE_SIZE, Pfn, Run};

/// The guest's last frame.
const LAST: u64 = 4095;
/// Where the root page is.
const ROOT: u64 = 10;
/// Pages of lists lie from here on.
const FIRST: u64 = 16;

/// One page, taken for each of the three kinds.
pub fn page(data: &[u8]) {
    let mut page = data.to_vec();
    page.resize(PAGE_SIZE, 0);
    for page in [data, &page] {
        if let Ok(root) = parse_root(page)
            && let Some(slot) = root.active
        {
            assert_ne!(slot.generation, 0);
        }
        let generation = crate::engine::xen_stream::u64_at(page, 8).unwrap_or(0);
        if let Ok(index) = parse_index(page, Generation(generation)) {
            assert!(index.leaves().count() * 8 <= PAGE_SIZE);
        }
        if let Ok(runs) = parse_leaf(page, Generation(generation)) {
            for run in runs.flatten() {
                run.check().unwrap();
                assert_eq!(Run::parse(&run.to_bytes()), Ok(run));
            }
        }
    }
}

/// A guest that writes its pages as it likes, also while they are read.
struct Guest<'c, 'd> {
    pages: BTreeMap<u64, Vec<u8>>,
    choices: &'c mut Unstructured<'d>,
    reads: u64,
}

impl Guest<'_, '_> {
    /// Changes a word of a page of the lists, most often to one that could stand there.
    fn scribble(&mut self) -> Result<()> {
        let pfn = if self.choices.arbitrary()? { ROOT } else { FIRST + self.choices.int_in_range(0..=7)? };
        let at = usize::from(self.choices.arbitrary::<u8>()?) % 64 * 8;
        let value = match self.choices.int_in_range(0..=3)? {
            0 => u64::from(self.choices.arbitrary::<u8>()?),
            1 => NO_PFN,
            2 => self.choices.arbitrary::<u64>()?,
            _ => u64::from(self.choices.arbitrary::<u16>()?),
        };
        if let Some(page) = self.pages.get_mut(&pfn) {
            page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }
}

impl GuestMemory for Guest<'_, '_> {
    fn last_pfn(&self) -> Pfn {
        Pfn(LAST)
    }

    fn pages(&mut self, pfns: &[Pfn]) -> io::Result<Vec<Option<Box<[u8]>>>> {
        self.reads += pfns.len() as u64;
        if self.choices.ratio(1, 8).unwrap_or(false) {
            let _ = self.scribble();
        }
        if self.choices.ratio(1, 64).unwrap_or(false) {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        Ok(pfns.iter().map(|pfn| self.pages.get(&pfn.0).map(|page| page.clone().into())).collect())
    }
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A page of runs as choices have them: some right, some not.
fn leaf(choices: &mut Unstructured<'_>, generation: u64) -> Result<Vec<u8>> {
    let mut page = vec![0; PAGE_SIZE];
    let count = choices.int_in_range(0..=8_u32)?;
    put(&mut page, 0, &LEAF_MAGIC.to_le_bytes());
    put(&mut page, 4, &count.to_le_bytes());
    put(&mut page, 8, &generation.to_le_bytes());
    for i in 0..count as usize {
        let wild = choices.ratio(1, 8)?;
        let pfn = if wild { choices.arbitrary()? } else { u64::from(choices.arbitrary::<u16>()? % 4200) };
        let run = Run {
            pfn,
            disk_offset: if wild {
                choices.arbitrary()?
            } else {
                u64::from(choices.arbitrary::<u16>()?) * 512
            },
            vdev: 51712 + u32::from(choices.arbitrary::<u8>()?),
            pages: choices.arbitrary::<u16>()? % if wild { u16::MAX } else { 64 },
            list: choices.int_in_range(1..=2)?,
            reserved: u8::from(wild),
        };
        put(&mut page, 16 + Run::SIZE * i, &run.to_bytes());
    }
    Ok(page)
}

/// The whole lists.
fn lists(choices: &mut Unstructured<'_>) -> Result<BTreeMap<u64, Vec<u8>>> {
    let generation = u64::from(choices.int_in_range(1..=3_u8)?);
    let mut pages = BTreeMap::new();
    let leaves = choices.int_in_range(0..=5_u64)?;
    for i in 0..leaves {
        pages.insert(FIRST + 2 + i, leaf(choices, generation)?);
    }
    let two = choices.arbitrary::<bool>()?;
    let split = if two { leaves / 2 } else { leaves };
    for (number, from, to, next) in
        [(0, 0, split, if two { FIRST + 1 } else { NO_PFN }), (1, split, leaves, NO_PFN)]
    {
        let mut page = vec![0; PAGE_SIZE];
        put(&mut page, 0, &INDEX_MAGIC.to_le_bytes());
        put(&mut page, 4, &((to - from) as u32).to_le_bytes());
        put(&mut page, 8, &generation.to_le_bytes());
        put(&mut page, 16, &u64::to_le_bytes(next));
        for (i, leaf) in (from..to).enumerate() {
            put(&mut page, 24 + 8 * i, &(FIRST + 2 + leaf).to_le_bytes());
        }
        pages.insert(FIRST + number, page);
    }
    let mut root = vec![0; PAGE_SIZE];
    put(&mut root, 0, &ROOT_MAGIC.to_le_bytes());
    put(&mut root, 8, &ABI_VERSION.to_le_bytes());
    put(&mut root, 12, &(PAGE_SIZE as u32).to_le_bytes());
    put(&mut root, 16, &generation.to_le_bytes());
    let slot = 64 + (generation & 1) as usize * 72;
    put(&mut root, slot, &generation.to_le_bytes());
    put(&mut root, slot + 8, &FIRST.to_le_bytes());
    put(&mut root, slot + 16, &(1 + u32::from(two)).to_le_bytes());
    put(&mut root, slot + 24, &leaves.to_le_bytes());
    pages.insert(ROOT, root);
    Ok(pages)
}

/// Whatever is written there and whenever: reading ends, soon, and names no page beyond the guest's memory.
pub fn walk(data: &[u8]) {
    let mut choices = Unstructured::new(data);
    let Ok(pages) = lists(&mut choices) else { return };
    let mut guest = Guest { pages, choices: &mut choices, reads: 0 };
    for _ in 0..guest.choices.int_in_range(0..=3).unwrap_or(0) {
        let _ = guest.scribble();
    }
    let walked = walk_lists(&mut guest, Pfn(ROOT));
    assert!(guest.reads <= 4 * (LAST + 3), "{} pages were read", guest.reads);
    let Ok(walked) = walked else { return };
    assert!(walked.map.len() <= LAST + 1 && walked.map.lookup(Pfn(LAST + 1)).is_none());
    let mut found = 0;
    for pfn in 0..=LAST {
        if let Some(place) = walked.map.lookup(Pfn(pfn)) {
            found += 1;
            assert!(place.offset.is_multiple_of(512) && place.offset.checked_add(PAGE_SIZE as u64).is_some());
            assert!(usize::from(place.disk) < walked.map.vdevs().len());
        }
    }
    assert_eq!(found, walked.map.len());
}
