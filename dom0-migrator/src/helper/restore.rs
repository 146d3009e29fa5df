//! The target's helper.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use enlightenment::Vdev;

use super::arguments::RestoreArguments;
use super::channel::{Channel, ChannelError};
use super::message::{Callback, CallbackSet, Message};
use super::policy::Limits;
use super::sampling::RestoreSampling;
use super::stream::restore_pipe;
use super::verify::VerifyWatch;
use super::{HelperError, Libraries, complete, take_descriptor};
use crate::engine::{Config, DiskName, EngineError, LateWrites, TargetFilter, TargetParts};
use crate::handoff::{Event, Order, Peer, Role};
use crate::offer::{self, Offer, OfferError};
use crate::report::RestoreReport;
use crate::xen::guest::{RestoreCallbacks, Restored};
use crate::xen::logger::{Level, Sink};

/// What a helper does that no command of ours has started, as long as the stream offers no side channel: nothing is known of the source.
const ALONE: Order = Order {
    socket: false,
    references: false,
    wait_lists_seconds: 0,
    debug: false,
    own_disks: Vec::new(),
    limits: Limits::DEFAULT,
    asked: None,
    peek: false,
};

/// How long a filter may take to end once the library has.
const FAREWELL: Duration = Duration::from_secs(5);

/// Restores a domain and tells libxl and the command.
pub fn run(arguments: &RestoreArguments, channel: &Arc<Channel>) -> Result<(), ChannelError> {
    let started = Instant::now();
    let mut report = RestoreReport::default();
    let peer = Peer::from_environment()
        .inspect_err(|error| channel.log(Level::WARN, &format!("{error}; going on without")))
        .ok()
        .flatten();
    let result = restore(arguments, channel, peer.as_ref(), started, &mut report);
    report.seconds = started.elapsed().as_secs_f64();
    report.error = result.as_ref().err().map(ToString::to_string);
    report.cut_short = matches!(&result, Err(HelperError::Engine(EngineError::Truncated { .. })));
    if let Some(peer) = &peer {
        let _ = peer.tell(&Event::Restored(Box::new(report)));
    }
    let Restored { store_gfn, console_gfn } = *result.as_ref().unwrap_or(&Restored::default());
    if arguments.callbacks.has(Callback::RestoreResults) {
        channel.tell("the rings' frames", &Message::RestoreResults { store_gfn, console_gfn })?;
    }
    complete(channel, &result.map(|_| ()))
}

fn restore(
    arguments: &RestoreArguments,
    channel: &Arc<Channel>,
    peer: Option<&Peer>,
    started: Instant,
    report: &mut RestoreReport,
) -> Result<Restored, HelperError> {
    let wire = take_descriptor(arguments.io_fd)?;
    let (library_end, filter_end) = restore_pipe()?;
    let (mut order, mut side) = match peer.map(|peer| peer.introduce(Role::Restore, Some(arguments.domain))) {
        Some(Ok(given)) => given,
        Some(Err(error)) => {
            channel.log(Level::WARN, &format!("{error}; going on without"));
            (ALONE, None)
        }
        None => (ALONE, None),
    };
    let watch = Arc::new(VerifyWatch::new(channel.clone()));
    let libraries = Libraries::open(watch.clone() as Arc<dyn Sink>)?;
    let own_disks = order
        .own_disks
        .iter()
        .map(|disk| DiskName { vdev: Vdev(disk.vdev), path: disk.path.clone() })
        .collect();
    let mut config = Config { own_disks: Some(own_disks), process_ends: true, ..Config::default() };
    let mut beginning = Vec::new();
    if peer.is_none() {
        let found = offer::take(wire.as_fd())
            .map_err(|source| HelperError::System { what: "reading the stream's beginning", source })?;
        beginning = found.bytes;
        if let Some(offered) = found.offer {
            side = accept(offered, &mut order, channel);
            // The configuration is xl's, and came from the source as the disks' paths do now.
            config.own_disks = None;
        }
    }
    let parts = TargetParts { from_wire: wire, to_restore: filter_end, side, config };
    let engine = TargetFilter::start_after(parts, beginning)?;
    let sampling = RestoreSampling::start(started, &engine);
    let mut restorer = Restorer { channel: channel.clone(), callbacks: arguments.callbacks };
    let restored = libraries.guest.restore(
        &libraries.control,
        library_end.as_fd(),
        arguments.domain,
        arguments.channels,
        &mut restorer,
    );
    // A filter that still writes finds nobody there.
    drop(library_end);
    let finished = finish_soon(engine, report);
    report.timeline = sampling.finish();
    let differences = watch.differences(finished.as_ref().unwrap_or(&LateWrites::default()));
    report.verified = watch.enabled();
    report.verify_mismatches = watch.enabled().then_some(differences.unexplained);
    report.verify_late_writes = watch.enabled().then_some(differences.late_writes);
    if peer.is_none() && watch.enabled() {
        // libxenguest calls every page that differs an error.
        let words = format!(
            "poolskip: all pages compared: {} differ, and {} that were written to after the suspension",
            differences.unexplained, differences.late_writes
        );
        channel.log(Level::INFO, &words);
    }
    let restored = match (restored, finished) {
        (Ok(restored), Ok(_)) => restored,
        // Why the library found its stream cut short.
        (_, Err(HelperError::Engine(error))) if !is_consequence(&error) => return Err(error.into()),
        (Err(error), _) => return Err(error.into()),
        (Ok(_), Err(error)) => return Err(error),
    };
    match differences.unexplained {
        0 if order.debug && !watch.enabled() => Err(HelperError::NotVerified),
        0 => Ok(restored),
        pages => Err(HelperError::Mismatch(pages)),
    }
}

/// Connects to the source's helper, which has offered it; what goes wrong is said, and means a migration without references.
fn accept(offered: Result<Offer, OfferError>, order: &mut Order, channel: &Channel) -> Option<OwnedFd> {
    let connected = offered.and_then(|offer| {
        order.debug = offer.compare;
        offer.accept(offer::ssh_client())
    });
    connected.inspect_err(|error| channel.log(Level::WARN, &format!("{error}; no references"))).ok()
}

/// Whether a filter failed only because the library stopped reading.
fn is_consequence(error: &EngineError) -> bool {
    match error {
        EngineError::Aborted | EngineError::Gone => true,
        EngineError::Io { source, .. } => source.kind() == std::io::ErrorKind::BrokenPipe,
        _ => false,
    }
}

/// Waits for the filter, not for long: it has come to the end when the library has, or else is of no use any more. The pages that were
/// written after the suspension.
fn finish_soon(engine: TargetFilter, report: &mut RestoreReport) -> Result<LateWrites, HelperError> {
    let deadline = Instant::now() + FAREWELL;
    while !engine.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    report.engine = serde_json::to_value(engine.stats()).unwrap_or_default();
    if !engine.is_finished() {
        return Err(HelperError::Unfinished);
    }
    let summary = engine.finish()?;
    report.engine = serde_json::to_value(&summary).unwrap_or_default();
    Ok(summary.late_writes)
}

/// Answers libxenguest.
struct Restorer {
    channel: Arc<Channel>,
    callbacks: CallbackSet,
}

impl RestoreCallbacks for Restorer {
    fn static_data_done(&mut self, missing: u32) -> i32 {
        if !self.callbacks.has(Callback::StaticDataDone) {
            return 0;
        }
        self.channel.ask("static data", &Message::StaticDataDone { missing }).unwrap_or(-1)
    }
}
