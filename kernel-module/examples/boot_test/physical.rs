//! Physical memory, and the lists in it as dom0 would read them.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use enlightenment::list::{RootView, Slot, parse_index, parse_leaf, parse_root};
use enlightenment::{Generation, PAGE_SIZE, Pfn, Run};

/// `/proc/kcore`: an ELF file whose segments are the kernel's memory, with the physical address of each.
pub struct Physical {
    file: File,
    /// Physical address, size, and place in the file.
    segments: Vec<(u64, u64, u64)>,
}

impl Physical {
    /// Opens it.
    pub fn open() -> Result<Self> {
        let file = File::open("/proc/kcore").context("cannot open /proc/kcore")?;
        let mut header = [0; 64];
        file.read_exact_at(&mut header, 0).context("cannot read /proc/kcore")?;
        let count = u16::from_le_bytes([header[56], header[57]]);
        let table = u64::from_le_bytes(header[32..40].try_into()?);
        let mut segments = Vec::new();
        for i in 0..u64::from(count) {
            let mut entry = [0; 56];
            file.read_exact_at(&mut entry, table + i * 56)?;
            let field = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap_or_default());
            if entry[0] == 1 && field(24) != u64::MAX {
                segments.push((field(24), field(32), field(8)));
            }
        }
        Ok(Self { file, segments })
    }

    /// A page.
    pub fn page(&self, pfn: Pfn) -> Result<Vec<u8>> {
        let address = pfn.0 * PAGE_SIZE as u64;
        let (start, _, place) = self
            .segments
            .iter()
            .find(|(start, size, _)| (*start..start + size).contains(&address))
            .with_context(|| format!("/proc/kcore has no memory at {address:#x}"))?;
        let mut page = vec![0; PAGE_SIZE];
        self.file.read_exact_at(&mut page, place + (address - start))?;
        Ok(page)
    }

    /// What the root page says.
    pub fn root(&self, root: u64) -> Result<RootView> {
        Ok(parse_root(&self.page(Pfn(root))?)?)
    }

    /// All runs of the published generation.
    pub fn runs(&self, root: u64) -> Result<(Slot, Vec<Run>)> {
        let slot = self.root(root)?.active.context("nothing is published")?;
        let generation = Generation(slot.generation);
        let mut runs = Vec::new();
        let (mut index_pages, mut leaf_pages) = (0, 0);
        let mut next = (slot.index_pages > 0).then_some(Pfn(slot.first_index_pfn));
        while let Some(pfn) = next {
            let page = self.page(pfn)?;
            let index = parse_index(&page, generation)?;
            index_pages += 1;
            for leaf in index.leaves() {
                leaf_pages += 1;
                for run in parse_leaf(&self.page(leaf)?, generation)? {
                    runs.push(run?);
                }
            }
            next = index.next;
        }
        ensure!(
            (index_pages, leaf_pages, runs.len() as u64) == (slot.index_pages, slot.leaf_pages, slot.runs),
            "the root page counts {slot:?}, there are {index_pages} index pages, {leaf_pages} leaves, {} runs",
            runs.len()
        );
        Ok((slot, runs))
    }

    /// Where each listed page lies on disk, and in which list it is: PFN to (disk, offset, list).
    pub fn listed(&self, root: u64) -> Result<HashMap<u64, (u32, u64, u8)>> {
        let (_, runs) = self.runs(root)?;
        Ok(runs
            .iter()
            .flat_map(|run| {
                (0..u64::from(run.pages)).map(move |page| {
                    (run.pfn + page, (run.vdev, run.disk_offset + page * PAGE_SIZE as u64, run.list))
                })
            })
            .collect())
    }
}
