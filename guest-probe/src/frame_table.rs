//! The frame table: which page each frame of the pool holds, and whether it is as on disk, kept from events.
//!
//! Probes are attached first, then the snapshot is read, then all events since its beginning are applied to it. Each event sets what it
//! says, so events that the snapshot has seen already do no harm when they are applied again: whatever came last for a frame, comes
//! last. (With a gap among them that does not hold: `session.rs` drops events from before a loss.)
//! (`event.rs` says which moment each event is sent at, and why a frame that the table trusts too early is not listed.)

use crate::event::{Event, EventKind};

/// Bytes in a frame, and in a page on disk.
pub const PAGE_BYTES: u64 = 16_384;

/// Address of a frame in mysqld.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameAddr(pub u64);

/// A page of a tablespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId {
    /// The tablespace.
    pub space: u32,
    /// Its number there.
    pub page: u32,
}

/// What a frame holds, as far as the table knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameState {
    /// No page of a file.
    Free,
    /// A page as it was read.
    Read(PageId),
    /// A page that was changed and flushed since.
    Written(PageId),
    /// A page with changes that are not on disk.
    Dirty(PageId),
}

impl FrameState {
    /// The page, if there is one.
    pub const fn page(self) -> Option<PageId> {
        match self {
            Self::Free => None,
            Self::Read(page) | Self::Written(page) | Self::Dirty(page) => Some(page),
        }
    }

    /// Whether the page is as on disk.
    pub const fn is_clean(self) -> bool {
        matches!(self, Self::Read(_) | Self::Written(_))
    }
}

/// What applying an event came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Applied {
    /// The table is up to date.
    Yes,
    /// A tablespace's file was opened: it may be new.
    FileOpened,
    /// The pool has changed its shape, or a frame is not in the table: it needs a new snapshot.
    NeedsSnapshot,
}

/// A frame in 12 bytes.
#[derive(Clone, Copy)]
struct Packed {
    space: u32,
    page: u32,
    state: u8,
}

impl Packed {
    const FREE: u8 = 0;
    const READ: u8 = 1;
    const WRITTEN: u8 = 2;
    const DIRTY: u8 = 3;

    const fn pack(state: FrameState) -> Self {
        match state {
            FrameState::Free => Self { space: 0, page: 0, state: Self::FREE },
            FrameState::Read(id) => Self { space: id.space, page: id.page, state: Self::READ },
            FrameState::Written(id) => Self { space: id.space, page: id.page, state: Self::WRITTEN },
            FrameState::Dirty(id) => Self { space: id.space, page: id.page, state: Self::DIRTY },
        }
    }

    const fn unpack(self) -> FrameState {
        let id = PageId { space: self.space, page: self.page };
        match self.state {
            Self::READ => FrameState::Read(id),
            Self::WRITTEN => FrameState::Written(id),
            Self::DIRTY => FrameState::Dirty(id),
            _ => FrameState::Free,
        }
    }
}

const _: () = assert!(size_of::<Packed>() == 12);

/// Frames that lie one behind the other.
struct Chunk {
    first: FrameAddr,
    frames: Vec<Packed>,
}

/// The table. 12 bytes a frame.
#[derive(Default)]
pub struct FrameTable {
    /// By address, none overlapping another.
    chunks: Vec<Chunk>,
}

/// Two chunks that cannot both be: the snapshot was torn.
#[derive(Debug, thiserror::Error)]
#[error("two chunks of the pool overlap at {0:#x}: the snapshot was torn")]
pub struct Overlap(pub u64);

impl FrameTable {
    /// Adds a chunk as the snapshot found it.
    ///
    /// # Errors
    /// [`Overlap`] when it overlaps one that is there.
    pub fn add_chunk(
        &mut self,
        first: FrameAddr,
        frames: impl Iterator<Item = FrameState>,
    ) -> Result<(), Overlap> {
        let frames: Vec<Packed> = frames.map(Packed::pack).collect();
        let end = first.0.saturating_add(frames.len() as u64 * PAGE_BYTES);
        let at = self.chunks.partition_point(|chunk| chunk.first < first);
        let before = at.checked_sub(1).and_then(|before| self.chunks.get(before));
        if before.is_some_and(|before| before.end() > first.0)
            || self.chunks.get(at).is_some_and(|next| next.first.0 < end)
        {
            return Err(Overlap(first.0));
        }
        self.chunks.insert(at, Chunk { first, frames });
        Ok(())
    }

    /// What the table knows of a frame; `None` when no chunk has it.
    pub fn get(&self, frame: FrameAddr) -> Option<FrameState> {
        let (chunk, index) = self.locate(frame)?;
        Some(self.chunks[chunk].frames[index].unpack())
    }

    /// Applies one event.
    pub fn apply(&mut self, kind: EventKind, event: &Event) -> Applied {
        let id = PageId { space: event.space, page: event.page };
        let state = match kind {
            EventKind::ReadComplete => FrameState::Read(id),
            // A page that is made is on disk when it is cleaned the first time; until then nobody may look for it there.
            EventKind::Create | EventKind::Dirty => FrameState::Dirty(id),
            EventKind::Clean => FrameState::Written(id),
            EventKind::Free => FrameState::Free,
            EventKind::FileOpen => return Applied::FileOpened,
            EventKind::Resize => return Applied::NeedsSnapshot,
        };
        let Some((chunk, index)) = self.locate(FrameAddr(event.frame)) else { return Applied::NeedsSnapshot };
        self.chunks[chunk].frames[index] = Packed::pack(state);
        Applied::Yes
    }

    /// All frames in order of their addresses.
    pub fn iter(&self) -> impl Iterator<Item = (FrameAddr, FrameState)> + '_ {
        self.chunks.iter().flat_map(|chunk| {
            let addresses = (0..).map(|index: u64| FrameAddr(chunk.first.0 + index * PAGE_BYTES));
            addresses.zip(chunk.frames.iter().map(|frame| frame.unpack()))
        })
    }

    /// Frames in all.
    pub fn len(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.frames.len()).sum()
    }

    /// Whether there is no frame.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many frames are in each state.
    pub fn counts(&self) -> FrameCounts {
        let mut counts = FrameCounts::default();
        for (_, state) in self.iter() {
            match state {
                FrameState::Free => counts.free += 1,
                FrameState::Read(_) => counts.read += 1,
                FrameState::Written(_) => counts.written += 1,
                FrameState::Dirty(_) => counts.dirty += 1,
            }
        }
        counts
    }

    fn locate(&self, frame: FrameAddr) -> Option<(usize, usize)> {
        let chunk = self.chunks.partition_point(|chunk| chunk.first <= frame).checked_sub(1)?;
        let into = frame.0 - self.chunks[chunk].first.0;
        let index = usize::try_from(into / PAGE_BYTES).ok()?;
        (into.is_multiple_of(PAGE_BYTES) && index < self.chunks[chunk].frames.len()).then_some((chunk, index))
    }
}

impl Chunk {
    fn end(&self) -> u64 {
        self.first.0.saturating_add(self.frames.len() as u64 * PAGE_BYTES)
    }
}

/// Frames by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FrameCounts {
    /// Without a page.
    pub free: u64,
    /// As read.
    pub read: u64,
    /// Changed and flushed.
    pub written: u64,
    /// With changes that are not on disk.
    pub dirty: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FIRST: u64 = 0x7f00_0000_4000;

    fn table(frames: usize) -> FrameTable {
        let mut table = FrameTable::default();
        table.add_chunk(FrameAddr(FIRST), std::iter::repeat_n(FrameState::Free, frames)).unwrap();
        table
    }

    fn event(index: u64, page: u32) -> Event {
        Event { frame: FIRST + index * PAGE_BYTES, space: 5, page, ..Event::default() }
    }

    fn state(table: &FrameTable, index: u64) -> FrameState {
        table.get(FrameAddr(FIRST + index * PAGE_BYTES)).unwrap()
    }

    #[test]
    fn a_frame_s_life() {
        let mut table = table(4);
        let id = PageId { space: 5, page: 9 };
        let expected = [
            (EventKind::ReadComplete, FrameState::Read(id)),
            (EventKind::Dirty, FrameState::Dirty(id)),
            (EventKind::Clean, FrameState::Written(id)),
            (EventKind::Free, FrameState::Free),
            (EventKind::Create, FrameState::Dirty(id)),
        ];
        for (kind, after) in expected {
            assert_eq!(table.apply(kind, &event(2, 9)), Applied::Yes);
            assert_eq!(state(&table, 2), after);
        }
        assert_eq!(table.counts(), FrameCounts { free: 3, dirty: 1, ..FrameCounts::default() });
    }

    #[test]
    fn what_the_table_cannot_know_needs_a_snapshot() {
        let mut table = table(4);
        assert_eq!(table.apply(EventKind::Free, &event(4, 0)), Applied::NeedsSnapshot);
        let mut between = event(1, 0);
        between.frame += 4096;
        assert_eq!(table.apply(EventKind::Free, &between), Applied::NeedsSnapshot);
        assert_eq!(table.apply(EventKind::Resize, &Event::default()), Applied::NeedsSnapshot);
        assert_eq!(table.apply(EventKind::FileOpen, &Event::default()), Applied::FileOpened);
    }

    #[test]
    fn chunks_that_overlap_are_refused() {
        let mut table = table(4);
        let one = || std::iter::once(FrameState::Free);
        assert!(table.add_chunk(FrameAddr(FIRST + 3 * PAGE_BYTES), one()).is_err());
        assert!(
            table.add_chunk(FrameAddr(FIRST - PAGE_BYTES), std::iter::repeat_n(FrameState::Free, 2)).is_err()
        );
        table.add_chunk(FrameAddr(FIRST + 4 * PAGE_BYTES), one()).unwrap();
        table.add_chunk(FrameAddr(FIRST - PAGE_BYTES), one()).unwrap();
        assert_eq!(table.len(), 6);
        assert!(table.iter().map(|(frame, _)| frame.0).is_sorted());
    }

    proptest! {
        /// Events that are applied twice, as after a snapshot that saw some of them, end in the same state.
        #[test]
        fn replayed_events_end_alike(
            events in prop::collection::vec((0_u64..4, 1_u32..6, 0_u32..3), 0..40),
            seen in 0_usize..40,
        ) {
            let mut once = table(4);
            let mut twice = table(4);
            for (frame, kind, page) in events.iter().take(seen).chain(&events) {
                let _ = twice.apply(EventKind::from_u32(*kind).unwrap(), &event(*frame, *page));
            }
            for (frame, kind, page) in &events {
                let _ = once.apply(EventKind::from_u32(*kind).unwrap(), &event(*frame, *page));
            }
            for frame in events.iter().map(|(frame, ..)| *frame) {
                prop_assert_eq!(state(&once, frame), state(&twice, frame));
            }
        }

        #[test]
        fn any_event_is_applied_or_refused(frame in any::<u64>(), kind in 1_u32..8, space in any::<u32>()) {
            let event = Event { frame, space, ..Event::default() };
            let _ = table(4).apply(EventKind::from_u32(kind).unwrap(), &event);
        }
    }
}
