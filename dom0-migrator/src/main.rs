//! `dom0-migrator`: libxl's save helper when libxl starts it, else the commands.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;
use dom0_migrator::command::CommandLine;
use dom0_migrator::helper::{self, arguments::Arguments};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let filter = EnvFilter::try_from_env("POOLSKIP_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .init();
    match Arguments::parse(&arguments) {
        Some(Ok(arguments)) => helper::run(&arguments),
        Some(Err(error)) => {
            eprintln!("dom0-migrator: {error}");
            ExitCode::FAILURE
        }
        None => dom0_migrator::command::run(CommandLine::parse()),
    }
}
