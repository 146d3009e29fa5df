//! Cases that need two Xen hosts and a guest. One lab serves all of them; each finds the guest where the one before has left it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::demo::{mislead, write_through};
use crate::deployment::{Deployment, Domain, LIMIT, guest, host};
use crate::lab::{self, Host, Lab};
use crate::migration::{DOMAIN, Options, certify, check, migrate, migrate_encrypted, start};
use crate::proof;
use crate::step::step;

/// How long a condition in the lab may take to come true.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs all cases whose names have `only` in them, or simply all; stops at the first that fails, since what the guest is then is not
/// known.
///
/// # Errors
/// That of the first case that fails; or when no case has such a name.
pub fn run(only: Option<&str>) -> Result<()> {
    let deployment = Deployment::build()?;
    let lab = step("the lab", || Lab::warm(&lab::Options::default()))?;
    deployment.install(&lab)?;
    deployment.start_probe(&lab, "")?;
    let server = proof::server(&lab)?;

    let cases: [(&str, &dyn Fn() -> Result<()>); 10] = [
        ("a_dry_run_tells_what_will_be_and_changes_nothing", &|| dry_run(&lab, server)),
        ("a_listed_pool_goes_by_reference_and_every_page_is_equal", &|| by_reference(&lab, server)),
        ("tables_and_rows_are_what_they_were", &|| tables_whole(&lab)),
        ("killed_source_helper_leaves_a_running_guest_and_nothing_else", &|| {
            killed(&lab, Victim::SourceHelper)
        }),
        ("killed_target_helper_leaves_a_running_guest_and_nothing_else", &|| {
            killed(&lab, Victim::TargetHelper)
        }),
        ("cancelled_migration_leaves_a_running_guest_and_nothing_else", &|| killed(&lab, Victim::Migration)),
        ("after_failures_a_second_attempt_works_encrypted", &|| {
            certify(&lab)?;
            migrate_encrypted(&lab, lab.guest_host()?).map(drop)
        }),
        ("wrong_hints_change_no_byte", &|| mislead(&lab, &deployment, server).map(drop)),
        ("no_acknowledged_transaction_is_lost_while_moving", &|| write_through(&lab, server).map(drop)),
        ("module_unloads_and_leaves_no_node", &|| unload(&lab, &deployment)),
    ];
    let chosen: Vec<_> =
        cases.iter().filter(|(name, _)| only.is_none_or(|only| name.contains(only))).collect();
    ensure!(!chosen.is_empty(), "no lab case has {:?} in its name", only.unwrap_or_default());
    for (name, work) in chosen {
        case(name, work)?;
    }
    Ok(())
}

fn case(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    let result = work().with_context(|| format!("case {name}"));
    let verdict = if result.is_ok() { "ok" } else { "FAILED" };
    println!("lab case {name} ... {verdict} ({:.0} s)", start.elapsed().as_secs_f64());
    result
}

/// What `check` finds on a guest whose pool is warm, and that nothing is begun by it.
fn dry_run(lab: &Lab, before: proof::Server) -> Result<()> {
    let from = lab.guest_host()?;
    let (status, found) = check(lab, from)?;
    ensure!(status == 0 && found.obstacles.is_empty(), "check ended with {status}: {found:?}");
    ensure!(found.samples > 0 && found.reference_bytes > 0.0, "no listed page was looked at: {found:?}");
    ensure!(
        found.samples_same * 10 >= found.samples * 9,
        "of {} listed pages that were looked at, {} are the same at the target: less than 90 %",
        found.samples,
        found.samples_same
    );
    ensure!(found.zero_bytes.unwrap_or(0.0) > 0.0, "no zero page was seen: {found:?}");
    let estimate = found.estimate.context("nothing was estimated")?;
    let (Some(stock), Some(ours)) = (estimate.stock.seconds, estimate.poolskip.seconds) else {
        bail!("a migration of an idle guest would not end: {estimate:?}");
    };
    let (stock_bytes, our_bytes) =
        (estimate.stock.wire_bytes.unwrap_or(0.0), estimate.poolskip.wire_bytes.unwrap_or(f64::MAX));
    println!(
        "check: stock {stock:.0} s and {:.0} MB, Poolskip {ours:.0} s and {:.0} MB",
        stock_bytes / 1e6,
        our_bytes / 1e6
    );
    ensure!(ours < stock && our_bytes < stock_bytes, "nothing would be gained: {estimate:?}");
    ensure!(proof::server(lab)? == before, "mysqld is another process");
    only_here(lab, from)
}

/// The way there, all memory compared.
fn by_reference(lab: &Lab, before: proof::Server) -> Result<()> {
    let from = lab.guest_host()?;
    let report = migrate(lab, from, Options { stock: false, verify: true })?;
    ensure!(
        report.verify_mismatches == Some(0),
        "pages differ at the target, or none was compared: {report:?}"
    );
    ensure!(report.pages_verified.unwrap_or(0) > 0, "no page was compared: {report:?}");
    let lists = report.lists.clone().context("the migration used no lists")?;
    let accepted =
        report.pages_accepted.context("the report does not say how many references were accepted")?;
    ensure!(
        accepted * 10 >= lists.pool_frames_clean * 4 * 9,
        "{accepted} pages accepted of {} clean frames of 4 pages: less than 90 %",
        lists.pool_frames_clean
    );
    let (referenced, refused) =
        (report.pages_referenced.unwrap_or(0), report.pages_refused.unwrap_or(u64::MAX));
    ensure!(
        refused * 50 <= referenced,
        "{refused} of {referenced} references were refused on an idle pool: over 2 %"
    );
    ensure!(report.pages_zero.unwrap_or(0) > 0, "no zero page went as a marker");
    ensure!(proof::server(lab)? == before, "mysqld is another process");
    only_here(lab, from.other())
}

/// That the hypervisors know one domain beside dom0, on this host, and that it runs.
fn only_here(lab: &Lab, here: Host) -> Result<()> {
    wait_for("the hypervisor of the other host to have forgotten the domain", || {
        Ok(Deployment::domains(lab, here.other())?.is_empty())
    })?;
    let domains = Deployment::domains(lab, here)?;
    ensure!(domains.len() == 1 && domains.iter().all(Domain::runs), "not one running domain: {domains:?}");
    Ok(())
}

fn tables_whole(lab: &Lab) -> Result<()> {
    let tables = proof::tables(lab)?;
    ensure!(
        proof::checksums(lab, &tables)? == proof::expected_checksums(lab)?,
        "row checksums are not what they were"
    );
    proof::check_tables(lab, &tables).map(drop)
}

/// Who is ended in the middle of a migration, and how.
#[derive(Clone, Copy)]
enum Victim {
    /// The source's save helper, by SIGKILL.
    SourceHelper,
    /// The target's restore helper, by SIGKILL.
    TargetHelper,
    /// The migration, by SIGTERM as an operator would.
    Migration,
}

/// Ends somebody in the middle of the first round, and looks at what is left.
fn killed(lab: &Lab, victim: Victim) -> Result<()> {
    let from = lab.guest_host()?;
    let before = proof::server(lab)?;
    // Slow enough that the first round lasts until the kill.
    lab.set_link_rate(Some(16_000_000))?;
    let result = kill_midway(lab, from, victim);
    lab.set_link_rate(None)?;
    result?;
    ensure!(lab.guest_host()? == from, "the guest is not where it was");
    ensure!(proof::server(lab)? == before, "mysqld is another process");
    ensure!(proof::query(lab, "SELECT 1")?.trim() == "1", "the server does not answer");
    wait_for("the other host to be clean", || {
        Ok(!host(lab, from.other(), "xl list")?.lines().any(|line| line.starts_with(DOMAIN)))
    })?;
    only_here(lab, from)?;
    wait_for("dirty logging to be off", || {
        let words = host(lab, from, "xl dmesg -c >/dev/null; xl debug-keys q; sleep 1; xl dmesg")?;
        ensure!(
            words.contains("General information for domain"),
            "the hypervisor says nothing of its domains: {words}"
        );
        Ok(!words.contains("log_dirty"))
    })?;
    wait_for("all helpers to be gone", || {
        let running = "pgrep -f -- '[-]-save-domain|[-]-restore-domain'";
        Ok(lab.host(from).run(running, LIMIT)?.status != 0
            && lab.host(from.other()).run(running, LIMIT)?.status != 0)
    })
}

fn kill_midway(lab: &Lab, from: Host, victim: Victim) -> Result<()> {
    let moved = || lab.link_bytes().map(|bytes| bytes.source_tx + bytes.source_rx);
    let before = moved()?;
    let started = start(lab, from, Options::default())?;
    wait_for("some megabytes to be on their way", || {
        ensure!(!started.sender.has_ended(), "the migration ended by itself: {}", started.sender.output());
        Ok(moved()? - before > 6_000_000)
    })?;
    match victim {
        Victim::SourceHelper => host(lab, from, "pkill -KILL -f -- '[-]-save-domain'").map(drop)?,
        Victim::TargetHelper => {
            host(lab, from.other(), "pkill -KILL -f -- '[-]-restore-domain'").map(drop)?
        }
        Victim::Migration => started.sender.signal("TERM")?,
    }
    let sent = started.sender.wait(PATIENCE)?;
    ensure!(sent.status != 0, "the migration says that it went well: {}", sent.stdout);
    let received = started.receiver.wait(PATIENCE)?;
    ensure!(received.status != 0, "the receiver says that it went well: {}", received.stdout);
    Ok(())
}

fn unload(lab: &Lab, deployment: &Deployment) -> Result<()> {
    let at = lab.guest_host()?;
    let announced = format!("xenstore-exists /local/domain/$(xl domid {DOMAIN})/data/poolskip");
    deployment.stop_probe(lab)?;
    ensure!(lab.host(at).run(&announced, LIMIT)?.status == 0, "the module has announced nothing in xenstore");
    guest(lab, "rmmod poolskip")?;
    ensure!(lab.host(at).run(&announced, LIMIT)?.status != 0, "the module's nodes are still in xenstore");
    let words = guest(lab, "dmesg")?;
    for bad in ["WARNING:", "BUG:", "Oops", "Call Trace"] {
        ensure!(!words.contains(bad), "the guest's kernel log has {bad:?}:\n{words}");
    }
    Ok(())
}

/// Looks until it is true.
fn wait_for(what: &str, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !look().with_context(|| format!("while waiting for {what}"))? {
        if start.elapsed() > PATIENCE {
            bail!("waited {} s for {what}, in vain", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}
