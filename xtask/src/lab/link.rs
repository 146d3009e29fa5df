//! The link between the hosts: how fast it may be, and what went over it.

use std::time::Duration;

use anyhow::{Context, Result};

use super::machine::Machine;

/// How long `tc` may take under emulation.
const LIMIT: Duration = Duration::from_secs(60);

/// What went over the link since the hosts were started, in bytes with all headers, as the source's interface counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkBytes {
    /// From source to target.
    pub source_tx: u64,
    /// From target to source.
    pub source_rx: u64,
}

/// Limits what a host sends over the link, or lets it send as fast as emulation does.
///
/// # Errors
/// When `tc` refuses.
pub(super) fn set_rate(dom0: &Machine, bits_per_second: Option<u64>) -> Result<()> {
    dom0.must(&rate_command(bits_per_second), LIMIT).map(drop)
}

fn rate_command(bits_per_second: Option<u64>) -> String {
    match bits_per_second {
        // The burst has room for four of the link's large frames; the queue holds a fifth of a second.
        Some(rate) => format!("tc qdisc replace dev eth1 root tbf rate {rate}bit burst 256kb latency 200ms"),
        None => "tc qdisc replace dev eth1 root fq_codel".to_owned(),
    }
}

/// Reads the source's counters.
///
/// # Errors
/// When they cannot be read.
pub(super) fn bytes(source: &Machine) -> Result<LinkBytes> {
    parse(&source.must("cd /sys/class/net/eth1/statistics; echo $(<tx_bytes) $(<rx_bytes)", LIMIT)?)
}

fn parse(words: &str) -> Result<LinkBytes> {
    let (tx, rx) = words.trim().split_once(' ').with_context(|| format!("unexpected counters: {words:?}"))?;
    Ok(LinkBytes { source_tx: tx.parse()?, source_rx: rx.parse()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_two_numbers() {
        assert_eq!(parse("12 34\n").unwrap(), LinkBytes { source_tx: 12, source_rx: 34 });
        assert!(parse("12\n").is_err());
        assert!(parse("12 x\n").is_err());
    }

    #[test]
    fn a_rate_is_given_in_bits() {
        assert!(rate_command(Some(32_000_000)).contains("tbf rate 32000000bit "));
        assert!(!rate_command(None).contains("tbf"));
    }
}
