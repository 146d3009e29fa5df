//! A stream of a guest's memory, through the filters and copied, in turn.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use dom0_migrator::helper::{LibraryEnd, restore_pipe};

use crate::Failed;
use crate::roles::{Role, Told};

/// What to measure.
#[derive(clap::Args)]
pub struct Args {
    /// A raw disk with an InnoDB data directory on it; it is only read
    #[arg(long)]
    disk: PathBuf,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = 4096)]
    mib: u64,
    /// Times that each is measured
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Bytes a second of the narrow wire, over which a guest goes whose kinds of pages lie far apart
    #[arg(long, default_value_t = 200_000_000)]
    wire: u64,
}

/// Pages of a kind that lie together in that guest: 64 MiB.
const FAR_APART: u64 = 16 << 10;

/// Measures, and prints JSON.
pub fn run(args: &Args) -> Result<(), Failed> {
    let filters = [Role::Generate, Role::Source, Role::Target, Role::Sink];
    let copies = [Role::Generate, Role::Copy, Role::Copy, Role::Sink];
    let one_copy = [Role::Generate, Role::Copy, Role::Sink];
    let narrow = [Role::Generate, Role::Source, Role::Wire, Role::Target, Role::Sink];
    let far_apart = ["--stretch".to_owned(), FAR_APART.to_string(), "--rate".into(), args.wire.to_string()];
    let in_order = [&far_apart[..], &["--in-order".into()]].concat();
    let checked = chain(args, &filters, &["--check".into()])?;
    let (written, read) = (checked[0].digest, checked[3].digest);
    if written != read {
        return Err(format!("memory differs: {written:#x} was written, {read:#x} was read").into());
    }
    // Parted records, too, bring the same memory.
    let checked = chain(args, &narrow, &[&far_apart[..], &["--check".into()]].concat())?;
    if checked[0].digest != checked[4].digest {
        return Err("memory differs after a narrow wire".into());
    }
    let (mut with_filters, mut copied, mut copied_once) = (Vec::new(), Vec::new(), Vec::new());
    let (mut overtaking, mut in_turn) = (Vec::new(), Vec::new());
    for _ in 0..args.runs {
        copied.push(chain(args, &copies, &[])?);
        with_filters.push(chain(args, &filters, &[])?);
        copied_once.push(chain(args, &one_copy, &[])?);
        in_turn.push(chain(args, &narrow, &in_order)?);
        overtaking.push(chain(args, &narrow, &far_apart)?);
    }
    let seconds = |runs: &[Vec<Told>]| -> Vec<f64> {
        runs.iter().map(|told| told.last().map_or(0.0, |sink| sink.seconds)).collect()
    };
    let busy = |runs: &[Vec<Told>]| -> Vec<f64> {
        let share = |told: &Vec<Told>| told[2].bytes as f64 / args.wire as f64 / told[4].seconds;
        runs.iter().map(share).collect()
    };
    let rate = |runs: &[Vec<Told>]| -> Vec<f64> {
        let of_one = |told: &Vec<Told>| told.last().map_or(0.0, |sink| bytes(args) / sink.seconds);
        runs.iter().map(of_one).collect()
    };
    let resident =
        |place: usize| -> Vec<u64> { with_filters.iter().map(|told| told[place].resident_bytes).collect() };
    let processor = |place: usize| -> Vec<f64> {
        with_filters.iter().map(|told| told[place].processor_seconds).collect()
    };
    let report = serde_json::json!({
        "source_processor": processor(1),
        "target_processor": processor(2),
        "filters": rate(&with_filters),
        "copies": rate(&copied),
        "one_copy": rate(&copied_once),
        "source_resident": resident(1),
        "target_resident": resident(2),
        "narrow": seconds(&overtaking),
        "narrow_in_order": seconds(&in_turn),
        "narrow_busy": busy(&overtaking),
        "narrow_busy_in_order": busy(&in_turn),
        "source": with_filters.last().map(|told| told[1].counted.clone()),
        "target": with_filters.last().map(|told| told[2].counted.clone()),
    });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

fn bytes(args: &Args) -> f64 {
    (args.mib << 20) as f64
}

/// Runs a chain of processes to its end; what they said, in order.
fn chain(args: &Args, roles: &[Role], more: &[String]) -> Result<Vec<Told>, Failed> {
    let directory = tempfile::tempdir()?;
    let mut children: Vec<(Role, Child)> = Vec::new();
    let mut from: Option<OwnedFd> = None;
    for (place, &role) in roles.iter().enumerate() {
        let mut command = Command::new(std::env::current_exe()?);
        let name = format!("{role:?}").to_lowercase();
        command.arg("role").arg(&name).arg("--disk").arg(&args.disk);
        command.arg("--pages").arg((args.mib * 256).to_string());
        command.arg("--side").arg(directory.path().join("side"));
        command.arg("--report").arg(report_path(directory.path(), place));
        command.args(more);
        if let Some(from) = from.take() {
            command.stdin(from);
        }
        if place + 1 < roles.len() {
            let (near, far) = match (role, roles.get(place + 1)) {
                (Role::Target, Some(Role::Sink)) => {
                    let (far, near) = restore_pipe()?;
                    (near, far)
                }
                // A copy is faster through sockets than through that pipe.
                _ => pair(place == 0, place + 2 == roles.len())?,
            };
            command.stdout(near);
            from = Some(far);
        }
        children.push((role, command.spawn()?));
    }
    let mut failed = None;
    for (role, child) in &mut children {
        let status = child.wait()?;
        if !status.success() {
            failed.get_or_insert(format!("{role:?} ended with {status}"));
        }
    }
    if let Some(failed) = failed {
        return Err(failed.into());
    }
    (0..roles.len())
        .map(|place| Ok(serde_json::from_slice(&std::fs::read(report_path(directory.path(), place))?)?))
        .collect()
}

/// Two ends of a socket. libxenguest's own, which are the first and the last, are what the helper makes them.
fn pair(from_save: bool, to_restore: bool) -> Result<(OwnedFd, OwnedFd), Failed> {
    if !from_save && !to_restore {
        let (near, far) = UnixStream::pair()?;
        return Ok((near.into(), far.into()));
    }
    let (library, filter) = LibraryEnd::pair()?;
    let library = library.as_fd().try_clone_to_owned()?;
    Ok(if from_save { (library, filter) } else { (filter, library) })
}

fn report_path(directory: &Path, place: usize) -> PathBuf {
    directory.join(format!("report-{place}"))
}
