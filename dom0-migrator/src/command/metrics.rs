//! Figures for Prometheus: of the migration that runs, on a port of this process, and of that and the last one in a file that
//! node_exporter's textfile collector reads.

use std::fmt::Write as _;
use std::io::{self, Read, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::progress::Status;
use super::remaining::Remaining;
use super::summary::Outcome;
use crate::engine::{Way, WayCounts};
use crate::report_file::ReportFile;

/// How long a client may take to ask, and to take the answer.
const CLIENT: Duration = Duration::from_secs(2);
/// How often the server looks whether it is to end.
const TICK_MILLISECONDS: u16 = 200;
/// Longest request that is read.
const REQUEST_MAX: u64 = 8192;
/// Ways that are counted.
const WAYS: [(&str, Way); 9] = [
    ("no_data", Way::NoData),
    ("zero", Way::Zero),
    ("raw", Way::Raw),
    ("resent", Way::Resent),
    ("page_table", Way::PageTable),
    ("referenced", Way::Referenced),
    ("accepted", Way::Accepted),
    ("refused", Way::Refused),
    ("replaced", Way::Replaced),
];

/// Where figures go.
#[derive(Debug, Default)]
pub struct Metrics {
    labels: String,
    server: Option<Server>,
    file: Option<PathBuf>,
    warned: bool,
}

impl Metrics {
    /// For a migration. The port is taken at once.
    ///
    /// # Errors
    /// What the system says, when the port cannot be had.
    pub fn start(
        domain: &str,
        target: &str,
        listen: Option<SocketAddr>,
        file: Option<&Path>,
    ) -> io::Result<Self> {
        let labels = format!("domain=\"{}\",target=\"{}\"", escape(domain), escape(target));
        let server = listen.map(Server::start).transpose()?;
        Ok(Self { labels, server, file: file.map(Path::to_owned), warned: false })
    }

    /// The migration is this far.
    pub fn running(&mut self, status: &Status) {
        if self.server.is_some() || self.file.is_some() {
            let text = running(&self.labels, status);
            self.publish(text);
        }
    }

    /// The migration is over.
    pub fn over(&mut self, report: &ReportFile) {
        if self.server.is_some() || self.file.is_some() {
            let text = last(&self.labels, report);
            self.publish(text);
        }
    }

    fn publish(&mut self, text: String) {
        if let Some(path) = &self.file
            && let Err(error) = write_file(path, &text)
            && !std::mem::replace(&mut self.warned, true)
        {
            tracing::warn!(%error, path = %path.display(), "metrics cannot be written; the migration goes on");
        }
        if let Some(server) = &self.server {
            *server.text.lock().unwrap_or_else(PoisonError::into_inner) = text;
        }
    }
}

/// Replaces a file as a whole, readable for all: the collector is seldom root.
fn write_file(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The collector takes files named *.prom only, so a half-written one is never read.
    let mut file = tempfile::Builder::new().prefix(".poolskip-").tempfile_in(directory)?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.persist(path).map(|_| ()).map_err(|error| error.error)
}

/// A label's value.
fn escape(text: &str) -> String {
    text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

/// Text in Prometheus' exposition format.
struct Exposition<'a> {
    labels: &'a str,
    text: String,
}

impl Exposition<'_> {
    /// A metric: name, type, help, and values with more labels.
    fn metric(&mut self, name: &str, kind: &str, help: &str, values: &[(String, f64)]) {
        let labels = self.labels;
        // Writing into a String cannot fail.
        let _ = writeln!(self.text, "# HELP poolskip_{name} {help}\n# TYPE poolskip_{name} {kind}");
        for (more, value) in values {
            let _ = writeln!(self.text, "poolskip_{name}{{{labels}{more}}} {value}");
        }
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.metric(name, kind, help, &[(String::new(), value)]);
    }

    fn ways(&mut self, name: &str, kind: &str, help: &str, counts: &WayCounts) {
        let values = WAYS.map(|(label, way)| (format!(",way=\"{label}\""), counts.get(way) as f64));
        self.metric(name, kind, help, &values);
    }
}

/// Of a migration that runs.
fn running(labels: &str, status: &Status) -> String {
    let mut out = Exposition { labels, text: String::new() };
    out.one("migration_running", "gauge", "1 while a migration runs.", 1.0);
    out.one("migration_seconds", "gauge", "Seconds since the migration began.", status.seconds);
    out.one("migration_round", "gauge", "The pass over memory, from 1.", f64::from(status.round));
    let pages = [
        (",state=\"done\"".to_owned(), status.done as f64),
        (",state=\"all\"".to_owned(), status.total as f64),
    ];
    out.metric("migration_round_pages", "gauge", "Pages of this pass.", &pages);
    out.one("migration_wire_bytes_total", "counter", "Bytes on all connections.", status.wire_bytes as f64);
    if let Some(source) = &status.source {
        out.ways(
            "migration_pages_total",
            "counter",
            "Pages by the way that they went, each time.",
            &source.ways,
        );
        out.one(
            "migration_pages_left_total",
            "counter",
            "Pages left for a later pass, each time, since they were written to again before they were sent.",
            source.pages_left_out as f64,
        );
        let classes = [
            ("page_data", source.bytes_page_data),
            ("references", source.bytes_references),
            ("markers", source.bytes_markers),
            ("other", source.bytes_other()),
        ];
        let classes = classes.map(|(class, bytes)| (format!(",class=\"{class}\""), bytes as f64));
        out.metric("migration_stream_bytes_total", "counter", "Bytes of the stream by class.", &classes);
        out.one(
            "migration_window_pages",
            "gauge",
            "Pages kept until the target accepts or refuses their references.",
            source.window_pages as f64,
        );
    }
    // A time that is not known is no number: the metric is then missing.
    if let Remaining::About(seconds) | Remaining::AtLeast(seconds) = status.remaining {
        let is_bound = matches!(status.remaining, Remaining::AtLeast(_));
        let label = format!(",is=\"{}\"", if is_bound { "at_least" } else { "about" });
        out.metric(
            "migration_remaining_seconds",
            "gauge",
            "Seconds left, as measured so far.",
            &[(label, seconds)],
        );
    }
    out.text
}

/// Of the last migration.
fn last(labels: &str, report: &ReportFile) -> String {
    let mut out = Exposition { labels, text: String::new() };
    out.one("migration_running", "gauge", "1 while a migration runs.", 0.0);
    let ended = report.began.seconds() as f64 + report.total_seconds;
    out.one("last_migration_end_timestamp_seconds", "gauge", "When the last migration ended.", ended);
    let outcome = match report.outcome {
        Outcome::Migrated => 1.0,
        _ => 0.0,
    };
    out.one("last_migration_success", "gauge", "1 if the domain went to the target.", outcome);
    out.one("last_migration_seconds", "gauge", "How long the last migration took.", report.total_seconds);
    if let Some(downtime) = &report.downtime {
        out.one(
            "last_migration_downtime_seconds",
            "gauge",
            "How long the domain stood still.",
            downtime.seconds,
        );
    }
    out.one("last_migration_wire_bytes", "gauge", "Bytes on all connections.", report.wire_bytes as f64);
    if let Some(bytes) = report.stock_bytes {
        out.one("last_migration_stock_bytes", "gauge", "Bytes that libxenguest wrote.", bytes as f64);
    }
    if let Some(map) = &report.memory {
        out.ways("last_migration_pages", "gauge", "Pages by the way that they went last.", &map.pages);
    }
    out.text
}

/// Answers `GET /metrics`, one client after the other.
#[derive(Debug)]
struct Server {
    text: Arc<Mutex<String>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let text = Arc::new(Mutex::new(String::new()));
        let ended = Arc::new(AtomicBool::new(false));
        let (shown, end) = (text.clone(), ended.clone());
        let serve = move || {
            while !end.load(Ordering::Acquire) {
                let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
                let Ok(1..) = poll(&mut waiting, PollTimeout::from(TICK_MILLISECONDS)) else { continue };
                if let Ok((client, _)) = listener.accept() {
                    let text = shown.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    // A client that fails is the client's matter.
                    let _ = answer(client, &text);
                }
            }
        };
        let thread = std::thread::Builder::new().name("metrics".into()).spawn(serve)?;
        Ok(Self { text, ended, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Reads one request and answers it.
fn answer(mut client: TcpStream, text: &str) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT))?;
    client.set_write_timeout(Some(CLIENT))?;
    let until = std::time::Instant::now() + CLIENT;
    let (mut request, mut piece) = (Vec::new(), [0; 1024]);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = client.read(&mut piece)?;
        if length == 0 || request.len() as u64 > REQUEST_MAX || std::time::Instant::now() > until {
            return Ok(());
        }
        request.extend_from_slice(piece.get(..length).unwrap_or_default());
    }
    let (status, body) = if request.starts_with(b"GET /metrics ") {
        ("200 OK", text)
    } else {
        ("404 Not Found", "this is /metrics of dom0-migrator\n")
    };
    let length = body.len();
    write!(
        client,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::SourceSample;

    fn status(remaining: Remaining) -> Status {
        let ways = WayCounts { raw: 7, accepted: 3, ..WayCounts::default() };
        let source = SourceSample { ways, bytes_out: 100, bytes_page_data: 60, ..SourceSample::default() };
        Status {
            seconds: 2.5,
            round: 1,
            done: 10,
            total: 20,
            wire_bytes: 123,
            wire_rate: 0.0,
            source: Some(source),
            remaining,
        }
    }

    /// Every line is a comment or `name{labels} number`.
    fn check(text: &str) {
        for line in text.lines().filter(|line| !line.starts_with("# ")) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("poolskip_") && name.ends_with('}'), "{line}");
            assert!(value.parse::<f64>().unwrap().is_finite(), "{line}");
        }
    }

    #[test]
    fn what_is_not_known_is_missing() {
        let text = running("domain=\"a\"", &status(Remaining::Unknown));
        check(&text);
        assert!(!text.contains("remaining"));
        assert!(text.contains("poolskip_migration_pages_total{domain=\"a\",way=\"raw\"} 7\n"), "{text}");
        assert!(text.contains("poolskip_migration_stream_bytes_total{domain=\"a\",class=\"other\"} 40\n"));
        let text = running("domain=\"a\"", &status(Remaining::About(4.0)));
        assert!(text.contains("poolskip_migration_remaining_seconds{domain=\"a\",is=\"about\"} 4\n"));
    }

    fn get(address: SocketAddr, request: &str) -> String {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn a_port_and_a_file_have_the_figures() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("poolskip.prom");
        let address: SocketAddr = {
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap()
        };
        let mut metrics = Metrics::start("a\"b\\c\nd", "t", Some(address), Some(&file)).unwrap();
        metrics.running(&status(Remaining::AtLeast(9.0)));
        let text = std::fs::read_to_string(&file).unwrap();
        check(&text);
        assert!(text.contains(r#"poolskip_migration_running{domain="a\"b\\c\nd",target="t"} 1"#), "{text}");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
        let answer = get(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with(&text), "{answer}");
        assert!(get(address, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        // One that says nothing, or too much, is let go, and the next is served.
        drop(TcpStream::connect(address).unwrap());
        let _ = TcpStream::connect(address).unwrap().write_all(&[b'x'; 100_000]);
        assert!(get(address, "GET /metrics HTTP/1.0\r\n\r\n").contains("200 OK"));
        assert!(Metrics::start("a", "b", Some(address), None).is_err(), "the port is taken");
        drop(metrics);
        assert!(TcpStream::connect(address).is_err(), "nothing listens any more");
    }
}
