//! Pages that are left out of a pass, since the log of dirty pages has marked them again.
//!
//! # The rule
//! A page of a record of round k may be left out if a look finds it marked that was taken **after the log was cleared for round k, and
//! before it was cleared for the last time**. Then the mark is in what libxenguest reads from the log next, and whatever it reads it sends: there
//! the page is sent, or it is left out by the same rule once more. What is sent after the suspension is never left out, so that ends.
//!
//! A look from before that clearing must not count: the mark that it saw is the very reason why the page is in round k, and is gone from the log.
//! libxenguest says when a round begins, in order: no record of round k comes before the filter has been told of it. So no record is of a later round than
//! the filter knows, and a look counts only if it was taken in that one.
//!
//! # Should the rule be wrong
//! What was left out is remembered until a newer entry for it comes. If there is any left when the memory ends, and the guest still has a page there,
//! the migration fails, and the domain runs on at the source: whoever else clears the log (nobody should) costs a migration and no byte.

use std::sync::Arc;

use crossbeam_channel::Sender;

use crate::engine::dirty_log::{DirtyLog, Look, PfnSet};

/// PFNs asked about at once.
const ASKED: usize = 1024;

/// What was left out, and what may be.
#[derive(Clone, Debug, Default)]
pub(super) struct LeftOut {
    log: Option<Arc<dyn DirtyLog>>,
    /// Where looks that are let go are used again.
    spare: Option<Sender<Vec<u64>>>,
    /// The round that libxenguest has begun last.
    round: Option<u32>,
    /// A look that was taken in this round.
    look: Option<Look>,
    /// Nothing may be left out any more.
    over: bool,
    /// Left out, and not sent since.
    owed: PfnSet,
}

impl LeftOut {
    pub(super) fn new(log: Option<Arc<dyn DirtyLog>>, spare: Option<Sender<Vec<u64>>>) -> Self {
        Self { log, spare, ..Self::default() }
    }

    fn let_go(&mut self, look: Option<Look>) {
        if let (Some(look), Some(spare)) = (look, &self.spare) {
            // Whoever would use it has one already.
            let _ = spare.try_send(look.bits);
        }
    }

    /// libxenguest begins a round: the log was cleared since what was seen in it.
    pub(super) fn enter(&mut self, round: u32) {
        self.round = Some(round);
        let old = self.look.take();
        self.let_go(old);
    }

    /// The domain is to be suspended: what comes is never left out.
    pub(super) fn end(&mut self) {
        self.over = true;
        let old = self.look.take();
        self.let_go(old);
    }

    /// A look was taken. Whether it counts.
    pub(super) fn see(&mut self, look: Look) -> bool {
        let counts = !self.over && self.round == Some(look.round);
        let old = if counts { self.look.replace(look) } else { Some(look) };
        self.let_go(old);
        counts
    }

    /// The look that counts.
    pub(super) fn look(&self) -> Option<&Look> {
        self.look.as_ref()
    }

    /// Whether a page that is to be sent may be left out.
    pub(super) fn may_leave(&self, pfn: u64) -> bool {
        self.look.as_ref().is_some_and(|look| look.is_marked(pfn))
    }

    /// It is left out.
    pub(super) fn leave(&mut self, pfn: u64) {
        self.owed.insert(pfn);
    }

    /// An entry for the page is sent.
    pub(super) fn sent(&mut self, pfn: u64) {
        self.owed.remove(pfn);
    }

    /// Whether nothing may be left out any more.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// The memory ends. Pages that were left out, that did not come later and that the guest still has: how many, and the first of them. A page of a
    /// PV guest (not `translated`) stays in the log though it is removed, so none of these is missing.
    pub(super) fn missing(&self, translated: bool) -> Option<(u64, u64)> {
        let mut missing: Option<(u64, u64)> = None;
        let mut owed = self.owed.iter().peekable();
        while owed.peek().is_some() {
            let pfns: Vec<u64> = owed.by_ref().take(ASKED).collect();
            let log = self.log.as_ref().filter(|_| translated);
            let gone = log.and_then(|log| log.are_gone(&pfns).ok()).unwrap_or_default();
            let is_gone = gone.into_iter().chain(std::iter::repeat(false));
            for (pfn, _) in pfns.into_iter().zip(is_gone).filter(|(_, is_gone)| !is_gone) {
                missing = Some(missing.map_or((1, pfn), |(count, first)| (count + 1, first)));
            }
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};

    use super::*;

    /// The page that all is about.
    const PFN: u64 = 70;

    /// What the filter is told in order, and what it is given: of one page, whose content is how often the guest has written to it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    enum Told {
        Round(u32),
        Suspending,
    }

    /// What libxenguest's thread does next.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    enum Save {
        Enter(u32),
        Write,
        Clean,
        Suspending,
        Suspend,
        Done,
    }

    /// Everything in it is as it can be seen from outside, but for the filter's part, which is the real one.
    #[derive(Clone, Debug)]
    struct World {
        rounds: u32,
        save: VecDeque<Save>,
        /// Writes and looks that may still come.
        writes: u8,
        looks: u8,
        // The guest and its log.
        content: u8,
        marked: bool,
        suspended: bool,
        /// Whether libxenguest has the page in its list.
        listed: bool,
        /// The round that a look is of now.
        look_round: Option<u32>,
        // On the way to the filter.
        told: VecDeque<Told>,
        told_in_all: usize,
        heard: usize,
        seen: VecDeque<(u32, bool)>,
        /// Records: the content, and how much was told before.
        records: VecDeque<(u8, usize)>,
        // The filter, and behind it.
        left_out: LeftOut,
        /// What waits for the wire; whether the last of them was sent since the last fence.
        waiting: VecDeque<u8>,
        last_may_go: bool,
        target: Option<u8>,
    }

    type Key = (
        (VecDeque<Save>, u8, u8, u8, bool, bool, bool, Option<u32>),
        (VecDeque<Told>, usize, usize, VecDeque<(u32, bool)>, VecDeque<(u8, usize)>),
        (Option<u32>, Option<bool>, bool, bool, VecDeque<u8>, bool, Option<u8>),
    );

    impl World {
        /// What the filter is told of the end: that the domain is to be suspended, and that the last pass begins.
        fn new(rounds: u32, writes: u8, looks: u8, (suspending, last): (bool, bool)) -> Self {
            let mut save = VecDeque::new();
            for round in 0..rounds {
                if round > 0 {
                    save.push_back(Save::Clean);
                }
                save.extend([Save::Enter(round), Save::Write]);
            }
            save.extend(suspending.then_some(Save::Suspending));
            save.extend([Save::Suspend, Save::Clean]);
            save.extend(last.then_some(Save::Enter(rounds)));
            save.extend([Save::Write, Save::Done]);
            Self {
                rounds,
                save,
                writes,
                looks,
                content: 0,
                marked: false,
                suspended: false,
                listed: true,
                look_round: None,
                told: VecDeque::new(),
                told_in_all: 0,
                heard: 0,
                seen: VecDeque::new(),
                records: VecDeque::new(),
                left_out: LeftOut::default(),
                waiting: VecDeque::new(),
                last_may_go: false,
                target: None,
            }
        }

        fn key(&self) -> Key {
            let out = &self.left_out;
            let look = out.look.as_ref().map(|look| look.is_marked(PFN));
            (
                (
                    self.save.clone(),
                    self.writes,
                    self.looks,
                    self.content,
                    self.marked,
                    self.suspended,
                    self.listed,
                    self.look_round,
                ),
                (self.told.clone(), self.told_in_all, self.heard, self.seen.clone(), self.records.clone()),
                (
                    out.round,
                    look,
                    out.over,
                    out.owed.iter().next().is_none(),
                    self.waiting.clone(),
                    self.last_may_go,
                    self.target,
                ),
            )
        }

        /// All worlds that may come next.
        fn next(&self) -> Vec<Self> {
            let mut worlds = Vec::new();
            let mut may = |is_possible: bool, step: fn(&mut Self)| {
                if is_possible {
                    let mut world = self.clone();
                    step(&mut world);
                    worlds.push(world);
                }
            };
            may(self.writes > 0 && !self.suspended, |world| {
                world.writes -= 1;
                world.content += 1;
                world.marked = true;
            });
            may(self.looks > 0 && self.look_round.is_some(), |world| {
                world.looks -= 1;
                let round = world.look_round.unwrap();
                world.seen.push_back((round, world.marked));
            });
            may(self.save.front().is_some_and(|save| *save != Save::Done), Self::save);
            may(!self.told.is_empty(), |world| {
                world.heard += 1;
                match world.told.pop_front().unwrap() {
                    Told::Round(round) => world.left_out.enter(round),
                    Told::Suspending => world.left_out.end(),
                }
            });
            may(!self.seen.is_empty(), |world| {
                let (round, is_marked) = world.seen.pop_front().unwrap();
                let bits = vec![0, u64::from(is_marked) << (PFN % 64)];
                if world.left_out.see(Look { round, bits })
                    && world.last_may_go
                    && world.left_out.may_leave(PFN)
                {
                    world.waiting.pop_back();
                    world.last_may_go = false;
                    world.left_out.leave(PFN);
                }
            });
            // No record comes before what was told before it was written.
            may(self.records.front().is_some_and(|(_, told)| *told <= self.heard), |world| {
                let (content, _) = world.records.pop_front().unwrap();
                // A second record of the page: a fence.
                world.last_may_go = false;
                if world.left_out.may_leave(PFN) {
                    world.left_out.leave(PFN);
                } else {
                    world.left_out.sent(PFN);
                    world.waiting.push_back(content);
                    world.last_may_go = true;
                }
            });
            may(!self.waiting.is_empty(), |world| {
                world.target = world.waiting.pop_front();
                world.last_may_go &= !world.waiting.is_empty();
            });
            worlds
        }

        fn tell(&mut self, told: Told) {
            self.told.push_back(told);
            self.told_in_all += 1;
        }

        fn save(&mut self) {
            match self.save.pop_front().unwrap() {
                Save::Enter(round) => {
                    self.look_round = Some(round).filter(|round| *round < self.rounds);
                    self.tell(Told::Round(round));
                }
                Save::Write => {
                    if std::mem::take(&mut self.listed) {
                        self.records.push_back((self.content, self.told_in_all));
                    }
                }
                Save::Clean => self.listed = std::mem::take(&mut self.marked),
                Save::Suspending => {
                    self.look_round = None;
                    self.tell(Told::Suspending);
                }
                Save::Suspend => self.suspended = true,
                Save::Done => {}
            }
        }
    }

    /// Every order of two writes of the guest, two looks, two rounds (or one look and three) and the suspension, and of what the filter does about them. Either of the two
    /// things that it is told of the end is enough.
    #[test]
    fn in_whatever_order_things_happen_the_last_content_arrives() {
        for told in [(true, false), (false, true), (true, true)] {
            all_orders(World::new(2, 2, 2, told));
        }
        all_orders(World::new(3, 2, 1, (true, false)));
    }

    fn all_orders(first: World) {
        let (mut seen, mut todo) = (HashSet::new(), vec![first]);
        let (mut ends, mut left) = (0, 0);
        while let Some(world) = todo.pop() {
            let next = world.next();
            if next.is_empty() {
                ends += 1;
                assert_eq!(world.target, Some(world.content), "{world:?}");
                assert_eq!(world.left_out.missing(false), None, "{world:?}");
            }
            left += usize::from(world.left_out.owed.iter().next().is_some());
            todo.extend(next.into_iter().filter(|world| seen.insert(world.key())));
        }
        // It is about something.
        let count = seen.len();
        assert!(count > 5_000 && ends > 4 && left > 200, "{count} worlds, {ends} ends, {left}");
    }
}
