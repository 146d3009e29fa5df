//! Costs of a made-up guest of so many GiB, as JSON: `scale-sim GIB DIR`, where DIR has room for 300 MB. A process for each size, so
//! that memory is that of this size.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tests::scale::{SAMPLED_PAGES, cost};

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let gib =
        arguments.next().and_then(|word| word.to_str()?.parse().ok()).context("usage: scale-sim GIB DIR")?;
    let dir = arguments.next().map(PathBuf::from).context("usage: scale-sim GIB DIR")?;
    println!("{}", serde_json::to_string(&cost(gib, SAMPLED_PAGES, &dir)?)?);
    Ok(())
}
