//! Reads references from disks, on threads of its own.
//!
//! ```text
//! push ─► queue ─► reads in flight ─► verifiers ─► results
//!           ▲      (io_uring, O_DIRECT)  (hashes)      │
//! cancel ───┘              ▲                           │
//!                          └────── buffers ◄───────────┘ a batch that is dropped
//! ```
//!
//! One thread takes the next references (`queue`: the oldest, with its neighbours on the disk), and keeps as many reads in flight as
//! the disk is worth (`depth`). What a read has brought is hashed page by page and handed over as a batch. Memory is bounded by the
//! number of buffers, whatever the guest's size; without a free one the reading waits, the stream never does.
//!
//! Where the kernel has no io_uring, or forbids it, threads that wait in `pread(2)` do the same.

mod buffers;
mod depth;
mod queue;
mod ring;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::config::Config;
use super::disk::{ALIGNMENT, Disk};
use super::memory_record::Hash;
use super::page_hash::PageHasher;
use super::side_message::Refusal;
use super::xen_stream::PAGE;
use buffers::{Buffers, ReadBuffer};
use queue::{Bounds, Job, Queue};
use ring::Ring;

/// Longest read, whatever the configuration says: what a block device takes at once is less (`max_sectors_kb`).
const LONGEST_READ: usize = 8 << 20;

/// Bytes of a small buffer.
const SMALL: usize = 128 << 10;

/// Pages that are looked at together, or a few more: reads that are done together go to the verifiers in groups of this size.
const PAGES_TOGETHER: usize = 128;

/// Where a reference lies, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The disk's index in the hello.
    pub disk: u8,
    /// Byte offset.
    pub offset: u64,
    /// The reference's number.
    pub number: u64,
}

/// What is expected there, and for which page.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The guest's page.
    pub pfn: u64,
    /// The hash of its bytes.
    pub hash: Hash,
}

/// A reference that was looked at.
#[derive(Clone, Copy, Debug)]
pub struct Loaded {
    /// The guest's page.
    pub pfn: u64,
    /// The reference's number.
    pub number: u64,
    /// Where its bytes lie in the batch, or why they must not be used.
    pub outcome: Result<usize, Refusal>,
}

/// What one read brought. Dropped, its buffer is read into again.
#[derive(Debug)]
pub struct Batch {
    buffer: ReadBuffer,
    /// The references that it covers.
    pub loaded: Vec<Loaded>,
    /// Bytes read.
    pub read_bytes: u64,
    /// Time that the read took.
    pub read_seconds: f64,
    /// Time spent hashing.
    pub hash_seconds: f64,
}

impl Batch {
    /// What was read; [`Loaded::outcome`] says where in it a page lies.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.bytes()
    }
}

/// A read that is done, or not yet.
#[derive(Debug)]
struct Read {
    job: Job,
    buffer: ReadBuffer,
    /// Bytes read.
    outcome: io::Result<usize>,
    seconds: f64,
}

/// What a job reads: whole blocks around its references.
#[derive(Clone, Copy, Debug)]
struct Extent {
    disk: u8,
    start: u64,
    length: u64,
}

impl Extent {
    fn of(job: &Job) -> Self {
        let alignment = ALIGNMENT as u64;
        let place = |entry: Option<&(Key, Wanted)>| entry.map_or((0, 0), |(key, _)| (key.disk, key.offset));
        let ((disk, first), (_, last)) = (place(job.wanted.first()), place(job.wanted.last()));
        let start = first / alignment * alignment;
        Self { disk, start, length: (last + PAGE as u64).next_multiple_of(alignment) - start }
    }
}

/// What asking for a job brings.
enum Taken {
    Job(Job),
    Nothing,
    /// The restorer was dropped.
    Over,
}

#[derive(Debug, Default)]
struct Waiting {
    queue: Queue,
    stopped: bool,
}

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
    work: Condvar,
    disks: Vec<Option<Disk>>,
    hasher: PageHasher,
    bounds: Bounds,
    /// For reads of any length.
    large: Arc<Buffers>,
    /// For those that are no longer than this, as most are.
    small: Arc<Buffers>,
}

/// The queue, and the threads that read.
#[derive(Debug)]
pub struct Restorer {
    shared: Arc<Shared>,
    /// Batches that are ready, in no order, as many at once as were looked at together.
    pub results: Receiver<Vec<Batch>>,
    #[cfg_attr(not(test), expect(dead_code, reason = "they are not waited for, but in tests"))]
    threads: Vec<JoinHandle<()>>,
}

impl Restorer {
    /// Starts the threads.
    pub fn start(key: [u8; 32], disks: Vec<Option<Disk>>, config: &Config) -> io::Result<Self> {
        #[cfg(test)]
        if let Some(disk) = disks.iter().flatten().next() {
            super::fault::point(&disk.path, super::fault::Point::RestorerStart)?;
        }
        let read_bytes = config.read_bytes.clamp(PAGE, LONGEST_READ);
        let readers = config.readers.max(1);
        // A read begins and ends at whole blocks.
        let large_bytes = read_bytes + 2 * ALIGNMENT;
        // Reads that wait to be hashed and written are no more than those that the disk is worth, or the memory of small ones would
        // be all over the place.
        let small = if large_bytes > SMALL { config.queue_depth.max(1) * 2 } else { 0 };
        let small = small.min(config.in_flight_bytes / 4 / SMALL);
        let large = ((config.in_flight_bytes - small * SMALL) / large_bytes).max(2);
        let buffers = small + large;
        let shared = Arc::new(Shared {
            waiting: Mutex::default(),
            work: Condvar::new(),
            disks,
            hasher: PageHasher::new(&key),
            bounds: Bounds { read_bytes: read_bytes as u64, gap_bytes: config.gap_bytes },
            large: Buffers::new(small, large, large_bytes),
            small: Buffers::new(0, small, SMALL),
        });
        let (done, done_rx) = bounded::<Vec<Read>>(buffers);
        let (results_tx, results) = bounded(buffers);
        let mut threads = Vec::new();
        let mut spawn = |name: String, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name).spawn(body).map(|thread| threads.push(thread))
        };
        for number in 0..config.hashers.max(1) {
            let (shared, done, results) = (Arc::clone(&shared), done_rx.clone(), results_tx.clone());
            let verify = move || {
                while let Ok(reads) = done.recv() {
                    if results.send(shared.verify(reads)).is_err() {
                        return;
                    }
                }
            };
            spawn(format!("target-hash-{number}"), Box::new(verify))?;
        }
        let most = config.queue_depth.clamp(1, large);
        let ring = if config.io_uring {
            Ring::new(config.queue_depth_first, most, buffers).map(Some)
        } else {
            Ok(None)
        };
        let ring = ring.unwrap_or_else(|error| {
            tracing::info!(%error, readers, "no io_uring here: reading with threads");
            None
        });
        match ring {
            Some(ring) => {
                let shared = Arc::clone(&shared);
                let read = move || {
                    if let Some(error) = ring.run(&shared, &done) {
                        tracing::warn!(%error, "io_uring has failed: reading with one thread");
                        shared.read_alone(&done);
                    }
                };
                spawn("target-reads".into(), Box::new(read))?;
            }
            None => {
                for number in 0..readers {
                    let (shared, done) = (Arc::clone(&shared), done.clone());
                    spawn(format!("target-read-{number}"), Box::new(move || shared.read_alone(&done)))?;
                }
            }
        }
        Ok(Self { shared, results, threads })
    }

    /// Whether a reference can be read at all.
    pub fn check(&self, disk: u8, offset: u64) -> Result<(), Refusal> {
        let disk =
            self.shared.disks.get(disk as usize).and_then(Option::as_ref).ok_or(Refusal::UnknownDisk)?;
        if disk.holds_page(offset) { Ok(()) } else { Err(Refusal::OutOfBounds) }
    }

    /// Queues references; their numbers ascend from call to call.
    pub fn push(&self, wanted: impl Iterator<Item = (Key, Wanted)>) {
        self.shared.lock().queue.extend(wanted, self.shared.bounds);
        self.shared.work.notify_all();
    }

    /// Takes references out of the queue again; those that are being read already come all the same.
    pub fn cancel(&self, keys: &[Key]) {
        if keys.is_empty() {
            return;
        }
        let mut waiting = self.shared.lock();
        for key in keys {
            waiting.queue.remove(key);
        }
    }

    /// Takes all references out of the queue.
    pub fn cancel_all(&self) {
        self.shared.lock().queue.clear();
    }
}

impl Drop for Restorer {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.work.notify_all();
        self.shared.large.end();
        self.shared.small.end();
        // The threads end by themselves, after the reads that are under way. They are not waited for: a slow disk shall not
        // hold up a migration that no longer needs it.
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disk(&self, index: u8) -> Option<&Disk> {
        self.disks.get(index as usize).and_then(Option::as_ref)
    }

    /// The descriptor of a disk; -1, which the kernel refuses, for one that is not there.
    fn raw_fd(&self, disk: u8) -> RawFd {
        self.disk(disk).map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Takes those that one read covers; waits for them if it may.
    fn next_job(&self, may_wait: bool) -> Taken {
        let mut waiting = self.lock();
        while may_wait && !waiting.stopped && waiting.queue.is_empty() {
            waiting = self.work.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        if waiting.stopped {
            return Taken::Over;
        }
        waiting.queue.next_job(self.bounds).map_or(Taken::Nothing, Taken::Job)
    }

    /// Reads one job after the other.
    fn read_alone(&self, done: &Sender<Vec<Read>>) {
        loop {
            // Not before there is room for the longest read is it decided what is read.
            let room = self.large.take(true);
            let Taken::Job(job) = self.next_job(true) else { return };
            let extent = Extent::of(&job);
            let buffer = if self.small.fits(extent.length as usize) { self.small.take(true) } else { room };
            let Some(mut buffer) = buffer.filter(|buffer| !buffer.is_none()) else { return };
            let began = Instant::now();
            let outcome = match self.disk(extent.disk) {
                Some(disk) => disk.read(buffer.get(extent.length as usize), extent.start),
                None => Err(io::ErrorKind::NotFound.into()),
            };
            let seconds = began.elapsed().as_secs_f64();
            if done.send(vec![Read { job, buffer, outcome, seconds }]).is_err() {
                return;
            }
        }
    }

    /// The bytes that a read brought, which may be fewer than were asked for: the rest is read here, if it is not the disk's end.
    fn complete(&self, read: &mut Read, extent: Extent) -> io::Result<usize> {
        let length = extent.length as usize;
        let got = std::mem::replace(&mut read.outcome, Ok(0))?.min(length);
        let Some(disk) = self.disk(extent.disk) else { return Ok(got) };
        #[cfg(test)]
        super::fault::point(&disk.path, super::fault::Point::DiskRead)?;
        // Direct I/O goes on only where a sector begins.
        if got == 0 || got == length || !got.is_multiple_of(512) || extent.start + got as u64 >= disk.size() {
            return Ok(got);
        }
        let rest = read.buffer.get(length).get_mut(got..).unwrap_or_default();
        Ok(got + disk.read(rest, extent.start + got as u64)?)
    }

    /// Looks at what some reads brought, at once.
    fn verify(&self, mut reads: Vec<Read>) -> Vec<Batch> {
        let mut came = Vec::with_capacity(reads.len());
        for read in &mut reads {
            let extent = Extent::of(&read.job);
            let length = self.complete(read, extent).unwrap_or_else(|error| {
                let Extent { disk, start, length } = extent;
                tracing::warn!(%error, disk, offset = start, length, "cannot read");
                0
            });
            came.push((extent.start, length));
        }
        let began = Instant::now();
        let mut pages: Vec<&[u8]> = Vec::with_capacity(PAGES_TOGETHER);
        for (read, came) in reads.iter().zip(&came) {
            pages
                .extend(read.job.wanted.iter().filter_map(|(key, _)| place(read, *came, key)).map(|it| it.1));
        }
        let mut hashes = Vec::with_capacity(pages.len());
        self.hasher.hash_all(&pages, &mut hashes);
        let mut hashes = hashes.into_iter();
        let hash_seconds = began.elapsed().as_secs_f64() / reads.len().max(1) as f64;
        let batches = reads.into_iter().zip(came).map(|(read, came)| {
            let loaded = read.job.wanted.iter().map(|(key, wanted)| {
                let outcome = match place(&read, came, key) {
                    None => Err(Refusal::IoError),
                    // Hashes are of those pages that are there, in the same order.
                    Some((at, _)) if hashes.next() == Some(wanted.hash) => Ok(at),
                    Some(_) => Err(Refusal::Hash),
                };
                Loaded { pfn: wanted.pfn, number: key.number, outcome }
            });
            Batch {
                loaded: loaded.collect(),
                buffer: read.buffer,
                read_bytes: came.1 as u64,
                read_seconds: read.seconds,
                hash_seconds,
            }
        });
        batches.collect()
    }
}

/// Where in the buffer a reference's page lies, and its bytes, if the read that came (its offset and length) has it.
fn place<'a>(read: &'a Read, (start, length): (u64, usize), key: &Key) -> Option<(usize, &'a [u8])> {
    let at = (key.offset - start) as usize;
    Some((at, read.buffer.bytes().get(..length)?.get(at..at + PAGE)?))
}

#[cfg(test)]
mod tests {
    use super::super::memory_record;
    use super::*;
    use std::io::Write as _;

    const KEY: [u8; 32] = [5; 32];

    /// A restorer on a file of `pages` pages, page i full of i.
    fn restorer(pages: u8, config: &Config) -> (tempfile::NamedTempFile, Restorer) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for page in 0..pages {
            file.write_all(&[page; PAGE]).unwrap();
        }
        let disk = Disk::open(file.path()).unwrap();
        let restorer = Restorer::start(KEY, vec![Some(disk), None], config).unwrap();
        (file, restorer)
    }

    fn wanted(number: u64, page: u8) -> (Key, Wanted) {
        let key = Key { disk: 0, offset: u64::from(page) * PAGE as u64, number };
        (key, Wanted { pfn: number + 100, hash: memory_record::hash(&KEY, &[page; PAGE]) })
    }

    #[test]
    fn neighbours_are_read_at_once() {
        for io_uring in [true, false] {
            read_neighbours(io_uring);
        }
    }

    /// Batches as they come.
    fn batches(restorer: &Restorer) -> impl Iterator<Item = Batch> + '_ {
        std::iter::repeat_with(|| restorer.results.recv().unwrap()).flatten()
    }

    fn read_neighbours(io_uring: bool) {
        let (_file, restorer) = restorer(64, &Config { readers: 1, io_uring, ..Config::default() });
        restorer.push([7, 5, 6, 8, 60].into_iter().enumerate().map(|(i, page)| wanted(i as u64, page)));
        let batches: Vec<Batch> = batches(&restorer).take(2).collect();
        let mut lengths: Vec<u64> = batches.iter().map(|batch| batch.read_bytes).collect();
        lengths.sort_unstable();
        assert_eq!(lengths, [4096, 4 * 4096]);
        for batch in &batches {
            for loaded in &batch.loaded {
                let page = [7, 5, 6, 8, 60][loaded.number as usize];
                let at = loaded.outcome.unwrap();
                assert_eq!(batch.bytes()[at..at + PAGE], [page; PAGE]);
            }
        }
    }

    #[test]
    fn other_bytes_are_refused() {
        let (_file, restorer) = restorer(4, &Config::default());
        let (key, _) = wanted(0, 1);
        let (_, other) = wanted(0, 2);
        restorer.push([(key, other)].into_iter());
        let batch = batches(&restorer).next().unwrap();
        assert_eq!(batch.loaded[0].outcome, Err(Refusal::Hash));
        assert_eq!(restorer.check(0, 4 * 4096), Err(Refusal::OutOfBounds));
        assert_eq!(restorer.check(0, 100), Err(Refusal::OutOfBounds));
        assert_eq!(restorer.check(1, 0), Err(Refusal::UnknownDisk));
        assert_eq!(restorer.check(9, 0), Err(Refusal::UnknownDisk));
    }

    #[test]
    fn a_disk_that_ends_in_the_middle_of_a_read_gives_what_it_has() {
        for io_uring in [true, false] {
            let (file, restorer) = restorer(4, &Config { io_uring, ..Config::default() });
            // The disk shrinks under its reader.
            file.as_file().set_len(2 * PAGE as u64 + 512).unwrap();
            restorer.push((0..4).map(|page| wanted(u64::from(page), page)));
            let mut outcomes = vec![None; 4];
            let mut batches = batches(&restorer);
            while outcomes.contains(&None) {
                for loaded in &batches.next().unwrap().loaded {
                    outcomes[loaded.number as usize] = Some(loaded.outcome.map(|_| ()));
                }
            }
            let refused = Some(Err(Refusal::IoError));
            assert_eq!(outcomes, [Some(Ok(())), Some(Ok(())), refused, refused]);
        }
    }

    /// Short reads wait for small buffers, of which there are few, and take no large ones instead.
    #[test]
    fn reads_that_wait_for_small_buffers_come_all_the_same() {
        for io_uring in [true, false] {
            let config = Config {
                read_bytes: 256 << 10,
                in_flight_bytes: 1 << 20,
                gap_bytes: 0,
                io_uring,
                ..Config::default()
            };
            let (_file, restorer) = restorer(64, &config);
            let shared = Arc::clone(&restorer.shared);
            assert!(shared.small.fits(SMALL) && !shared.small.fits(SMALL + 1));
            restorer.push((0..16).map(|page| wanted(u64::from(page), 4 * page)));
            let mut held = std::collections::VecDeque::new();
            let mut seen = std::collections::BTreeSet::new();
            for batch in batches(&restorer).take(16) {
                assert_eq!(batch.buffer.bytes().len(), SMALL);
                seen.extend(
                    batch.loaded.iter().filter(|loaded| loaded.outcome.is_ok()).map(|loaded| loaded.number),
                );
                // One fewer than there are, so that the next has one to come in.
                held.push_back(batch);
                if held.len() > 1 {
                    held.pop_front();
                }
            }
            assert_eq!(seen.len(), 16);
        }
    }

    #[test]
    fn it_ends_with_all_batches_out_and_work_left() {
        for io_uring in [true, false] {
            let config = Config {
                readers: 2,
                read_bytes: 4096,
                in_flight_bytes: 3 * 3 * 4096,
                gap_bytes: 0,
                io_uring,
                ..Config::default()
            };
            let (_file, mut restorer) = restorer(32, &config);
            restorer.push((0..16).map(|page| wanted(u64::from(page), 2 * page)));
            let batch = batches(&restorer).next().unwrap();
            let threads = std::mem::take(&mut restorer.threads);
            drop(restorer);
            drop(batch);
            for thread in threads {
                thread.join().unwrap();
            }
        }
    }
}
