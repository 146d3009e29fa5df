//! The lower bound of a migration's total time, on paper: `docs/performance.md` derives it. `xtask` holds its measurements against the
//! same file.

/// What a migration moves, and over what.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Memory of the guest.
    pub memory_bytes: f64,
    /// Of it: pages that are zero.
    pub zero_bytes: f64,
    /// Of it: pages that lie on storage too, and are listed.
    pub cached_bytes: f64,
    /// What the workload writes to in a second: bytes of pages that are dirtied, each counted once a round.
    pub dirty_bytes_per_second: f64,
    /// The link, for the payload.
    pub link_bytes_per_second: f64,
    /// Storage, as the target reads it.
    pub storage_bytes_per_second: f64,
}

/// A lower bound, and what it consists of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// Bytes over the link.
    pub wire_bytes: f64,
    /// Bytes that the target reads from storage.
    pub storage_bytes: f64,
    /// Seconds; infinite where the guest dirties memory faster than the link carries it.
    pub total_seconds: f64,
}

/// A page of memory.
const PAGE: f64 = 4096.0;

/// On the wire, a reference to one of a frame's four pages: a hash of 16 bytes, and a quarter of a span of 24
/// (`engine::memory_record`).
const REFERENCE: f64 = 22.0;

/// On the wire, what comes with a page of libxenguest's: its frame number. Poolskip's spans have one for many, and zero pages have nothing
/// else: counted as nothing, for this is a lower bound.
const FRAME_NUMBER: f64 = 8.0;

impl Model {
    /// Every page goes over the link once, and what is dirtied meanwhile once more.
    pub fn stock(&self) -> Bound {
        let with_number = (PAGE + FRAME_NUMBER) / PAGE;
        let total_seconds = self.link_seconds(self.memory_bytes * with_number, with_number);
        let wire_bytes = total_seconds * self.link_bytes_per_second;
        Bound { wire_bytes, storage_bytes: 0.0, total_seconds }
    }

    /// Zero pages and cached ones go as markers and references; storage is read meanwhile, and what it cannot deliver in that time goes
    /// over the link after all, so that both end together.
    pub fn poolskip(&self) -> Bound {
        let cached = self.cached_bytes.min(self.memory_bytes);
        let zero = self.zero_bytes.min(self.memory_bytes - cached);
        let rest = self.memory_bytes - cached - zero;
        let short = REFERENCE / PAGE;
        let all_by_reference = self.link_seconds(rest + cached * short, 1.0);
        let storage = cached / self.storage_bytes_per_second;
        let (total_seconds, by_reference) = if storage <= all_by_reference {
            (all_by_reference, cached)
        } else {
            // With r by reference in a time t: link * t = rest + cached - r + short * r + dirty * t, and r = storage * t.
            let rate = self.link_bytes_per_second - self.dirty_bytes_per_second
                + self.storage_bytes_per_second * (1.0 - short);
            let once = rest + cached;
            let seconds = if rate > 0.0 { once / rate } else { f64::INFINITY };
            (seconds, (self.storage_bytes_per_second * seconds).min(cached))
        };
        Bound {
            wire_bytes: total_seconds * self.link_bytes_per_second,
            storage_bytes: by_reference,
            total_seconds,
        }
    }

    /// Time for something that goes once, with what is dirtied meanwhile (each byte of it as so many on the wire): the geometric series
    /// of the rounds.
    fn link_seconds(&self, once: f64, each: f64) -> f64 {
        let left = self.link_bytes_per_second - self.dirty_bytes_per_second * each;
        if left > 0.0 { once / left } else { f64::INFINITY }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = (1_u64 << 30) as f64;

    fn eight_gib(link_gbit: f64) -> Model {
        Model {
            memory_bytes: 8.0 * GIB,
            zero_bytes: 0.5 * GIB,
            cached_bytes: 5.6 * GIB,
            dirty_bytes_per_second: 0.0,
            link_bytes_per_second: link_gbit * 1e9 / 8.0,
            storage_bytes_per_second: 1e9,
        }
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * b.abs()
    }

    #[test]
    fn stock_sends_all_memory_once_when_nothing_is_dirtied() {
        let bound = eight_gib(1.0).stock();
        assert!(near(bound.wire_bytes, 8.0 * GIB * 4104.0 / 4096.0));
        assert!(near(bound.total_seconds, bound.wire_bytes / 125e6));
    }

    #[test]
    fn what_is_dirtied_is_sent_again_and_again() {
        let quiet = eight_gib(1.0).stock().total_seconds;
        let half = Model { dirty_bytes_per_second: 62.5e6 * 4096.0 / 4104.0, ..eight_gib(1.0) };
        assert!(near(half.stock().total_seconds, 2.0 * quiet));
        let never = Model { dirty_bytes_per_second: 125e6, ..half };
        assert!(never.stock().total_seconds.is_infinite() && never.poolskip().total_seconds.is_infinite());
    }

    #[test]
    fn the_link_sets_the_pace_where_it_is_slow_and_storage_where_it_is_fast() {
        let slow = eight_gib(1.0).poolskip();
        assert!(near(slow.storage_bytes, 5.6 * GIB));
        assert!(slow.storage_bytes / 1e9 < slow.total_seconds);
        let fast = eight_gib(25.0).poolskip();
        assert!(fast.storage_bytes < 5.6 * GIB);
        assert!(near(fast.storage_bytes, fast.total_seconds * 1e9));
    }

    #[test]
    fn the_two_cases_meet() {
        // The storage rate at which references settle exactly when the link is done.
        let model = eight_gib(10.0);
        let seconds = Model { storage_bytes_per_second: f64::INFINITY, ..model }.poolskip().total_seconds;
        let edge = model.cached_bytes / seconds;
        let above = Model { storage_bytes_per_second: edge * 1.000_001, ..model }.poolskip().total_seconds;
        let below = Model { storage_bytes_per_second: edge * 0.999_999, ..model }.poolskip().total_seconds;
        assert!((above / below - 1.0).abs() < 1e-5, "{above} {below}");
    }

    #[test]
    fn the_table_of_the_documentation() {
        let page = include_str!("../../../../docs/performance.md");
        for link in [1.0, 10.0, 25.0] {
            for storage in [0.5, 1.0, 3.0] {
                let model = Model { storage_bytes_per_second: storage * 1e9, ..eight_gib(link) };
                let (stock, ours) = (model.stock().total_seconds, model.poolskip().total_seconds);
                let less = 100.0 * (1.0 - ours / stock);
                let row =
                    format!("| {link} Gbit/s | {storage} GB/s | {stock:.2} s | {ours:.2} s | {less:.1} % |");
                assert!(page.contains(&row), "docs/performance.md has no row {row}");
            }
        }
    }

    #[test]
    fn poolskip_is_never_slower_than_stock_on_paper() {
        for link in [0.032, 1.0, 10.0, 25.0, 100.0] {
            for storage in [1e6, 1e8, 1e9, 1e10] {
                for cached in [0.0, 0.3, 0.7, 1.0, 2.0] {
                    let model = Model {
                        storage_bytes_per_second: storage,
                        cached_bytes: cached * 8.0 * GIB,
                        ..eight_gib(link)
                    };
                    assert!(
                        model.poolskip().total_seconds <= model.stock().total_seconds * 1.000_001,
                        "{model:?}"
                    );
                }
            }
        }
    }
}
