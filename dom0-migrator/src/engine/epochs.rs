//! The order in which what is sent is written.

use std::collections::VecDeque;

/// What is sent between two fences.
#[derive(Debug)]
struct Epoch<P> {
    first: VecDeque<P>,
    rest: VecDeque<P>,
}

impl<P> Default for Epoch<P> {
    fn default() -> Self {
        Self { first: VecDeque::new(), rest: VecDeque::new() }
    }
}

/// What waits to be written, fence by fence.
#[derive(Debug)]
pub struct Epochs<P> {
    /// Never empty; only the last one is sent to.
    epochs: VecDeque<Epoch<P>>,
    parcels: usize,
}

impl<P> Default for Epochs<P> {
    fn default() -> Self {
        Self { epochs: VecDeque::from([Epoch::default()]), parcels: 0 }
    }
}

impl<P> Epochs<P> {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.parcels
    }

    /// What comes from here on is written after all that is here.
    pub fn fence(&mut self) {
        if self.epochs.back().is_some_and(|last| !last.first.is_empty() || !last.rest.is_empty()) {
            self.epochs.push_back(Epoch::default());
        }
    }

    /// One more; `first`: it overtakes what was not put first since the last fence.
    pub fn put(&mut self, parcel: P, first: bool) {
        if let Some(last) = self.epochs.back_mut() {
            let lane = if first { &mut last.first } else { &mut last.rest };
            lane.push_back(parcel);
            self.parcels += 1;
        }
    }

    /// The next one.
    pub fn take(&mut self) -> Option<P> {
        loop {
            let epoch = self.epochs.front_mut()?;
            if let Some(parcel) = epoch.first.pop_front().or_else(|| epoch.rest.pop_front()) {
                self.parcels -= 1;
                return Some(parcel);
            }
            if self.epochs.len() == 1 {
                return None;
            }
            self.epochs.pop_front();
        }
    }

    /// Of those since the last fence that were not put first: the one that has so many behind it.
    pub fn back_by(&mut self, behind: usize) -> Option<&mut P> {
        let rest = &mut self.epochs.back_mut()?.rest;
        let at = rest.len().checked_sub(behind + 1)?;
        rest.get_mut(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A thing that happens to a queue.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Send,
        SendFirst,
        Fence,
        Take,
    }

    proptest! {
        /// Nothing passes a fence, nothing is lost, each lane keeps its order, and what can be revised is what lies behind the last fence.
        #[test]
        fn only_what_is_sent_first_overtakes_and_no_fence(
            steps in proptest::collection::vec(
                prop_oneof![Just(Step::Send), Just(Step::SendFirst), Just(Step::Fence), Just(Step::Take)],
                0..80,
            )
        ) {
            let mut waiting = Epochs::default();
            // Each has its number and what it was sent as: fences before it, and whether it was sent first.
            let (mut sent, mut fences) = (0, 0);
            let (mut queued, mut taken): (Vec<(u32, u32, bool)>, Vec<_>) = (Vec::new(), Vec::new());
            for step in steps.iter().copied().chain(std::iter::repeat_n(Step::Take, 80)) {
                let parcel = (sent, fences, matches!(step, Step::SendFirst));
                match step {
                    Step::Fence => {
                        waiting.fence();
                        fences += 1;
                    }
                    Step::Send | Step::SendFirst => {
                        waiting.put(parcel, parcel.2);
                        sent += 1;
                        queued.push(parcel);
                    }
                    Step::Take => {
                        // The model: the oldest of those sent first in the oldest epoch that has any, or else the oldest there.
                        let epoch = queued.iter().map(|parcel| parcel.1).min();
                        let mut there = queued.iter().filter(|parcel| Some(parcel.1) == epoch);
                        let expected = there.clone().find(|parcel| parcel.2).or_else(|| there.next()).copied();
                        let found = waiting.take();
                        prop_assert_eq!(found, expected);
                        queued.retain(|parcel| Some(*parcel) != found);
                        taken.extend(found);
                    }
                }
                prop_assert_eq!(waiting.len(), queued.len());
                // A fence behind nothing is none.
                let last = queued.iter().map(|parcel| parcel.1).max().filter(|last| *last == fences);
                let revised: Vec<_> = (0..).map_while(|behind| waiting.back_by(behind).copied()).collect();
                let expected = queued.iter().rev().filter(|parcel| Some(parcel.1) == last && !parcel.2);
                prop_assert!(revised.iter().eq(expected), "{:?} of {:?}", revised, queued);
            }
            prop_assert_eq!(taken.len(), sent as usize);
        }
    }
}
