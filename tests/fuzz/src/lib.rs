//! Fuzz targets: one for each kind of bytes that come from somebody else.
//!
//! A target is a function of bytes that panics when something does not hold that must hold for any bytes. [`TARGETS`] has them all. They
//! are run in two ways:
//!
//! * `cargo xtask fuzz` builds the binary `fuzz`, in which libFuzzer makes up the bytes, guided by the coverage that the stable compiler's own
//!   `-C passes=sancov-module` counts;
//! * `cargo test` replays what lies in `corpus/TARGET/`, and tries inputs a little other than those, on any toolchain, with nothing else
//!   installed. Files named `found-…` there once made something fail.
//!
//! Where bytes alone do not come far, a target takes them for choices (`arbitrary`) and builds from them what almost would be right.

#![expect(clippy::unwrap_used, reason = "a target panics where something does not hold")]

mod allocation;
pub mod corpus;
mod fake_guest;
pub mod seeds;
pub mod shake;
mod targets;
pub mod watchdog;

pub use allocation::{Counting, Spent};
pub use targets::{TARGETS, Target};

/// What the model tests of the engine use, from where they have it.
pub use dom0_migrator::engine;
