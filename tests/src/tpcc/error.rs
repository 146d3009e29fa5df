//! Why the generator ends.

use std::path::PathBuf;

use super::DATABASE;

/// Why load, run or check failed.
#[derive(Debug, thiserror::Error)]
pub enum TpccError {
    /// Nobody answers.
    #[error("cannot connect to the server's socket {socket}: {source}", socket = socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the client says.
        source: mysql::Error,
    },
    /// A statement failed in a way that another try does not mend.
    #[error("the server, at {at}: {source}")]
    Server {
        /// What was being done.
        at: &'static str,
        /// What the server or the client says.
        source: mysql::Error,
    },
    /// A row that must be there is not.
    #[error("{what} is not in the tables: `tpcc check` tells more, `tpcc load` makes them anew")]
    Missing {
        /// Which row.
        what: String,
    },
    /// The tables were never loaded, or not to the end.
    #[error("schema {DATABASE} has no loaded tables ({reason}): run `tpcc load` first")]
    NotLoaded {
        /// What was found instead.
        reason: String,
    },
    /// A parameter is out of its range.
    #[error("{name} is {value}, and may be {allowed}")]
    Parameter {
        /// Which.
        name: &'static str,
        /// What was given.
        value: u64,
        /// What may be.
        allowed: &'static str,
    },
    /// A transaction lost every one of its tries to a deadlock or a lock wait.
    #[error("a transaction was chosen as a deadlock's victim {tries} times in a row")]
    Retries {
        /// How often it was tried.
        tries: u32,
    },
    /// A line of the time line could not be written.
    #[error("cannot write the time line: {0}")]
    Output(#[from] std::io::Error),
}

/// For `map_err`: a server's error while something was being done.
pub(super) fn at(at: &'static str) -> impl FnOnce(mysql::Error) -> TpccError {
    move |source| TpccError::Server { at, source }
}

/// Error numbers of InnoDB that say: roll back, and try again. 1213 is a deadlock's victim, 1205 a lock wait that took too long.
const AGAIN: [u16; 2] = [1205, 1213];

impl TpccError {
    /// Whether the same transaction may succeed when it is tried again.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Server { source: mysql::Error::MySqlError(error), .. } if AGAIN.contains(&error.code))
    }
}
