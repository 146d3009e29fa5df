//! Steps of a longer work: run a program, say what takes long, keep its words for when it fails.

use std::ffi::OsStr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Says what is being done, and when it took over two seconds how long.
///
/// # Errors
/// Those of `work`, with the step's name.
pub fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("· {name}");
    let start = Instant::now();
    let result = work().with_context(|| format!("while: {name}"));
    let took = start.elapsed();
    if took > Duration::from_secs(2) {
        eprintln!("  {name}: {:.0} s", took.as_secs_f64());
    }
    result
}

/// Runs a program to its end with its output kept back; shows the output only when it fails.
///
/// # Errors
/// When it cannot be started or does not exit with 0; the message carries the last 4 KiB of its output.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let line = line_of(command);
    let output = command
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{line}`: is it installed? `cargo xtask setup` does it"))?;
    if !output.status.success() {
        let mut words = output.stdout;
        words.extend_from_slice(&output.stderr);
        let tail = words.len().saturating_sub(4096);
        bail!("`{line}` ended with {}:\n{}", output.status, String::from_utf8_lossy(&words[tail..]));
    }
    Ok(output.stdout)
}

/// The command line, as one would type it (for messages only: nothing is quoted).
pub fn line_of(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args().map(OsStr::to_string_lossy) {
        line.push(' ');
        line.push_str(&argument);
    }
    line
}
