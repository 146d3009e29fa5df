//! Reports that are right, and all ways to be wrong.

use super::*;
use crate::engine::{Travel, Way};
use crate::timeline::Moment;

/// A small report that uses every field.
pub(super) fn example() -> ReportFile {
    let mut travel = Travel::default();
    travel.span(0, 700, Way::Raw);
    travel.span(700, 1300, Way::Accepted);
    travel.span(900, 3, Way::Refused);
    ReportFile {
        poolskip_report: VERSION,
        began: Date::now(),
        domain: "db1".into(),
        target: "b.example:8002".into(),
        helper: HelperKind::Poolskip,
        outcome: Outcome::Migrated,
        error: None,
        total_seconds: 12.5,
        downtime: Some(Downtime { seconds: 0.3, seen: SeenBy::Source }),
        wire_bytes: 1000,
        stock_bytes: Some(5000),
        settings: BTreeMap::from([("references".into(), "yes".into())]),
        versions: BTreeMap::from([("dom0-migrator".into(), "0.1.0".into())]),
        timeline: Timeline {
            helper_began_seconds: 0.5,
            source: vec![
                SourceSample { seconds: 1.0, rounds: 1, ..SourceSample::default() },
                SourceSample { seconds: 2.0, rounds: 2, ..SourceSample::default() },
            ],
            marks: vec![
                Mark { seconds: 0.1, what: Moment::Round { number: 1, pages: Some(2000) } },
                Mark { seconds: 1.9, what: Moment::Suspended },
            ],
            target: vec![TargetSample { seconds: 2.5, ..TargetSample::default() }],
            wire: vec![WireSample { seconds: 1.0, bytes: 500 }],
        },
        memory: MemoryMap::of(&travel),
        summary: serde_json::json!({"source": {"refused": {"hash": 3}}, "lists_problem": "none"}),
    }
}

fn bytes(report: &ReportFile) -> Vec<u8> {
    serde_json::to_vec(report).unwrap()
}

#[test]
fn what_is_written_is_read() {
    let example = example();
    let report = parse(&bytes(&example)).unwrap();
    assert_eq!(report, example);
    assert_eq!(report.number("/source/refused/hash"), Some(3));
    assert_eq!(report.text("/lists_problem"), Some("none"));
    assert_eq!(report.target_offset(), Some(-0.5));
}

#[test]
fn another_version_is_called_so_whatever_else_it_has() {
    let error = parse(br#"{"poolskip_report": 7, "new": []}"#).unwrap_err();
    assert!(matches!(error, ParseError::Version { found: 7 }), "{error}");
}

#[test]
fn what_is_no_report_is_refused() {
    for text in ["", "{}", "[]", "null", "{\"poolskip_report\": 1}", "\u{0}", "{\"poolskip_report\": -1}"] {
        assert!(matches!(parse(text.as_bytes()), Err(ParseError::Form(_))), "{text}");
    }
    let deep = format!("{{\"poolskip_report\": 1, \"summary\": {}", "[".repeat(1_000_000));
    assert!(matches!(parse(deep.as_bytes()), Err(ParseError::Form(_))));
    assert!(matches!(parse(&vec![b' '; LENGTH_MAX as usize + 1]), Err(ParseError::Length { .. })));
    let mut more = serde_json::to_value(example()).unwrap();
    more["surprise"] = 1.into();
    assert!(matches!(parse(more.to_string().as_bytes()), Err(ParseError::Form(_))));
}

#[test]
fn what_cannot_be_is_named() {
    let refused = |change: &dyn Fn(&mut ReportFile)| {
        let mut report = example();
        change(&mut report);
        parse(&bytes(&report)).unwrap_err().to_string()
    };
    let error = refused(&|report| report.total_seconds = -1.0);
    assert!(error.contains("total_seconds is -1"), "{error}");
    let error = refused(&|report| report.timeline.helper_began_seconds = 1e300);
    assert!(error.contains("timeline.helper_began_seconds"), "{error}");
    let error = refused(&|report| report.domain = "x".repeat(TEXT_MAX + 1));
    assert!(error.contains("domain is too long: 4097"), "{error}");
    let error = refused(&|report| {
        report.settings = (0..65).map(|number| (number.to_string(), String::new())).collect();
    });
    assert!(error.contains("settings is too long: 65"), "{error}");
    let error = refused(&|report| report.timeline.source.reverse());
    assert!(error.contains("timeline.source: number 1 is at 1 s"), "{error}");
    let error = refused(&|report| report.timeline.wire = vec![WireSample::default(); 241]);
    assert!(error.contains("timeline.wire: 241 of them"), "{error}");
    let error = refused(&|report| report.memory.as_mut().unwrap().regions[0].cells = 1 << 40);
    assert!(error.contains("memory: ") && error.contains("cells"), "{error}");
}

#[test]
fn a_report_that_was_cut_or_changed_anywhere_does_no_harm() {
    let whole = bytes(&example());
    for end in 0..whole.len() {
        assert!(parse(&whole[..end]).is_err());
    }
    for at in 0..whole.len() {
        for byte in [b'9', b'-', b'"', b'{', 0xff] {
            let mut changed = whole.clone();
            changed[at] = byte;
            let _ = parse(&changed);
        }
    }
}
