//! One emulated host: how QEMU is started for it, and the running QEMU.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::Host;
use super::dom0::Images;
use super::qmp::Monitor;
use crate::step::run;

/// The emulator.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";

/// Memory of a host in MiB: dom0's, the guest's, and what Xen needs for itself.
const MEMORY_MIB: u32 = 2304;

/// Memory of dom0 in MiB: the window of pages that wait to be accepted is 256 MiB.
const DOM0_MIB: u32 = 1024;

/// Where a host's dom0 listens for shells, and the guest behind its bridge.
const SHELL_PORT: u16 = 7000;

/// Where systems that have an sshd have it.
const SSH_PORT: u16 = 22;

/// The guest's address, in the network that QEMU gives each host for its guests.
const GUEST_ADDRESS: &str = "10.3.0.16";

/// Everything that differs between two starts of a host. What is not here is the same each time: a frozen state fits only the
/// machine that it was taken from.
#[derive(Debug)]
pub(super) struct Config {
    /// Which of the two.
    pub(super) host: Host,
    /// What it boots.
    pub(super) images: Images,
    /// dom0's disk, an overlay of this run.
    pub(super) overlay: PathBuf,
    /// The disk that both hosts see, raw.
    pub(super) shared: PathBuf,
    /// Directory for sockets: short, for a unix socket's path may have 107 bytes.
    pub(super) sockets: PathBuf,
    /// Directory for the console's log.
    pub(super) logs: PathBuf,
    /// Port of this machine that leads to a shell in dom0.
    pub(super) dom0_port: u16,
    /// Port of this machine that leads to a shell in the guest, while it is on this host.
    pub(super) guest_port: u16,
    /// Ports of this machine that lead to the sshds, where there are any.
    pub(super) ssh: Option<SshPorts>,
    /// Whether a frozen state is to be read before it runs.
    pub(super) resume: bool,
}

/// Ports of this machine that lead to sshds.
#[derive(Clone, Copy, Debug)]
pub(super) struct SshPorts {
    /// dom0's.
    pub(super) dom0: u16,
    /// The guest's, while it is on this host.
    pub(super) guest: u16,
}

impl Config {
    /// One that is not to be started: for what all starts of a host have in common.
    pub(super) fn of_no_run(host: Host, images: &Images) -> Self {
        let nowhere = PathBuf::new();
        Self {
            host,
            images: images.clone(),
            overlay: nowhere.clone(),
            shared: nowhere.clone(),
            sockets: nowhere.clone(),
            logs: nowhere,
            dom0_port: 0,
            guest_port: 0,
            ssh: None,
            resume: false,
        }
    }

    /// The monitor's socket.
    pub(super) fn monitor(&self) -> PathBuf {
        self.sockets.join(format!("{}.monitor", self.host.name()))
    }

    /// The socket of the serial console.
    pub(super) fn console(&self) -> PathBuf {
        self.sockets.join(format!("{}.console", self.host.name()))
    }

    /// All that the serial console said.
    pub(super) fn console_log(&self) -> PathBuf {
        self.logs.join(format!("{}.console.log", self.host.name()))
    }

    fn words(&self) -> PathBuf {
        self.logs.join(format!("{}.qemu.log", self.host.name()))
    }

    /// QEMU's arguments.
    pub(super) fn arguments(&self) -> Vec<String> {
        let (name, other) = (self.host.name(), self.host.other().name());
        let number = self.host.number();
        let sockets = self.sockets.display();
        let linux = format!(
            "{} console=hvc0 net.ifnames=0 mitigations=off quiet labroot=/dev/vda labinit=/lab/init labip={}",
            self.images.kernel().display(),
            self.host.address()
        );
        let mut arguments = vec!["-name".to_owned(), format!("poolskip-{name}")];
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        add("-machine", "q35".into());
        add("-accel", "tcg,thread=multi,tb-size=1024".into());
        // RDTSCP: hardware-assisted guests die of it under emulation. ERMS and its kin: what is told that the processor copies fast by
        // `rep movsb` copies that way, and under emulation that is a loop of its own for each byte.
        add("-cpu", "max,-rdtscp,-erms,-fsrm,-fzrm,-fsrs,-fsrc".into());
        add("-m", format!("{MEMORY_MIB}M"));
        add("-smp", "2".into());
        add("-display", "none".into());
        add("-kernel", self.images.hypervisor().display().to_string());
        // eager-fpu: with lazily switched FPU state, vector registers of dom0's processes get corrupted under emulation.
        add(
            "-append",
            format!(
                "dom0_mem={DOM0_MIB}M,max:{DOM0_MIB}M dom0_max_vcpus=2 console=com1 com1=115200,8n1 bootscrub=0 \
                 spec-ctrl=no,eager-fpu=1 loglvl=warning guest_loglvl=warning"
            ),
        );
        add("-initrd", format!("{linux},{}", self.images.initramfs().display()));
        add("-drive", format!("file={},format=qcow2,if=none,id=d0,cache=unsafe", self.overlay.display()));
        add("-device", "virtio-blk-pci,drive=d0".into());
        // Both hosts have this one open at once, past this machine's page cache, as hosts share a disk of a storage network.
        add(
            "-drive",
            format!("file={},format=raw,if=none,id=d1,cache=none,file.locking=off", self.shared.display()),
        );
        add("-device", "virtio-blk-pci,drive=d1".into());
        let (mut to_dom0, mut to_guest) = (String::new(), String::new());
        if let Some(SshPorts { dom0, guest }) = self.ssh {
            to_dom0 = format!(",hostfwd=tcp:127.0.0.1:{dom0}-:{SSH_PORT}");
            to_guest = format!(",hostfwd=tcp:127.0.0.1:{guest}-{GUEST_ADDRESS}:{SSH_PORT}");
        }
        add("-netdev", format!("user,id=n0,hostfwd=tcp:127.0.0.1:{}-:{SHELL_PORT}{to_dom0}", self.dom0_port));
        add("-device", format!("virtio-net-pci,netdev=n0,romfile=,mac=52:54:00:00:00:0{number}"));
        add(
            "-netdev",
            format!(
                "dgram,id=n1,local.type=unix,local.path={sockets}/{name}.link,\
                 remote.type=unix,remote.path={sockets}/{other}.link"
            ),
        );
        add("-device", format!("virtio-net-pci,netdev=n1,romfile=,mac=52:54:00:00:01:0{number}"));
        add(
            "-netdev",
            format!(
                "user,id=n2,net=10.3.0.0/24,host=10.3.0.2,hostfwd=tcp:127.0.0.1:{}-{GUEST_ADDRESS}:{SHELL_PORT}{to_guest}",
                self.guest_port
            ),
        );
        add("-device", format!("virtio-net-pci,netdev=n2,romfile=,mac=52:54:00:00:02:0{number}"));
        add(
            "-chardev",
            format!(
                "socket,id=c0,path={},server=on,wait=off,logfile={}",
                self.console().display(),
                self.console_log().display()
            ),
        );
        add("-serial", "chardev:c0".into());
        add("-qmp", format!("unix:{},server=on,wait=off", self.monitor().display()));
        arguments.extend(["-nodefaults".to_owned(), "-no-reboot".to_owned()]);
        if self.resume {
            arguments.extend(["-S".to_owned(), "-incoming".to_owned(), "defer".to_owned()]);
        }
        arguments
    }
}

/// A running QEMU, killed when dropped, and by the kernel when this process dies without a chance to do it.
pub(super) struct Qemu {
    child: Child,
    config: Config,
}

impl Qemu {
    /// Starts it. The calling thread must live as long as the machine shall: QEMU dies with it.
    ///
    /// # Errors
    /// When it cannot be started or ends at once, with its words.
    pub(super) fn start(config: Config) -> Result<Self> {
        // One that lost the race for a port has left its own behind.
        match fs::remove_file(config.monitor()) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let words = File::create(config.words())?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", PROGRAM])
            .args(config.arguments())
            .stdin(Stdio::null())
            .stdout(words.try_clone()?)
            .stderr(words)
            // A Ctrl-C at the terminal is for us; we end QEMU.
            .process_group(0)
            .spawn()
            .context("cannot start setpriv (of util-linux)")?;
        let mut qemu = Self { child, config };
        let start = Instant::now();
        while !qemu.config.monitor().exists() {
            qemu.check()?;
            if start.elapsed() > Duration::from_secs(30) {
                bail!("QEMU of {} made no monitor in 30 s", qemu.config.host.name());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(qemu)
    }

    /// Fails when it has ended.
    ///
    /// # Errors
    /// With its words and the console's last.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let words = fs::read_to_string(self.config.words()).unwrap_or_default();
            bail!(
                "QEMU of {} ended with {status}:\n{words}\n{}",
                self.config.host.name(),
                self.console_tail()
            );
        }
        Ok(())
    }

    /// Ends it in such a way that its images are whole.
    ///
    /// # Errors
    /// When its monitor does not answer, or it does not end.
    pub(super) fn quit(&mut self) -> Result<()> {
        self.monitor()?.execute("quit", &json!({}))?;
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            if start.elapsed() > Duration::from_secs(60) {
                bail!("QEMU of {} does not end", self.config.host.name());
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// A connection to its monitor: one at a time.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.config.monitor())
    }

    /// What it was started with.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The last lines of its console, for messages.
    pub(super) fn console_tail(&self) -> String {
        let log = fs::read(self.config.console_log()).unwrap_or_default();
        let tail = log.len().saturating_sub(3000);
        format!("console of {}: …{}", self.config.host.name(), String::from_utf8_lossy(&log[tail..]))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes the overlay that a host writes to.
///
/// # Errors
/// When qemu-img fails.
pub(super) fn make_overlay(base: &Path, overlay: &Path) -> Result<()> {
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(base)
        .arg(overlay))?;
    Ok(())
}

/// The emulator's version line: a frozen state belongs to it.
///
/// # Errors
/// When QEMU is not there, or is too old to keep a state in a file.
pub(super) fn version() -> Result<String> {
    let words = run(Command::new(PROGRAM).arg("--version"))?;
    let words = String::from_utf8_lossy(&words);
    let line = words.lines().next().unwrap_or_default();
    match parse_version(line) {
        Some(version) if version >= (8, 2) => Ok(line.to_owned()),
        _ => bail!(
            "the lab needs QEMU 8.2 or newer, this is {line:?}: `cargo xtask setup` installs Debian's backport"
        ),
    }
}

fn parse_version(line: &str) -> Option<(u32, u32)> {
    let numbers = line.strip_prefix("QEMU emulator version ")?;
    let mut parts = numbers.split(['.', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// A TCP port of the loopback that nobody listens on now.
///
/// # Errors
/// When there is none.
pub(super) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on the loopback")?;
    Ok(listener.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(host: Host) -> Config {
        let images = Images::in_directory("/images".into());
        let run = PathBuf::from("/run/1");
        Config {
            overlay: run.join("a.qcow2"),
            shared: run.join("shared.raw"),
            sockets: "/s".into(),
            logs: run,
            dom0_port: 1001,
            guest_port: 1002,
            ..Config::of_no_run(host, &images)
        }
    }

    fn values(arguments: &[String], option: &str) -> Vec<String> {
        arguments.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].clone()).collect()
    }

    #[test]
    fn the_two_ends_of_the_link_name_each_other() {
        let link = |host| {
            values(&config(host).arguments(), "-netdev")
                .into_iter()
                .find(|value| value.starts_with("dgram"))
                .unwrap()
        };
        assert!(
            link(Host::Source)
                .contains("local.path=/s/source.link,remote.type=unix,remote.path=/s/target.link")
        );
        assert!(
            link(Host::Target)
                .contains("local.path=/s/target.link,remote.type=unix,remote.path=/s/source.link")
        );
    }

    #[test]
    fn the_shared_disk_is_read_past_the_page_cache_and_unlocked() {
        let drives = values(&config(Host::Target).arguments(), "-drive");
        assert!(
            drives[1].contains("file=/run/1/shared.raw") && drives[1].contains("cache=none,file.locking=off")
        );
    }

    #[test]
    fn a_resumed_machine_is_the_same_machine_and_waits_for_its_state() {
        let booted = config(Host::Source).arguments();
        let resumed = Config { resume: true, ..config(Host::Source) }.arguments();
        assert_eq!(resumed[..booted.len()], booted);
        assert_eq!(resumed[booted.len()..], ["-S", "-incoming", "defer"]);
    }

    #[test]
    fn sshds_are_reached_only_where_there_are_some() {
        assert!(!config(Host::Source).arguments().join(" ").contains("-:22"));
        let ssh = Some(SshPorts { dom0: 1003, guest: 1004 });
        let networks = values(&Config { ssh, ..config(Host::Source) }.arguments(), "-netdev").join(" ");
        assert!(networks.contains(",hostfwd=tcp:127.0.0.1:1003-:22 "), "{networks}");
        assert!(networks.contains(",hostfwd=tcp:127.0.0.1:1004-10.3.0.16:22"), "{networks}");
    }

    #[test]
    fn machines_differ_in_their_addresses() {
        let devices = |host| values(&config(host).arguments(), "-device").join(" ");
        assert!(devices(Host::Source).contains("mac=52:54:00:00:01:01"));
        assert!(devices(Host::Target).contains("mac=52:54:00:00:01:02"));
        assert!(values(&config(Host::Target).arguments(), "-initrd")[0].contains("labip=10.9.0.2"));
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2)"), Some((10, 0)));
        assert!(parse_version("QEMU emulator version 10.0.2") > parse_version("QEMU emulator version 8.2.0"));
        assert_eq!(parse_version("something else"), None);
    }

    #[test]
    fn free_ports_are_free_and_differ_while_held() {
        let first = free_port().unwrap();
        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, first)).unwrap();
        assert_ne!(free_port().unwrap(), first);
        drop(held);
    }
}
