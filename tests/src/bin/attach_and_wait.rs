//! Attaches probes to the mysqld whose PID is its argument, with no capability but those that a probe keeps, builds its lists, and waits to
//! be killed: for the test of what a killed probe leaves behind. What fails gives the exit code and the words of guest-probe.

use std::io::Write;
use std::process::ExitCode;

use guest_probe::control_blocks::BlocksError;
use guest_probe::exit::Exit;
use guest_probe::privileges;
use guest_probe::session::{Options, Session, SessionError};
use guest_probe::storage_map::DiskRule;

fn main() -> ExitCode {
    let Some(pid) = std::env::args().nth(1).and_then(|pid| pid.parse().ok()) else {
        eprintln!("usage: attach_and_wait PID");
        return ExitCode::from(2);
    };
    match attach_and_wait(pid) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(Exit::of(&error) as u8)
        }
    }
}

fn attach_and_wait(pid: i32) -> Result<(), SessionError> {
    privileges::give_up().map_err(SessionError::Spaces)?;
    let mut session = Session::start(&Options { pid: Some(pid), rule: DiskRule::Any, ..Options::default() })?;
    let summary = session.lists(|_| Ok::<(), BlocksError>(()))?;
    println!("{}", summary.frames_read + summary.frames_written);
    // Whoever waits for the line gets it now.
    let _ = std::io::stdout().flush();
    loop {
        std::thread::park();
        assert!(!session.probes().attached().is_empty());
    }
}
