//! `cargo xtask build`: every part, with the toolchain that it needs.

pub mod ebpf;
pub mod module;
pub mod rust_src;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::deployment::target_directory;
use crate::lab::Kernel;

/// Build one part or all of Poolskip.
#[derive(clap::Args)]
pub struct Args {
    /// What to build
    #[arg(value_enum, default_value = "all")]
    part: Part,
    /// Of `ko`: the Debian suite whose newest kernel it is for
    #[arg(long, value_enum, default_value = "bookworm")]
    suite: Suite,
    /// Of `ko`: sign it with this private key (PEM)
    #[arg(long, value_name = "FILE", requires = "sign_certificate")]
    sign_key: Option<PathBuf>,
    /// Of `ko`: the key's certificate (PEM or DER)
    #[arg(long, value_name = "FILE", requires = "sign_key")]
    sign_certificate: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Everything
    All,
    /// The eBPF programs, into guest-probe's tree
    Ebpf,
    /// The kernel module's Rust core, into kernel-module's tree
    Module,
    /// The kernel module's sources for DKMS, into target/
    Dkms,
    /// The kernel module for one kernel, into target/
    Ko,
}

/// Debian suites, by the kernel that people run there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// Linux 6.1
    Bookworm,
    /// Linux 6.12
    Trixie,
    /// Linux 7
    Sid,
}

impl Suite {
    /// Those that the module must work on.
    pub const ALL: [Self; 3] = [Self::Bookworm, Self::Trixie, Self::Sid];

    /// As the archive calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }
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
    if args.part == Part::Dkms {
        let directory = module::layout::write(&target_directory()?)?;
        println!(
            "{}: copy it to /usr/src, then: dkms install poolskip/{}",
            directory.display(),
            module::layout::VERSION
        );
    }
    if args.part == Part::Ko {
        ko(args)?;
    }
    Ok(())
}

fn ko(args: &Args) -> Result<()> {
    module::check()?;
    let kernel = Kernel::of(args.suite.name())?;
    let built = module::link(&kernel)?;
    let bytes = match (&args.sign_key, &args.sign_certificate) {
        (Some(key), Some(certificate)) => {
            module::sign(&kernel, &built, &module::Signer { key, certificate })?
        }
        _ => fs::read(&built)?,
    };
    let to = target_directory()?.join(format!("poolskip-{}.ko", kernel.release));
    fs::write(&to, bytes).with_context(|| format!("cannot write {}", to.display()))?;
    println!("{}", to.display());
    Ok(())
}
