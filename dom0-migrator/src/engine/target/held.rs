//! The references that are held: by number, and by PFN once somebody asks.

use crate::engine::numbered::Numbered;
use crate::engine::pfn_hash::PfnMap;

/// A reference for which libxenguest has nothing yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) pfn: u64,
    pub(super) offset: u64,
    pub(super) disk: u8,
    pub(super) waits_for_reader: bool,
}

/// All of them; of each PFN one at most.
#[derive(Debug, Default)]
pub(super) struct HeldReferences {
    held: Numbered<Held>,
    /// Numbers by PFN. In a pass PFNs ascend, so that nobody asks for any of those that are held, and only who asks has them noted: from then on
    /// until nothing is held.
    by_pfn: Option<PfnMap<u64>>,
    /// No PFN of these is higher.
    highest: u64,
}

impl HeldReferences {
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Holds one more. Its number is higher than all before it, and its PFN was [superseded](Self::supersede) before.
    pub(super) fn hold(&mut self, number: u64, held: Held) {
        self.highest = if self.is_empty() { held.pfn } else { self.highest.max(held.pfn) };
        if let Some(by_pfn) = &mut self.by_pfn {
            by_pfn.insert(held.pfn, number);
        }
        self.held.push(number, held);
    }

    /// The one of this number.
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Held> {
        self.held.get_mut(number)
    }

    /// Whether the one of this number is held still.
    pub(super) fn contains(&self, number: u64) -> bool {
        self.held.get(number).is_some()
    }

    /// Holds it no more.
    pub(super) fn take(&mut self, number: u64) -> Option<Held> {
        let held = self.held.take(number)?;
        if self.held.is_empty() {
            self.by_pfn = None;
        } else if let Some(by_pfn) = &mut self.by_pfn {
            by_pfn.remove(&held.pfn);
        }
        Some(held)
    }

    /// Holds the PFN's no more, if there is one; its number, and what it was.
    pub(super) fn supersede(&mut self, pfn: u64) -> Option<(u64, Held)> {
        if self.is_empty() || pfn > self.highest {
            return None;
        }
        let held = &self.held;
        let by_pfn =
            self.by_pfn.get_or_insert_with(|| held.iter().map(|(number, held)| (held.pfn, number)).collect());
        let number = *by_pfn.get(&pfn)?;
        Some((number, self.take(number)?))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn held(pfn: u64) -> Held {
        Held { pfn, offset: pfn << 12, disk: 1, waits_for_reader: true }
    }

    proptest! {
        /// PFNs that are held, superseded and handed on in any order, some of them over and over.
        #[test]
        fn of_each_pfn_the_last_is_held(steps in proptest::collection::vec((0_u64..40, 0_u8..4, any::<prop::sample::Index>()), 0..200)) {
            let mut table = HeldReferences::default();
            let mut model: BTreeMap<u64, u64> = BTreeMap::new();
            for ((pfn, kind, which), number) in steps.into_iter().zip(0..) {
                if kind == 3 {
                    let number = which.index(number as usize + 1) as u64;
                    let before = model.iter().find(|(_, held)| **held == number).map(|(pfn, _)| *pfn);
                    prop_assert_eq!(table.contains(number), before.is_some());
                    prop_assert_eq!(table.take(number).map(|held| held.pfn), before);
                    before.map(|pfn| model.remove(&pfn));
                } else {
                    let superseded = table.supersede(pfn).map(|(number, held)| (held.pfn, number));
                    prop_assert_eq!(superseded, model.remove_entry(&pfn));
                    if kind != 0 {
                        table.hold(number, held(pfn));
                        model.insert(pfn, number);
                    }
                }
                prop_assert!(table.len() == model.len() && table.is_empty() == model.is_empty());
            }
        }
    }
}
