//! The lab: two real Xen hosts under QEMU, a link between them, a disk that both see, and a PV guest with a warmed MySQL.

mod dom0;
mod kernel;

pub use kernel::{guest_kernel_release, kernel_headers};

use anyhow::Result;

/// Raise, use and end the lab.
#[derive(clap::Args)]
pub struct Args {}

/// In the making.
///
/// # Errors
/// Always, for now.
pub fn run(_args: &Args) -> Result<()> {
    println!("{} {}", guest_kernel_release()?, kernel_headers()?.display());
    Ok(())
}
