//! What the eBPF programs and guest-probe say to each other. Both compile this file, so it uses `core` alone.
//!
//! **Which moment an event is sent at.** When a function begins: a return probe costs more than twice as much. An event after which a frame
//! is to be trusted *less* (dirtied, freed) is thus in the table before the control block says so, and all is well. One after which it is to
//! be trusted *more* is in the table too early, for as long as the function runs, but then the control block says so itself: while a
//! read is being completed its `io_fix` is read, and until a page has left the flush list its `oldest_modification` is not 0. A frame is
//! listed only when the table and the block, read at that moment, both vouch for it (`lists.rs`). The one exception is
//! [`EventKind::Create`], sent on return, since only then is it known which frame the page is in.

/// One event, 24 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// Address of the frame in mysqld; 0 when the event is about none.
    pub frame: u64,
    /// Tablespace id of the page in it; for [`EventKind::FileOpen`] that of the file.
    pub space: u32,
    /// Page number in the tablespace.
    pub page: u32,
    /// What happened ([`EventKind`]).
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
}

/// What happened to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum EventKind {
    /// A page was read into it.
    ReadComplete = 1,
    /// A new page, which is not on disk yet, was made in it.
    Create = 2,
    /// Its page is about to join the flush list: clean becomes dirty.
    Dirty = 3,
    /// Its page is about to leave the flush list: dirty becomes clean.
    Clean = 4,
    /// It is about to be freed.
    Free = 5,
    /// A tablespace's file is about to be opened.
    FileOpen = 6,
    /// The pool is about to grow or to shrink by a chunk.
    Resize = 7,
}

impl EventKind {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::ReadComplete,
        Self::Create,
        Self::Dirty,
        Self::Clean,
        Self::Free,
        Self::FileOpen,
        Self::Resize,
    ];

    /// A word for it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::ReadComplete => "read",
            Self::Create => "create",
            Self::Dirty => "dirty",
            Self::Clean => "clean",
            Self::Free => "free",
            Self::FileOpen => "file_open",
            Self::Resize => "resize",
        }
    }

    /// The kind with this number, if there is one.
    pub const fn from_u32(value: u32) -> Option<Self> {
        match value {
            1 => Some(Self::ReadComplete),
            2 => Some(Self::Create),
            3 => Some(Self::Dirty),
            4 => Some(Self::Clean),
            5 => Some(Self::Free),
            6 => Some(Self::FileOpen),
            7 => Some(Self::Resize),
            _ => None,
        }
    }
}

/// Where the programs find what they need in mysqld's structures: byte offsets, set when the programs are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Layout {
    /// Of the page id (tablespace id, then page number, 4 bytes each) in a control block.
    pub block_page_id: u32,
    /// Of the `io_fix` byte in a control block.
    pub block_io_fix: u32,
    /// Of the state byte in a control block.
    pub block_state: u32,
    /// Of the frame's address in a control block.
    pub block_frame: u32,
    /// Of the tablespace's address in a `fil_node_t`.
    pub node_space: u32,
    /// Of the tablespace id in a `fil_space_t`.
    pub space_id: u32,
    /// The value of `io_fix` that means a read.
    pub io_fix_read: u8,
    /// The value of the state that means a page of a file in a frame. A page that is in the pool compressed alone has a control
    /// block too, a shorter one without a frame.
    pub state_file_page: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// Bytes waiting in the ring buffer at which the reader is woken.
    pub wake_at: u32,
}

/// Index of the counter of events that found the ring buffer full.
pub const COUNTER_LOST: u32 = 0;
/// Index of the counter of events whose control block could not be read.
pub const COUNTER_UNREADABLE: u32 = 1;
/// Counters in all.
pub const COUNTERS: u32 = 2;

const _: () = assert!(size_of::<Event>() == 24 && size_of::<Layout>() == 32);
