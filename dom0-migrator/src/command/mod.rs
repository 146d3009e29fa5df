//! The commands.

mod as_xl;
mod bundle;
mod carry;
mod certificates;
mod check;
mod child;
pub mod configuration;
pub(crate) mod connection;
mod doctor;
pub(crate) mod domain;
mod evacuate;
pub mod follow;
mod host;
mod judge;
mod link;
mod listening;
mod metrics;
mod migrate;
mod observer;
mod pair;
mod progress;
pub(crate) mod pump;
mod receive;
mod relay;
mod remaining;
mod report;
mod resolve;
mod session;
mod settle;
mod signals;
mod status;
pub(crate) mod strangers;
mod summary;
pub(crate) mod tls;
mod toolstack;
mod watch;
pub mod xl_words;

pub use bundle::{BlocksReport, Compression};
pub use progress::Form as ProgressForm;
pub use report::Report;
pub use summary::{Outcome, Summary};

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use configuration::{Configuration, Connecting, Rate};

use crate::control::CONNECTIONS_MAX;
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
    /// Say what a migration would be now, and what is in its way, by name; nothing is begun and nothing changed.
    ///
    /// Exit codes: 0 nothing is in the way; 1 it would go, with less by reference than could be; 2 it would not begin.
    Check(Check),
    /// Receive domains.
    Receive(Receive),
    /// Migrate every domain that can go to other hosts, by a plan that is shown first.
    ///
    /// Exit codes: 0 all are gone; 1 some stay; 2 nothing was begun; 3 interrupted; 4 one is in doubt, which `resolve` settles.
    Evacuate(evacuate::Evacuate),
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
    /// Have this host and another one know each other: certificates for both, over ssh.
    Pair(pair::Pair),
    /// Make a page for a browser of a migration's report file.
    Report(Report),
    /// Look whether this host can migrate, and whether it can migrate to another one; nothing is changed.
    ///
    /// Exit codes: 0 when nothing is missing, 1 when something is, 2 when the configuration cannot be read.
    Doctor(doctor::Doctor),
    /// Have the toolstack that is here go through Poolskip: `xl migrate`, or libvirt's driver for Xen.
    Enable(toolstack::Enable),
    /// Undo `enable`, without a trace.
    Disable(toolstack::Disable),
    /// What `xl migrate` becomes after `enable xl`.
    #[command(hide = true)]
    AsXl(as_xl::AsXl),
    /// Write man pages or shell completions (for packages).
    #[command(hide = true)]
    Generate(manual::Generate),
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
    /// Send a page though the log of dirty pages has marked it again, so that it will be sent once more: do not look at the log during a
    /// pass.
    #[arg(long)]
    pub no_peek: bool,
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
    /// TCP connections over which the stream goes [default: 4].
    #[arg(long, value_name = "NUMBER", value_parser = connections())]
    pub connections: Option<u16>,
    /// Compress the stream, block by block; right on links that are slower than a processor [default: off].
    #[arg(long, value_enum, value_name = "HOW")]
    pub compress: Option<Compression>,
    /// How to connect.
    #[command(flatten)]
    pub connecting: Connecting,
}

/// Options of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// Name or number of the domain.
    pub domain: String,
    /// Where `receive` listens: HOST or HOST:PORT (8002 when not given).
    #[arg(value_name = "HOST[:PORT]")]
    pub target: String,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    /// TCP connections over which the link is tried out, as `migrate` has them [default: 4].
    #[arg(long, value_name = "NUMBER", value_parser = connections())]
    pub connections: Option<u16>,
    /// Bytes per second that may be sent, as in 100M.
    #[arg(long, value_name = "RATE")]
    pub bandwidth: Option<Rate>,
    /// Seconds that the guest may take to publish its lists [default: 30].
    #[arg(long, value_name = "SECONDS")]
    pub wait_lists: Option<u64>,
    /// The downtime that `migrate` would be told.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = Limits::DEFAULT.max_downtime_ms)]
    pub max_downtime: u64,
    /// How to connect.
    #[command(flatten)]
    pub connecting: Connecting,
}

/// Options of `receive`.
#[derive(Debug, Args)]
pub struct Receive {
    /// Address and port to listen on [default: the sockets that systemd passes, or else the configuration's].
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
    /// Make a key for this host, and print a request for its certificate (`pair` runs this on the other host).
    #[command(hide = true)]
    Request,
    /// Sign a request with this host's authority (`cargo xtask deploy` runs this on the first host).
    #[command(hide = true)]
    Grant(pair::Grant),
    /// Take a certificate into use that was requested before (`pair` runs this on the other host).
    #[command(hide = true)]
    Accept(pair::Accept),
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

/// How many connections a stream may have.
fn connections() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..=i64::from(CONNECTIONS_MAX))
}

/// Does what the command line says.
pub fn run(line: CommandLine) -> ExitCode {
    let CommandLine { config, command } = line;
    let code = match command {
        Command::Report(options) => report::run(&options),
        // xl's own environment may be anything; this needs nothing but the command that it works for.
        Command::Carry => carry::run(),
        Command::Enable(options) => toolstack::enable(&options),
        Command::Disable(options) => toolstack::disable(&options),
        Command::Generate(options) => match manual::generate(CommandLine::command(), &options) {
            Ok(()) => EXIT_MIGRATED,
            Err(error) => {
                eprintln!("dom0-migrator: {error}");
                EXIT_FAILED
            }
        },
        Command::Certificates(Certificates::Make(options)) => certificates::run(&options),
        command => match Configuration::load(config.as_deref()) {
            Ok(configuration) => run_configured(command, &configuration, config.as_ref()),
            Err(error) => {
                eprintln!("dom0-migrator: {error}");
                EXIT_NOT_BEGUN
            }
        },
    };
    ExitCode::from(code)
}

fn run_configured(command: Command, configuration: &Configuration, file: Option<&PathBuf>) -> u8 {
    let records = Some(configuration.records.as_path());
    match command {
        Command::Migrate(options) => migrate::run(&options, configuration),
        Command::Check(options) => check::run(&options, configuration),
        Command::Receive(options) => receive::run(&options, configuration),
        Command::Resolve(options) => resolve::run(&options, configuration),
        Command::Status(options) => status::status(&options, records),
        Command::List(options) => status::list(&options, records),
        Command::Cancel(options) => status::cancel(&options, records),
        Command::Evacuate(options) => evacuate::run(&options, configuration, file),
        Command::Doctor(options) => doctor::run(&options, configuration),
        Command::Pair(options) => pair::run(&options, configuration),
        Command::Certificates(Certificates::Request) => pair::request(configuration),
        Command::Certificates(Certificates::Grant(options)) => pair::grant(&options),
        Command::Certificates(Certificates::Accept(options)) => pair::accept(&options, configuration),
        Command::AsXl(options) => as_xl::run(&options, configuration),
        Command::Carry
        | Command::Certificates(_)
        | Command::Disable(_)
        | Command::Enable(_)
        | Command::Generate(_)
        | Command::Report(_) => EXIT_NOT_BEGUN,
    }
}
