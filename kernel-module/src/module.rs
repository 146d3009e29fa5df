//! The module as a whole: what each system call and each event does.

use enlightenment::device::{
    self, ADD, Add, BEGIN, Begin, MAX_ADD, PUBLISH, Publish, Request, STATS, STATS_FIRST, Stats, WITHDRAW,
};
use enlightenment::xenstore::{self, RequestKind};
use enlightenment::{ABI_VERSION, Pfn};

use crate::add::Workspace;
use crate::wire;
use crate::{Announcement, Counts, Errno, Lists, Requests, Shim};

/// Bytes of the request node that are read; more than any valid request has.
const REQUEST_BYTES: usize = 64;

/// All state of the module. The caller holds its lock around every call.
#[derive(Debug)]
pub struct Module {
    lists: Lists,
    requests: Requests,
    announcement: Announcement,
    workspace: Workspace,
    on_xen: bool,
    generations: u64,
    translated: u64,
    unmapped: u64,
    requested: u64,
    signals: u64,
    calls: u64,
    /// dom0 has said "begun" and not yet "ended": it is told nothing that it has not asked for.
    migrating: bool,
    untold: u64,
    /// The lists have changed since dom0 was told last.
    behind: bool,
}

impl Module {
    /// A module that has not started.
    pub const fn new() -> Self {
        Self {
            lists: Lists::new(),
            requests: Requests::new(),
            announcement: Announcement::new(),
            workspace: Workspace::new(),
            on_xen: false,
            generations: 0,
            translated: 0,
            unmapped: 0,
            requested: 0,
            signals: 0,
            calls: 0,
            migrating: false,
            untold: 0,
            behind: false,
        }
    }

    /// Starts: a root page, and on Xen the nodes by which dom0 finds it. Nodes that cannot be written are no error: the device
    /// works, and [`Stats::xen`] says 0.
    ///
    /// # Errors
    /// `ENOMEM`; nothing is held then.
    pub fn start<S: Shim>(&mut self, shim: &mut S, on_xen: bool) -> Result<(), Errno> {
        self.lists.start(shim)?;
        self.on_xen = on_xen;
        if let Some(root) = self.lists.root_pfn().filter(|_| on_xen) {
            // What stood there is of a module that is gone.
            self.announcement.make(shim, root, 0);
        }
        Ok(())
    }

    /// Whether dom0 can find the lists.
    pub fn is_announced(&self) -> bool {
        self.announcement.is_complete()
    }

    /// Stops, and frees everything.
    pub fn stop<S: Shim>(&mut self, shim: &mut S) {
        if let Some(root) = self.lists.root_pfn().filter(|_| self.on_xen) {
            self.announcement.unmake(shim, root);
        }
        self.lists.stop(shim);
        *self = Self::new();
    }

    /// The watch on the request node fired: at its registration, for a request, and when the domain has come to another host.
    pub fn watch_fired<S: Shim>(&mut self, shim: &mut S) {
        let Some(root) = self.lists.root_pfn().filter(|_| self.on_xen) else { return };
        if !self.announcement.is_ours(shim, root) {
            self.arrived(shim, root);
        }
        let mut value = [0; REQUEST_BYTES];
        let Some(length) = shim.xenstore_read(xenstore::REQUEST, &mut value) else { return };
        let Some(kind) = value.get(..length).and_then(|value| self.requests.offer(value)) else { return };
        self.requested += 1;
        match kind {
            RequestKind::Begun => self.migrating = true,
            RequestKind::Ended => self.catch_up(shim),
            // One in the middle of a migration is answered like any other.
            RequestKind::Snapshot => {}
        }
    }

    /// The nodes are not ours: this is another host, whose dom0 has not begun anything, or they were removed.
    fn arrived<S: Shim>(&mut self, shim: &mut S, root: Pfn) {
        self.announcement.make(shim, root, self.lists.active());
        self.migrating = false;
        self.behind = false;
    }

    /// The migration has ended and the guest is still here: dom0 hears once of all that it was not told.
    fn catch_up<S: Shim>(&mut self, shim: &mut S) {
        self.migrating = false;
        if core::mem::take(&mut self.behind) {
            self.tell(shim, self.lists.active(), 0);
        }
    }

    /// Whether a request waits.
    pub fn has_request(&self) -> bool {
        self.requests.first().is_some()
    }

    /// `read(2)`: one request.
    ///
    /// # Errors
    /// `EINVAL` when there is no room for one, `EAGAIN` when there is none, `EFAULT` (the request still waits then).
    pub fn read<S: Shim>(&mut self, shim: &mut S, to: u64, room: usize) -> Result<usize, Errno> {
        if room < size_of::<Request>() {
            return Err(Errno::EINVAL);
        }
        let request = self.requests.first().ok_or(Errno::EAGAIN)?;
        shim.copy_to_user(to, &wire::request_bytes(&request))?;
        self.requests.remove_first();
        Ok(size_of::<Request>())
    }

    /// The device was closed: what was begun and not published is dropped.
    pub fn close<S: Shim>(&mut self, shim: &mut S) {
        self.lists.drop_open(shim);
    }

    /// `ioctl(2)`.
    ///
    /// # Errors
    /// As [`enlightenment::device`] has them; a call that fails changes nothing, but that a [`BEGIN`] whose number cannot be
    /// written back has dropped the generation that was open.
    pub fn ioctl<S: Shim>(&mut self, shim: &mut S, command: u32, argument: u64) -> Result<(), Errno> {
        match command {
            BEGIN => self.begin(shim, argument)?,
            ADD => self.add(shim, argument)?,
            PUBLISH => self.publish(shim, argument)?,
            WITHDRAW => {
                self.lists.withdraw(shim);
                self.tell(shim, 0, 0);
            }
            STATS => return shim.copy_to_user(argument, &wire::stats_bytes(&self.stats())),
            STATS_FIRST => {
                let bytes = wire::stats_bytes(&self.stats());
                return shim.copy_to_user(argument, bytes.get(..Stats::FIRST_SIZE).unwrap_or(&[]));
            }
            _ => return Err(Errno::ENOTTY),
        }
        self.calls += 1;
        Ok(())
    }

    fn begin<S: Shim>(&mut self, shim: &mut S, argument: u64) -> Result<(), Errno> {
        let mut bytes = [0; size_of::<Begin>()];
        shim.copy_from_user(&mut bytes, argument)?;
        let begin = wire::begin(&bytes);
        if begin.version != ABI_VERSION {
            return Err(Errno::EPROTONOSUPPORT);
        }
        if begin.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let generation = self.lists.begin(shim);
        wire::put_u64(&mut bytes, core::mem::offset_of!(Begin, generation), generation);
        shim.copy_to_user(argument, &bytes).inspect_err(|_| self.lists.drop_open(shim))
    }

    fn add<S: Shim>(&mut self, shim: &mut S, argument: u64) -> Result<(), Errno> {
        let mut bytes = [0; size_of::<Add>()];
        shim.copy_from_user(&mut bytes, argument)?;
        let add = wire::add(&bytes);
        self.lists.check_open(add.generation)?;
        if add.count > MAX_ADD {
            return Err(Errno::E2BIG);
        }
        let Some(mark) = self.lists.mark() else { return Err(Errno::ESTALE) };
        let process = shim.hold(add.pid)?;
        let added = self.workspace.add(shim, &mut self.lists, &process, add.runs, add.count);
        shim.release(process);
        let result = added.and_then(|added| {
            wire::put_u64(&mut bytes, core::mem::offset_of!(Add, pages_listed), added.listed);
            wire::put_u64(&mut bytes, core::mem::offset_of!(Add, pages_unmapped), added.unmapped);
            shim.copy_to_user(argument, &bytes)?;
            self.translated += added.listed;
            self.unmapped += added.unmapped;
            Ok(())
        });
        if result.is_err() {
            self.lists.rewind(shim, mark);
        }
        result
    }

    fn publish<S: Shim>(&mut self, shim: &mut S, argument: u64) -> Result<(), Errno> {
        let mut bytes = [0; size_of::<Publish>()];
        shim.copy_from_user(&mut bytes, argument)?;
        let publish: device::Publish = wire::publish(&bytes);
        let counts = Counts {
            frames_read: publish.frames_read,
            frames_written: publish.frames_written,
            pool_frames_clean: publish.pool_frames_clean,
            pool_frames: publish.pool_frames,
        };
        self.lists.publish(shim, publish.generation, &counts)?;
        self.generations += 1;
        self.tell(shim, publish.generation, publish.answers);
        Ok(())
    }

    /// Tells dom0 of a generation. While a migration goes on only what it has asked for: whatever is written meanwhile is sent anyway,
    /// and each signal would cost the guest two hypercalls and dom0 a process that wakes up.
    fn tell<S: Shim>(&mut self, shim: &mut S, generation: u64, answers: u64) {
        if self.migrating && answers == 0 {
            self.untold += 1;
            self.behind = true;
            return;
        }
        if self.announcement.tell(shim, generation, answers) {
            self.signals += 1;
        }
    }

    fn stats(&self) -> Stats {
        Stats {
            generations: self.generations,
            pages_translated: self.translated,
            pages_unmapped: self.unmapped,
            requests: self.requested,
            signals: self.signals,
            list_pages: self.lists.list_pages(),
            root_pfn: self.lists.root_pfn().map_or(0, |pfn| pfn.0),
            xen: u64::from(self.announcement.is_complete()),
            calls: self.calls,
            migrating: u64::from(self.migrating),
            untold: self.untold,
            requests_forgotten: self.requests.forgotten(),
        }
    }
}

impl Default for Module {
    fn default() -> Self {
        Self::new()
    }
}
