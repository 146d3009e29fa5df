//! The commands.

mod carry;
mod child;
mod connection;
mod domain;
mod follow;
mod metrics;
mod migrate;
mod observer;
mod progress;
mod receive;
mod remaining;
mod report;
mod signals;
mod summary;

pub use progress::Form as ProgressForm;
pub use report::Report;
pub use summary::{Outcome, Summary};

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser};

use crate::helper::policy::{Limits, OnStall};

/// Exit code: the domain runs at the target.
pub const EXIT_MIGRATED: u8 = 0;
/// Exit code: the migration failed, and the domain runs on here.
pub const EXIT_FAILED: u8 = 1;
/// Exit code: nothing was begun (clap's own for a wrong command line, too).
pub const EXIT_NOT_BEGUN: u8 = 2;
/// Exit code: interrupted by a signal, and the domain runs on here.
pub const EXIT_INTERRUPTED: u8 = 3;
/// Exit code: the link broke in xl's last handshake; look at both hosts which of them runs the domain.
pub const EXIT_UNDEFINED: u8 = 4;

/// Port that `migrate` connects to when none is given.
pub const DEFAULT_PORT: u16 = 8002;

/// Live migration of Xen domains that sends references in place of pages which lie on shared storage.
///
/// Exit codes: 0 the domain runs at the target; 1 the migration failed and the domain runs on here; 2 nothing was begun;
/// 3 interrupted, the domain runs on here; 4 the link broke in xl's last handshake: look at both hosts.
#[derive(Debug, Parser)]
#[command(name = "dom0-migrator", version)]
pub enum Command {
    /// Migrate a domain to a host where `receive` listens.
    Migrate(Migrate),
    /// Receive domains.
    Receive(Receive),
    /// Make a page for a browser of a migration's report file.
    Report(Report),
    /// Carry xl's stream to the network (started by xl for `migrate`).
    #[command(hide = true)]
    Carry,
}

/// Options of `migrate`.
#[derive(Debug, Args)]
pub struct Migrate {
    /// Name or number of the domain.
    pub domain: String,
    /// Where `receive` listens: HOST or HOST:PORT (8002 when not given).
    #[arg(value_name = "HOST[:PORT]")]
    pub target: String,
    /// Write the summary to a file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the report, of which `report` makes a page, to this file, and not to DOMAIN-DATE.json in
    /// /var/lib/poolskip/reports (or in the directory that POOLSKIP_REPORTS names).
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// How progress is shown.
    #[arg(long, value_enum, value_name = "FORM", default_value_t)]
    pub progress: ProgressForm,
    /// Serve figures for Prometheus here while the migration runs, at /metrics. Nobody is asked who he is: 127.0.0.1 or a network of
    /// the hosts alone.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// Write figures for Prometheus to this file, for node_exporter's textfile collector: of the migration that runs, and then of
    /// the last one.
    #[arg(long, value_name = "FILE.prom")]
    pub metrics_file: Option<PathBuf>,
    /// Send all memory once more at the end and compare it at the target; fail on any difference.
    #[arg(long)]
    pub debug: bool,
    /// Send every page that is not zero: ask the guest for nothing.
    #[arg(long)]
    pub no_references: bool,
    /// Run libxl's own helper on both sides, over the same connections, to compare with.
    #[arg(long)]
    pub stock: bool,
    /// Seconds that the guest may take to publish its lists.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub wait_lists: u64,
    /// Downtime to be had if possible: while rounds of the pre-copy still make it shorter, and for up to 30 of them, they go on after
    /// the fifth.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = Limits::DEFAULT.max_downtime_ms)]
    pub max_downtime: u64,
    /// What to do when rounds no longer make the downtime shorter, and it would be longer than that.
    #[arg(long, value_enum, default_value_t = OnStall::Stop)]
    pub on_stall: OnStall,
}

/// Options of `receive`.
#[derive(Debug, Args)]
pub struct Receive {
    /// Address and port to listen on. The network must be one that only the hosts share.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    /// End after one migration; the exit code tells how it went.
    #[arg(long)]
    pub once: bool,
}

/// Does what the command line says.
pub fn run(command: Command) -> ExitCode {
    let code = match command {
        Command::Migrate(options) => migrate::run(&options),
        Command::Receive(options) => receive::run(&options),
        Command::Report(options) => report::run(&options),
        Command::Carry => carry::run(),
    };
    ExitCode::from(code)
}
