//! Cases of a PVH guest, on hosts with another Xen and another kernel than the PV guest's.

use anyhow::Result;

use super::bed::Case;
use super::guest_cases::{by_reference, lists_again, module_cases, saved_and_restored, tables_whole, unload};
use super::{emulated, lab_cases, storage_cases, xl_case};
use crate::lab::Flavour;

/// All cases of the PVH guest, in their order.
pub(super) const CASES: [Case; 11] = [
    ("pvh_a_listed_pool_goes_by_reference_and_every_page_is_equal", by_reference),
    ("pvh_a_disk_that_fails_half_way_is_done_without", storage_cases::failing),
    ("pvh_xl_migrate_uses_references_by_the_variable_alone", xl_case::by_the_variable_alone),
    ("pvh_storage_at_a_tenth_costs_time", storage_cases::slow),
    ("pvh_storage_at_a_tenth_changes_no_byte", storage_cases::slow_and_compared),
    ("pvh_tables_and_rows_are_what_they_were", tables_whole),
    ("pvh_lists_come_again_after_the_guest_has_arrived", lists_again),
    ("pvh_lists_come_again_after_save_and_restore", saved_and_restored),
    // Behind it tables have other rows, and the probe goes on giving wrong hints.
    (
        "pvh_wrong_hints_change_no_byte_and_lose_no_transaction_of_a_client_that_writes",
        lab_cases::misled_while_writing,
    ),
    ("pvh_module_unloads_and_leaves_no_node", unload),
    ("pvh_module_passes_its_cases_beside_the_database", module_cases),
];

/// Runs all cases whose names have one of `only` in them, or simply all; stops at the first that fails.
///
/// # Errors
/// That of the first case that fails.
pub(super) fn run(only: &[String]) -> Result<()> {
    emulated::run(Flavour::Pvh, &CASES, only)
}
