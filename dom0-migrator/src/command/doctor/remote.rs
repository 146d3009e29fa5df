//! What can be seen from one host of another, and between the two.

use std::collections::BTreeMap;
use std::io::{BufReader, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Doctor;
use crate::command::configuration::{Configuration, Connecting};
use crate::command::connection::{self, Wire};
use crate::command::domain;
use crate::control::{self, Connection, FromSource, FromTarget, STREAM_VERSION, Token};
use crate::disks;
use crate::examination::blocks::{Comparison, compare};
use crate::examination::{Answer, Blocks, Finding, Host, LINK_MAX, Question};
use crate::xen::DomainId;
use crate::xen::release::Release;
use crate::xenstore::Xenstore;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);
/// How long the link is filled at least, once it is known how much fits.
const FILL: Duration = Duration::from_millis(500);
/// With how many bytes that begins.
const FILL_FIRST: u64 = 1 << 20;
/// A difference of clocks that is worth a word.
const CLOCKS: Duration = Duration::from_secs(2);

/// Looks: what the other host says of itself, and what there is between the two.
pub fn look(target: &str, options: &Doctor, configuration: &Configuration) -> (Vec<Finding>, Vec<Finding>) {
    let what = "connection";
    let mut peer = match Peer::connect(target, &options.connecting, configuration) {
        Ok(peer) => peer,
        Err(problem) => {
            const LISTEN: &str = "there: `systemctl enable --now poolskip-receive.socket`; certificates of both from one authority \
                                  (`dom0-migrator pair HOST`); a firewall that lets port 8002 through";
            return (Vec::new(), vec![Finding::bad(what, problem, LISTEN)]);
        }
    };
    let mut between = Vec::new();
    let host = match peer.host() {
        Ok(host) => host,
        Err(problem) => {
            let way_out = "`receive` there may be of an older release that cannot be examined";
            return (Vec::new(), vec![Finding::bad(what, problem, way_out)]);
        }
    };
    between.push(Finding::good(
        what,
        if peer.encrypted { "encrypted, both sides known by their certificates" } else { "plain" },
    ));
    between.extend(versions(&host));
    between.push(peer.clocks());
    between.extend(peer.disks());
    if let Some(mib) = host.free_mib {
        between.push(Finding::good("room there", format!("{mib} MiB for domains")));
    }
    if !options.no_link {
        between.push(peer.link());
    }
    (host.findings, between)
}

fn versions(host: &Host) -> Vec<Finding> {
    let own = env!("CARGO_PKG_VERSION");
    let mut findings = Vec::new();
    findings.push(if host.stream_version != STREAM_VERSION {
        Finding::bad(
            "releases of Poolskip",
            format!("{own} here, {} there; their helpers do not speak with each other", host.version),
            "install the same release on both; until then migrations are plain",
        )
    } else if host.version != own {
        Finding::warning(
            "releases of Poolskip",
            format!("{own} here, {} there", host.version),
            "they work together",
        )
    } else {
        Finding::good("releases of Poolskip", format!("{own} on both"))
    });
    let here = Release::running().ok().map(|release| release.to_string());
    match (here, &host.xen) {
        (Some(here), Some(there)) if here == *there => {
            findings.push(Finding::good("releases of Xen", format!("{here} on both")));
        }
        (Some(here), Some(there)) => findings.push(Finding::warning(
            "releases of Xen",
            format!("{here} here, {there} there"),
            "Xen migrates from an older release to a newer one, seldom back",
        )),
        // Each host's own findings say so already.
        _ => {}
    }
    findings
}

/// The other host's `receive`.
pub struct Peer {
    wire: Wire,
    lines: BufReader<TcpStream>,
    encrypted: bool,
}

impl Peer {
    /// Connects, to ask.
    ///
    /// # Errors
    /// Why it cannot be asked, in words.
    pub fn connect(
        target: &str,
        connecting: &Connecting,
        configuration: &Configuration,
    ) -> Result<Self, String> {
        let transport = configuration.transport(connecting).map_err(|error| error.to_string())?;
        let token = Token::random().map_err(|error| error.to_string())?;
        let failed = |error: &dyn std::fmt::Display| format!("{target}: {error}");
        let wire = connection::connect(target, Connection::Control, &token, &transport)
            .map_err(|error| failed(&error))?;
        wire.socket.set_read_timeout(Some(ANSWER)).map_err(|error| failed(&error))?;
        wire.socket.set_write_timeout(Some(ANSWER)).map_err(|error| failed(&error))?;
        let lines = connection::reader(&wire.socket).map_err(|error| failed(&error))?;
        Ok(Self { wire, lines, encrypted: transport.identity.is_some() })
    }

    fn ask(&mut self, question: Question) -> Result<Answer, String> {
        control::write_line(&mut self.wire.socket, &FromSource::Examine(question))
            .map_err(|error| error.to_string())?;
        self.hear()
    }

    fn hear(&mut self) -> Result<Answer, String> {
        match control::read_line(&mut self.lines).map_err(|error| error.to_string())? {
            FromTarget::Examined(Answer::Not(why)) => Err(why),
            FromTarget::Examined(answer) => Ok(answer),
            FromTarget::Refused { reason } => Err(reason),
            other => Err(format!("{other:?} is no answer")),
        }
    }

    /// How it is.
    ///
    /// # Errors
    /// Why it does not say, in words.
    pub fn host(&mut self) -> Result<Host, String> {
        match self.ask(Question::Host)? {
            Answer::Host(host) => Ok(*host),
            other => Err(format!("{other:?} is no answer")),
        }
    }

    /// The difference of the two clocks, half a round trip exact; the quickest of some round trips counts.
    fn clocks(&mut self) -> Finding {
        let what = "clocks";
        let mut best: Option<(Duration, i128)> = None;
        for _ in 0..5 {
            let (before, began) = (nanos(), Instant::now());
            let there = match self.ask(Question::Clock) {
                Ok(Answer::Clock(there)) => i128::from(there),
                Ok(other) => return Finding::warning(what, format!("{other:?} is no answer"), "ask again"),
                Err(problem) => return Finding::warning(what, problem, "ask again"),
            };
            let took = began.elapsed();
            let here = before + i128::try_from(took.as_nanos() / 2).unwrap_or(0);
            if best.is_none_or(|(quickest, _)| took < quickest) {
                best = Some((took, there - here));
            }
        }
        let (took, ahead) = best.unwrap_or_default();
        let milliseconds = ahead / 1_000_000;
        let shown = format!(
            "the other one is {} ms {} (± {:.1} ms)",
            milliseconds.abs(),
            if ahead < 0 { "behind" } else { "ahead" },
            took.as_secs_f64() * 500.0
        );
        if ahead.unsigned_abs() > CLOCKS.as_nanos() {
            let way_out = "run a time daemon on both; a guest's clock jumps by as much when it is migrated";
            return Finding::warning(what, shown, way_out);
        }
        Finding::good(what, shown)
    }

    /// For each disk of a domain here: whether the same lies there.
    fn disks(&mut self) -> Vec<Finding> {
        // A disk that two domains share is compared once.
        let mut paths: BTreeMap<PathBuf, String> = BTreeMap::new();
        let surveyed = Xenstore::open().and_then(|mut store| {
            for domain in domain::all(&mut store)?.into_iter().filter(|domain| domain.id != DomainId(0)) {
                for disk in disks::survey(&mut store, domain.id)?.readable {
                    paths.entry(disk.path).or_insert_with(|| domain.name.clone());
                }
            }
            Ok(())
        });
        if surveyed.is_err() {
            // This host's own findings say so already.
            return Vec::new();
        }
        paths.iter().map(|(path, domain)| self.disk(path, domain)).collect()
    }

    /// Whether a disk of a domain here is the same there.
    pub fn disk(&mut self, path: &Path, domain: &str) -> Finding {
        let what = format!("disk {} of {domain}", path.display());
        let compared = compare(path, &mut |offsets, key| {
            let blocks = Blocks { path: path.to_owned(), key: key.hex(), offsets: offsets.to_vec() };
            match self.ask(Question::Blocks(blocks))? {
                Answer::Blocks { size, hashes } => Ok((size, hashes)),
                other => Err(format!("{other:?} is no answer")),
            }
        });
        match compared {
            Ok(Comparison::Same(blocks)) => Finding::good(
                what,
                format!("the same there, by {blocks} blocks that were read on both hosts"),
            ),
            Ok(Comparison::Blank) => Finding::warning(
                what,
                "readable there, and blank wherever it was looked at: it may be the same or not",
                "look again when something lies on it",
            ),
            Ok(Comparison::Differs(offset)) => Finding::bad(
                what,
                format!("another one has this name there: at offset {offset} something else lies on it"),
                "the guest would find another disk; give the shared one the same path on both hosts",
            ),
            Ok(Comparison::Sizes(here, there)) => Finding::bad(
                what,
                format!("{here} bytes here and {there} there: not the same disk"),
                "give the shared disk the same path on both hosts, and have both see its size",
            ),
            Err(problem) => Finding::bad(
                what,
                format!("cannot be compared: {problem}"),
                "a domain can only go where all its disks are, under the same paths",
            ),
        }
    }

    /// Fills the link for a moment.
    fn link(&mut self) -> Finding {
        let what = "link";
        match self.rate() {
            Ok(rate) => {
                let unit = if self.encrypted { "encrypted" } else { "plain" };
                Finding::good(what, format!("{:.0} MB/s on one connection, {unit}", rate / 1e6))
            }
            Err(problem) => Finding::bad(what, problem, "look at the network between the hosts"),
        }
    }

    /// Bytes per second.
    fn rate(&mut self) -> Result<f64, String> {
        let mut bytes = FILL_FIRST;
        loop {
            let began = Instant::now();
            match self.ask(Question::Link { bytes })? {
                Answer::Ready => {}
                other => return Err(format!("{other:?} is no answer")),
            }
            let chunk = vec![0x5a; 1 << 18];
            let mut left = bytes;
            while left > 0 {
                let part = usize::try_from(left).unwrap_or(chunk.len()).min(chunk.len());
                self.wire.socket.write_all(&chunk[..part]).map_err(|error| error.to_string())?;
                left -= part as u64;
            }
            match self.hear()? {
                Answer::Arrived => {}
                other => return Err(format!("{other:?} is no answer")),
            }
            let took = began.elapsed();
            if took >= FILL || bytes >= LINK_MAX {
                return Ok(bytes as f64 / took.as_secs_f64());
            }
            bytes = (bytes * 4).min(LINK_MAX);
        }
    }
}

/// Nanoseconds after 1970.
fn nanos() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i128::try_from(since.as_nanos()).unwrap_or(i128::MAX)
}
