//! `guest-probe`: the command line. Everything else is in the library.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::{Parser, Subcommand};
use guest_probe::catalogue::{Catalogue, OWN_DIR};
use guest_probe::config::{Config, Mode};
use guest_probe::device::ModuleDevice;
use guest_probe::doctor::{self, Subject};
use guest_probe::exit::Exit;
use guest_probe::privileges;
use guest_probe::report;
use guest_probe::service::{self, Ended, ServiceOptions};
use guest_probe::status;
use guest_probe::watch;
use tracing_subscriber::EnvFilter;

/// Tells the host which frames of a running mysqld's buffer pool lie on disk, and where.
///
/// mysqld is neither restarted nor configured: its functions are probed by eBPF and its memory is read. Needs root, Linux
/// 5.8 or later, and a build of mysqld that it knows. POOLSKIP_LOG (error, warn, info, debug) says how much is logged, on stderr.
///
/// Exit codes: 0 done or ended by a signal, 1 another failure, 2 the command line, 3 no mysqld or the one of --pid has ended, 4 not
/// permitted, 5 the kernel takes no probes, 6 an unknown build of mysqld, 7 no kernel module, 8 another guest-probe runs (for `status`:
/// none answers), 9 the configuration, 10 `doctor` misses something or `catalogue add` is not sure, 11 a damaged or foreign program file,
/// 12 mysqld's memory is not as its build says, 13 a catalogue.
#[derive(Parser)]
#[command(name = "guest-probe", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
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
        #[arg(long, value_name = "PATH", default_value = status::SOCKET_PATH)]
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
}

#[derive(Subcommand)]
enum CatalogueCommand {
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

fn catalogue(command: CatalogueCommand) -> Result<Exit> {
    match command {
        CatalogueCommand::List => {
            for build in Catalogue::installed()?.builds() {
                println!("{}  {}", build.build_id, build.package);
            }
            Ok(Exit::Success)
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
            Ok(Exit::Success)
        }
    }
}

/// What cannot be looked at ends with the code of its kind.
fn refuse(error: &doctor::DoctorError) -> Exit {
    eprintln!("guest-probe: {error}");
    Exit::of(error)
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("POOLSKIP_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter).init();
    let exit = run(Cli::parse().command).unwrap_or_else(|error| {
        // Each message says its cause itself.
        eprintln!("guest-probe: {error}");
        Exit::of(&*error)
    });
    ExitCode::from(exit as u8)
}

fn run(command: Command) -> Result<Exit> {
    match command {
        Command::Run { config, resident, pid, device, socket, statistics, wrong_hints } => {
            let mut config = Config::load(config.as_deref())?;
            if resident {
                config.mode = Mode::Resident;
            }
            config.pid = pid.or(config.pid);
            config.device = device.unwrap_or(config.device);
            config.socket = socket.unwrap_or(config.socket);
            config.statistics |= statistics;
            let mut device = ModuleDevice::open(&config.device)?;
            if let Err(error) = privileges::give_up() {
                tracing::warn!(%error, "capabilities that are not needed cannot be given up");
            }
            let mut options = ServiceOptions::from(config);
            options.session.wrong_hints = wrong_hints;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime =
                runtime.map_err(|error| anyhow!("cannot start the asynchronous runtime: {error}"))?;
            match runtime.block_on(service::serve(options, &mut device))? {
                Ended::BySignal => Ok(Exit::Success),
                Ended::MysqldGone => {
                    eprintln!("guest-probe: mysqld has ended; its lists are withdrawn");
                    Ok(Exit::NoMysqld)
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
            Ok(Exit::Success)
        }
        Command::Watch { every, times, socket } => {
            watch::watch(&socket, Duration::from_secs(every), times)?;
            Ok(Exit::Success)
        }
        Command::Snapshot { pid, json } => {
            let report = report::report(pid)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                print!("{report}");
            }
            Ok(Exit::Success)
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
            Ok(if report.is_usable() { Exit::Success } else { Exit::NotUsable })
        }
        Command::Catalogue(command) => catalogue(command),
    }
}
