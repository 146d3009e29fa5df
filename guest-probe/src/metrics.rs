//! A status as Prometheus reads it (the text format, version 0.0.4), over HTTP or in a file.

use std::fmt::{Display, Write as _};
use std::fs;
use std::io;
use std::path::Path;

use crate::frame_table::FrameCounts;
use crate::status::Status;

/// What a scrape is answered with.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The text of a status. Tables are not in it: a label with a hundred thousand values is no metric.
pub fn text(status: &Status) -> String {
    let mut text = Text::default();
    text.family("poolskip_attached_servers", "gauge", "Running mysqld that are probed.");
    text.sample("poolskip_attached_servers", &[], status.servers.len());
    text.family("poolskip_refused_servers", "gauge", "Running mysqld that cannot be probed.");
    text.sample("poolskip_refused_servers", &[], status.refused.len());
    text.family("poolskip_frames", "gauge", "Frames of the buffer pool by state.");
    for server in &status.servers {
        let FrameCounts { free, read, written, dirty } = server.frames;
        for (state, count) in [("free", free), ("read", read), ("written", written), ("dirty", dirty)] {
            text.sample("poolskip_frames", &[("pid", &server.mysqld_pid), ("state", &state)], count);
        }
    }
    text.family("poolskip_events_total", "counter", "Events that the probes told of, by kind.");
    for server in &status.servers {
        for (kind, count) in &server.events {
            text.sample("poolskip_events_total", &[("pid", &server.mysqld_pid), ("kind", kind)], count);
        }
    }
    text.family("poolskip_events_missed_total", "counter", "Events that did not arrive, by reason.");
    for server in &status.servers {
        let pid: (_, &dyn Display) = ("pid", &server.mysqld_pid);
        for (reason, count) in [("lost", server.events_lost), ("unreadable", server.events_unreadable)] {
            text.sample("poolskip_events_missed_total", &[pid, ("reason", &reason)], count);
        }
    }
    text.family("poolskip_snapshots_total", "counter", "Times that the pool was read as a whole.");
    for server in &status.servers {
        text.sample("poolskip_snapshots_total", &[("pid", &server.mysqld_pid)], server.snapshots);
    }
    text.family("poolskip_program_runs_total", "counter", "Runs of the eBPF programs, if the kernel counts.");
    for server in &status.servers {
        for program in &server.programs {
            let labels: [(_, &dyn Display); 2] = [("pid", &server.mysqld_pid), ("program", &program.name)];
            text.sample("poolskip_program_runs_total", &labels, program.runs);
        }
    }
    text.family("poolskip_program_seconds_total", "counter", "Time in them.");
    for server in &status.servers {
        for program in &server.programs {
            let labels: [(_, &dyn Display); 2] = [("pid", &server.mysqld_pid), ("program", &program.name)];
            text.sample("poolskip_program_seconds_total", &labels, program.nanoseconds as f64 / 1e9);
        }
    }
    text.family("poolskip_answers_total", "counter", "Requests of dom0 that were answered with lists.");
    text.sample("poolskip_answers_total", &[], status.answers);
    if let Some(answer) = &status.last_answer {
        let lists = &answer.lists;
        text.family("poolskip_listed_frames", "gauge", "Frames in the last answer, by list.");
        text.sample("poolskip_listed_frames", &[("list", &"read")], lists.frames_read);
        text.sample("poolskip_listed_frames", &[("list", &"written")], lists.frames_written);
        text.family("poolskip_clean_frames", "gauge", "Clean frames at the last answer, listed or not.");
        text.sample("poolskip_clean_frames", &[], lists.pool_frames_clean);
        text.family("poolskip_left_out_frames", "gauge", "Frames in neither list, by reason.");
        for (reason, count) in &lists.left_out {
            let name = serde_json::to_value(reason).unwrap_or_default();
            text.sample("poolskip_left_out_frames", &[("reason", &name.as_str().unwrap_or_default())], count);
        }
        if let Some(cache) = &answer.page_cache {
            let help = "Cached guest pages of files in the last answer, by what became of them.";
            text.family("poolskip_cached_pages", "gauge", help);
            for (state, count) in [
                ("listed", cache.pages),
                ("changed", cache.pages_changed),
                ("without_place", cache.pages_without_place),
            ] {
                text.sample("poolskip_cached_pages", &[("state", &state)], count);
            }
        }
        text.family("poolskip_answer_seconds", "gauge", "Time that the last answer took.");
        text.sample("poolskip_answer_seconds", &[], answer.milliseconds as f64 / 1e3);
    }
    text.family("poolskip_peak_memory_bytes", "gauge", "The most memory that guest-probe ever had.");
    text.sample("poolskip_peak_memory_bytes", &[], status.peak_memory_bytes);
    text.0
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing into a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &dyn Display)], value: impl Display) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let text = text.to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{before}{label}=\"{text}\"");
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }
}

/// Writes a file of metrics so that a reader sees the old one or the new one, never a part.
///
/// # Errors
/// When it cannot be written there.
pub fn write_file(path: &Path, text: &str) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    fs::write(&partial, text)?;
    fs::rename(&partial, path)
}

/// The whole HTTP answer to a request whose head is this.
pub fn http_answer(head: &[u8], metrics: impl FnOnce() -> String) -> String {
    let mut words = head.split(|byte| *byte == b' ');
    let (status, body) = match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/metrics")) => ("200 OK", metrics()),
        (Some(b"GET"), Some(_)) => ("404 Not Found", "only /metrics is here\n".to_owned()),
        _ => ("405 Method Not Allowed", "only GET is understood\n".to_owned()),
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::left_out::LeftOut;
    use crate::lists::ListSummary;
    use crate::status::{Answer, ServerStatus};

    #[test]
    fn a_status_is_written_as_prometheus_reads_it() {
        let server = ServerStatus {
            mysqld_pid: 7,
            events: [("read".to_owned(), 5)].into(),
            events_lost: 2,
            ..ServerStatus::default()
        };
        let lists = ListSummary { left_out: [(LeftOut::IoPending, 3)].into(), ..ListSummary::default() };
        let answer = Answer { lists, milliseconds: 1500, ..Answer::default() };
        let status = Status { servers: vec![server], last_answer: Some(answer), ..Status::default() };
        let text = text(&status);
        for line in [
            "poolskip_attached_servers 1",
            "poolskip_events_total{pid=\"7\",kind=\"read\"} 5",
            "poolskip_events_missed_total{pid=\"7\",reason=\"lost\"} 2",
            "poolskip_left_out_frames{reason=\"io_pending\"} 3",
            "poolskip_answer_seconds 1.5",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in:\n{text}");
        }
        // Each family is announced once, before its samples.
        let mut families: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let all = families.len();
        families.sort_unstable();
        families.dedup();
        assert_eq!(families.len(), all);
    }

    #[test]
    fn labels_are_quoted() {
        let mut text = Text::default();
        text.sample("x", &[("a", &"q\"b\\c\nd")], 1);
        assert_eq!(text.0, "x{a=\"q\\\"b\\\\c\\nd\"} 1\n");
    }

    #[test]
    fn http_is_answered_and_refused() {
        let ask = |head: &[u8]| http_answer(head, || "x 1\n".to_owned());
        assert!(ask(b"GET /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\nx 1\n"));
        assert!(ask(b"GET / HTTP/1.1").starts_with("HTTP/1.1 404"));
        assert!(ask(b"POST /metrics HTTP/1.1").starts_with("HTTP/1.1 405"));
        assert!(ask(b"").starts_with("HTTP/1.1 405"));
    }
}
