//! What `migrate` and `receive` hand to the processes that libxl and xl start for them, and hear back.
//!
//! Between the command and the save helper stand xl, libxl and, on the source, a shell. The environment goes through all of
//! them, so it carries the name of a unix socket ([`ENVIRONMENT`]); the helper connects, says who it is, and gets its [`Order`]
//! with the sockets that belong to it. The name is an abstract one, which goes with its process however that one ends; each side
//! looks at whose process the other one is. So no descriptor has to be inherited through xl, whose
//! daemon would keep it open for as long as the domain lives.
//!
//! ```text
//! helper                                   command
//!   │ ── Event::Hello { role, domain } ──────►│
//!   │ ◄──────────── Order, and its socket ────│
//!   │ ── Event::… while it works ────────────►│
//!   │ ── a carrier: Event::Permission ───────►│
//!   │ ◄───────────────────────────── Answer ──│
//!   │ ── Event::Saved / Restored / Carried ──►│
//!   │ ── closes ─────────────────────────────►│
//! ```
//!
//! Messages are JSON, one packet each (`SOCK_SEQPACKET`).

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::sys::socket::{
    self, AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixAddr, sockopt::PeerCredentials,
};
use serde::{Deserialize, Serialize};

use crate::control::Token;
use crate::engine::{TRAVEL_BYTES_MAX, Travel};
use crate::helper::policy::Limits;
use crate::parcel;
use crate::report::{CarriedReport, RestoreReport, SaveReport};
use crate::timeline::{Mark, SourceSample};
use crate::xen::DomainId;

/// Environment variable with the socket's name, of hexadecimal digits.
pub const ENVIRONMENT: &str = "POOLSKIP_HANDOFF";

/// Longest message in a packet, in bytes; what is longer travels as a [`parcel`].
const MESSAGE_MAX: usize = 128 * 1024;

/// The packet that comes with a message in a parcel.
const PARCEL: &[u8] = b"parcel";
/// Longest such message in bytes.
const PARCEL_MAX: u64 = 8 << 20;
/// The packet that comes with [`Event::Travelled`].
const TRAVEL: &[u8] = b"travel";

/// Who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The save helper at the source.
    Save,
    /// The save helper at the target.
    Restore,
    /// What carries xl's stream to the network.
    Carrier,
}

/// A disk of a domain that is received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnDisk {
    /// Number of the virtual device.
    pub vdev: u32,
    /// Where this host finds it.
    pub path: PathBuf,
}

/// What a helper is to do. The socket that comes with it is the side channel (for a carrier, the stream).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// Whether a socket comes with it.
    pub socket: bool,
    /// Source: whether pages may go by reference.
    pub references: bool,
    /// Source: how long the guest may take to publish its lists, in seconds.
    pub wait_lists_seconds: u64,
    /// Whether all pages are to be compared at the end. The target then fails when nothing was compared.
    pub debug: bool,
    /// Target: the domain's disks as its configuration names them; no other is opened. Empty when the configuration could not
    /// be read: then none is.
    #[serde(default)]
    pub own_disks: Vec<OwnDisk>,
    /// Source: when to suspend the domain.
    #[serde(default)]
    pub limits: Limits,
    /// Source: the request by which the guest was asked for its lists already, so that it makes them while xl starts.
    #[serde(default)]
    pub asked: Option<u64>,
    /// Source: whether to look at the log of dirty pages during a pass, and leave pages that are marked again for a later one.
    #[serde(default)]
    pub peek: bool,
}

/// What a helper says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Who it is; the first message.
    Hello {
        /// Its role.
        role: Role,
        /// The domain that it works on; a carrier does not know.
        domain: Option<DomainId>,
        /// Its process.
        pid: u32,
    },
    /// How far a pass is.
    Progress {
        /// Passes begun.
        round: u32,
        /// Pages done in it.
        done: u64,
        /// Pages in it.
        total: u64,
    },
    /// Something to be shown while it works.
    Phase(String),
    /// The source's counters, about once a second.
    Sampled(SourceSample),
    /// Something happened at the source.
    Marked(Mark),
    /// How each page travelled. As it is, and not made into anything yet: the domain stands still while the source's helper
    /// says this.
    #[serde(skip)]
    Travelled(Travel),
    /// The source's helper is done.
    Saved(Box<SaveReport>),
    /// The target's helper is done.
    Restored(Box<RestoreReport>),
    /// The carrier holds xl's permission to run the domain at the target, and waits for an [`Answer`].
    Permission,
    /// The carrier is done.
    Carried(CarriedReport),
}

/// What a carrier is to tell its xl, which has given permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The domain runs at the target: xl removes its copy.
    Runs,
    /// It does not run there, and never will: xl lets its copy run on.
    Kept,
    /// Nobody knows: xl leaves its copy as it is, suspended.
    Doubt,
}

/// Why the handoff failed.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    /// A system call failed.
    #[error("{what} on the handoff socket: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Not a message of ours.
    #[error("handoff message cannot be understood: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The other side closed it too early.
    #[error("the handoff socket was closed before {0}")]
    Closed(&'static str),
    /// The order names a socket that did not come.
    #[error("the order came without its socket")]
    NoSocket,
    /// The process at the other end is another user's.
    #[error("process {pid} at the other end of the handoff socket belongs to user {user}")]
    Stranger {
        /// The process.
        pid: i32,
        /// Its user.
        user: u32,
    },
}

fn io(what: &'static str) -> impl FnOnce(nix::Error) -> HandoffError {
    move |error| HandoffError::Io { what, source: error.into() }
}

/// The command's end: a listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    name: String,
}

impl Listener {
    /// Listens under a new name.
    ///
    /// # Errors
    /// [`HandoffError::Io`].
    pub fn bind() -> Result<Self, HandoffError> {
        let token = Token::random().map_err(|source| HandoffError::Io { what: "a name", source })?;
        let name = token.to_string();
        let socket = packet_socket()?;
        socket::bind(socket.as_raw_fd(), &address(&name)?).map_err(io("bind"))?;
        socket::listen(&socket, Backlog::new(8).map_err(io("listen"))?).map_err(io("listen"))?;
        Ok(Self { socket, name })
    }

    /// The name for [`ENVIRONMENT`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for a helper. Fails once [`close`](Self::close) was called.
    ///
    /// # Errors
    /// [`HandoffError::Io`].
    pub fn accept(&self) -> Result<Peer, HandoffError> {
        loop {
            let accepted =
                socket::accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC).map_err(io("accept"))?;
            // SAFETY: the kernel has just given us this descriptor.
            let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
            match of_our_user(&accepted) {
                Ok(()) => return Ok(Peer(accepted)),
                Err(error) => tracing::warn!(%error, "turned away"),
            }
        }
    }

    /// Ends a waiting [`accept`](Self::accept), now and later.
    pub fn close(&self) {
        let _ = socket::shutdown(self.socket.as_raw_fd(), socket::Shutdown::Both);
    }
}

/// A message's bytes, and the descriptor that came with it.
type Packet = (Vec<u8>, Option<OwnedFd>);

/// One end of a connection.
#[derive(Debug)]
pub struct Peer(OwnedFd);

impl Peer {
    /// Connects to the command that set [`ENVIRONMENT`]; `None` when there is none, as when libxl runs under another toolstack.
    ///
    /// # Errors
    /// [`HandoffError::Io`] when the command is gone.
    pub fn from_environment() -> Result<Option<Self>, HandoffError> {
        std::env::var_os(ENVIRONMENT).map(|name| Self::connect(&name.to_string_lossy())).transpose()
    }

    /// Connects to a listener by its name.
    ///
    /// # Errors
    /// [`HandoffError::Io`], [`HandoffError::Stranger`].
    pub fn connect(name: &str) -> Result<Self, HandoffError> {
        let socket = packet_socket()?;
        socket::connect(socket.as_raw_fd(), &address(name)?).map_err(io("connect"))?;
        of_our_user(&socket)?;
        Ok(Self(socket))
    }

    /// Says who we are and takes the order, with its socket.
    ///
    /// # Errors
    /// [`HandoffError`].
    pub fn introduce(
        &self,
        role: Role,
        domain: Option<DomainId>,
    ) -> Result<(Order, Option<OwnedFd>), HandoffError> {
        self.tell(&Event::Hello { role, domain, pid: std::process::id() })?;
        let (bytes, socket) = self.receive()?.ok_or(HandoffError::Closed("the order"))?;
        let order: Order = serde_json::from_slice(&bytes)?;
        if order.socket && socket.is_none() {
            return Err(HandoffError::NoSocket);
        }
        Ok((order, socket))
    }

    /// Says something.
    ///
    /// # Errors
    /// [`HandoffError`] when the command is gone.
    pub fn tell(&self, event: &Event) -> Result<(), HandoffError> {
        let packing = |source| HandoffError::Io { what: "pack", source };
        if let Event::Travelled(travel) = event {
            let file = parcel::pack(travel.pieces()).map_err(packing)?;
            return self.send(TRAVEL, Some(file.as_raw_fd()));
        }
        let bytes = serde_json::to_vec(event)?;
        if bytes.len() <= MESSAGE_MAX {
            return self.send(&bytes, None);
        }
        if bytes.len() as u64 > PARCEL_MAX {
            let text = format!("a message of {} bytes, {PARCEL_MAX} at most are taken", bytes.len());
            return Err(packing(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        let file = parcel::pack([&bytes[..]]).map_err(packing)?;
        self.send(PARCEL, Some(file.as_raw_fd()))
    }

    /// Gives an order, with its socket.
    ///
    /// # Errors
    /// [`HandoffError`] when the helper is gone.
    pub fn order(&self, order: &Order, socket: Option<&OwnedFd>) -> Result<(), HandoffError> {
        self.send(&serde_json::to_vec(order)?, socket.map(AsRawFd::as_raw_fd))
    }

    /// Answers a carrier that holds a permission.
    ///
    /// # Errors
    /// [`HandoffError`] when it is gone.
    pub fn answer(&self, answer: Answer) -> Result<(), HandoffError> {
        self.send(&serde_json::to_vec(&answer)?, None)
    }

    /// Waits for the answer to a permission. A command that is gone cannot say what became of the domain.
    pub fn wait_for_answer(&self) -> Answer {
        match self.receive() {
            Ok(Some((bytes, _))) => serde_json::from_slice(&bytes).unwrap_or(Answer::Doubt),
            Ok(None) | Err(_) => Answer::Doubt,
        }
    }

    /// Hears what the helper says; `None` when it is gone.
    ///
    /// # Errors
    /// [`HandoffError`] for a message that cannot be understood.
    pub fn hear(&self) -> Result<Option<Event>, HandoffError> {
        let unpacking = |source| HandoffError::Io { what: "unpack", source };
        Ok(match self.receive()? {
            Some((bytes, Some(file))) if bytes == PARCEL => {
                let bytes = parcel::unpack(file, PARCEL_MAX).map_err(unpacking)?;
                Some(serde_json::from_slice(&bytes)?)
            }
            Some((bytes, Some(file))) if bytes == TRAVEL => {
                let bytes = parcel::unpack(file, TRAVEL_BYTES_MAX).map_err(unpacking)?;
                Some(Event::Travelled(Travel::from_bytes(&bytes).unwrap_or_default()))
            }
            Some((bytes, _)) => Some(serde_json::from_slice(&bytes)?),
            None => None,
        })
    }

    fn send(&self, bytes: &[u8], descriptor: Option<RawFd>) -> Result<(), HandoffError> {
        let descriptors: Vec<RawFd> = descriptor.into_iter().collect();
        let control = [ControlMessage::ScmRights(&descriptors)];
        let control = if descriptors.is_empty() { &control[..0] } else { &control[..] };
        socket::sendmsg::<UnixAddr>(
            self.0.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map(|_| ())
        .map_err(io("send"))
    }

    fn receive(&self) -> Result<Option<Packet>, HandoffError> {
        let mut bytes = vec![0; MESSAGE_MAX];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = socket::recvmsg::<UnixAddr>(
            self.0.as_fd().as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .map_err(io("receive"))?;
        let length = message.bytes;
        let mut descriptors = Vec::new();
        for part in message.cmsgs().map_err(io("receive"))? {
            if let ControlMessageOwned::ScmRights(received) = part {
                // SAFETY: the kernel has just given us these descriptors.
                descriptors.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if length == 0 {
            return Ok(None);
        }
        bytes.truncate(length);
        Ok(Some((bytes, descriptors.into_iter().next())))
    }
}

fn address(name: &str) -> Result<UnixAddr, HandoffError> {
    UnixAddr::new_abstract(format!("poolskip-{name}").as_bytes()).map_err(io("address"))
}

/// An abstract name has no permissions: anybody may connect to it, or listen under it once we are gone.
fn of_our_user(socket: &OwnedFd) -> Result<(), HandoffError> {
    let other = socket::getsockopt(socket, PeerCredentials).map_err(io("credentials"))?;
    match other.uid() == nix::unistd::geteuid().as_raw() {
        true => Ok(()),
        false => Err(HandoffError::Stranger { pid: other.pid(), user: other.uid() }),
    }
}

fn packet_socket() -> Result<OwnedFd, HandoffError> {
    socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
        .map_err(io("socket"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Way;
    use crate::timeline::Moment;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn an_order_comes_with_its_socket() {
        let listener = Listener::bind().unwrap();
        let path = listener.name().to_owned();
        let helper = std::thread::spawn(move || {
            let peer = Peer::connect(&path).unwrap();
            let (order, socket) = peer.introduce(Role::Save, Some(DomainId(4))).unwrap();
            UnixStream::from(socket.unwrap()).write_all(b"through").unwrap();
            peer.tell(&Event::Phase("done".into())).unwrap();
            order
        });
        let (mut far, near) = UnixStream::pair().unwrap();
        let peer = listener.accept().unwrap();
        let hello = peer.hear().unwrap().unwrap();
        assert!(matches!(hello, Event::Hello { role: Role::Save, domain: Some(DomainId(4)), .. }));
        let order = Order { socket: true, references: true, wait_lists_seconds: 30, ..Order::default() };
        peer.order(&order, Some(&near.into())).unwrap();
        let mut text = String::new();
        far.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        assert_eq!(peer.hear().unwrap(), Some(Event::Phase("done".into())));
        assert_eq!(peer.hear().unwrap(), None);
        assert_eq!(helper.join().unwrap(), order);
    }

    #[test]
    fn a_number_arrives_as_it_was_said() {
        // What serde_json takes for another number when it is in a hurry.
        for seconds in
            [0.955_555_555_555_555_6, 1_729.000_000_000_000_2, 0.1 + 0.2, f64::MIN_POSITIVE, f64::MAX]
        {
            let said = Event::Marked(Mark { seconds, what: Moment::Suspended });
            let text = serde_json::to_string(&said).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), said, "{text}");
        }
        let digits = r#"{"marked":{"seconds":0.955555555555555555555555,"what":"suspended"}}"#;
        let heard: Event = serde_json::from_str(digits).unwrap();
        assert_eq!(serde_json::from_slice::<Event>(&serde_json::to_vec(&heard).unwrap()).unwrap(), heard);
    }

    #[test]
    fn a_report_of_any_length_arrives() {
        let travel = || {
            let mut travel = Travel::default();
            travel.span(70_000, 3, Way::Accepted);
            travel
        };
        let listener = Listener::bind().unwrap();
        let said = Event::Phase("long ".repeat(200_000));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let peer = Peer::connect(listener.name()).unwrap();
                peer.tell(&said).unwrap();
                peer.tell(&Event::Travelled(travel())).unwrap();
                peer.tell(&Event::Travelled(Travel::default())).unwrap();
                assert!(peer.tell(&Event::Phase("x".repeat(PARCEL_MAX as usize))).is_err());
            });
            let peer = listener.accept().unwrap();
            assert_eq!(peer.hear().unwrap().as_ref(), Some(&said));
            let Some(Event::Travelled(heard)) = peer.hear().unwrap() else { panic!("no map") };
            assert_eq!((heard.way(70_002), heard.way(70_003)), (Way::Accepted, Way::Unseen));
            assert_eq!(peer.hear().unwrap(), Some(Event::Travelled(Travel::default())));
            assert_eq!(peer.hear().unwrap(), None);
        });
    }

    #[test]
    fn another_user_s_process_is_turned_away() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("not tried: only root can be somebody else");
            return;
        }
        let listener = Listener::bind().unwrap();
        std::thread::scope(|scope| {
            let stranger = scope.spawn(|| {
                // Of this thread alone.
                // SAFETY: a system call without pointers.
                assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
                Peer::connect(listener.name())
            });
            let refused = stranger.join().unwrap();
            assert!(matches!(refused, Err(HandoffError::Stranger { user: 0, .. })), "{refused:?}");
        });
        // Its connection still waits to be accepted, before ours.
        let ours = Peer::connect(listener.name()).unwrap();
        ours.tell(&Event::Phase("ours".into())).unwrap();
        assert_eq!(listener.accept().unwrap().hear().unwrap(), Some(Event::Phase("ours".into())));
    }

    #[test]
    fn closing_ends_the_waiting() {
        let listener = Listener::bind().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.accept().is_err());
            std::thread::sleep(std::time::Duration::from_millis(50));
            listener.close();
            assert!(waiting.join().unwrap());
        });
    }
}
