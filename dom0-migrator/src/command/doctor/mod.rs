//! `doctor`: whether this host can migrate, and with a HOST whether it can migrate to that one. It changes nothing.

mod certificates;
mod local;
pub mod remote;

use clap::Args;
use serde::Serialize;

use super::configuration::{Configuration, Connecting};
use super::{EXIT_FAILED, EXIT_MIGRATED, connection};
use crate::control::STREAM_VERSION;
use crate::examination::{Finding, Host, State};
use crate::xen::release::Release;

pub use certificates::fingerprint;

/// Options of `doctor`.
#[derive(Args, Clone, Debug)]
pub struct Doctor {
    /// Another host, where `receive` listens: HOST or HOST:PORT (8002 when not given).
    #[arg(value_name = "HOST[:PORT]")]
    pub host: Option<String>,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    /// Do not fill the link for a second to see how fast it is.
    #[arg(long, requires = "host")]
    pub no_link: bool,
    /// How to connect.
    #[command(flatten)]
    pub connecting: Connecting,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
struct Report {
    /// On this host.
    here: Vec<Finding>,
    /// On the other one, as its own `doctor` says.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    there: Vec<Finding>,
    /// Between the two.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    between: Vec<Finding>,
}

impl Report {
    fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.here.iter().chain(&self.there).chain(&self.between)
    }
}

/// Looks, and shows what it found. 0 when nothing is bad, 1 when something is.
pub fn run(options: &Doctor, configuration: &Configuration) -> u8 {
    let mut report = Report {
        here: local::look(configuration, &options.connecting),
        there: Vec::new(),
        between: Vec::new(),
    };
    if let Some(host) = &options.host {
        let target = connection::with_port(host);
        (report.there, report.between) = remote::look(&target, options, configuration);
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report).unwrap_or_default());
    } else {
        print("This host", &report.here);
        if let Some(host) = &options.host {
            print(host, &report.there);
            print(&format!("Between this host and {host}"), &report.between);
        }
    }
    let bad = report.findings().filter(|finding| finding.state == State::Bad).count();
    if !options.json {
        match bad {
            0 => println!("\nReady."),
            1 => println!("\nNot ready: one thing is missing."),
            bad => println!("\nNot ready: {bad} things are missing."),
        }
    }
    if bad == 0 { EXIT_MIGRATED } else { EXIT_FAILED }
}

fn print(title: &str, findings: &[Finding]) {
    if findings.is_empty() {
        return;
    }
    println!("{title}");
    for Finding { what, state, found, way_out } in findings {
        let sign = match state {
            State::Good => "ok     ",
            State::Warning => "look at",
            State::Bad => "MISSING",
        };
        println!("  {sign}  {what}: {found}");
        if let Some(way_out) = way_out {
            println!("           → {way_out}");
        }
    }
}

/// How this host is, for another one that asks.
pub fn host(configuration: &Configuration, connecting: &Connecting) -> Host {
    let xl = local::Xl::ask();
    Host {
        version: env!("CARGO_PKG_VERSION").into(),
        stream_version: STREAM_VERSION,
        xen: Release::running().ok().map(|release| release.to_string()),
        free_mib: xl.as_ref().ok().and_then(local::Xl::free_mib),
        findings: local::look(configuration, connecting),
    }
}
