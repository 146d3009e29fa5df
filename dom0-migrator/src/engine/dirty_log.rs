//! Xen's log of dirty pages, looked at without clearing it.
//!
//! libxenguest reads the log and clears it (CLEAN) before every pass but the first, and once more when the domain is suspended; it then sends all
//! that was marked. A look in between (PEEK) clears nothing. So a page that a look finds marked will be in what libxenguest reads next, and
//! need not be sent before: `docs/stream.md` has the rule, and the source's filter keeps it.

use std::io;

/// The log of a domain that is being saved.
pub trait DirtyLog: std::fmt::Debug + Send + Sync {
    /// Copies the log: PFN n is bit n % 64 of word n / 64. `bits` comes with whatever it was used for last.
    ///
    /// The domain stands still meanwhile, and no other operation on the log may be begun: call it on the thread that clears the log.
    ///
    /// # Errors
    /// What the hypervisor says.
    fn peek(&self, bits: &mut Vec<u64>) -> io::Result<()>;

    /// For each of these pages whether the domain has none there now: Xen takes a page that is removed from a PVH or HVM guest out of the log.
    ///
    /// # Errors
    /// What the hypervisor says.
    fn are_gone(&self, pfns: &[u64]) -> io::Result<Vec<bool>>;
}

/// What a look at the log has found.
#[derive(Clone, Debug)]
pub struct Look {
    /// The round in which it was taken: after the log was cleared for it, and before it was cleared for the next one.
    pub round: u32,
    /// The log.
    pub bits: Vec<u64>,
}

impl Look {
    /// Whether the page is marked.
    pub fn is_marked(&self, pfn: u64) -> bool {
        let word = usize::try_from(pfn / 64).ok().and_then(|index| self.bits.get(index));
        word.is_some_and(|word| word >> (pfn % 64) & 1 == 1)
    }
}

/// A set of PFNs, as bits.
#[derive(Clone, Debug, Default)]
pub struct PfnSet {
    bits: Vec<u64>,
    count: u64,
}

impl PfnSet {
    /// Adds one.
    pub fn insert(&mut self, pfn: u64) {
        let index = (pfn / 64) as usize;
        if self.bits.len() <= index {
            self.bits.resize(index + 1, 0);
        }
        if let Some(word) = self.bits.get_mut(index) {
            self.count += u64::from(*word >> (pfn % 64) & 1 == 0);
            *word |= 1 << (pfn % 64);
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, pfn: u64) {
        if self.count == 0 {
            return;
        }
        if let Some(word) = usize::try_from(pfn / 64).ok().and_then(|index| self.bits.get_mut(index)) {
            self.count -= *word >> (pfn % 64) & 1;
            *word &= !(1 << (pfn % 64));
        }
    }

    /// All of them, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0_u64..).zip(&self.bits).filter(|(_, word)| **word != 0).flat_map(|(index, &word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 64 + bit)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_set_of_pfns_is_a_set(steps in proptest::collection::vec((0_u64..300, any::<bool>()), 0..80)) {
            let (mut set, mut model) = (PfnSet::default(), BTreeSet::new());
            for (pfn, is_added) in steps {
                if is_added {
                    set.insert(pfn);
                    model.insert(pfn);
                } else {
                    set.remove(pfn);
                    model.remove(&pfn);
                }
                prop_assert_eq!(set.count, model.len() as u64);
            }
            prop_assert!(set.iter().eq(model.iter().copied()));
            let look = Look { round: 0, bits: set.bits.clone() };
            prop_assert!((0..400).all(|pfn| look.is_marked(pfn) == model.contains(&pfn)));
        }
    }
}
