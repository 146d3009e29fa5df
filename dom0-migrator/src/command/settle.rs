//! Doing what a record asks for: at the end of a migration, and by whoever finds one whose process is gone.
//!
//! Each step may be repeated: what is done already is found done.

use super::domain::{Domain, INCOMING};
use super::host::{self, HostError};
use crate::handover::record::{Record, RecordError, boot};
use crate::handover::{Duty, SourceEvent, SourceState, State, TargetEvent, TargetState, Verdict};

/// Suffix of the name that xl gives the source's domain before it says GO.
pub const AWAY: &str = "--migratedaway";

/// Why a migration is not settled.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A domain.
    #[error(transparent)]
    Host(#[from] HostError),
    /// xenstore.
    #[error(transparent)]
    Store(#[from] crate::xenstore::StoreError),
    /// The target did not say what became of it.
    #[error(
        "{domain} stands suspended on this host, complete and harmless: the target may have it, and {peer} did not say ({problem}). \
         When it can be reached: `dom0-migrator resolve {id}`, with `--peer ADDRESS` if it is to be reached elsewhere"
    )]
    InDoubt {
        /// The domain, by the name that it has now.
        domain: String,
        /// The other host.
        peer: String,
        /// What went wrong.
        problem: String,
        /// The migration.
        id: crate::control::Token,
    },
}

/// Settles the source's side; `ask` asks the target what became of the domain. Afterwards the record is closed.
///
/// # Errors
/// [`SettleError`]; what was reached is in the record, and this can be called again.
pub fn source(
    record: &mut Record<SourceState>,
    ask: impl Fn(&Record<SourceState>) -> Result<Verdict, String>,
) -> Result<SourceState, SettleError> {
    end_xl(record)?;
    loop {
        match record.state().duty() {
            Duty::TakeBack => drop(record.step(SourceEvent::GaveUp)?),
            Duty::Ask => match ask(record) {
                Ok(verdict) => drop(record.step(SourceEvent::Verdict(verdict))?),
                Err(problem) => {
                    let content = record.content();
                    return Err(SettleError::InDoubt {
                        domain: format!("{}{AWAY}", content.domain),
                        peer: content.peer.clone(),
                        problem,
                        id: content.id.clone(),
                    });
                }
            },
            Duty::Resume => {
                match copy_here(record)? {
                    Some(domain) => run_on(&domain, &record.content().domain)?,
                    None => note(record, "the domain was not here any more")?,
                }
                record.step(SourceEvent::Resumed)?;
            }
            Duty::RemoveCopy => {
                if let Some(domain) = copy_here(record)? {
                    host::destroy(&domain)?;
                }
                record.step(SourceEvent::Removed)?;
            }
            _ => return Ok(record.state()),
        }
    }
}

/// Settles the target's side, by itself: what was not accepted is discarded, what was is started.
///
/// # Errors
/// [`SettleError`]; what was reached is in the record, and this can be called again.
pub fn target(record: &mut Record<TargetState>) -> Result<TargetState, SettleError> {
    end_xl(record)?;
    loop {
        match record.state().duty() {
            Duty::Discard => drop(record.step(TargetEvent::GaveUp)?),
            Duty::Start => {
                let name = record.content().domain.clone();
                let there = match incoming(record)? {
                    None => of_number(record, &name)?,
                    incoming => incoming,
                };
                match there {
                    Some(domain) => {
                        if domain.name != name {
                            host::rename(domain.id, &name)?;
                        }
                        host::unpause(domain.id)?;
                        record.step(TargetEvent::Started)?;
                    }
                    None => drop(record.step(TargetEvent::NotThere)?),
                }
            }
            Duty::RemoveIncoming => {
                if let Some(domain) = incoming(record)? {
                    host::destroy(&domain)?;
                    tracing::info!(name = domain.name, id = %domain.id, "what had come of it is removed");
                }
                record.step(TargetEvent::Removed)?;
            }
            _ => return Ok(record.state()),
        }
    }
}

fn end_xl<S: State>(record: &mut Record<S>) -> Result<(), SettleError> {
    let content = record.content();
    if let Some(xl) = content.xl
        && content.boot == boot()
    {
        host::end_process(xl)?;
    }
    Ok(())
}

fn note<S: State>(record: &mut Record<S>, text: &str) -> Result<(), RecordError> {
    record.amend(|content| content.note = Some(text.to_owned()))
}

/// A domain of that name and of the record's number, if this is still the boot in which it got that.
fn of_number<S: State>(record: &Record<S>, name: &str) -> Result<Option<Domain>, SettleError> {
    let content = record.content();
    if content.boot != boot() {
        return Ok(None);
    }
    Ok(host::named(name)?.filter(|found| content.domain_id.is_none_or(|id| id == found.id)))
}

/// The source's copy.
fn copy_here(record: &Record<SourceState>) -> Result<Option<Domain>, SettleError> {
    let name = &record.content().domain;
    match of_number(record, &format!("{name}{AWAY}"))? {
        None => of_number(record, name),
        away => Ok(away),
    }
}

/// What has come of the domain at the target.
fn incoming(record: &Record<TargetState>) -> Result<Option<Domain>, SettleError> {
    of_number(record, &format!("{}{INCOMING}", record.content().domain))
}

fn run_on(domain: &Domain, name: &str) -> Result<(), HostError> {
    if domain.name != name {
        host::rename(domain.id, name)?;
    }
    host::resume(domain.id)
}
