//! How much of dom0's memory a command takes, with all that it starts: a control group with a limit, which the kernel counts.

use anyhow::{Context, Result, bail};

use crate::deployment::host;
use crate::lab::{Host, Lab};

/// Where the second version of control groups is mounted.
const GROUPS: &str = "/run/groups";

/// What the shell does that becomes the command: from then on it may have so many bytes. Separated and complete, as
/// [`crate::migration::Before`] wants it.
pub(super) fn confine(name: &str, most_bytes: u64) -> String {
    format!(
        "g={GROUPS}; mkdir -p $g && {{ mountpoint -q $g || mount -t cgroup2 groups $g; }} && echo +memory >$g/cgroup.subtree_control \
         && mkdir $g/{name} && echo {most_bytes} >$g/{name}/memory.max && echo $BASHPID >$g/{name}/cgroup.procs || exit 1; "
    )
}

/// The bytes that it had at most; the group is gone then.
///
/// # Errors
/// When it came to its limit, or the kernel does not tell.
pub(super) fn peak(lab: &Lab, at: Host, name: &str) -> Result<u64> {
    let group = format!("{GROUPS}/{name}");
    let words = host(lab, at, &format!("cat {group}/memory.peak {group}/memory.events"))?;
    let peak = parse(&words).with_context(|| format!("of {name} on {at:?}"))?;
    // What goes on, as the xl that waits for its domain to end does, goes on outside.
    host(
        lab,
        at,
        &format!(
            "for p in $(cat {group}/cgroup.procs); do echo $p >{GROUPS}/cgroup.procs; done; \
             for i in $(seq 100); do rmdir {group} 2>/dev/null && exit 0; sleep 0.2; done; cat {group}/cgroup.procs >&2; exit 1"
        ),
    )
    .with_context(|| format!("something of {name} still runs on {at:?}"))?;
    Ok(peak)
}

fn parse(words: &str) -> Result<u64> {
    let mut lines = words.lines();
    let peak = lines.next().unwrap_or_default().trim();
    let peak = peak.parse().with_context(|| format!("no peak: {words:?}"))?;
    let mut events = 0;
    for line in lines {
        let (what, count) = line.split_once(' ').with_context(|| format!("no count: {line:?}"))?;
        if matches!(what, "max" | "oom" | "oom_kill") {
            events += 1;
            if count.trim() != "0" {
                bail!("it came to its limit: {what} {count} times, at {peak} bytes");
            }
        }
    }
    if events == 0 {
        bail!("the kernel does not say whether it came to its limit: {words:?}");
    }
    Ok(peak)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_counts_only_below_the_limit() {
        let words = "1048576\nlow 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n";
        assert_eq!(parse(words).unwrap(), 1 << 20);
        assert!(parse(&words.replace("max 0", "max 3")).is_err());
        assert!(parse(&words.replace("oom_kill 0", "oom_kill 1")).is_err());
        assert!(parse("1048576\n").is_err() && parse("").is_err());
    }
}
