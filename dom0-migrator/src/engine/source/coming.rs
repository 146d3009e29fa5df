//! A side channel that comes when the stream has begun.
//!
//! Where nobody but libxl's helpers is on either side, as under a plain `xl migrate`, the target learns from the stream itself where the
//! side channel is to be had: from a record that stands right behind the headers, and that every other reader ignores. Memory waits a
//! little for the target to come; then it goes as it is, and once the target does come, what follows goes by the rules.
//!
//! ```text
//! headers, offer ─► held ── the target comes ──► markers and references
//!                     │                             ▲
//!                     └─ patience is over ─► as it is ┘ the target comes late
//! ```

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};

use super::filter::{Filter, Mode};
use super::side::Side;
use super::work::{Agreed, Knowledge};
use crate::engine::config::{Config, DiskName};
use crate::engine::error::{EngineError, SideError};
use crate::engine::outlet::Parcel;
use crate::engine::side_message::Answer;
use crate::engine::window::Window;
use crate::engine::xen_stream::{RecordHeader, record};

/// How the side channel comes.
#[derive(Debug)]
pub struct Coming {
    /// Body of the record that tells the target where it is to be had.
    pub offer: Vec<u8>,
    /// Gives it, a connected socket, once; disconnected when it will not come.
    pub sockets: Receiver<OwnedFd>,
    /// How long memory waits for it.
    pub patience: Duration,
}

/// One that is waited for.
pub(super) struct Awaited {
    offer: Vec<u8>,
    opened: Receiver<Result<(Side, Answer), SideError>>,
    patience: Duration,
    /// Until when memory waits; none before the offer is sent.
    until: Option<Instant>,
}

impl Awaited {
    /// Has a thread say hello as soon as it comes.
    pub(super) fn start(
        coming: Coming,
        disks: Vec<DiskName>,
        knowledge: &Arc<Knowledge>,
        config: &Config,
    ) -> std::io::Result<Self> {
        let (Coming { offer, sockets, patience }, config) = (coming, config.clone());
        let (sender, opened) = bounded(1);
        let knowledge = Arc::clone(knowledge);
        std::thread::Builder::new().name("source-side-open".into()).spawn(move || {
            let Ok(socket) = sockets.recv() else { return };
            let opened = Side::open(socket, &disks, &knowledge.map(), &config);
            // Nobody waits for it any more.
            if let Err(unsent) = sender.send(opened)
                && let Ok((side, _)) = unsent.into_inner()
            {
                side.close();
            }
        })?;
        Ok(Self { offer, opened, patience, until: None })
    }

    /// Where it comes from.
    pub(super) fn opened(&self) -> Receiver<Result<(Side, Answer), SideError>> {
        self.opened.clone()
    }

    /// How long memory is still to wait.
    pub(super) fn left(&self) -> Option<Duration> {
        let left = self.until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }
}

impl Filter {
    /// The headers are sent: what tells the target follows, and its time begins.
    pub(super) fn offer_side(&mut self) -> Result<(), EngineError> {
        let Some(awaited) = &mut self.awaited else { return Ok(()) };
        awaited.until = Instant::now().checked_add(awaited.patience);
        let body = std::mem::take(&mut awaited.offer);
        let mut bytes = RecordHeader::bytes(record::OFFER, body.len()).to_vec();
        bytes.extend_from_slice(&body);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        self.send_alone(Parcel::bytes(bytes))
    }

    /// It has come, or will not come.
    pub(super) fn meet(&mut self, opened: Option<Result<(Side, Answer), SideError>>) {
        self.awaited = None;
        match opened {
            // Whatever was sent up to now the target's filter has passed on as it was.
            Some(Ok((side, answer))) if self.mode == Mode::PassThrough => {
                self.window = Window::new(side.window_pages);
                let _ = self.knowledge.agreed.set(Agreed::on(&side));
                self.may_refer = self.config.references;
                self.mode = Mode::Filter;
                self.target_knows_us = true;
                self.met = Some(answer.disks);
                self.side = Some(side);
            }
            Some(Ok((side, _))) => side.close(),
            Some(Err(error)) => {
                tracing::warn!(%error, "no side channel: everything goes raw");
                self.stats.side_channel_lost = true;
            }
            None => tracing::warn!("the target does not come to the side channel: everything goes raw"),
        }
    }
}
