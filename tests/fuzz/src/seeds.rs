//! Inputs that are right: made by the very code that writes such bytes, or the files that the project ships, so that they are never of an
//! older form. Fuzzing begins with them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use dom0_migrator::command::Outcome;
use dom0_migrator::command::xl_words::{BANNER, GO, READY, REPORT};
use dom0_migrator::control::{
    BlocksOffer, Connection, FromSource, FromTarget, Greeting, HelperKind, STREAM_VERSION, TargetOutcome,
    Token, write_line,
};
use dom0_migrator::handoff::{Event, Order, Role};
use dom0_migrator::handover::{SourceState, State, TargetState, Verdict, record};
use dom0_migrator::inquiry::Needs;
use dom0_migrator::memory_map::MemoryMap;
use dom0_migrator::offer::Offer;
use dom0_migrator::report::{RestoreReport, SaveReport};
use dom0_migrator::report_file::{Date, Downtime, ReportFile, SeenBy, Timeline};
use dom0_migrator::timeline::{Mark, Moment, SourceSample, TargetSample, WireSample};
use enlightenment::Vdev;

use crate::engine::memory_record::{Builder, SpanKind, sync_body};
use crate::engine::side_message::{Answer, Hello, Refusal, Report, Verdicts};
use crate::engine::xen_stream::{Entry, NOTAB, RECORD_HEADER};
use crate::engine::{DiskName, DiskSummary, LateWrites, Travel, Way};
use crate::fake_guest::guest_stream::{Sent, beginning, disk_page, ending, page_data};

/// Inputs of a target that are right.
pub fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "page_data" => vec![pages()[RECORD_HEADER..].to_vec(), beginning()],
        "private_record" => private_records(),
        "side_message" => side_messages(),
        "control_line" => control_lines(),
        "handoff" => handoff(),
        "handover_record" => vec![record_of(SourceState::Given), record_of(TargetState::Accepted)],
        "report_file" => vec![serde_json::to_vec(&report()).unwrap()],
        "configuration" => vec![
            include_bytes!("../../../dom0-migrator/migrator.example.toml").to_vec(),
            include_bytes!("../../../guest-probe/guest-probe.toml").to_vec(),
            b"100M".to_vec(),
        ],
        "catalogue" => vec![include_bytes!("../../../guest-probe/catalogue.toml").to_vec()],
        "xenstore" => vec![b"7 snapshot".to_vec(), b"7 12".to_vec(), xenstored()],
        "xl" => vec![
            xl_stream(),
            xl_words(),
            b"--save-domain 8 -1 3 3 136 0".to_vec(),
            b"--restore-domain 0 1 7 3 0 4 0 768 0".to_vec(),
        ],
        "domain_configuration" => vec![DISKS.to_vec()],
        "elf" => vec![elf()],
        "tablespace" => vec![tablespace()],
        "fiemap" => vec![fiemap()],
        "dm_table" => vec![dm_table()],
        // Choices: any bytes are some.
        _ => (1..4).map(|seed| (0..200).map(|i: u32| (i * seed * 37 % 251) as u8).collect()).collect(),
    }
}

fn pages() -> Vec<u8> {
    page_data(&[
        Sent::page(3, disk_page(1)),
        Sent::typed(4, 15, Vec::new()),
        Sent::typed(9, 9, disk_page(2)),
        Sent::typed(10, 13, Vec::new()),
    ])
}

fn private_records() -> Vec<Vec<u8>> {
    let entry = |pfn| Entry { pfn, page_type: NOTAB };
    let mut builder = Builder::default();
    builder.push(entry(1), SpanKind::Zero);
    builder.push(entry(2), SpanKind::Raw);
    builder.push(Entry { pfn: 3, page_type: 15 }, SpanKind::NoData);
    for i in 0..3 {
        builder.push(entry(10 + i), SpanKind::Reference { disk: 0, offset: (8 + i) * 4096 });
        builder.hashes.push([i as u8; 16]);
    }
    let mut memory = Vec::new();
    builder.write_head(5, &mut memory);
    memory.extend([7; 4096]);
    let mut records = vec![memory, sync_body(3).to_vec()];
    records.extend(LateWrites::new(vec![1, 2, 9]).bodies());
    records
}

fn side_messages() -> Vec<Vec<u8>> {
    let message = |write: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        write(&mut bytes);
        bytes
    };
    let disks = vec![DiskName { vdev: Vdev(51712), path: "/dev/vg/db1".into() }];
    let hello = Hello { key: [7; 32], window_pages: 9, disks };
    let opened = DiskSummary { vdev: 51712, size_bytes: 1 << 30, problem: None };
    let missing = DiskSummary { vdev: 51728, size_bytes: 0, problem: Some("no such file".into()) };
    let answer = Answer { max_outstanding: 9, disks: vec![opened, missing] };
    let verdicts =
        Verdicts { accepted: vec![(0, 10)], refused: vec![(10, Refusal::Hash), (11, Refusal::IoError)] };
    vec![
        message(&|to| hello.write(to).unwrap()),
        message(&|to| answer.write(to).unwrap()),
        message(&|to| {
            verdicts.write(to).unwrap();
            Report::Synced(1).write(to).unwrap();
        }),
    ]
}

fn token() -> Token {
    Token::parse("0123456789abcdef0123456789abcdef").unwrap()
}

fn lines<T: serde::Serialize>(messages: &[T]) -> Vec<u8> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| write_line(&mut bytes, message).unwrap());
    bytes
}

fn control_lines() -> Vec<Vec<u8>> {
    let source = [
        FromSource::Start {
            domain: "db1".into(),
            helper: HelperKind::Poolskip,
            stream_version: 1,
            debug: true,
            blocks: Some(BlocksOffer { version: 1, connections: 4 }),
            needs: Some(Needs { memory_bytes: 1 << 30, disks: vec!["/dev/vg/db1".into()] }),
        },
        FromSource::Check(Box::default()),
        FromSource::Given,
        FromSource::GaveUp,
        FromSource::Ask { id: token(), domain: "db1".into() },
    ];
    let outcome =
        TargetOutcome { started: true, restore: Some(RestoreReport::default()), ..TargetOutcome::default() };
    let target = [
        FromTarget::Ready { stock_because: Some("of the version".into()), blocks: Some(4) },
        FromTarget::Refused { reason: "no room".into() },
        FromTarget::Verdict(Verdict::Runs),
        FromTarget::Finished(Box::new(outcome)),
    ];
    let greeting = Greeting { poolskip: 1, connection: Connection::Stream, token: token(), lane: 3 };
    let offer = Offer {
        stream_version: STREAM_VERSION,
        token: token(),
        port: 40_000,
        addresses: vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        certificate: "-----BEGIN CERTIFICATE-----\n".into(),
        compare: true,
    };
    vec![lines(&[greeting]), lines(&source), lines(&target), offer.body().unwrap()]
}

fn handoff() -> Vec<Vec<u8>> {
    let order = Order { socket: true, references: true, wait_lists_seconds: 30, ..Order::default() };
    let events = [
        Event::Hello { role: Role::Save, domain: None, pid: 7 },
        Event::Progress { round: 1, done: 2, total: 3 },
        Event::Phase("waiting".into()),
        Event::Sampled(SourceSample { seconds: 1.0, ..SourceSample::default() }),
        Event::Marked(Mark { seconds: 1.9, what: Moment::Suspended }),
        Event::Saved(Box::<SaveReport>::default()),
        Event::Restored(Box::<RestoreReport>::default()),
        Event::Permission,
    ];
    let mut inputs: Vec<_> = events.iter().map(|event| serde_json::to_vec(event).unwrap()).collect();
    inputs.push(serde_json::to_vec(&order).unwrap());
    inputs
}

fn record_of<S: State>(state: S) -> Vec<u8> {
    let content = record::Content {
        version: 1,
        id: token(),
        side: S::SIDE,
        domain: "db1".into(),
        domain_id: None,
        peer: "b.example:8002".into(),
        boot: "5d0bbd0c-6b67-4d6c-b6c9-6fd2fd0d2a35".into(),
        xl: Some(record::Process { pid: 7, began: 1234 }),
        state,
        history: vec![(state, 1_700_000_000)],
        note: Some("lost".into()),
    };
    serde_json::to_vec(&content).unwrap()
}

fn report() -> ReportFile {
    let mut travel = Travel::default();
    travel.span(0, 700, Way::Raw);
    travel.span(700, 1300, Way::Accepted);
    travel.span(900, 3, Way::Refused);
    ReportFile {
        poolskip_report: 1,
        began: serde_json::from_value::<Date>("2026-01-02T03:04:05Z".into()).unwrap(),
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

/// Replies to the first requests of a connection.
fn xenstored() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, request, body) in
        [(15_u32, 0_u32, &b"/a\0poolskip\0"[..]), (2, 1, b"12"), (1, 2, b"one\0two\0"), (16, 3, b"EACCES\0")]
    {
        for word in [kind, request, 0, body.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(body);
    }
    bytes
}

fn xl_words() -> Vec<u8> {
    [BANNER, READY, REPORT, &[3], GO].concat()
}

fn xl_stream() -> Vec<u8> {
    let configuration = b"{\"disks\":[]}\0";
    let mut bytes = b"Xen saved domain, xl format\n \0 \r".to_vec();
    for number in [0x0102_0304, 1, 0, configuration.len() as u32 + 4, configuration.len() as u32] {
        bytes.extend(u32::to_ne_bytes(number));
    }
    bytes.extend(configuration);
    bytes.extend(b"LibxlFmt");
    bytes.extend([0; 8]);
    bytes.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(beginning());
    bytes.extend(pages());
    bytes.extend(ending());
    bytes.extend([0; 8]);
    bytes
}

const DISKS: &[u8] = br#"{"disks":[{"pdev_path":"/dev/null","vdev":"xvda","backend":"phy","format":"raw"},
{"pdev_path":"/etc/hostname","vdev":"hdb1","format":"raw"},{"pdev_path":"/x","vdev":"d5p1","format":"qcow2","is_cdrom":1},
{"vdev":"xvdaa3","backend_domid":3}]}"#;

/// A small program with a build id, two symbols, their code, and an index of exception tables.
fn elf() -> Vec<u8> {
    let mut file = vec![0_u8; 0x380];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(16, &[3, 0, 62, 0, 1, 0, 0, 0]);
    put(32, &64_u64.to_le_bytes());
    put(40, &0x200_u64.to_le_bytes());
    for (at, value) in [(52, 64_u16), (54, 56), (56, 3), (58, 64), (60, 3), (62, 0)] {
        put(at, &value.to_le_bytes());
    }
    let segments = [
        (1_u32, 5_u32, 0_u64, 0x1000_u64, 0x380_u64),
        (4, 4, 0x100, 0x100, 18),
        (0x6474_e550, 4, 0x340, 0x1340, 0x20),
    ];
    for (index, (kind, flags, offset, address, size)) in segments.into_iter().enumerate() {
        let at = 64 + 56 * index;
        put(at, &kind.to_le_bytes());
        put(at + 4, &flags.to_le_bytes());
        put(at + 8, &offset.to_le_bytes());
        put(at + 16, &address.to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &size.to_le_bytes());
        put(at + 48, &4_u64.to_le_bytes());
    }
    put(0x100, &[4, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, b'G', b'N', b'U', 0, 0xab, 0xcd]);
    put(0x140, b"\0first\0first_and_more\0");
    for (at, name, address) in [(0x198, 1_u32, 0x1300_u64), (0x1b0, 7, 0x1308)] {
        put(at, &name.to_le_bytes());
        put(at + 8, &address.to_le_bytes());
        put(at + 16, &8_u64.to_le_bytes());
    }
    let sections = [(11_u32, 0x180_u64, 0x48_u64, 1_u32), (3, 0x140, 0x20, 0)];
    for (index, (kind, offset, size, link)) in sections.into_iter().enumerate() {
        let at = 0x240 - 64 + 64 * index;
        put(at + 4, &kind.to_le_bytes());
        put(at + 24, &offset.to_le_bytes());
        put(at + 32, &size.to_le_bytes());
        put(at + 40, &link.to_le_bytes());
    }
    put(0x300, &[0xf3, 0x0f, 0x1e, 0xfa, 0x55, 0xc3]);
    put(0x340, &[1, 0x1b, 3, 0x3b, 0, 0, 0, 0, 1, 0, 0, 0]);
    file
}

fn tablespace() -> Vec<u8> {
    let mut page = vec![0; 128];
    page[25] = 8;
    page[37] = 7;
    page[41] = 7;
    page[56] = 0x40;
    page
}

fn fiemap() -> Vec<u8> {
    let mut answer = vec![0; 32];
    answer[20] = 2;
    for (logical, physical, flags) in [(0_u64, 0x10_0000_u64, 0_u32), (4096, 0x40_0000, 1)] {
        let mut extent = vec![0; 56];
        extent[0..8].copy_from_slice(&logical.to_le_bytes());
        extent[8..16].copy_from_slice(&physical.to_le_bytes());
        extent[16..24].copy_from_slice(&4096_u64.to_le_bytes());
        extent[40..44].copy_from_slice(&flags.to_le_bytes());
        answer.extend(extent);
    }
    answer
}

/// The targets of an answer, their number in place of its head.
fn dm_table() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (start, sectors, name, parameters) in
        [(0_u64, 8192_u64, "linear", "202:2 2048"), (8192, 8, "crypt", "x")]
    {
        let at = bytes.len();
        bytes.extend(start.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend([0; 8]);
        let mut kind = [0; 16];
        kind[..name.len()].copy_from_slice(name.as_bytes());
        bytes.extend(kind);
        bytes.extend(parameters.as_bytes());
        bytes.resize((bytes.len() + 1).next_multiple_of(8), 0);
        let next = bytes.len() as u32;
        bytes[at + 20..at + 24].copy_from_slice(&next.to_le_bytes());
    }
    bytes.insert(0, 2);
    bytes
}
