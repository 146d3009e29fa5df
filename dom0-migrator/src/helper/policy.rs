//! When to stop the pre-copy.

use crate::xen::guest::{Precopy, PrecopyStats};

/// Rounds after which the stock policy stops (`SPP_MAX_ITERATIONS` in `xg_sr_save.c`).
pub const MAX_ROUNDS: u32 = 5;
/// Dirty pages under which it stops (`SPP_TARGET_DIRTY_COUNT`).
pub const FEW_DIRTY_PAGES: i64 = 50;

/// What libxenguest does by itself when it is given no policy: stop after five rounds, or when fewer than 50 pages are dirty.
/// Kept the same, so that a comparison with the stock helper compares the pages' ways and nothing else.
pub fn stock(stats: PrecopyStats) -> Precopy {
    let few = (0..FEW_DIRTY_PAGES).contains(&stats.dirty_count);
    if few || stats.iteration >= MAX_ROUNDS { Precopy::StopAndCopy } else { Precopy::Continue }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(iteration: u32, dirty_count: i64) -> Precopy {
        stock(PrecopyStats { iteration, total_written: 0, dirty_count })
    }

    #[test]
    fn it_stops_where_the_stock_one_does() {
        assert_eq!(answer(0, 131_072), Precopy::Continue);
        assert_eq!(answer(1, -1), Precopy::Continue);
        assert_eq!(answer(1, 50), Precopy::Continue);
        assert_eq!(answer(1, 49), Precopy::StopAndCopy);
        assert_eq!(answer(1, 0), Precopy::StopAndCopy);
        assert_eq!(answer(4, -1), Precopy::Continue);
        assert_eq!(answer(5, -1), Precopy::StopAndCopy);
    }
}
