//! Following xl's stream as it passes, to count the pages in it. Nothing is changed, and of the pages nothing is looked at.
//!
//! ```text
//! xl:    | magic (32), 4 × u32, the last: length | configuration |
//! libxl: | "LibxlFmt", 2 × u32 | records: u32 type, u32 length, body, padding to 8 | … |
//!          record 1 (LIBXC_CONTEXT, empty) is followed by libxc's stream:
//! libxc: | image header (24) | domain header (16) | records as above; 1 is PAGE_DATA, 13 VERIFY, 0 the end | … |
//! ```

use crate::report::CarriedPages;

/// `save_file_header` of xl, without its configuration.
const XL_HEADER: usize = 48;
/// Its first bytes.
const XL_MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
/// Header of libxl's stream.
const LIBXL_HEADER: usize = 16;
/// Both headers of libxc's stream.
const LIBXC_HEADERS: usize = 24 + 16;
/// Header of a record.
const RECORD: usize = 8;
/// Most frame numbers of a PAGE_DATA record (`MAX_BATCH_SIZE` in `xg_sr_common.h`).
const BATCH_MAX: u32 = 1024;

/// What to do with the next bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Read this many, give them to [`Follower::seen`], and pass them on.
    See(usize),
    /// Pass this many on unseen.
    Pass(u64),
    /// Pass everything on unseen: what follows is not memory.
    PassAll,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    XlHeader,
    XlConfiguration(u64),
    LibxlHeader,
    LibxlRecord,
    LibxlBody(u64),
    LibxcHeaders,
    LibxcRecord,
    LibxcBody(u64),
    PageDataHead { length: u32 },
    PageDataFrames { count: u32, length: u32 },
    Done,
    Lost,
}

/// Follows a stream.
#[derive(Clone, Debug)]
pub struct Follower {
    state: State,
    pages: CarriedPages,
    verifying: bool,
    last_frame: Option<u64>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn padded(length: u32) -> u64 {
    u64::from(length).next_multiple_of(8)
}

impl Default for Follower {
    fn default() -> Self {
        Self { state: State::XlHeader, pages: CarriedPages::default(), verifying: false, last_frame: None }
    }
}

impl Follower {
    /// What it counted; none when it could not follow.
    pub fn pages(&self) -> Option<CarriedPages> {
        (self.state == State::Done).then_some(self.pages)
    }

    /// What to do with the next bytes. After a [`Next::Pass`] it is to be asked again.
    pub fn what_next(&mut self) -> Next {
        match self.state {
            State::XlHeader => Next::See(XL_HEADER),
            State::LibxlHeader => Next::See(LIBXL_HEADER),
            State::LibxcHeaders => Next::See(LIBXC_HEADERS),
            State::LibxlRecord | State::LibxcRecord => Next::See(RECORD),
            State::PageDataHead { .. } => Next::See(8),
            State::PageDataFrames { count, .. } => Next::See(8 * count as usize),
            State::XlConfiguration(length) => self.pass(length, State::LibxlHeader),
            State::LibxlBody(length) => self.pass(length, State::LibxlRecord),
            State::LibxcBody(length) => self.pass(length, State::LibxcRecord),
            State::Done | State::Lost => Next::PassAll,
        }
    }

    fn pass(&mut self, length: u64, then: State) -> Next {
        self.state = then;
        if length == 0 { self.what_next() } else { Next::Pass(length) }
    }

    /// Looks at the bytes that were asked for.
    pub fn seen(&mut self, bytes: &[u8]) {
        self.state = match self.state {
            State::XlHeader if bytes.starts_with(XL_MAGIC) => {
                State::XlConfiguration(u64::from(u32_at(bytes, 44)))
            }
            State::LibxlHeader if bytes.starts_with(b"LibxlFmt") => State::LibxlRecord,
            State::LibxlRecord => match (u32_at(bytes, 0), u32_at(bytes, 4)) {
                (0, _) => State::Done,
                (1, 0) => State::LibxcHeaders,
                (_, length) => State::LibxlBody(padded(length)),
            },
            State::LibxcHeaders if bytes.starts_with(&[0xff; 8]) => State::LibxcRecord,
            State::LibxcRecord => match (u32_at(bytes, 0), u32_at(bytes, 4)) {
                (0, _) => State::LibxlRecord,
                (1, length) if length >= 8 => State::PageDataHead { length: length - 8 },
                (13, length) => {
                    self.verifying = true;
                    State::LibxcBody(padded(length))
                }
                (_, length) => State::LibxcBody(padded(length)),
            },
            State::PageDataHead { length } => match u32_at(bytes, 0) {
                count @ 1..=BATCH_MAX if length >= 8 * count => {
                    State::PageDataFrames { count, length: length - 8 * count }
                }
                _ => State::Lost,
            },
            State::PageDataFrames { length, .. } => {
                self.count(bytes, u64::from(length) / 4096);
                State::LibxcBody(padded(length))
            }
            _ => State::Lost,
        };
    }

    fn count(&mut self, frames: &[u8], with_content: u64) {
        if self.verifying {
            self.pages.verified += with_content;
            return;
        }
        self.pages.sent += with_content;
        let frame = |at| u64_at(frames, at) & ((1 << 52) - 1);
        let (first, last) = (frame(0), frame(frames.len().saturating_sub(8)));
        if self.last_frame.is_none_or(|before| first <= before) {
            self.pages.rounds += 1;
        }
        self.last_frame = Some(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    fn page_data(frames: &[u64], with_content: usize) -> Vec<u8> {
        let mut body = (frames.len() as u64).to_le_bytes().to_vec();
        body.extend(frames.iter().flat_map(|frame| frame.to_le_bytes()));
        body.resize(body.len() + with_content * 4096, 7);
        record(1, &body)
    }

    fn stream() -> Vec<u8> {
        let mut bytes = XL_MAGIC.to_vec();
        for number in [1_u32, 0, 0, 5] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(b"{...}");
        bytes.extend(b"LibxlFmt\0\0\0\x02\0\0\0\0");
        bytes.extend(record(1, &[]));
        bytes.extend([0xff; 8]);
        bytes.resize(bytes.len() + 32, 0);
        bytes.extend(record(2, &[1, 2, 3]));
        bytes.extend(page_data(&[1, 2, 3 | 0xf << 60], 2));
        bytes.extend(page_data(&[7, 8], 2));
        bytes.extend(page_data(&[2], 1));
        bytes.extend(record(13, &[]));
        bytes.extend(page_data(&[1, 2, 7, 8], 4));
        bytes.extend(record(0, &[]));
        bytes.extend(record(3, b"xenstore data"));
        bytes.extend(record(0, &[]));
        bytes.extend(b"permission to go");
        bytes
    }

    /// Does to a slice what the carrier does to a stream. Returns how much passed before "all".
    fn follow(bytes: &[u8]) -> (Follower, usize) {
        let (mut follower, mut at) = (Follower::default(), 0_usize);
        loop {
            match follower.what_next() {
                Next::See(length) => match bytes.get(at..at + length) {
                    Some(seen) => {
                        follower.seen(seen);
                        at += length;
                    }
                    None => return (follower, at),
                },
                Next::Pass(length) => {
                    at = at.saturating_add(usize::try_from(length).unwrap());
                    if at > bytes.len() {
                        return (follower, bytes.len());
                    }
                }
                Next::PassAll => return (follower, at),
            }
        }
    }

    #[test]
    fn pages_and_passes_are_counted() {
        let bytes = stream();
        let (follower, at) = follow(&bytes);
        assert_eq!(follower.pages(), Some(CarriedPages { sent: 5, verified: 4, rounds: 2 }));
        assert_eq!(&bytes[at..], b"permission to go");
    }

    #[test]
    fn a_stream_of_another_kind_is_passed_and_not_counted() {
        let (follower, _) = follow(&[b'x'; 4096]);
        assert_eq!(follower.pages(), None);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(at in 0_usize..2000, value in any::<u64>()) {
            let mut bytes = stream();
            let at = at.min(bytes.len() - 8);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            follow(&bytes);
        }
    }
}
