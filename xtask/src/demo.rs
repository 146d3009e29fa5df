//! In the making.

use anyhow::Result;

/// In the making.
#[derive(clap::Args)]
pub struct Args {}

/// In the making.
///
/// # Errors
/// Always, for now.
pub fn run(_args: &Args) -> Result<()> {
    anyhow::bail!("in the making")
}
