//! The messages that a save helper sends to libxl (`libxl_save_msgs_gen.pl`; the same from Xen 4.17 to 4.22).
//!
//! ```text
//! | u16 length of the rest | u16 number | arguments, packed, native-endian |
//! string: | u32 length with its NUL | bytes | NUL |
//! ```
//!
//! A reply, where one is due, is one i32.

use crate::xen::DomainId;
use crate::xen::logger::Level;

use super::arguments::ArgumentError;

/// Longest body: the length is 16 bits wide.
const BODY_MAX: usize = u16::MAX as usize;
/// Longest string put in a message, so that two of them always fit.
const STRING_MAX: usize = 16 * 1024;

/// A message to libxl.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A line of log.
    Log {
        /// How bad it is.
        level: Level,
        /// `errno`, or -1.
        errno: i32,
        /// Who says it.
        context: &'a str,
        /// What.
        text: &'a str,
    },
    /// Progress of a step.
    Progress {
        /// Who says it.
        context: &'a str,
        /// The step.
        doing: &'a str,
        /// How much is done.
        done: u64,
        /// Of how much.
        total: u64,
    },
    /// Suspend the domain; reply 1 when done, 0 when it failed.
    Suspend,
    /// Have the device model log its writes; reply 0 when done.
    SwitchQemuLogdirty {
        /// The domain.
        domain: DomainId,
        /// On or off.
        enable: bool,
    },
    /// All static data has come; reply 0 when well.
    StaticDataDone {
        /// What did not come.
        missing: u32,
    },
    /// Guest frames of the restored domain's rings; no reply.
    RestoreResults {
        /// xenstore's.
        store_gfn: u64,
        /// The console's.
        console_gfn: u64,
    },
    /// The end; reply 0.
    Complete {
        /// What the library's function returned.
        result: i32,
        /// `errno` when that is not 0.
        errno: i32,
    },
}

/// A callback by its message's number, which is also its bit in `cbflags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Callback {
    /// [`Message::Suspend`].
    Suspend = 3,
    /// [`Message::SwitchQemuLogdirty`].
    SwitchQemuLogdirty = 7,
    /// [`Message::StaticDataDone`].
    StaticDataDone = 8,
    /// [`Message::RestoreResults`].
    RestoreResults = 9,
}

/// `cbflags`: the callbacks that libxl answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallbackSet(pub u32);

impl CallbackSet {
    /// Whether a callback is in it.
    pub fn has(self, callback: Callback) -> bool {
        self.0 & 1 << callback as u16 != 0
    }

    /// That a callback is in it.
    ///
    /// # Errors
    /// [`ArgumentError::NoCallback`] when it is not.
    pub fn require(self, callback: Callback) -> Result<(), ArgumentError> {
        if self.has(callback) { Ok(()) } else { Err(ArgumentError::NoCallback(callback, self)) }
    }
}

impl Message<'_> {
    /// Its number.
    pub fn number(&self) -> u16 {
        match self {
            Self::Log { .. } => 1,
            Self::Progress { .. } => 2,
            Self::Suspend => 3,
            Self::SwitchQemuLogdirty { .. } => 7,
            Self::StaticDataDone { .. } => 8,
            Self::RestoreResults { .. } => 9,
            Self::Complete { .. } => 10,
        }
    }

    /// Whether libxl replies to it.
    pub fn has_reply(&self) -> bool {
        !matches!(self, Self::Log { .. } | Self::Progress { .. } | Self::RestoreResults { .. })
    }

    /// Its bytes, length first.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = self.number().to_ne_bytes().to_vec();
        match *self {
            Self::Log { level, errno, context, text } => {
                body.extend(level.0.to_ne_bytes());
                body.extend(errno.to_ne_bytes());
                put_string(&mut body, context);
                put_string(&mut body, text);
            }
            Self::Progress { context, doing, done, total } => {
                put_string(&mut body, context);
                put_string(&mut body, doing);
                body.extend(done.to_ne_bytes());
                body.extend(total.to_ne_bytes());
            }
            Self::Suspend => {}
            Self::SwitchQemuLogdirty { domain, enable } => {
                body.extend(domain.0.to_ne_bytes());
                body.extend(u32::from(enable).to_ne_bytes());
            }
            Self::StaticDataDone { missing } => body.extend(missing.to_ne_bytes()),
            Self::RestoreResults { store_gfn, console_gfn } => {
                body.extend(store_gfn.to_ne_bytes());
                body.extend(console_gfn.to_ne_bytes());
            }
            Self::Complete { result, errno } => {
                body.extend(result.to_ne_bytes());
                body.extend(errno.to_ne_bytes());
            }
        }
        debug_assert!(body.len() <= BODY_MAX);
        let mut message = Vec::with_capacity(2 + body.len());
        message.extend((body.len() as u16).to_ne_bytes());
        message.extend(body);
        message
    }
}

/// Appends a string; what is beyond the most that fits, or beyond a NUL, is cut off.
fn put_string(body: &mut Vec<u8>, string: &str) {
    let bytes = string.as_bytes();
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()).min(STRING_MAX);
    body.extend((end as u32 + 1).to_ne_bytes());
    body.extend(&bytes[..end]);
    body.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fixed_messages_have_their_bytes() {
        assert_eq!(Message::Suspend.encode(), [2, 0, 3, 0]);
        assert_eq!(
            Message::SwitchQemuLogdirty { domain: DomainId(5), enable: true }.encode(),
            [10, 0, 7, 0, 5, 0, 0, 0, 1, 0, 0, 0]
        );
        assert_eq!(
            Message::Complete { result: -1, errno: 22 }.encode(),
            [10, 0, 10, 0, 0xff, 0xff, 0xff, 0xff, 22, 0, 0, 0]
        );
        assert_eq!(
            Message::RestoreResults { store_gfn: 0x102, console_gfn: 3 }.encode(),
            [18, 0, 9, 0, 2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn strings_carry_their_nul() {
        let log = Message::Log { level: Level::ERROR, errno: -1, context: "xc", text: "no" }.encode();
        let expected = [
            2 + 8 + 7 + 7,
            0,
            1,
            0,
            8,
            0,
            0,
            0,
            255,
            255,
            255,
            255,
            3,
            0,
            0,
            0,
            b'x',
            b'c',
            0,
            3,
            0,
            0,
            0,
            b'n',
            b'o',
            0,
        ];
        assert_eq!(log, expected);
    }

    #[test]
    fn callbacks_are_bits() {
        assert!(CallbackSet(136).has(Callback::Suspend));
        assert!(!CallbackSet(768).has(Callback::Suspend));
        assert!(
            CallbackSet(768).has(Callback::StaticDataDone) && CallbackSet(768).has(Callback::RestoreResults)
        );
    }

    proptest! {
        #[test]
        fn any_text_fits_and_is_framed(context in ".*", text in "(?s).{0,40000}") {
            let bytes = Message::Log { level: Level::INFO, errno: 0, context: &context, text: &text }.encode();
            prop_assert_eq!(usize::from(u16::from_ne_bytes([bytes[0], bytes[1]])), bytes.len() - 2);
            let length = u32::from_ne_bytes(bytes[12..16].try_into().unwrap()) as usize;
            prop_assert_eq!(bytes[16 + length - 1], 0);
            prop_assert!(!bytes[16..16 + length - 1].contains(&0));
        }
    }
}
