//! `xl` as a child process.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::signals;
use crate::control::HelperKind;
use crate::handoff;

/// Lines of xl's that are kept, to say why it failed.
const KEPT_LINES: usize = 12;

/// A child that runs xl, in a process group of its own: a Ctrl-C on the terminal is ours to handle.
#[derive(Debug)]
pub struct Xl {
    child: Child,
    said: Arc<Mutex<VecDeque<String>>>,
}

/// Prepares xl with its arguments, and with the helper that it is to start.
pub fn xl(arguments: &[&str], helper: HelperKind, handoff: &str) -> std::io::Result<Command> {
    let mut command = Command::new("xl");
    command.args(arguments).env(handoff::ENVIRONMENT, handoff).process_group(0).stderr(Stdio::piped());
    match helper {
        HelperKind::Poolskip => command.env("LIBXL_SAVE_HELPER", std::env::current_exe()?),
        HelperKind::Stock => command.env_remove("LIBXL_SAVE_HELPER"),
    };
    // SAFETY: changes the signal mask of the child, which is async-signal-safe.
    unsafe { command.pre_exec(signals::unblock) };
    Ok(command)
}

impl Xl {
    /// Starts it; each line that it says on stderr goes to `heard`.
    ///
    /// # Errors
    /// What the system says, most often that there is no xl.
    pub fn start(mut command: Command, heard: impl FnMut(&str) + Send + 'static) -> std::io::Result<Self> {
        let mut child = command.spawn()?;
        let said = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(stderr) = child.stderr.take() {
            let said = said.clone();
            // Not joined: xl's own daemon may keep the pipe for a while.
            std::thread::Builder::new().name("xl".into()).spawn(move || listen(stderr, &said, heard))?;
        }
        Ok(Self { child, said })
    }

    /// Its stdin and stdout, where both are pipes and not taken yet.
    pub fn take_pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        self.child.stdin.take().zip(self.child.stdout.take())
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    ///
    /// # Errors
    /// What the system says.
    pub fn try_wait(&mut self) -> std::io::Result<Option<std::process::ExitStatus>> {
        self.child.try_wait()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id().cast_signed()), signal);
    }

    /// What it said last.
    pub fn said(&self) -> Vec<String> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

impl Drop for Xl {
    /// A child that still runs when its owner gives up is asked to end, and then made to.
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(nix::sys::signal::Signal::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(5);
            while matches!(self.child.try_wait(), Ok(None)) {
                if Instant::now() >= deadline {
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Reads lines, of any length and content, until the pipe closes.
fn listen(stderr: impl Read, said: &Mutex<VecDeque<String>>, mut heard: impl FnMut(&str)) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut stderr).take(4096).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // xl's progress lines end in a carriage return on a terminal.
        for part in String::from_utf8_lossy(&line).split(['\n', '\r']).filter(|part| !part.trim().is_empty())
        {
            heard(part);
            let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
            if said.len() == KEPT_LINES {
                said.pop_front();
            }
            said.push_back(part.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_child_says_is_heard_and_the_last_of_it_kept() {
        let mut command = Command::new("sh");
        command.args(["-c", "for i in $(seq 20); do echo line $i >&2; done; exit 3"]).stderr(Stdio::piped());
        let (tell, heard) = std::sync::mpsc::channel();
        let mut child = Xl::start(command, move |line| tell.send(line.to_owned()).unwrap()).unwrap();
        let lines: Vec<String> = heard.iter().collect();
        assert_eq!(lines.len(), 20);
        assert_eq!(child.said().len(), KEPT_LINES);
        assert_eq!(child.said().last().unwrap(), "line 20");
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
        };
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn a_child_does_not_outlive_its_owner() {
        let mut command = Command::new("sleep");
        command.arg("1000").stderr(Stdio::piped());
        let child = Xl::start(command, |_| {}).unwrap();
        let pid = nix::unistd::Pid::from_raw(child.pid().cast_signed());
        drop(child);
        assert!(nix::sys::signal::kill(pid, None).is_err());
    }
}
