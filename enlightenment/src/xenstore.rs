//! The xenstore nodes through which guest and dom0 find each other.
//!
//! All lie below `data/poolskip` of the domain's own directory (`/local/domain/ID/data/poolskip`), which libxl lets the guest
//! write. Values are decimal numbers in ASCII.
//!
//! ```text
//! guest writes   version         ABI version
//!                root-pfn        PFN of the root page (crate::list)
//!                event-channel   port that dom0 may bind (interdomain); signalled on every publish
//!                generation      the published generation, 0 for none
//!                answer          "SEQUENCE GENERATION": the last request that was answered, and by which generation
//! dom0 writes    request         "SEQUENCE KIND": see RequestKind; the guest watches it
//! ```
//!
//! A node that is missing means that there is no probe or no module: the migration is then a plain one.

/// Directory of all nodes, relative to the domain's.
pub const DIRECTORY: &str = "data/poolskip";
/// Node with the ABI version.
pub const VERSION: &str = "version";
/// Node with the root page's PFN.
pub const ROOT_PFN: &str = "root-pfn";
/// Node with the event-channel port.
pub const EVENT_CHANNEL: &str = "event-channel";
/// Node with the published generation.
pub const GENERATION: &str = "generation";
/// Node with the last answer.
pub const ANSWER: &str = "answer";
/// Node with dom0's last request.
pub const REQUEST: &str = "request";

/// What dom0 asks of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RequestKind {
    /// Publish the lists as they are now, and answer.
    Snapshot = 1,
    /// Migration has begun: what is written from here on is sent anyway, no need to tell. The module tells dom0 nothing more that is no
    /// answer, until the end or until the guest has arrived; a probe need neither look nor publish, but for a snapshot that is asked for
    /// in between. [`crate::device::Stats`] shows what each has done meanwhile: `calls` the probe, `signals` and `untold` the module.
    Begun = 2,
    /// Migration is over, well or not.
    Ended = 3,
}

impl RequestKind {
    /// The word that stands in xenstore.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Begun => "begun",
            Self::Ended => "ended",
        }
    }

    /// The kind with this number, if there is one.
    pub const fn from_u32(value: u32) -> Option<Self> {
        match value {
            1 => Some(Self::Snapshot),
            2 => Some(Self::Begun),
            3 => Some(Self::Ended),
            _ => None,
        }
    }
}

/// Parses the value of `request`: `"SEQUENCE KIND"`. `None` for anything else.
pub fn parse_request(value: &[u8]) -> Option<(u64, RequestKind)> {
    let (sequence, kind) = split_pair(value)?;
    let kind = [RequestKind::Snapshot, RequestKind::Begun, RequestKind::Ended]
        .into_iter()
        .find(|k| k.word().as_bytes() == kind)?;
    Some((parse_number(sequence)?, kind))
}

/// Parses the value of `answer`: `"SEQUENCE GENERATION"`. `None` for anything else.
pub fn parse_answer(value: &[u8]) -> Option<(u64, u64)> {
    let (sequence, generation) = split_pair(value)?;
    Some((parse_number(sequence)?, parse_number(generation)?))
}

/// Parses a decimal number of at most 20 digits; no sign, no space. `None` for anything else.
pub fn parse_number(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 20 {
        return None;
    }
    value.iter().try_fold(0_u64, |sum, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    })
}

fn split_pair(value: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = value.iter().position(|&byte| byte == b' ')?;
    Some((value.get(..space)?, value.get(space + 1..)?))
}
