//! The target's end of the side channel.

use std::io::Read as _;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use crate::engine::config::{Config, DiskName};
use crate::engine::disk::{Disk, DiskError};
use crate::engine::error::SideError;
use crate::engine::side_message::{Answer, Hello, MAX_VERDICTS, Refusal, Report, Verdicts};
use crate::engine::summary::DiskSummary;

/// How long the writer of verdicts may be blocked: a source that does not read them for so long is gone.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(30);

/// What the hello agreed on.
#[derive(Debug)]
pub(super) struct Agreed {
    pub(super) key: [u8; 32],
    pub(super) max_outstanding: u32,
    pub(super) disks: Vec<Option<Disk>>,
    pub(super) summaries: Vec<DiskSummary>,
}

/// What is to be said and was not yet, in verdicts and answers: a source that does not read what it asked for is given up beyond this.
#[derive(Debug)]
struct Unsaid {
    now: AtomicUsize,
    most: usize,
}

/// Where the filter says things.
#[derive(Clone, Debug)]
pub(super) struct Sayings {
    sender: Sender<Saying>,
    unsaid: Arc<Unsaid>,
    socket: Arc<UnixStream>,
}

impl Sayings {
    /// Says something. A side channel that is lost is noticed elsewhere.
    pub(super) fn say(&self, saying: Saying) {
        let count = saying.count();
        if self.unsaid.now.fetch_add(count, Ordering::AcqRel) + count > self.unsaid.most {
            tracing::warn!(most = self.unsaid.most, "the source does not read what it asked for");
            let _ = self.socket.shutdown(Shutdown::Both);
            return;
        }
        let _ = self.sender.send(saying);
    }
}

/// One verdict.
pub(super) type Verdict = (u64, Result<(), Refusal>);

/// What the filter has to say to the source.
#[derive(Debug)]
pub(super) enum Saying {
    Verdicts(Vec<Verdict>),
    Synced(u64),
}

impl Saying {
    fn count(&self) -> usize {
        match self {
            Self::Verdicts(verdicts) => verdicts.len(),
            Self::Synced(_) => 1,
        }
    }
}

/// The side channel's threads.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) agreed: Receiver<Agreed>,
    pub(super) sayings: Sayings,
    /// Has something in it once it is lost, or the source is done with it.
    pub(super) lost: Receiver<()>,
    pub(super) socket: UnixStream,
}

impl Side {
    pub(super) fn start(fd: OwnedFd, config: &Config) -> std::io::Result<Self> {
        // Any stream socket will do: only read, write, timeouts and shutdown are used, which all of them share.
        let socket = UnixStream::from(fd);
        let serving = socket.try_clone()?;
        let (agreed_tx, agreed) = bounded(1);
        // Bounded by `Unsaid`: a reference that is refused at once may be followed by another one for the same page, so that verdicts may be
        // more than references that are outstanding.
        let (sender, sayings_rx) = unbounded();
        let most = config.max_outstanding as usize * 2 + MAX_VERDICTS;
        let unsaid = Arc::new(Unsaid { now: AtomicUsize::new(0), most });
        let sayings = Sayings { sender, unsaid: unsaid.clone(), socket: Arc::new(socket.try_clone()?) };
        // One from the thread that writes, one from the thread that waits for the end.
        let (lost_tx, lost) = bounded(2);
        let config = config.clone();
        std::thread::Builder::new().name("target-side".into()).spawn(move || {
            if let Err(error) = serve(serving, &config, &agreed_tx, (&sayings_rx, &unsaid), &lost_tx) {
                tracing::warn!(%error, "side channel lost");
            }
            let _ = lost_tx.try_send(());
        })?;
        Ok(Self { agreed, sayings, lost, socket })
    }

    /// Ends the threads, and does not wait for them: nothing depends on them any more, since a source that has come to END
    /// has had every verdict that it needed. In peace what is still queued is sent first.
    pub(super) fn close(self, in_peace: bool) {
        drop(self.sayings);
        if !in_peace {
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }
}

/// The side channel's life: hello, answer, verdicts.
fn serve(
    mut socket: UnixStream,
    config: &Config,
    agreed: &Sender<Agreed>,
    sayings: (&Receiver<Saying>, &Unsaid),
    lost: &Sender<()>,
) -> Result<(), SideError> {
    let failed = |what| move |source| SideError::Io { what, source };
    socket.set_write_timeout(Some(VERDICT_TIMEOUT)).map_err(failed("setting a timeout"))?;
    let hello = Hello::read(&mut socket)?;
    let max_outstanding = hello.window_pages.min(config.max_outstanding);
    let opened: Vec<_> = hello.disks.iter().map(|disk| open_disk(disk, config)).collect();
    let summaries: Vec<_> = opened
        .iter()
        .zip(&hello.disks)
        .map(|(opened, name)| DiskSummary {
            vdev: name.vdev.0,
            size_bytes: opened.as_ref().map_or(0, Disk::size),
            problem: opened.as_ref().err().map(ToString::to_string),
        })
        .collect();
    let answer = Answer { max_outstanding, disks: summaries.clone() };
    let disks = opened.into_iter().map(Result::ok).collect();
    // The filter must have it before the source can send the first memory record.
    let _ = agreed.send(Agreed { key: hello.key, max_outstanding, disks, summaries });
    answer.write(&mut socket)?;

    // The source says nothing more; what a read brings is the end.
    let mut incoming = socket.try_clone().map_err(failed("copying the descriptor"))?;
    let lost = lost.clone();
    let watcher = std::thread::Builder::new()
        .name("target-side-end".into())
        .spawn(move || {
            let _ = incoming.read(&mut [0]);
            let _ = lost.try_send(());
        })
        .map_err(failed("starting the side channel's thread"))?;
    let result = write_sayings(&mut socket, sayings);
    let _ = socket.shutdown(Shutdown::Both);
    let _ = watcher.join();
    result
}

fn open_disk(name: &DiskName, config: &Config) -> Result<Disk, DiskError> {
    let path = match &config.own_disks {
        None => &name.path,
        Some(own) => {
            let own = own.iter().find(|own| own.vdev == name.vdev);
            &own.ok_or(DiskError::Unknown { vdev: name.vdev.0 })?.path
        }
    };
    let opened = Disk::open(path);
    match &opened {
        Ok(disk) => {
            tracing::info!(vdev = name.vdev.0, path = %path.display(), bytes = disk.size(), "disk opened")
        }
        Err(error) => tracing::warn!(vdev = name.vdev.0, %error, "disk not opened"),
    }
    opened
}

/// Sends what there is to say until the filter has ended, as many verdicts at once as are there.
fn write_sayings(
    socket: &mut UnixStream,
    (sayings, unsaid): (&Receiver<Saying>, &Unsaid),
) -> Result<(), SideError> {
    let mut accepted = Vec::new();
    let mut message = Verdicts::default();
    while let Ok(first) = sayings.recv() {
        accepted.clear();
        message.refused.clear();
        // A later sync number says all that an earlier one does, and what was said before it goes before it.
        let mut synced = None;
        let mut some = Some(first);
        let mut said = 0;
        while let Some(saying) = some {
            said += saying.count();
            match saying {
                Saying::Synced(number) => synced = Some(number),
                Saying::Verdicts(verdicts) => {
                    for (number, outcome) in verdicts {
                        match outcome {
                            Ok(()) => accepted.push(number),
                            Err(reason) => message.refused.push((number, reason)),
                        }
                    }
                }
            }
            let full = accepted.len().max(message.refused.len()) >= MAX_VERDICTS;
            some = if full { None } else { sayings.try_recv().ok() };
        }
        accepted.sort_unstable();
        message.accepted.clear();
        for &number in &accepted {
            match message.accepted.last_mut() {
                Some((first, count)) if *first + u64::from(*count) == number => *count += 1,
                _ => message.accepted.push((number, 1)),
            }
        }
        message.write(socket)?;
        if let Some(number) = synced {
            Report::Synced(number).write(socket)?;
        }
        unsaid.now.fetch_sub(said, Ordering::AcqRel);
    }
    Ok(())
}
