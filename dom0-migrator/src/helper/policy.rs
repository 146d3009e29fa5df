//! When to stop the pre-copy: the phase-switch, made explicit.
//!
//! libxenguest asks twice a round. Before a pass it tells how many pages the log of dirty pages has marked; on "stop" it sends these
//! while the domain still runs, and suspends then. After a pass it does not know the number; on "stop" it suspends at once. Its own policy
//! stops when fewer than 50 pages are marked, or after five rounds, whatever the downtime will be.
//!
//! This one does the same, and departs from it in three cases only, each of which costs no downtime:
//! * **after five rounds, the estimated downtime is above the limit, and rounds still shrink**: it goes on, for the next one makes it shorter;
//! * **after five rounds, it is above the limit, and rounds no longer shrink** (a stall): as [`OnStall`] says;
//! * **before, it is within the limit, and rounds no longer shrink**: it stops, for another round would send the same pages again in vain.
//!
//! Before the suspension the references that are outstanding are drained, while the guest runs on. If that took long, what was marked
//! meanwhile is sent before the domain is suspended ([`Policy::drained`]): slow storage then costs time, and no downtime.
//!
//! # The estimate
//! Of the pass before, `dirty` pages were marked within `interval` seconds, and sending them takes `dirty / rate`. While they are sent,
//! `dirty / interval × dirty / rate` more are marked, as long as the guest writes as fast as before; these are what is sent while the domain
//! is suspended. The rate is measured in bytes that left for the network, so pages that go by reference or as markers do not
//! flatter it.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::engine::xen_stream::PAGE;
use crate::xen::guest::{Precopy, PrecopyStats};

/// Rounds after which the stock policy stops (`SPP_MAX_ITERATIONS` in `xg_sr_save.c`).
pub const STOCK_ROUNDS: u32 = 5;
/// Dirty pages under which it stops (`SPP_TARGET_DIRTY_COUNT`).
pub const FEW_DIRTY_PAGES: u64 = 50;
/// Rounds after which this one stops whatever happens.
pub const MOST_ROUNDS: u32 = 30;
/// A round shrinks when it has fewer than this many hundredths of the pages of the one before.
const SHRINKS: u64 = 90;
/// Bytes of a pass from which the rate is taken: fewer may lie in buffers on the way.
const MEASURED_BYTES: u64 = 8 << 20;

/// A drain that took longer was long enough for pages to be marked that are worth a round.
const LONG_DRAIN: Duration = Duration::from_millis(50);

/// What to do when rounds no longer shrink and the downtime would be above the limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OnStall {
    /// Stop all the same, as the stock policy does
    #[default]
    Stop,
    /// Go on, up to 30 rounds
    Continue,
    /// Give up: the domain runs on here
    Abort,
}

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The downtime that is accepted, in milliseconds.
    pub max_downtime_ms: u64,
    /// What to do when it cannot be had.
    pub on_stall: OnStall,
}

impl Limits {
    /// 300 ms, and stop.
    pub const DEFAULT: Self = Self { max_downtime_ms: 300, on_stall: OnStall::Stop };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Where the pre-copy stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Rounds that are done.
    pub rounds: u32,
    /// Pages to be sent in the next one, before it; nothing after one.
    pub dirty: Option<u64>,
    /// Bytes that have left for the network.
    pub bytes_sent: u64,
    /// Time since the migration began.
    pub at: Duration,
}

impl Observed {
    /// What libxenguest tells, with what it does not know.
    pub fn new(stats: PrecopyStats, bytes_sent: u64, at: Duration) -> Self {
        Self { rounds: stats.iteration, dirty: u64::try_from(stats.dirty_count).ok(), bytes_sent, at }
    }
}

/// Why it was decided so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing speaks for the end yet.
    GoOn,
    /// So few pages are dirty that more rounds are of no use.
    FewPages,
    /// The stock policy would stop here, and the downtime is within the limit (or cannot be estimated).
    Rounds,
    /// The downtime is within the limit, and another round would not make it shorter.
    WithinLimit,
    /// The downtime is above the limit, and the next round makes it shorter.
    StillShrinks,
    /// The downtime is above the limit, and rounds no longer make it shorter.
    Stalled,
    /// There were too many rounds.
    MostRounds,
    /// The end was decided before, and the drain took long: what was marked meanwhile goes first.
    Drained,
}

/// What was decided, with the numbers that it was decided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// The answer.
    pub answer: Precopy,
    /// Why.
    pub reason: Reason,
    /// What was seen.
    pub observed: Observed,
    /// Dirty pages of the last two rounds, the later one first.
    pub dirty: [Option<u64>; 2],
    /// Bytes a second, as measured last.
    pub rate: Option<u64>,
    /// The downtime if it were stopped now.
    pub downtime: Option<Duration>,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let answer = match self.answer {
            Precopy::Continue => "go on",
            Precopy::StopAndCopy => "stop and copy",
            Precopy::Abort => "give up",
        };
        let why = match self.reason {
            Reason::GoOn => "no limit is reached",
            Reason::FewPages => "few pages are dirty",
            Reason::Rounds => "enough rounds",
            Reason::WithinLimit => "within the limit, and rounds no longer shrink",
            Reason::StillShrinks => "above the limit, and rounds still shrink",
            Reason::Stalled => "above the limit, and rounds no longer shrink",
            Reason::MostRounds => "too many rounds",
            Reason::Drained => "decided before the drain, and pages marked during it go first",
        };
        write!(f, "after {} rounds: {answer} ({why}); ", self.observed.rounds)?;
        match self.dirty {
            [Some(last), Some(before)] => write!(f, "{last} pages dirty, {before} before")?,
            [Some(last), None] => write!(f, "{last} pages dirty")?,
            [None, _] => write!(f, "dirty pages not known yet")?,
        }
        if let Some(rate) = self.rate {
            write!(f, ", {:.1} MB/s", rate as f64 / 1e6)?;
        }
        match self.downtime {
            Some(downtime) => write!(f, ", downtime about {:.0} ms", downtime.as_secs_f64() * 1e3),
            None => write!(f, ", downtime not known"),
        }
    }
}

/// The policy and what it remembers.
#[derive(Clone, Debug)]
pub struct Policy {
    limits: Limits,
    /// Dirty pages of the last two rounds, the later one first; the first round, of all pages, is none.
    dirty: [Option<u64>; 2],
    /// Time within which the later of these were marked.
    interval: Duration,
    /// When the pass under way began, and the bytes sent until then.
    pass: Option<(Duration, u64)>,
    rate: Option<u64>,
    /// The end is decided: it comes with the next count of pages.
    ends_at_count: bool,
}

impl Policy {
    /// With these limits.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            dirty: [None; 2],
            interval: Duration::ZERO,
            pass: None,
            rate: None,
            ends_at_count: false,
        }
    }

    /// Decides.
    pub fn decide(&mut self, observed: Observed) -> Decision {
        match observed.dirty {
            Some(dirty) => self.before_pass(observed, dirty),
            None => self.after_pass(observed),
        }
        let downtime = self.downtime();
        let limit = Duration::from_millis(self.limits.max_downtime_ms);
        let above = downtime.is_some_and(|downtime| downtime > limit);
        let within = downtime.is_some_and(|downtime| downtime <= limit);
        let (answer, reason) = if self.ends_at_count {
            let answer = if observed.dirty.is_some() { Precopy::StopAndCopy } else { Precopy::Continue };
            (answer, Reason::Drained)
        } else if observed.dirty.is_some_and(|dirty| dirty < FEW_DIRTY_PAGES) {
            (Precopy::StopAndCopy, Reason::FewPages)
        } else if observed.rounds >= MOST_ROUNDS {
            (Precopy::StopAndCopy, Reason::MostRounds)
        } else if observed.rounds >= STOCK_ROUNDS && !above {
            (Precopy::StopAndCopy, Reason::Rounds)
        } else if observed.rounds >= STOCK_ROUNDS && self.shrinks() {
            (Precopy::Continue, Reason::StillShrinks)
        } else if observed.rounds >= STOCK_ROUNDS {
            let answer = match self.limits.on_stall {
                OnStall::Stop => Precopy::StopAndCopy,
                OnStall::Continue => Precopy::Continue,
                OnStall::Abort => Precopy::Abort,
            };
            (answer, Reason::Stalled)
        } else if observed.dirty.is_some() && within && !self.shrinks() {
            (Precopy::StopAndCopy, Reason::WithinLimit)
        } else {
            (Precopy::Continue, Reason::GoOn)
        };
        Decision { answer, reason, observed, dirty: self.dirty, rate: self.rate, downtime }
    }

    /// All references are settled, after the end was decided: the answer that libxenguest gets now. After a long drain it is to go on
    /// until the next count, so that what was marked meanwhile is sent while the domain runs; [`decide`](Self::decide) then says
    /// stop.
    pub fn drained(&mut self, took: Duration) -> Precopy {
        if took <= LONG_DRAIN || self.ends_at_count {
            return Precopy::StopAndCopy;
        }
        self.ends_at_count = true;
        Precopy::Continue
    }

    fn before_pass(&mut self, observed: Observed, dirty: u64) {
        if let Some((began, _)) = self.pass {
            self.dirty = [Some(dirty), self.dirty[0]];
            // The log was cleaned when the last pass began, and again now.
            self.interval = observed.at.saturating_sub(began);
        }
        self.pass = Some((observed.at, observed.bytes_sent));
    }

    fn after_pass(&mut self, observed: Observed) {
        let Some((began, bytes_before)) = self.pass else { return };
        let bytes = observed.bytes_sent.saturating_sub(bytes_before);
        let took = observed.at.saturating_sub(began).as_micros().max(1) as u64;
        if bytes >= MEASURED_BYTES || self.rate.is_none() {
            self.rate = Some((bytes.saturating_mul(1_000_000) / took).max(1));
        }
    }

    /// Whether the last round had noticeably fewer pages than the one before; also while that is not known.
    fn shrinks(&self) -> bool {
        match self.dirty {
            [Some(last), Some(before)] => last.saturating_mul(100) < before.saturating_mul(SHRINKS),
            _ => true,
        }
    }

    /// The downtime to be expected if the pages that are marked now are sent and the domain is suspended then.
    fn downtime(&self) -> Option<Duration> {
        let (dirty, rate) = (self.dirty[0]? as f64, self.rate? as f64 / PAGE as f64);
        let interval = self.interval.as_secs_f64();
        if interval <= 0.0 {
            return None;
        }
        let sending = dirty / rate;
        let left = dirty / interval * sending;
        Duration::try_from_secs_f64(left / rate).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What libxenguest does without a policy.
    fn stock(observed: Observed) -> Precopy {
        let few = observed.dirty.is_some_and(|dirty| dirty < FEW_DIRTY_PAGES);
        if few || observed.rounds >= STOCK_ROUNDS { Precopy::StopAndCopy } else { Precopy::Continue }
    }

    /// A guest that writes so many pages a second into a working set, and a link.
    #[derive(Clone, Copy, Debug)]
    struct World {
        pages: u64,
        dirtied: f64,
        working_set: f64,
        rate: f64,
    }

    /// The outcome: downtime in seconds (none when it was given up), rounds, and why it ended.
    fn migrate(
        world: World,
        mut decide: impl FnMut(Observed) -> (Precopy, Option<Reason>),
    ) -> (Option<f64>, u32, Option<Reason>) {
        let (mut at, mut bytes_sent, mut rounds, mut dirty) = (0.0_f64, 0_u64, 0, world.pages);
        loop {
            let observed = |rounds, dirty, bytes_sent, at| Observed {
                rounds,
                dirty,
                bytes_sent,
                at: Duration::from_secs_f64(at),
            };
            let (answer, reason) = decide(observed(rounds, Some(dirty), bytes_sent, at));
            if answer == Precopy::Abort {
                return (None, rounds, reason);
            }
            let took = (dirty * PAGE as u64) as f64 / world.rate;
            at += took;
            bytes_sent += dirty * PAGE as u64;
            let left = (world.dirtied * took).min(world.working_set) as u64;
            let downtime = Some((left * PAGE as u64) as f64 / world.rate);
            rounds += 1;
            if answer == Precopy::StopAndCopy {
                return (downtime, rounds, reason);
            }
            match decide(observed(rounds, None, bytes_sent, at)) {
                (Precopy::Continue, _) => dirty = left,
                (Precopy::StopAndCopy, reason) => return (downtime, rounds, reason),
                (Precopy::Abort, reason) => return (None, rounds, reason),
            }
        }
    }

    fn with_policy(world: World, limits: Limits) -> (Option<f64>, u32, Option<Reason>) {
        let mut policy = Policy::new(limits);
        migrate(world, |observed| {
            let decision = policy.decide(observed);
            assert!(!decision.to_string().is_empty());
            (decision.answer, Some(decision.reason))
        })
    }

    const BUSY: World = World { pages: 262_144, dirtied: 20_000.0, working_set: 50_000.0, rate: 125e6 };

    #[test]
    fn a_quiet_guest_is_stopped_when_few_pages_are_dirty() {
        let quiet = World { dirtied: 100.0, ..BUSY };
        assert!(matches!(with_policy(quiet, Limits::DEFAULT), (Some(_), 3, Some(Reason::FewPages))));
    }

    #[test]
    fn a_round_that_shrinks_is_worth_more_than_five() {
        // Each round has two thirds of the pages of the one before.
        let (downtime, rounds, _) = with_policy(BUSY, Limits { max_downtime_ms: 100, ..Limits::DEFAULT });
        let (stock_downtime, stock_rounds, _) = migrate(BUSY, |observed| (stock(observed), None));
        assert!(
            stock_rounds == 5 && rounds > 5 && downtime < stock_downtime,
            "{rounds}, {downtime:?}, {stock_downtime:?}"
        );
        assert!(downtime.unwrap() < 0.15);
    }

    #[test]
    fn a_stall_ends_as_it_was_asked_for() {
        let stalled = World { dirtied: 1e6, ..BUSY };
        let ended = |on_stall| with_policy(stalled, Limits { on_stall, ..Limits::DEFAULT });
        assert!(matches!(ended(OnStall::Stop), (Some(_), STOCK_ROUNDS, Some(Reason::Stalled))));
        assert!(matches!(ended(OnStall::Continue), (Some(_), MOST_ROUNDS, Some(Reason::MostRounds))));
        assert!(matches!(ended(OnStall::Abort), (None, STOCK_ROUNDS, Some(Reason::Stalled))));
    }

    #[test]
    fn rounds_in_vain_are_spared() {
        // Always the same thousand pages: 33 ms.
        let small = World { dirtied: 1e6, working_set: 1000.0, ..BUSY };
        assert!(matches!(with_policy(small, Limits::DEFAULT), (Some(_), 3, Some(Reason::WithinLimit))));
    }

    #[test]
    fn after_a_long_drain_what_it_cost_is_sent_first() {
        let observed = |rounds, dirty| Observed { rounds, dirty, bytes_sent: 0, at: Duration::ZERO };
        let mut policy = Policy::new(Limits::DEFAULT);
        assert_eq!(policy.decide(observed(2, Some(10))).answer, Precopy::StopAndCopy);
        assert_eq!(policy.drained(Duration::from_secs(3)), Precopy::Continue);
        assert_eq!(policy.decide(observed(3, None)).answer, Precopy::Continue);
        let last = policy.decide(observed(3, Some(100_000)));
        assert_eq!((last.answer, last.reason), (Precopy::StopAndCopy, Reason::Drained));
        assert_eq!(policy.drained(Duration::from_secs(3)), Precopy::StopAndCopy);
        assert_eq!(Policy::new(Limits::DEFAULT).drained(Duration::from_millis(1)), Precopy::StopAndCopy);
    }

    #[test]
    fn numbers_are_in_the_log() {
        let mut policy = Policy::new(Limits::DEFAULT);
        let at = Duration::from_secs;
        policy.decide(Observed { rounds: 0, dirty: Some(100_000), bytes_sent: 0, at: at(0) });
        policy.decide(Observed { rounds: 1, dirty: None, bytes_sent: 409_600_000, at: at(4) });
        let decision =
            policy.decide(Observed { rounds: 1, dirty: Some(10_000), bytes_sent: 409_600_000, at: at(4) });
        assert_eq!(
            decision.to_string(),
            "after 1 rounds: go on (no limit is reached); 10000 pages dirty, 102.4 MB/s, downtime about 40 ms"
        );
    }

    proptest! {
        /// In a world where the guest writes evenly: never a longer downtime than the stock policy's, unless within the limit.
        #[test]
        fn downtime_is_not_above_the_stock_policy_s(
            pages in 1_000_u64..4_000_000,
            dirtied in 0.0_f64..2e6,
            working_set in 0.0_f64..1e6,
            rate in 1e6_f64..5e9,
            max_downtime_ms in 0_u64..2_000,
            go_on in any::<bool>(),
        ) {
            // A working set is part of the guest.
            let world = World { pages, dirtied, working_set: working_set.min(pages as f64), rate };
            let on_stall = if go_on { OnStall::Continue } else { OnStall::Stop };
            let (downtime, rounds, reason) = with_policy(world, Limits { max_downtime_ms, on_stall });
            let (stock_downtime, stock_rounds, _) = migrate(world, |observed| (stock(observed), None));
            let (downtime, stock_downtime) = (downtime.unwrap(), stock_downtime.unwrap());
            // Pages are whole: one in fifty is what rounding may make of a small number.
            let page = PAGE as f64 / rate;
            prop_assert!(
                downtime <= stock_downtime + page || downtime <= max_downtime_ms as f64 / 1e3 + page,
                "{} s, stock {} s, {:?} after {} rounds, stock {}", downtime, stock_downtime, reason, rounds, stock_rounds
            );
            prop_assert!(rounds <= MOST_ROUNDS + 1);
        }

        /// Whatever it is told, it ends, and gives up only where that was asked for.
        #[test]
        fn it_always_ends(
            told in proptest::collection::vec((any::<u64>(), any::<u64>(), 0_u64..1_000_000_000), 64),
            max_downtime_ms in any::<u64>(),
            on_stall in prop_oneof![Just(OnStall::Stop), Just(OnStall::Continue), Just(OnStall::Abort)],
        ) {
            let mut policy = Policy::new(Limits { max_downtime_ms, on_stall });
            for (index, (dirty, bytes_sent, milliseconds)) in told.into_iter().enumerate() {
                let rounds = (index as u32).div_ceil(2);
                let dirty = index.is_multiple_of(2).then_some(dirty);
                let observed = Observed { rounds, dirty, bytes_sent, at: Duration::from_millis(milliseconds) };
                let decision = policy.decide(observed);
                prop_assert!(decision.answer != Precopy::Abort || on_stall == OnStall::Abort);
                if dirty.is_some_and(|dirty| dirty < FEW_DIRTY_PAGES) || rounds >= MOST_ROUNDS {
                    prop_assert_eq!(decision.answer, Precopy::StopAndCopy);
                }
                if decision.answer != Precopy::Continue {
                    return Ok(());
                }
            }
            prop_assert!(false, "still going on");
        }
    }
}
