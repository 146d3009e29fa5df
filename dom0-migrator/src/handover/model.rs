//! All of the hand-over, walked through: both commands, both xl, both disks, the domain's two copies and the connection between
//! them are one world; every step that any of them can take, every message lost or late, every process ended and either host gone
//! down at every point, leads to the next ones, until there are no new ones. The states and what is to be done in them are those of
//! the real thing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Duty, SourceEvent, SourceState, State, TargetEvent, TargetState, Verdict};

/// A copy of the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Copied {
    Absent,
    /// Suspended or paused.
    Still,
    Runs,
}

/// A command that works on a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Command {
    /// It has ended, or was ended.
    Gone,
    /// `migrate`, or `receive`'s session: the first one.
    First,
    /// One that found the record: `resolve`, or `receive` begun again.
    Finder,
}

/// The source's xl. What it does by itself it may do at any time later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum SourceXl {
    /// Sends; when its transport ends, it resumes the domain.
    Sends,
    /// Has said GO, which the carrier holds.
    SaidGo,
    /// Was answered that the target runs it: it destroys its copy.
    ToldRuns,
    /// Was answered that the target does not run it: it resumes its copy.
    ToldNot,
    Gone,
}

/// The target's xl.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum TargetXl {
    Receives,
    WaitsForGo,
    /// Was told GO: it starts the domain, sooner or later, or fails to.
    ToldGo,
    /// Has said that it could not, and has destroyed it.
    SaidNot,
    /// Has said that it runs.
    SaidRuns,
    Gone,
}

/// What is on its way. Each may arrive late, in any order, or never.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Message {
    /// On the first connection: a session of now takes it, a later one does not.
    Given,
    Ask,
    Verdict(Verdict),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct World {
    source: SourceState,
    target: TargetState,
    source_command: Command,
    target_command: Command,
    source_xl: SourceXl,
    target_xl: TargetXl,
    source_copy: Copied,
    target_copy: Copied,
    messages: BTreeSet<Message>,
    /// Someone waits for the verdict at the target.
    asked: bool,
    /// The first command has sent `Given`.
    sent_given: bool,
    source_host_fell: bool,
    target_host_fell: bool,
}

/// A step, and whether it is a misfortune: one that nobody can count on to happen.
struct Step {
    what: &'static str,
    misfortune: bool,
    world: World,
}

impl World {
    fn begin() -> Self {
        Self {
            source: SourceState::Sending,
            target: TargetState::Receiving,
            source_command: Command::First,
            target_command: Command::First,
            source_xl: SourceXl::Sends,
            target_xl: TargetXl::Receives,
            source_copy: Copied::Runs,
            target_copy: Copied::Absent,
            messages: BTreeSet::new(),
            asked: false,
            sent_given: false,
            source_host_fell: false,
            target_host_fell: false,
        }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        self.source_steps(&mut steps);
        self.target_steps(&mut steps);
        self.misfortunes(&mut steps);
        steps
    }

    fn to(&self, what: &'static str, change: impl FnOnce(&mut Self)) -> Step {
        let mut world = self.clone();
        change(&mut world);
        Step { what, misfortune: false, world }
    }

    fn source_steps(&self, steps: &mut Vec<Step>) {
        // xl by itself.
        match self.source_xl {
            SourceXl::Sends => {
                if self.source_copy == Copied::Runs {
                    steps.push(self.to("suspend", |w| w.source_copy = Copied::Still));
                }
                if self.source_copy == Copied::Still && self.target_xl == TargetXl::WaitsForGo {
                    steps.push(self.to("say GO", |w| w.source_xl = SourceXl::SaidGo));
                }
                // Its transport broke, or it failed.
                steps.push(self.to("xl fails and resumes", |w| {
                    w.source_xl = SourceXl::Gone;
                    w.resume_source();
                }));
            }
            SourceXl::SaidGo => {
                // The carrier ended: xl leaves everything as it is.
                if self.source_command == Command::Gone {
                    steps.push(self.to("xl leaves it", |w| w.source_xl = SourceXl::Gone));
                }
            }
            SourceXl::ToldRuns => steps.push(self.to("xl destroys", |w| {
                w.source_xl = SourceXl::Gone;
                w.source_copy = Copied::Absent;
            })),
            SourceXl::ToldNot => steps.push(self.to("xl resumes", |w| {
                w.source_xl = SourceXl::Gone;
                w.resume_source();
            })),
            SourceXl::Gone => {}
        }
        // The command.
        match self.source_command {
            Command::Gone => {
                if !self.source_host_fell || self.source.duty() != Duty::Nothing {
                    // Whoever finds the record first ends what is left of xl.
                    steps.push(self.to("resolve at the source", |w| {
                        w.source_command = Command::Finder;
                        w.source_xl = SourceXl::Gone;
                    }));
                }
            }
            Command::First if self.source == SourceState::Sending => {
                if self.source_xl == SourceXl::SaidGo {
                    steps.push(self.to("write given", |w| w.step_source(SourceEvent::Permission)));
                }
                // xl has ended; or it is cancelled, and xl answered that the target does not run it.
                steps.push(self.to("give up at the source", |w| {
                    w.step_source(SourceEvent::GaveUp);
                    w.answer_xl(SourceXl::ToldNot);
                }));
            }
            Command::First | Command::Finder => self.source_duty(steps),
        }
        if self.source_command != Command::Gone && self.source == SourceState::Given {
            for verdict in [Verdict::Runs, Verdict::Discarded, Verdict::Lost] {
                if self.messages.contains(&Message::Verdict(verdict)) {
                    steps.push(self.to("hear the verdict", |w| {
                        w.messages.remove(&Message::Verdict(verdict));
                        w.step_source(SourceEvent::Verdict(verdict));
                    }));
                }
            }
        }
    }

    fn source_duty(&self, steps: &mut Vec<Step>) {
        match self.source.duty() {
            Duty::TakeBack => steps.push(self.to("take back", |w| w.step_source(SourceEvent::GaveUp))),
            Duty::Ask => {
                if self.source_command == Command::First && !self.sent_given {
                    steps.push(self.to("send given", |w| {
                        w.sent_given = true;
                        w.messages.insert(Message::Given);
                    }));
                } else {
                    steps.push(self.to("ask", |w| {
                        w.messages.insert(Message::Ask);
                    }));
                }
            }
            Duty::Resume => {
                // The first command lets xl do it, and does what xl has left.
                if matches!(self.source_xl, SourceXl::SaidGo) {
                    steps.push(self.to("answer xl: not", |w| w.answer_xl(SourceXl::ToldNot)));
                }
                if self.source_xl == SourceXl::Gone {
                    if self.source_copy == Copied::Still {
                        steps.push(self.to("resume", Self::resume_source));
                    } else {
                        steps.push(self.to("write resumed", |w| w.step_source(SourceEvent::Resumed)));
                    }
                }
            }
            Duty::RemoveCopy => {
                if matches!(self.source_xl, SourceXl::SaidGo) {
                    steps.push(self.to("answer xl: runs", |w| w.answer_xl(SourceXl::ToldRuns)));
                }
                if self.source_xl == SourceXl::Gone {
                    if self.source_copy == Copied::Absent {
                        steps.push(self.to("write removed", |w| w.step_source(SourceEvent::Removed)));
                    } else {
                        steps.push(self.to("destroy", |w| w.source_copy = Copied::Absent));
                    }
                }
            }
            Duty::Nothing => steps.push(self.to("end at the source", |w| w.source_command = Command::Gone)),
            other => panic!("{other:?} is not the source's"),
        }
    }

    fn target_steps(&self, steps: &mut Vec<Step>) {
        match self.target_xl {
            TargetXl::Receives if self.source_copy == Copied::Still && self.target_copy == Copied::Absent => {
                steps.push(self.to("memory complete", |w| w.target_copy = Copied::Still));
            }
            // xl says "ready", which the session writes down before it passes it on.
            TargetXl::Receives
                if self.target_copy == Copied::Still
                    && self.target_command == Command::First
                    && self.target == TargetState::Receiving =>
            {
                steps.push(self.to("write ready", |w| {
                    w.step_target(TargetEvent::Complete);
                    w.target_xl = TargetXl::WaitsForGo;
                }));
            }
            TargetXl::ToldGo => {
                steps.push(self.to("xl starts it", |w| {
                    w.target_xl = TargetXl::SaidRuns;
                    if w.target_copy == Copied::Still {
                        w.target_copy = Copied::Runs;
                    }
                }));
            }
            _ => {}
        }
        match self.target_command {
            Command::Gone => steps.push(self.to("begin again at the target", |w| {
                w.target_command = Command::Finder;
                w.target_xl = TargetXl::Gone;
            })),
            Command::First => self.session_steps(steps),
            Command::Finder => self.target_duty(steps),
        }
        if self.target_command != Command::Gone && self.messages.contains(&Message::Ask) {
            steps.push(self.to("be asked", |w| {
                w.messages.remove(&Message::Ask);
                w.asked = true;
                if matches!(w.target, TargetState::Receiving | TargetState::Ready) {
                    w.step_target(TargetEvent::GaveUp);
                }
            }));
        }
        if self.target_command != Command::Gone
            && self.asked
            && let Some(verdict) = self.target.verdict()
        {
            steps.push(self.to("answer", |w| {
                w.asked = false;
                w.messages.insert(Message::Verdict(verdict));
            }));
        }
    }

    fn session_steps(&self, steps: &mut Vec<Step>) {
        if self.messages.contains(&Message::Given) {
            steps.push(self.to("take given", |w| {
                w.messages.remove(&Message::Given);
                w.asked = true;
                // Whatever is not ready refuses it.
                if w.target == TargetState::Ready {
                    w.step_target(TargetEvent::Given);
                } else if w.target == TargetState::Receiving {
                    w.step_target(TargetEvent::GaveUp);
                }
            }));
        }
        match self.target {
            TargetState::Receiving | TargetState::Ready => {
                steps.push(self.to("give up at the target", |w| w.step_target(TargetEvent::GaveUp)));
            }
            TargetState::Accepted => match self.target_xl {
                TargetXl::WaitsForGo => steps.push(self.to("pass GO", |w| w.target_xl = TargetXl::ToldGo)),
                TargetXl::SaidRuns => {
                    steps.push(self.to("write running", |w| w.step_target(TargetEvent::Started)));
                }
                TargetXl::SaidNot => {
                    steps.push(self.to("write not started", |w| w.step_target(TargetEvent::NotStarted)));
                }
                TargetXl::Gone => self.target_duty(steps),
                TargetXl::Receives | TargetXl::ToldGo => {}
            },
            _ => self.target_duty(steps),
        }
    }

    fn target_duty(&self, steps: &mut Vec<Step>) {
        match self.target.duty() {
            Duty::Discard => steps.push(self.to("discard", |w| w.step_target(TargetEvent::GaveUp))),
            Duty::Start => match self.target_copy {
                Copied::Absent => steps.push(self.to("write lost", |w| w.step_target(TargetEvent::NotThere))),
                Copied::Still => steps.push(self.to("start", |w| w.target_copy = Copied::Runs)),
                Copied::Runs => steps.push(self.to("write running", |w| w.step_target(TargetEvent::Started))),
            },
            Duty::RemoveIncoming => {
                if self.target_copy == Copied::Absent {
                    steps.push(self.to("write removed", |w| w.step_target(TargetEvent::Removed)));
                } else {
                    steps.push(self.to("destroy incoming", |w| {
                        w.target_copy = Copied::Absent;
                        w.target_xl = TargetXl::Gone;
                    }));
                }
            }
            Duty::Nothing => {}
            other => panic!("{other:?} is not the target's"),
        }
    }

    fn misfortunes(&self, steps: &mut Vec<Step>) {
        let mut push = |what, change: &dyn Fn(&mut Self)| {
            let mut step = self.to(what, change);
            step.misfortune = true;
            steps.push(step);
        };
        for &message in &self.messages {
            push("lose a message", &|w| {
                w.messages.remove(&message);
            });
        }
        // A delayed message stays where it is, and an Ask may be repeated; that is all a connection can do.
        if self.source_command != Command::Gone {
            push("end the source's command", &|w| w.source_command = Command::Gone);
        }
        if self.target_command != Command::Gone {
            push("end the target's command", &|w| {
                w.target_command = Command::Gone;
                w.asked = false;
                // `Given` belongs to the session's own connection.
                w.messages.remove(&Message::Given);
            });
        }
        if self.source_xl != SourceXl::Gone {
            push("end the source's xl", &|w| w.source_xl = SourceXl::Gone);
        }
        if self.target_xl != TargetXl::Gone {
            push("end the target's xl", &|w| w.target_xl = TargetXl::Gone);
        }
        if self.target_xl == TargetXl::ToldGo && self.target_copy == Copied::Still {
            push("xl cannot start it", &|w| {
                w.target_xl = TargetXl::SaidNot;
                w.target_copy = Copied::Absent;
            });
        }
        if !self.source_host_fell {
            push("the source's host falls", &|w| {
                w.source_host_fell = true;
                w.source_command = Command::Gone;
                w.source_xl = SourceXl::Gone;
                w.source_copy = Copied::Absent;
            });
        }
        if !self.target_host_fell {
            push("the target's host falls", &|w| {
                w.target_host_fell = true;
                w.target_command = Command::Gone;
                w.target_xl = TargetXl::Gone;
                w.target_copy = Copied::Absent;
                w.asked = false;
                w.messages.remove(&Message::Given);
            });
        }
    }

    fn step_source(&mut self, event: SourceEvent) {
        self.source = self.source.after(event).unwrap();
    }

    fn step_target(&mut self, event: TargetEvent) {
        self.target = self.target.after(event).unwrap();
    }

    fn resume_source(&mut self) {
        if self.source_copy == Copied::Still {
            self.source_copy = Copied::Runs;
        }
    }

    /// Only an xl that waits for an answer takes one; another one's transport ends.
    fn answer_xl(&mut self, answer: SourceXl) {
        if self.source_xl == SourceXl::SaidGo {
            self.source_xl = answer;
        }
    }

    /// What must hold always.
    fn check(&self) -> Result<(), &'static str> {
        let (source, target) = (self.source_copy == Copied::Runs, self.target_copy == Copied::Runs);
        if source && target {
            return Err("both run");
        }
        if source && !self.source.may_run() {
            return Err("the source runs it although its record forbids it");
        }
        if target && !self.target.may_run() {
            return Err("the target runs it although its record forbids it");
        }
        if self.source.may_run() && self.target.may_run() {
            return Err("both records permit it");
        }
        // No host has fallen: a whole copy is somewhere.
        let none = self.source_copy == Copied::Absent && self.target_copy == Copied::Absent;
        if none && !self.source_host_fell && !self.target_host_fell && self.target_xl != TargetXl::SaidNot {
            let lost = self.target == TargetState::Lost || self.source == SourceState::Stranded;
            if !lost {
                return Err("no copy is left");
            }
        }
        Ok(())
    }

    /// What is to come of it in the end.
    fn is_settled(&self) -> bool {
        let closed = self.source.duty() == Duty::Nothing && self.target.duty() == Duty::Nothing;
        let runs =
            [self.source_copy, self.target_copy].into_iter().filter(|copy| *copy == Copied::Runs).count();
        let fell = self.source_host_fell || self.target_host_fell;
        closed && (runs == 1 || fell || self.source == SourceState::Stranded)
    }
}

/// All worlds that can be reached, each with the steps that lead on from it.
fn explore() -> BTreeMap<World, Vec<(bool, &'static str, World)>> {
    let mut known: BTreeMap<World, Vec<(bool, &'static str, World)>> = BTreeMap::new();
    let mut came_from: BTreeMap<World, (World, &'static str)> = BTreeMap::new();
    let mut waiting = VecDeque::from([World::begin()]);
    while let Some(world) = waiting.pop_front() {
        if known.contains_key(&world) {
            continue;
        }
        if let Err(problem) = world.check() {
            let mut way = vec![format!("{world:#?}")];
            let mut at = &world;
            while let Some((before, what)) = came_from.get(at) {
                way.push((*what).to_owned());
                at = before;
            }
            way.reverse();
            panic!("{problem}:\n{}", way.join("\n"));
        }
        let mut onward = Vec::new();
        for step in world.steps() {
            if step.world != world {
                if !known.contains_key(&step.world) {
                    came_from.entry(step.world.clone()).or_insert_with(|| (world.clone(), step.what));
                    waiting.push_back(step.world.clone());
                }
                onward.push((step.misfortune, step.what, step.world));
            }
        }
        known.insert(world, onward);
    }
    known
}

#[test]
fn never_both_never_neither_and_always_a_way_out() {
    let worlds = explore();
    // Backwards from the settled ones, over steps that are nobody's misfortune.
    let mut before: BTreeMap<&World, Vec<&World>> = BTreeMap::new();
    for (world, onward) in &worlds {
        for (_, _, next) in onward.iter().filter(|(misfortune, _, _)| !misfortune) {
            before.entry(next).or_default().push(world);
        }
    }
    let mut settles: BTreeSet<&World> = worlds.keys().filter(|world| world.is_settled()).collect();
    let mut waiting: Vec<&World> = settles.iter().copied().collect();
    while let Some(world) = waiting.pop() {
        for &earlier in before.get(world).into_iter().flatten() {
            if settles.insert(earlier) {
                waiting.push(earlier);
            }
        }
    }
    let stuck = worlds.keys().find(|world| !settles.contains(world));
    assert!(stuck.is_none(), "no way out of {stuck:#?}");
    // The walk went where it should: both good ends, and the one that nobody wants.
    let ends = |source, target| worlds.keys().any(|w| w.source == source && w.target == target);
    assert!(ends(SourceState::Removed, TargetState::Running));
    assert!(ends(SourceState::Resumed, TargetState::Removed));
    assert!(ends(SourceState::Stranded, TargetState::Lost));
    assert!(worlds.len() > 5_000, "only {} worlds", worlds.len());
    eprintln!("{} worlds", worlds.len());
}

/// In doubt the domain stands at the source: complete, suspended, and nowhere running.
#[test]
fn in_doubt_it_stands_at_the_source() {
    for world in
        explore().keys().filter(|world| world.source == SourceState::Given && !world.source_host_fell)
    {
        assert_eq!(world.source_copy, Copied::Still, "{world:#?}");
    }
}

/// Without misfortune it ends as it should, whatever the order.
#[test]
fn nothing_wrong_nothing_doubtful() {
    let worlds = explore();
    for world in worlds.keys().filter(|world| world.is_settled() && world.source == SourceState::Removed) {
        assert!(world.target_copy == Copied::Runs || world.target_host_fell, "{world:#?}");
    }
}

/// Every step that the table does not name is refused, and changes nothing.
#[test]
fn steps_out_of_order_are_refused() {
    assert!(SourceState::Given.after(SourceEvent::GaveUp).is_err());
    assert!(SourceState::Sending.after(SourceEvent::Verdict(Verdict::Runs)).is_err());
    assert!(TargetState::Discarded.after(TargetEvent::Given).is_err());
    assert!(TargetState::Receiving.after(TargetEvent::Given).is_err());
    assert!(TargetState::Accepted.after(TargetEvent::GaveUp).is_err());
}
