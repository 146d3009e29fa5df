//! A migration to a host whose storage is slow: for a case of the lab and for a bench.

use anyhow::{Result, ensure};

use crate::lab::Lab;
use crate::step::step;

/// What the target's storage gave, in bytes per second.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Just before.
    pub usual: u64,
    /// Slowed to a tenth.
    pub slowed: u64,
}

/// Does something while the storage of the host that the guest is not on gives a tenth of what it gives now.
///
/// # Errors
/// Those of `work`; and when the storage did not become slow, so that nothing was tried.
pub fn at_a_tenth<T>(lab: &Lab, work: impl FnOnce() -> Result<T>) -> Result<(T, Rates)> {
    let to = lab.guest_host()?.other();
    let rates = step("slowing the target's storage to a tenth", || {
        let usual = lab.disk_rate(to)?;
        lab.set_disk_rate(to, Some(usual / 10))?;
        Ok(Rates { usual, slowed: lab.disk_rate(to)? })
    })?;
    // Its limit, and what the limit lets through at once.
    ensure!(rates.slowed * 5 < rates.usual, "the storage did not become slow: {rates:?}");
    let done = work();
    lab.set_disk_rate(to, None)?;
    done.map(|done| (done, rates))
}
