//! Cases of an HVM guest, which boots as a computer does and has a device model: a process of dom0 whose state travels as well.

use anyhow::{Context, Result, bail, ensure};

use super::bed::{Bed, Case};
use super::guest_cases::{by_reference, lists_again, saved_and_restored, tables_whole, wait_for};
use super::{emulated, xl_case};
use crate::deployment::{DEVICE_WRITER, LIMIT, guest, host};
use crate::lab::{Flavour, Host, Lab};
use crate::migration::DOMAIN;

/// The scratch register of the first serial port (16450 and later: base 0x3f8, register 7). Neither Xen nor the guest's Linux keeps what
/// is in it: only the device model does.
const SCRATCH: u16 = 0x3ff;

/// The device model, as `pgrep -f` finds it and not itself.
const DEVICE_MODEL: &str = "[x]en-qemu-system-i386";

/// What ends the program that has the device model write, and where that then says what it found.
const STOP: &str = "/run/device-writer.stop";
const WRITTEN: &str = "/run/device-writer.log";

/// Words that it writes meanwhile at the least: with its pauses of 20 ms that is a second, and a migration takes a minute.
const LEAST: u64 = 50;

/// All cases of the HVM guest, in their order.
pub(super) const CASES: [Case; 5] = [
    ("hvm_a_listed_pool_goes_by_reference_and_every_page_is_equal", with_its_devices),
    ("hvm_tables_and_rows_are_what_they_were", tables_whole),
    ("hvm_lists_come_again_after_the_guest_has_arrived", lists_again),
    ("hvm_xl_migrate_uses_references_by_the_variable_alone", xl_case::by_the_variable_alone),
    ("hvm_lists_come_again_after_save_and_restore", saved_and_restored),
];

/// Runs all cases whose names have one of `only` in them, or simply all; stops at the first that fails.
///
/// # Errors
/// That of the first case that fails.
pub(super) fn run(only: &[String]) -> Result<()> {
    emulated::run(Flavour::Hvm, &CASES, only)
}

/// The way there, all memory compared, while the device model writes into the guest's memory: all that it wrote is there, and the target's
/// device model knows what the guest has told the source's.
fn with_its_devices(bed: &Bed<'_>) -> Result<()> {
    let lab = &bed.lab;
    let from = lab.guest_host()?;
    one_device_model(lab, from)?;
    // What a device model of its own would not have.
    let told = !scratch(lab)?;
    guest(lab, &format!("printf '\\x{told:02x}' | dd of=/dev/port bs=1 count=1 seek={SCRATCH} 2>/dev/null"))?;
    ensure!(scratch(lab)? == told, "the device model has no register {SCRATCH:#x}");
    bed.deployment.install_device_writer(lab)?;
    let writer = format!("{{ {DEVICE_WRITER} {STOP} || echo ended with $?; }} </dev/null >{WRITTEN} 2>&1 &");
    guest(lab, &format!("rm -f {STOP}; {writer}"))?;
    let said = |enough: &[&str]| {
        let mut words = String::new();
        wait_for("the device model to have written", || {
            words = guest(lab, &format!("cat {WRITTEN}"))?;
            Ok(enough.iter().any(|part| words.contains(part)))
        })?;
        Ok::<_, anyhow::Error>(words)
    };
    let before = written_before(&said(&["written ", " of ", "ended "])?)?;
    by_reference(bed)?;
    guest(lab, &format!("touch {STOP}"))?;
    let words = said(&[" of ", "ended "])?;
    let all = all_is_there(&words, before)?;
    println!(
        "words of four bytes that the device model wrote, all of them there: {all}, {before} of them before the migration"
    );
    one_device_model(lab, from.other())?;
    let now = scratch(lab)?;
    ensure!(
        now == told,
        "the guest wrote {told:#04x} into its device, which has {now:#04x} after the migration"
    );
    Ok(())
}

/// How much had been written before the migration, as the writer says.
fn written_before(words: &str) -> Result<u64> {
    let counts: Option<Vec<u64>> =
        words.lines().map(|line| line.strip_prefix("written ")?.parse().ok()).collect();
    counts
        .and_then(|counts| counts.last().copied())
        .with_context(|| format!("the device model could not be made to write: {words:?}"))
}

/// What the writer says at its end: so many are there, of so many that were written, more than `before`; how many.
fn all_is_there(words: &str, before: u64) -> Result<u64> {
    let last = words.lines().last().unwrap_or_default();
    let mut counts = last.split(" of ").map(str::parse::<u64>);
    let (Some(Ok(there)), Some(Ok(written)), None) = (counts.next(), counts.next(), counts.next()) else {
        bail!("the device model could not be made to write: {words:?}");
    };
    ensure!(
        written >= before + LEAST,
        "{before} words were written before the migration, and {written} after it: too few meanwhile"
    );
    ensure!(
        there == written,
        "of {written} words that the device model wrote {} are lost",
        written.abs_diff(there)
    );
    Ok(written)
}

/// That the guest's device model runs on this host, and none on the other.
fn one_device_model(lab: &Lab, here: Host) -> Result<()> {
    let status = host(lab, here, &format!("xl qemu-monitor-command {DOMAIN} 'info status'"))?;
    ensure!(status.contains("running"), "the device model does not run: {status:?}");
    let count = lab.host(here.other()).run(&format!("pgrep -c -f {DEVICE_MODEL}"), LIMIT)?.stdout;
    ensure!(count.trim() == "0", "{} device models where the guest is not", count.trim());
    Ok(())
}

/// What is in the scratch register.
fn scratch(lab: &Lab) -> Result<u8> {
    let words =
        guest(lab, &format!("dd if=/dev/port bs=1 count=1 skip={SCRATCH} 2>/dev/null | od -An -tu1"))?;
    words.trim().parse().with_context(|| format!("the register has no value: {words:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_that_is_lost_is_a_failure_and_so_is_a_program_that_wrote_none_meanwhile() {
        let lines = "written 50\nwritten 100\nrefused after 149\n";
        assert_eq!(all_is_there(&format!("{lines}149 of 149\n"), 50).unwrap(), 149);
        for (words, before) in [
            (format!("{lines}148 of 149\n"), 50),
            (format!("{lines}149 of 149\n"), 100),
            ("0 of 0\n".into(), 0),
            (lines.into(), 50),
            ("written 50\nended with 139\n".into(), 0),
            ("Error: ioperm\nended with 1\n".into(), 0),
            (String::new(), 0),
        ] {
            assert!(all_is_there(&words, before).is_err(), "{words:?}");
        }
        assert_eq!(written_before("written 50\nwritten 100\n").unwrap(), 100);
        for words in ["refused after 0\n", "written 50\nended with 139\n", "0 of 0\n", ""] {
            assert!(written_before(words).is_err(), "{words:?}");
        }
    }
}
