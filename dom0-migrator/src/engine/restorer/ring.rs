//! Reads through io_uring: one thread keeps as many in flight as the disk is worth.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};

use super::buffers::ReadBuffer;
use super::depth::Depth;
use super::queue::Job;
use super::{Extent, PAGES_TOGETHER, Read, Shared, Taken};

/// How long a wait for a completion lasts before the queue is looked at again: there may be something for another disk.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Buffers that a ring can know at most (`IORING_MAX_REG_BUFFERS`).
const MOST_REGISTERED: usize = 1 << 14;

/// A read that the kernel is doing.
struct InFlight {
    read: Read,
    began: Instant,
}

/// The ring and all that the kernel may write into.
pub(super) struct Ring {
    ring: IoUring,
    /// It begins disabled, so that the thread that it then belongs to is the one that reads.
    is_disabled: bool,
    /// Buffers that it may be told of, so that the kernel need not look up and hold their pages for each read. 0: none (any more).
    registrable: usize,
    /// By the number that the kernel gives back with the completion.
    in_flight: Vec<Option<InFlight>>,
    /// A read that waits for a buffer of its size.
    next: Option<Job>,
    free: Vec<usize>,
    count: usize,
    depth: Depth,
    epoch: Instant,
}

impl Ring {
    /// Asks the kernel for a ring.
    ///
    /// # Errors
    /// What the kernel says: ENOSYS where it has none, EPERM where it is forbidden (`kernel.io_uring_disabled`, seccomp).
    pub(super) fn new(first: usize, most: usize, buffers: usize) -> std::io::Result<Self> {
        let most = most.clamp(1, 1024);
        let entries = most.next_power_of_two() as u32;
        // One thread submits, and looks at completions when it waits for them: the kernel need not interrupt it before (Linux 6.1).
        let quiet =
            IoUring::builder().setup_single_issuer().setup_defer_taskrun().setup_r_disabled().build(entries);
        let (ring, is_disabled) = match quiet {
            Ok(ring) => (ring, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (IoUring::new(entries)?, false),
            Err(error) => return Err(error),
        };
        // Without it a wait could not end before the next completion; it came with Linux 5.11.
        if !ring.params().is_feature_ext_arg() {
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            is_disabled,
            registrable: buffers.min(MOST_REGISTERED),
            next: None,
            in_flight: (0..most).map(|_| None).collect(),
            free: (0..most).collect(),
            count: 0,
            depth: Depth::new(first, most),
            epoch: Instant::now(),
        })
    }

    /// Reads until there is nothing left to do for anybody. `Some`: the kernel has failed, and somebody else is to go on.
    pub(super) fn run(mut self, shared: &Arc<Shared>, done: &Sender<Vec<Read>>) -> Option<std::io::Error> {
        if let Err(error) = self.begin_ring() {
            return Some(error);
        }
        loop {
            if self.fill(shared).is_none() && self.count == 0 {
                return None;
            }
            if let Err(error) = self.wait() {
                return Some(self.give_up(error, done));
            }
            if !self.reap(done) && self.count == 0 {
                return None;
            }
        }
    }

    /// Makes it this thread's.
    fn begin_ring(&mut self) -> std::io::Result<()> {
        let submitter = self.ring.submitter();
        if self.is_disabled {
            submitter.register_enable_rings()?;
        }
        // Without it (Linux 5.19), or when no more memory may be held, reads are slower, and nothing else.
        if submitter.register_buffers_sparse(self.registrable as u32).is_err() {
            self.registrable = 0;
        }
        Ok(())
    }

    /// The number by which the ring knows the buffer, if it does.
    fn registered(&mut self, buffer: &mut ReadBuffer) -> Option<u16> {
        let number = buffer.number();
        if !buffer.is_registered && number < self.registrable {
            let memory = buffer.all();
            let piece = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
            // SAFETY: the kernel holds the pages themselves, so they stay even if the buffer is dropped. It writes to them only for a read with
            // this number, and `begin` gives the number only to reads into this very buffer, which alone has it.
            let told =
                unsafe { self.ring.submitter().register_buffers_update(number as u32, &[piece], None) };
            match told {
                Ok(()) => buffer.is_registered = true,
                // Most likely RLIMIT_MEMLOCK: those that it knows are used as before.
                Err(_) => self.registrable = number,
            }
        }
        buffer.is_registered.then_some(u16::try_from(number).ok()).flatten()
    }

    /// Begins as many reads as may be in flight. With none in flight it waits for something to do; `None`: it is over.
    fn fill(&mut self, shared: &Arc<Shared>) -> Option<()> {
        while self.count < self.depth.get() {
            // Not before there is room for the longest read is it decided what is read.
            let Some(room) = shared.large.take(self.count == 0) else { return Some(()) };
            let job = match self.next.take().map_or_else(|| shared.next_job(self.count == 0), Taken::Job) {
                Taken::Job(job) => job,
                Taken::Nothing => {
                    self.depth.was_idle(self.epoch.elapsed());
                    return Some(());
                }
                Taken::Over => return None,
            };
            if self.count == 0 {
                self.depth.was_idle(self.epoch.elapsed());
            }
            let mut buffer = room;
            if shared.small.fits(Extent::of(&job).length as usize) {
                match shared.small.take(self.count == 0) {
                    Some(small) => buffer = small,
                    None => {
                        self.next = Some(job);
                        return Some(());
                    }
                }
            }
            if buffer.is_none() {
                return None;
            }
            let read = Read { job, buffer, outcome: Ok(0), seconds: 0.0 };
            self.begin(shared, read);
        }
        Some(())
    }

    fn begin(&mut self, shared: &Arc<Shared>, mut read: Read) {
        let extent = Extent::of(&read.job);
        let fd: RawFd = shared.raw_fd(extent.disk);
        let Some(slot) = self.free.pop() else { return };
        let registered = self.registered(&mut read.buffer);
        let memory = read.buffer.get(extent.length as usize).as_mut_ptr();
        // An extent is at most a few MiB: `Config::read_bytes` is bounded.
        let length = extent.length as u32;
        let entry = match registered {
            Some(number) => {
                opcode::ReadFixed::new(Fd(fd), memory, length, number).offset(extent.start).build()
            }
            None => opcode::Read::new(Fd(fd), memory, length).offset(extent.start).build(),
        };
        let entry = entry.user_data(slot as u64);
        if let Some(place) = self.in_flight.get_mut(slot) {
            *place = Some(InFlight { read, began: Instant::now() });
        }
        self.count += 1;
        // SAFETY: `memory` points to `length` bytes of a buffer on the heap that `in_flight` now owns, and which neither moves nor is
        // freed before the completion is reaped: `reap` alone takes it out, and `give_up` leaks what is left. The descriptor is open as
        // long as `shared` is, which outlives this call's caller.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many entries as slots.
        debug_assert!(pushed.is_ok());
    }

    /// Hands new reads to the kernel and waits for a completion, or not for long.
    fn wait(&mut self) -> std::io::Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let timeout = Timespec::from(LOOK_AGAIN);
        let arguments = SubmitArgs::new().timespec(&timeout);
        // Several at once, so that what follows them goes to the disk together too.
        let several = (self.count / 2).max(1);
        match self.ring.submitter().submit_with_args(several, &arguments) {
            Ok(_) => Ok(()),
            // Time is over; a signal; the completion queue wants to be reaped first.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Hands completed reads on. False: nobody wants them.
    fn reap(&mut self, done: &Sender<Vec<Read>>) -> bool {
        let (mut reads, mut pages) = (Vec::new(), 0);
        for entry in self.ring.completion() {
            let slot = entry.user_data() as usize;
            let Some(mut finished) = self.in_flight.get_mut(slot).and_then(Option::take) else { continue };
            self.free.push(slot);
            self.count -= 1;
            finished.read.seconds = finished.began.elapsed().as_secs_f64();
            finished.read.outcome = match entry.result() {
                read @ 0.. => Ok(read as usize),
                errno => Err(std::io::Error::from_raw_os_error(-errno)),
            };
            let bytes = entry.result().max(0) as u64;
            self.depth.completed(bytes, self.epoch.elapsed());
            pages += finished.read.job.wanted.len();
            reads.push(finished.read);
            if pages >= PAGES_TOGETHER {
                pages = 0;
                if done.send(std::mem::take(&mut reads)).is_err() {
                    return false;
                }
            }
        }
        reads.is_empty() || done.send(reads).is_ok()
    }

    /// The ring itself has failed: its reads count as failed, and their memory is left to the kernel, which may still write to it.
    fn give_up(mut self, error: std::io::Error, done: &Sender<Vec<Read>>) -> std::io::Error {
        for finished in self.in_flight.iter_mut().filter_map(Option::take) {
            let Read { job, buffer, .. } = finished.read;
            std::mem::forget(buffer);
            let outcome = Err(std::io::ErrorKind::Other.into());
            let _ = done.send(vec![Read { job, buffer: ReadBuffer::default(), outcome, seconds: 0.0 }]);
        }
        error
    }
}
