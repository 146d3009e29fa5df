//! `cargo xtask lab`: the lab by hand.

use std::io::{Read, Write, stdin, stdout};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::machine::Machine;
use super::run_dir::{Record, living};
use super::{Flavour, GuestSize, Host, Lab, Options, frozen};
use crate::deployment::Deployment;
use crate::setup;

/// Raise, use and end the lab.
#[derive(clap::Args)]
pub struct Args {
    /// Which lab, by the number of the process that holds it: needed when more than one is up, or to look into one that a demo or a
    /// test has raised for itself
    #[arg(long, global = true)]
    pid: Option<u32>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Raise the lab and keep it until Ctrl-C or `lab down`; builds it first if need be
    Up {
        /// What kind of guest, and so which hosts
        #[arg(long, value_enum, default_value_t, value_name = "KIND")]
        guest: Flavour,
        /// Put Poolskip into it: the migrator into both hosts, the module and the probe into the guest
        #[arg(long)]
        install: bool,
        /// Memory of the guest, in MiB
        #[arg(long, value_name = "MIB", default_value_t = 704)]
        guest_memory: u32,
        /// Buffer pool of the guest, in MiB
        #[arg(long, value_name = "MIB", default_value_t = 256)]
        guest_pool: u32,
    },
    /// Run a shell command on a machine of the lab that is up
    Run {
        /// Which machine
        machine: Which,
        /// Give up after this many seconds
        #[arg(long, default_value_t = 600)]
        timeout: u64,
        /// The command; its words are put together with spaces for the machine's shell
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Put a file of this machine onto a machine of the lab that is up
    Put {
        /// Which machine
        machine: Which,
        /// The file here
        file: PathBuf,
        /// Its path there; it may be executed there
        path: String,
    },
    /// Connect to the serial console of a host (hypervisor and dom0); Ctrl-C leaves it
    Console {
        /// Which host
        machine: Which,
    },
    /// End the lab that is up
    Down,
    /// Build the warmed lab and freeze it into the cache, so that it can be resumed in seconds
    Build {
        /// What kind of guest, and so which hosts
        #[arg(long, value_enum, default_value_t, value_name = "KIND")]
        guest: Flavour,
        /// Even if the cache has it
        #[arg(long)]
        rebuild: bool,
        /// Only what its machines boot from: nothing is raised
        #[arg(long, conflicts_with = "rebuild")]
        images: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Which {
    /// The host that the guest begins on
    Source,
    /// The host that it goes to
    Target,
    /// The guest, wherever it is
    Guest,
}

/// Does what is asked.
///
/// # Errors
/// When it cannot be done.
pub fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Up { guest, install, guest_memory, guest_pool } => {
            up(*guest, *install, GuestSize::new(*guest_memory, *guest_pool)?)
        }
        Command::Put { machine: which, file, path } => {
            // Whatever runs there under that name keeps the file that it has.
            let machine = machine(*which, &only(args.pid)?);
            machine.push(file, &format!("{path}.new"), 0o755)?;
            machine.must(&format!("mv '{path}.new' '{path}'"), Duration::from_secs(60)).map(drop)
        }
        Command::Run { machine, timeout, command } => {
            run_command(args.pid, *machine, &command.join(" "), Duration::from_secs(*timeout))
        }
        Command::Console { machine } => console(args.pid, *machine),
        Command::Down => down(args.pid),
        Command::Build { guest, rebuild, images } => {
            setup::ensure()?;
            if *images {
                let (hosts, disk) = frozen::images(*guest, GuestSize::default())?;
                println!("{}\n{}", hosts.dir().display(), disk.display());
                return Ok(());
            }
            let frozen = frozen::get(*rebuild, *guest, GuestSize::default())?;
            println!("{}", frozen.dir().display());
            Ok(())
        }
    }
}

fn up(flavour: Flavour, install: bool, guest: GuestSize) -> Result<()> {
    let deployment = install.then(|| Deployment::build(flavour)).transpose()?;
    let mut lab = Lab::warm(&Options { flavour, guest, ..Options::default() })?;
    if let Some(deployment) = deployment {
        deployment.install(&lab)?;
        deployment.start_probe(&lab, "")?;
    }
    lab.announce(true)?;
    println!("{}\nCtrl-C ends it.", lab.describe());
    loop {
        // The handler of signals ends it, and this process.
        thread::sleep(Duration::from_secs(1));
        lab.check()?;
    }
}

fn run_command(pid: Option<u32>, which: Which, command: &str, limit: Duration) -> Result<()> {
    let output = machine(which, &only(pid)?).run(command, limit)?;
    stdout().write_all(output.stdout.as_bytes())?;
    eprint!("{}", output.stderr);
    if output.status != 0 {
        std::process::exit(output.status);
    }
    Ok(())
}

fn machine(which: Which, record: &Record) -> Machine {
    let at = |ports: &[u16], index: usize| ports.get(index).copied().into_iter().collect();
    match which {
        Which::Source => Machine::new("source", at(&record.dom0_ports, 0), None),
        Which::Target => Machine::new("target", at(&record.dom0_ports, 1), None),
        Which::Guest => Machine::new("guest", record.guest_ports.clone(), None),
    }
}

fn console(pid: Option<u32>, which: Which) -> Result<()> {
    let host = match which {
        Which::Source => Host::Source,
        Which::Target => Host::Target,
        Which::Guest => {
            bail!("the guest's console: cargo xtask lab run source tail -n 50 /var/log/xen/guest-db1.log")
        }
    };
    let path = only(pid)?.sockets.join(format!("{}.console", host.name()));
    let mut stream =
        UnixStream::connect(&path).with_context(|| format!("no console at {}", path.display()))?;
    let mut from = stream.try_clone()?;
    thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(length) = stdin().read(&mut chunk) {
            if length == 0 || stream.write_all(&chunk[..length]).is_err() {
                break;
            }
        }
        // The other direction may have gone already.
        let _ = stream.shutdown(Shutdown::Write);
    });
    let mut chunk = [0; 4096];
    loop {
        let length = from.read(&mut chunk)?;
        if length == 0 {
            return Ok(());
        }
        stdout().write_all(&chunk[..length])?;
        stdout().flush()?;
    }
}

fn down(pid: Option<u32>) -> Result<()> {
    let record = only(pid)?;
    kill(Pid::from_raw(i32::try_from(record.pid)?), Signal::SIGTERM)
        .with_context(|| format!("cannot end process {}", record.pid))?;
    let start = Instant::now();
    while living()?.iter().any(|other| other.pid == record.pid) {
        if start.elapsed() > Duration::from_secs(30) {
            bail!("process {} has not ended its lab after 30 s", record.pid);
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// The one lab that `lab up` has raised, or that of a process.
fn only(pid: Option<u32>) -> Result<Record> {
    let mut records = living()?;
    records.retain(|record| pid.map_or(record.by_hand, |pid| record.pid == pid));
    match (records.pop(), records.pop()) {
        (Some(record), None) => Ok(record),
        (None, _) => match living()?.first() {
            Some(other) => bail!("process {} has a lab for itself; to look into it, say --pid", other.pid),
            None => bail!("no lab is up: `cargo xtask lab up` raises it"),
        },
        (Some(one), Some(other)) => {
            bail!("more than one lab is up (processes {} and {} hold them): say --pid", one.pid, other.pid)
        }
    }
}
