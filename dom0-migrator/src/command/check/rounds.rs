//! How long memory that is dirtied keeps a domain standing still, on paper: rounds of the pre-copy, one after the other.

use super::model::{Bound, Model};

/// Rounds after the first that libxl's own policy allows (`LIBXL_XGS_POLICY_MAX_ITERATIONS`, `libxl_dom_save.c`), and ours always makes.
const ROUNDS: u32 = 5;
/// Rounds after those that ours allows while they make the downtime shorter.
const MORE: u32 = 30;
/// Dirty pages with which libxl's own policy is content (`LIBXL_XGS_POLICY_TARGET_DIRTY_COUNT`), in bytes.
const FEW: f64 = 50.0 * 4096.0;

/// What a policy makes of rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Downtime {
    /// Seconds for which the last of the memory is sent. What xl needs for devices and the restart comes on top, with either helper.
    pub seconds: f64,
    /// Rounds after the first.
    pub rounds: u32,
}

/// The downtime, when the first round takes so long. `wanted` is what `--max-downtime` says, in seconds; without it, libxl's own policy.
pub fn downtime(model: &Model, first: Bound, wanted: Option<f64>) -> Downtime {
    let link = model.link_bytes_per_second;
    // What is dirtied in a time; no more than there is.
    let dirtied = |seconds: f64| (model.dirty_bytes_per_second * seconds).min(model.memory_bytes);
    // The bound has all rounds in it; the first alone carries what goes once.
    let once = if model.dirty_bytes_per_second < link {
        first.total_seconds * (1.0 - model.dirty_bytes_per_second / link)
    } else {
        model.memory_bytes / link
    };
    let mut dirty = dirtied(once);
    let mut rounds = 0;
    loop {
        let seconds = dirty / link;
        let enough = match wanted {
            None => rounds >= ROUNDS || dirty < FEW,
            Some(wanted) => {
                let stalls = dirtied(seconds) >= dirty * 0.95;
                rounds >= ROUNDS && (seconds <= wanted || stalls || rounds >= ROUNDS + MORE)
            }
        };
        if enough {
            return Downtime { seconds, rounds };
        }
        dirty = dirtied(seconds);
        rounds += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(dirty: f64) -> Model {
        Model {
            memory_bytes: 8e9,
            zero_bytes: 0.0,
            cached_bytes: 4e9,
            dirty_bytes_per_second: dirty,
            link_bytes_per_second: 1e8,
            storage_bytes_per_second: 1e9,
        }
    }

    #[test]
    fn a_quiet_guest_stands_still_for_nothing() {
        let model = model(0.0);
        let stock = downtime(&model, model.stock(), None);
        assert_eq!(stock, Downtime { seconds: 0.0, rounds: 0 });
    }

    #[test]
    fn each_round_is_shorter_by_the_same_share() {
        let model = model(2e7);
        let stock = downtime(&model, model.stock(), None);
        // 80 s, and a fifth of it in each of six further rounds, the last of which is the downtime.
        assert!((stock.seconds / (80.16 * 0.2_f64.powi(6)) - 1.0).abs() < 0.01, "{stock:?}");
        let ours = downtime(&model, model.poolskip(), Some(0.3));
        assert!(ours.seconds < stock.seconds && ours.rounds == ROUNDS, "{ours:?}");
    }

    #[test]
    fn a_wish_for_less_downtime_costs_rounds_and_ends() {
        let busy = model(8e7);
        let (lax, strict) =
            (downtime(&busy, busy.poolskip(), Some(30.0)), downtime(&busy, busy.poolskip(), Some(0.3)));
        assert!(strict.rounds > lax.rounds && strict.seconds <= 0.3, "{lax:?} {strict:?}");
        let hopeless = model(2e8);
        let ended = downtime(&hopeless, hopeless.poolskip(), Some(0.3));
        assert!((ended.seconds - 80.0).abs() < 1.0 && ended.rounds == ROUNDS, "{ended:?}");
    }
}
