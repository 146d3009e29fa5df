//! Putting blocks that came over several connections in order again.

use std::collections::BTreeMap;

/// Blocks that are kept at most until their turn comes, beside the one that it is.
pub const AHEAD_MAX: u64 = 64;

/// Why a block, or an end, cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// It came already.
    #[error("block {0} came twice")]
    Twice(u64),
    /// It lies beyond the stream's end.
    #[error("block {number} of a stream of {blocks}")]
    Beyond {
        /// The block.
        number: u64,
        /// Blocks of the stream.
        blocks: u64,
    },
    /// Connections that disagree.
    #[error("one connection ends a stream of {0} blocks, another one of {1}")]
    Ends(u64, u64),
}

/// Blocks on their way to their place.
#[derive(Debug)]
pub struct Order<T> {
    next: u64,
    ahead_most: u64,
    ahead: BTreeMap<u64, T>,
    blocks: Option<u64>,
    seen: u64,
}

impl<T> Order<T> {
    /// One in which so many blocks may wait for their turn.
    pub fn new(ahead_most: u64) -> Self {
        Self { next: 0, ahead_most, ahead: BTreeMap::new(), blocks: None, seen: 0 }
    }

    /// Whether there is room for a block now. Each connection brings its blocks in ascending order, so the one whose turn it is never
    /// waits behind another: it has room always. So has one that lies beyond the stream's end: no turn comes for which it could wait, and
    /// [`put`](Self::put) says what is wrong with it.
    pub fn has_room(&self, number: u64) -> bool {
        let is_beyond = self.blocks.is_some_and(|blocks| number >= blocks);
        is_beyond || number.saturating_sub(self.next) < self.ahead_most
    }

    /// Takes a block for which there is room.
    ///
    /// # Errors
    /// [`OrderError`].
    pub fn put(&mut self, number: u64, block: T) -> Result<(), OrderError> {
        if number < self.next || self.ahead.contains_key(&number) {
            return Err(OrderError::Twice(number));
        }
        if let Some(blocks) = self.blocks.filter(|&blocks| number >= blocks) {
            return Err(OrderError::Beyond { number, blocks });
        }
        self.seen = self.seen.max(number + 1);
        self.ahead.insert(number, block);
        Ok(())
    }

    /// The block whose turn it is, if it has come.
    pub fn take(&mut self) -> Option<T> {
        let block = self.ahead.remove(&self.next)?;
        self.next += 1;
        Some(block)
    }

    /// A connection has told how many blocks there are.
    ///
    /// # Errors
    /// [`OrderError`].
    pub fn end(&mut self, blocks: u64) -> Result<(), OrderError> {
        match self.blocks {
            Some(before) if before != blocks => Err(OrderError::Ends(before, blocks)),
            _ if self.seen > blocks => Err(OrderError::Beyond { number: self.seen - 1, blocks }),
            _ => {
                self.blocks = Some(blocks);
                Ok(())
            }
        }
    }

    /// Whether all of the stream was taken.
    pub fn is_complete(&self) -> bool {
        self.blocks == Some(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_cannot_be_is_an_error() {
        let mut order = Order::new(AHEAD_MAX);
        order.put(1, ()).unwrap();
        assert_eq!(order.put(1, ()), Err(OrderError::Twice(1)));
        assert_eq!(order.take(), None);
        order.put(0, ()).unwrap();
        assert_eq!((order.take(), order.take(), order.take()), (Some(()), Some(()), None));
        assert_eq!(order.put(0, ()), Err(OrderError::Twice(0)));
        assert_eq!(order.end(1), Err(OrderError::Beyond { number: 1, blocks: 1 }));
        assert!(!order.has_room(1000));
        order.end(3).unwrap();
        assert!(!order.is_complete() && order.has_room(1000));
        assert_eq!(order.put(1000, ()), Err(OrderError::Beyond { number: 1000, blocks: 3 }));
        assert_eq!(order.end(4), Err(OrderError::Ends(3, 4)));
        assert_eq!(order.put(3, ()), Err(OrderError::Beyond { number: 3, blocks: 3 }));
        assert!(order.has_room(2));
        order.put(2, ()).unwrap();
        assert!(order.take().is_some() && order.is_complete());
    }

    proptest! {
        /// Connections that each take the next block when they are free, and bring theirs in any interleaving: everything comes out, in
        /// order, never more than fits is kept, and somebody can always go on.
        #[test]
        fn any_interleaving_comes_out_in_order(
            blocks in 0_u64..300,
            lanes in 1_usize..8,
            choices in proptest::collection::vec(any::<u16>(), 2000),
        ) {
            let mut choices = choices.into_iter().cycle().map(usize::from);
            let mut choose = |most: usize| choices.next().unwrap() % most;
            let mut queues = vec![std::collections::VecDeque::new(); lanes];
            for number in 0..blocks {
                queues[choose(lanes)].push_back(number);
            }
            let (mut order, mut out, mut ended) = (Order::new(AHEAD_MAX), Vec::new(), 0);
            while !order.is_complete() || ended < lanes {
                // Somebody can: the connection that has the next block, or one that has nothing left, or the taker.
                let able: Vec<usize> = (0..lanes)
                    .filter(|&lane| queues[lane].front().is_some_and(|&number| order.has_room(number)))
                    .collect();
                let taken = if choose(2) == 0 || able.is_empty() { order.take() } else { None };
                if let Some(number) = taken {
                    out.push(number);
                } else if !able.is_empty() {
                    let number = queues[able[choose(able.len())]].pop_front().unwrap();
                    order.put(number, number).unwrap();
                } else {
                    prop_assert!(queues.iter().all(|queue| queue.is_empty()), "nobody can go on");
                    order.end(blocks).unwrap();
                    ended += 1;
                }
                prop_assert!(order.ahead.len() as u64 <= AHEAD_MAX);
            }
            prop_assert_eq!(out, (0..blocks).collect::<Vec<_>>());
        }
    }
}
