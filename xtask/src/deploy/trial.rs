//! `deploy` tried against real sshd: three Debian systems in directories, each with processes and packages of its own, on this machine's
//! loopback. What they lack is Xen and a real mysqld, so `doctor` has something to say in the end; everything before it is as it is
//! anywhere. (A kernel of Debian's, whose headers are there, is what `uname` tells them.)

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Args, ssh};
use crate::debian_root;
use crate::package::Made;
use crate::step::{run as run_program, step};

/// How long deploying may take until dpkg is at work in the guest.
const PATIENCE: Duration = Duration::from_secs(600);

/// How long an sshd may take to listen.
const START: Duration = Duration::from_secs(30);

/// What a system runs: the mounts and processes are of namespaces that end with it.
const INSIDE: &str = "root=$1 over=$2 port=$3
mount -t overlay overlay -o \"lowerdir=$root,upperdir=$over/upper,workdir=$over/work\" \"$over/merged\"
mount -t proc proc \"$over/merged/proc\"
mount --rbind /dev \"$over/merged/dev\"
exec chroot \"$over/merged\" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C \
/bin/sh -ec 'mkdir -p /run/sshd; [ ! -x /root/mysqld ] || /root/mysqld 100000 & exec /usr/sbin/sshd -D -e -p '\"$port\"' \
-o ListenAddress=127.0.0.1 -h /root/host_key -o PidFile=none -o UsePAM=no'";

/// One system.
struct System {
    over: tempfile::TempDir,
    port: u16,
    child: Child,
}

impl System {
    /// Starts one. `arrange` puts files into it before.
    fn start(key: &Path, arrange: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let root = debian_root::root()?;
        let over = tempfile::tempdir()?;
        for directory in ["upper/root/.ssh", "work", "merged"] {
            fs::create_dir_all(over.path().join(directory))?;
        }
        let upper = over.path().join("upper");
        let login = upper.join("root/.ssh");
        for directory in [&upper.join("root"), &login] {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
        }
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o755))?;
        fs::copy(key.with_extension("pub"), login.join("authorized_keys"))?;
        make_key(&upper.join("root/host_key"))?;
        let kernel =
            fs::read_dir(root.join("lib/modules"))?.next().context("no kernel's headers are there")??;
        let kernel = kernel.file_name().to_string_lossy().into_owned();
        program(
            &upper.join("usr/local/bin/uname"),
            &format!(
                "#!/bin/sh\nif [ \"$1\" = -r ]; then echo {kernel}; else exec /usr/bin/uname \"$@\"; fi\n"
            ),
        )?;
        arrange(&upper)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"])
            .args(["/bin/sh", "-ec", INSIDE, "sh"])
            .arg(&root)
            .arg(over.path())
            .arg(port.to_string())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start unshare")?;
        let mut system = Self { over, port, child };
        let until = Instant::now() + START;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Some(status) = system.child.try_wait()? {
                bail!("the system's sshd ended with {status}");
            }
            ensure!(Instant::now() < until, "the system's sshd does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(system)
    }

    fn destination(&self) -> String {
        format!("ssh://root@127.0.0.1:{}", self.port)
    }

    /// Its line for ssh's known hosts.
    fn known(&self) -> Result<String> {
        let key = fs::read_to_string(self.over.path().join("upper/root/host_key.pub"))?;
        Ok(format!("[127.0.0.1]:{} {key}", self.port))
    }

    /// What was written to it, but for what says so by its nature.
    fn traces(&self) -> Result<Vec<String>> {
        debian_root::traces(&self.over.path().join("upper"))
    }

    fn has(&self, path: &str) -> bool {
        fs::symlink_metadata(self.over.path().join("upper").join(path)).is_ok()
    }
}

impl Drop for System {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn program(path: &Path, text: &str) -> Result<()> {
    fs::create_dir_all(path.parent().context("a path with a directory")?)?;
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn make_key(path: &Path) -> Result<()> {
    run_program(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path)).map(drop)
}

/// A host, as far as files make one.
fn xen(upper: &Path) -> Result<()> {
    let directory = upper.join("sys/hypervisor/version");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("major"), "4\n")?;
    fs::write(directory.join("minor"), "17\n")?;
    Ok(fs::write(directory.with_file_name("uuid"), "00000000-0000-0000-0000-000000000000\n")?)
}

/// A process that is called mysqld.
fn mysqld(upper: &Path) -> Result<()> {
    let path = upper.join("root/mysqld");
    fs::copy("/bin/sleep", &path)?;
    Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?)
}

/// Somebody who is not root, and gets in by the same key.
fn operator(upper: &Path, key: &Path) -> Result<()> {
    let passwd = fs::read_to_string(debian_root::root()?.join("etc/passwd"))?;
    fs::create_dir_all(upper.join("etc"))?;
    fs::write(upper.join("etc/passwd"), passwd + "operator:x:1000:1000::/home/operator:/bin/sh\n")?;
    let login = upper.join("home/operator/.ssh");
    fs::create_dir_all(&login)?;
    fs::copy(key.with_extension("pub"), login.join("authorized_keys"))?;
    run_program(Command::new("chown").args(["-R", "1000:1000"]).arg(upper.join("home/operator"))).map(drop)
}

/// Three systems, and how to reach them.
struct Lab {
    guest: System,
    hosts: [System; 2],
    key: PathBuf,
    known: PathBuf,
    packages: PathBuf,
    _work: tempfile::TempDir,
}

impl Lab {
    fn args(&self) -> Args {
        Args {
            guest: vec![self.guest.destination()],
            dom0: self.hosts.iter().map(System::destination).collect(),
            dry_run: false,
            remove: false,
            packages: Some(self.packages.clone()),
            ssh_option: self.options(&self.key, &self.known),
        }
    }

    fn options(&self, key: &Path, known: &Path) -> Vec<String> {
        vec![
            "-F/dev/null".to_owned(),
            format!("-i{}", key.display()),
            "-oIdentitiesOnly=yes".to_owned(),
            format!("-oUserKnownHostsFile={}", known.display()),
            "-oGlobalKnownHostsFile=/dev/null".to_owned(),
            "-oStrictHostKeyChecking=yes".to_owned(),
        ]
    }

    fn systems(&self) -> [&System; 3] {
        [&self.guest, &self.hosts[0], &self.hosts[1]]
    }

    fn on(&self, system: &System, script: &str) -> Result<String> {
        let machine = ssh::Machine::new(&system.destination(), &self.options(&self.key, &self.known));
        Ok(machine.run(script, &[])?)
    }

    /// The words of a failure, which there must be.
    fn fails(&self, args: &Args) -> Result<String> {
        match super::run(args) {
            Ok(()) => bail!("it did not fail"),
            Err(error) => Ok(format!("{error:#}")),
        }
    }

    /// What is in the way, by machine, each machine's in one text.
    fn obstacles(&self, args: &Args) -> Result<Vec<(String, String)>> {
        let made = Made::find(&self.packages)?;
        let deploy = super::Deploy::look(super::machines(args), Some(&made))?;
        let of_job = |job: &super::Job| (job.machine.destination.clone(), job.obstacles.join("\n"));
        Ok(deploy.jobs.iter().filter(|job| !job.obstacles.is_empty()).map(of_job).collect())
    }

    /// Nothing was written anywhere since the beginning.
    fn untouched(&self, before: &[Vec<String>]) -> Result<()> {
        for (system, before) in self.systems().iter().zip(before) {
            let now = system.traces()?;
            ensure!(now == *before, "{}: {now:#?} in place of {before:#?}", system.destination());
        }
        Ok(())
    }
}

/// Runs all of it with the packages in a directory, in order: each part begins where the one before ended.
///
/// # Errors
/// The first thing that is not as it should be.
pub fn run(packages: &Path) -> Result<()> {
    let work = tempfile::tempdir()?;
    let key = work.path().join("key");
    make_key(&key)?;
    let guest = System::start(&key, mysqld)?;
    let second = |upper: &Path| xen(upper).and_then(|()| operator(upper, &key));
    let hosts = [System::start(&key, xen)?, System::start(&key, second)?];
    let known = work.path().join("known_hosts");
    fs::write(&known, [guest.known()?, hosts[0].known()?, hosts[1].known()?].concat())?;
    let lab = Lab { guest, hosts, key, known, packages: packages.to_owned(), _work: work };
    let before: Vec<Vec<String>> =
        lab.systems().iter().map(|system| system.traces()).collect::<Result<_>>()?;
    step("deploy: obstacles, and a plan that is only shown", || obstacles(&lab, &before))?;
    step("deploy: each obstacle is named, with its machine", || named(&lab, &before))?;
    step("deploy: a disk that is full in the middle", || full(&lab))?;
    step("deploy: broken off in the middle", || broken_off(&lab))?;
    step("deploy: gone on with, mysqld the same", || installed(&lab))?;
    step("deploy: a second time, and over half an installation", || again(&lab))?;
    step("deploy: removed without a trace", || removed(&lab, &before))
}

fn obstacles(lab: &Lab, before: &[Vec<String>]) -> Result<()> {
    super::run(&Args { dry_run: true, ..lab.args() })?;
    lab.untouched(before)?;
    let stranger = lab.key.with_file_name("stranger");
    make_key(&stranger)?;
    let nobody = lab.known.with_file_name("nobody");
    fs::write(&nobody, "")?;
    let nothing = "nothing was changed on any machine";
    for options in [lab.options(&stranger, &lab.known), lab.options(&lab.key, &nobody)] {
        let said = lab.fails(&Args { ssh_option: options, ..lab.args() })?;
        ensure!(said.contains(nothing), "{said}");
    }
    // One of three that is not there keeps all three from being changed.
    let gone = "ssh://root@127.0.0.1:1".to_owned();
    let said = lab.fails(&Args { dom0: vec![lab.hosts[0].destination(), gone.clone()], ..lab.args() })?;
    ensure!(said.contains(nothing) && said.contains(&gone), "{said}");
    // A guest that was named as a host.
    let said = lab.fails(&Args { guest: Vec::new(), dom0: vec![lab.guest.destination()], ..lab.args() })?;
    ensure!(said.contains(nothing), "{said}");
    // A disk that is full.
    lab.on(&lab.hosts[1], "mount -t tmpfs -o size=1m none /tmp")?;
    let said = lab.fails(&lab.args())?;
    ensure!(said.contains(nothing) && said.contains(&lab.hosts[1].destination()), "{said}");
    lab.on(&lab.hosts[1], "umount /tmp")?;
    lab.untouched(before)
}

/// What is not as it should be on a machine for the time of a look, and what is said of it then.
struct Flaw<'a> {
    system: &'a System,
    /// Brings it about.
    arrange: &'a str,
    /// Takes it away.
    mend: &'a str,
    said: &'a str,
}

fn named(lab: &Lab, before: &[Vec<String>]) -> Result<()> {
    let [one, two] = &lab.hosts;
    let flaws = [
        Flaw {
            system: one,
            // What cannot be executed is not found.
            arrange: "mount --bind /dev/null /usr/bin/apt-get; echo 'PRETTY_NAME=\"Other 7\"' >/run/other; mount --bind /run/other /etc/os-release",
            mend: "umount /usr/bin/apt-get; umount /etc/os-release; rm /run/other",
            said: "it is Other 7, without apt and dpkg: use the tarball",
        },
        Flaw {
            system: &lab.guest,
            arrange: "printf '#!/bin/sh\\necho 6.6.6-own\\n' >/run/uname; chmod 755 /run/uname; mount --bind /run/uname /usr/local/bin/uname",
            mend: "umount /usr/local/bin/uname; rm /run/uname",
            said: "there are no headers for its kernel 6.6.6-own",
        },
        Flaw {
            system: two,
            arrange: "mount -t tmpfs none /sys/hypervisor",
            mend: "umount /sys/hypervisor",
            said: "it does not run Xen now",
        },
        Flaw {
            system: two,
            arrange: "echo 11111111-0000-0000-0000-000000000000 >/run/uuid; mount --bind /run/uuid /sys/hypervisor/uuid",
            mend: "umount /sys/hypervisor/uuid; rm /run/uuid",
            said: "it runs under Xen, but is no dom0",
        },
        Flaw {
            system: one,
            arrange: "mount -t tmpfs -o size=1m none /tmp",
            mend: "umount /tmp",
            said: "MiB left (the least of /usr, /var and /tmp), and 150 are needed",
        },
    ];
    for Flaw { system, arrange, mend, said } in flaws {
        lab.on(system, arrange)?;
        let obstacles = lab.obstacles(&lab.args());
        lab.on(system, mend)?;
        // Of one machine, one thing: nothing is said of those that are well.
        let expected = system.destination();
        let obstacles = obstacles?;
        ensure!(
            matches!(&obstacles[..], [(machine, words)] if *machine == expected && words.contains(said)),
            "{expected} should have said {said:?}: {obstacles:?}"
        );
    }
    let stranger = lab.key.with_file_name("stranger");
    let gone = "ssh://root@127.0.0.1:1";
    let logins = [
        (
            two.destination().replace("root@", "operator@"),
            &lab.key,
            "the login is no root (uid 1000): use root@HOST",
        ),
        (two.destination(), &stranger, "does not let us in"),
        (gone.to_owned(), &lab.key, "cannot be reached"),
    ];
    for (destination, key, said) in logins {
        let args = Args {
            guest: Vec::new(),
            dom0: vec![destination.clone()],
            ssh_option: lab.options(key, &lab.known),
            ..lab.args()
        };
        let obstacles = lab.obstacles(&args)?;
        ensure!(
            matches!(&obstacles[..], [(machine, words)] if *machine == destination && words.contains(said)),
            "{destination} should have said {said:?}: {obstacles:?}"
        );
    }
    lab.untouched(before)
}

/// The package does not fit where it is put: what was done and what was not is told, and the next call goes on.
fn full(lab: &Lab) -> Result<()> {
    let at = "/var/lib/poolskip-deploy";
    lab.on(&lab.hosts[1], &format!("mkdir {at}; mount -t tmpfs -o size=64k none {at}"))?;
    let said = lab.fails(&lab.args())?;
    lab.on(&lab.hosts[1], &format!("umount {at}"))?;
    for word in [
        lab.hosts[1].destination().as_str(),
        "could not copy poolskip-dom0",
        "No space left",
        "goes on from here",
    ] {
        ensure!(said.contains(word), "no {word:?} in: {said}");
    }
    // The first host is done, the guest behind it has not been begun with.
    let state = "dpkg-query -W -f='${db:Status-Abbrev}' 'poolskip-*' 2>/dev/null || true";
    ensure!(lab.on(&lab.hosts[0], state)?.trim() == "ii", "the first host was not done");
    ensure!(lab.on(&lab.hosts[1], state)?.trim() != "ii", "half a file was installed");
    ensure!(lab.on(&lab.guest, state)?.trim().is_empty(), "the guest was done after a failure");
    Ok(())
}

/// The program that deploys is killed while the guest's dpkg is at work.
fn broken_off(lab: &Lab) -> Result<()> {
    let args = lab.args();
    // This program, though its file may have been built anew meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.arg("deploy").arg("--packages").arg(&lab.packages);
    let of = |option: &str, names: &[String]| -> Vec<String> {
        names.iter().map(|name| format!("--{option}={name}")).collect()
    };
    command
        .args(of("guest", &args.guest))
        .args(of("dom0", &args.dom0))
        .args(of("ssh-option", &args.ssh_option));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let until = Instant::now() + PATIENCE;
    let at_work = "cat /proc/[0-9]*/comm | grep -qx 'dpkg\\|dkms' && echo yes || true";
    let caught = loop {
        if let Some(status) = child.try_wait()? {
            break Err(anyhow::anyhow!("it ended with {status} before dpkg was seen at work"));
        }
        if lab.on(&lab.guest, at_work)?.trim() == "yes" {
            break Ok(());
        }
        if Instant::now() > until {
            break Err(anyhow::anyhow!("dpkg is never at work in the guest"));
        }
    };
    let _ = child.kill();
    child.wait()?;
    caught
}

/// What `doctor` says of systems without Xen and mysqld, and no more than that.
fn only_doctor_complains(lab: &Lab, said: &str) -> Result<()> {
    ensure!(said.starts_with("all steps were done, and yet:"), "{said}");
    ensure!(!said.contains("is not there any more"), "mysqld: {said}");
    for system in lab.systems() {
        ensure!(said.contains(&system.destination()), "no word of {}: {said}", system.destination());
    }
    Ok(())
}

fn installed(lab: &Lab) -> Result<()> {
    let pid = lab.on(&lab.guest, "cat /proc/[0-9]*/comm | grep -c mysqld; pidof mysqld")?;
    let said = lab.fails(&lab.args())?;
    only_doctor_complains(lab, &said)?;
    ensure!(
        lab.on(&lab.guest, "cat /proc/[0-9]*/comm | grep -c mysqld; pidof mysqld")? == pid,
        "mysqld is another"
    );
    let status = lab.on(&lab.guest, "dkms status; dpkg --verify poolskip-guest; guest-probe --version")?;
    ensure!(status.contains("installed") && status.contains("guest-probe 0"), "{status}");
    for host in &lab.hosts {
        let status = lab.on(host, "dpkg --verify poolskip-dom0; command -v xl; dom0-migrator --version")?;
        ensure!(status.starts_with("/usr/local/sbin/xl\n"), "{status}");
        ensure!(host.has("etc/poolskip/certificates/key.pem"), "a host has no certificate");
    }
    let [one, two] = &lab.hosts;
    let authority = |host| lab.on(host, "cat /etc/poolskip/certificates/authority.pem");
    ensure!(authority(one)? == authority(two)?, "two authorities");
    ensure!(one.has("etc/poolskip/authority/authority-key.pem"), "the first host is no authority");
    ensure!(!two.has("etc/poolskip/authority"), "both are authorities");
    Ok(())
}

fn again(lab: &Lab) -> Result<()> {
    let certificate = |host| lab.on(host, "cat /etc/poolskip/certificates/certificate.pem");
    let before = [certificate(&lab.hosts[0])?, certificate(&lab.hosts[1])?];
    let log = || lab.on(&lab.guest, "grep -c . /var/log/dpkg.log");
    let packages = log()?;
    only_doctor_complains(lab, &lab.fails(&lab.args())?)?;
    ensure!([certificate(&lab.hosts[0])?, certificate(&lab.hosts[1])?] == before, "new certificates");
    ensure!(log()? == packages, "dpkg was called for nothing");
    // As when the connection broke, or the machine went down, between dpkg's two halves.
    let made = Made::find(&lab.packages)?;
    let machine = ssh::Machine::new(&lab.guest.destination(), &lab.options(&lab.key, &lab.known));
    machine.put(&made.debs[0], "/root/half.deb")?;
    lab.on(&lab.guest, "dpkg --unpack /root/half.deb; rm /root/half.deb")?;
    only_doctor_complains(lab, &lab.fails(&lab.args())?)?;
    let state = lab.on(&lab.guest, "dpkg-query -W -f='${db:Status-Abbrev}' poolskip-guest")?;
    ensure!(state.trim() == "ii", "half an installation is {state} after all");
    Ok(())
}

fn removed(lab: &Lab, before: &[Vec<String>]) -> Result<()> {
    let remove = || Args { remove: true, packages: None, ..lab.args() };
    super::run(&remove())?;
    lab.untouched(before)?;
    // There is nothing to remove any more, and that is no failure.
    super::run(&remove())?;
    lab.untouched(before)
}
