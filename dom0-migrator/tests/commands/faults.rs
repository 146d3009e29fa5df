//! The cells of the fault matrix that need both commands: before the helpers are connected, in the hand-over, and after it. Each says what
//! came of it in a line that `cargo xtask test --faults` gathers; the others are in `src/engine/tests/faults`.

use super::between::{Between, Late};
use super::*;

/// How long something is held up that goes on in the end.
const A_WHILE: Duration = Duration::from_millis(500);

fn cell(phase: &str, fault: &str, outcome: &str) {
    println!("CELL {phase} {fault} {outcome}");
}

/// A migration through a network of its own, as far as a phase: what happens then is the test's.
struct Way {
    source: Host,
    target: Host,
    receiver: Receiver,
    between: Between,
}

impl Way {
    fn new(fault: &str) -> Self {
        Self::with_late(fault, None)
    }

    fn with_late(fault: &str, late: Option<Late>) -> Self {
        let (source, target) = pair();
        let receiver = target.receive(fault, &[]);
        let between = Between::new(&receiver.address, late);
        Self { source, target, receiver, between }
    }

    fn start(&self) -> Migrating {
        self.source.start_migrate("", "db1", &self.between.address)
    }

    /// The target has written that it has permission; its xl waits for a word before it starts the domain.
    fn in_the_hand_over() -> (Self, Migrating) {
        let way = Self::new("target-waits-with-go");
        let migrating = way.start();
        wait_until("the hand-over", || way.target.records("status") == [("accepted".into(), true)]);
        (way, migrating)
    }

    fn say_the_word(&self) {
        fs::write(self.target.directory.path().join("go-on"), "").unwrap();
    }

    fn completed(&self) {
        runs_only_at(&self.target, &self.source);
        assert!(self.source.records("status").is_empty() && self.target.records("status").is_empty());
    }

    fn source_runs(&self) {
        wait_until("the target's end", || self.target.domains().is_empty());
        runs_only_at(&self.source, &self.target);
        assert!(self.source.records("status").is_empty() && self.target.records("status").is_empty());
    }

    /// A while later what is held up goes on.
    fn go_on_later(&self) {
        let between = self.between.clone();
        std::thread::spawn(move || {
            std::thread::sleep(A_WHILE);
            between.go_on();
        });
    }
}

mod offer {
    use super::*;

    #[test]
    fn stream_cut() {
        let way = Way::new("");
        way.between.cut();
        assert_eq!(way.start().wait().code, i32::from(EXIT_NOT_BEGUN));
        way.source_runs();
        cell("Offer", "StreamCut", "SourceRuns");
    }

    #[test]
    fn stream_stalled() {
        let way = Way::new("");
        way.between.hold_up();
        way.go_on_later();
        way.start().wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("Offer", "StreamStalled", "Completed");
    }

    #[test]
    fn side_cut() {
        let way = Way::with_late("", Some(Late::Never("\"side\"")));
        way.start().wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("Offer", "SideCut", "Completed");
    }

    #[test]
    fn side_stalled() {
        let way = Way::with_late("", Some(Late::By("\"side\"", A_WHILE)));
        way.start().wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("Offer", "SideStalled", "Completed");
    }

    #[test]
    fn reordered() {
        // The stream's connection comes after the side channel's, which was made later.
        let way = Way::with_late("", Some(Late::By("\"stream\"", A_WHILE)));
        way.start().wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("Offer", "Reordered", "Completed");
    }
}

mod hand_over {
    use super::*;

    #[test]
    fn source_helper_gone() {
        let (way, mut migrating) = Way::in_the_hand_over();
        migrating.kill();
        // Nobody can say at the source what became of it.
        assert_eq!(way.source.records("status"), [("given".into(), false)]);
        assert_eq!(way.source.state("db1--migratedaway"), "suspended");
        way.say_the_word();
        wait_until("the start", || way.target.state("db1") == "running");
        assert_eq!(way.source.run(&["resolve"]).0, 0);
        way.completed();
        cell("HandOver", "SourceHelperGone", "PausedAndResolved");
    }

    #[test]
    fn target_helper_gone() {
        let (mut way, migrating) = Way::in_the_hand_over();
        way.receiver.kill();
        assert_eq!(way.source.state("db1--migratedaway"), "suspended");
        let _again = way.target.receive_at(way.receiver.address.clone(), "", &[]);
        migrating.wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("HandOver", "TargetHelperGone", "Completed");
        // What the kernel ends for want of memory is gone in the same way.
        cell("HandOver", "MemoryRefused", "Completed");
    }

    #[test]
    fn stream_cut() {
        let (way, migrating) = Way::in_the_hand_over();
        way.between.cut();
        way.say_the_word();
        wait_until("the start", || way.target.state("db1") == "running");
        assert_eq!(way.source.state("db1--migratedaway"), "suspended");
        way.go_on_later();
        migrating.wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("HandOver", "StreamCut", "Completed");
    }

    #[test]
    fn stream_cut_for_good() {
        let (way, mut migrating) = Way::in_the_hand_over();
        way.between.cut();
        way.say_the_word();
        wait_until("the start", || way.target.state("db1") == "running");
        migrating.kill();
        // In doubt, it stays where it is, under a name that says so, and no attempt of the source's changes that.
        assert_eq!(way.source.run(&["resolve"]).0, i32::from(EXIT_UNDEFINED));
        assert_eq!(way.source.state("db1--migratedaway"), "suspended");
        way.between.go_on();
        assert_eq!(way.source.run(&["resolve"]).0, 0);
        way.completed();
        cell("HandOver", "SideCut", "PausedAndResolved");
    }

    #[test]
    fn stream_stalled() {
        let (way, migrating) = Way::in_the_hand_over();
        way.between.hold_up();
        way.say_the_word();
        wait_until("the start", || way.target.state("db1") == "running");
        way.go_on_later();
        migrating.wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("HandOver", "StreamStalled", "Completed");
        // By then all connections but the control connection have been closed; it is the one that stalls.
        cell("HandOver", "SideStalled", "Completed");
    }

    #[test]
    fn reordered() {
        // A question that the source asks on a connection of its own arrives while the first answer is still on its way.
        let (way, mut migrating) = Way::in_the_hand_over();
        way.between.hold_up();
        migrating.kill();
        way.say_the_word();
        wait_until("the start", || way.target.state("db1") == "running");
        let (code, said) = way.source.run(&["resolve", "db1", "--peer", &way.receiver.address]);
        assert_eq!(code, 0, "{said}");
        way.between.go_on();
        way.completed();
        cell("HandOver", "Reordered", "PausedAndResolved");
    }
}

mod after {
    use super::*;

    /// It runs at the target, and the source has not been told.
    fn untold() -> (Way, Migrating) {
        let (way, migrating) = Way::in_the_hand_over();
        way.between.hold_up();
        way.say_the_word();
        wait_until("the start", || {
            way.target.state("db1") == "running"
                && way.target.records("list") == [("running".to_owned(), false)]
        });
        (way, migrating)
    }

    #[test]
    fn source_helper_gone() {
        let (way, mut migrating) = untold();
        migrating.kill();
        way.between.go_on();
        assert_eq!(way.source.run(&["resolve"]).0, 0);
        way.completed();
        cell("After", "SourceHelperGone", "PausedAndResolved");
    }

    #[test]
    fn target_helper_gone() {
        let (mut way, migrating) = untold();
        way.receiver.kill();
        way.between.go_on();
        let _again = way.target.receive_at(way.receiver.address.clone(), "", &[]);
        migrating.wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("After", "TargetHelperGone", "Completed");
        cell("After", "MemoryRefused", "Completed");
    }

    #[test]
    fn stream_cut() {
        let (way, migrating) = untold();
        way.between.cut();
        way.go_on_later();
        migrating.wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("After", "StreamCut", "Completed");
        cell("After", "SideCut", "Completed");
    }

    #[test]
    fn stream_stalled() {
        let (way, migrating) = untold();
        way.go_on_later();
        migrating.wait().expect(EXIT_MIGRATED, "migrated");
        way.completed();
        cell("After", "StreamStalled", "Completed");
        cell("After", "SideStalled", "Completed");
        cell("After", "Reordered", "Completed");
    }
}
