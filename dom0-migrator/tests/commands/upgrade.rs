//! This release's commands against those of the one before: a host is upgraded, its neighbour is not yet; or a host is upgraded while a
//! migration is open. Their filters are in `tests/versions.rs`.
//!
//! `cargo xtask test upgrade` builds the other release from git, and says where it is.

use super::*;

impl Host {
    /// One that has the release before.
    fn of_before() -> Self {
        Self::new().before()
    }

    /// The same host with the release before.
    fn before(self) -> Self {
        let programs = std::env::var_os("POOLSKIP_PREVIOUS").map(PathBuf::from);
        let programs = programs.expect("POOLSKIP_PREVIOUS is not set: use `cargo xtask test upgrade`");
        Self { program: programs.join("dom0-migrator"), ..self }
    }

    /// The same host, upgraded.
    fn upgraded(self) -> Self {
        Self { program: env!("CARGO_BIN_EXE_dom0-migrator").into(), ..self }
    }
}

/// Both ways: the source upgraded first, or the target. A domain runs at the source.
fn neighbours() -> [(Host, Host); 2] {
    [
        (Host::new().with_domain(3, "db1"), Host::of_before()),
        (Host::of_before().with_domain(3, "db1"), Host::new()),
    ]
}

/// `migrate` with options, to its end.
fn migrate_with(source: &Host, address: &str, options: &[&str]) -> Ended {
    let json = source.directory.path().join("summary.json");
    let mut command = source.command("");
    command.args(["migrate", "db1", address]).args(&source.connecting).args(options).arg("--json").arg(&json);
    Migrating { child: command.spawn().unwrap(), json }.wait()
}

#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn a_domain_goes_between_neighbouring_releases_and_back() {
    for (source, target) in neighbours() {
        let receiver = target.receive("", &[]);
        source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
        runs_only_at(&target, &source);
        // The stand-in for xl gives what it receives the number 7 there, and here again.
        let back = source.receive("", &[]);
        target.migrate("", "db1", &back.address).expect(EXIT_MIGRATED, "migrated");
        runs_only_at(&source, &target);
    }
}

/// The source could run its helper. A target of another version of the stream says so, one of the same that no Xen is there; either is believed.
#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn where_the_other_release_cannot_a_plain_migration_follows_and_is_said() {
    for (source, target) in neighbours() {
        let source = source.on_xen();
        let receiver = target.receive("", &[]);
        let ended = migrate_with(&source, &receiver.address, &[]).expect(EXIT_MIGRATED, "migrated");
        let said = ended.stderr.split_once("a plain migration with libxl's own helper follows: ");
        let (_, why) = said.unwrap_or_else(|| panic!("{}", ended.stderr));
        assert!(why.starts_with("the source's helper speaks") || why.starts_with("at the target: "), "{why}");
        assert_eq!(ended.summary["pages_referenced"], serde_json::Value::Null, "{:#}", ended.summary);
        runs_only_at(&target, &source);
    }
}

#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn hosts_with_certificates_know_each_other() {
    let (all, own) = certificates();
    for (source, target) in neighbours() {
        let source = source.with_certificates(&all.path().join("host-b"));
        let target = target.with_certificates(&own);
        let receiver = target.receive("", &[]);
        source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
        runs_only_at(&target, &source);
    }
}

/// What only one of them knows is done without: connections and compression.
#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn what_only_this_release_knows_is_done_without() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::of_before());
    let receiver = target.receive("", &[]);
    let options = ["--stock", "--connections", "4", "--compress", "zstd"];
    migrate_with(&source, &receiver.address, &options).expect(EXIT_MIGRATED, "migrated");
    runs_only_at(&target, &source);
}

/// The source is killed in the hand-over and asks later, when one side or the other has been upgraded.
#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn a_hand_over_that_was_cut_off_is_resolved_across_releases() {
    for (source, target) in neighbours() {
        let receiver = target.receive("target-waits-with-go", &[]);
        let mut migrating = source.start_migrate("", "db1", &receiver.address);
        wait_until("the hand-over", || target.records("status") == [("accepted".into(), true)]);
        migrating.kill();
        fs::write(target.directory.path().join("go-on"), "").unwrap();
        wait_until("the start", || target.state("db1") == "running");
        assert_eq!(source.run(&["resolve"]).0, 0);
        runs_only_at(&target, &source);
    }
}

/// Both hosts are upgraded, or taken back to the release before, while a domain stands between them: what one release has written down the
/// other reads.
#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn what_was_written_down_before_an_upgrade_is_resolved_after_it() {
    for up in [true, false] {
        let (source, target) = pair();
        let (source, target) = if up { (source.before(), target.before()) } else { (source, target) };
        let mut receiver = target.receive("target-holds-go", &[]);
        let mut migrating = source.start_migrate("", "db1", &receiver.address);
        wait_until("the hand-over", || target.records("status") == [("accepted".into(), true)]);
        migrating.kill();
        receiver.kill();
        let (source, target) =
            if up { (source.upgraded(), target.upgraded()) } else { (source.before(), target.before()) };
        assert_eq!(source.records("status"), [("given".into(), false)]);
        assert_eq!(source.state("db1--migratedaway"), "suspended");
        // It settles what it finds when it begins.
        let again = target.receive_at(receiver.address.clone(), "", &[]);
        assert_eq!(source.run(&["resolve"]).0, 0);
        runs_only_at(&target, &source);
        drop(again);
    }
}

/// A question that only this release knows is answered by silence at worst, and disturbs nothing.
#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn a_question_that_the_other_does_not_know_disturbs_nothing() {
    let (source, target) = (Host::new().with_domain(3, "db1"), Host::of_before());
    let receiver = target.receive("", &[]);
    let (code, said) = source.run(&["check", "db1", &receiver.address, "--plain", "--json"]);
    assert!(code >= 0, "check was killed: {said}");
    assert_eq!((source.domains(), target.domains()), (vec!["db1".to_owned()], vec![]));
    source.migrate("", "db1", &receiver.address).expect(EXIT_MIGRATED, "migrated");
    runs_only_at(&target, &source);
}

/// Helpers that speak different versions are not begun: a target says so before anything is, whichever of the two is the older one.
#[test]
#[ignore = "needs the release before: `cargo xtask test upgrade`"]
fn helpers_of_different_versions_are_not_begun() {
    let said = |target: &Host, version: u16| {
        let receiver = target.receive("", &[]);
        let token = Token::random().unwrap();
        let greeting = serde_json::json!({"poolskip": VERSION, "connection": "control", "token": token});
        let start = serde_json::json!({"start": {"domain": "db1", "helper": "poolskip", "stream_version": version, "debug": false}});
        let mut connection = std::net::TcpStream::connect(&receiver.address).unwrap();
        for line in [greeting, start] {
            std::io::Write::write_all(&mut connection, format!("{line}\n").as_bytes()).unwrap();
        }
        let mut line = String::new();
        BufReader::new(connection).read_line(&mut line).unwrap();
        let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
        ready["ready"]["stock_because"].as_str().unwrap_or_default().to_owned()
    };
    // What no release speaks: the answer has what this one does.
    let foreign = said(&Host::of_before(), u16::MAX);
    let (_, theirs) = foreign.rsplit_once(' ').unwrap();
    let theirs: u16 = theirs.parse().unwrap();
    for (target, version) in [(Host::of_before(), STREAM_VERSION), (Host::new(), theirs)] {
        let why = said(&target, version);
        let differs = why.contains("speaks version");
        assert_eq!(differs, theirs != STREAM_VERSION, "{theirs} and {STREAM_VERSION}: {why}");
        // This machine has no Xen, which is the other reason.
        assert!(differs || why.contains("Xen"), "{why}");
    }
}
