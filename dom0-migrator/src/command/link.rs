//! The source's connections to the target, and asking it what became of a domain.

use std::io::BufReader;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::bundle::{self, BlocksReport, Compression};
use super::connection::{self, Transport, Wire};
use super::domain::Domain;
use super::summary::WireBytes;
use crate::control::{
    self, BlocksOffer, Connection, FromSource, FromTarget, HelperKind, LineError, STREAM_VERSION,
    TargetOutcome, Token,
};
use crate::handover::Verdict;
use crate::inquiry::Needs;

/// How long the target may take to clean up and report.
const TARGET: Duration = Duration::from_secs(120);
/// How long the target may take to answer before anything is begun.
const ANSWER: Duration = Duration::from_secs(30);
/// How long the target may take to start a domain that it was given, and to say so. The source's copy stands still meanwhile.
const VERDICT: Duration = Duration::from_secs(30);
/// For how long it is asked again after that, or after the connection broke.
const ASKING: Duration = Duration::from_secs(60);
/// Between two attempts to ask.
const PAUSE: Duration = Duration::from_secs(1);

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The target cannot be reached, or does not answer.
    #[error("{what} {target}: {source}; does `dom0-migrator receive` listen there?")]
    Target {
        /// What was tried.
        what: &'static str,
        /// The target.
        target: String,
        /// What went wrong.
        source: LineError,
    },
    /// The target says no.
    #[error("{target} refuses: {reason}")]
    Refused {
        /// The target.
        target: String,
        /// Why.
        reason: String,
    },
    /// The system says no.
    #[error("control connection: {0}")]
    System(#[from] std::io::Error),
}

/// How a link is wanted.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// How connections are made.
    pub transport: Transport,
    /// TCP connections of the stream.
    pub connections: u16,
    /// How the stream is compressed.
    pub compression: Compression,
    /// What the domain needs.
    pub needs: Needs,
}

/// The connections: control, stream (one, or several as one) and side channel.
pub struct Link {
    /// Where `receive` listens.
    pub target: String,
    /// What ties the connections together.
    pub token: Token,
    /// Why both sides run libxl's own helper, although the other was wanted.
    pub stock_because: Option<String>,
    /// Why the stream goes over one connection, uncompressed, although something else was wanted.
    pub one_because: Option<String>,
    control: Wire,
    lines: BufReader<TcpStream>,
    stream: Wire,
    side: Wire,
    transport: Transport,
    verdict: Option<Verdict>,
    finished: Option<TargetOutcome>,
}

impl Link {
    /// Connects, and asks the target to receive a domain.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn open(
        target: &str,
        token: Token,
        domain: &Domain,
        helper: HelperKind,
        debug: bool,
        wanted: Wanted,
    ) -> Result<Self, LinkError> {
        let Wanted { transport, connections, compression, needs } = wanted;
        let at = |what| {
            let target = target.to_owned();
            move |source| LinkError::Target { what, target, source }
        };
        let refused = |reason| LinkError::Refused { target: target.to_owned(), reason };
        let mut control = connection::connect(target, Connection::Control, &token, &transport)
            .map_err(at("cannot reach"))?;
        let mut lines = connection::reader(&control.socket)?;
        control.socket.set_read_timeout(Some(ANSWER))?;
        let offer = BlocksOffer { version: bundle::VERSION, connections: connections.max(1) };
        let offer = (connections > 1 || compression != Compression::Off).then_some(offer);
        let start = FromSource::Start {
            domain: domain.name.clone(),
            helper,
            stream_version: STREAM_VERSION,
            debug,
            blocks: offer,
            needs: Some(needs),
        };
        control::write_line(&mut control.socket, &start).map_err(at("cannot talk to"))?;
        let (stock_because, blocks) = match control::read_line(&mut lines).map_err(at("no answer from"))? {
            FromTarget::Ready { stock_because, blocks } => (stock_because, blocks),
            FromTarget::Refused { reason } => return Err(refused(reason)),
            FromTarget::Finished(outcome) => return Err(refused(outcome.error.unwrap_or_default())),
            other => return Err(refused(format!("it says {other:?} already"))),
        };
        let granted = offer.and(blocks).map(|lanes| lanes.clamp(1, connections.max(1)));
        let one_because = (offer.is_some() && granted.is_none()).then(|| {
            format!("{target} does not know blocks of version {}: its release is another", bundle::VERSION)
        });
        let mut lanes = (0..granted.unwrap_or(1))
            .map(|lane| connection::connect_lane(target, Connection::Stream, lane, &token, &transport))
            .collect::<Result<Vec<_>, _>>()
            .map_err(at("cannot reach"))?;
        let stream = match (granted, lanes.pop()) {
            (None, Some(only)) => only,
            (_, last) => {
                lanes.extend(last);
                Wire::of_several(lanes, compression)?
            }
        };
        let side =
            connection::connect(target, Connection::Side, &token, &transport).map_err(at("cannot reach"))?;
        Ok(Self {
            target: target.to_owned(),
            token,
            control,
            lines,
            stream,
            side,
            stock_because,
            one_because,
            transport,
            verdict: None,
            finished: None,
        })
    }

    /// What xl's stream goes through.
    pub fn stream(&self) -> &TcpStream {
        &self.stream.socket
    }

    /// What of the stream went in blocks.
    pub fn blocks(&self) -> Option<BlocksReport> {
        self.stream.blocks()
    }

    /// What the helpers talk over.
    pub fn side(&self) -> &TcpStream {
        &self.side.socket
    }

    /// Bytes on the network so far.
    pub fn carried(&self) -> WireBytes {
        WireBytes {
            stream: self.stream.carried().total(),
            side: self.side.carried().total(),
            control: self.control.carried().total(),
        }
    }

    /// Tells the target that it may run the domain, which the source's record must say already; what became of it. When the
    /// connection breaks, the target is asked anew for a while.
    ///
    /// # Errors
    /// Why it is not known.
    pub fn give(&mut self, domain: &str) -> Result<Verdict, String> {
        let told = control::write_line(&mut self.control.socket, &FromSource::Given);
        let _ = self.control.socket.set_read_timeout(Some(VERDICT));
        let mut problem = match told.and_then(|()| self.hear_verdict()) {
            Ok(verdict) => return Ok(verdict),
            Err(error) => error.to_string(),
        };
        let until = Instant::now() + ASKING;
        tracing::warn!(
            problem,
            target = self.target,
            "the target did not say what became of the domain; it is asked again"
        );
        while Instant::now() < until {
            match ask(&self.target, &self.token, domain, &self.transport) {
                Ok(verdict) => return Ok(verdict),
                Err(error) => problem = error,
            }
            std::thread::sleep(PAUSE);
        }
        Err(problem)
    }

    fn hear_verdict(&mut self) -> Result<Verdict, LineError> {
        loop {
            if let Some(verdict) = self.verdict {
                return Ok(verdict);
            }
            self.hear()?;
        }
    }

    fn hear(&mut self) -> Result<(), LineError> {
        match control::read_line(&mut self.lines)? {
            FromTarget::Verdict(verdict) => self.verdict = Some(verdict),
            FromTarget::Finished(outcome) => self.finished = Some(*outcome),
            other => tracing::warn!(?other, target = self.target, "said out of turn"),
        }
        Ok(())
    }

    /// Ends stream and side channel: xl is done here, whatever the target still waits for; and says so when it failed.
    pub fn hang_up(&mut self, migrated: bool) {
        if !migrated && let Err(error) = control::write_line(&mut self.control.socket, &FromSource::GaveUp) {
            tracing::warn!(%error, target = self.target, "could not be told that xl has failed");
        }
        self.stream.hang_up();
        self.side.hang_up();
    }

    /// What the target says in the end.
    ///
    /// # Errors
    /// Why it does not, in words.
    pub fn outcome(&mut self) -> Result<TargetOutcome, String> {
        let _ = self.control.socket.set_read_timeout(Some(TARGET));
        loop {
            if let Some(outcome) = self.finished.take() {
                return Ok(outcome);
            }
            self.hear().map_err(|error| format!("{} did not say how it ended: {error}", self.target))?;
        }
    }
}

/// Asks a target what became of a migration; it decides now, if that was left open.
///
/// # Errors
/// Why it is not known, in words.
pub fn ask(target: &str, id: &Token, domain: &str, transport: &Transport) -> Result<Verdict, String> {
    let failed = |error: LineError| format!("{target}: {error}");
    let token = Token::random().map_err(|error| error.to_string())?;
    let mut control = connection::connect(target, Connection::Control, &token, transport).map_err(failed)?;
    let mut lines = connection::reader(&control.socket).map_err(|error| error.to_string())?;
    let _ = control.socket.set_read_timeout(Some(VERDICT));
    let question = FromSource::Ask { id: id.clone(), domain: domain.to_owned() };
    control::write_line(&mut control.socket, &question).map_err(failed)?;
    match control::read_line(&mut lines).map_err(failed)? {
        FromTarget::Verdict(verdict) => Ok(verdict),
        FromTarget::Refused { reason } => Err(format!("{target} says: {reason}")),
        other => Err(format!("{target} says {other:?}, which is no answer")),
    }
}
