//! The command line: what each command takes. What it does is in `main`.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::status::SOCKET_PATH;

/// Tells the host which frames of a running mysqld's buffer pool lie on disk, and where.
///
/// mysqld is neither restarted nor configured: its functions are probed by eBPF and its memory is read. Needs root, Linux
/// 5.8 or later, and a build of mysqld that it knows. POOLSKIP_LOG (error, warn, info, debug) says how much is logged, on stderr.
///
/// Exit codes: 0 done or ended by a signal, 1 another failure, 2 the command line, 3 no mysqld or the one of --pid has ended, 4 not
/// permitted, 5 the kernel takes no probes, 6 an unknown build of mysqld, 7 no kernel module, 8 another guest-probe runs (for `status`:
/// none answers), 9 the configuration, 10 `doctor` misses something or `catalogue add` is not sure, 11 a damaged or foreign program file,
/// 12 mysqld's memory is not as its build says, 13 a catalogue.
#[derive(Debug, Parser)]
#[command(name = "guest-probe", version)]
pub struct CommandLine {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer dom0's requests with lists of every running mysqld; runs until SIGTERM or SIGINT
    ///
    /// Nothing is attached until dom0 asks, nor after the migration, unless --resident is said. What is not said here is as in the
    /// configuration.
    Run {
        /// The configuration; without this, the one at /etc/poolskip/guest-probe.toml if there is one
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Keep probes in place all the time
        #[arg(long)]
        resident: bool,
        /// The only mysqld to probe; ends with code 3 when that one does
        #[arg(long, value_name = "N")]
        pid: Option<i32>,
        /// The kernel module's device
        #[arg(long, value_name = "PATH")]
        device: Option<PathBuf>,
        /// Where `status` asks
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Let the kernel count the runs of the eBPF programs and their time, for `status`
        #[arg(long)]
        statistics: bool,
        /// TEST AID: publish about one hint in four wrong, the same ones for the same seed
        #[arg(long, value_name = "SEED")]
        wrong_hints: Option<u64>,
    },
    /// Show what a running guest-probe knows and has published, by table and by reason
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Where `run` listens
        #[arg(long, value_name = "PATH", default_value = SOCKET_PATH)]
        socket: PathBuf,
    },
    /// Show the status again and again, with what happens in a second
    Watch {
        /// Seconds between two looks
        #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
        every: u64,
        /// End after so many looks
        #[arg(long, value_name = "N")]
        times: Option<u64>,
        /// Where `run` listens
        #[arg(long, value_name = "PATH", default_value = SOCKET_PATH)]
        socket: PathBuf,
    },
    /// Show what would be listed at this moment, on any disk, without attaching anything
    Snapshot {
        /// The mysqld to look at; needed when more than one runs
        #[arg(long, value_name = "N")]
        pid: Option<i32>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Explain whether a mysqld can be served: its build, each symbol and offset and how sure it is, each data file's place, this machine
    ///
    /// Exit codes: 0 when `run` would do its work, 10 when something is missing: the last lines say what. What cannot be looked at at all has
    /// the code of its kind.
    Doctor {
        /// The mysqld to look at; needed when more than one runs
        #[arg(long, value_name = "N")]
        pid: Option<i32>,
        /// A program file, where none runs
        #[arg(long, value_name = "FILE", conflicts_with = "pid")]
        binary: Option<PathBuf>,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// The kernel module's device
        #[arg(long, value_name = "PATH", default_value = enlightenment::device::DEVICE_PATH)]
        device: PathBuf,
    },
    /// The builds of mysqld that are known
    #[command(subcommand)]
    Catalogue(CatalogueCommand),
    /// Write man pages or shell completions (for packages)
    #[command(hide = true)]
    Generate(manual::Generate),
}

/// Commands of `catalogue`
#[derive(Debug, Subcommand)]
pub enum CatalogueCommand {
    /// Show them
    List,
    /// Make an entry for an unknown build, from a server of it that runs under some load; refuses when anything is unsure (exit code 10)
    Add {
        /// The program file; a running process of the same build is looked at
        #[arg(value_name = "BINARY", required_unless_present = "pid", conflicts_with = "pid")]
        binary: Option<PathBuf>,
        /// The running mysqld
        #[arg(long, value_name = "N")]
        pid: Option<i32>,
        /// Where to write; /etc/poolskip/catalogue.d/BUILD_ID.toml when not given
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}
