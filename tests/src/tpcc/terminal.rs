//! Terminals: threads that run the mix against the server, one transaction after the other.

use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use std::io::Write;

use super::error::at;
use super::random::{Constants, Random};
use super::scale::{DISTRICTS, Loaded};
use super::timeline::{self, Counters, Counts};
use super::transactions::{Kind, Place};
use super::{DATABASE, TpccError, connect};

/// Tries of one transaction. Two terminals seldom meet twice in a row.
const TRIES: u32 = 100;

/// How a run goes.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Terminals.
    pub threads: u32,
    /// Ends after this long on the monotonic clock.
    pub limit: Duration,
    /// Length of a step of the time line.
    pub step: Duration,
    /// Same seed, same transactions, but for how the terminals meet.
    pub seed: u64,
}

/// Runs until the time is over, `stop` is set, or a terminal fails; the time line goes to `out`. A pause of the whole machine, as in a
/// live migration, is no error.
///
/// # Errors
/// When nothing was loaded, the server refuses or is lost, or `out` cannot be written. All terminals have ended then.
pub fn run(socket: &Path, how: Run, stop: &AtomicBool, out: &mut impl Write) -> Result<Counts, TpccError> {
    let loaded = Loaded::read(&mut connect(socket)?)?;
    let constants = Constants::for_run(&mut fastrand::Rng::with_seed(how.seed), loaded.last_name_constant);
    let counters = Counters::default();
    let (failed, going) = (Mutex::new(None), AtomicU32::new(how.threads));
    let end = AtomicBool::new(false);
    let start = Instant::now();
    let counts = std::thread::scope(|scope| {
        for number in 0..how.threads {
            let (counters, failed, end, going) = (&counters, &failed, &end, &going);
            scope.spawn(move || {
                let place = Place {
                    scale: loaded.scale,
                    warehouse: 1 + number % loaded.scale.warehouses,
                    district: 1 + number / loaded.scale.warehouses % DISTRICTS,
                };
                let random = Random::new(how.seed ^ (u64::from(number) + 1) << 32, constants);
                if let Err(error) = terminal(socket, place, random, counters, end) {
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    end.store(true, Relaxed);
                }
                going.fetch_sub(1, Relaxed);
            });
        }
        let counts = timeline::write(&counters, out, how.step, || {
            let over = start.elapsed() >= how.limit || stop.load(Relaxed);
            // The last lines are written when the last terminal is done, so that nothing committed is left out.
            end.fetch_or(over, Relaxed);
            going.load(Relaxed) > 0
        });
        // Whatever became of the time line, the terminals are to end.
        end.store(true, Relaxed);
        counts
    })?;
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(counts),
    }
}

fn terminal(
    socket: &Path,
    place: Place,
    mut random: Random,
    counters: &Counters,
    end: &AtomicBool,
) -> Result<(), TpccError> {
    let mut conn = connect(socket)?;
    conn.select_db(DATABASE).map_err(at("choosing the schema"))?;
    let mut deck = Vec::new();
    while !end.load(Relaxed) {
        let kind = match deck.pop() {
            Some(kind) => kind,
            None => {
                deck = shuffled(&mut random);
                continue;
            }
        };
        let start = Instant::now();
        let mut tries = 0;
        let ended = loop {
            // The same transaction again has the same inputs: each try draws from a copy.
            let mut drawn = random.clone();
            match place.run(&mut conn, kind, &mut drawn) {
                Ok(ended) => {
                    random = drawn;
                    break ended;
                }
                Err(error) if error.is_transient() => {
                    counters.retried();
                    tries += 1;
                    if tries == TRIES {
                        return Err(TpccError::Retries { tries });
                    }
                }
                Err(error) => return Err(error),
            }
        };
        counters.count(kind, ended, start.elapsed());
    }
    Ok(())
}

/// A deck of cards as of 5.2.4.2: each kind as often in 100 as its share, in random order.
fn shuffled(random: &mut Random) -> Vec<Kind> {
    let mut deck: Vec<Kind> =
        Kind::MIX.iter().flat_map(|&(kind, share)| std::iter::repeat_n(kind, share)).collect();
    random.rng().shuffle(&mut deck);
    deck
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deck_has_every_kind_as_often_as_its_share() {
        let mut random = Random::new(1, Constants { last_name: 0, customer: 0, item: 0 });
        let deck = shuffled(&mut random);
        for (kind, share) in Kind::MIX {
            assert_eq!(deck.iter().filter(|other| **other == kind).count(), share);
        }
        assert_ne!(deck, shuffled(&mut random));
    }
}
