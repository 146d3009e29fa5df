//! `cargo xtask`: builds, tries and tests Poolskip.

mod apt;
mod bench;
mod build;
mod cache;
mod cpio;
mod debian_root;
mod demo;
mod deploy;
mod deployment;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]
mod docs;
mod ending;
mod fuzz;
mod lab;
mod mariadb;
mod migration;
mod module_test;
mod mysql;
mod package;
mod partition;
mod plot;
mod proof;
mod setup;
mod step;
mod storage;
mod test;
mod volume_test;
mod workload;

use clap::{Parser, Subcommand};

/// Builds, tries and tests Poolskip. Two commands do everything: `demo` and `test`.
#[derive(Parser)]
#[command(name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the packages that the other commands need (they call it themselves)
    Setup(setup::Args),
    /// Build one part or all of Poolskip
    Build(build::Args),
    /// Raise, use and end the lab: two Xen hosts under QEMU and a guest with MySQL
    Lab(lab::Args),
    /// Migrate a database guest between two Xen hosts, with the stock helper and with Poolskip, and compare
    Demo(demo::Args),
    /// Measure speed, memory and bytes against a baseline of the same run
    Bench(bench::Args),
    /// Install Poolskip on a guest and its hosts over ssh, with a plan first, or remove it
    Deploy(deploy::Args),
    /// Make Debian packages for guests and hosts, and a tarball, in target/package
    Package(package::Args),
    /// Run the fuzz targets of every parser of foreign bytes
    Fuzz(fuzz::Args),
    /// Run all tests
    Test(test::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Setup(args) => setup::run(&args),
        Command::Build(args) => build::run(&args),
        Command::Lab(args) => lab::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Deploy(args) => deploy::run(&args),
        Command::Package(args) => package::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Test(args) => test::run(&args),
    }
}
