//! Cases that need two Xen hosts and a PV guest. One lab serves all of them; each finds the guest where the one before has left it.

use anyhow::{Context, Result, bail, ensure};

use super::bed::{Bed, Case, chosen};
use super::guest_cases::{
    Counters, PATIENCE, by_reference, is_log_dirty, lists_again, module_cases, most_were_accepted, only_here,
    saved_and_restored, tables_whole, unload, wait_for,
};
use super::hostile_case::hostile_guest;
use super::{storage_cases, xl_case};
use crate::demo::{Show, write_through};
use crate::deployment::{Deployment, LIMIT, host};
use crate::lab::{Flavour, Host, Lab};
use crate::migration::{DOMAIN, Options, certify, check, migrate_encrypted, start};
use crate::proof;

/// Those that take minutes each: they run when the part is named.
const LONG: [&str; 4] = [
    "xl_migrate_uses_references_by_the_variable_alone",
    "storage_at_a_tenth_costs_time",
    "storage_at_a_tenth_changes_no_byte",
    "hostile_lists_change_no_byte_open_no_file_and_take_no_memory",
];

/// All cases of the PV guest, in their order.
pub(super) const CASES: [Case; 17] = [
    ("a_dry_run_tells_what_will_be_and_changes_nothing", dry_run),
    ("a_listed_pool_goes_by_reference_and_every_page_is_equal", by_reference),
    ("a_disk_that_fails_half_way_is_done_without", storage_cases::failing),
    ("xl_migrate_uses_references_by_the_variable_alone", xl_case::by_the_variable_alone),
    ("storage_at_a_tenth_costs_time", storage_cases::slow),
    ("storage_at_a_tenth_changes_no_byte", storage_cases::slow_and_compared),
    ("tables_and_rows_are_what_they_were", tables_whole),
    ("lists_come_again_after_the_guest_has_arrived", lists_again),
    ("lists_come_again_after_save_and_restore", saved_and_restored),
    ("killed_source_helper_leaves_a_running_guest_and_nothing_else", |bed| {
        killed(&bed.lab, Victim::SourceHelper)
    }),
    ("killed_target_helper_leaves_a_running_guest_and_nothing_else", |bed| {
        killed(&bed.lab, Victim::TargetHelper)
    }),
    ("cancelled_migration_leaves_a_running_guest_and_nothing_else", |bed| {
        killed(&bed.lab, Victim::Migration)
    }),
    ("after_failures_a_second_attempt_works_encrypted", second_attempt),
    ("wrong_hints_change_no_byte_and_lose_no_transaction_of_a_client_that_writes", misled_while_writing),
    ("module_unloads_and_leaves_no_node", unload),
    ("hostile_lists_change_no_byte_open_no_file_and_take_no_memory", hostile_guest),
    ("module_passes_its_cases_beside_the_database", module_cases),
];

/// Runs all cases of the PV guest whose names have one of `only` in them, or simply all; stops at the first that fails, since what the guest
/// is then is not known.
///
/// # Errors
/// That of the first case that fails.
pub(super) fn run(only: &[String], with_long: bool) -> Result<()> {
    let mut cases = chosen(&CASES, only);
    if !with_long {
        cases.retain(|(name, _)| !LONG.contains(name));
        println!("in `cargo xtask test lab` alone, for they take minutes each: {}", LONG.join(", "));
    }
    if cases.is_empty() {
        return Ok(());
    }
    let deployment = Deployment::build(Flavour::Pv)?;
    let bed = Bed::raise(&deployment, Flavour::Pv)?;
    cases.into_iter().try_for_each(|case| bed.try_case(case))
}

/// Three migrations have failed meanwhile, and nothing in the guest was started anew.
fn second_attempt(bed: &Bed<'_>) -> Result<()> {
    certify(&bed.lab)?;
    most_were_accepted(&migrate_encrypted(&bed.lab, bed.lab.guest_host()?)?)
}

/// One comparison of all memory for two things: many hints are wrong, and a client writes all the while. What it dirties is told to
/// nobody: one request for the lists, one signal that they are there.
pub(super) fn misled_while_writing(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    bed.deployment.give_wrong_hints(lab)?;
    let before = Counters::read(lab)?;
    let writing = write_through(lab, bed.server, Show::Lines)?;
    ensure!(writing.pages_refused > 0, "wrong hints were given, and none was refused: they prove nothing");
    let after = Counters::read(lab)?;
    ensure!(
        after.requests == before.requests + 2 && after.signals == before.signals + 1,
        "a migration is two requests (the lists, begun) and one signal: {before:?}, then {after:?}"
    );
    let calls = after.calls - before.calls;
    // BEGIN, PUBLISH, and some ADDs: of many thousand runs each, a run being a page at least, for the pool's frames and for cached files.
    ensure!((4..=6).contains(&calls) && after.untold == before.untold, "{before:?}, then {after:?}");
    Ok(())
}

/// What `check` finds on a guest whose pool is warm, and that nothing is begun by it.
fn dry_run(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
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
    ensure!(proof::server(lab)? == bed.server, "mysqld is another process");
    only_here(lab, from)
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
    wait_for("dirty logging to be off", || Ok(!is_log_dirty(lab, from)?))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_minutes_is_a_case() {
        let is_case = |name: &&str| CASES.iter().any(|(case, _)| case == name);
        assert!(LONG.iter().all(is_case), "a name in LONG is that of no case");
    }
}
