//! Reads references from disks, on threads of its own.
//!
//! References wait in an order of disk and offset. A reader takes the next ones from where the last reader stopped (the
//! elevator's way: up, then again from the bottom), as many as one read of bounded length covers, reads them all at once, hashes
//! each page, and hands the batch over. Memory is bounded by the number of batches; a reader without one waits, the
//! stream never does.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::config::Config;
use super::descriptor::Ringer;
use super::disk::{ALIGNMENT, AlignedBuffer, Disk};
use super::memory_record::{self, Hash};
use super::side_message::Refusal;
use super::xen_stream::{MAX_BATCH, PAGE};

/// Where a reference lies, and its number: the order of the queue.
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

/// What one read brought; given back to the restorer when it is used up.
#[derive(Debug, Default)]
pub struct Batch {
    buffer: AlignedBuffer,
    /// The references that it covers.
    pub loaded: Vec<Loaded>,
    wanted: Vec<(Key, Wanted)>,
    /// Bytes read.
    pub bytes: u64,
    /// Time spent reading.
    pub read_seconds: f64,
    /// Time spent hashing.
    pub hash_seconds: f64,
}

impl Batch {
    /// The page at a place that [`Loaded::outcome`] named.
    pub fn page(&self, at: usize) -> &[u8] {
        self.buffer.bytes().get(at..at + PAGE).unwrap_or_default()
    }
}

#[derive(Debug, Default)]
struct Queue {
    pending: BTreeMap<Key, Wanted>,
    cursor: Option<Key>,
    stopped: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    disks: Vec<Option<Disk>>,
    key: [u8; 32],
    read_bytes: u64,
    gap_bytes: u64,
}

/// The readers and their queue.
#[derive(Debug)]
pub struct Restorer {
    shared: Arc<Shared>,
    batches: Option<Sender<Batch>>,
    /// Batches that are ready, in no order.
    pub results: Receiver<Batch>,
    readers: Vec<JoinHandle<()>>,
}

impl Restorer {
    /// Starts the readers; they ring when a batch is ready.
    pub fn start(
        key: [u8; 32],
        disks: Vec<Option<Disk>>,
        config: &Config,
        ringer: &Ringer,
    ) -> std::io::Result<Self> {
        let read_bytes = config.read_bytes.max(PAGE);
        let readers = config.readers.max(1);
        let batches = (config.in_flight_bytes / read_bytes).max(readers);
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            disks,
            key,
            read_bytes: read_bytes as u64,
            gap_bytes: config.gap_bytes,
        });
        let (batches_tx, batches_rx) = bounded(batches);
        let (results_tx, results) = bounded(batches);
        for _ in 0..batches {
            let _ = batches_tx.send(Batch::default());
        }
        let mut this = Self { shared, batches: Some(batches_tx), results, readers: Vec::new() };
        for i in 0..readers {
            let (shared, batches, results) =
                (Arc::clone(&this.shared), batches_rx.clone(), results_tx.clone());
            let ringer = ringer.clone();
            let reader = std::thread::Builder::new().name(format!("reader-{i}")).spawn(move || {
                while let Ok(mut batch) = batches.recv() {
                    if !shared.next_job(&mut batch.wanted) {
                        return;
                    }
                    shared.load(&mut batch);
                    if results.send(batch).is_err() {
                        return;
                    }
                    ringer.ring();
                }
            })?;
            this.readers.push(reader);
        }
        Ok(this)
    }

    /// Whether a reference can be read at all.
    pub fn check(&self, disk: u8, offset: u64) -> Result<(), Refusal> {
        let disk =
            self.shared.disks.get(disk as usize).and_then(Option::as_ref).ok_or(Refusal::UnknownDisk)?;
        if disk.holds_page(offset) { Ok(()) } else { Err(Refusal::OutOfBounds) }
    }

    /// Queues references.
    pub fn push(&self, wanted: impl Iterator<Item = (Key, Wanted)>) {
        self.shared.lock().pending.extend(wanted);
        self.shared.work.notify_all();
    }

    /// Takes references out of the queue again; those that are being read already come all the same.
    pub fn cancel(&self, keys: &[Key]) {
        if keys.is_empty() {
            return;
        }
        let mut queue = self.shared.lock();
        for key in keys {
            queue.pending.remove(key);
        }
    }

    /// Takes all references out of the queue.
    pub fn cancel_all(&self) {
        self.shared.lock().pending.clear();
    }

    /// Gives a batch back, so that a reader can fill it again.
    pub fn recycle(&self, batch: Batch) {
        if let Some(batches) = &self.batches {
            let _ = batches.send(batch);
        }
    }
}

impl Drop for Restorer {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.work.notify_all();
        self.batches = None;
        // The readers end by themselves, each after the read that it is in. They are not waited for: a slow disk shall not
        // hold up a migration that no longer needs it.
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for references and takes those that one read covers. False: it is over.
    fn next_job(&self, wanted: &mut Vec<(Key, Wanted)>) -> bool {
        wanted.clear();
        let mut queue = self.lock();
        while !queue.stopped && queue.pending.is_empty() {
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if queue.stopped {
            return false;
        }
        let above = queue.cursor.and_then(|cursor| queue.pending.range(cursor..).next());
        let Some((&first, _)) = above.or_else(|| queue.pending.first_key_value()) else { return false };
        let mut end = first.offset;
        let mut next = Some(first);
        while let Some(key) = next {
            let Some(value) = queue.pending.remove(&key) else { break };
            wanted.push((key, value));
            end = end.max(key.offset + PAGE as u64);
            next = queue.pending.range(key..).next().map(|(&key, _)| key).filter(|key| {
                key.disk == first.disk
                    && key.offset <= end + self.gap_bytes
                    && key.offset + PAGE as u64 - first.offset <= self.read_bytes
                    && wanted.len() < MAX_BATCH
            });
        }
        queue.cursor = wanted.last().map(|last| last.0);
        true
    }

    /// Reads and checks a job.
    fn load(&self, batch: &mut Batch) {
        batch.loaded.clear();
        (batch.bytes, batch.read_seconds, batch.hash_seconds) = (0, 0.0, 0.0);
        let Some(((first, _), (last, _))) = batch.wanted.first().zip(batch.wanted.last()) else { return };
        let alignment = ALIGNMENT as u64;
        let start = first.offset / alignment * alignment;
        let length = (last.offset + PAGE as u64).next_multiple_of(alignment) - start;
        let began = Instant::now();
        let read = match self.disks.get(first.disk as usize).and_then(Option::as_ref) {
            Some(disk) => disk.read(batch.buffer.get(length as usize), start),
            None => Err(std::io::ErrorKind::NotFound.into()),
        };
        batch.read_seconds = began.elapsed().as_secs_f64();
        let read = read.unwrap_or_else(|error| {
            tracing::warn!(%error, disk = first.disk, offset = start, length, "cannot read");
            0
        });
        batch.bytes = read as u64;
        let began = Instant::now();
        let bytes = batch.buffer.bytes().get(..read).unwrap_or_default();
        batch.loaded.extend(batch.wanted.iter().map(|(key, wanted)| {
            let at = (key.offset - start) as usize;
            let outcome = match bytes.get(at..at + PAGE) {
                None => Err(Refusal::IoError),
                Some(page) if memory_record::hash(&self.key, page) != wanted.hash => Err(Refusal::Hash),
                Some(_) => Ok(at),
            };
            Loaded { pfn: wanted.pfn, number: key.number, outcome }
        }));
        batch.hash_seconds = began.elapsed().as_secs_f64();
    }
}

#[cfg(test)]
mod tests {
    use super::super::descriptor::bell;
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
        let restorer = Restorer::start(KEY, vec![Some(disk), None], config, &bell().unwrap().0).unwrap();
        (file, restorer)
    }

    fn wanted(number: u64, page: u8) -> (Key, Wanted) {
        let key = Key { disk: 0, offset: u64::from(page) * PAGE as u64, number };
        (key, Wanted { pfn: number + 100, hash: memory_record::hash(&KEY, &[page; PAGE]) })
    }

    #[test]
    fn neighbours_are_read_at_once() {
        let (_file, restorer) = restorer(64, &Config { readers: 1, ..Config::default() });
        restorer.push([7, 5, 6, 8, 60].into_iter().enumerate().map(|(i, page)| wanted(i as u64, page)));
        let batches = [restorer.results.recv().unwrap(), restorer.results.recv().unwrap()];
        assert_eq!(batches.each_ref().map(|batch| batch.bytes), [4 * 4096, 4096]);
        for batch in &batches {
            for loaded in &batch.loaded {
                let page = [7, 5, 6, 8, 60][loaded.number as usize];
                assert_eq!(batch.page(loaded.outcome.unwrap()), [page; PAGE]);
            }
        }
    }

    #[test]
    fn other_bytes_are_refused() {
        let (_file, restorer) = restorer(4, &Config::default());
        let (key, _) = wanted(0, 1);
        let (_, other) = wanted(0, 2);
        restorer.push([(key, other)].into_iter());
        let batch = restorer.results.recv().unwrap();
        assert_eq!(batch.loaded[0].outcome, Err(Refusal::Hash));
        assert_eq!(restorer.check(0, 4 * 4096), Err(Refusal::OutOfBounds));
        assert_eq!(restorer.check(0, 100), Err(Refusal::OutOfBounds));
        assert_eq!(restorer.check(1, 0), Err(Refusal::UnknownDisk));
        assert_eq!(restorer.check(9, 0), Err(Refusal::UnknownDisk));
    }

    #[test]
    fn it_ends_with_all_batches_out_and_work_left() {
        let config = Config { readers: 2, read_bytes: 4096, in_flight_bytes: 8192, ..Config::default() };
        let (_file, mut restorer) = restorer(32, &config);
        restorer.push((0..32).map(|page| wanted(u64::from(page), page)));
        let batch = restorer.results.recv().unwrap();
        let readers = std::mem::take(&mut restorer.readers);
        drop(restorer);
        drop(batch);
        for reader in readers {
            reader.join().unwrap();
        }
    }
}
