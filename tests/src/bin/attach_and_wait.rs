//! Attaches probes to the mysqld whose PID is its argument and waits to be killed: for the test of what a killed probe leaves behind.

use anyhow::{Context, Result};
use guest_probe::session::{Options, Session};

fn main() -> Result<()> {
    let pid = std::env::args().nth(1).context("the PID of a mysqld is needed")?.parse()?;
    let session = Session::start(&Options { pid: Some(pid), ..Options::default() })?;
    loop {
        std::thread::park();
        assert!(!session.probes().attached().is_empty());
    }
}
