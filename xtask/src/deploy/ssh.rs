//! ssh to one machine: scripts that it runs, files that it gets.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::step::line_of;

/// A machine, as ssh names it.
#[derive(Clone, Debug)]
pub struct Machine {
    /// `USER@HOST`, or `ssh://USER@HOST:PORT`.
    pub destination: String,
    options: Vec<String>,
}

/// Why a machine did not do what it was to do.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    /// ssh is not here.
    #[error("ssh cannot be started: {0}; is openssh-client installed?")]
    NoSsh(std::io::Error),
    /// It cannot be reached.
    #[error("cannot be reached: {said}; is it on, is the name right, is there a firewall?")]
    Unreachable {
        /// ssh's own words.
        said: String,
    },
    /// It does not let us in.
    #[error("does not let us in: {said}; does it have your key (`ssh-copy-id`), and is it root's login?")]
    Refused {
        /// ssh's own words.
        said: String,
    },
    /// Its key is not the one that is known, or none is known.
    #[error(
        "its host key is not known, or is another one: {said}; connect once by hand and compare the fingerprint (or remove a stale one by `ssh-keygen -R`)"
    )]
    HostKey {
        /// ssh's own words.
        said: String,
    },
    /// The connection broke while something was done.
    #[error("the connection broke off: {said}")]
    Lost {
        /// ssh's own words.
        said: String,
    },
    /// What was run there failed.
    #[error("ended with code {code}: {said}")]
    Failed {
        /// Its exit code.
        code: i32,
        /// What it said last.
        said: String,
    },
    /// A file here.
    #[error("{0}")]
    File(String),
}

/// Where a shell that is no login shell may not look.
const PATH: &str = "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Lines of a remote program that are shown when it fails.
const LINES: usize = 12;

impl Machine {
    /// A machine that is reached with these options of ssh's.
    pub fn new(destination: &str, options: &[String]) -> Self {
        Self { destination: destination.to_owned(), options: options.to_vec() }
    }

    /// The host's name or address: what others connect to.
    pub fn host(&self) -> &str {
        let rest = self.destination.strip_prefix("ssh://").unwrap_or(&self.destination);
        let rest = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
        let is_uri = self.destination.starts_with("ssh://");
        match rest.rsplit_once(':') {
            Some((host, port)) if is_uri && port.parse::<u16>().is_ok() => host.trim_matches(['[', ']']),
            _ => rest,
        }
    }

    fn ssh(&self) -> Command {
        let mut ssh = Command::new("ssh");
        // Nobody answers questions; a machine that is silent is not waited for.
        ssh.args([
            "-oBatchMode=yes",
            "-oConnectTimeout=30",
            "-oServerAliveInterval=10",
            "-oServerAliveCountMax=6",
            "-T",
        ]);
        ssh.args(&self.options).arg("--").arg(&self.destination);
        ssh.env("LC_ALL", "C");
        ssh
    }

    /// Runs a script, with arguments, and gives what it printed.
    ///
    /// # Errors
    /// [`SshError`].
    pub fn run(&self, script: &str, arguments: &[&str]) -> Result<String, SshError> {
        let words: Vec<String> = arguments.iter().map(|word| quoted(word)).collect();
        let mut ssh = self.ssh();
        // All of the script is read before any of it runs: what it calls may read its standard input.
        ssh.arg(format!("{PATH}; script=$(cat); exec sh -c \"$script\" sh {} </dev/null", words.join(" ")));
        feed(ssh, script.as_bytes())
    }

    /// Runs one command with bytes on its standard input.
    ///
    /// # Errors
    /// [`SshError`].
    pub fn pipe(&self, command: &str, input: &[u8]) -> Result<String, SshError> {
        let mut ssh = self.ssh();
        ssh.arg(format!("{PATH}; {command}"));
        feed(ssh, input)
    }

    /// Puts a file there; under its name it is whole or not at all.
    ///
    /// # Errors
    /// [`SshError`].
    pub fn put(&self, from: &Path, to: &str) -> Result<(), SshError> {
        let file =
            File::open(from).map_err(|error| SshError::File(format!("{}: {error}", from.display())))?;
        let mut ssh = self.ssh();
        let (directory, _) = to.rsplit_once('/').unwrap_or(("/", to));
        ssh.arg(format!("set -e; mkdir -p {directory}; cat >{to}.partial; mv {to}.partial {to}"));
        ssh.stdin(file).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = ssh.spawn().map_err(SshError::NoSsh)?;
        ended(child.wait_with_output().map_err(SshError::NoSsh)?).map(drop)
    }
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn feed(mut ssh: Command, input: &[u8]) -> Result<String, SshError> {
    tracing_line(&ssh);
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ssh.spawn().map_err(SshError::NoSsh)?;
    let mut stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // One that ended early says so by its exit code.
            let _ = stdin.take().map(|mut stdin| stdin.write_all(input));
        });
        child.wait_with_output()
    });
    ended(output.map_err(SshError::NoSsh)?)
}

/// With POOLSKIP_LOG=debug, each command.
fn tracing_line(ssh: &Command) {
    if std::env::var("POOLSKIP_LOG").is_ok_and(|level| level == "debug") {
        eprintln!("  {}", line_of(ssh));
    }
}

fn ended(output: std::process::Output) -> Result<String, SshError> {
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    match output.status.code() {
        Some(0) => Ok(stdout),
        Some(255) => Err(classify(stderr.trim())),
        code => {
            let words = format!("{stdout}{stderr}");
            let lines: Vec<&str> = words.lines().filter(|line| !line.trim().is_empty()).collect();
            let said = lines[lines.len().saturating_sub(LINES)..].join("\n      ");
            Err(SshError::Failed { code: code.unwrap_or(-1), said })
        }
    }
}

/// What ssh means, by its words.
fn classify(said: &str) -> SshError {
    let words = said.to_owned();
    let has = |text: &str| said.contains(text);
    let last = said.lines().last().unwrap_or(said).to_owned();
    if has("Host key verification failed") || has("REMOTE HOST IDENTIFICATION") {
        SshError::HostKey { said: last }
    } else if has("Permission denied") || has("Too many authentication failures") {
        SshError::Refused { said: last }
    } else if has("Could not resolve")
        || has("Connection refused")
        || has("timed out")
        || has("No route to host")
        || has("Network is unreachable")
    {
        SshError::Unreachable { said: last }
    } else {
        SshError::Lost { said: words }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_has_a_host() {
        for (destination, host) in [
            ("root@host-b", "host-b"),
            ("host-b", "host-b"),
            ("ssh://root@10.0.0.2:2222", "10.0.0.2"),
            ("ssh://10.0.0.2", "10.0.0.2"),
            ("ssh://root@[fd00::2]:22", "fd00::2"),
            ("root@fd00::2", "fd00::2"),
        ] {
            assert_eq!(Machine::new(destination, &[]).host(), host, "{destination}");
        }
    }

    #[test]
    fn ssh_s_words_are_told_apart() {
        let kind = |said| match classify(said) {
            SshError::Unreachable { .. } => "unreachable",
            SshError::Refused { .. } => "refused",
            SshError::HostKey { .. } => "host key",
            SshError::Lost { .. } => "lost",
            _ => "other",
        };
        assert_eq!(kind("ssh: connect to host 10.9.9.9 port 22: Connection refused"), "unreachable");
        assert_eq!(kind("ssh: Could not resolve hostname x: Name or service not known"), "unreachable");
        assert_eq!(kind("root@h: Permission denied (publickey)."), "refused");
        assert_eq!(
            kind(
                "No ED25519 host key is known for h and you have requested strict checking.\nHost key verification failed."
            ),
            "host key"
        );
        assert_eq!(kind("client_loop: send disconnect: Broken pipe"), "lost");
    }

    #[test]
    fn words_reach_the_other_shell_as_they_are() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
