//! The demo's figures as a person would look at them.

use std::fmt::Write;

use super::{Figures, Measured};

/// Width of a full bar, in characters.
const BAR: usize = 44;

/// Stock and Poolskip side by side.
pub fn table(figures: &Figures) -> String {
    let mut out = String::new();
    // Writing into a String cannot fail.
    let _ = write_table(&mut out, figures);
    out
}

fn write_table(out: &mut String, f: &Figures) -> std::fmt::Result {
    let (stock, ours) = (&f.stock, &f.poolskip);
    writeln!(
        out,
        "\nGuest: {} MiB, buffer pool {} MiB, {} clean frames; link {} Mbit/s\n",
        f.guest.memory_bytes >> 20,
        f.guest.pool_bytes >> 20,
        f.guest.pool_frames_clean,
        f.link_bits_per_second / 1_000_000
    )?;
    let pair = |out: &mut String, name: &str, unit: &str, get: &dyn Fn(&Measured) -> f64| {
        let (a, b) = (get(stock), get(ours));
        let most = a.max(b).max(f64::MIN_POSITIVE);
        writeln!(out, "{name}")?;
        writeln!(out, "  stock    {:<BAR$} {a:>8.1} {unit}", bar(a / most))?;
        writeln!(out, "  Poolskip {:<BAR$} {b:>8.1} {unit}  {:+.0} %", bar(b / most), (b / a - 1.0) * 100.0)
    };
    pair(out, "total time", "s", &|m| m.report.total_seconds)?;
    pair(out, "bytes on the wire", "MB", &|m| m.report.wire_bytes as f64 / 1e6)?;
    pair(out, "downtime, as seen inside the guest", "s", &|m| m.downtime_seconds)?;
    writeln!(out, "\n{:<28}{:>12}{:>12}", "pages of 4 KiB", "stock", "Poolskip")?;
    let mut row = |name: &str, get: &dyn Fn(&Measured) -> Option<u64>| {
        let show = |m| get(m).map_or_else(|| "-".to_owned(), |n| n.to_string());
        writeln!(out, "{name:<28}{:>12}{:>12}", show(stock), show(ours))
    };
    row("  sent whole", &|m| m.report.pages_sent)?;
    row("  zero", &|m| m.report.pages_zero)?;
    row("  by reference", &|m| m.report.pages_referenced)?;
    row("    taken from storage", &|m| m.report.pages_accepted)?;
    row("    refused", &|m| m.report.pages_refused)?;
    row("rounds", &|m| m.report.rounds)?;
    writeln!(
        out,
        "\nframes listed                read {}, written {}, of {} clean ones",
        f.guest.frames_listed_read, f.guest.frames_listed_written, f.guest.pool_frames_clean
    )?;
    writeln!(
        out,
        "proof                        {} pages compared, {} differ; mysqld restarted {} times; {} tables OK; checksums {}",
        f.proof.pages_verified,
        f.proof.verify_mismatches,
        f.proof.mysqld_restarts,
        f.proof.tables,
        if f.proof.checksums_equal { "equal" } else { "DIFFER" }
    )?;
    let writing = &f.wrong_hints_while_writing;
    writeln!(
        out,
        "wrong hints, client writes   {} refused, {} accepted, {} differ ({} more by packets after the suspension); {} transactions acknowledged, all there",
        writing.pages_refused,
        writing.pages_accepted,
        writing.verify_mismatches,
        writing.verify_late_writes,
        writing.transactions_acknowledged
    )
}

fn bar(share: f64) -> String {
    let full = (share.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    "█".repeat(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_share() {
        assert_eq!(bar(1.0).chars().count(), BAR);
        assert_eq!(bar(0.5).chars().count(), BAR / 2);
        assert_eq!(bar(7.0).chars().count(), BAR);
        assert_eq!(bar(-1.0), "");
    }
}
