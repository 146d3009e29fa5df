//! Which files a process of a host opens, with all that it starts: what the kernel saw, not what we asked for.
//!
//! A kprobe stands where every opening by name comes by, whichever system call asked for it, the start of a program too. It is kprobe events
//! of tracefs, which every Debian kernel has; what they tell is limited to one process and its offspring, threads as well. Workers of
//! io_uring are none: what it opened in their stead would not be seen (our programs ask it for reads, and for nothing else).

use anyhow::{Context, Result, bail, ensure};

use crate::deployment::host;
use crate::lab::{Host, Lab};

/// Where tracefs is mounted.
const TRACEFS: &str = "/sys/kernel/tracing";

/// What the shell does that becomes the process which is watched. Separated and complete, as [`crate::migration::Before`] wants it.
pub(super) fn watch() -> String {
    // Linux: `struct file *do_filp_open(int dfd, struct filename *pathname, const struct open_flags *op)`; a `struct filename` begins with
    // a pointer to the name.
    let probe = "p:poolskip/opened do_filp_open name=+0(+0(%si)):string";
    format!(
        "t={TRACEFS}; {{ mountpoint -q $t || mount -t tracefs tracefs $t; }} && echo 0 >$t/tracing_on && echo 0 >$t/events/enable \
         && echo >$t/kprobe_events && echo 8192 >$t/buffer_size_kb && echo >$t/trace && echo '{probe}' >$t/kprobe_events \
         && echo 1 >$t/options/event-fork && echo $BASHPID >$t/set_event_pid && echo 1 >$t/events/poolskip/opened/enable \
         && echo 1 >$t/events/syscalls/sys_enter_open_by_handle_at/enable && echo 1 >$t/tracing_on || exit 1; "
    )
}

/// A file that was opened, or was to be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Opened {
    /// The task's name.
    pub(super) task: String,
    /// What it named.
    pub(super) path: String,
}

/// What has been opened since [`watch`], and no more is watched.
///
/// # Errors
/// When something was lost, or opened in another way than by name.
pub(super) fn seen(lab: &Lab, at: Host) -> Result<Vec<Opened>> {
    let words = host(
        lab,
        at,
        &format!(
            "t={TRACEFS}; echo 0 >$t/tracing_on; grep -h -e overrun -e dropped $t/per_cpu/cpu*/stats; cat $t/trace; \
             echo 0 >$t/events/enable; echo >$t/set_event_pid; echo >$t/kprobe_events; echo >$t/trace"
        ),
    )?;
    parse(&words)
}

fn parse(words: &str) -> Result<Vec<Opened>> {
    let mut opened = Vec::new();
    let mut counts = 0;
    for line in words.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        if let Some((what @ ("overrun" | "commit overrun" | "dropped events"), count)) = line.split_once(": ")
        {
            ensure!(count.trim() == "0", "the kernel lost events: {what} {count}");
            counts += 1;
            continue;
        }
        ensure!(!line.contains("sys_open_by_handle_at"), "a file was opened by its handle: {line}");
        let (task, event) = line.split_once(" [").with_context(|| format!("not an event: {line:?}"))?;
        // Before the processor's number stands the task's name, and it may be anything.
        let is_processor = event.split_once(']').is_some_and(|(number, _)| {
            !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())
        });
        ensure!(is_processor, "a task whose name looks like an event: {line:?}");
        let task = task.trim().rsplit_once('-').with_context(|| format!("an event of no task: {line:?}"))?.0;
        let Some((_, path)) = event.split_once(" name=\"") else {
            bail!("an event without a name: {line:?}")
        };
        let path = path.strip_suffix('"').with_context(|| format!("a name without an end: {line:?}"))?;
        opened.push(Opened { task: task.to_owned(), path: path.to_owned() });
    }
    ensure!(counts > 0, "the kernel does not say whether events were lost");
    opened.sort();
    opened.dedup();
    Ok(opened)
}

/// What belongs to programs, to the kernel and to Xen, not to a domain.
const SYSTEM: [&str; 15] = [
    "/bin/",
    "/etc/",
    "/lib/",
    "/lib64/",
    "/lab/",
    "/proc/",
    "/run/",
    "/sys/",
    "/usr/",
    "/dev/xen/",
    "/tmp/poolskip-",
    "/var/lib/poolskip/",
    "/var/lib/xen/",
    "/var/log/xen/",
    "/var/run/xen/",
];
/// Single ones of that kind.
const SYSTEM_FILES: [&str; 3] = ["/dev/null", "/dev/urandom", "/dev/tty"];

/// Of what was opened, what is not the system's own: disks, first of all. A name that goes upwards, or does not begin at the root, is none
/// of the system's.
pub(super) fn beside_the_system(opened: &[Opened]) -> Vec<&Opened> {
    let is_system = |path: &str| {
        !path.split('/').any(|part| part == "..")
            && (SYSTEM_FILES.contains(&path) || SYSTEM.iter().any(|prefix| path.starts_with(prefix)))
    };
    opened.iter().filter(|opened| !is_system(&opened.path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "overrun: 0\ncommit overrun: 0\ndropped events: 0\n# tracer: nop\n#\n\
        \x20 dom0-migrator-512     [001] .....   123.456789: opened: (do_filp_open+0x0/0x130) name=\"/etc/ld.so.cache\"\n\
        \x20      a b-c [d-513     [000] d..1.   123.456790: opened: (do_filp_open+0x0/0x130) name=\"/dev/vdb\"\n\
        \x20      a b-c [d-513     [000] d..1.   123.456791: opened: (do_filp_open+0x0/0x130) name=\"/dev/vdb\"\n";

    fn opened(path: &str) -> Opened {
        Opened { task: "x".into(), path: path.into() }
    }

    #[test]
    fn a_trace_is_read() {
        let found = parse(&TRACE.replace(" [d", "")).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].task.as_str(), found[0].path.as_str()), ("a b-c", "/dev/vdb"));
        assert_eq!((found[1].task.as_str(), found[1].path.as_str()), ("dom0-migrator", "/etc/ld.so.cache"));
    }

    #[test]
    fn what_is_not_understood_is_no_proof() {
        // A task whose name could hide what it opened.
        assert!(parse(TRACE).is_err());
        let good = TRACE.replace(" [d", "");
        assert!(parse(&good.replace("overrun: 0\ncommit", "overrun: 3\ncommit")).is_err());
        assert!(parse(&good.replace("overrun: 0", "").replace("dropped events: 0", "")).is_err());
        assert!(parse(&good.replace("name=\"/dev/vdb\"", "name=(fault)")).is_err());
        assert!(parse("").is_err());
        let handle = "x-1 [000] ..... 1.0: sys_open_by_handle_at(mountdirfd: 3, handle: 0, flags: 0)\n";
        assert!(parse(&format!("{good}{handle}")).is_err());
    }

    #[test]
    fn a_disk_is_none_of_the_system_s_files() {
        let all = [
            opened("/usr/lib/x"),
            opened("/dev/vdb"),
            opened("/dev/xen/privcmd"),
            opened("/dev/xen/../vda"),
            opened("vda"),
            opened("/var/images/db2.raw"),
            opened("/dev/null"),
        ];
        let found: Vec<_> = beside_the_system(&all).into_iter().map(|it| it.path.as_str()).collect();
        assert_eq!(found, ["/dev/vdb", "/dev/xen/../vda", "vda", "/var/images/db2.raw"]);
    }
}
