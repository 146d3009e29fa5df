//! How the two filters are set up.

use std::path::PathBuf;
use std::time::Duration;

use enlightenment::Vdev;

/// A disk of the domain: the name that both hosts know it by, and where this host (or, in the hello, the target) finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskName {
    /// The virtual device, the same on both hosts.
    pub vdev: Vdev,
    /// Path of the block device or image file.
    pub path: PathBuf,
}

/// Settings of either filter; each takes what concerns it.
#[derive(Clone, Debug)]
pub struct Config {
    /// Source: bytes of referenced pages kept until their references are settled, and of pages that were copied since the wire is
    /// behind. When it is full, pages go raw as long as the wire is not behind, or else wait.
    pub window_bytes: u64,
    /// Source: bytes that may wait for the wire before it counts as behind: what follows is then copied, and overtaken by references.
    pub ahead_bytes: u64,
    /// Source: whether pages may go by reference at all; zero markers and run markers are used either way.
    pub references: bool,
    /// Source: whether VERIFY will come, so that pages written after the suspension have to be told apart.
    pub compare: bool,
    /// Source: passes over memory, counted from the first, in which pages may go by reference. A page that is sent again
    /// was written to after the lists were taken, so its hint is most likely stale: 1 by default.
    pub reference_passes: u32,
    /// Both: whether the process ends soon after the stream: memory is left to its exit then. What ends in the middle lets go of it all the same.
    pub process_ends: bool,
    /// Both: threads that hash pages. Each of the source's holds a record of 4 MiB.
    pub hashers: usize,
    /// Source: how long [`SourceFilter::drain`](super::SourceFilter::drain) waits before it sends retained pages raw.
    pub drain_timeout: Duration,
    /// Source: how long the target may take to answer the hello. The target waits for the hello as long as the stream lasts,
    /// since the source may first wait for the guest's lists.
    pub hello_timeout: Duration,
    /// Target: whether disks are read through io_uring, where the kernel has it.
    pub io_uring: bool,
    /// Target: reads in flight to begin with, and at most; between the two, as many as the disks are worth.
    pub queue_depth_first: usize,
    /// Target: reads in flight at most.
    pub queue_depth: usize,
    /// Target: threads that read disks without io_uring.
    pub readers: usize,
    /// Target: most bytes of one read.
    pub read_bytes: usize,
    /// Target: memory for disk reads in bytes, from the request until the page is in libxenguest's pipe.
    pub in_flight_bytes: usize,
    /// Target: unread bytes that a read may span to take in the next reference too.
    pub gap_bytes: u64,
    /// Target: references outstanding at most, whatever the source asks for; a page of table each 64 of them.
    pub max_outstanding: u32,
    /// Target: the domain's own disks as this host knows them. When present, only these are opened, by these paths, and the
    /// paths in the source's hello are ignored.
    pub own_disks: Option<Vec<DiskName>>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            window_bytes: 256 << 20,
            ahead_bytes: 12 << 20,
            references: true,
            compare: false,
            reference_passes: 1,
            process_ends: false,
            hashers: std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4)),
            drain_timeout: Duration::from_secs(30),
            hello_timeout: Duration::from_secs(30),
            io_uring: true,
            queue_depth_first: 8,
            queue_depth: 64,
            readers: 4,
            read_bytes: 1 << 20,
            in_flight_bytes: 256 << 20,
            gap_bytes: 16 << 10,
            max_outstanding: 4 << 20,
            own_disks: None,
        }
    }
}
