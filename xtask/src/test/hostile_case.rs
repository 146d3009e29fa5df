//! A guest whose root means harm: it publishes the worst lists itself, in its own memory and through its own nodes, as the module would.

use anyhow::{Context, Result, ensure};

use super::bed::Bed;
use super::confined::{confine, peak};
use super::guest_cases::{kernel_is_content, only_here, wait_for, without_module};
use super::opened::{beside_the_system, seen, watch};
use crate::deployment::{HOSTILE, LIMIT, guest};
use crate::lab::{GuestSize, Lab};
use crate::migration::{Before, DOMAIN, check_after, start_after};
use crate::proof;

/// What the command and all that it starts may have of dom0's memory: the window of retained pages, or what is read ahead, is most of it
/// (256 MiB each, `engine::Config`); the rest is the lists' (16 bytes a page of the guest, and as much again while they are put in
/// order), buffers, threads, `xl`, and what the kernel keeps for them.
const MOST_MEMORY: u64 = 448 << 20;

/// The guest's only disk, as both hosts name it (`lab/files/db1.cfg`).
const OWN_DISK: &str = "/dev/vdb";

/// The guest's root at work; it takes its nodes back at the end of the case, not when this is dropped.
struct Root<'a> {
    lab: &'a Lab,
}

impl<'a> Root<'a> {
    const STOP: &'static str = "/run/hostile.stop";

    fn begin(lab: &'a Lab, kind: &str) -> Result<Self> {
        let pages = GuestSize::default().memory_bytes() >> 12;
        guest(
            lab,
            &format!(
                "rm -f {stop}; {HOSTILE} {kind} {pages} {stop} </dev/null >/run/hostile.log 2>&1 & echo $! >/run/hostile.pid",
                stop = Self::STOP
            ),
        )?;
        let this = Self { lab };
        let from = lab.guest_host()?;
        let node = format!("xenstore-exists /local/domain/$(xl domid {DOMAIN})/data/poolskip/version");
        wait_for("the hostile lists", || {
            this.alive()?;
            Ok(lab.host(from).run(&node, LIMIT)?.status == 0)
        })?;
        Ok(this)
    }

    fn alive(&self) -> Result<()> {
        let words = "kill -0 $(cat /run/hostile.pid) || { cat /run/hostile.log >&2; exit 1; }";
        guest(self.lab, words).context("the hostile program has ended by itself").map(drop)
    }

    fn end(self) -> Result<()> {
        self.alive()?;
        guest(
            self.lab,
            &format!(
                "touch {}; for i in $(seq 300); do kill -0 $(cat /run/hostile.pid) 2>/dev/null || exit 0; sleep 0.2; done; exit 1",
                Self::STOP
            ),
        )
        .context("the hostile program does not end")
        .map(drop)
    }
}

/// Lists without an end are given up; lists that are read to their end, tens of millions of entries, cost a refusal each. Memory arrives as it
/// was, dom0's memory stays within its bounds on both hosts, and the target opens no other disk than the guest's own.
pub(super) fn hostile_guest(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    without_module(bed)?;
    bed.deployment.install_hostile(lab)?;
    let from = lab.guest_host()?;
    for kind in ["circle", "restless"] {
        let root = Root::begin(lab, kind)?;
        let group = format!("check-{kind}");
        let (_, found) = check_after(lab, from, &confine(&group, MOST_MEMORY))?;
        let obstacles = serde_json::to_string(&found.obstacles)?;
        ensure!(
            obstacles.contains("lists-unreadable") && found.samples == 0,
            "lists of kind {kind} were taken: {obstacles}"
        );
        println!("{kind}: given up; {:.0} MiB at most", mib(peak(lab, from, &group)?));
        root.end()?;
    }
    let root = Root::begin(lab, "endless")?;
    let confined = confine("migration", MOST_MEMORY);
    let (source, target) = (confined.clone(), format!("{confined}{}", watch()));
    let before = Before { source: &source, target: &target };
    let report = start_after(lab, from, before, &["--debug"])?.finish(lab)?;
    ensure!(
        report.verify_mismatches == Some(0) && report.pages_verified.unwrap_or(0) > 0,
        "pages differ at the target, or none was compared: {report:?}"
    );
    let referenced = report.pages_referenced.unwrap_or(0);
    let refused = report.pages_refused.unwrap_or(0);
    ensure!(referenced > 1000 && refused > 1000, "the lists were not used, so nothing was tried: {report:?}");
    let (at_source, at_target) = (peak(lab, from, "migration")?, peak(lab, from.other(), "migration")?);
    let opened = seen(lab, from.other())?;
    let others = beside_the_system(&opened);
    ensure!(
        others.iter().any(|opened| opened.path == OWN_DISK && opened.task != "xl"),
        "the trace does not even have the guest's own disk, so it shows nothing: {opened:?}"
    );
    let strange: Vec<_> = others.iter().filter(|opened| opened.path != OWN_DISK).collect();
    ensure!(strange.is_empty(), "the target opened other files than the guest's disk: {strange:?}");
    println!(
        "endless: {referenced} references, {refused} of them refused; {} pages compared, 0 differ; {:.0} MiB at the source at most, \
         {:.0} MiB at the target; {} files opened there, of which {OWN_DISK} is the only one that is not the system's",
        report.pages_verified.unwrap_or(0),
        mib(at_source),
        mib(at_target),
        opened.len()
    );
    root.end()?;
    ensure!(proof::server(lab)? == bed.server, "mysqld is another process");
    ensure!(proof::query(lab, "SELECT 1")?.trim() == "1", "the server does not answer");
    only_here(lab, from.other())?;
    kernel_is_content(lab)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}
