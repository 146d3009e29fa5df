//! Tries `poolskip.ko` in a real kernel: as the first process of a machine without anything else, or in a guest of the lab, beside the
//! database that runs there.
//!
//! `cargo xtask test` puts this program as `/init`, and the module as `/poolskip.ko`, into an initramfs and boots it under plain QEMU.
//! In the lab's guests it is started as `boot_test guest MODULE`, with the module not loaded. One line a case goes to the console; the
//! last says how many passed, and without it the test has failed. What the module lists is read from physical memory through
//! `/proc/kcore`, as dom0 would, and compared with `/proc/PID/pagemap`.

mod cases;
mod contention;
mod device;
mod leaks;
mod memory;
mod movement;
mod physical;
mod speed;
mod xen;

use std::fs::File;
use std::process::ExitCode;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use nix::kmod::{DeleteModuleFlags, ModuleInitFlags};
use nix::mount::{MsFlags, mount};

/// Stands in the kernel's log where the test begins.
const LOG_MARK: &str = "boot test begins";

/// Where the initramfs has the module.
const MODULE: &str = "/poolskip.ko";

/// The argument, before the module's path, of a run in a guest.
const IN_GUEST: &str = "guest";

/// What this program was told.
#[derive(Debug)]
struct Told {
    /// The module's file.
    module: String,
    /// Whether this is not a machine of our own: others run here, and it goes on when we have ended.
    in_guest: bool,
    /// Whether only to measure.
    bench: bool,
}

static TOLD: OnceLock<Told> = OnceLock::new();

fn told() -> &'static Told {
    TOLD.get_or_init(|| {
        let words: Vec<String> = std::env::args().skip(1).collect();
        let module = words.iter().skip_while(|word| *word != IN_GUEST).nth(1);
        Told {
            module: module.cloned().unwrap_or_else(|| MODULE.to_owned()),
            in_guest: module.is_some(),
            bench: words.iter().any(|word| word == speed::WORD),
        }
    })
}

fn main() -> ExitCode {
    if !told().in_guest && std::process::id() != 1 {
        eprintln!("this is the first process of a test machine: run `cargo xtask test`");
        return ExitCode::FAILURE;
    }
    let done = if told().bench { measure() } else { test() };
    if !told().in_guest {
        let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    }
    if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn measure() -> bool {
    begin().and_then(|()| speed::bench()).inspect_err(|error| println!("bench: {error:#}")).is_ok()
}

fn test() -> bool {
    match run() {
        Ok((passed, failed)) => {
            println!("boot test: {passed} passed, {failed} failed");
            failed == 0
        }
        Err(error) => {
            println!("boot test: cannot begin: {error:#}");
            false
        }
    }
}

/// What every program finds, where it is not there already, and the module.
fn begin() -> Result<()> {
    if !told().in_guest {
        mount_all()?;
    }
    std::fs::write("/dev/kmsg", LOG_MARK).context("cannot write to the kernel's log")?;
    load()
}

fn mount_all() -> Result<()> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        std::fs::create_dir_all(place)?;
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {place}"))?;
    }
    Ok(())
}

/// Whether this is a guest of Xen.
fn on_xen() -> bool {
    std::fs::read_to_string("/sys/hypervisor/type").is_ok_and(|kind| kind.trim() == "xen")
}

fn run() -> Result<(usize, usize)> {
    begin()?;
    let mut passed = 0;
    let mut failed = 0;
    for (name, alone, case) in cases::ALL {
        if let Some(why) = alone.filter(|_| told().in_guest) {
            println!("left out {name}: {why}");
            continue;
        }
        match case() {
            Ok(()) => {
                passed += 1;
                println!("pass {name}");
            }
            Err(error) => {
                failed += 1;
                println!("FAIL {name}: {error:#}");
            }
        }
    }
    Ok((passed, failed))
}

/// Loads the module.
fn load() -> Result<()> {
    let module = &told().module;
    let file = File::open(module).with_context(|| format!("cannot open {module}"))?;
    nix::kmod::finit_module(&file, c"", ModuleInitFlags::empty()).context("cannot load the module")
}

/// Unloads it.
fn unload() -> Result<(), nix::errno::Errno> {
    nix::kmod::delete_module(c"poolskip", DeleteModuleFlags::O_NONBLOCK)
}

/// What the kernel has said that it should not have.
fn complaints() -> Result<()> {
    let log = read_log()?;
    let (_, log) = log.rsplit_once(LOG_MARK).context("the kernel's log has lost the test's beginning")?;
    // Of the kernel's checks, lockdep, RCU's and the page allocator's, as far as this kernel has them.
    let bad = [
        "WARNING:",
        "BUG:",
        "Oops",
        "Call Trace",
        "general protection",
        "invalid opcode",
        "Out of memory",
        "INFO: possible",
        "INFO: task",
        "possible circular locking",
        "possible recursive locking",
        "inconsistent lock state",
        "suspicious RCU usage",
        "Bad page",
        "bad page",
        "UBSAN",
        "KASAN",
        "refcount_t",
        "corruption",
    ];
    // Documentation/admin-guide/tainted-kernels.rst: B bad page, D died, W warning, L soft lockup. The log may have lost its beginning.
    let taint: u64 = std::fs::read_to_string("/proc/sys/kernel/tainted")?.trim().parse()?;
    if taint & (1 << 5 | 1 << 7 | 1 << 9 | 1 << 14) != 0 {
        bail!("the kernel is tainted: {taint:#x}");
    }
    match log.lines().find(|line| bad.iter().any(|word| line.contains(word))) {
        Some(line) => bail!("the kernel says: {line}"),
        None => Ok(()),
    }
}

fn read_log() -> Result<String> {
    use std::io::Read as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    let mut log = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open("/dev/kmsg")
        .context("cannot open the kernel's log")?;
    let mut text = String::new();
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(length) => text.push_str(&String::from_utf8_lossy(&record[..length])),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(text),
            // Records that were overwritten meanwhile.
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EPIPE as i32) => {}
            Err(error) => return Err(error).context("cannot read the kernel's log"),
        }
    }
}
