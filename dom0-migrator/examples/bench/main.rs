//! What `cargo xtask bench stream` and `bench reload` run: the filters and the restorer on this machine, without a hypervisor.

mod guest;
mod reload;
mod roles;
mod stream;

use clap::{Parser, Subcommand};

/// Measures the filters and the restorer.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A stream through both filters, against the same stream copied
    Stream(stream::Args),
    /// One process of that chain
    Role(roles::Args),
    /// References read by the restorer
    Reload(reload::Args),
}

/// Whatever went wrong, in words.
type Failed = Box<dyn std::error::Error>;

fn main() -> Result<(), Failed> {
    match Cli::parse().command {
        Command::Stream(args) => stream::run(&args),
        Command::Role(args) => roles::run(&args),
        Command::Reload(args) => reload::run(&args),
    }
}
