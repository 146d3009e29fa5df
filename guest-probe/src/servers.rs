//! All mysqlds that are probed: they come and go, each by itself, and one generation of lists has the frames of all.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use enlightenment::device::Publish;

use crate::device::{Device, DeviceError};
use crate::page_cache;
use crate::process::{Choice, MysqldProcess, ProcessError, ProcessKey};
use crate::session::{Options, Server, Session, SessionError};
use crate::status::Answer;
use crate::urgency::Urgent;
use crate::wrong_hints::WrongHints;

/// A server that could not be probed is tried again after this time, then after twice that, and so on.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// And at the latest after this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A server that is not probed.
#[derive(Debug)]
pub struct Refused {
    /// Why not, or why not yet.
    pub error: SessionError,
    pause: Duration,
    next_try: Instant,
}

/// The probed servers. To drop it, or to [`Servers::detach`], takes all probes out.
pub struct Servers {
    options: Options,
    choice: Choice,
    sessions: BTreeMap<ProcessKey, Session>,
    refused: BTreeMap<ProcessKey, Refused>,
    /// For cached pages of files; each session has its own.
    wrong_hints: Option<WrongHints>,
}

impl Servers {
    /// None yet.
    pub fn new(options: Options, choice: Choice) -> Self {
        let wrong_hints = options.wrong_hints.map(|seed| WrongHints::new(!seed));
        Self { options, choice, sessions: BTreeMap::new(), refused: BTreeMap::new(), wrong_hints }
    }

    /// Attaches to every chosen server that runs and is not probed yet, and returns to how many. One that cannot be probed stands in
    /// [`Servers::refused`]: for good when its program is not known, else until it is tried again.
    ///
    /// # Errors
    /// [`ProcessError`] when processes cannot be listed, or the only one that is chosen is gone.
    pub fn attach(&mut self) -> Result<usize, ProcessError> {
        let running = MysqldProcess::all(self.choice)?;
        self.refused.retain(|key, _| running.iter().any(|process| process.key() == *key));
        let mut attached = 0;
        for process in running {
            let key = process.key();
            if self.sessions.contains_key(&key) || self.refused.get(&key).is_some_and(Refused::waits) {
                continue;
            }
            match Server::open(process).and_then(|server| Session::attach(server, &self.options)) {
                Ok(session) => {
                    let (_, snapshot_took) = session.snapshots();
                    tracing::info!(
                        pid = key.pid,
                        package = session.server().build.package,
                        frames = session.table().len(),
                        ?snapshot_took,
                        "probes are in place"
                    );
                    self.refused.remove(&key);
                    self.sessions.insert(key, session);
                    attached += 1;
                }
                Err(error) => {
                    let before = self.refused.get(&key);
                    // Said once, not at each try.
                    if before.is_none_or(|before| before.error.to_string() != error.to_string()) {
                        tracing::warn!(pid = key.pid, %error, "this mysqld is not probed");
                    }
                    let pause = before.map_or(FIRST_PAUSE, |before| before.pause * 2).min(LONGEST_PAUSE);
                    self.refused.insert(key, Refused { error, pause, next_try: Instant::now() + pause });
                }
            }
        }
        Ok(attached)
    }

    /// Takes the events that wait, and forgets servers that have ended; returns how many had.
    ///
    /// # Errors
    /// The last one of those of servers that run on.
    pub fn update(&mut self) -> Result<usize, SessionError> {
        let mut failed = None;
        let before = self.sessions.len();
        self.sessions.retain(|_, session| match session.update() {
            Ok(()) => is_alive(session),
            Err(error) => {
                let alive = is_alive(session);
                if alive {
                    failed = Some(error);
                }
                alive
            }
        });
        failed.map_or(Ok(before - self.sessions.len()), Err)
    }

    /// Takes all probes out.
    pub fn detach(&mut self) {
        self.sessions.clear();
        self.refused.clear();
    }

    /// Publishes the lists of all servers as things are now, as the answer to a request. A server that ends meanwhile, or whose pool
    /// cannot be read at this moment, is left out, and the others are published without it.
    ///
    /// # Errors
    /// [`DeviceError`]; then what was published before stays.
    pub fn publish(&mut self, device: &mut impl Device, answers: u64) -> Result<Answer, DeviceError> {
        let start = Instant::now();
        let _urgent = Urgent::begin();
        let mut without: BTreeMap<ProcessKey, SessionError> = BTreeMap::new();
        let mut is_second_look = false;
        loop {
            let generation = device.begin()?;
            let mut answer = Answer { sequence: answers, generation, ..Answer::default() };
            let mut failed = None;
            let mut would_list_more = false;
            for (key, session) in self.sessions.iter_mut().filter(|(key, _)| !without.contains_key(key)) {
                match session.add_lists(device, generation) {
                    Ok((lists, translated)) => {
                        answer.pages_listed += translated.listed;
                        answer.pages_unmapped += translated.unmapped;
                        would_list_more |= session.would_list_more(&lists);
                        answer.tables.extend(session.by_table(&lists));
                        answer.lists.add(&lists);
                        answer.servers += 1;
                    }
                    Err(SessionError::Device(error)) => return Err(error),
                    Err(error) => {
                        failed = Some((*key, error));
                        break;
                    }
                }
            }
            // Runs that were added cannot be taken back: another generation is begun, with one server less each time.
            if let Some((key, error)) = failed {
                tracing::warn!(pid = key.pid, %error, "this mysqld is left out of the lists");
                without.insert(key, error);
                continue;
            }
            if would_list_more && !is_second_look {
                tracing::debug!("the lists are built once more: there is more to be had");
                is_second_look = true;
                continue;
            }
            if self.options.page_cache {
                self.add_page_cache(device, generation, &mut answer)?;
            }
            let lists = &answer.lists;
            device.publish(&Publish {
                generation,
                answers,
                frames_read: lists.frames_read,
                frames_written: lists.frames_written,
                pool_frames_clean: lists.pool_frames_clean,
                pool_frames: lists.pool_frames,
            })?;
            answer.left_out = without.iter().map(|(key, error)| (key.pid, error.to_string())).collect();
            answer.milliseconds = start.elapsed().as_millis() as u64;
            return Ok(answer);
        }
    }

    /// Adds the cached pages of files to a generation. Lists without them are still lists.
    fn add_page_cache(
        &mut self,
        device: &mut impl Device,
        generation: u64,
        answer: &mut Answer,
    ) -> Result<(), DeviceError> {
        let own = std::process::id() as i32;
        let processes = self.sessions.values().map(|session| &session.server().process);
        let wrong_hints = &mut self.wrong_hints;
        let summary = page_cache::build(processes, self.options.rule, page_cache::PATIENCE, |runs| {
            if let Some(hints) = wrong_hints {
                hints.spoil(runs);
            }
            let added = device.add(generation, own, runs)?;
            answer.pages_listed += added.listed;
            answer.pages_unmapped += added.unmapped;
            Ok(())
        })?;
        answer.page_cache = Some(summary);
        Ok(())
    }

    /// Why a server that is not probed never can be, if there is such a one; it is forgotten here.
    pub fn take_final_refusal(&mut self) -> Option<SessionError> {
        let key = self.refused.iter().find(|(_, refused)| refused.error.is_final()).map(|(key, _)| *key)?;
        self.refused.remove(&key).map(|refused| refused.error)
    }

    /// Those that are probed.
    pub fn sessions(&self) -> impl Iterator<Item = (&ProcessKey, &Session)> {
        self.sessions.iter()
    }

    /// Hints about cached pages of files that were made wrong on purpose.
    pub fn cache_hints_made_wrong(&self) -> u64 {
        self.wrong_hints.as_ref().map_or(0, WrongHints::made_wrong)
    }

    /// How many are probed.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether none is probed.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Those that run and are not probed.
    pub fn refused(&self) -> impl Iterator<Item = (&ProcessKey, &Refused)> {
        self.refused.iter()
    }
}

impl Refused {
    fn waits(&self) -> bool {
        self.error.is_final() || Instant::now() < self.next_try
    }
}

fn is_alive(session: &Session) -> bool {
    let process = &session.server().process;
    let alive = process.is_alive();
    if !alive {
        tracing::info!(pid = process.pid, "mysqld has ended");
    }
    alive
}
