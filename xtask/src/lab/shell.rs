//! Shells of the lab's machines: each TCP connection to a machine gives a bash whose standard streams it is.
//!
//! Commands are text that this bash reads; the answer is what they wrote, then a trailer that no command writes by chance:
//! `\nTAG STATUS LENGTH\n`, LENGTH bytes of standard error, `\nTAG end\n`.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a machine may take to start a shell before it is asked again, or elsewhere.
const GREETING: Duration = Duration::from_secs(15);

/// What a command left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 128 and the signal's number for one that was killed.
    pub status: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// The same with the bytes of its standard output as they are.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Raw {
    pub(super) status: i32,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
}

impl From<Raw> for Output {
    fn from(raw: Raw) -> Self {
        Self {
            status: raw.status,
            stdout: String::from_utf8_lossy(&raw.stdout).into_owned(),
            stderr: raw.stderr,
        }
    }
}

/// A connection to a shell that has answered.
pub(super) struct Shell {
    stream: TcpStream,
    tag: String,
}

impl Shell {
    /// Connects to the first of `ports` behind which a shell answers. A guest is behind one of two, and behind none while it moves.
    ///
    /// # Errors
    /// When none does within `limit`.
    pub(super) fn connect(ports: &[u16], limit: Duration) -> Result<Self> {
        let start = Instant::now();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            match race(ports, left.min(GREETING)) {
                Some(shell) => return Ok(shell),
                None if start.elapsed() >= limit => {
                    bail!("no shell answered on port {ports:?} of this machine within {} s", limit.as_secs())
                }
                None => thread::sleep(Duration::from_millis(100).min(left)),
            }
        }
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// When it does not end within `limit`, or the connection ends first.
    pub(super) fn run(mut self, command: &str, limit: Duration) -> Result<Raw> {
        self.stream.write_all(run_script(&self.tag, command).as_bytes())?;
        self.answer(limit).with_context(|| format!("in: {command}"))
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When the machine cannot write it or `limit` passes.
    pub(super) fn push(mut self, content: &[u8], path: &str, mode: u32, limit: Duration) -> Result<Raw> {
        self.stream.set_write_timeout(Some(limit))?;
        self.stream.write_all(push_script(&self.tag, content.len(), path, mode).as_bytes())?;
        self.stream.write_all(content).with_context(|| format!("cannot send {path}"))?;
        self.answer(limit).with_context(|| format!("writing {path}"))
    }

    /// Starts a command that goes on: the number of its process group, and the connection, on which its output arrives.
    ///
    /// # Errors
    /// When the connection ends first.
    pub(super) fn start(mut self, command: &str) -> Result<(u32, Self)> {
        self.stream.write_all(start_script(&self.tag, command).as_bytes())?;
        self.stream.set_read_timeout(Some(GREETING))?;
        let line = read_line(&mut self.stream).context("the shell named no process")?;
        let group = line.trim().parse().with_context(|| format!("the shell named the process {line:?}"))?;
        Ok((group, self))
    }

    /// Turns it into one that is asked question after question.
    ///
    /// # Errors
    /// When the connection cannot be set up for it.
    pub(super) fn into_session(self) -> Result<Session> {
        self.stream.set_read_timeout(Some(GREETING))?;
        Ok(Session { stream: self.stream })
    }

    /// Hands out the connection and the tag of its trailer.
    pub(super) fn into_parts(self) -> (TcpStream, String) {
        (self.stream, self.tag)
    }

    fn answer(&mut self, limit: Duration) -> Result<Raw> {
        let deadline = Instant::now() + limit;
        let mut answer = Answer::new(&self.tag);
        let mut chunk = vec![0; 1 << 16];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no end after {} s; until then: {}", limit.as_secs(), answer.tail());
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut chunk) {
                Ok(0) => bail!("the connection ended before the command did; until then: {}", answer.tail()),
                Ok(length) => {
                    if let Some(raw) = answer.feed(&chunk[..length]) {
                        return Ok(raw);
                    }
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("connection lost; until then: {}", answer.tail()));
                }
            }
        }
    }
}

/// A shell that is asked question after question, without the cost of a new one each time.
pub(super) struct Session {
    stream: TcpStream,
}

impl Session {
    /// Gives a line that makes the shell write one line, and returns that.
    ///
    /// # Errors
    /// When nothing comes.
    pub(super) fn ask(&mut self, line: &str) -> Result<String> {
        self.stream.write_all(format!("{line}\n").as_bytes())?;
        read_line(&mut self.stream).with_context(|| format!("after: {line}"))
    }
}

/// Collects an answer until its trailer is complete.
pub(super) struct Answer {
    bytes: Vec<u8>,
    tag: String,
    searched: usize,
}

impl Answer {
    /// An empty one, whose trailer has this tag.
    pub(super) fn new(tag: &str) -> Self {
        Self { bytes: Vec::new(), tag: tag.to_owned(), searched: 0 }
    }

    /// Adds bytes; the whole, once its end has come.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Option<Raw> {
        self.bytes.extend_from_slice(bytes);
        let end = format!("\n{} end\n", self.tag);
        let from = self.searched.saturating_sub(end.len());
        self.searched = self.bytes.len();
        let end_at = from + find(&self.bytes[from..], end.as_bytes())?;
        let start = format!("\n{} ", self.tag);
        let start_at = find(&self.bytes, start.as_bytes())?;
        let rest = self.bytes.get(start_at + start.len()..end_at)?;
        let line_end = rest.iter().position(|byte| *byte == b'\n')?;
        let line = std::str::from_utf8(&rest[..line_end]).ok()?;
        let (status, length) = line.split_once(' ')?;
        let (status, length): (i32, usize) = (status.parse().ok()?, length.parse().ok()?);
        let stderr = rest.get(line_end + 1..)?;
        let stderr = String::from_utf8_lossy(&stderr[..length.min(stderr.len())]).into_owned();
        self.bytes.truncate(start_at);
        Some(Raw { status, stdout: std::mem::take(&mut self.bytes), stderr })
    }

    /// What has come so far.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The last of it, for messages.
    pub(super) fn tail(&self) -> String {
        let from = self.bytes.len().saturating_sub(2000);
        String::from_utf8_lossy(&self.bytes[from..]).into_owned()
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Asks all ports at once and takes the first that answers.
fn race(ports: &[u16], limit: Duration) -> Option<Shell> {
    let (sender, receiver) = mpsc::channel();
    for port in ports {
        let (sender, port) = (sender.clone(), *port);
        thread::spawn(move || {
            // Whoever is late finds nobody listening and hangs up.
            let _ = sender.send(greet(port, limit).ok());
        });
    }
    drop(sender);
    receiver.iter().flatten().next()
}

/// A connection counts once the shell has said something: QEMU accepts it even when nobody is there.
fn greet(port: u16, limit: Duration) -> Result<Shell> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let tag = format!("lab-{:x}-{:x}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, limit.max(Duration::from_millis(1)))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
    stream.write_all(format!("echo {tag}\n").as_bytes())?;
    let line = read_line(&mut stream)?;
    if line != tag {
        stream.shutdown(Shutdown::Both)?;
        bail!("the shell answered {line:?}, not {tag}");
    }
    Ok(Shell { stream, tag })
}

/// A line, read byte by byte so that nothing after it is lost.
fn read_line(stream: &mut TcpStream) -> Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < 4096 {
        if stream.read(&mut byte)? == 0 {
            bail!("the connection ended");
        }
        if byte[0] == b'\n' {
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        line.push(byte[0]);
    }
    bail!("an endless line")
}

/// Text that a shell takes as one word.
pub(super) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn run_script(tag: &str, command: &str) -> String {
    format!(
        "(eval {}) </dev/null 2>/run/{tag}; s=$?; e=$(</run/{tag}); \
         printf '\\n{tag} %d %d\\n%s\\n{tag} end\\n' $s ${{#e}} \"$e\"; rm -f /run/{tag}; exit\n",
        quoted(command)
    )
}

fn push_script(tag: &str, length: usize, path: &str, mode: u32) -> String {
    let part = quoted(&format!("{path}.{tag}"));
    format!(
        "e=$({{ head -c {length} >{part} && chmod {mode:o} {part} && mv {part} {}; }} 2>&1); \
         printf '\\n{tag} %d %d\\n%s\\n{tag} end\\n' $? ${{#e}} \"$e\"; exit\n",
        quoted(path)
    )
}

fn start_script(tag: &str, command: &str) -> String {
    // With job control the command has a process group of its own, by which it can be ended with all that it started; its number
    // comes first.
    format!(
        "set -m; (echo $BASHPID; eval {}) </dev/null 2>&1 & wait $!; printf '\\n{tag} %d 0\\n\\n{tag} end\\n' $?; exit\n",
        quoted(command)
    )
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn answer_of(script: &str, after: &[u8], tag: &str) -> Raw {
        let mut bash =
            Command::new("bash").arg("-s").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut input = bash.stdin.take().unwrap();
        input.write_all(script.as_bytes()).unwrap();
        input.write_all(after).unwrap();
        let output = bash.wait_with_output().unwrap();
        let mut answer = Answer::new(tag);
        answer.feed(&output.stdout).unwrap()
    }

    #[test]
    fn a_command_s_status_and_both_streams_come_back_whatever_it_writes() {
        let command = "printf 'a\\nb'; printf \"it's \\n bad\" >&2; exit 3";
        let raw = answer_of(&run_script("lab-test-1", command), b"", "lab-test-1");
        assert_eq!(raw, Raw { status: 3, stdout: b"a\nb".to_vec(), stderr: "it's \n bad".into() });
    }

    #[test]
    fn a_command_that_goes_on_in_the_background_does_not_keep_the_answer() {
        let start = Instant::now();
        let raw = answer_of(
            &run_script("lab-test-2", "sleep 5 </dev/null >/dev/null 2>&1 & echo $!"),
            b"",
            "lab-test-2",
        );
        assert_eq!(raw.status, 0);
        assert!(start.elapsed() < Duration::from_secs(4));
        let pid: i32 = String::from_utf8(raw.stdout).unwrap().trim().parse().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    #[test]
    fn a_pushed_file_is_byte_for_byte_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("it's here");
        let content: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
        let script = push_script("lab-test-3", content.len(), path.to_str().unwrap(), 0o640);
        let raw = answer_of(&script, &content, "lab-test-3");
        assert_eq!((raw.status, raw.stderr.as_str()), (0, ""));
        assert_eq!(std::fs::read(&path).unwrap(), content);
        let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
        assert_eq!(mode & 0o777, 0o640);
    }

    #[test]
    fn a_command_that_is_started_leads_a_process_group_whose_number_comes_first() {
        let raw = answer_of(
            &start_script("lab-test-5", "echo out; echo err >&2; ps -o pgid= -p $BASHPID; exit 4"),
            b"",
            "lab-test-5",
        );
        let words = String::from_utf8(raw.stdout).unwrap();
        let lines: Vec<_> = words.split_whitespace().collect();
        assert_eq!((raw.status, lines[1], lines[2]), (4, "out", "err"));
        assert_eq!(lines[0], lines[3]);
    }

    #[test]
    fn a_push_that_fails_says_why() {
        let raw = answer_of(&push_script("lab-test-4", 3, "/no/such/place", 0o644), b"abc", "lab-test-4");
        assert_ne!(raw.status, 0);
        assert!(raw.stderr.contains("No such file"), "{}", raw.stderr);
    }

    #[test]
    fn a_trailer_may_come_in_any_pieces() {
        let whole = b"out\nlab-x 0 \nput\nlab-9 7 3\nerr\nlab-9 end\n";
        for size in 1..whole.len() {
            let mut answer = Answer::new("lab-9");
            let mut raw = None;
            for piece in whole.chunks(size) {
                raw = answer.feed(piece);
            }
            assert_eq!(
                raw,
                Some(Raw { status: 7, stdout: b"out\nlab-x 0 \nput".to_vec(), stderr: "err".into() })
            );
        }
    }

    #[test]
    fn a_shell_that_is_not_there_is_an_error_within_the_limit() {
        // Nothing listens on port 1 of the loopback.
        let start = Instant::now();
        assert!(Shell::connect(&[1], Duration::from_millis(300)).is_err());
        assert!(start.elapsed() < Duration::from_secs(3));
    }
}
