//! Sees how long a guest stands still: reads the wall clock every few milliseconds and reports every gap.
//!
//! The wall clock and not the monotonic one: Linux stops the monotonic clock of a Xen guest while it is suspended. The hosts'
//! clocks must agree, which the lab sees to.
//!
//! ```text
//! guest-ticker FILE      appends to FILE a line "END_NS GAP_NS" for every gap of 20 ms and more, until it is killed
//! ```

use std::fs::File;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Time between two looks at the clock.
const TICK: Duration = Duration::from_millis(5);

/// Shorter gaps are scheduling, not downtime.
const REPORTED: Duration = Duration::from_millis(20);

fn main() -> std::io::Result<()> {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: guest-ticker FILE");
        std::process::exit(2);
    };
    let mut file = File::create(path)?;
    let mut last = now();
    writeln!(file, "{} 0", last.as_nanos())?;
    loop {
        std::thread::sleep(TICK);
        let this = now();
        // A clock that was set back shows as no gap.
        let gap = this.saturating_sub(last);
        if gap >= REPORTED {
            writeln!(file, "{} {}", this.as_nanos(), gap.as_nanos())?;
        }
        last = this;
    }
}

fn now() -> Duration {
    // A wall clock before 1970 is no time at all: it counts as 0.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
