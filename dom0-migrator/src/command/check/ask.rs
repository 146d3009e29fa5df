//! Asking a target what it is and has, and trying out the link to it.

use std::io::Write as _;
use std::time::{Duration, Instant};

use crate::command::connection::{self, Transport};
use crate::control::{self, Connection, FromSource, FromTarget, LineError, Token};
use crate::inquiry::{Findings, Inquiry, Measured};

/// How long the target may take to answer: it reads for a second.
const ANSWER: Duration = Duration::from_secs(60);
/// For how long bytes are sent.
const SENDING: Duration = Duration::from_secs(1);
/// How long they may take to arrive, on a link that is slow for its buffers.
const ARRIVAL: Duration = Duration::from_secs(60);

/// Why a target has not answered.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// It cannot be reached.
    #[error("cannot reach {target}: {source}")]
    Unreachable {
        /// The target.
        target: String,
        /// What went wrong.
        source: LineError,
    },
    /// It cannot be talked to, or does not know the question.
    #[error("{target} does not answer: {source}")]
    Silent {
        /// The target.
        target: String,
        /// What went wrong.
        source: LineError,
    },
    /// It refuses.
    #[error("{target} refuses: {reason}")]
    Refused {
        /// The target.
        target: String,
        /// Why.
        reason: String,
    },
}

/// Asks.
///
/// # Errors
/// [`AskError`].
pub fn ask(target: &str, inquiry: &Inquiry, transport: &Transport) -> Result<Findings, AskError> {
    let unreachable = |source| AskError::Unreachable { target: target.to_owned(), source };
    let silent = |source| AskError::Silent { target: target.to_owned(), source };
    let token = Token::random().map_err(|error| unreachable(error.into()))?;
    let mut control =
        connection::connect(target, Connection::Control, &token, transport).map_err(unreachable)?;
    let mut lines = connection::reader(&control.socket).map_err(|error| silent(error.into()))?;
    let _ = control.socket.set_read_timeout(Some(ANSWER));
    control::write_line(&mut control.socket, &FromSource::Check(Box::new(inquiry.clone())))
        .map_err(silent)?;
    match control::read_line(&mut lines).map_err(silent)? {
        FromTarget::Checked(findings) => Ok(*findings),
        FromTarget::Refused { reason } => Err(AskError::Refused { target: target.to_owned(), reason }),
        other => Err(AskError::Refused {
            target: target.to_owned(),
            reason: format!("it answers {other:?}, which is none"),
        }),
    }
}

/// Tries out the link: what arrives over so many connections at once.
///
/// # Errors
/// [`LineError`].
pub fn try_link(target: &str, connections: u16, transport: &Transport) -> Result<Measured, LineError> {
    let token = Token::random()?;
    let noise = noise();
    let wires = (0..connections.max(1))
        .map(|_| connection::connect(target, Connection::Probe, &token, transport))
        .collect::<Result<Vec<_>, _>>()?;
    let began = Instant::now();
    let arrived = std::thread::scope(|scope| {
        let sending: Vec<_> = wires
            .into_iter()
            .map(|mut wire| {
                let noise = &noise;
                scope.spawn(move || -> Result<u64, LineError> {
                    wire.socket.set_write_timeout(Some(ARRIVAL))?;
                    while began.elapsed() < SENDING {
                        wire.socket.write_all(noise)?;
                    }
                    wire.socket.shutdown(std::net::Shutdown::Write)?;
                    wire.socket.set_read_timeout(Some(ARRIVAL))?;
                    let measured: Measured = control::read_line(&mut connection::reader(&wire.socket)?)?;
                    Ok(measured.bytes)
                })
            })
            .collect();
        let ended = sending.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread panicked").into()))
        });
        ended.sum::<Result<u64, LineError>>()
    })?;
    Ok(Measured { bytes: arrived, seconds: began.elapsed().as_secs_f64() })
}

/// Bytes that nothing on the way makes fewer.
fn noise() -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"noise");
    let mut bytes = vec![0; 64 * 1024];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}
