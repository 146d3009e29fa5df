//! Carrying a plan out: so many migrations at once, each a process of its own.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use super::Evacuate;
use super::plan::{Move, Plan};
use crate::command::{EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MIGRATED, EXIT_NOT_BEGUN, EXIT_UNDEFINED, signals};

/// How often processes are looked after.
const TICK: Duration = Duration::from_millis(100);

/// What became of a move.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Done {
    /// The domain.
    pub domain: String,
    /// The host that was tried last.
    pub host: String,
    /// `migrate`'s exit code; 1 when it was ended by a signal.
    pub code: u8,
    /// How long it took, all hosts together.
    pub seconds: f64,
    /// What it said last, when it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub said: Option<String>,
}

/// How migrations are run.
pub struct Workers<'a> {
    /// The command's options.
    pub options: &'a Evacuate,
    /// The configuration that was named on the command line.
    pub file: Option<&'a PathBuf>,
    /// Migrations at once.
    pub at_once: usize,
}

/// A migration that runs.
struct Running {
    step: Move,
    /// Which of its hosts.
    attempt: usize,
    began: Instant,
    child: Child,
    said: Arc<Mutex<Option<String>>>,
}

impl Workers<'_> {
    /// Carries it out. A signal ends what runs, whose domains stay here, and nothing more is begun.
    ///
    /// # Errors
    /// When no process can be started.
    pub fn carry_out(&self, plan: &Plan) -> io::Result<Vec<Done>> {
        let ending = Arc::new(AtomicBool::new(false));
        let flag = ending.clone();
        signals::on_signal(move |_| flag.store(true, Ordering::Release))?;
        let mut waiting: VecDeque<Move> = plan.moves.iter().cloned().collect();
        let (mut running, mut done) = (Vec::<Running>::new(), Vec::new());
        let mut told = false;
        loop {
            let end = ending.load(Ordering::Acquire);
            if end && !told {
                told = true;
                for one in &running {
                    let _ = kill(Pid::from_raw(one.child.id().cast_signed()), Signal::SIGTERM);
                }
            }
            while !end && running.len() < self.at_once {
                let Some(step) = waiting.pop_front() else { break };
                running.push(self.start(step, 0, Instant::now())?);
            }
            if running.is_empty() {
                break;
            }
            let mut still = Vec::new();
            for mut one in running {
                match one.child.try_wait()? {
                    None => still.push(one),
                    Some(status) => {
                        let code =
                            status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(EXIT_FAILED);
                        let said = one.said.lock().unwrap_or_else(PoisonError::into_inner).take();
                        // The domain is here, and runs: another host may be luckier.
                        let again = matches!(code, EXIT_FAILED | EXIT_NOT_BEGUN) && !end;
                        if again && one.attempt + 1 < one.step.hosts.len() {
                            eprintln!(
                                "{}: {} did not take it",
                                one.step.guest.name, one.step.hosts[one.attempt]
                            );
                            still.push(self.start(one.step, one.attempt + 1, one.began)?);
                            continue;
                        }
                        done.push(Done {
                            domain: one.step.guest.name,
                            host: one.step.hosts[one.attempt].clone(),
                            code,
                            seconds: one.began.elapsed().as_secs_f64(),
                            said: said.filter(|_| code != EXIT_MIGRATED),
                        });
                        if let Some(last) = done.last() {
                            self.tell(last, done.len(), plan.moves.len());
                        }
                    }
                }
            }
            running = still;
            std::thread::sleep(TICK);
        }
        for step in waiting {
            let host = step.hosts.first().cloned().unwrap_or_default();
            let said = Some("not begun: ended by a signal".to_owned());
            done.push(Done { domain: step.guest.name, host, code: EXIT_INTERRUPTED, seconds: 0.0, said });
        }
        Ok(done)
    }

    fn tell(&self, done: &Done, number: usize, all: usize) {
        let Done { domain, host, code, seconds, said } = done;
        let said = said.as_deref().map(|said| format!(": {said}")).unwrap_or_default();
        let what = match *code {
            EXIT_MIGRATED => format!("runs at {host}"),
            EXIT_INTERRUPTED => format!("stays here, interrupted{said}"),
            EXIT_UNDEFINED => format!("IS IN DOUBT between here and {host}: `dom0-migrator resolve`{said}"),
            _ => format!("stays here{said}"),
        };
        let line = format!("{number}/{all} {domain} {what} ({seconds:.0} s)");
        if self.options.json { eprintln!("{line}") } else { println!("{line}") }
    }

    /// Starts `migrate` for a domain to one of its hosts.
    fn start(&self, step: Move, attempt: usize, began: Instant) -> io::Result<Running> {
        let host = step.hosts.get(attempt).cloned().unwrap_or_default();
        let mut command = Command::new(std::env::current_exe()?);
        if let Some(file) = self.file {
            command.arg("--config").arg(file);
        }
        command.arg("migrate").arg(step.guest.id.to_string()).arg(&host).args(["--progress", "none"]);
        let connecting = &self.options.connecting;
        if connecting.plain {
            command.arg("--plain");
        }
        if let Some(directory) = &connecting.certificates {
            command.arg("--certificates").arg(directory);
        }
        // A Ctrl-C on the terminal is this process's to hand on.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // SAFETY: changes the signal mask of the child, which is async-signal-safe.
        unsafe { command.pre_exec(signals::unblock) };
        eprintln!("{}: goes to {host}", step.guest.name);
        let mut child = command.spawn()?;
        let said = Arc::new(Mutex::new(None));
        if let Some(stderr) = child.stderr.take() {
            let (name, last) = (step.guest.name.clone(), said.clone());
            // Not joined: xl's own daemon may keep the pipe for a while.
            std::thread::Builder::new().name("migrate".into()).spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    eprintln!("{name}: {line}");
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(line);
                }
            })?;
        }
        Ok(Running { step, attempt, began, child, said })
    }
}

/// 0: all are gone. 4: one is in doubt. 3: interrupted. 1: something stays that was to go.
pub fn exit_code(plan: &Plan, done: &[Done]) -> u8 {
    let any = |code| done.iter().any(|one| one.code == code);
    match () {
        () if any(EXIT_UNDEFINED) => EXIT_UNDEFINED,
        () if any(EXIT_INTERRUPTED) => EXIT_INTERRUPTED,
        () if !plan.stay.is_empty() || done.iter().any(|one| one.code != EXIT_MIGRATED) => EXIT_FAILED,
        () => EXIT_MIGRATED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_what_the_exit_code_tells() {
        let plan = Plan { moves: Vec::new(), stay: Vec::new(), hosts_out: Vec::new() };
        let done = |codes: &[u8]| -> Vec<Done> {
            let one = |code: &u8| Done {
                domain: "d".into(),
                host: "h".into(),
                code: *code,
                seconds: 0.0,
                said: None,
            };
            codes.iter().map(one).collect()
        };
        for (codes, code) in [(&[][..], 0), (&[0, 0], 0), (&[0, 2], 1), (&[1, 3], 3), (&[3, 4, 1], 4)] {
            assert_eq!(exit_code(&plan, &done(codes)), code, "{codes:?}");
        }
    }
}
