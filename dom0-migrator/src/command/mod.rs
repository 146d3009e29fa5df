//! The commands.

mod carry;
mod certificates;
mod child;
pub mod configuration;
mod connection;
mod domain;
pub mod follow;
mod host;
mod judge;
mod link;
mod metrics;
mod migrate;
mod observer;
mod progress;
mod pump;
mod receive;
mod relay;
mod remaining;
mod report;
mod resolve;
mod session;
mod settle;
mod signals;
mod status;
mod strangers;
mod summary;
mod tls;
mod watch;
pub mod xl_words;

pub use progress::Form as ProgressForm;
pub use report::Report;
pub use summary::{Outcome, Summary};

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use configuration::{Configuration, Connecting, Rate};

use crate::helper::policy::{Limits, OnStall};

/// Exit code: the domain runs at the target.
pub const EXIT_MIGRATED: u8 = 0;
/// Exit code: the migration failed, and the domain runs on here.
pub const EXIT_FAILED: u8 = 1;
/// Exit code: nothing was begun (clap's own for a wrong command line, too).
pub const EXIT_NOT_BEGUN: u8 = 2;
/// Exit code: interrupted by a signal, and the domain runs on here.
pub const EXIT_INTERRUPTED: u8 = 3;
/// Exit code: the hosts lost each other in the hand-over; the domain stands suspended here, and `resolve` settles it.
pub const EXIT_UNDEFINED: u8 = 4;

/// Port that `migrate` connects to when none is given.
pub const DEFAULT_PORT: u16 = 8002;

/// Live migration of Xen domains that sends references in place of pages which lie on shared storage.
///
/// Exit codes: 0 the domain runs at the target; 1 the migration failed and the domain runs on here; 2 nothing was begun;
/// 3 interrupted, the domain runs on here; 4 the hosts lost each other in the hand-over: the domain stands suspended here until
/// `resolve` has heard from the target.
#[derive(Debug, Parser)]
#[command(name = "dom0-migrator", version)]
pub struct CommandLine {
    /// The configuration [default: /etc/poolskip/migrator.toml, if it is there].
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Migrate a domain to a host where `receive` listens.
    Migrate(Migrate),
    /// Receive domains.
    Receive(Receive),
    /// Settle migrations that were cut off: find which side may run the domain, and make it so.
    Resolve(Resolve),
    /// Show the migrations of this host that are not over, or one of them.
    Status(Status),
    /// Show all migrations that are on record.
    List(List),
    /// Have a running migration give up; the domain stays at the source.
    Cancel(Cancel),
    /// Certificates for the hosts, by which they know each other.
    #[command(subcommand)]
    Certificates(Certificates),
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
    /// Seconds that the guest may take to publish its lists [default: 30].
    #[arg(long, value_name = "SECONDS")]
    pub wait_lists: Option<u64>,
    /// Downtime to be had if possible: while rounds of the pre-copy still make it shorter, and for up to 30 of them, they go on after
    /// the fifth.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = Limits::DEFAULT.max_downtime_ms)]
    pub max_downtime: u64,
    /// What to do when rounds no longer make the downtime shorter, and it would be longer than that.
    #[arg(long, value_enum, default_value_t = OnStall::Stop)]
    pub on_stall: OnStall,
    /// Bytes per second that may be sent over all connections together, as in 100M; also while the domain stands still.
    #[arg(long, value_name = "RATE")]
    pub bandwidth: Option<Rate>,
    /// How to connect.
    #[command(flatten)]
    pub connecting: Connecting,
}

/// Options of `receive`.
#[derive(Debug, Args)]
pub struct Receive {
    /// Address and port to listen on [default: the configuration's].
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// How to be connected to.
    #[command(flatten)]
    pub connecting: Connecting,
    /// End after one migration; the exit code tells how it went.
    #[arg(long)]
    pub once: bool,
}

/// Options of `resolve`.
#[derive(Debug, Args)]
pub struct Resolve {
    /// Number of the migration, or name of its domain; all that are open when not given.
    pub id: Option<String>,
    /// Where the target's `receive` listens now, when it is not where it was: HOST or HOST:PORT.
    #[arg(long, value_name = "HOST[:PORT]")]
    pub peer: Option<String>,
    /// How to connect.
    #[command(flatten)]
    pub connecting: Connecting,
}

/// What to do about certificates.
#[derive(Debug, Subcommand)]
pub enum Certificates {
    /// Make a certificate for each host, and an authority that signs them if there is none in the directory yet.
    Make(CertificatesMake),
}

/// Options of `certificates make`.
#[derive(Debug, Args)]
pub struct CertificatesMake {
    /// The directory of the authority, and of a directory for each host.
    #[arg(long, value_name = "DIRECTORY")]
    pub out: PathBuf,
    /// The hosts, by the names or addresses that others connect to.
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

/// Options of `status`.
#[derive(Debug, Args)]
pub struct Status {
    /// Number of the migration, or name of its domain.
    pub migration: Option<String>,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `list`.
#[derive(Debug, Args)]
pub struct List {
    /// As JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `cancel`.
#[derive(Debug, Args)]
pub struct Cancel {
    /// Number of the migration, or name of its domain.
    pub migration: String,
}

/// Does what the command line says.
pub fn run(line: CommandLine) -> ExitCode {
    let CommandLine { config, command } = line;
    let code = match command {
        Command::Report(options) => report::run(&options),
        // xl's own environment may be anything; this needs nothing but the command that it works for.
        Command::Carry => carry::run(),
        Command::Certificates(Certificates::Make(options)) => certificates::run(&options),
        command => match Configuration::load(config.as_deref()) {
            Ok(configuration) => run_configured(command, &configuration),
            Err(error) => {
                eprintln!("dom0-migrator: {error}");
                EXIT_NOT_BEGUN
            }
        },
    };
    ExitCode::from(code)
}

fn run_configured(command: Command, configuration: &Configuration) -> u8 {
    let records = Some(configuration.records.as_path());
    match command {
        Command::Migrate(options) => migrate::run(&options, configuration),
        Command::Receive(options) => receive::run(&options, configuration),
        Command::Resolve(options) => resolve::run(&options, configuration),
        Command::Status(options) => status::status(&options, records),
        Command::List(options) => status::list(&options, records),
        Command::Cancel(options) => status::cancel(&options, records),
        Command::Carry | Command::Certificates(_) | Command::Report(_) => EXIT_NOT_BEGUN,
    }
}
