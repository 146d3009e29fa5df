//! What `migrate` and `receive` say to each other.
//!
//! Three TCP connections carry one migration, or more when its stream goes over several ([`crate::command`]). Each begins with one line, the [`Greeting`], whose token says that they belong
//! together; after it, the stream carries what xl and libxl write, and the side channel what the filters of the two helpers
//! write ([`crate::engine::side_message`]). The control connection carries lines of JSON:
//!
//! ```text
//! migrate                                  receive
//!   │ ── control: Greeting ─────────────────►│
//!   │ ── Start { domain, helper, … } ───────►│  is there a NAME--incoming already?
//!   │ ◄──────────────── Ready | Refused ─────│
//!   │ ── stream: Greeting, side: Greeting ──►│  starts xl migrate-receive on the stream
//!   │            … the migration …           │
//!   │ ── Given ─────────────────────────────►│  the hand-over (crate::handover)
//!   │ ◄─────────────────────── Verdict ──────│
//!   │ ── GaveUp, if xl failed before ───────►│
//!   │ ◄──────────────────────── Finished ────│  xl is done, what it left behind is removed
//! ```
//!
//! A source that does not know what became of a domain asks, on a control connection of its own:
//!
//! ```text
//! resolve                                  receive
//!   │ ── control: Greeting, Ask { id } ─────►│  decides, if that was left open
//!   │ ◄─────────── Verdict | Refused ────────│
//! ```
//!
//! `check` asks in the same way: `Check(Inquiry)`, answered by `Checked(Findings)` ([`crate::inquiry`]).
//! `doctor` examines a host on a control connection ([`crate::examination`]).
//!
//! The token ties connections together; it keeps nobody out: certificates do ([`crate::command`]).

use std::io::{self, BufRead, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::examination::{Answer, Question};
use crate::handover::Verdict;
use crate::inquiry::{Findings, Inquiry, Needs};
use crate::report::RestoreReport;

/// Version of everything that the two commands say to each other. Another one is refused.
pub const VERSION: u32 = 2;

/// Version of what the two helpers say to each other, in the stream and beside it: [`crate::engine::side_message`]'s, so that neither is
/// raised without the other. Between hosts that differ in it only libxl's own helper runs.
pub const STREAM_VERSION: u16 = crate::engine::side_message::VERSION;

/// TCP connections over which one stream goes, at most.
pub const CONNECTIONS_MAX: u16 = 16;

/// Longest line in bytes.
pub const LINE_MAX: usize = 256 * 1024;
/// Longest greeting: nothing that a stranger sends is kept beyond it.
pub const GREETING_MAX: usize = 256;

/// What ties the connections of a migration together, and its records on both hosts: the migration's number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token(String);

impl Token {
    /// A token of 128 random bits.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// A token as it is written: 32 hexadecimal digits, and nothing else, since it becomes the name of a file.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        (text.len() == 32 && digits(text)).then(|| Self(text.to_owned()))
    }
}

impl TryFrom<String> for Token {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text).ok_or("a token has 32 hexadecimal digits")
    }
}

impl From<Token> for String {
    fn from(token: Token) -> Self {
        token.0
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// Which of the three connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Connection {
    /// Lines of JSON.
    Control,
    /// What xl and libxl write.
    Stream,
    /// What the filters write.
    Side,
    /// Bytes that try out the link, and are counted ([`crate::inquiry::Measured`]); it belongs to no migration.
    Probe,
}

/// First line of every connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`VERSION`].
    pub poolskip: u32,
    /// Which connection it is.
    pub connection: Connection,
    /// Of which migration.
    pub token: Token,
    /// Of a stream that goes over several connections: which, from 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lane: u16,
}

fn is_zero(lane: &u16) -> bool {
    *lane == 0
}

/// Which save helper runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HelperKind {
    /// This program.
    Poolskip,
    /// The one that libxl comes with.
    Stock,
}

/// How a stream may go in blocks, over several connections or compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlocksOffer {
    /// Version of the blocks.
    pub version: u16,
    /// Connections.
    pub connections: u16,
}

/// What the source says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromSource {
    /// Begin.
    Start {
        /// Name of the domain.
        domain: String,
        /// The helper that both sides are to run.
        helper: HelperKind,
        /// The source's [`STREAM_VERSION`].
        stream_version: u16,
        /// Whether all pages are compared at the end.
        debug: bool,
        /// How the stream may go in blocks ([`crate::command`]); none: over one connection, as it is. A target that does not know of it
        /// does not answer to it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blocks: Option<BlocksOffer>,
        /// What the domain needs; a target that has it not refuses.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        needs: Option<Needs>,
    },
    /// The source has written down that the target may run the domain.
    Given,
    /// xl has failed at the source: what has not come by now does not come.
    GaveUp,
    /// What would a migration be? The first line of its connection; answered by [`FromTarget::Checked`].
    Check(Box<Inquiry>),
    /// What became of a migration? The first line of its connection.
    Ask {
        /// The migration.
        id: Token,
        /// Name of its domain.
        domain: String,
    },
    /// A question of `doctor`'s; nothing but such questions comes on its connection.
    Examine(Question),
}

/// What the target says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromTarget {
    /// The other connections may come.
    Ready {
        /// Why both sides run libxl's own helper, although the other was wanted.
        stock_because: Option<String>,
        /// Connections over which the stream is to go in blocks; none: over one, as it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blocks: Option<u16>,
    },
    /// No.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// What became of the domain, once for all.
    Verdict(Verdict),
    /// What it is and has.
    Checked(Box<Findings>),
    /// xl is done.
    Finished(Box<TargetOutcome>),
    /// An answer to `doctor`.
    Examined(Answer),
}

/// How it ended at the target.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TargetOutcome {
    /// Whether the domain runs there.
    pub started: bool,
    /// What xl said last, when it failed.
    pub error: Option<String>,
    /// Whether a half-received domain was removed.
    pub incoming_destroyed: bool,
    /// What the helper reports; none from the stock helper.
    pub restore: Option<RestoreReport>,
    /// Lines of xl's log which say that a page differs: all that a comparison under the stock helper tells.
    pub mismatch_lines: u64,
}

/// Why a line could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The connection broke.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other side closed it.
    #[error("the other side closed the connection")]
    Closed,
    /// Too long.
    #[error("a line of more than {0} bytes")]
    TooLong(usize),
    /// Not what is said here.
    #[error("a line that cannot be understood: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// Writes one line.
///
/// # Errors
/// [`LineError::Io`].
pub fn write_line(to: &mut impl Write, message: &impl Serialize) -> Result<(), LineError> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()?;
    Ok(())
}

/// Reads one line of at most [`LINE_MAX`] bytes.
///
/// # Errors
/// [`LineError`].
pub fn read_line<T: DeserializeOwned>(from: &mut impl BufRead) -> Result<T, LineError> {
    let mut line = Vec::new();
    from.take(LINE_MAX as u64).read_until(b'\n', &mut line)?;
    match line.last() {
        Some(b'\n') => Ok(serde_json::from_slice(&line)?),
        Some(_) if line.len() >= LINE_MAX => Err(LineError::TooLong(LINE_MAX)),
        _ => Err(LineError::Closed),
    }
}

/// Reads a greeting and not a byte more: what follows it belongs to others.
///
/// # Errors
/// [`LineError`].
pub fn read_greeting(from: &mut impl Read) -> Result<Greeting, LineError> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < GREETING_MAX {
        match from.read(&mut byte) {
            Ok(0) => return Err(LineError::Closed),
            Ok(_) if byte[0] == b'\n' => return Ok(serde_json::from_slice(&line)?),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(LineError::TooLong(GREETING_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_greeting_takes_no_byte_of_what_follows() {
        let greeting = Greeting {
            poolskip: VERSION,
            connection: Connection::Stream,
            token: Token::random().unwrap(),
            lane: 15,
        };
        let mut bytes = Vec::new();
        write_line(&mut bytes, &greeting).unwrap();
        assert!(bytes.len() <= GREETING_MAX);
        bytes.extend(b"stream");
        let mut rest = &bytes[..];
        assert_eq!(read_greeting(&mut rest).unwrap(), greeting);
        assert_eq!(rest, b"stream");
    }

    #[test]
    fn tokens_differ() {
        assert_ne!(Token::random().unwrap(), Token::random().unwrap());
    }

    #[test]
    fn lines_come_one_by_one() {
        let mut bytes = Vec::new();
        let ready = FromTarget::Ready { stock_because: None, blocks: None };
        write_line(&mut bytes, &ready).unwrap();
        let finished = FromTarget::Finished(Box::new(TargetOutcome { started: true, ..Default::default() }));
        write_line(&mut bytes, &finished).unwrap();
        let mut from = &bytes[..];
        assert_eq!(read_line::<FromTarget>(&mut from).unwrap(), ready);
        assert_eq!(read_line::<FromTarget>(&mut from).unwrap(), finished);
        assert!(matches!(read_line::<FromTarget>(&mut from), Err(LineError::Closed)));
    }

    /// What a release without blocks writes and reads.
    #[test]
    fn hosts_without_blocks_are_understood_and_understand() {
        let start = r#"{"start":{"domain":"db1","helper":"poolskip","stream_version":1,"debug":false}}"#;
        let read: FromSource = serde_json::from_str(start).unwrap();
        assert!(matches!(read, FromSource::Start { blocks: None, .. }));
        assert_eq!(serde_json::to_string(&read).unwrap(), start);
        let ready = r#"{"ready":{"stock_because":null}}"#;
        let read: FromTarget = serde_json::from_str(ready).unwrap();
        assert_eq!(read, FromTarget::Ready { stock_because: None, blocks: None });
        assert_eq!(serde_json::to_string(&read).unwrap(), ready);
        let token = Token::random().unwrap();
        let greeting = Greeting { poolskip: VERSION, connection: Connection::Stream, token, lane: 0 };
        assert!(!serde_json::to_string(&greeting).unwrap().contains("lane"));
    }

    #[test]
    fn endless_lines_end() {
        let mut endless = io::BufReader::new(io::repeat(b'x'));
        assert!(matches!(read_line::<FromSource>(&mut endless), Err(LineError::TooLong(LINE_MAX))));
        assert!(matches!(read_greeting(&mut endless), Err(LineError::TooLong(GREETING_MAX))));
    }

    proptest! {
        #[test]
        fn strangers_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = read_greeting(&mut &bytes[..]);
            let _ = read_line::<FromSource>(&mut &bytes[..]);
            let _ = read_line::<FromTarget>(&mut &bytes[..]);
        }
    }
}
