//! Poolskip's own programs, built and put into a running lab: nothing that runs there is restarted for it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::build::{ebpf, module};
use crate::cache::Key;
use crate::lab::{Flavour, Host, Kernel, Lab};
use crate::step::{run, step};
use crate::workload::TPCC;

/// Where `dom0-migrator` lies in both hosts.
pub const MIGRATOR: &str = "/usr/local/bin/dom0-migrator";
/// Where `domains` lies in both hosts.
const DOMAINS: &str = "/usr/local/bin/domains";
/// Where it finds its library.
const LIBRARY: &str = "/usr/local/lib/domains";
/// Where the probe lies in the guest.
pub const PROBE: &str = "/usr/local/bin/guest-probe";
/// Where the compressing transport lies in both hosts.
pub const ZSTD_PIPE: &str = "/usr/local/bin/zstd-pipe";
/// Where the hostile program lies in the guest.
pub const HOSTILE: &str = "/root/hostile-guest";
/// Where the program lies in the guest that has its device model write.
pub const DEVICE_WRITER: &str = "/root/device-writer";
/// Where the ticker lies in the guest.
const TICKER: &str = "/usr/local/bin/guest-ticker";
/// The module in the guest.
pub const MODULE: &str = "/root/poolskip.ko";

/// Generous limit for one command in an emulated machine.
pub const LIMIT: Duration = Duration::from_secs(300);

/// A domain, as the hypervisor has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Domain {
    /// Its number.
    pub domain: u16,
    /// Pages that it has.
    pub pages: u64,
    /// Destroyed, but not all of its pages are free.
    pub dying: bool,
    /// Paused by the toolstack.
    pub paused: bool,
    /// Why it has shut down; none while it runs.
    pub shutdown: Option<u32>,
}

impl Domain {
    /// Whether nothing keeps it from running.
    pub fn runs(&self) -> bool {
        !self.dying && !self.paused && self.shutdown.is_none()
    }
}

/// Files to be put into the lab.
pub struct Deployment {
    migrator: PathBuf,
    domains: PathBuf,
    probe: PathBuf,
    hostile: PathBuf,
    device_writer: PathBuf,
    ticker: PathBuf,
    tpcc: PathBuf,
    zstd_pipe: PathBuf,
    module: PathBuf,
}

impl Deployment {
    /// Builds all that the machines of such a lab run.
    ///
    /// # Errors
    /// When something does not compile, or a built object in the tree does not belong to its sources.
    pub fn build(flavour: Flavour) -> Result<Self> {
        ebpf::check()?;
        module::check()?;
        let kernel = Kernel::of(flavour.suite())?;
        let linking = format!("linking the kernel module for {}", kernel.release);
        let module = step(&linking, || module::link(&kernel))?;
        let target = build_release()?;
        let release = target.join("release");
        // Line tables are most of a binary, and each megabyte takes its time into an emulated machine.
        let stripped = |name: &str| -> Result<PathBuf> {
            let (whole, lean) = (release.join(name), target.join(format!("{name}.stripped")));
            run(Command::new("strip").arg("-o").arg(&lean).arg(whole))?;
            Ok(lean)
        };
        Ok(Self {
            migrator: stripped("dom0-migrator")?,
            domains: stripped("domains")?,
            probe: stripped("guest-probe")?,
            hostile: stripped("hostile-guest")?,
            device_writer: stripped("device-writer")?,
            ticker: stripped("guest-ticker")?,
            tpcc: stripped("tpcc")?,
            zstd_pipe: stripped("zstd-pipe")?,
            module,
        })
    }

    /// `dom0-migrator`, which runs here too.
    pub fn migrator(&self) -> &Path {
        &self.migrator
    }

    /// Puts the files into both hosts and the guest, loads the module and starts the probe beside the running mysqld.
    ///
    /// # Errors
    /// When the module does not load or the probe does not attach.
    pub fn install(&self, lab: &Lab) -> Result<()> {
        step("putting dom0-migrator into both hosts", || {
            for host in Host::BOTH {
                lab.host(host).must("mkdir -p /usr/local/bin", LIMIT)?;
                lab.host(host).push(&self.migrator, MIGRATOR, 0o755)?;
                lab.host(host).push(&self.domains, DOMAINS, 0o755)?;
                // The crate opens the library by the name that only a development package has.
                lab.host(host).must(
                    &format!("mkdir -p {LIBRARY} && set -- /usr/lib/x86_64-linux-gnu/libxenctrl.so.4.* && ln -sf $1 {LIBRARY}/libxenctrl.so"),
                    LIMIT,
                )?;
            }
            Ok(())
        })?;
        step("putting module, probe and ticker into the guest", || {
            let guest = lab.guest();
            guest.must("mkdir -p /usr/local/bin", LIMIT)?;
            guest.push(&self.module, MODULE, 0o644)?;
            guest.push(&self.probe, PROBE, 0o755)?;
            guest.push(&self.ticker, TICKER, 0o755)?;
            Ok(())
        })?;
        step("loading the module into the guest", || guest(lab, &format!("insmod {MODULE}")).map(drop))
    }

    /// The domains of a host, dom0 not among them, as the hypervisor has them: those too that the toolstack has forgotten.
    ///
    /// # Errors
    /// When the hypervisor cannot be asked.
    pub fn domains(lab: &Lab, host: Host) -> Result<Vec<Domain>> {
        let lines = lab.host(host).must(&format!("LD_LIBRARY_PATH={LIBRARY} {DOMAINS}"), LIMIT)?;
        let all: Vec<Domain> = lines
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("not a domain: {line:?}")))
            .collect::<Result<_>>()?;
        ensure!(all.iter().any(|domain| domain.domain == 0), "a host without a dom0: {lines:?}");
        Ok(all.into_iter().filter(|domain| domain.domain != 0).collect())
    }

    /// Puts the hostile program into the guest.
    ///
    /// # Errors
    /// When the guest cannot be reached.
    pub fn install_hostile(&self, lab: &Lab) -> Result<()> {
        step("putting the hostile program into the guest", || lab.guest().push(&self.hostile, HOSTILE, 0o755))
    }

    /// Puts the program into the guest that has its device model write.
    ///
    /// # Errors
    /// When the guest cannot be reached.
    pub fn install_device_writer(&self, lab: &Lab) -> Result<()> {
        step("putting the program into the guest that has its device model write", || {
            lab.guest().push(&self.device_writer, DEVICE_WRITER, 0o755)
        })
    }

    /// Puts the load generator into the guest, and the compressing transport into both hosts: only benches need them.
    ///
    /// # Errors
    /// When a machine cannot be reached.
    pub fn install_for_benches(&self, lab: &Lab) -> Result<()> {
        step("putting TPC-C into the guest, and the compressing transport into both hosts", || {
            lab.guest().push(&self.tpcc, TPCC, 0o755)?;
            Host::BOTH.iter().try_for_each(|host| lab.host(*host).push(&self.zstd_pipe, ZSTD_PIPE, 0o755))
        })
    }

    /// A hash of all programs that are measured, or measure: figures of other ones are other figures.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub fn identity(&self) -> Result<String> {
        let files = [&self.migrator, &self.probe, &self.ticker, &self.tpcc, &self.zstd_pipe, &self.module];
        let key = files.iter().try_fold(Key::new("deployment"), |key, file| key.with_file(file))?;
        Ok(key.hex())
    }

    /// Starts the probe in the guest, beside the running mysqld, and waits until it knows every frame.
    ///
    /// # Errors
    /// When the probe ends or never says that it is attached; with its log.
    pub fn start_probe(&self, lab: &Lab, options: &str) -> Result<()> {
        step("attaching the probe to the running mysqld", || {
            guest(
                lab,
                &format!(
                    "{PROBE} run --resident {options} </dev/null >/run/guest-probe.log 2>&1 & echo $! >/run/guest-probe.pid; \
                     for i in $(seq 600); do {PROBE} status --json >/run/guest-probe.status 2>/dev/null \
                     && case $(cat /run/guest-probe.status) in *mysqld_package*) exit 0;; esac; \
                     kill -0 $(cat /run/guest-probe.pid) || break; sleep 0.5; done; \
                     echo 'the probe does not answer; its log:' >&2; tail -n 40 /run/guest-probe.log >&2; exit 1"
                ),
            )
            .map(drop)
        })
    }

    /// Starts the probe again in such a way that many of its hints are wrong.
    ///
    /// # Errors
    /// Those of [`Deployment::stop_probe`] and [`Deployment::start_probe`].
    pub fn give_wrong_hints(&self, lab: &Lab) -> Result<()> {
        self.stop_probe(lab)?;
        self.start_probe(lab, "--wrong-hints 1")
    }

    /// Ends the probe as an operator would, and waits until it is gone.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop_probe(&self, lab: &Lab) -> Result<()> {
        guest(
            lab,
            "pid=$(cat /run/guest-probe.pid); kill $pid; for i in $(seq 300); do kill -0 $pid 2>/dev/null || exit 0; \
             sleep 0.2; done; echo 'the probe does not end on SIGTERM' >&2; exit 1",
        )
        .map(drop)
    }

    /// Starts the ticker in the guest.
    ///
    /// # Errors
    /// When the guest cannot be reached.
    pub fn start_ticker(lab: &Lab) -> Result<()> {
        guest(lab, &format!("{TICKER} /run/ticker.log </dev/null >/dev/null 2>&1 & echo $! >/run/ticker.pid"))
            .map(drop)
    }

    /// Ends the ticker: the longest gap that it saw, and where its lines stand.
    ///
    /// # Errors
    /// When it saw nothing at all, so did not run.
    pub fn stop_ticker(lab: &Lab) -> Result<Duration> {
        guest(lab, "kill $(cat /run/ticker.pid)")?;
        let log = guest(lab, "cat /run/ticker.log")?;
        longest_gap(&log)
            .with_context(|| format!("the ticker in the guest left no line that says so: {log:?}"))
    }
}

/// Builds all programs for release: those that are installed, and those that only the lab needs. The target directory.
///
/// # Errors
/// When something does not compile.
pub fn build_release() -> Result<PathBuf> {
    step("building guest-probe, dom0-migrator and the lab's programs (release)", || {
        run(cargo().args(["build", "--locked", "--release"]).args([
            "--package=guest-probe",
            "--package=dom0-migrator",
            "--package=tests",
            // Adds the program `domains`, and nothing to the others.
            "--features=dom0-migrator/xenctrl",
            "--bins",
        ]))?;
        target_directory()
    })
}

/// The longest gap in a ticker's log.
fn longest_gap(log: &str) -> Option<Duration> {
    log.lines().filter_map(|line| line.split_once(' ')?.1.trim().parse().ok()).max().map(Duration::from_nanos)
}

/// Runs a shell command in the guest; its standard output.
///
/// # Errors
/// When it does not exit with 0: with its standard error.
pub fn guest(lab: &Lab, command: &str) -> Result<String> {
    let output = lab.guest().run(command, LIMIT)?;
    if output.status != 0 {
        bail!("in the guest: `{command}` ended with {}: {}", output.status, output.stderr.trim());
    }
    Ok(output.stdout)
}

/// Runs a shell command in a host's dom0; its standard output.
///
/// # Errors
/// When it does not exit with 0: with its standard error.
pub fn host(lab: &Lab, which: Host, command: &str) -> Result<String> {
    let output = lab.host(which).run(command, LIMIT)?;
    if output.status != 0 {
        bail!("on {which:?}: `{command}` ended with {}: {}", output.status, output.stderr.trim());
    }
    Ok(output.stdout)
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The checkout's root.
pub fn root() -> &'static Path {
    // xtask's manifest lies one folder below it.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Where cargo builds to.
///
/// # Errors
/// When cargo does not say.
pub fn target_directory() -> Result<PathBuf> {
    let words = run(cargo().args(["metadata", "--format-version=1", "--no-deps", "--locked"]))?;
    let metadata: serde_json::Value =
        serde_json::from_slice(&words).context("cannot read cargo's metadata")?;
    let path = metadata["target_directory"].as_str().context("cargo's metadata names no target directory")?;
    Ok(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_gap_is_the_largest_of_the_second_column() {
        assert_eq!(longest_gap("100 0\n200 25\n300 7\n"), Some(Duration::from_nanos(25)));
    }

    #[test]
    fn an_empty_log_has_no_gap() {
        assert_eq!(longest_gap(""), None);
        assert_eq!(longest_gap("garbage\n"), None);
    }
}
