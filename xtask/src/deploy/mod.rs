//! `cargo xtask deploy`: Poolskip on a guest and its hosts, over ssh, from nothing and back to nothing.
//!
//! First each machine is looked at, and the plan shown; only when nothing stands in the way on any of them is anything changed on one.
//! Machines are then done one after the other, the hosts first. A step that fails ends it, with what was done and what was not; calling it
//! again goes on from there, since each step looks at what is, not at what was done before.

mod facts;
mod plan;
mod ssh;
pub mod trial;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::deployment::target_directory;
use crate::package::contents::Role;
use crate::package::{self, Made, Programs};
use crate::step::step;
use facts::Facts;
use plan::Step;
use ssh::{Machine, SshError};

/// Install Poolskip on a guest and its hosts over ssh, or remove it.
#[derive(clap::Args)]
pub struct Args {
    /// A guest that runs mysqld: USER@HOST, or ssh://USER@HOST:PORT
    #[arg(long, value_name = "HOST")]
    guest: Vec<String>,
    /// A Xen host; give each of them
    #[arg(long, value_name = "HOST")]
    dom0: Vec<String>,
    /// Show the plan and stop
    #[arg(long)]
    dry_run: bool,
    /// Remove it from these machines, without a trace
    #[arg(long)]
    remove: bool,
    /// Packages that were made before, in place of new ones
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "remove")]
    packages: Option<PathBuf>,
    /// An option for ssh, as in --ssh-option=-oPort=2222; may be given again
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    ssh_option: Vec<String>,
}

/// Deploys or removes.
///
/// # Errors
/// What stands in the way, or what failed and where.
pub fn run(args: &Args) -> Result<()> {
    ensure!(!args.guest.is_empty() || !args.dom0.is_empty(), "name a machine: --guest HOST, --dom0 HOST");
    let made = if args.remove {
        None
    } else {
        Some(match &args.packages {
            Some(directory) => Made::find(directory)?,
            None => {
                crate::setup::ensure()?;
                let programs = Programs::build()?;
                package::make(&programs, &target_directory()?.join("package"), package::epoch()?)?
            }
        })
    };
    let mut deploy = Deploy::look(machines(args), made.as_ref())?;
    deploy.show();
    deploy.check()?;
    if args.dry_run {
        println!("\nThis was the plan; nothing was changed.");
        return Ok(());
    }
    deploy.carry_out()?;
    deploy.verify()
}

/// All machines, the hosts first.
fn machines(args: &Args) -> Vec<(Role, Machine)> {
    let of = |role, names: &[String]| -> Vec<(Role, Machine)> {
        names.iter().map(|name| (role, Machine::new(name, &args.ssh_option))).collect()
    };
    [of(Role::Dom0, &args.dom0), of(Role::Guest, &args.guest)].concat()
}

/// A machine, and what is to be done on it.
struct Job {
    role: Role,
    machine: Machine,
    facts: Facts,
    obstacles: Vec<String>,
    steps: Vec<Step>,
    done: usize,
}

/// All of it.
struct Deploy<'a> {
    jobs: Vec<Job>,
    made: Option<&'a Made>,
}

impl<'a> Deploy<'a> {
    /// Looks at each machine. One that cannot be looked at is an obstacle like another: all are named at once.
    fn look(machines: Vec<(Role, Machine)>, made: Option<&'a Made>) -> Result<Self> {
        let mut jobs = Vec::new();
        for (role, machine) in machines {
            let looked = step(&format!("looking at {}", machine.destination), || {
                Ok(machine
                    .run(facts::SCRIPT, &[])
                    .map_err(anyhow::Error::from)
                    .and_then(|text| Facts::parse(&text)))
            })?;
            let (facts, obstacles, steps) = match looked {
                Err(error) => (Facts::default(), vec![format!("{error:#}")], Vec::new()),
                Ok(facts) => match made {
                    Some(made) => {
                        let bytes = fs::read(made.deb(role))?;
                        let hash = crate::cache::sha256(&bytes);
                        let steps = plan::install(role, &facts, &hash, bytes.len() as u64);
                        (facts.clone(), facts.obstacles(role), steps)
                    }
                    None => (facts.clone(), facts.obstacles_to_anything(), plan::remove(role, &facts)),
                },
            };
            jobs.push(Job { role, machine, facts, obstacles, steps, done: 0 });
        }
        Ok(Self { jobs, made })
    }

    fn show(&self) {
        for job in &self.jobs {
            println!("{} ({})", job.machine.destination, job.role.name());
            for obstacle in &job.obstacles {
                println!("  ✗ {obstacle}");
            }
            if !job.obstacles.is_empty() {
                continue;
            }
            for step in &job.steps {
                println!("  - {}", step.words(job.role));
            }
            if job.steps.is_empty() {
                println!("  nothing to do");
            }
            if job.role == Role::Guest && self.made.is_some() {
                match job.facts.mysqld.len() {
                    0 => println!("  no mysqld runs there now: the probe will find it when it does"),
                    1 => println!("  its mysqld goes on as it is"),
                    more => println!("  its {more} servers go on as they are"),
                }
            }
        }
    }

    fn check(&self) -> Result<()> {
        let names: Vec<&str> = self
            .jobs
            .iter()
            .filter(|job| !job.obstacles.is_empty())
            .map(|job| job.machine.destination.as_str())
            .collect();
        ensure!(names.is_empty(), "nothing was changed on any machine; see ✗ above for {}", names.join(", "));
        Ok(())
    }

    fn carry_out(&mut self) -> Result<()> {
        // Whose authority signs: the first host's.
        let signer = self.jobs.iter().find(|job| job.role == Role::Dom0).map(|job| job.machine.clone());
        for at in 0..self.jobs.len() {
            let job = &self.jobs[at];
            let (role, machine, steps) = (job.role, job.machine.clone(), job.steps.clone());
            for one in steps {
                let name = format!("{}: {}", machine.destination, one.words(role));
                let result = step(&name, || Ok(self.act(role, &machine, signer.as_ref(), &one)))?;
                if let Err(error) = result {
                    println!("{}", self.so_far(at, &one));
                    bail!(
                        "{}: could not {}: {error:#}\nIt is safe to call this again: it goes on from here.",
                        machine.destination,
                        one.words(role)
                    );
                }
                self.jobs[at].done += 1;
            }
        }
        Ok(())
    }

    /// What was done and what was not.
    fn so_far(&self, failed_at: usize, failed: &Step) -> String {
        let mut words = String::new();
        for (at, job) in self.jobs.iter().enumerate() {
            words.push_str(&format!("{} ({})\n", job.machine.destination, job.role.name()));
            for (number, step) in job.steps.iter().enumerate() {
                let state = if number < job.done {
                    "done"
                } else if at == failed_at && step == failed {
                    "FAILED"
                } else {
                    "not done"
                };
                words.push_str(&format!("  {state:>8}  {}\n", step.words(job.role)));
            }
        }
        words
    }

    fn act(&self, role: Role, machine: &Machine, signer: Option<&Machine>, step: &Step) -> Result<()> {
        let package = role.package();
        match step {
            Step::Copy { .. } => {
                let made = self.made.context("nothing was built")?;
                machine.put(made.deb(role), &format!("/var/lib/poolskip-deploy/{package}.deb"))?;
            }
            Step::Install { headers } => {
                machine.run(
                    include_str!("files/install.sh"),
                    &[package, headers.as_deref().unwrap_or_default()],
                )?;
            }
            Step::Certificate => {
                let signer = signer.context("a host is needed that signs")?;
                certify(machine, signer)?;
            }
            Step::Listen => {
                machine.run("set -e; systemctl enable --now poolskip-receive.socket", &[])?;
            }
            Step::EnableXl => {
                machine.run("dom0-migrator enable xl", &[])?;
            }
            Step::Remove => {
                machine.run(include_str!("files/remove.sh"), &[package])?;
            }
        }
        Ok(())
    }

    /// Looks again: mysqld is the same process as before, and `doctor` has nothing to say. After a removal: nothing is left.
    fn verify(&self) -> Result<()> {
        let mut wrong = Vec::new();
        println!();
        for job in &self.jobs {
            let destination = &job.machine.destination;
            let facts =
                Facts::parse(&job.machine.run(facts::SCRIPT, &[]).with_context(|| destination.clone())?)?;
            let gone: Vec<&String> = job.facts.mysqld.difference(&facts.mysqld).collect();
            let of_guest = job.role == Role::Guest && !job.facts.mysqld.is_empty();
            if !gone.is_empty() {
                wrong.push(format!(
                    "{destination}: mysqld, process {gone:?} (number@beginning), is not there any more"
                ));
            } else if of_guest {
                println!("{destination}: mysqld is the same process as before");
            }
            if self.made.is_none() {
                if facts.installed(job.role) != facts::Installed::No || facts.has_record() {
                    wrong.push(format!("{destination}: something of {} is left", job.role.package()));
                } else {
                    println!("{destination}: nothing of Poolskip is left");
                }
                continue;
            }
            match self.doctor(job) {
                Ok(words) => println!("{destination}: {words}"),
                Err(error) => wrong.push(format!("{destination}: {error}")),
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        bail!("all steps were done, and yet:\n{}", wrong.join("\n"))
    }

    /// What a machine's own `doctor` says; a host's of each other host too.
    fn doctor(&self, job: &Job) -> Result<String, SshError> {
        match job.role {
            // Where no mysqld runs there is nothing to look at.
            Role::Guest if job.facts.mysqld.is_empty() => job
                .machine
                .run("guest-probe --version", &[])
                .map(|version| format!("{} is there", version.trim())),
            Role::Guest => {
                job.machine.run("guest-probe doctor", &[]).map(|_| "guest-probe doctor: usable".to_owned())
            }
            Role::Dom0 => {
                let others = self
                    .jobs
                    .iter()
                    .filter(|other| {
                        other.role == Role::Dom0 && other.machine.destination != job.machine.destination
                    })
                    .map(|other| other.machine.host());
                let mut looked = Vec::new();
                for other in others {
                    job.machine.run("exec dom0-migrator doctor --no-link \"$1\"", &[other])?;
                    looked.push(other.to_owned());
                }
                if looked.is_empty() {
                    job.machine.run("exec dom0-migrator doctor", &[])?;
                }
                Ok(format!("dom0-migrator doctor: ready {}", looked.join(", ")))
            }
        }
    }
}

/// Gives a host a certificate: its request goes to the host whose authority signs, the answer back, all through here.
fn certify(machine: &Machine, signer: &Machine) -> Result<()> {
    let requested =
        machine.pipe("dom0-migrator certificates request", b"").context("a request for a certificate")?;
    let host = machine.host();
    let granted = signer
        .pipe(&format!("dom0-migrator certificates grant {host}"), requested.as_bytes())
        .with_context(|| format!("{} was to sign it", signer.destination))?;
    // `null` where it has one of this authority: then the request is forgotten.
    machine.pipe("dom0-migrator certificates accept", granted.as_bytes()).context("the certificate")?;
    Ok(())
}

impl Made {
    /// A role's package.
    fn deb(&self, role: Role) -> &Path {
        let [guest, dom0] = &self.debs;
        if role == Role::Guest { guest } else { dom0 }
    }
}
