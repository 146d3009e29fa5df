//! Which compression a link is worth: measured on the stream's own first blocks, as they go.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::block::Codec;
use super::compression::{Coder, Compression};

/// Bytes of the stream before the measurement: headers, and then the guest's lists are waited for.
const SKIPPED: u64 = 256 * 1024;
/// How long is measured, and how many bytes; and when it ends although so many have not come.
const LONG: Duration = Duration::from_millis(500);
const ENOUGH: u64 = 4 << 20;
const LONGEST: Duration = Duration::from_secs(3);
/// Blocks that are compressed to see what it gives.
const TRIED: usize = 16;
/// The smallest block that tells something.
const TELLING: usize = 16 * 1024;
/// Share of what there is to send that the link does not take, from which on it is the link that sets the pace. Less may be what is still on its way,
/// and the time that it takes to copy bytes to the system.
const HELD_UP: f64 = 0.5;
/// What compression must gain to be worth its processor time.
const GAIN: f64 = 1.1;

/// What a codec makes of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Tried {
    bytes: u64,
    stored: u64,
    seconds: f64,
}

impl Tried {
    fn ratio(self) -> f64 {
        if self.bytes == 0 { 1.0 } else { self.stored as f64 / self.bytes as f64 }
    }

    /// Bytes of the stream that one processor compresses in a second.
    fn rate(self) -> f64 {
        if self.seconds > 0.0 { self.bytes as f64 / self.seconds } else { 0.0 }
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Measurement {
    /// Bytes per second that the link took: those that have arrived.
    link: f64,
    /// Bytes per second that there were to send while nobody waited for the link, or tried codecs. What the system's buffers took counts, which on a slow link is all
    /// of the first seconds.
    offered: f64,
    /// Blocks that are compressed at once.
    at_once: f64,
    lz4: Tried,
    zstd: Tried,
}

impl Measurement {
    /// The codec with which the stream is fastest.
    fn choose(&self) -> Codec {
        if self.link > self.offered * (1.0 - HELD_UP) {
            return Codec::Raw;
        }
        let with = |tried: Tried| {
            (tried.rate() * self.at_once).min(self.link / tried.ratio().max(0.001)).min(self.offered)
        };
        let (codec, rate) = [(Codec::Lz4, self.lz4), (Codec::Zstd, self.zstd)]
            .map(|(codec, tried)| (codec, with(tried)))
            .into_iter()
            .fold((Codec::Raw, 0.0), |best, one| if one.1 > best.1 { one } else { best });
        if rate > self.link * GAIN { codec } else { Codec::Raw }
    }
}

/// The choice, with its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// What was chosen.
    pub codec: Codec,
    measured: Measurement,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Measurement { link, offered, at_once, lz4, zstd } = self.measured;
        let chosen = match self.codec {
            Codec::Raw => "no compression",
            Codec::Lz4 => "lz4",
            Codec::Zstd => "zstd",
        };
        let of = |tried: Tried| format!("{:.2} of a block at {:.0} MB/s", tried.ratio(), tried.rate() / 1e6);
        write!(
            f,
            "{chosen}: the link took {:.1} MB/s of {:.1} MB/s that there were to send; lz4 makes {}, zstd {}, {at_once:.0} at once",
            link / 1e6,
            offered / 1e6,
            of(lz4),
            of(zstd),
        )
    }
}

/// When the measurement began.
#[derive(Clone, Copy, Debug)]
struct Beginning {
    at: Instant,
    /// Bytes that had arrived by then.
    arrived: u64,
    /// Bytes that had been written.
    written: u64,
}

#[derive(Debug, Default)]
struct State {
    seen: u64,
    began: Option<Beginning>,
    waited: Duration,
    tried: usize,
    lz4: Tried,
    zstd: Tried,
    choice: Option<Choice>,
}

/// What all connections of a stream use, and how it is found.
#[derive(Debug)]
pub struct Chooser {
    wanted: Compression,
    connections: usize,
    state: Mutex<State>,
}

impl Chooser {
    /// For a stream over so many connections.
    pub fn new(wanted: Compression, connections: usize) -> Self {
        Self { wanted, connections, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was chosen by measurement.
    pub fn choice(&self) -> Option<Choice> {
        self.state().choice
    }

    /// How a block is to be written. While it is measured: as it is, and some are compressed to see what it gives.
    pub fn codec(&self, block: &[u8], coder: &mut Coder) -> Codec {
        match self.wanted {
            Compression::Off => return Codec::Raw,
            Compression::Lz4 => return Codec::Lz4,
            Compression::Zstd => return Codec::Zstd,
            Compression::Auto => {}
        }
        {
            let mut state = self.state();
            if let Some(choice) = state.choice {
                return choice.codec;
            }
            if state.began.is_none() || state.tried >= TRIED || block.len() < TELLING {
                return Codec::Raw;
            }
            state.tried += 1;
        }
        for codec in [Codec::Lz4, Codec::Zstd] {
            let began = Instant::now();
            let stored = coder.compress(codec, block).ok().flatten().map_or(block.len(), <[u8]>::len);
            let seconds = began.elapsed().as_secs_f64();
            let mut state = self.state();
            let tried = if codec == Codec::Lz4 { &mut state.lz4 } else { &mut state.zstd };
            tried.bytes += block.len() as u64;
            tried.stored += stored as u64;
            tried.seconds += seconds;
        }
        Codec::Raw
    }

    /// A block was sent, for which the connection was waited for so long. `acknowledged` says how much has arrived on all of them.
    pub fn sent(&self, bytes: usize, waited: Duration, acknowledged: impl FnOnce() -> u64) {
        if self.wanted != Compression::Auto {
            return;
        }
        let mut state = self.state();
        state.seen += bytes as u64;
        if state.choice.is_some() || state.seen < SKIPPED {
            return;
        }
        let Some(began) = state.began else {
            let (at, arrived, written) = (Instant::now(), acknowledged(), state.seen);
            state.began = Some(Beginning { at, arrived, written });
            return;
        };
        state.waited += waited;
        let elapsed = began.at.elapsed();
        let enough = elapsed >= LONG && state.seen >= ENOUGH && state.tried > 0;
        if !enough && elapsed < LONGEST {
            return;
        }
        let seconds = elapsed.as_secs_f64();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let taken_up = state.waited.as_secs_f64() + state.lz4.seconds + state.zstd.seconds;
        let free = seconds - taken_up / self.connections as f64;
        let measured = Measurement {
            link: acknowledged().saturating_sub(began.arrived) as f64 / seconds,
            offered: (state.seen - began.written) as f64 / free.max(seconds / 1000.0),
            at_once: self.connections.min(processors) as f64,
            lz4: state.lz4,
            zstd: state.zstd,
        };
        let choice = Choice { codec: measured.choose(), measured };
        tracing::info!("--compress auto: {choice}");
        state.choice = Some(choice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(ratio: f64, rate: f64) -> Tried {
        Tried { bytes: 1_000_000, stored: (1e6 * ratio) as u64, seconds: 1e6 / rate }
    }

    fn measured(link: f64, offered: f64) -> Measurement {
        Measurement { link, offered, at_once: 2.0, lz4: tried(0.6, 600e6), zstd: tried(0.4, 250e6) }
    }

    #[test]
    fn the_slower_the_link_the_more_compression_it_is_worth() {
        for (link, codec) in
            [(4e6, Codec::Zstd), (125e6, Codec::Zstd), (600e6, Codec::Lz4), (1.25e9, Codec::Raw)]
        {
            assert_eq!(measured(link, 3e9).choose(), codec, "{link}");
        }
    }

    #[test]
    fn a_link_that_takes_all_there_is_is_left_alone() {
        assert_eq!(measured(4e6, 4.2e6).choose(), Codec::Raw);
        // What is still on its way has not arrived, which does not mean that the link is slow.
        assert_eq!(measured(97e6, 100e6).choose(), Codec::Raw);
    }

    #[test]
    fn a_copy_to_the_system_is_no_wait_for_the_link() {
        // One connection of a stream that a processor sets the pace of, a third of the time in `write(2)`.
        assert_eq!(Measurement { at_once: 1.0, ..measured(400e6, 600e6) }.choose(), Codec::Raw);
    }

    /// Under emulation a block takes longer to try than to send.
    #[test]
    fn time_for_trying_codecs_does_not_hide_a_slow_link() {
        let chooser = Chooser::new(Compression::Auto, 4);
        chooser.sent(SKIPPED as usize, Duration::ZERO, || 0);
        begun_long_ago(&chooser);
        {
            let mut state = chooser.state();
            (state.lz4, state.zstd) = (tried(0.3, 0.2e6), tried(0.2, 0.1e6));
        }
        // Three and three quarters of four seconds went by with it, on each of four connections.
        chooser.sent(16 << 20, Duration::ZERO, || 15 << 20);
        let measured = chooser.choice().unwrap().measured;
        assert!(measured.offered > 10.0 * measured.link, "{measured:?}");
    }

    #[test]
    fn what_does_not_get_shorter_is_left_alone() {
        let noise = Measurement { lz4: tried(1.0, 1e9), zstd: tried(0.97, 1e9), ..measured(4e6, 3e9) };
        assert_eq!(noise.choose(), Codec::Raw);
        assert_eq!(Measurement { offered: 1e9, link: 1e6, ..Measurement::default() }.choose(), Codec::Raw);
    }

    #[test]
    fn the_choice_has_its_numbers() {
        let measured = measured(4e6, 9e6);
        let words = Choice { codec: measured.choose(), measured }.to_string();
        for part in [
            "zstd: the link took 4.0 MB/s of 9.0 MB/s that there were to send",
            "0.60 of a block at 600 MB/s",
            "0.40 of a block at 250 MB/s",
        ] {
            assert!(words.contains(part), "{words}");
        }
    }

    #[test]
    fn a_stream_is_measured_once_and_then_follows_the_choice() {
        let chooser = Chooser::new(Compression::Auto, 1);
        let mut coder = Coder::new();
        let block = vec![7; 64 * 1024];
        chooser.sent(SKIPPED as usize, Duration::ZERO, || 0);
        // As if it had begun long ago, and been waited for all the time.
        begun_long_ago(&chooser);
        assert_eq!(chooser.codec(&block, &mut coder), Codec::Raw);
        chooser.sent(block.len(), Duration::from_secs(4), || 40_000);
        let choice = chooser.choice().unwrap();
        assert_ne!(choice.codec, Codec::Raw, "{choice}");
        assert_eq!(chooser.codec(&block, &mut coder), choice.codec);
    }

    fn begun_long_ago(chooser: &Chooser) {
        let at = Instant::now() - Duration::from_secs(4);
        let written = chooser.state().seen;
        chooser.state().began = Some(Beginning { at, arrived: 0, written });
    }

    /// A connection's buffers take megabytes, on a link of 40 Mbit/s all that there is in the first seconds.
    #[test]
    fn what_the_system_s_buffers_take_does_not_hide_a_slow_link() {
        let (mut coder, block) = (Coder::new(), vec![7; 64 * 1024]);
        for (arrived, is_slow) in [(4 << 20, true), (19 << 20, false)] {
            let chooser = Chooser::new(Compression::Auto, 4);
            chooser.sent(SKIPPED as usize, Duration::ZERO, || 0);
            begun_long_ago(&chooser);
            chooser.codec(&block, &mut coder);
            chooser.sent(20 << 20, Duration::ZERO, || arrived);
            let choice = chooser.choice().unwrap();
            assert_eq!(choice.codec != Codec::Raw, is_slow, "{choice}");
        }
    }
}
