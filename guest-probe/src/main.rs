//! `guest-probe`: the command line. Everything else is in the library.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::{CommandFactory as _, Parser as _};
use guest_probe::catalogue::{Catalogue, OWN_DIR};
use guest_probe::command_line::{CatalogueCommand, Command, CommandLine};
use guest_probe::config::{Config, Mode};
use guest_probe::device::ModuleDevice;
use guest_probe::doctor::{self, Subject};
use guest_probe::exit::Exit;
use guest_probe::privileges;
use guest_probe::report;
use guest_probe::service::{self, Ended, ServiceOptions};
use guest_probe::status;
use guest_probe::urgency;
use guest_probe::watch;
use tracing_subscriber::EnvFilter;

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
    let exit = run(CommandLine::parse().command).unwrap_or_else(|error| {
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
            if let Err(error) = urgency::allow() {
                tracing::debug!(%error, "answers will not be urgent");
            }
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
        Command::Generate(options) => {
            manual::generate(CommandLine::command(), &options)?;
            Ok(Exit::Success)
        }
    }
}
