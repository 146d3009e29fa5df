//! `cargo xtask build`: every part, with the toolchain that it needs.

pub mod ebpf;
pub mod module;
mod rust_src;

use anyhow::Result;

/// Build one part or all of Poolskip.
#[derive(clap::Args)]
pub struct Args {
    /// What to build
    #[arg(value_enum, default_value = "all")]
    part: Part,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Everything
    All,
    /// The eBPF programs, into guest-probe's tree
    Ebpf,
    /// The kernel module's Rust core, into kernel-module's tree
    Module,
}

/// Builds.
///
/// # Errors
/// When a tool is missing or the code does not compile.
pub fn run(args: &Args) -> Result<()> {
    crate::setup::ensure()?;
    if matches!(args.part, Part::All | Part::Ebpf) {
        ebpf::build()?;
    }
    if matches!(args.part, Part::All | Part::Module) {
        module::build()?;
    }
    Ok(())
}
