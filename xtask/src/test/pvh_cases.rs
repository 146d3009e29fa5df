//! Cases of a PVH guest, on hosts with another Xen and another kernel than the PV guest's.

use std::collections::VecDeque;

use anyhow::{Result, bail};

use super::bed::{Bed, Case, chosen};
use super::guest_cases::{by_reference, lists_again, module_cases, saved_and_restored, tables_whole, unload};
use super::{storage_cases, xl_case};
use crate::deployment::Deployment;
use crate::lab::{Flavour, Host, Lab};

/// What the hypervisor says when a guest's processor can go on no longer.
const TRIPLE_FAULT: &str = "Triple fault";

/// How often the emulation may end a case by a triple fault: with one migration of six that it ends, six in a row are no chance.
const MOST_FAULTS: u32 = 6;

/// All cases of the PVH guest, in their order.
pub(super) const CASES: [Case; 9] = [
    ("pvh_a_listed_pool_goes_by_reference_and_every_page_is_equal", by_reference),
    ("pvh_a_disk_that_fails_half_way_is_done_without", storage_cases::failing),
    ("pvh_xl_migrate_uses_references_by_the_variable_alone", xl_case::by_the_variable_alone),
    ("pvh_storage_at_a_tenth_costs_time_and_nothing_else", storage_cases::slow),
    ("pvh_tables_and_rows_are_what_they_were", tables_whole),
    ("pvh_lists_come_again_after_the_guest_has_arrived", lists_again),
    ("pvh_lists_come_again_after_save_and_restore", saved_and_restored),
    ("pvh_module_unloads_and_leaves_no_node", unload),
    ("pvh_module_passes_its_cases_beside_the_database", module_cases),
];

/// Runs all cases whose names have one of `only` in them, or simply all; stops at the first that fails.
///
/// Under emulation about one migration of a PVH guest in six ends in a triple fault of the guest, with the stock helper too: state of
/// the hypervisor's is in the guest's registers then. The hypervisor says so by name. Then, and only then, and only so many times, a
/// new lab is raised and the case begun again; how often that was is printed.
///
/// # Errors
/// That of the first case that fails.
pub(super) fn run(only: &[String]) -> Result<()> {
    let mut left = VecDeque::from(chosen(&CASES, only));
    if left.is_empty() {
        return Ok(());
    }
    let deployment = Deployment::build(Flavour::Pvh)?;
    let mut faults = 0;
    while !left.is_empty() {
        let bed = Bed::raise(&deployment, Flavour::Pvh)?;
        while let Some(&case) = left.front() {
            let Err(error) = bed.try_case(case) else {
                left.pop_front();
                continue;
            };
            if !faulted(&bed.lab) {
                return Err(error);
            }
            faults += 1;
            println!(
                "lab case {} ... to be begun again: triple fault of the emulated guest, {faults} so far",
                case.0
            );
            if faults >= MOST_FAULTS {
                bail!("{faults} triple faults of the guest are no chance any more; the last one: {error:#}");
            }
            break;
        }
    }
    println!("cases of the PVH guest: {faults} were begun again for a triple fault of the emulated guest");
    Ok(())
}

/// Whether the hypervisor of either host has ended the guest by a triple fault.
fn faulted(lab: &Lab) -> bool {
    // A host that does not answer is another failure.
    Host::BOTH.iter().any(|host| lab.xl_dmesg(*host).is_ok_and(|words| words.contains(TRIPLE_FAULT)))
}
