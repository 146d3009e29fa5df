//! What cases in the lab have in common: a lab with a guest, our programs in it, and the server as it was found.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::deployment::Deployment;
use crate::lab::{self, Flavour, Lab};
use crate::proof::{self, Server};
use crate::step::step;

/// A case: its name, and what it does.
pub(super) type Case = (&'static str, fn(&Bed<'_>) -> Result<()>);

/// A raised lab with the probe attached.
pub(super) struct Bed<'a> {
    /// The lab; each case finds the guest where the one before has left it.
    pub(super) lab: Lab,
    /// What was put into it.
    pub(super) deployment: &'a Deployment,
    /// mysqld, as it was before anything happened.
    pub(super) server: Server,
}

impl<'a> Bed<'a> {
    /// Raises a lab, puts everything into it and starts the probe.
    ///
    /// # Errors
    /// When one of these fails.
    pub(super) fn raise(deployment: &'a Deployment, flavour: Flavour) -> Result<Self> {
        let options = lab::Options { flavour, ..lab::Options::default() };
        let lab = step(&format!("the lab of a {} guest", flavour.name()), || Lab::warm(&options))?;
        deployment.install(&lab)?;
        deployment.start_probe(&lab, "")?;
        let server = proof::server(&lab)?;
        Ok(Self { lab, deployment, server })
    }

    /// Runs one case, and prints its line.
    ///
    /// # Errors
    /// That of the case.
    pub(super) fn try_case(&self, (name, work): Case) -> Result<()> {
        let start = Instant::now();
        let result = work(self).with_context(|| format!("case {name}"));
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        println!("lab case {name} ... {verdict} ({:.0} s)", start.elapsed().as_secs_f64());
        result
    }
}

/// Those cases that have one of `only` in their names, or simply all.
pub(super) fn chosen(cases: &[Case], only: &[String]) -> Vec<Case> {
    let is_wanted = |name: &str| only.is_empty() || only.iter().any(|only| name.contains(only));
    cases.iter().filter(|(name, _)| is_wanted(name)).copied().collect()
}
