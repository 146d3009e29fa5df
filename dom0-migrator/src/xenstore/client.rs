//! The connection, and the calls made over it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::wire::{HEADER, Header, Kind, PAYLOAD_MAX, payload};

/// Where xenstored listens when it runs in this domain.
const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
/// The kernel's way to xenstored, wherever it runs.
const DEVICES: [&str; 2] = ["/dev/xen/xenbus", "/proc/xen/xenbus"];

/// Why a call on xenstore failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no xenstore here.
    #[error(
        "no xenstore: neither {socket} nor {device} can be opened ({0}); is xenstored running, and are you root?",
        socket = SOCKETS[0],
        device = DEVICES[0]
    )]
    NotThere(io::Error),
    /// The connection broke.
    #[error("xenstore, {call} {path}: {source}")]
    Io {
        /// The call.
        call: &'static str,
        /// Its node.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// xenstored refused.
    #[error("xenstore, {call} {path}: {error}")]
    Refused {
        /// The call.
        call: &'static str,
        /// Its node.
        path: String,
        /// The error's name, as ENOENT.
        error: String,
    },
    /// A reply that makes no sense.
    #[error("xenstore, {call} {path}: {problem}")]
    Protocol {
        /// The call.
        call: &'static str,
        /// Its node.
        path: String,
        /// What is wrong.
        problem: &'static str,
    },
}

/// What this program does with xenstore; a fake stands in its place in tests.
pub trait Store {
    /// A node's value, `None` when there is no such node.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>, StoreError>;
    /// Names of the nodes below one; none when there is no such node.
    ///
    /// # Errors
    /// [`StoreError`].
    fn directory(&mut self, path: &str) -> Result<Vec<String>, StoreError>;
    /// Sets a node's value.
    ///
    /// # Errors
    /// [`StoreError`].
    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError>;

    /// A node's value as text, `None` when there is no such node or it is not UTF-8.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read_text(&mut self, path: &str) -> Result<Option<String>, StoreError> {
        Ok(self.read(path)?.and_then(|value| String::from_utf8(value).ok()))
    }
}

/// A connection to xenstored.
#[derive(Debug)]
pub struct Xenstore {
    connection: File,
    next_request: u32,
    watch_fired: bool,
}

impl Xenstore {
    /// Connects; to the socket that the environment variable `XENSTORED_PATH` names, if it is set, as Xen's own library does.
    ///
    /// # Errors
    /// [`StoreError::NotThere`].
    pub fn open() -> Result<Self, StoreError> {
        if let Some(path) = std::env::var_os("XENSTORED_PATH") {
            let stream = UnixStream::connect(path).map_err(StoreError::NotThere)?;
            return Ok(Self::over(OwnedFd::from(stream).into()));
        }
        let mut first_error = None;
        for path in SOCKETS {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(Self::over(OwnedFd::from(stream).into())),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        for path in DEVICES {
            if let Ok(device) = File::options().read(true).write(true).open(Path::new(path)) {
                return Ok(Self::over(device));
            }
        }
        Err(StoreError::NotThere(first_error.unwrap_or_else(|| io::ErrorKind::NotFound.into())))
    }

    /// A client over a connection that is there.
    pub fn over(connection: File) -> Self {
        Self { connection, next_request: 1, watch_fired: false }
    }

    /// Has [`take_watch_event`](Self::take_watch_event) tell when the node or one below it changes; it tells once at once.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn watch(&mut self, path: &str) -> Result<(), StoreError> {
        let body = payload(&[(path.as_bytes(), true), (b"poolskip", true)]);
        self.call("watch", Kind::Watch, path, &body).map(|_| ())
    }

    /// Tells xenstored that a suspended domain goes on here, so that its next shutdown is noticed again (`xs_resume_domain`).
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn resume_domain(&mut self, domain: crate::xen::DomainId) -> Result<(), StoreError> {
        let number = domain.to_string();
        let body = payload(&[(number.as_bytes(), true)]);
        self.call("resume", Kind::Resume, &number, &body).map(|_| ())
    }

    /// Takes a message that has come, and says whether a watch has fired since the last time. Blocks when nothing has come and
    /// no watch has fired: poll the descriptor first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn take_watch_event(&mut self) -> Result<bool, StoreError> {
        if !self.watch_fired {
            let (header, _) = self.receive("watch", "")?;
            self.watch_fired = header.kind == Kind::WatchEvent as u32;
        }
        Ok(std::mem::take(&mut self.watch_fired))
    }

    /// Whether a watch has fired while another call waited for its reply.
    pub fn watch_pending(&self) -> bool {
        self.watch_fired
    }

    fn call(
        &mut self,
        call: &'static str,
        kind: Kind,
        path: &str,
        body: &[u8],
    ) -> Result<Vec<u8>, StoreError> {
        let problem = |problem| StoreError::Protocol { call, path: path.to_owned(), problem };
        if body.len() > PAYLOAD_MAX {
            return Err(problem("value longer than xenstore allows"));
        }
        let request = self.next_request;
        self.next_request = self.next_request.wrapping_add(1);
        let header = Header { kind: kind as u32, request, length: body.len() as u32 };
        let mut message = header.encode().to_vec();
        message.extend_from_slice(body);
        self.connection.write_all(&message).map_err(|source| StoreError::Io {
            call,
            path: path.to_owned(),
            source,
        })?;
        loop {
            let (header, reply) = self.receive(call, path)?;
            if header.kind == Kind::WatchEvent as u32 {
                self.watch_fired = true;
            } else if header.request != request {
                return Err(problem("reply to another request"));
            } else if header.kind == Kind::Error as u32 {
                let end = reply.iter().position(|&byte| byte == 0).unwrap_or(reply.len());
                let error = String::from_utf8_lossy(&reply[..end]).into_owned();
                return Err(StoreError::Refused { call, path: path.to_owned(), error });
            } else if header.kind == kind as u32 {
                return Ok(reply);
            } else {
                return Err(problem("reply of another kind"));
            }
        }
    }

    fn receive(&mut self, call: &'static str, path: &str) -> Result<(Header, Vec<u8>), StoreError> {
        let failed = |source| StoreError::Io { call, path: path.to_owned(), source };
        let mut header = [0; HEADER];
        self.connection.read_exact(&mut header).map_err(failed)?;
        let header = Header::decode(header).ok_or_else(|| StoreError::Protocol {
            call,
            path: path.to_owned(),
            problem: "reply longer than xenstore allows",
        })?;
        let mut body = vec![0; header.length as usize];
        self.connection.read_exact(&mut body).map_err(failed)?;
        Ok((header, body))
    }
}

/// Nothing, for a node that is not there.
fn found<T>(result: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(StoreError::Refused { error, .. }) if error == "ENOENT" => Ok(None),
        Err(error) => Err(error),
    }
}

impl Store for Xenstore {
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        found(self.call("read", Kind::Read, path, &payload(&[(path.as_bytes(), true)])))
    }

    fn directory(&mut self, path: &str) -> Result<Vec<String>, StoreError> {
        let names =
            found(self.call("directory", Kind::Directory, path, &payload(&[(path.as_bytes(), true)])))?;
        Ok(names
            .unwrap_or_default()
            .split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect())
    }

    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.call("write", Kind::Write, path, &payload(&[(path.as_bytes(), true), (value, false)]))
            .map(|_| ())
    }
}

impl AsFd for Xenstore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers each request with what the test gives, watch events among them.
    fn served(answers: Vec<(Kind, &'static [u8])>) -> Xenstore {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut answers = answers.into_iter();
            let mut header = [0; HEADER];
            while theirs.read_exact(&mut header).is_ok() {
                let request = Header::decode(header).unwrap();
                let mut body = vec![0; request.length as usize];
                theirs.read_exact(&mut body).unwrap();
                for (kind, answer) in answers.by_ref() {
                    let number = if kind == Kind::WatchEvent { 0 } else { request.request };
                    let header = Header { kind: kind as u32, request: number, length: answer.len() as u32 };
                    theirs.write_all(&header.encode()).unwrap();
                    theirs.write_all(answer).unwrap();
                    if kind != Kind::WatchEvent {
                        break;
                    }
                }
            }
        });
        Xenstore::over(OwnedFd::from(ours).into())
    }

    #[test]
    fn a_value_is_read_and_a_missing_one_is_none() {
        let mut store =
            served(vec![(Kind::Read, b"12"), (Kind::Error, b"ENOENT\0"), (Kind::Error, b"EACCES\0")]);
        assert_eq!(store.read_text("/a").unwrap().as_deref(), Some("12"));
        assert_eq!(store.read("/b").unwrap(), None);
        assert!(store.read("/c").unwrap_err().to_string().contains("EACCES"));
    }

    #[test]
    fn names_are_split_and_watch_events_kept() {
        let mut store = served(vec![(Kind::WatchEvent, b"/a\0poolskip\0"), (Kind::Directory, b"one\0two\0")]);
        assert_eq!(store.directory("/").unwrap(), ["one", "two"]);
        assert!(store.watch_pending());
        assert!(store.take_watch_event().unwrap());
        assert!(!store.watch_pending());
    }

    #[test]
    fn a_reply_of_another_kind_is_an_error() {
        let mut store = served(vec![(Kind::Directory, b"x\0")]);
        assert!(matches!(store.read("/a"), Err(StoreError::Protocol { .. })));
    }
}
