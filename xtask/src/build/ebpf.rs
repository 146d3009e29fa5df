//! In the making.

use anyhow::Result;

/// Builds it.
///
/// # Errors
/// Always, for now.
pub fn build() -> Result<()> {
    anyhow::bail!("in the making")
}
