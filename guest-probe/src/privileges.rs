//! What this program may do, cut down to what it needs.
//!
//! | capability | what for |
//! |---|---|
//! | `CAP_BPF`, `CAP_PERFMON` | eBPF programs, their maps, probes in another process |
//! | `CAP_SYS_PTRACE` | `/proc/PID/exe`, `fd` and `cwd` of mysqld, and its memory |
//! | `CAP_DAC_READ_SEARCH` | data files, which only mysqld's user may read; they are opened to be asked where they lie |
//! | `CAP_FOWNER` | which pages of a file are in memory: `mincore` tells a file's owner alone |
//! | `CAP_SYS_RESOURCE` | locked memory for maps before Linux 5.11 |
//! | `CAP_SYS_ADMIN` | the module's device when it is opened, the kernel's statistics, and each probe: perf's uprobes want it beside CAP_PERFMON |
//!
//! The last one is much. Linux 6.18 answers EACCES to a uprobe of perf without it; `uprobe_multi` links (6.6) may not want it, but aya 0.14
//! does not have them. It cannot be given up after the first attach either, since servers come and go.

use std::io;

/// The capabilities that are kept, by number and by name (linux/capability.h).
pub const NEEDED: [(u32, &str); 7] = [
    (2, "CAP_DAC_READ_SEARCH"),
    (FOWNER, "CAP_FOWNER"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (24, "CAP_SYS_RESOURCE"),
    (38, "CAP_PERFMON"),
    (39, "CAP_BPF"),
];

/// Number of `CAP_FOWNER`.
pub const FOWNER: u32 = 3;

/// `_LINUX_CAPABILITY_VERSION_3`: two words of 32 bits each.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Gives up every capability that is not needed from here on, for good, and that of gaining any by starting a program. It is this thread's
/// alone to lose, and that of threads which it starts later: call it before there are others.
///
/// # Errors
/// When the kernel does not do it.
pub fn give_up() -> io::Result<()> {
    let kept: u64 = NEEDED.iter().map(|(number, _)| 1 << number).sum();
    // SAFETY: a plain system call with integers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut sets = get()?;
    for (at, set) in sets.iter_mut().enumerate() {
        let word = (kept >> (32 * at)) as u32;
        // What is not there cannot be kept.
        set.permitted &= word;
        set.effective = set.permitted;
        set.inheritable = 0;
    }
    let header = Header { version: VERSION, pid: 0 };
    // SAFETY: the header says that two sets follow, which they do; both live through the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether this thread has a capability, by its number; not when the kernel does not say.
pub fn has(number: u32) -> bool {
    let set = get().ok().and_then(|sets| sets.get((number / 32) as usize).copied());
    set.is_some_and(|set| set.effective >> (number % 32) & 1 != 0)
}

fn get() -> io::Result<[Sets; 2]> {
    let mut sets = [Sets::default(); 2];
    let mut header = Header { version: VERSION, pid: 0 };
    // SAFETY: as in `give_up`; the kernel fills both sets.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(sets) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_is_gone() {
        // In a thread of its own: capabilities are a thread's.
        std::thread::spawn(|| {
            let before = get().unwrap();
            give_up().unwrap();
            let after = get().unwrap();
            let bits = |sets: &[Sets; 2]| u64::from(sets[0].permitted) | u64::from(sets[1].permitted) << 32;
            let needed: u64 = NEEDED.iter().map(|(number, _)| 1 << number).sum();
            assert_eq!(bits(&after), bits(&before) & needed);
            assert_eq!(after.map(|set| set.effective), after.map(|set| set.permitted));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_unit_gives_what_is_needed_and_no_more() {
        let unit = include_str!("../systemd/guest-probe.service");
        let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
        let mut given: Vec<&str> = line.split(' ').collect();
        let mut needed: Vec<&str> = NEEDED.iter().map(|(_, name)| *name).collect();
        given.sort_unstable();
        needed.sort_unstable();
        assert_eq!(given, needed);
    }
}
