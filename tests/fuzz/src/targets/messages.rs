//! What the two hosts' programs say to each other beside the stream.

use std::fmt::Debug;
use std::io::Cursor;

use serde_json::Value;

use crate::engine::side_message::{Answer, Hello, MAX_DISKS, MAX_VERDICTS, Report};
use crate::engine::{PFNS_MAX, Travel, Way};
use dom0_migrator::control::{
    FromSource, FromTarget, GREETING_MAX, Greeting, LINE_MAX, Token, read_greeting, read_line, write_line,
};
use dom0_migrator::handoff::{self, Event, Order};
use dom0_migrator::memory_map::MemoryMap;
use dom0_migrator::offer::{BODY_MAX, Offer};

/// A message that is read is written as the same message; no more than it is taken from the connection.
pub fn side_message(data: &[u8]) {
    let mut from = Cursor::new(data);
    if let Ok(hello) = Hello::read(&mut from) {
        assert!(hello.disks.len() <= MAX_DISKS);
        let mut again = Vec::new();
        hello.write(&mut again).unwrap();
        assert_eq!(Hello::read(&mut again.as_slice()).unwrap(), hello);
        assert_eq!(from.position(), again.len() as u64);
    }
    if let Ok(answer) = Answer::read(&mut &data[..]) {
        let mut again = Vec::new();
        answer.write(&mut again).unwrap();
        // What is no UTF-8 becomes longer when it is shown; beyond that nothing changes.
        assert!(Answer::read(&mut again.as_slice()).unwrap().max_outstanding == answer.max_outstanding);
    }
    let mut from = data;
    while let Ok(report) = Report::read(&mut from) {
        if let Report::Verdicts(verdicts) = &report {
            assert!(verdicts.accepted.len() <= MAX_VERDICTS && verdicts.refused.len() <= MAX_VERDICTS);
            let overflows = |(first, count): &(u64, u32)| first.checked_add(u64::from(*count)).is_none();
            assert!(!verdicts.accepted.iter().any(overflows));
            if verdicts.is_empty() {
                continue;
            }
        }
        let mut again = Vec::new();
        report.write(&mut again).unwrap();
        assert_eq!(Report::read(&mut again.as_slice()).unwrap(), report);
    }
}

/// A line that is understood is understood again as it is written.
fn line<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + Debug>(data: &[u8]) {
    let mut from = Cursor::new(data);
    while let Ok(message) = read_line::<T>(&mut from) {
        let mut again = Vec::new();
        write_line(&mut again, &message).unwrap();
        if again.len() <= LINE_MAX {
            // A number such as 1e999 has no second form; everything else has.
            let read = read_line::<T>(&mut again.as_slice()).unwrap();
            assert_eq!(read, message);
        }
    }
}

/// Lines of the control connection, and the first of every connection.
pub fn control_line(data: &[u8]) {
    let mut from = Cursor::new(data);
    if let Ok(Greeting { poolskip, connection, token, lane }) = read_greeting(&mut from) {
        let end = from.position() as usize;
        assert!(end <= GREETING_MAX && data[end - 1] == b'\n' && !data[..end - 1].contains(&b'\n'));
        assert_eq!(token.to_string().len(), 32);
        let mut again = Vec::new();
        write_line(&mut again, &Greeting { poolskip, connection, token, lane }).unwrap();
        assert!(read_greeting(&mut again.as_slice()).is_ok());
    }
    line::<FromSource>(data);
    line::<FromTarget>(data);
    // What stands in a stream instead, where nobody has made the connections.
    if let Ok(offer) = Offer::parse(data)
        && let Ok(body) = offer.body()
    {
        assert!(body.len() <= BODY_MAX);
        assert_eq!(Offer::parse(&body).unwrap(), offer);
    }
    if let Some(token) = std::str::from_utf8(data).ok().and_then(Token::parse) {
        // It becomes the name of a file.
        assert!(token.to_string().bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
}

/// What a helper and the command that runs it say to each other.
pub fn handoff(data: &[u8]) {
    if let Ok(event) = serde_json::from_slice::<Event>(data) {
        let again = serde_json::to_vec(&event).unwrap();
        assert_eq!(serde_json::from_slice::<Event>(&again).unwrap(), event);
    }
    if let Ok(order) = serde_json::from_slice::<Order>(data) {
        let again = serde_json::to_vec(&order).unwrap();
        assert_eq!(serde_json::from_slice::<Order>(&again).unwrap(), order);
    }
    let _ = serde_json::from_slice::<handoff::Answer>(data);
    let _ = serde_json::from_slice::<Value>(data);
}

/// The ways of pages, and the map that is made of them. The bytes say which half bytes of a few chunks are set.
pub fn travel(data: &[u8]) {
    // A piece is a number and as many half bytes as a chunk has frames; the file of one chunk tells how long that is.
    let mut one = Travel::default();
    one.span(0, 1, Way::Raw);
    let piece = one.pieces().concat().len();
    let mut bytes = Vec::new();
    for words in data.chunks(16).take(8) {
        let mut chunk = vec![0; piece];
        chunk[..words.len().min(2)].copy_from_slice(&words[..words.len().min(2)]);
        for (at, byte) in words.iter().enumerate().skip(2) {
            chunk[2 + (at * 2311 + usize::from(*byte) * 37) % (piece - 2)] = *byte;
        }
        bytes.extend(chunk);
    }
    bytes.truncate(bytes.len() - usize::from(data.len() % 7 == 3).min(bytes.len()));
    let whole = bytes.len().is_multiple_of(piece);
    let travel = Travel::from_bytes(&bytes);
    assert_eq!(travel.is_some(), whole);
    let _ = Travel::from_bytes(data);
    let Some(travel) = travel else { return };
    assert!(travel.noted().all(|(first, ways)| first + (ways.count() as u64) <= PFNS_MAX));
    if let Some(map) = MemoryMap::of(&travel) {
        map.check().unwrap();
        assert!(map.cells().count() > 0);
    }
}
