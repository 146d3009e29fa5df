//! Answers first: dom0 waits for the lists, and so does a whole migration.
//!
//! Beside a busy server the probe gets its share of the processor and no more, so that an answer takes as many times longer as there are
//! others who want to run. While it builds one it is worth more to the scheduler; the work is the same, and so is what the server loses by it.
//! No capability is kept for that: `RLIMIT_NICE` is raised before they are given up.

use std::io;
use std::marker::PhantomData;

use nix::sys::resource::{Resource, setrlimit};

/// The nice value while an answer is built: about nine times the weight of the usual one.
const URGENT: i32 = -10;

/// Lets this process be [`Urgent`] later. To be called while it has `CAP_SYS_RESOURCE`.
///
/// # Errors
/// When the kernel does not let it.
pub fn allow() -> io::Result<()> {
    // The limit counts from 20 downwards, so that it has no negative values.
    let limit = (20 - URGENT) as u64;
    Ok(setrlimit(Resource::RLIMIT_NICE, limit, limit)?)
}

/// This thread is urgent for as long as this lives.
#[derive(Debug)]
pub struct Urgent {
    before: i32,
    /// It is this thread's, and must be dropped by it.
    of_this_thread: PhantomData<*const ()>,
}

impl Urgent {
    /// Begins; `None` where that is not allowed: then an answer takes as long as it takes. A thread that is at least as urgent stays as it is.
    pub fn begin() -> Option<Self> {
        let before = nice();
        let set = before.min(URGENT);
        set_nice(set).inspect_err(|error| tracing::debug!(%error, "answers are not urgent")).ok()?;
        Some(Self { before, of_this_thread: PhantomData })
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        // To be less urgent is always allowed.
        let _ = set_nice(self.before);
    }
}

/// This thread's nice value.
fn nice() -> i32 {
    // SAFETY: a system call with integers; of one's own thread it cannot fail.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

fn set_nice(value: i32) -> io::Result<()> {
    // SAFETY: a system call with integers. Of PRIO_PROCESS, 0 is the calling thread.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::privileges;

    #[test]
    fn one_is_urgent_without_a_capability_and_then_as_before() {
        // In a thread of its own, since capabilities and nice values are a thread's.
        let outcome = std::thread::spawn(|| {
            let allowed = allow();
            privileges::give_up().unwrap();
            let before = nice();
            let urgent = Urgent::begin();
            let meanwhile = nice();
            let began = urgent.is_some();
            drop(urgent);
            (allowed.is_ok(), began, before, meanwhile, nice())
        });
        let (allowed, began, before, meanwhile, after) = outcome.join().unwrap();
        // Who may not raise the limit may not be urgent, and nothing else comes of it.
        assert_eq!(began, allowed || before <= URGENT);
        assert_eq!(meanwhile, if began { before.min(URGENT) } else { before });
        assert_eq!(after, before);
    }
}
