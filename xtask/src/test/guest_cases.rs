//! Cases that hold for both kinds of guest, wherever it is: its lists, its server, its kernel.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::bed::Bed;
use crate::deployment::{Deployment, Domain, LIMIT, PROBE, guest, host};
use crate::lab::{Host, Lab};
use crate::migration::{DOMAIN, Options, Report, migrate};
use crate::module_test;
use crate::proof;

/// How long a condition in the lab may take to come true.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);

/// Where a host's dom0 has room for a guest's memory.
const SAVED: &str = "/var/tmp/db1.save";

/// What the kernel module has counted, as the probe tells it.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Counters {
    /// Whether dom0 can find the lists.
    announced: bool,
    /// Requests that came.
    pub(super) requests: u64,
    /// Signals to dom0.
    pub(super) signals: u64,
    /// What dom0 was not told of.
    pub(super) untold: u64,
    /// Calls that published something.
    pub(super) calls: u64,
}

impl Counters {
    /// Asks the running probe.
    ///
    /// # Errors
    /// When it does not answer, or the module does not tell.
    pub(super) fn read(lab: &Lab) -> Result<Self> {
        #[derive(Deserialize)]
        struct Status {
            module: Option<Counters>,
        }
        let words = guest(lab, &format!("{PROBE} status --json"))?;
        let status: Status =
            serde_json::from_str(&words).with_context(|| format!("not a status: {words:?}"))?;
        status.module.context("the module does not tell its counters")
    }
}

/// The way there, all memory compared.
pub(super) fn by_reference(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    let from = lab.guest_host()?;
    let report = migrate(lab, from, Options { stock: false, verify: true })?;
    ensure!(
        report.verify_mismatches == Some(0),
        "pages differ at the target, or none was compared: {report:?}"
    );
    ensure!(report.pages_verified.unwrap_or(0) > 0, "no page was compared: {report:?}");
    most_were_accepted(&report)?;
    let (referenced, refused) =
        (report.pages_referenced.unwrap_or(0), report.pages_refused.unwrap_or(u64::MAX));
    ensure!(
        refused * 50 <= referenced,
        "{refused} of {referenced} references were refused on an idle pool: over 2 %"
    );
    ensure!(report.pages_zero.unwrap_or(0) > 0, "no zero page went as a marker");
    ensure!(proof::server(lab)? == bed.server, "mysqld is another process");
    only_here(lab, from.other())
}

/// That at least 90 % of the pool's clean frames went by reference and were taken from storage.
pub(super) fn most_were_accepted(report: &Report) -> Result<()> {
    let lists = report.lists.clone().context("the migration used no lists")?;
    let accepted =
        report.pages_accepted.context("the report does not say how many references were accepted")?;
    ensure!(
        accepted * 10 >= lists.pool_frames_clean * 4 * 9,
        "{accepted} pages accepted of {} clean frames of 4 pages: less than 90 %",
        lists.pool_frames_clean
    );
    Ok(())
}

/// That the hypervisors know one domain beside dom0, on this host, and that it runs.
pub(super) fn only_here(lab: &Lab, here: Host) -> Result<()> {
    wait_for("the hypervisor of the other host to have forgotten the domain", || {
        Ok(Deployment::domains(lab, here.other())?.is_empty())
    })?;
    let domains = Deployment::domains(lab, here)?;
    ensure!(domains.len() == 1 && domains.iter().all(Domain::runs), "not one running domain: {domains:?}");
    Ok(())
}

/// Every row of every table is what it was when the guest's disk was made.
pub(super) fn tables_whole(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    let tables = proof::tables(lab)?;
    ensure!(
        proof::checksums(lab, &tables)? == proof::expected_checksums(lab)?,
        "row checksums are not what they were"
    );
    proof::check_tables(lab, &tables).map(drop)
}

/// After the guest has come from elsewhere, and nothing in it was started anew: the module has made its nodes and its event channel, and
/// the probe answers.
pub(super) fn lists_again(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    let at = lab.guest_host()?;
    let node = format!("/local/domain/$(xl domid {DOMAIN})/data/poolskip");
    wait_for("the module to announce itself", || {
        Ok(lab.host(at).run(&format!("xenstore-exists {node}/version"), LIMIT)?.status == 0)
    })?;
    let before = Counters::read(lab)?;
    ask_for_lists(lab, at)?;
    let after = Counters::read(lab)?;
    ensure!(after.announced, "the module could not announce itself: {after:?}");
    // A signal that the hypervisor refuses, for the channel is not there, is not counted.
    ensure!(
        (after.requests, after.signals) == (before.requests + 1, before.signals + 1),
        "one request and one signal: {before:?}, then {after:?}"
    );
    kernel_is_content(lab)
}

/// Asks the guest for its lists as a migration does, by the store of the host that has it.
pub(super) fn ask_for_lists(lab: &Lab, at: Host) -> Result<()> {
    let answer = host(
        lab,
        at,
        &format!(
            "node=/local/domain/$(xl domid {DOMAIN})/data/poolskip; last=$(xenstore-read $node/request); n=$((${{last%% *}} + 1)); \
             xenstore-write $node/request \"$n snapshot\"; \
             for i in $(seq 240); do answer=$(xenstore-read $node/answer); [ \"${{answer% *}}\" = $n ] && {{ echo $answer; exit 0; }}; \
             sleep 0.5; done; echo \"request $n is not answered: $answer\" >&2; exit 1"
        ),
    )?;
    let generation: u64 = answer.trim().rsplit(' ').next().unwrap_or_default().parse()?;
    ensure!(generation > 0, "the guest answers that it has no lists: {answer:?}");
    Ok(())
}

/// `xl save` and `xl restore`, by the stock helper: the guest is the same, and dom0 gets its lists again.
pub(super) fn saved_and_restored(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    let at = lab.guest_host()?;
    host(lab, at, &format!("xl save {DOMAIN} {SAVED}"))?;
    ensure!(Deployment::domains(lab, at)?.is_empty(), "the saved domain is still there");
    host(lab, at, &format!("xl restore {SAVED} && rm {SAVED}"))?;
    ensure!(proof::server(lab)? == bed.server, "mysqld is another process");
    ensure!(proof::query(lab, "SELECT 1")?.trim() == "1", "the server does not answer");
    only_here(lab, at)?;
    lists_again(bed)
}

/// The probe ends, the module goes, and nothing of it is left in xenstore.
pub(super) fn unload(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    let at = lab.guest_host()?;
    let announced = format!("xenstore-exists /local/domain/$(xl domid {DOMAIN})/data/poolskip");
    bed.deployment.stop_probe(lab)?;
    ensure!(lab.host(at).run(&announced, LIMIT)?.status == 0, "the module has announced nothing in xenstore");
    guest(lab, "rmmod poolskip")?;
    ensure!(lab.host(at).run(&announced, LIMIT)?.status != 0, "the module's nodes are still in xenstore");
    kernel_is_content(lab)
}

/// Unloads the module if it is loaded.
pub(super) fn without_module(bed: &Bed<'_>) -> Result<()> {
    if guest(&bed.lab, "cat /proc/modules")?.lines().any(|line| line.starts_with("poolskip ")) {
        unload(bed)?;
    }
    Ok(())
}

/// The boot test's table of cases, beside the database.
pub(super) fn module_cases(bed: &Bed<'_>) -> Result<()> {
    without_module(bed)?;
    module_test::in_guest(&bed.lab)
}

/// Whether a host's hypervisor logs the pages that some domain dirties.
///
/// # Errors
/// When it tells nothing of its domains.
pub(super) fn is_log_dirty(lab: &Lab, at: Host) -> Result<bool> {
    let words = host(lab, at, "xl dmesg -c >/dev/null; xl debug-keys q; sleep 1; xl dmesg")?;
    ensure!(
        words.contains("General information for domain"),
        "the hypervisor says nothing of its domains: {words}"
    );
    Ok(words.contains("log_dirty"))
}

/// The guest's kernel has nothing to complain of.
pub(super) fn kernel_is_content(lab: &Lab) -> Result<()> {
    let words = guest(lab, "dmesg")?;
    for bad in ["WARNING:", "BUG:", "Oops", "Call Trace", "INFO: task", "general protection"] {
        ensure!(!words.contains(bad), "the guest's kernel log has {bad:?}:\n{words}");
    }
    Ok(())
}

/// Looks until it is true.
pub(super) fn wait_for(what: &str, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !look().with_context(|| format!("while waiting for {what}"))? {
        if start.elapsed() > PATIENCE {
            bail!("waited {} s for {what}, in vain", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}
