//! x
use super::figures::Report;
use anyhow::Result;
/// x
#[derive(Debug, clap::Args)]
pub struct Args {}
pub fn run(_: &Args) -> Result<Report> {
    Ok(Report { bench: "scale".into(), figures: vec![] })
}
