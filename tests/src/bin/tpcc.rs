//! TPC-C against a MySQL server on this machine or in this guest: see `tests::tpcc` for what of it is not as the standard has it.
//!
//! ```text
//! tpcc load --warehouses W [--scale PERCENT]    makes schema tpcc anew
//! tpcc run --seconds N --threads T              a line of JSON each second; SIGTERM and SIGINT end it early, in order
//! tpcc check                                    consistency conditions 1 to 4; exit code 1 when one does not hold
//! ```

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Parser, Subcommand};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use tests::tpcc::check::check;
use tests::tpcc::load::load;
use tests::tpcc::scale::Scale;
use tests::tpcc::terminal::{Run, run};

/// TPC-C, keying rules off.
#[derive(Parser)]
struct Cli {
    /// The server's socket.
    #[arg(long, global = true, default_value = "/run/mysqld/mysqld.sock")]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make schema and rows anew.
    Load {
        /// W.
        #[arg(long, default_value_t = 1)]
        warehouses: u32,
        /// Percent of the standard's items, customers and orders: 100 is the standard.
        #[arg(long, default_value_t = 100)]
        scale: u32,
        /// Warehouses that are filled at once.
        #[arg(long, default_value_t = 2)]
        threads: u32,
        /// Same seed, same rows.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Run the mix.
    Run {
        /// How long.
        #[arg(long)]
        seconds: u64,
        /// Terminals.
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
        threads: u32,
        /// Same seed, same transactions.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Check consistency conditions 1 to 4.
    Check,
}

/// Set by the first SIGTERM or SIGINT.
static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_signal: i32) {
    STOP.store(true, Ordering::Relaxed);
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.command {
        Command::Load { warehouses, scale, threads, seed } => {
            let scale = Scale::new(warehouses, scale)?;
            load(&cli.socket, scale, threads, seed)?;
            eprintln!("loaded {}", scale.describe());
        }
        Command::Run { seconds, threads, seed } => {
            let action = SigAction::new(SigHandler::Handler(stop), SaFlags::SA_RESTART, SigSet::empty());
            for signal in [Signal::SIGTERM, Signal::SIGINT] {
                // SAFETY: the handler stores to an atomic and does nothing else.
                unsafe { sigaction(signal, &action) }?;
            }
            let how =
                Run { threads, limit: Duration::from_secs(seconds), step: Duration::from_secs(1), seed };
            let counts = run(&cli.socket, how, &STOP, &mut std::io::stdout())?;
            eprintln!("{} transactions committed, {} tried again", counts.committed(), counts.retries);
        }
        Command::Check => {
            let checked = check(&cli.socket)?;
            for violation in &checked.violations {
                println!("{violation}");
            }
            println!(
                "{}: {} districts, {} orders, {} violations of conditions 1 to 4",
                checked.loaded.scale.describe(),
                checked.districts,
                checked.orders,
                checked.violations.len()
            );
            if !checked.violations.is_empty() {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
