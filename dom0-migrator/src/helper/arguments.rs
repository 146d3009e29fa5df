//! The command line by which libxl starts its save helper.
//!
//! ```text
//! --save-domain    io_fd recv_fd      domid xcflags cbflags stream_type
//! --restore-domain io_fd send_back_fd domid store_evtchn store_domid console_evtchn console_domid cbflags stream_type
//! ```
//!
//! All are decimal numbers; a file descriptor that is not there is -1. It is the same from Xen 4.17 to 4.22.

use std::ffi::OsString;

use crate::xen::DomainId;
use crate::xen::guest::Channels;

use super::message::{Callback, CallbackSet};

/// First argument of a save.
pub const SAVE: &str = "--save-domain";
/// First argument of a restore.
pub const RESTORE: &str = "--restore-domain";

/// What libxl wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arguments {
    /// Write a domain to a stream.
    Save(SaveArguments),
    /// Read a domain from a stream.
    Restore(RestoreArguments),
}

/// Arguments of a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveArguments {
    /// The stream.
    pub io_fd: i32,
    /// The domain.
    pub domain: DomainId,
    /// `XCFLAGS_*`: bit 0 live, bit 1 debug.
    pub flags: u32,
    /// Callbacks that libxl answers.
    pub callbacks: CallbackSet,
}

impl SaveArguments {
    /// Whether all pages are sent once more to be compared (`XCFLAGS_DEBUG`).
    pub fn debug(&self) -> bool {
        self.flags & 2 != 0
    }
}

/// Arguments of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoreArguments {
    /// The stream.
    pub io_fd: i32,
    /// The domain, created and empty.
    pub domain: DomainId,
    /// Its event channels.
    pub channels: Channels,
    /// Callbacks that libxl answers.
    pub callbacks: CallbackSet,
}

/// Why a command line was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// An argument is missing.
    #[error("argument {index} ({name}) of {mode} is missing")]
    Missing {
        /// First argument.
        mode: &'static str,
        /// The argument's place, from 1.
        index: usize,
        /// What it is.
        name: &'static str,
    },
    /// An argument is no number, or out of range.
    #[error("argument {index} ({name}) of {mode} is {value:?}, not a number in range")]
    NotANumber {
        /// First argument.
        mode: &'static str,
        /// The argument's place, from 1.
        index: usize,
        /// What it is.
        name: &'static str,
        /// What it says.
        value: String,
    },
    /// There are more arguments than this protocol has: perhaps a newer libxl.
    #[error("{mode} has {count} arguments more than this program knows; it knows libxl of Xen 4.17 to 4.22")]
    TooMany {
        /// First argument.
        mode: &'static str,
        /// How many.
        count: usize,
    },
    /// A stream with checkpoints (Remus 1, COLO 2).
    #[error(
        "stream type {0}: checkpointed streams (Remus, COLO) are libxl's own helper's work, unset LIBXL_SAVE_HELPER"
    )]
    Checkpointed(u32),
    /// libxl does not answer a callback that is needed.
    #[error("libxl does not offer the callback {0:?} in {1:?}")]
    NoCallback(Callback, CallbackSet),
}

struct Reader<'a> {
    mode: &'static str,
    rest: std::slice::Iter<'a, OsString>,
    index: usize,
}

impl Reader<'_> {
    fn next<N: std::str::FromStr>(&mut self, name: &'static str) -> Result<N, ArgumentError> {
        self.index += 1;
        let (mode, index) = (self.mode, self.index);
        let argument = self.rest.next().ok_or(ArgumentError::Missing { mode, index, name })?;
        let value = argument.to_string_lossy();
        value.parse().map_err(|_| ArgumentError::NotANumber { mode, index, name, value: value.into_owned() })
    }

    fn domain(&mut self, name: &'static str) -> Result<DomainId, ArgumentError> {
        self.next(name).map(DomainId)
    }

    fn end(self, stream_type: u32) -> Result<(), ArgumentError> {
        match (self.rest.len(), stream_type) {
            (0, 0) => Ok(()),
            (0, other) => Err(ArgumentError::Checkpointed(other)),
            (count, _) => Err(ArgumentError::TooMany { mode: self.mode, count }),
        }
    }
}

impl Arguments {
    /// Parses the arguments after the program's name. `None` when the first is neither [`SAVE`] nor [`RESTORE`].
    ///
    /// # Errors
    /// [`ArgumentError`] when the rest is not what libxl gives.
    pub fn parse(arguments: &[OsString]) -> Option<Result<Self, ArgumentError>> {
        let (mode, rest) = arguments.split_first()?;
        if mode == SAVE {
            Some(Self::save(Reader { mode: SAVE, rest: rest.iter(), index: 0 }))
        } else if mode == RESTORE {
            Some(Self::restore(Reader { mode: RESTORE, rest: rest.iter(), index: 0 }))
        } else {
            None
        }
    }

    fn save(mut reader: Reader<'_>) -> Result<Self, ArgumentError> {
        let io_fd = reader.next("io_fd")?;
        let _recv_fd: i32 = reader.next("recv_fd")?;
        let arguments = SaveArguments {
            io_fd,
            domain: reader.domain("domid")?,
            flags: reader.next("xcflags")?,
            callbacks: CallbackSet(reader.next("cbflags")?),
        };
        let stream_type = reader.next("stream_type")?;
        reader.end(stream_type)?;
        arguments.callbacks.require(Callback::Suspend)?;
        Ok(Self::Save(arguments))
    }

    fn restore(mut reader: Reader<'_>) -> Result<Self, ArgumentError> {
        let io_fd = reader.next("io_fd")?;
        let _send_back_fd: i32 = reader.next("send_back_fd")?;
        let arguments = RestoreArguments {
            io_fd,
            domain: reader.domain("domid")?,
            channels: Channels {
                store_evtchn: reader.next("store_evtchn")?,
                store_domain: reader.domain("store_domid")?,
                console_evtchn: reader.next("console_evtchn")?,
                console_domain: reader.domain("console_domid")?,
            },
            callbacks: CallbackSet(reader.next("cbflags")?),
        };
        let stream_type = reader.next("stream_type")?;
        reader.end(stream_type)?;
        Ok(Self::Restore(arguments))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Option<Result<Arguments, ArgumentError>> {
        Arguments::parse(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    /// As seen in the lab, Xen 4.17.
    #[test]
    fn a_save_is_understood() {
        let Some(Ok(Arguments::Save(save))) = parse("--save-domain 8 -1 3 3 136 0") else { panic!() };
        assert_eq!((save.io_fd, save.domain, save.debug()), (8, DomainId(3), true));
        assert!(save.callbacks.has(Callback::Suspend) && save.callbacks.has(Callback::SwitchQemuLogdirty));
    }

    #[test]
    fn a_restore_is_understood() {
        let Some(Ok(Arguments::Restore(restore))) = parse("--restore-domain 0 1 7 3 0 4 0 768 0") else {
            panic!()
        };
        assert_eq!((restore.io_fd, restore.domain), (0, DomainId(7)));
        assert_eq!((restore.channels.store_evtchn, restore.channels.console_evtchn), (3, 4));
        assert!(restore.callbacks.has(Callback::StaticDataDone));
    }

    #[test]
    fn anything_else_is_refused_with_its_reason() {
        assert_eq!(parse("migrate db1 host"), None);
        assert_eq!(parse(""), None);
        let error = |line| parse(line).unwrap().unwrap_err();
        assert!(matches!(error("--save-domain 8 -1 3"), ArgumentError::Missing { name: "xcflags", .. }));
        assert!(matches!(
            error("--save-domain 8 -1 x 3 136 0"),
            ArgumentError::NotANumber { name: "domid", .. }
        ));
        assert!(matches!(error("--save-domain 8 -1 3 3 136 0 9"), ArgumentError::TooMany { count: 1, .. }));
        assert_eq!(error("--save-domain 8 -1 3 3 136 1"), ArgumentError::Checkpointed(1));
        assert!(matches!(error("--save-domain 8 -1 3 3 128 0"), ArgumentError::NoCallback(..)));
    }
}
