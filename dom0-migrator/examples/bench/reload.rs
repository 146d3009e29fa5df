//! References read by the restorer.

use crate::Failed;

/// What to measure.
#[derive(clap::Args)]
pub struct Args {}

/// Measures.
pub fn run(_args: &Args) -> Result<(), Failed> {
    Err("not yet".into())
}
