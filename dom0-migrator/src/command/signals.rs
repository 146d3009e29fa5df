//! SIGINT and SIGTERM, as events rather than as the end of the process.

use nix::sys::signal::{SigSet, Signal};

/// The signals that ask this program to end.
fn asked() -> SigSet {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    signals
}

/// Blocks the signals, in this thread and all that follow, and calls `then` for each that comes, in a thread of its own.
///
/// # Errors
/// What the system says.
pub fn on_signal(mut then: impl FnMut(Signal) + Send + 'static) -> std::io::Result<()> {
    let signals = asked();
    signals.thread_block()?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while let Ok(signal) = signals.wait() {
                then(signal);
            }
        })
        .map(|_| ())
}

/// Lets the signals through again; for a child between fork and exec, which would inherit the block.
pub fn unblock() -> std::io::Result<()> {
    Ok(asked().thread_unblock()?)
}
