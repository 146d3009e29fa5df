//! What one can do with a machine of the lab: run commands, start some that go on, put files there and fetch them.

use std::fs;
use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::shell::{Answer, Output, Raw, Shell, quoted};

/// How long a machine may take to answer at all: a guest that moves does not for as long as it stands still.
const CONNECT: Duration = Duration::from_secs(90);

/// How long a file may take.
const TRANSFER: Duration = Duration::from_secs(300);

/// A host's dom0, or the guest wherever it is.
#[derive(Clone, Debug)]
pub struct Machine {
    name: &'static str,
    ports: Vec<u16>,
    console_log: Option<PathBuf>,
}

impl Machine {
    pub(super) fn new(name: &'static str, ports: Vec<u16>, console_log: Option<PathBuf>) -> Self {
        Self { name, ports, console_log }
    }

    /// Runs a shell command to its end, with nothing on its standard input. Any number may run at once.
    ///
    /// # Errors
    /// When no shell answers, or the command does not end within `limit`; a status other than 0 is no error.
    pub fn run(&self, command: &str, limit: Duration) -> Result<Output> {
        self.shell(limit)?.run(command, limit).map(Output::from).with_context(|| self.about())
    }

    /// Runs a shell command that must end with 0; its standard output.
    ///
    /// # Errors
    /// When it ends otherwise, with what it wrote to standard error.
    pub fn must(&self, command: &str, limit: Duration) -> Result<String> {
        let output = self.run(command, limit)?;
        if output.status != 0 {
            bail!("on {}: `{command}` ended with {}: {}", self.name, output.status, output.stderr.trim());
        }
        Ok(output.stdout)
    }

    /// Starts a shell command that goes on. Its standard output and error are one stream.
    ///
    /// # Errors
    /// When no shell answers.
    pub fn spawn(&self, command: &str) -> Result<Spawned> {
        let (group, shell) = self.shell(CONNECT)?.start(command).with_context(|| self.about())?;
        let (stream, tag) = shell.into_parts();
        stream.set_read_timeout(None)?;
        let state = Arc::new(State::new(&tag));
        let (reading, mut from) = (Arc::clone(&state), stream.try_clone()?);
        thread::spawn(move || reading.read_all(&mut from));
        Ok(Spawned { machine: self.clone(), group, stream, state })
    }

    /// Puts a file of this machine there.
    ///
    /// # Errors
    /// When either file system refuses, or no shell answers.
    pub fn push(&self, local: &Path, remote: &str, mode: u32) -> Result<()> {
        let content = fs::read(local).with_context(|| format!("cannot read {}", local.display()))?;
        self.write(&content, remote, mode)
    }

    /// Writes a file there.
    ///
    /// # Errors
    /// When the file system there refuses, or no shell answers.
    pub fn write(&self, content: &[u8], remote: &str, mode: u32) -> Result<()> {
        let raw = self.shell(CONNECT)?.push(content, remote, mode, TRANSFER).with_context(|| self.about())?;
        if raw.status != 0 {
            bail!("cannot write {remote} on {}: {}", self.name, raw.stderr.trim());
        }
        Ok(())
    }

    /// Fetches a file's content.
    ///
    /// # Errors
    /// When it cannot be read there, or no shell answers.
    pub fn pull(&self, remote: &str) -> Result<Vec<u8>> {
        let raw = self
            .shell(CONNECT)?
            .run(&format!("cat {}", quoted(remote)), TRANSFER)
            .with_context(|| self.about())?;
        if raw.status != 0 {
            bail!("cannot read {remote} on {}: {}", self.name, raw.stderr.trim());
        }
        Ok(raw.stdout)
    }

    /// A shell that has answered.
    pub(super) fn shell(&self, limit: Duration) -> Result<Shell> {
        Shell::connect(&self.ports, limit.min(CONNECT)).with_context(|| self.about())
    }

    /// For messages: which machine, and what its console said last.
    fn about(&self) -> String {
        let log = self.console_log.as_ref().and_then(|path| fs::read(path).ok()).unwrap_or_default();
        let tail = &log[log.len().saturating_sub(1500)..];
        if tail.is_empty() {
            format!("on {}", self.name)
        } else {
            format!("on {}, whose console ends with:\n{}\n", self.name, String::from_utf8_lossy(tail))
        }
    }
}

/// A command that was started and goes on; ended, with all that it started, when dropped.
pub struct Spawned {
    machine: Machine,
    group: u32,
    stream: TcpStream,
    state: Arc<State>,
}

impl Spawned {
    /// What it has written up to now.
    pub fn output(&self) -> String {
        let (answer, end) = &*self.state.lock();
        match end {
            Some(End::Answer(raw)) => String::from_utf8_lossy(&raw.stdout).into_owned(),
            _ => String::from_utf8_lossy(answer.bytes()).into_owned(),
        }
    }

    /// Waits until it has written a text.
    ///
    /// # Errors
    /// When it ends without having done so, or `limit` passes.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if self.output().contains(text) {
                return Ok(());
            }
            if self.has_ended() || Instant::now() > deadline {
                bail!("{} never wrote {text:?}, but: {}", self.machine.name, self.output());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether it has ended by itself, or its connection is lost.
    pub fn has_ended(&self) -> bool {
        self.state.lock().1.is_some()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When `limit` passes, or its connection is lost, as that of one in the guest is when the guest moves.
    pub fn wait(&self, limit: Duration) -> Result<Output> {
        let guard = self.state.lock();
        let (guard, _) = self
            .state
            .changed
            .wait_timeout_while(guard, limit, |(_, end)| end.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match &guard.1 {
            Some(End::Answer(raw)) => Ok(Output {
                status: raw.status,
                stdout: String::from_utf8_lossy(&raw.stdout).into_owned(),
                stderr: raw.stderr.clone(),
            }),
            Some(End::Lost) => {
                bail!(
                    "the connection to {} ended before the command did; until then: {}",
                    self.machine.name,
                    guard.0.tail()
                )
            }
            None => bail!("no end after {} s; until then: {}", limit.as_secs(), guard.0.tail()),
        }
    }

    /// Sends a signal (a name that `kill` knows) to its process group.
    ///
    /// # Errors
    /// When no shell answers.
    pub fn signal(&self, signal: &str) -> Result<()> {
        self.machine.run(&format!("kill -{signal} -- -{}", self.group), CONNECT).map(drop)
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if !self.has_ended() {
            // The machine may be gone already, and the command with it.
            let _ = self.machine.shell(Duration::from_secs(2)).and_then(|shell| {
                shell.run(&format!("kill -KILL -- -{}", self.group), Duration::from_secs(5))
            });
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

enum End {
    Answer(Raw),
    Lost,
}

struct State {
    inner: Mutex<(Answer, Option<End>)>,
    changed: Condvar,
}

impl State {
    fn new(tag: &str) -> Self {
        Self { inner: Mutex::new((Answer::new(tag), None)), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, (Answer, Option<End>)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_all(&self, from: &mut TcpStream) {
        let mut chunk = vec![0; 1 << 16];
        loop {
            let length = from.read(&mut chunk).unwrap_or(0);
            let mut guard = self.lock();
            let end =
                if length == 0 { Some(End::Lost) } else { guard.0.feed(&chunk[..length]).map(End::Answer) };
            if end.is_some() {
                guard.1 = end;
                self.changed.notify_all();
                return;
            }
        }
    }
}
