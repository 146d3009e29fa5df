//! How cases of a guest run whose processor is emulated by hardware-assisted paging that is emulated itself.

use std::collections::VecDeque;

use anyhow::{Result, bail};

use super::bed::{Bed, Case, chosen};
use crate::deployment::Deployment;
use crate::lab::Flavour;

/// How often the emulation may end one case by a triple fault: with one migration of six that it ends, six in a row are no chance.
const MOST_FAULTS: u32 = 6;

/// Runs the cases whose names have one of `only` in them, or simply all; stops at the first that fails.
///
/// Under emulation about one migration of a PVH guest in six ends in a triple fault of the guest, with the stock helper too: state of
/// the hypervisor's is in the guest's registers then. The hypervisor says so by name. An HVM guest was ended so without a migration, while
/// it did nothing. Then, and only then, and only so many times, a new lab is raised and the case begun again; how often that was is
/// printed.
///
/// # Errors
/// That of the first case that fails.
pub(super) fn run(flavour: Flavour, cases: &[Case], only: &[String]) -> Result<()> {
    let mut left = VecDeque::from(chosen(cases, only));
    if left.is_empty() {
        return Ok(());
    }
    let deployment = Deployment::build(flavour)?;
    let (mut faults, mut in_a_row) = (0, 0);
    while !left.is_empty() {
        let bed = Bed::raise(&deployment, flavour)?;
        while let Some(&case) = left.front() {
            let Err(error) = bed.try_case(case) else {
                left.pop_front();
                in_a_row = 0;
                continue;
            };
            if !bed.lab.guest_faulted() {
                return Err(error);
            }
            faults += 1;
            in_a_row += 1;
            println!(
                "lab case {} ... to be begun again: triple fault of the emulated guest, {faults} so far",
                case.0
            );
            if in_a_row >= MOST_FAULTS {
                bail!(
                    "{in_a_row} triple faults of the guest in one case are no chance any more; the last one: {error:#}"
                );
            }
            break;
        }
    }
    println!(
        "cases of the {} guest: {faults} were begun again for a triple fault of the emulated guest",
        flavour.name()
    );
    Ok(())
}
