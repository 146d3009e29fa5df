//! Tables by a number that ascends: what comes is appended, and found by counting.
//!
//! Most of what is in such a table is taken out about in the order in which it was put in, so it lies in a queue, and its number says where. What is
//! left of numbers long past is moved to a table by hash, so that one that stays for as long as it can takes no more memory than itself.

use std::collections::VecDeque;

use super::pfn_hash::PfnMap;
use super::xen_stream::MAX_BATCH;

/// Places in the queue for each that is there, and some more, for a few records whose references are taken out in no order.
const PLACES: usize = 2;
const FEW_PLACES: usize = 4 * MAX_BATCH;

/// The table.
#[derive(Debug)]
pub struct Numbered<T> {
    /// Those from number `first` on; none: it was taken out, or never put in.
    recent: VecDeque<Option<T>>,
    first: u64,
    /// Those before it.
    old: PfnMap<T>,
    count: usize,
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self { recent: VecDeque::new(), first: 0, old: PfnMap::default(), count: 0 }
    }
}

impl<T> Numbered<T> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Puts one in. Its number must be higher than all before it.
    pub fn push(&mut self, number: u64, value: T) {
        if self.recent.is_empty() {
            self.first = number;
        }
        let next = self.first + self.recent.len() as u64;
        debug_assert!(number >= next, "{number} after {next}");
        if number - next > FEW_PLACES as u64 {
            while !self.recent.is_empty() {
                self.pass_over_first();
            }
            self.first = number;
        }
        while self.first + (self.recent.len() as u64) < number {
            self.recent.push_back(None);
        }
        self.recent.push_back(Some(value));
        self.count += 1;
        self.give_up_places();
    }

    /// There are no more places than may be.
    fn give_up_places(&mut self) {
        self.forget_taken();
        while self.recent.len() > PLACES * self.count + FEW_PLACES {
            self.pass_over_first();
            self.forget_taken();
        }
    }

    /// The queue's first place is given up.
    fn pass_over_first(&mut self) {
        if let Some(place) = self.recent.pop_front() {
            self.old.extend(place.map(|value| (self.first, value)));
            self.first += 1;
        }
    }

    /// Places in front that are empty.
    fn forget_taken(&mut self) {
        while let Some(None) = self.recent.front() {
            self.recent.pop_front();
            self.first += 1;
        }
    }

    /// The one of this number.
    pub fn get(&self, number: u64) -> Option<&T> {
        match number.checked_sub(self.first) {
            Some(index) => self.recent.get(usize::try_from(index).ok()?)?.as_ref(),
            None => self.old.get(&number),
        }
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        match number.checked_sub(self.first) {
            Some(index) => self.recent.get_mut(usize::try_from(index).ok()?)?.as_mut(),
            None => self.old.get_mut(&number),
        }
    }

    /// Takes the one of this number out.
    pub fn take(&mut self, number: u64) -> Option<T> {
        let taken = match number.checked_sub(self.first) {
            Some(index) => self.recent.get_mut(usize::try_from(index).ok()?)?.take(),
            None => self.old.remove(&number),
        }?;
        self.count -= 1;
        self.give_up_places();
        Some(taken)
    }

    /// All that are there with their numbers, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        let recent = (self.first..).zip(&self.recent);
        let old = self.old.iter().map(|(&number, value)| (number, value));
        old.chain(recent.filter_map(|(number, place)| Some((number, place.as_ref()?))))
    }

    /// Places that it has for those that are there.
    #[cfg(test)]
    pub fn places(&self) -> usize {
        self.recent.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    impl<T> Numbered<T> {
        fn has_few_places(&self) -> bool {
            self.recent.len() <= PLACES * self.len() + FEW_PLACES && self.old.len() <= self.len()
        }
    }

    /// One that stays takes no memory for those that come and go behind it.
    #[test]
    fn one_that_stays_keeps_no_places() {
        let mut table = Numbered::default();
        for number in 0..10 * FEW_PLACES as u64 {
            table.push(number, number);
            assert!(number == 7 || table.take(number).is_some());
            assert!(table.has_few_places());
        }
        assert!(table.len() == 1 && table.get(7) == Some(&7));
        assert_eq!((table.take(7), table.take(7)), (Some(7), None));
    }

    /// Nor do numbers that are never put in.
    #[test]
    fn a_gap_takes_no_places() {
        let mut table = Numbered::default();
        let numbers = [3, 5, 1 << 40, (1 << 40) + 1, 1 << 62];
        for number in numbers {
            table.push(number, number);
            assert!(table.has_few_places() && table.get(number - 1).is_none_or(|_| number == (1 << 40) + 1));
        }
        for number in numbers {
            assert_eq!(table.take(number), Some(number));
        }
        assert!(table.is_empty() && table.iter().next().is_none());
    }

    proptest! {
        #[test]
        fn it_is_what_a_map_is(
            steps in proptest::collection::vec((0_u64..3, prop_oneof![9 => Just(0_u64), 1 => 0_u64..10_000], any::<prop::sample::Index>()), 0..300),
        ) {
            let mut table = Numbered::default();
            let mut model = BTreeMap::new();
            let mut next = 0;
            for (kind, gap, which) in steps {
                let number = which.index(next as usize + 1) as u64;
                match kind {
                    0 | 1 => {
                        next += gap;
                        table.push(next, next * 3);
                        model.insert(next, next * 3);
                        next += 1;
                    }
                    _ => {
                        prop_assert_eq!(table.get(number), model.get(&number));
                        prop_assert_eq!(table.get_mut(number), model.get_mut(&number));
                        prop_assert_eq!(table.take(number), model.remove(&number));
                    }
                }
                prop_assert!(table.len() == model.len() && table.has_few_places());
            }
            let found: BTreeMap<_, _> = table.iter().map(|(number, &value)| (number, value)).collect();
            prop_assert_eq!(found, model);
        }
    }
}
