//! What a helper tells of its filter while it works.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::engine::{SourceFilter, TargetFilter};
use crate::handoff::{Event, Peer};
use crate::timeline::{Mark, Moment, Recorder, SourceSample, TargetSample, Ticker, milliseconds};

/// Tells the command of a save about once a second. Without a command, nobody.
pub struct SaveSampling {
    began: Instant,
    peer: Option<Arc<Peer>>,
    _ticker: Option<Ticker>,
}

impl SaveSampling {
    /// Begins; times are counted from `began`. It ends, with a last sample, when it is dropped.
    pub fn start(began: Instant, peer: Option<&Arc<Peer>>, engine: &SourceFilter) -> Self {
        let ticker = peer.cloned().and_then(|peer| {
            let watch = engine.watch();
            let tell = move |elapsed| {
                // A command that is gone is noticed elsewhere.
                let _ = peer.tell(&Event::Sampled(SourceSample::new(elapsed, &watch.look())));
            };
            Ticker::start(began, tell)
                .inspect_err(|error| tracing::warn!(%error, "there will be no time line"))
                .ok()
        });
        Self { began, peer: peer.cloned(), _ticker: ticker }
    }

    /// Something happens now.
    pub fn mark(&self, what: Moment) {
        if let Some(peer) = &self.peer {
            let seconds = milliseconds(self.began.elapsed().as_secs_f64());
            let _ = peer.tell(&Event::Marked(Mark { seconds, what }));
        }
    }
}

/// Keeps what a restore does, for its report.
pub struct RestoreSampling {
    recorder: Arc<Mutex<Recorder<TargetSample>>>,
    ticker: Option<Ticker>,
}

impl RestoreSampling {
    /// Begins; times are counted from `began`.
    pub fn start(began: Instant, engine: &TargetFilter) -> Self {
        let recorder = Arc::new(Mutex::new(Recorder::default()));
        let (watch, kept) = (engine.watch(), recorder.clone());
        let keep = move |elapsed| {
            let sample = TargetSample::new(elapsed, &watch.look());
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
        };
        let ticker = Ticker::start(began, keep)
            .inspect_err(|error| tracing::warn!(%error, "there will be no time line"))
            .ok();
        Self { recorder, ticker }
    }

    /// What was kept, with a last sample of now.
    pub fn finish(mut self) -> Vec<TargetSample> {
        self.ticker = None;
        std::mem::take(&mut *self.recorder.lock().unwrap_or_else(PoisonError::into_inner)).finish()
    }
}
