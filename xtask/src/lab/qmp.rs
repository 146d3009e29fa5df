//! QEMU's monitor: one JSON object a line over a unix socket (docs/interop/qmp-spec.rst of QEMU).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long one command may take to be answered.
const ANSWER: Duration = Duration::from_secs(30);

/// How long writing or reading a machine's state may take.
const STATE: Duration = Duration::from_secs(300);

/// A connection that may give commands.
pub(super) struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens there, or it is not QEMU.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("no QEMU listens on {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut monitor = Self { reader: BufReader::new(stream) };
        let greeting = monitor.read()?;
        if greeting.get("QMP").is_none() {
            bail!("{} greets with {greeting}", socket.display());
        }
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Gives a command and waits for its answer.
    ///
    /// # Errors
    /// When QEMU refuses, with its words.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            let answer = self.read().with_context(|| format!("QEMU does not answer {command}"))?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or("without a word"));
            }
            // Anything else is an event.
        }
    }

    /// Writes the state of a stopped machine to a file. The machine is of no use afterwards but to be ended.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn save_state(&mut self, path: &Path) -> Result<()> {
        self.execute("migrate-set-parameters", &json!({ "max-bandwidth": 64_u64 << 30 }))?;
        self.execute("migrate", &json!({ "uri": format!("file:{}", path.display()) }))?;
        self.wait_for_migration().with_context(|| format!("writing {}", path.display()))
    }

    /// Reads a state into a machine that was started to take one. It stays stopped.
    ///
    /// # Errors
    /// When it cannot be read, or belongs to another machine.
    pub(super) fn load_state(&mut self, path: &Path) -> Result<()> {
        self.execute("migrate-incoming", &json!({ "uri": format!("file:{}", path.display()) }))?;
        self.wait_for_migration().with_context(|| format!("reading {}", path.display()))?;
        let start = Instant::now();
        loop {
            let status = self.execute("query-status", &json!({}))?;
            match status["status"].as_str() {
                Some("paused") => return Ok(()),
                Some("inmigrate") if start.elapsed() < ANSWER => thread::sleep(Duration::from_millis(20)),
                _ => bail!("QEMU is not paused after reading its state: {status}"),
            }
        }
    }

    fn wait_for_migration(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            let state = self.execute("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    bail!("QEMU failed: {}", state["error-desc"].as_str().unwrap_or("no reason given"))
                }
                _ if start.elapsed() > STATE => {
                    bail!("QEMU is not done after {} s: {state}", STATE.as_secs())
                }
                _ => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU hung up");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU wrote {line:?}"))
    }
}
