//! Made-up migrations, of about the size of the lab's: pages of a kind in runs, a link that sets the pace.

use std::collections::BTreeMap;

use dom0_migrator::command::Outcome;
use dom0_migrator::control::HelperKind;
use dom0_migrator::engine::{Travel, Way};
use dom0_migrator::memory_map::MemoryMap;
use dom0_migrator::report_file::{self, Date, Downtime, ReportFile, SeenBy, Timeline};
use dom0_migrator::timeline::{Mark, Moment, SourceSample, TargetSample, WireSample};
use serde_json::json;

/// Bytes a second that the link takes.
const LINK: u64 = 4_000_000;
/// Pages a second that can be dealt with at all.
const PAGES: u64 = 24_000;
/// Pages of the guest.
const GUEST: u64 = 163_840;

/// How a page goes first: runs of some length, told from the frame number alone.
fn first_way(pfn: u64) -> Way {
    let noise = (pfn / 48).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    match pfn {
        0..256 => Way::NoData,
        256..6_000 if noise < 200 => Way::Raw,
        _ if noise < 5 => Way::PageTable,
        30_000..120_000 if noise < 12 => Way::Refused,
        30_000..120_000 if noise < 15 => Way::Replaced,
        30_000..120_000 if noise < 228 => Way::Accepted,
        120_000.. if noise < 190 => Way::Zero,
        _ if noise < 90 => Way::Zero,
        _ => Way::Raw,
    }
}

/// With our helper.
pub fn poolskip() -> ReportFile {
    let mut travel = Travel::default();
    let mut source = vec![];
    let mut marks = vec![Mark { seconds: 2.1, what: Moment::Round { number: 1, pages: Some(GUEST) } }];
    let (mut now, mut sample) = (2.1, SourceSample { rounds: 1, ..SourceSample::default() });
    let mut settled: u64 = 0;
    let mut pass = |travel: &mut Travel,
                    pages: &[u64],
                    again: bool,
                    now: &mut f64,
                    sample: &mut SourceSample,
                    source: &mut Vec<SourceSample>| {
        let (mut pages, mut wire) = (pages.iter().copied().peekable(), 0_u64);
        while pages.peek().is_some() {
            let mut done = 0;
            while done < PAGES
                && wire < LINK
                && let Some(pfn) = pages.next()
            {
                let way = if again { Way::Resent } else { first_way(pfn) };
                let bytes = match way {
                    Way::NoData | Way::Zero => 2,
                    Way::Accepted => 24,
                    Way::Refused | Way::Replaced => 4128,
                    _ => 4104,
                };
                if matches!(way, Way::Accepted | Way::Refused | Way::Replaced) {
                    travel.span(pfn, 1, Way::Referenced);
                    sample.bytes_references += 24;
                }
                travel.span(pfn, 1, way);
                match way {
                    Way::NoData | Way::Zero => sample.bytes_markers += 2,
                    Way::Accepted => {}
                    _ => sample.bytes_page_data += 4096,
                }
                wire += bytes;
                done += 1;
            }
            sample.bytes_out += wire.min(LINK);
            wire = wire.saturating_sub(LINK);
            *now += 1.0;
            settled += 6 * 256;
            sample.ways = travel.counts();
            sample.bytes_in += done * 4104;
            sample.window_pages = sample.ways.referenced.saturating_sub(settled).min(65_536);
            sample.seconds = (*now * 1e3_f64).round() / 1e3;
            source.push(*sample);
        }
    };
    let all: Vec<u64> = (0..GUEST).collect();
    pass(&mut travel, &all, false, &mut now, &mut sample, &mut source);
    for (number, dirty) in [(2, 9_000), (3, 3_100), (4, 1_200)] {
        let pages: Vec<u64> = (0..dirty).map(|i| 33_000 + i / 600 * 5_200 + i % 600).collect();
        marks.push(Mark { seconds: now, what: Moment::Round { number, pages: Some(dirty) } });
        sample.rounds = number;
        pass(&mut travel, &pages, true, &mut now, &mut sample, &mut source);
    }
    marks.push(Mark { seconds: now, what: Moment::Drain });
    marks.push(Mark { seconds: now + 0.4, what: Moment::Drained });
    marks.push(Mark { seconds: now + 0.5, what: Moment::Suspended });
    marks.push(Mark { seconds: now + 0.5, what: Moment::Round { number: 5, pages: None } });
    (now, sample.rounds) = (now + 0.4, 5);
    pass(&mut travel, &(40_000..40_400).collect::<Vec<_>>(), true, &mut now, &mut sample, &mut source);
    if let Some(last) = source.last_mut() {
        last.window_pages = 0;
    }
    let end = source.last().unwrap().seconds;
    let target = source
        .iter()
        .map(|sample| TargetSample {
            seconds: sample.seconds + 1.2,
            bytes_in: sample.bytes_out,
            accepted: sample.ways.accepted.saturating_sub(sample.window_pages),
            outstanding: sample.window_pages,
            disk_bytes: sample.ways.referenced.saturating_sub(sample.window_pages) * 4096,
            ..TargetSample::default()
        })
        .collect();
    let shift = 1.4;
    let wire = source
        .iter()
        .map(|sample| WireSample { seconds: sample.seconds + shift, bytes: sample.bytes_out + 20_000 })
        .collect();
    let counts = travel.counts();
    let memory = MemoryMap::of(&travel);
    ReportFile {
        poolskip_report: report_file::VERSION,
        began: Date::try_from("2026-11-23T18:35:54Z".to_owned()).unwrap(),
        domain: "db1".into(),
        target: "10.9.0.2:8002".into(),
        helper: HelperKind::Poolskip,
        outcome: Outcome::Migrated,
        error: None,
        total_seconds: end + shift + 1.1,
        downtime: Some(Downtime { seconds: 1.3, seen: SeenBy::Guest }),
        wire_bytes: sample.bytes_out + 20_000,
        stock_bytes: Some(sample.bytes_in),
        settings: BTreeMap::from([("references".into(), "yes".into()), ("window".into(), "256 MiB".into())]),
        versions: BTreeMap::from([
            ("dom0-migrator".into(), "0.1.0".into()),
            ("Xen at the source".into(), "4.17".into()),
        ]),
        timeline: Timeline { helper_began_seconds: shift, source, marks, target, wire },
        memory,
        summary: json!({
            "rounds": 5, "pages_sent": counts.raw + counts.resent + counts.refused, "pages_zero": counts.zero,
            "pages_referenced": counts.referenced, "pages_accepted": counts.accepted, "pages_refused": counts.refused,
            "pages_replaced": counts.replaced, "pages_superseded": 0,
            "lists": {"generation": 3, "pool_frames": 24_576, "pool_frames_clean": 22_100, "frames_read": 21_870,
                      "frames_written": 230, "pages_listed": 88_400, "runs": 5_210, "runs_refused": 0,
                      "list_pages_unreadable": 0, "wait_seconds": 1.25, "read_seconds": 0.04},
            "source": {"refused": {"hash": counts.refused, "io_error": 0, "out_of_bounds": 0, "unknown_disk": 0},
                       "pages_window_full": 0, "pages_disk_missing": 0, "hashing_seconds": 0.31,
                       "disks": [{"vdev": 51712, "size_bytes": 4_294_967_296_u64, "problem": null}]},
        }),
    }
}

/// The same guest with libxl's own helper: of it only the connections are seen.
pub fn stock() -> ReportFile {
    let seconds = GUEST * 4104 / LINK;
    let wire = (1..=seconds)
        .map(|second| WireSample { seconds: second as f64 + 0.8, bytes: second * LINK })
        .collect();
    ReportFile {
        helper: HelperKind::Stock,
        total_seconds: seconds as f64 + 2.0,
        downtime: Some(Downtime { seconds: 1.6, seen: SeenBy::Guest }),
        wire_bytes: seconds * LINK,
        stock_bytes: Some(seconds * LINK),
        settings: BTreeMap::new(),
        timeline: Timeline { wire, ..Timeline::default() },
        memory: None,
        summary: json!({"rounds": 5, "pages_sent": GUEST, "pages_zero": null}),
        ..poolskip()
    }
}

/// One that failed before anything went, with texts that try to be more than text.
pub fn hostile() -> ReportFile {
    let text = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>&amp;</title></style>";
    ReportFile {
        domain: text.into(),
        target: text.into(),
        outcome: Outcome::Failed,
        error: Some(text.repeat(20)),
        downtime: None,
        settings: BTreeMap::from([(text.into(), text.into())]),
        versions: BTreeMap::from([(text.into(), text.into())]),
        summary: json!({text: text, "lists_problem": text, "rounds": text,
                        "source": {"disks": [{"vdev": text, "problem": text}, text, null]}}),
        ..poolskip()
    }
}
