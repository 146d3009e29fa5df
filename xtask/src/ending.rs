//! What must not outlive this process, and that it does not, however this process ends.
//!
//! - It ends by itself: whoever registered something removes it in its `Drop`.
//! - SIGINT, SIGTERM, SIGHUP: a handler wakes a thread that ends processes, removes directories and exits.
//! - SIGKILL: the kernel kills the processes that asked for it (`PR_SET_PDEATHSIG`).

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, killpg, sigaction};
use nix::unistd::{Pid, pipe};

use crate::step::line_of;

/// How long a group may take to end by itself before it is killed: a server in it may have to write what it has.
const GRACE: Duration = Duration::from_secs(10);

/// Notes a process that must not outlive this one.
///
/// # Errors
/// When signals cannot be caught.
pub fn register_process(pid: u32) -> Result<()> {
    catch_signals()?;
    register(|registered| registered.processes.push(pid));
    Ok(())
}

/// Forgets a process that has ended: its number may soon be another's.
pub fn forget_process(pid: u32) {
    register(|registered| registered.processes.retain(|known| *known != pid));
}

/// Notes directories that must not outlive this process.
///
/// # Errors
/// When signals cannot be caught.
pub fn register_directories(directories: &[&Path]) -> Result<()> {
    catch_signals()?;
    register(|registered| registered.directories.extend(directories.iter().map(|dir| dir.to_path_buf())));
    Ok(())
}

/// Forgets directories that are gone.
pub fn forget_directories(directories: &[&Path]) {
    register(|registered| registered.directories.retain(|known| !directories.contains(&known.as_path())));
}

/// Runs a program that starts others (as `cargo test` does) with this process's own outputs. It has a process group of its own, which ends
/// as a whole when this process is told to end.
///
/// # Errors
/// When it cannot be started, or signals cannot be caught.
pub fn status_of_group(command: &mut Command) -> Result<ExitStatus> {
    catch_signals()?;
    let line = line_of(command);
    let mut child = command
        .stdin(std::process::Stdio::null())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let group = child.id();
    register(|registered| registered.groups.push(group));
    let status = child.wait();
    register(|registered| registered.groups.retain(|known| *known != group));
    status.with_context(|| format!("cannot wait for `{line}`"))
}

/// Removes directories, those too that are not there.
pub fn remove(directories: &[PathBuf]) {
    for dir in directories {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                eprintln!("  cannot remove {}: {error}", dir.display());
            }
            _ => {}
        }
    }
}

#[derive(Default)]
struct Registered {
    directories: Vec<PathBuf>,
    processes: Vec<u32>,
    groups: Vec<u32>,
}

static REGISTERED: Mutex<Registered> =
    Mutex::new(Registered { directories: Vec::new(), processes: Vec::new(), groups: Vec::new() });

fn register<T>(change: impl FnOnce(&mut Registered) -> T) -> T {
    change(&mut REGISTERED.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Where the handler writes the signal's number; -1 until it is set up.
static WAKE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn note_signal(signal: libc::c_int) {
    let byte = u8::try_from(signal).unwrap_or(0);
    // SAFETY: `write` may be called in a signal handler; the byte is on this stack, and a bad descriptor is only an error.
    unsafe { libc::write(WAKE.load(Ordering::Relaxed), std::ptr::from_ref(&byte).cast(), 1) };
}

fn catch_signals() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = set_up_signals());
    result
}

fn set_up_signals() -> Result<()> {
    let (reader, writer): (OwnedFd, OwnedFd) = pipe().context("cannot make a pipe")?;
    WAKE.store(writer.as_raw_fd(), Ordering::Relaxed);
    // It stays open as long as the handler may write to it: for ever.
    std::mem::forget(writer);
    thread::spawn(move || {
        let mut byte = [0];
        if nix::unistd::read(&reader, &mut byte) == Ok(1) {
            end(i32::from(byte[0]));
        }
    });
    let action = SigAction::new(SigHandler::Handler(note_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing but load an atomic and call `write`.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("cannot catch {signal}"))?;
    }
    Ok(())
}

/// Ends the processes, removes the directories, and exits as a process does that the signal killed.
fn end(signal: i32) -> ! {
    let registered = register(std::mem::take);
    for pid in registered.processes {
        if let Ok(pid) = i32::try_from(pid) {
            // One that has just ended by itself is what we want.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    end_groups(&registered.groups);
    remove(&registered.directories);
    eprintln!("\n  signal {signal}: whatever ran for this command has ended");
    std::process::exit(128 + signal);
}

/// Ends groups as an operator would; then those that have not ended.
fn end_groups(groups: &[u32]) {
    let groups: Vec<Pid> =
        groups.iter().filter_map(|group| i32::try_from(*group).ok()).map(Pid::from_raw).collect();
    let signal_all =
        |signal: Option<Signal>| groups.iter().filter(|group| killpg(**group, signal).is_ok()).count();
    signal_all(Some(Signal::SIGTERM));
    let step = Duration::from_millis(100);
    for _ in 0..GRACE.as_millis() / step.as_millis() {
        if signal_all(None) == 0 {
            return;
        }
        thread::sleep(step);
    }
    signal_all(Some(Signal::SIGKILL));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_ends_with_all_that_it_started() {
        // The shell's own child is what a plain kill of the shell would leave behind.
        let mut command = Command::new("sh");
        let mut child = command.args(["-c", "sleep 600 & wait"]).process_group(0).spawn().unwrap();
        let group = child.id();
        thread::scope(|scope| {
            scope.spawn(|| end_groups(&[group]));
            assert!(!child.wait().unwrap().success());
        });
        let pid = Pid::from_raw(i32::try_from(group).unwrap());
        // Whoever reaps orphans here takes the sleeper a moment later.
        while killpg(pid, None).is_ok() {
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_group_s_status_is_the_program_s() {
        let status = |words: &str| status_of_group(Command::new("sh").args(["-c", words])).unwrap();
        assert!(status("exit 0").success());
        assert_eq!(status("exit 7").code(), Some(7));
    }
}
