//! A raised lab: two running hosts, and everything that one does with them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::clock::{self, Skew};
use super::dom0::Images;
use super::frozen;
use super::link::{self, LinkBytes};
use super::machine::Machine;
use super::qemu::{Config, Qemu, SshPorts, free_port, make_overlay};
use super::run_dir::{Record, RunDir};
use super::storage::{self, FailingDisk};
use super::{Flavour, GuestSize, Host, debian, guest_disk};
use crate::ending::{forget_process, register_process};
use crate::setup;
use crate::step::{run, step};

/// How long a host may take from its start to a shell.
const BOOT: Duration = Duration::from_secs(1200);

/// How long a short command may take.
const SHORT: Duration = Duration::from_secs(60);

/// How a lab is wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Build and freeze it anew even if the cache has one.
    pub rebuild: bool,
    /// What kind of lab.
    pub flavour: Flavour,
    /// The guest's size.
    pub guest: GuestSize,
}

/// Two hosts with a guest. Ended, with nothing left of it, when dropped.
pub struct Lab {
    // Dropped in this order: QEMUs first, then the directories that they use.
    source: Running,
    target: Running,
    run_dir: RunDir,
    flavour: Flavour,
}

/// A QEMU that is known to the handler of signals.
struct Running(Qemu);

impl Drop for Running {
    fn drop(&mut self) {
        // Dropping the QEMU inside reaps it; until then its number is its own.
        forget_process(self.0.pid());
    }
}

impl Lab {
    /// Resumes the frozen lab whose guest has a warm buffer pool; builds and freezes it first if the cache has none. The clocks of all
    /// three machines are set to this machine's. The calling thread must live as long as the lab.
    ///
    /// # Errors
    /// When something is missing and cannot be installed, when this is not run by root and something has to be built, or a machine does not
    /// come up.
    pub fn warm(options: &Options) -> Result<Self> {
        setup::ensure()?;
        let frozen = frozen::get(options.rebuild, options.flavour, options.guest)?;
        let lab = step("resuming the warmed lab", || Self::resume(&frozen))?;
        let skew = step("setting the clocks", || lab.set_clocks())?;
        eprintln!(
            "  clocks are ahead of this machine's: source {:+.0} ms, target {:+.0} ms, guest {:+.0} ms",
            skew.source * 1e3,
            skew.target * 1e3,
            skew.guest * 1e3
        );
        Ok(lab)
    }

    /// Boots two hosts without a guest.
    pub(super) fn boot(images: &Images, flavour: Flavour, disk: &Path) -> Result<Self> {
        let run_dir = RunDir::make()?;
        copy(disk, &run_dir.disks().join("shared.raw"))?;
        for host in Host::BOTH {
            make_overlay(&images.disk(), &run_dir.disks().join(format!("{}.qcow2", host.name())))?;
        }
        let mut lab = Self::start(images, flavour, run_dir, false)?;
        for host in Host::BOTH {
            lab.wait_for_shell(host)?;
        }
        Ok(lab)
    }

    fn resume(frozen: &frozen::Frozen) -> Result<Self> {
        let run_dir = RunDir::make()?;
        for name in frozen::DISKS {
            copy(&frozen.dir().join(name), &run_dir.disks().join(name))?;
        }
        let lab = Self::start(frozen.images(), frozen.flavour(), run_dir, true)?;
        thread::scope(|scope| {
            let loading = Host::BOTH.map(|host| {
                let (lab, state) = (&lab, frozen.dir().join(host.state_file()));
                scope.spawn(move || lab.qemu(host).monitor()?.load_state(&state))
            });
            loading.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("the thread that reads a state panicked"),
            })
        })?;
        for host in Host::BOTH {
            lab.qemu(host).monitor()?.execute("cont", &json!({}))?;
        }
        if lab.flavour.is_frozen_paused() {
            lab.host(Host::Source).must("xl unpause db1", SHORT)?;
        }
        lab.announce(false)?;
        Ok(lab)
    }

    /// Lets other processes of this user find it, and tells them whether it is there for a person to use. One that is only being built
    /// is nobody's business.
    pub(super) fn announce(&self, by_hand: bool) -> Result<()> {
        let ports = |of: fn(&Config) -> u16| Host::BOTH.map(|host| of(self.qemu(host).config())).to_vec();
        self.run_dir.record(&Record {
            pid: std::process::id(),
            by_hand,
            sockets: self.run_dir.sockets().to_owned(),
            dom0_ports: ports(|config| config.dom0_port),
            guest_ports: ports(|config| config.guest_port),
        })
    }

    fn start(images: &Images, flavour: Flavour, run_dir: RunDir, resume: bool) -> Result<Self> {
        let try_start = |host: Host| -> Result<Running> {
            let qemu = Qemu::start(Config {
                host,
                images: images.clone(),
                overlay: run_dir.disks().join(format!("{}.qcow2", host.name())),
                shared: run_dir.disks().join("shared.raw"),
                sockets: run_dir.sockets().to_owned(),
                logs: run_dir.disks().to_owned(),
                dom0_port: free_port()?,
                guest_port: free_port()?,
                ssh: flavour
                    .is_whole()
                    .then(|| anyhow::Ok(SshPorts { dom0: free_port()?, guest: free_port()? }))
                    .transpose()?,
                resume,
            })?;
            let running = Running(qemu);
            register_process(running.0.pid())?;
            Ok(running)
        };
        // Between asking for a free port and QEMU's taking it, somebody else may have taken it.
        let start = |host: Host| {
            let lost_a_port = |error: &anyhow::Error| format!("{error:#}").contains("host forwarding rule");
            (0..4).fold(try_start(host), |started, _| match started {
                Err(error) if lost_a_port(&error) => try_start(host),
                done => done,
            })
        };
        let source = start(Host::Source)?;
        let target = start(Host::Target)?;
        Ok(Self { source, target, run_dir, flavour })
    }

    fn wait_for_shell(&mut self, host: Host) -> Result<()> {
        let start = Instant::now();
        let machine = self.host(host);
        loop {
            match host {
                Host::Source => self.source.0.check()?,
                Host::Target => self.target.0.check()?,
            }
            let log = fs::read(self.qemu(host).config().console_log()).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            if let Some(line) =
                log.lines().find(|line| line.contains("LAB-FAILED") || line.contains("Panic on CPU"))
            {
                bail!("{} does not come up: {line}\n{}", host.name(), self.qemu(host).console_tail());
            }
            if log.contains("LAB-READY") {
                return machine.run(":", SHORT).map(drop);
            }
            if start.elapsed() > BOOT {
                bail!(
                    "{} is not up after {} s\n{}",
                    host.name(),
                    BOOT.as_secs(),
                    self.qemu(host).console_tail()
                );
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    pub(super) fn qemu(&self, host: Host) -> &Qemu {
        match host {
            Host::Source => &self.source.0,
            Host::Target => &self.target.0,
        }
    }

    /// Fails when a host has ended.
    ///
    /// # Errors
    /// With the last words of its QEMU and its console.
    pub fn check(&mut self) -> Result<()> {
        self.source.0.check()?;
        self.target.0.check()
    }

    /// Ends the QEMUs and leaves the disks for [`frozen`] to take.
    pub(super) fn into_disks(self) -> RunDir {
        let Self { source, target, run_dir, .. } = self;
        drop((source, target));
        run_dir
    }

    /// Ends the lab, and has each machine's dpkg compare the packages' files on the disks that it leaves with what they were when they were
    /// installed; what it says now and did not say of the images.
    ///
    /// # Errors
    /// When a disk cannot be read.
    pub fn end_and_verify(mut self) -> Result<Vec<String>> {
        for machine in [self.guest(), self.host(Host::Source), self.host(Host::Target)] {
            machine.must("sync", SHORT)?;
        }
        self.source.0.quit()?;
        self.target.0.quit()?;
        let run_dir = self.into_disks();
        let mut found = debian::verify(&run_dir.disks().join("shared.raw"), "guest")?;
        for host in Host::BOTH {
            let raw = run_dir.disks().join("verified.raw");
            let overlay = run_dir.disks().join(format!("{}.qcow2", host.name()));
            run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(overlay).arg(&raw))?;
            found.extend(debian::verify(&raw, host.name())?);
        }
        Ok(found)
    }

    /// A host's dom0.
    pub fn host(&self, host: Host) -> Machine {
        let config = self.qemu(host).config();
        Machine::new(host.name(), vec![config.dom0_port], Some(config.console_log()))
    }

    /// The guest, at whichever host it is when it is asked.
    pub fn guest(&self) -> Machine {
        let ports = Host::BOTH.map(|host| self.qemu(host).config().guest_port);
        Machine::new("guest", ports.to_vec(), None)
    }

    /// ssh's configuration by which this machine reaches the hosts as `host-a` and `host-b`, and as `db1` the guest while it is on the
    /// source; only where they have an sshd.
    ///
    /// # Errors
    /// When they have none, or there is no key.
    pub fn ssh_configuration(&self) -> Result<String> {
        let login = debian::login()?;
        let mut words = String::new();
        let ports = |host| self.qemu(host).config().ssh.context("the machines of this lab have no sshd");
        for (name, port) in [
            (Host::Source.alias(), ports(Host::Source)?.dom0),
            (Host::Target.alias(), ports(Host::Target)?.dom0),
            ("db1", ports(Host::Source)?.guest),
        ] {
            words += &format!("Host {name}\n  HostName 127.0.0.1\n  Port {port}\n");
        }
        words += &format!(
            "Host *\n  HostKeyAlias lab\n  IdentityFile {}\n  IdentitiesOnly yes\n  UserKnownHostsFile {}\n  \
             GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n",
            login.key.display(),
            login.known_hosts.display()
        );
        Ok(words)
    }

    /// Where the guest is now.
    ///
    /// # Errors
    /// When no host runs it, or both do.
    pub fn guest_host(&self) -> Result<Host> {
        let mut found = Vec::new();
        for host in Host::BOTH {
            if self.host(host).run("xl domid db1", SHORT)?.status == 0 {
                found.push(host);
            }
        }
        match found[..] {
            [host] => Ok(host),
            _ => bail!("the guest runs on {} of the two hosts", found.len()),
        }
    }

    /// Limits what either host sends over the link between them; `None` is as fast as emulation does.
    ///
    /// # Errors
    /// When `tc` refuses.
    pub fn set_link_rate(&self, bits_per_second: Option<u64>) -> Result<()> {
        Host::BOTH.iter().try_for_each(|host| link::set_rate(&self.host(*host), bits_per_second))
    }

    /// What went over the link up to now.
    ///
    /// # Errors
    /// When the source does not answer.
    pub fn link_bytes(&self) -> Result<LinkBytes> {
        link::bytes(&self.host(Host::Source))
    }

    /// Limits what a host reads from the shared disk in a second; `None` is as fast as emulation does.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn set_disk_rate(&self, host: Host, bytes_per_second: Option<u64>) -> Result<()> {
        storage::set_rate(&mut self.qemu(host).monitor()?, bytes_per_second)
    }

    /// What a host reads from the shared disk in a second, measured now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn disk_rate(&self, host: Host) -> Result<u64> {
        storage::read_rate(&self.host(host))
    }

    /// From now on every read of the shared disk fails in this host, with EIO.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn fail_disk(&self, host: Host) -> Result<FailingDisk> {
        storage::fail_reads(&mut self.qemu(host).monitor()?)
    }

    /// The host's shared disk is well again.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn heal_disk(&self, host: Host, disk: &FailingDisk) -> Result<()> {
        storage::heal(&mut self.qemu(host).monitor()?, disk)
    }

    /// What kind of lab it is.
    pub(super) fn flavour(&self) -> Flavour {
        self.flavour
    }

    /// Sets the clocks of both hosts and the guest to this machine's, and says how far they are ahead of it afterwards.
    ///
    /// # Errors
    /// When one of them cannot be set to within 50 ms.
    pub fn set_clocks(&self) -> Result<Skew> {
        Ok(Skew {
            source: clock::set(&self.host(Host::Source)).context("clock of the source")?,
            target: clock::set(&self.host(Host::Target)).context("clock of the target")?,
            guest: clock::set(&self.guest()).context("clock of the guest")?,
        })
    }

    /// All that the hypervisor of a host said.
    ///
    /// # Errors
    /// When `xl` fails.
    pub fn xl_dmesg(&self, host: Host) -> Result<String> {
        self.host(host).must("xl dmesg", SHORT)
    }

    /// Whether the hypervisor of either host has ended the guest by a triple fault, as it says on its console.
    pub fn guest_faulted(&self) -> bool {
        Host::BOTH.iter().any(|host| {
            let console = fs::read(self.qemu(*host).config().console_log()).unwrap_or_default();
            String::from_utf8_lossy(&console).contains("Triple fault")
        })
    }

    /// For a person: how to reach everything.
    pub fn describe(&self) -> String {
        let mut words = String::from("The lab is up.\n");
        for host in Host::BOTH {
            let config = self.qemu(host).config();
            words += &format!(
                "  {:6}  shell: cargo xtask lab run {} CMD, or TCP 127.0.0.1:{}  {} on the link  console: {}\n",
                host.name(),
                host.name(),
                config.dom0_port,
                host.address(),
                config.console_log().display()
            );
        }
        words += &format!(
            "  guest   shell: cargo xtask lab run guest CMD; disk {}\n",
            self.run_dir.disks().join("shared.raw").display()
        );
        words += &format!("  tables  sbtest.sbtest1 to sbtest{}", guest_disk::TABLES);
        words
    }
}

/// Copies an image, holes as holes, sharing blocks where the file system can.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to)).map(drop)
}
