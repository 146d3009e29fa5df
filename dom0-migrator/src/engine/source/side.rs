//! The source's end of the side channel.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, bounded};

use crate::engine::config::{Config, DiskName};
use crate::engine::error::SideError;
use crate::engine::reference_map::{Place, ReferenceMap};
use crate::engine::side_message::{Answer, Hello, Report};
use crate::engine::xen_stream::PAGE;

/// What came over the side channel.
#[derive(Debug)]
pub(super) enum SideEvent {
    Report(Report),
    Lost(SideError),
}

impl SideEvent {
    /// The event of a side channel that is of no more use.
    pub(super) fn lost(why: &'static str) -> Self {
        Self::Lost(SideError::Malformed(why))
    }
}

/// The side channel, once it is open.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) key: [u8; 32],
    pub(super) window_pages: u32,
    /// For each disk of the map: its index in the hello, if the target has opened it.
    pub(super) disks: Vec<Option<u8>>,
    pub(super) events: Receiver<SideEvent>,
    pub(super) socket: UnixStream,
    pub(super) reader: JoinHandle<()>,
}

impl Side {
    pub(super) fn open(
        fd: OwnedFd,
        disks: &[DiskName],
        map: &ReferenceMap,
        config: &Config,
    ) -> Result<(Self, Answer), SideError> {
        let failed = |what| move |source| SideError::Io { what, source };
        // Any stream socket will do: only read, write, timeouts and shutdown are used, which all of them share.
        let mut socket = UnixStream::from(fd);
        let timeout = Some(config.hello_timeout);
        socket.set_read_timeout(timeout).map_err(failed("setting a timeout"))?;
        socket.set_write_timeout(timeout).map_err(failed("setting a timeout"))?;
        let wanted = u32::try_from(config.window_bytes / PAGE as u64).unwrap_or(u32::MAX);
        let hello = Hello { key: random_key()?, window_pages: wanted, disks: disks.to_vec() };
        hello.write(&mut socket)?;
        let answer = Answer::read(&mut socket)?;
        if answer.disks.len() != disks.len()
            || answer.disks.iter().zip(disks).any(|(a, d)| a.vdev != d.vdev.0)
        {
            return Err(SideError::Malformed("the answer is about other disks"));
        }
        for disk in &answer.disks {
            match &disk.problem {
                None => tracing::info!(vdev = disk.vdev, bytes = disk.size_bytes, "target opened the disk"),
                Some(problem) => tracing::warn!(vdev = disk.vdev, problem, "target did not open the disk"),
            }
        }
        let opened = |vdev| {
            let index = answer.disks.iter().position(|disk| disk.vdev == vdev && disk.problem.is_none())?;
            u8::try_from(index).ok()
        };
        let usable = map.vdevs().iter().map(|vdev| opened(vdev.0)).collect();
        socket.set_read_timeout(None).map_err(failed("setting a timeout"))?;
        let mut incoming = socket.try_clone().map_err(failed("copying the descriptor"))?;
        let (events_tx, events) = bounded(256);
        let reader = std::thread::Builder::new()
            .name("source-side".into())
            .spawn(move || {
                loop {
                    let event = Report::read(&mut incoming).map_or_else(SideEvent::Lost, SideEvent::Report);
                    let lost = matches!(event, SideEvent::Lost(_));
                    let gone = events_tx.send(event).is_err();
                    if lost || gone {
                        return;
                    }
                }
            })
            .map_err(failed("starting the side channel's thread"))?;
        let window_pages = wanted.min(answer.max_outstanding);
        Ok((Self { key: hello.key, window_pages, disks: usable, events, socket, reader }, answer))
    }

    /// The index in the hello of the disk that a place is on, if the target has opened it.
    pub(super) fn disk(&self, place: Place) -> Option<u8> {
        self.disks.get(place.disk as usize).copied().flatten()
    }

    pub(super) fn close(self) {
        drop(self.events);
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = self.reader.join();
    }
}

fn random_key() -> Result<[u8; 32], SideError> {
    use std::io::Read as _;
    let mut key = [0; 32];
    let mut file = std::fs::File::open("/dev/urandom").map_err(SideError::Random)?;
    file.read_exact(&mut key).map_err(SideError::Random)?;
    Ok(key)
}
