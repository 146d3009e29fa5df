//! `resolve`: finds from the records which side may run a domain, and makes it so.

use super::configuration::{Configuration, ConfigurationError};
use super::connection::Transport;
use super::{EXIT_FAILED, EXIT_MIGRATED, EXIT_NOT_BEGUN, EXIT_UNDEFINED, Resolve, connection, link, settle};
use crate::control::Token;
use crate::handover::record::{Content, RecordError, Records};
use crate::handover::{SourceState, State, TargetState};

/// Settles what is open here. 0: all is settled; 4: something stays in doubt; 1: something failed.
pub fn run(options: &Resolve, configuration: &Configuration) -> u8 {
    let opened = Records::open(Some(&configuration.records)).and_then(|records| {
        let wanted = |id: &Token, domain: &str| {
            options.id.as_deref().is_none_or(|wanted| id.to_string() == wanted || domain == wanted)
        };
        let mut sources = records.open_ones::<SourceState>()?;
        sources.retain(|content| wanted(&content.id, &content.domain));
        let mut targets = records.open_ones::<TargetState>()?;
        targets.retain(|content| wanted(&content.id, &content.domain));
        Ok((records, sources, targets))
    });
    let (records, sources, targets) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            eprintln!("dom0-migrator: {error}");
            return EXIT_NOT_BEGUN;
        }
    };
    if sources.is_empty() && targets.is_empty() {
        println!(
            "nothing to resolve here{}",
            options.id.as_ref().map_or(String::new(), |id| format!(" of {id:?}"))
        );
        return EXIT_MIGRATED;
    }
    let transport = configuration.transport(&options.connecting);
    let peer = options.peer.as_deref().map(connection::with_port);
    let mut worst = EXIT_MIGRATED;
    // The target's side first: where both are on this host, the source's asks for it.
    for content in &targets {
        worst = worst.max(said(content, take_target(&records, content)));
    }
    for content in &sources {
        worst = worst.max(said(content, take_source(&records, content, peer.as_deref(), &transport)));
    }
    worst
}

fn take_target(
    records: &Records,
    content: &Content<TargetState>,
) -> Result<&'static str, settle::SettleError> {
    let Some(mut record) = records.take::<TargetState>(&content.id)? else { return Ok("is gone") };
    Ok(match settle::target(&mut record)? {
        TargetState::Running => "runs on this host",
        TargetState::Lost => {
            "was taken over by this host and is not here any more: start it anew from its configuration"
        }
        _ => "does not run on this host, and what had come of it is removed",
    })
}

fn take_source(
    records: &Records,
    content: &Content<SourceState>,
    peer: Option<&str>,
    transport: &Result<Transport, ConfigurationError>,
) -> Result<&'static str, settle::SettleError> {
    let Some(mut record) = records.take::<SourceState>(&content.id)? else { return Ok("is gone") };
    let state = settle::source(&mut record, |record| {
        let content = record.content();
        // What needs no question is settled without certificates too.
        let transport = transport.as_ref().map_err(ToString::to_string)?;
        link::ask(peer.unwrap_or(&content.peer), &content.id, &content.domain, transport)
    })?;
    Ok(match state {
        SourceState::Resumed => "runs on this host",
        SourceState::Removed => "runs at the target, and the copy here is removed",
        _ => {
            "was taken over by the target, which lost it: start it anew from its configuration; the copy here must not be resumed"
        }
    })
}

fn said<S: State>(content: &Content<S>, result: Result<&'static str, settle::SettleError>) -> u8 {
    match result {
        Ok(text) => {
            println!("{} {} {text}", content.id, content.domain);
            EXIT_MIGRATED
        }
        Err(settle::SettleError::Record(RecordError::Busy { .. })) => {
            println!("{} {} is being worked on by a running command", content.id, content.domain);
            EXIT_MIGRATED
        }
        Err(error) => {
            println!("{} {}: {error}", content.id, content.domain);
            if matches!(error, settle::SettleError::InDoubt { .. }) { EXIT_UNDEFINED } else { EXIT_FAILED }
        }
    }
}
