//! `guest-probe`: the command line. Everything else is in the library.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::{Parser, Subcommand};
use guest_probe::catalogue::{Catalogue, OWN_DIR};
use guest_probe::device::ModuleDevice;
use guest_probe::doctor::{self, Subject};
use guest_probe::report;
use guest_probe::service::{self, Ended};
use guest_probe::session::Options;
use guest_probe::status;
use guest_probe::storage_map::DiskRule;

/// Exit code of `run` when mysqld has ended.
const MYSQLD_GONE: u8 = 3;

/// Exit code of `doctor` when something is missing or nothing can be looked at, and of `catalogue add` when there is a doubt.
const NOT_USABLE: u8 = 4;

/// Tells the host which frames of a running mysqld's buffer pool lie on disk, and where.
///
/// mysqld is neither restarted nor configured: its functions are probed by eBPF and its memory is read. Needs root, Linux
/// 5.8 or later, and a build of mysqld that it knows.
#[derive(Parser)]
#[command(name = "guest-probe", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Attach to mysqld, keep its frame table, and answer dom0's requests with lists; runs until SIGTERM or SIGINT
    ///
    /// Exit codes: 0 after a signal, 1 after an error, 3 when mysqld has ended (start it again then; lists are withdrawn).
    /// RUST_LOG=debug says more on stderr.
    Run {
        /// The mysqld to attach to; needed when more than one runs
        #[arg(long, value_name = "N")]
        pid: Option<i32>,
        /// The kernel module's device
        #[arg(long, value_name = "PATH", default_value = enlightenment::device::DEVICE_PATH)]
        device: PathBuf,
        /// Where `status` asks
        #[arg(long, value_name = "PATH", default_value = status::SOCKET_PATH)]
        socket: PathBuf,
        /// Let the kernel count the runs of the eBPF programs and their time, for `status`
        #[arg(long)]
        statistics: bool,
        /// TEST AID: publish about one hint in four wrong, the same ones for the same seed
        #[arg(long, value_name = "SEED")]
        wrong_hints: Option<u64>,
    },
    /// Show what a running guest-probe knows and has published
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Where `run` listens
        #[arg(long, value_name = "PATH", default_value = status::SOCKET_PATH)]
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
    /// Exit codes: 0 when `run` would do its work, 4 when something is missing (the last lines say what) or there is no mysqld to look at.
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
}

#[derive(Subcommand)]
enum CatalogueCommand {
    /// Show them
    List,
    /// Make an entry for an unknown build, from a server of it that runs under some load; refuses when anything is unsure (exit code 4)
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

fn catalogue(command: CatalogueCommand) -> Result<ExitCode> {
    match command {
        CatalogueCommand::List => {
            for build in Catalogue::installed()?.builds() {
                println!("{}  {}", build.build_id, build.package);
            }
            Ok(ExitCode::SUCCESS)
        }
        CatalogueCommand::Add { binary, pid, output } => {
            let subject = binary.map_or(Subject::Process(pid), Subject::Binary);
            let build = match doctor::make_entry(&subject) {
                Ok(build) => build,
                Err(error) => return Ok(refuse(&error)),
            };
            // A second entry would make the whole catalogue unusable.
            if output.is_none() && Catalogue::installed()?.find(&build.build_id).is_ok() {
                return Err(anyhow!(
                    "{} is in the catalogue already; -o FILE writes what was found out elsewhere",
                    build.build_id
                ));
            }
            let path =
                output.unwrap_or_else(|| PathBuf::from(OWN_DIR).join(format!("{}.toml", build.build_id)));
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir)
                    .map_err(|error| anyhow!("cannot make {}: {error}", dir.display()))?;
            }
            // Under its name it is whole or not at all.
            let partial = path.with_extension("partial");
            std::fs::write(&partial, build.to_toml()?)
                .and_then(|()| std::fs::rename(&partial, &path))
                .map_err(|error| anyhow!("cannot write {}: {error}", path.display()))?;
            println!("{} is known now: {}", build.build_id, path.display());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// What cannot be looked at is not usable either.
fn refuse(error: &doctor::DoctorError) -> ExitCode {
    eprintln!("guest-probe: {error}");
    ExitCode::from(NOT_USABLE)
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")))
        .init();
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            // Each message says its cause itself.
            eprintln!("guest-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run { pid, device, socket, statistics, wrong_hints } => {
            let options = Options { pid, wrong_hints, rule: DiskRule::Xen, ..Options::default() };
            let mut device = ModuleDevice::open(&device)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime =
                runtime.map_err(|error| anyhow!("cannot start the asynchronous runtime: {error}"))?;
            match runtime.block_on(service::serve(&options, &mut device, &socket, statistics))? {
                Ended::BySignal => Ok(ExitCode::SUCCESS),
                Ended::MysqldGone => {
                    eprintln!("guest-probe: mysqld has ended; its lists are withdrawn");
                    Ok(ExitCode::from(MYSQLD_GONE))
                }
            }
        }
        Command::Status { json, socket } => {
            let status = status::ask(&socket)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                println!("{status}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Snapshot { pid, json } => {
            let report = report::report(pid)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                print!("{report}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Doctor { pid, binary, json, device } => {
            let subject = binary.map_or(Subject::Process(pid), Subject::Binary);
            let report = match doctor::look(&subject, &Catalogue::installed()?, &device) {
                Ok(report) => report,
                Err(error) => return Ok(refuse(&error)),
            };
            if json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                print!("{report}");
            }
            Ok(if report.is_usable() { ExitCode::SUCCESS } else { ExitCode::from(NOT_USABLE) })
        }
        Command::Catalogue(command) => catalogue(command),
    }
}
